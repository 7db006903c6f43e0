"""The magnitude-preserving U-Net of EDM2: `net(x, t, y) -> out`, shapes as in models/unet.py.

Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", sections
2.3 and 2.4, appendix B, configuration G; equation numbers below are the paper's. Every layer maps
activations of mean square 1 to mean square 1, also after training: weight vectors have a fixed
length. There are no biases and no group norms. The learning rate alone sets how fast the network
changes, so it must decay (`inverse_sqrt`).
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ddpm.common.registry import check_choice
from ddpm.models.layers import NearestUpsample, check_labels, head_count, timestep_embedding
from ddpm.models.unet import check_shape, check_size, level_sides

LIMIT = 256.0  # activations are clipped to it, so that none overflows in half precision


def unit(x, dims, eps=1e-4):
    """Return x over its root mean square along `dims`, in x's dtype; pixel norm for dims (1,)."""
    # a list: torch.compile breaks the graph at a generator
    size = math.prod([x.shape[dim] for dim in dims])
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (norm / math.sqrt(size) + eps).to(x.dtype)


def mp_silu(x):
    """Return SiLU over its root mean square for standard-normal input (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    """Return (1 - t) a + t b, normalised for uncorrelated a and b (eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a, b, t=0.5):
    """Concatenate channels, weighted 1 - t to t regardless of their numbers (eq. 103)."""
    scale = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - t, t)
    return torch.cat(
        [a * (scale * (1 - t) / math.sqrt(a.shape[1])), b * (scale * t / math.sqrt(b.shape[1]))],
        dim=1,
    )


