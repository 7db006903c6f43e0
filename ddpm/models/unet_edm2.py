"""The magnitude-preserving U-Net of Karras et al. 2024, "Analyzing and Improving the Training
Dynamics of Diffusion Models" (EDM2, sections 2.3 and 2.4, appendix B, configuration G): `net(x, t,
y) -> out`, the network waist, as models/unet.py has it.

Every layer returns numbers of mean square 1 for numbers of mean square 1, and keeps doing so:
weight vectors have length 1 whatever the optimiser does to them. So there are no biases and no
group norms, and the learning rate alone says how fast the network changes: it has to fall
(inverse_sqrt). Equations are the paper's.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from ddpm.common.registry import check_choice
from ddpm.models.layers import NearestUpsample, head_count, timestep_embedding
from ddpm.models.unet import UNet, check_size

LIMIT = 256.0  # of activations, so that none overflows in half precision


def unit(x, dims, eps=1e-4):
    """x over its root mean square along `dims`; along channels it is pixel norm."""
    # a list: torch.compile breaks the graph at a generator
    size = math.prod([x.shape[dim] for dim in dims])
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=torch.float32)
    return x / (norm / math.sqrt(size) + eps).to(x.dtype)


def mp_silu(x):
    """SiLU over the root mean square that it has for normal numbers (eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a, b, t):
    """(1 - t) a + t b of two that are uncorrelated (eq. 88)."""
    return torch.lerp(a, b, t) / math.hypot(1 - t, t)


def mp_cat(a, b, t=0.5):
    """a and b side by side, weighed so that what follows hears them as 1 - t to t whatever their
    widths (eq. 103).
    """
    scale = math.sqrt(a.shape[1] + b.shape[1]) / math.hypot(1 - t, t)
    return torch.cat(
        [a * (scale * (1 - t) / math.sqrt(a.shape[1])), b * (scale * t / math.sqrt(b.shape[1]))],
        dim=1,
    )


