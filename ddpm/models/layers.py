"""The parts that networks are made of: time embedding, residual block, attention block, up- and
down-sampling.

x [b, c, h, w]; t [b], float or integer; emb [b, e], the embedding of time (and class). They follow
the network of Ho et al. 2020, "Denoising Diffusion Probabilistic Models", appendix B, and its
released code; scale-shift norm and resizing inside a block are those of Dhariwal and Nichol 2021,
"Diffusion Models Beat GANs". Initialisation is Ho's too: weights uniform with variance 2 / (fan_in
+ fan_out) (Glorot), biases zero, and zero for layers that close a residual branch or the network.
`initialize_as_torch` makes it OpenAI's.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from torch.utils.checkpoint import checkpoint


def timestep_embedding(t, dim, max_period=10000, freq_shift=1):
    """Sines then cosines of t at geometric frequencies from 1 down to 1 / max_period: t [b] ->
    float32 [b, dim].

    Frequency k is max_period^(-k / (dim // 2 - freq_shift)), with 1 in Ho's code and 0 in OpenAI's;
    an odd `dim` ends in a zero.
    """
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(k * (-math.log(max_period) / max(half - freq_shift, 1)))
    angles = rearrange(t.float(), "b -> b 1") * frequencies
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def without_autocast(x):
    """The context in which an operation on x returns x's type.

    On a GPU autocast runs norms and resizing in float32, and a network would keep twice the memory
    for its backward pass.
    """
    kind = "cpu" if x.is_meta else x.device.type  # meta has no autocast to turn off
    return torch.autocast(kind, enabled=False)


class GroupNorm(nn.GroupNorm):
    """nn.GroupNorm that answers in the type that it is given; its kernels sum in float32
    whatever that is.
    """

    def forward(self, x):
        with without_autocast(x):
            return F.group_norm(
                x, self.num_groups, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
            )


def norm_groups(channels):
    """The most groups that a norm of `channels` should have: 32 as in Ho's code, and four channels
    each at least.

    A group of one channel subtracts whatever is added to that channel everywhere, and with it the
    time and the class: the block behind it would not depend on them. (`min(32, channels // 4)` is
    also the rule of Karras et al. 2022, EDM.)
    """
    return max(min(32, channels // 4), 1)


def group_norm(channels, most=0, eps=1e-6):
    """GroupNorm over the largest number of groups up to `most` that divides `channels`; epsilon as
    in Ho's code.

    `most` 0 is `norm_groups(channels)`.
    """
    groups = max(n for n in range(1, (most or norm_groups(channels)) + 1) if channels % n == 0)
    return GroupNorm(groups, channels, eps=eps)


def linear(in_features, out_features, zero=False):
    """A dense layer with Glorot-uniform (`zero`: zero) weights and zero bias."""
    layer = nn.Linear(in_features, out_features)
    layer.starts_at_zero = zero
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def conv(in_channels, out_channels, kernel_size, zero=False):
    """A convolution that keeps the image size, with Glorot-uniform (`zero`: zero) weights and
    zero bias.
    """
    layer = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    layer.starts_at_zero = zero
    nn.init.zeros_(layer.weight) if zero else nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def initialize_as_torch(net):
    """Draw weights and biases again as torch does, uniform with variance 1 / (3 fan_in), except
    where they start at zero.
    """
    for layer in net.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and not getattr(
            layer, "starts_at_zero", False
        ):
            layer.reset_parameters()


def recompute(modules):
    """Let modules keep nothing but their inputs, and compute the rest again in the backward pass:
    the same numbers.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"; it costs one more forward
    pass of theirs. The state of the random generators is kept where a module has dropout.
    """
    for module in modules:
        drops = any(isinstance(layer, nn.Dropout) and layer.p for layer in module.modules())
        module.forward = partial(
            checkpoint, module.forward, use_reentrant=False, preserve_rng_state=drops
        )


class NearestUpsample(nn.Module):
    """Twice the size by repeating each pixel, in the type of the input; [b, c, h, w] -> [b, c,
    2h, 2w].
    """

    def forward(self, x):
        with without_autocast(x):
            return F.interpolate(x, scale_factor=2, mode="nearest")


class Upsample(nn.Module):
    """Twice the size: nearest-neighbour resize, then a 3x3 convolution; [b, c, h, w] -> [b, c,
    2h, 2w].
    """

    def __init__(self, channels):
        super().__init__()
        self.resize = NearestUpsample()
        self.conv = conv(channels, channels, 3)

    def forward(self, x):
        return self.conv(self.resize(x))


class Downsample(nn.Module):
    """Half the size: a 3x3 convolution taken at every second pixel; [b, c, 2h, 2w] -> [b, c, h, w].

    With `padding` 1 it is centred on the first pixel of each pair, as in OpenAI's code, with 0 on
    the second, as in Ho's.
    """

    def __init__(self, channels, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)

    def forward(self, x):
        # TensorFlow's "SAME" padding, as Ho's weights expect: an even side gets its one row of
        # zeros at the far end.
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, convolution, twice, with the embedding injected in between, added to a
    shortcut.

    x [b, in_channels, h, w], emb [b, embedding_channels] -> [b, out_channels, h, w], or twice
    (`up`) or half (`down`) that size. The embedding is added before the second norm or, with
    `use_scale_shift_norm`, scales and shifts what it returns. `norm` makes a norm of so many
    channels.
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
        self.resize = NearestUpsample() if up else nn.AvgPool2d(2) if down else nn.Identity()
        self.norm1 = norm(in_channels)
        self.conv1 = conv(in_channels, out_channels, 3)
        self.project = linear(
            embedding_channels, 2 * out_channels if use_scale_shift_norm else out_channels
        )
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(out_channels, out_channels, 3, zero=True)
        self.shortcut = (
            nn.Identity() if in_channels == out_channels else conv(in_channels, out_channels, 1)
        )

    @property
    def is_conditioned(self):
        """Whether the output depends on the embedding: a norm with one channel a group removes
        what is added before it.
        """
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


def check_multiple(size, factor, trouble, remedy):
    """Raise ValueError where a side of `size` (h, w) is no multiple of `factor`: the trouble,
    sizes that fit, the remedy.
    """
    if all(side >= factor and side % factor == 0 for side in size):
        return
    smaller = tuple(max(side // factor, 1) * factor for side in size)
    larger = tuple(max(-(-side // factor), 1) * factor for side in size)
    given, *fitting = (f"{h}" if h == w else f"({h}, {w})" for h, w in (size, smaller, larger))
    raise ValueError(
        f"image_size {given} {trouble}; use {' or '.join(dict.fromkeys(fitting))}, or {remedy}"
    )


def add_class(emb, y, embedding):
    """Add the embedding of labels y [b], or None, to emb [b, e]; a label of -1 is dropped: it adds
    zero.

    Raises ValueError for labels where there is no embedding.
    """
    if y is None:
        return emb
    if embedding is None:
        raise ValueError(
            "labels were given to a network without classes; set num_classes, or pass y=None"
        )
    return emb + embedding(y.clamp(min=0)) * rearrange(y >= 0, "b -> b 1")


def augmentation_embedding(augmentation, channels):
    """What brings [b, augmentation] to [b, channels]: zeros to zeros, and everything at first;
    None for no augmentation.
    """
    if not augmentation:
        return None
    layer = nn.Linear(augmentation, channels, bias=False)
    layer.starts_at_zero = True
    nn.init.zeros_(layer.weight)
    return layer


def add_augmentation(emb, augmentation, embedding):
    """Add what was done to the images, [b, n] as ddpm.augment tells it, to numbers [b, e]; None is
    nothing: it adds zero.

    Raises ValueError where the network was not made to be told.
    """
    if augmentation is None:
        return emb
    if embedding is None:
        raise ValueError(
            "this network cannot be told of augmentation; make it with augmentation=9, or augment "
            "nothing"
        )
    return emb + embedding(augmentation.to(emb.dtype))


def head_count(channels, num_heads, num_head_channels=None):
    """The number of attention heads: `num_heads`, or `channels / num_head_channels` where that is
    given.

    Raises ValueError where the channels cannot be shared out evenly.
    """
    name, given = (
        ("num_heads", num_heads)
        if num_head_channels is None
        else ("num_head_channels", num_head_channels)
    )
    divisors = [n for n in range(1, channels + 1) if channels % n == 0]
    if given not in divisors:
        options = ", ".join(map(str, divisors))
        raise ValueError(
            f"{name} {given} does not divide {channels} channels; use one of {options}"
        )
    return given if num_head_channels is None else channels // given


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm for numbers of another type than its learned scale, as autocast makes them: it
    keeps their type.
    """

    def forward(self, x):
        with without_autocast(x):
            return (F.rms_norm(x, self.normalized_shape, eps=self.eps) * self.weight).to(x.dtype)


def query_key_norms(dim, wanted):
    """What is done to each head's queries and keys [..., dim]: a learned RMS norm each (epsilon
    as in SD3), or nothing.
    """
    return [RMSNorm(dim, eps=1e-6) if wanted else nn.Identity() for _ in range(2)]


def dense(conv, tokens):
    """A 1x1 convolution of pixels in a row, [b, n, c]: the dense layer that it is, which torch
    computes faster on a CPU.
    """
    return F.linear(tokens, rearrange(conv.weight, "o i 1 1 -> o i"), conv.bias)


class AttentionBlock(nn.Module):
    """Every pixel attends to every pixel, added to the input; x [b, c, h, w] -> the same shape.

    There are `num_heads` heads, or as many as have `num_head_channels` channels each; `norm` makes
    a norm of so many channels. With `qk_norm` each head's queries and keys have a learned RMS norm,
    so that logits cannot grow without bound (Dehghani et al. 2023, "Scaling Vision Transformers to
    22 Billion Parameters"; Esser et al. 2024). Raises ValueError where the heads do not divide
    `channels`.
    """

    def __init__(
        self, channels, num_heads=1, num_head_channels=None, norm=group_norm, qk_norm=False
    ):
        super().__init__()
        self.heads = head_count(channels, num_heads, num_head_channels)
        self.norm = norm(channels)
        self.qkv = conv(channels, 3 * channels, 1)
        # three layers in one: each has its own fan-out
        for weight in self.qkv.weight.data.chunk(3):
            nn.init.xavier_uniform_(weight)
        self.norm_q, self.norm_k = query_key_norms(channels // self.heads, qk_norm)
        self.project = conv(channels, channels, 1, zero=True)

    def forward(self, x):
        # the fused attention kernels want neighbouring channels side by side in memory, and step
        # aside otherwise
        tokens = rearrange(self.norm(x), "b c h w -> b (h w) c")
        q, k, v = rearrange(
            dense(self.qkv, tokens),
            "b n (three heads d) -> three b heads n d",
            three=3,
            heads=self.heads,
        )
        out = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        out = dense(self.project, rearrange(out, "b heads n d -> b n (heads d)"))
        return x + rearrange(out, "b (h w) c -> b c h w", h=x.shape[-2])
