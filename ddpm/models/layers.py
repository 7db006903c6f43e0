"""Layers of the networks: embeddings, residual block, attention block, up- and downsampling.

    x [b, c, h, w]; t [b], float or integer; y [b] int64 labels or None
    emb [b, e], the embedding of time, class and augmentation

Layers follow Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B, and its code;
scale-shift norm and resizing inside a block follow Dhariwal & Nichol 2021, "Diffusion Models Beat
GANs". Initialisation is Ho's: weights Glorot uniform, biases zero, and zero weights in layers that
end a residual branch or the network. `initialize_as_torch` changes it to OpenAI's.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t, dim, max_period=10000, freq_shift=1):
    """Return sines, then cosines, of t [b] at geometric frequencies: float32 [b, dim].

    Frequency k is max_period^(-k / (dim // 2 - freq_shift)), from 1 down to about 1 / max_period;
    `freq_shift` is 1 in Ho's code and 0 in OpenAI's. An odd `dim` ends in a zero.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(k * (-math.log(max_period) / max(half - freq_shift, 1)))
    angles = rearrange(t.float(), "b -> b 1") * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def without_autocast(x):
    """Return the context in which x keeps its dtype: float32 norms would double the memory."""
    kind = "cpu" if x.is_meta else x.device.type  # meta has no autocast to turn off
    return torch.autocast(kind, enabled=False)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that keeps the input dtype; accumulation is float32 either way."""

    def forward(self, x):
        with without_autocast(x):
            return F.group_norm(
                x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
            )


def norm_groups(channels):
    """Return the number of groups for a norm of `channels`: at most 32, of at least 4 channels.

    32 as in Ho's code, min(32, channels // 4) as in EDM (Karras et al. 2022). A group of one
    channel would subtract the time and class embedding, which add a constant to each channel.
    """
    return max(min(32, channels // 4), 1)


def group_norm(channels, most=0, eps=1e-6):
    """Return a GroupNorm of the most groups, up to `most` or `norm_groups`, that divide evenly."""
    groups = max(n for n in range(1, (most or norm_groups(channels)) + 1) if channels % n == 0)
    return GroupNorm(groups, channels, eps=eps)


def initialized(layer, zero):
    """Return the layer with Glorot-uniform weights, or zeros if `zero`, and zero bias."""
    layer.starts_at_zero = zero
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def linear(in_features, out_features, zero=False):
    """Return a dense layer; `zero`: with zero weights."""
    return initialized(nn.Linear(in_features, out_features), zero)


def conv(in_channels, out_channels, kernel_size, zero=False):
    """Return a convolution that keeps the image size; `zero`: with zero weights."""
    padding = kernel_size // 2
    return initialized(nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding), zero)


def initialize_as_torch(net):
    """Redraw weights and biases by torch's defaults, except weights that start at zero."""
    for layer in net.modules():
        is_random = not getattr(layer, "starts_at_zero", False)
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and is_random:
            layer.reset_parameters()


def recompute(modules):
    """Recompute the modules' activations in the backward pass instead of keeping them.

    Same numbers for one more forward pass (Chen et al. 2016, "Training Deep Nets with Sublinear
    Memory Cost"). The random state is kept where a module has dropout.
    """
    for module in modules:
        drops = any(isinstance(layer, nn.Dropout) and layer.p for layer in module.modules())
        module.forward = partial(
            checkpoint, module.forward, use_reentrant=False, preserve_rng_state=drops
        )


class NearestUpsample(nn.Module):
    """Repeat each pixel 2 x 2, in the input dtype: [b, c, h, w] -> [b, c, 2h, 2w]."""

    def forward(self, x):
        with without_autocast(x):
            return F.interpolate(x, scale_factor=2, mode="nearest")


class Upsample(nn.Module):
    """Nearest-neighbour resize, then a 3x3 convolution: [b, c, h, w] -> [b, c, 2h, 2w]."""

    def __init__(self, channels):
        super().__init__()
        self.resize = NearestUpsample()
        self.conv = conv(channels, channels, 3)

    def forward(self, x):
        return self.conv(self.resize(x))


class Downsample(nn.Module):
    """3x3 convolution, stride 2, centred on the second of two pixels, or first with `padding` 1."""

    def __init__(self, channels, padding=0):
        super().__init__()
        layer = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        self.conv = initialized(layer, zero=False)

    def forward(self, x):
        # TensorFlow's "SAME" padding, as Ho's weights expect: one row of zeros, at the far end
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with the embedding in between, plus a shortcut.

    x [b, in_channels, h, w], emb [b, embedding_channels] -> [b, out_channels, h, w], or twice
    (`up`) or half (`down`) that size. The embedding is added before the second norm or, with
    `use_scale_shift_norm`, scales and shifts its output. `norm(channels)` returns a norm.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        embedding_channels,
        dropout=0,
        use_scale_shift_norm=False,
        up=False,
        down=False,
        norm=group_norm,
    ):
        super().__init__()
        assert not (up and down), "a block resizes one way"
        self.use_scale_shift_norm = use_scale_shift_norm
        self.resize = nn.Identity()
        if up or down:
            self.resize = NearestUpsample() if up else nn.AvgPool2d(2)
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3)
        self.project = linear(embedding_channels, (1 + use_scale_shift_norm) * out_channels)
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, 3, zero=True)
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = conv(in_channels, out_channels, 1)

    @property
    def is_conditioned(self):
        """Whether the output depends on emb: a norm with one channel a group removes it."""
        return self.use_scale_shift_norm or self.norm2.num_groups < self.norm2.num_channels

    def forward(self, x, emb):
        h = self.conv1(self.resize(F.silu(self.norm1(x))))
        emb = self.project(F.silu(emb))
        if self.use_scale_shift_norm:
            scale, shift = rearrange(emb, "b (two c) -> two b c 1 1", two=2)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + rearrange(emb, "b c -> b c 1 1"))
        h = self.conv2(self.dropout(F.silu(h)))
        return self.shortcut(self.resize(x)) + h