class MPSines(nn.Module):
    """Sines and cosines of timesteps, mean square 1: t [b] -> [b, dim]."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, t):
        return timestep_embedding(t, self.dim) * math.sqrt(self.dim / max(self.dim // 2, 1))


class MPFourier(nn.Module):
    """Random Fourier features of c_noise [b] -> [b, dim], equal in all networks (eq. 75)."""

    def __init__(self, dim):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        frequencies = 2 * math.pi * torch.randn(dim, generator=generator, device="cpu")
        phases = 2 * math.pi * torch.rand(dim, generator=generator, device="cpu")
        # on the device of the network
        self.register_buffer("frequencies", torch.empty(dim).copy_(frequencies))
        self.register_buffer("phases", torch.empty(dim).copy_(phases))

    def forward(self, c_noise):
        angles = rearrange(c_noise.float(), "b -> b 1") * self.frequencies + self.phases
        return torch.cos(angles) * math.sqrt(2)


class MPConv(nn.Module):
    """A convolution that keeps the image size, or a dense layer for `kernel_size` 0 (eq. 47).

    Weight vectors have length 1. In training mode each call normalises the stored weights (eq. 66),
    so that each optimiser step rotates them equally; the gradient passes through the normalisation,
    which removes its component along the weights.
    """

    def __init__(self, in_channels, out_channels, kernel_size=0):
        super().__init__()
        kernel = (kernel_size, kernel_size) if kernel_size else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))

    def forward(self, x, gain=1.0):
        dims = tuple(range(1, self.weight.ndim))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(unit(self.weight, dims))
        weight = unit(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))
        if len(dims) == 1:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)


class MPBlock(nn.Module):
    """A residual block, with attention if `heads`: x [b, inputs, h, w], emb -> [b, outputs, h, w].

    In the encoder the main branch has pixel norm, the network's only norm. emb [b, embedding]
    scales channels, initially by 1. `resize` is up, down or None.
    """

    def __init__(
        self, inputs, outputs, embedding, dropout=0, heads=0, is_encoder=True, resize=None
    ):
        super().__init__()
        self.heads = heads
        self.is_encoder = is_encoder
        self.resizes = resize is not None
        resizers = {"up": NearestUpsample(), "down": nn.AvgPool2d(2), None: nn.Identity()}
        self.resize = resizers[resize]
        self.shortcut = nn.Identity() if inputs == outputs else MPConv(inputs, outputs, 1)
        self.conv1 = MPConv(outputs if is_encoder else inputs, outputs, 3)
        self.project = MPConv(embedding, outputs)
        self.gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.conv2 = MPConv(outputs, outputs, 3)
        if heads:
            self.qkv = MPConv(outputs, 3 * outputs, 1)
            self.mix = MPConv(outputs, outputs, 1)

    def forward(self, x, emb):
        x = self.resize(x)
        if self.is_encoder:
            x = unit(self.shortcut(x), (1,))
        scale = 1 + rearrange(self.project(emb, self.gain), "b c -> b c 1 1")
        h = self.conv2(self.dropout(mp_silu(self.conv1(mp_silu(x)) * scale)))
        x = mp_sum(x if self.is_encoder else self.shortcut(x), h, 0.3)
        if self.heads:
            x = mp_sum(x, self.attend(x), 0.3)
        return x.clamp(-LIMIT, LIMIT)

    def attend(self, x):
        """Return cosine attention over all pixels: queries, keys, values of length sqrt(d)."""
        h, w = x.shape[-2:]
        qkv = rearrange(
            self.qkv(x), "b (three heads d) h w -> three b heads (h w) d", three=3, heads=self.heads
        )
        out = F.scaled_dot_product_attention(*unit(qkv, (-1,)).contiguous())
        return self.mix(rearrange(out, "b heads (h w) d -> b (heads d) h w", h=h, w=w))


class UNetEDM2(nn.Module):
    """A U-Net as in models/unet.py, of magnitude-preserving layers; a fresh one returns zeros.

    `noise_embedding` names an entry of NOISE_EMBEDDINGS: `sines` where t counts timesteps,
    `fourier` where t is a log noise level. The other arguments and the errors are those of UNet.
    """

    def __init__(
        self,
        image_size,
        in_channels,
        out_channels,
        model_channels,
        channel_mult,
        num_res_blocks,
        attention_resolutions,
        num_heads=1,
        num_head_channels=None,
        dropout=0,
        num_classes=None,
        noise_embedding="sines",
    ):
        super().__init__()
        blocks = (num_res_blocks,) * len(channel_mult)
        counts = {"in_channels": in_channels, "out_channels": out_channels}
        counts |= {"num_res_blocks": num_res_blocks}
        check_shape(counts, model_channels, channel_mult, blocks, num_classes)
        sides = level_sides(image_size, len(channel_mult), attention_resolutions)
        attends = [side in attention_resolutions for side in sides]
        widths = [mult * model_channels for mult in channel_mult]
        embedding = max(widths)
        self.halvings = len(channel_mult) - 1
        self.num_classes = num_classes

        def block(inputs, outputs, attends=False, **options):
            heads = head_count(outputs, num_heads, num_head_channels) if attends else 0
            return MPBlock(inputs, outputs, embedding, dropout, heads, **options)

        check_choice("noise embedding", noise_embedding, list(NOISE_EMBEDDINGS))
        self.noise_features = NOISE_EMBEDDINGS[noise_embedding](model_channels)
        self.time_embedding = MPConv(model_channels, embedding)
        self.class_embedding = None if num_classes is None else MPConv(num_classes, embedding)
        self.stem = MPConv(in_channels + 1, model_channels, 3)
        self._add_levels(model_channels, widths, num_res_blocks, attends, block)
        self.head = MPConv(widths[0], out_channels, 3)
        self.gain = nn.Parameter(torch.zeros(()))

    def _add_levels(self, channels, widths, num_res_blocks, attends, block):
        """Add encoder, middle and decoder; weights are drawn in this order."""
        self.levels = [[] for _ in widths]  # the blocks by size of the image, the largest first
        skips = [channels]
        self.encoder = nn.ModuleList()
        for level, width in enumerate(widths):
            if level:
                self.encoder.append(block(channels, channels, resize="down"))
                self.levels[level - 1].append(self.encoder[-1])
                skips.append(channels)
            for _ in range(num_res_blocks):
                self.encoder.append(block(channels, width, attends[level]))
                self.levels[level].append(self.encoder[-1])
                channels = width
                skips.append(channels)
        first = block(channels, channels, True, is_encoder=False)
        self.middle = nn.ModuleList([first, block(channels, channels, is_encoder=False)])
        self.levels[-1] += self.middle
        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                inputs = channels + skips.pop()
                self.decoder.append(block(inputs, width, attends[level], is_encoder=False))
                self.levels[level].append(self.decoder[-1])
                channels = width
            if level:
                self.decoder.append(block(channels, channels, is_encoder=False, resize="up"))
                self.levels[level].append(self.decoder[-1])

    def embed(self, t, y, dtype):
        """Return emb [b, e] of times t [b] and labels y [b], zero where y is -1 or None."""
        check_labels(y, self.class_embedding)
        emb = self.time_embedding(self.noise_features(t).to(dtype))
        if self.class_embedding is not None:
            y = torch.full(t.shape, -1, device=t.device) if y is None else y
            one_hot = F.one_hot(y.clamp(min=0), self.num_classes) * rearrange(y >= 0, "b -> b 1")
            one_hot = one_hot * math.sqrt(self.num_classes)
            emb = mp_sum(emb, self.class_embedding(one_hot.to(dtype)), 0.5)
        return mp_silu(emb)

    def forward(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None
    ) -> torch.Tensor:
        check_size(x.shape[-2:], self.halvings)
        emb = self.embed(t, y, x.dtype)
        h = self.stem(torch.cat([x, torch.ones_like(x[:, :1])], dim=1))  # the ones stand for a bias
        skips = [h]
        for block in self.encoder:
            h = block(h, emb)
            skips.append(h)
        for block in self.middle:
            h = block(h, emb)
        for block in self.decoder:
            h = block(h if block.resizes else mp_cat(h, skips.pop()), emb)
        return self.head(h, self.gain)


NOISE_EMBEDDINGS = {
    "sines": MPSines,
    "fourier": MPFourier,
}