class MPSines(nn.Module):
    """Sines and cosines of timesteps with mean square 1: t [b] -> [b, dim]."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, t):
        return timestep_embedding(t, self.dim) * math.sqrt(self.dim / max(self.dim // 2, 1))


class MPFourier(nn.Module):
    """Random Fourier features of a logarithm of the noise, with mean square 1 (eq. 75): c_noise [b]
    -> [b, dim].

    Frequencies are 2 pi times normal numbers, phases uniform, the same in every network of one
    width.
    """

    def __init__(self, dim):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        frequencies = 2 * math.pi * torch.randn(dim, generator=generator, device="cpu")
        phases = 2 * math.pi * torch.rand(dim, generator=generator, device="cpu")
        # on the device of the network
        self.register_buffer("frequencies", torch.empty(dim).copy_(frequencies))
        self.register_buffer("phases", torch.empty(dim).copy_(phases))

    def forward(self, c_noise):
        return torch.cos(
            rearrange(c_noise.float(), "b -> b 1") * self.frequencies + self.phases
        ) * math.sqrt(2)


class MPConv(nn.Module):
    """A convolution that keeps the image size, or a dense layer where `kernel_size` is 0; weight
    vectors of length 1 (eq. 47).

    While training they are set to that length at each call (eq. 66), so that a step of the
    optimiser always turns them equally far; the gradient passes through the normalisation, which
    takes away its part along the weights.
    """

    def __init__(self, in_channels, out_channels, kernel_size=0):
        super().__init__()
        self.weight = nn.Parameter(
            torch.randn(out_channels, in_channels, *[kernel_size] * (2 * (kernel_size > 0)))
        )

    def forward(self, x, gain=1.0):
        dims = tuple(range(1, self.weight.ndim))
        if self.training:
            with torch.no_grad():
                self.weight.copy_(unit(self.weight, dims))
        weight = unit(self.weight, dims) * (gain / math.sqrt(self.weight[0].numel()))
        return (
            F.linear(x, weight)
            if len(dims) == 1
            else F.conv2d(x, weight, padding=weight.shape[-1] // 2)
        )


class MPBlock(nn.Module):
    """A residual block and, where there are `heads`, attention: x [b, inputs, h, w], emb [b,
    embedding] -> [b, outputs, h, w].

    In the encoder the main branch passes pixel norm, which is the network's only one. The embedding
    scales channels, from 1 at first. `resize` is up, down or none.
    """

    def __init__(self, inputs, outputs, embedding, dropout=0, heads=0, encodes=True, resize=None):
        super().__init__()
        self.heads = heads
        self.encodes = encodes
        self.resizes = resize is not None
        self.resize = {"up": NearestUpsample(), "down": nn.AvgPool2d(2), None: nn.Identity()}[
            resize
        ]
        self.shortcut = nn.Identity() if inputs == outputs else MPConv(inputs, outputs, 1)
        self.conv1 = MPConv(outputs if encodes else inputs, outputs, 3)
        self.project = MPConv(embedding, outputs)
        self.gain = nn.Parameter(torch.zeros(()))
        self.dropout = nn.Dropout(dropout)
        self.conv2 = MPConv(outputs, outputs, 3)
        if heads:
            self.qkv = MPConv(outputs, 3 * outputs, 1)
            self.mix = MPConv(outputs, outputs, 1)

    def forward(self, x, emb):
        x = self.resize(x)
        if self.encodes:
            x = unit(self.shortcut(x), (1,))
        scale = 1 + rearrange(self.project(emb, self.gain), "b c -> b c 1 1")
        h = self.conv2(self.dropout(mp_silu(self.conv1(mp_silu(x)) * scale)))
        x = mp_sum(x if self.encodes else self.shortcut(x), h, 0.3)
        if self.heads:
            x = mp_sum(x, self.attend(x), 0.3)
        return x.clamp(-LIMIT, LIMIT)

    def attend(self, x):
        """Every pixel attends to every pixel, by the angles between vectors of length sqrt(d)."""
        h, w = x.shape[-2:]
        qkv = rearrange(
            self.qkv(x), "b (three heads d) h w -> three b heads (h w) d", three=3, heads=self.heads
        )
        out = F.scaled_dot_product_attention(*unit(qkv, (-1,)).contiguous())
        return self.mix(rearrange(out, "b heads (h w) d -> b (heads d) h w", h=h, w=w))


class UNetEDM2(nn.Module):
    """A U-Net as in models/unet.py, in magnitude-preserving layers; a fresh one returns zeros.

    `noise_embedding` names an entry of NOISE_EMBEDDINGS: `sines` where t counts timesteps,
    `fourier` where it is a logarithm of the noise. The other arguments are those of UNet. Raises
    ValueError for what UNet refuses.
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
        with torch.device("meta"):  # takes no memory, and refuses what no U-Net can be
            UNet(
                image_size,
                in_channels,
                out_channels,
                model_channels,
                channel_mult,
                num_res_blocks,
                attention_resolutions,
                num_heads,
                num_head_channels,
                num_classes=num_classes,
            )
        self.halvings = len(channel_mult) - 1
        self.num_classes = num_classes
        side = image_size if isinstance(image_size, int) else min(image_size)
        widths = [mult * model_channels for mult in channel_mult]
        embedding = max(widths)

        def block(inputs, outputs, attends=False, **how):
            heads = head_count(outputs, num_heads, num_head_channels) if attends else 0
            return MPBlock(inputs, outputs, embedding, dropout, heads, **how)

        self.noise_features = NOISE_EMBEDDINGS[
            check_choice("noise embedding", noise_embedding, list(NOISE_EMBEDDINGS))
        ](model_channels)
        self.time_embedding = MPConv(model_channels, embedding)
        self.class_embedding = None if num_classes is None else MPConv(num_classes, embedding)

        channels = model_channels
        self.stem = MPConv(in_channels + 1, channels, 3)
        skips = [channels]
        self.encoder = nn.ModuleList()
        self.levels = [[] for _ in widths]  # the blocks at each size of image, the largest first
        for level, width in enumerate(widths):
            if level:
                self.encoder.append(block(channels, channels, resize="down"))
                self.levels[level - 1].append(self.encoder[-1])
                skips.append(channels)
            for _ in range(num_res_blocks):
                self.encoder.append(block(channels, width, side >> level in attention_resolutions))
                self.levels[level].append(self.encoder[-1])
                channels = width
                skips.append(channels)

        self.middle = nn.ModuleList(
            [
                block(channels, channels, True, encodes=False),
                block(channels, channels, encodes=False),
            ]
        )

        self.levels[-1] += self.middle
        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(num_res_blocks + 1):
                attends = side >> level in attention_resolutions
                self.decoder.append(block(channels + skips.pop(), width, attends, encodes=False))
                self.levels[level].append(self.decoder[-1])
                channels = width
            if level:
                self.decoder.append(block(channels, channels, encodes=False, resize="up"))
                self.levels[level].append(self.decoder[-1])

        self.head = MPConv(channels, out_channels, 3)
        self.gain = nn.Parameter(torch.zeros(()))

    def embed(self, t, y, dtype):
        """The embedding [b, e] of times and labels; y None is every label dropped, and a dropped
        label adds zero.
        """
        emb = self.time_embedding(self.noise_features(t).to(dtype))
        if self.class_embedding is not None:
            y = torch.full(t.shape, -1, device=t.device) if y is None else y
            chosen = (
                F.one_hot(y.clamp(min=0), self.num_classes)
                * rearrange(y >= 0, "b -> b 1")
                * math.sqrt(self.num_classes)
            )
            emb = mp_sum(emb, self.class_embedding(chosen.to(dtype)), 0.5)
        elif y is not None:
            raise ValueError(
                "labels were given to a network without classes; set num_classes, or pass y=None"
            )
        return mp_silu(emb)

    def forward(self, x, t, y=None):
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