def check_counts(counts, largest=math.inf):
    """Raise ValueError unless all values of `counts`, name -> number, are in 1 .. largest."""
    for name, count in counts.items():
        if not 1 <= count <= largest:
            limit = "" if largest == math.inf else f", up to {largest}"
            raise ValueError(f"{name} is {count}; use 1 or more{limit}")


def check_multiple(size, factor, trouble, remedy):
    """Raise ValueError, `trouble` and `remedy`, unless `factor` divides both sides of `size`."""
    if all(side >= factor and side % factor == 0 for side in size):
        return
    smaller = tuple(max(side // factor, 1) * factor for side in size)
    larger = tuple(max(-(-side // factor), 1) * factor for side in size)
    sizes = (f"{h}" if h == w else f"({h}, {w})" for h, w in (size, smaller, larger))
    actual, *fitting = sizes
    raise ValueError(
        f"image_size {actual} {trouble}; use {' or '.join(dict.fromkeys(fitting))}, or {remedy}"
    )


def check_labels(y, embedding):
    """Raise ValueError for labels y without an embedding."""
    if y is not None and embedding is None:
        raise ValueError(
            "labels were given to a network without classes; set num_classes, or pass y=None"
        )


class ConditionedNetwork(nn.Module):
    """The time, class and augmentation embeddings of a network, and their sum `emb` [b, width]."""

    def add_embeddings(self, features, width, num_classes, augmentation, augmentation_place):
        """Create the layers: time features [b, features] and y [b] -> emb [b, width].

        `augmentation` numbers, if any, are added to the time features ("before" the layers, as in
        EDM's code) or to the embedding ("after"), by weights that start at zero.
        """
        self.time_embedding = nn.Sequential(
            linear(features, width), nn.SiLU(), linear(width, width)
        )
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes, width)
        self.augments_after = augmentation_place == "after"
        self.augmentation_embedding = None
        if augmentation:
            outputs = width if self.augments_after else features
            self.augmentation_embedding = nn.Linear(augmentation, outputs, bias=False)
            self.augmentation_embedding.starts_at_zero = True
            nn.init.zeros_(self.augmentation_embedding.weight)

    def embed(self, features, y, augmentation):
        """Return emb [b, width] of time features [b, n], labels [b] or None, where -1 adds zero.

        `augmentation` [b, n] are the transforms of data.augment, or None. Raises ValueError for
        labels and transforms that the network has no embedding of.
        """
        check_labels(y, self.class_embedding)
        if augmentation is not None and self.augmentation_embedding is None:
            raise ValueError(
                "this network has no embedding of augmentation; build it with augmentation=9 or do "
                "not augment"
            )
        if augmentation is not None and not self.augments_after:
            features = features + self.augmentation_embedding(augmentation.to(features.dtype))
        emb = self.time_embedding(features)
        if y is not None:
            emb = emb + self.class_embedding(y.clamp(min=0)) * rearrange(y >= 0, "b -> b 1")
        if augmentation is not None and self.augments_after:
            emb = emb + self.augmentation_embedding(augmentation.to(emb.dtype))
        return emb


def head_count(channels, num_heads, num_head_channels=None):
    """Return `num_heads` or channels / num_head_channels; ValueError if it does not divide."""
    by_heads = num_head_channels is None
    divisor = num_heads if by_heads else num_head_channels
    divisors = [n for n in range(1, channels + 1) if channels % n == 0]
    if divisor not in divisors:
        name = "num_heads" if by_heads else "num_head_channels"
        options = ", ".join(map(str, divisors))
        raise ValueError(
            f"{name} {divisor} does not divide {channels} channels; use one of {options}"
        )
    return divisor if by_heads else channels // divisor


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm that keeps the input dtype, also under autocast."""

    def forward(self, x):
        with without_autocast(x):
            return (F.rms_norm(x, self.normalized_shape, eps=self.eps) * self.weight).to(x.dtype)


def query_key_norms(dim, wanted):
    """Return two learned RMS norms over the last axis (epsilon as in SD3), or identities."""
    return [RMSNorm(dim, eps=1e-6) if wanted else nn.Identity() for _ in range(2)]


def dense(conv, tokens):
    """Apply a 1x1 convolution to tokens [b, n, c] as a dense layer, which is faster on a CPU."""
    return F.linear(tokens, rearrange(conv.weight, "o i 1 1 -> o i"), conv.bias)


class AttentionBlock(nn.Module):
    """Self-attention over all pixels plus the input; x [b, c, h, w] -> the same shape.

    `num_heads` heads, or as many as have `num_head_channels` channels each; `norm(channels)`
    returns a norm. `qk_norm`: learned RMS norms of each head's queries and keys, which bound the
    logits (Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters"; Esser et
    al. 2024). Raises ValueError if the heads do not divide `channels`.
    """

    def __init__(
        self, channels, num_heads=1, num_head_channels=None, norm=group_norm, qk_norm=False
    ):
        super().__init__()
        self.heads = head_count(channels, num_heads, num_head_channels)
        self.norm = norm(channels)
        self.qkv = conv(channels, 3 * channels, 1)
        # three layers in one, each with its own fan-out
        for weight in self.qkv.weight.data.chunk(3):
            nn.init.xavier_uniform_(weight)
        self.norm_q, self.norm_k = query_key_norms(channels // self.heads, qk_norm)
        self.project = conv(channels, channels, 1, zero=True)

    def forward(self, x):
        # the fused attention kernels need channels to be contiguous in memory
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        qkv = dense(self.qkv, tokens)
        pattern = "b n (three heads d) -> three b heads n d"
        q, k, v = rearrange(qkv, pattern, three=3, heads=self.heads)
        out = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        out = dense(self.project, rearrange(out, "b heads n d -> b n (heads d)"))
        return x + rearrange(out, "b (h w) c -> b c h w", h=x.shape[-2])
