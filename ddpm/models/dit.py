"""The transformer of Peebles and Xie 2023, "Scalable Diffusion Models with Transformers" (DiT):
`net(x, t, y) -> out`.

x [b, c, h, w] in [-1, 1]; t [b], float or integer, in units of training timesteps; y [b] int64
class labels or None; tokens [b, n, d], one a patch, row by row; emb [b, d], the embedding of time
and class; out [b, out_channels, h, w].
"""

from math import gcd, lcm

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from ddpm.common.registry import check_choice
from ddpm.models.layers import (
    add_augmentation,
    add_class,
    augmentation_embedding,
    check_multiple,
    linear,
    query_key_norms,
    timestep_embedding,
)

LARGEST = 65536
# beyond any network: a number that came with somebody's file may not fill the memory
DEEPEST = 1024
FREQUENCIES = 256  # sines and cosines that a time is told apart by, at any width


def positions(h, w, width, device):
    """Where h x w tokens are: [h w, width], half of it sines and cosines of the column, half of
    the row.
    """
    column, row = (
        timestep_embedding(torch.arange(n, device=device), width // 2, freq_shift=0) for n in (w, h)
    )
    return torch.cat(
        [repeat(column, "w d -> (h w) d", h=h), repeat(row, "h d -> (h w) d", w=w)], dim=1
    )


def modulated(tokens, shift, scale):
    """Tokens normed each by itself, then scaled and shifted by the embedding [b, 1, d]: the
    paper's adaptive layer norm.
    """
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6).to(scale.dtype) * (1 + scale) + shift


class Attention(nn.Module):
    """Every token attends to every token; [b, n, width] -> the same shape."""

    def __init__(self, width, heads, qk_norm=False):
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.norm_q, self.norm_k = query_key_norms(width // heads, qk_norm)
        self.project = linear(width, width)

    def forward(self, tokens):
        q, k, v = rearrange(
            self.qkv(tokens), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads
        )
        out = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return self.project(rearrange(out, "b heads n d -> b n (heads d)"))


class Block(nn.Module):
    """Attention, then a perceptron, each modulated, gated by the embedding and added (adaLN-Zero);
    tokens keep their shape.

    The gates start at zero, so a fresh block changes nothing.
    """

    def __init__(self, width, heads, dropout=0, qk_norm=False):
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), linear(width, 6 * width, zero=True))
        self.attention = Attention(width, heads, qk_norm)
        self.perceptron = nn.Sequential(
            linear(width, 4 * width), nn.GELU("tanh"), linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens, emb):
        shift1, scale1, gate1, shift2, scale2, gate2 = rearrange(
            self.modulation(emb), "b (six d) -> six b 1 d", six=6
        )
        tokens = tokens + gate1 * self.dropout(self.attention(modulated(tokens, shift1, scale1)))
        return tokens + gate2 * self.dropout(self.perceptron(modulated(tokens, shift2, scale2)))


class DiT(nn.Module):
    """A transformer on patches of the image, which are placed by fixed sines and told time and
    class by adaLN-Zero.

    `image_size` is an int or (h, w); built for one size, it runs on any that `patch_size` divides.
    `size` names an entry of SIZES, of which `depth`, `width` and `heads` replace single numbers
    where they are not 0. The class embedding has `num_classes` rows; a label of -1 is dropped: it
    adds zero. `dropout` is that of each branch before its gate, and `qk_norm` norms each head's
    queries and keys; the paper has neither. With `augmentation` the forward pass takes a fourth
    argument [b, augmentation], what was done to the images; None is nothing, and it enters as in
    UNet. The last layer starts at zero, so a fresh network returns zeros.

    Raises ValueError for an image size that the patch does not divide, an unknown size, a width
    that its heads do not divide, numbers beyond any network's, and labels where there are no
    classes.
    """

    def __init__(
        self,
        image_size,
        in_channels,
        out_channels,
        dropout=0,
        num_classes=None,
        qk_norm=False,
        augmentation=0,
        augmentation_place="before",
        *,
        size="S",
        patch_size=2,
        depth=0,
        width=0,
        heads=0,
    ):
        super().__init__()
        check_choice("size of a DiT", size, list(SIZES))
        depth, width, heads = (
            given or usual for given, usual in zip((depth, width, heads), SIZES[size], strict=True)
        )
        counts = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "patch_size": patch_size,
            "depth": depth,
        }
        counts |= {
            "width": width,
            "heads": heads,
            "num_classes": 1 if num_classes is None else num_classes,
        }
        for name, count in counts.items():
            if not 1 <= count <= LARGEST:
                raise ValueError(f"{name} is {count}; use 1 or more, up to {LARGEST}")
        if depth > DEEPEST:
            raise ValueError(f"depth is {depth}; use up to {DEEPEST} blocks")
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.patch_size = patch_size
        self.check_size(sides)
        if width % (whole := lcm(4, heads)):  # sines and cosines of row and column are four parts
            raise ValueError(
                f"width {width} is no multiple of 4 and of {heads} heads; use a multiple of {whole}"
            )

        self.patches = linear(in_channels * patch_size**2, width)
        self.time_embedding = nn.Sequential(
            linear(FREQUENCIES, width), nn.SiLU(), linear(width, width)
        )
        self.class_embedding = None if num_classes is None else nn.Embedding(num_classes, width)
        self.augments_after = augmentation_place == "after"
        self.augmentation_embedding = augmentation_embedding(
            augmentation, width if self.augments_after else FREQUENCIES
        )
        self.blocks = nn.ModuleList(Block(width, heads, dropout, qk_norm) for _ in range(depth))
        self.levels = [[block] for block in self.blocks]  # all of one size
        self.modulation = nn.Sequential(nn.SiLU(), linear(width, 2 * width, zero=True))
        self.head = linear(width, out_channels * patch_size**2, zero=True)
        for layer in (self.time_embedding[0], self.time_embedding[2], self.class_embedding):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)  # as in the paper's code

    def check_size(self, sides):
        """Raise ValueError where the patch does not divide the sides (h, w)."""
        fitting = ", ".join(str(n) for n in (1, 2, 4, 8, 16) if gcd(*sides) % n == 0)
        check_multiple(
            sides,
            self.patch_size,
            f"cannot be cut into patches of {self.patch_size}",
            f"a patch_size of {fitting}",
        )

    def embed(self, t, y, augmentation, dtype):
        """The embedding [b, d] of times, labels and augmentation; y None is every label dropped."""
        # the paper has cosines first
        waves = timestep_embedding(t, FREQUENCIES, freq_shift=0).roll(FREQUENCIES // 2, dims=1)
        waves = waves.to(dtype)
        if not self.augments_after:
            waves = add_augmentation(waves, augmentation, self.augmentation_embedding)
        emb = add_class(self.time_embedding(waves), y, self.class_embedding)
        return (
            add_augmentation(emb, augmentation, self.augmentation_embedding)
            if self.augments_after
            else emb
        )

    def forward(self, x, t, y=None, augmentation=None):
        self.check_size(x.shape[-2:])
        emb = self.embed(t, y, augmentation, x.dtype)
        p = self.patch_size
        h, w = (side // p for side in x.shape[-2:])
        tokens = self.patches(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        tokens = tokens + positions(h, w, tokens.shape[-1], x.device).to(x.dtype)
        for block in self.blocks:
            tokens = block(tokens, emb)
        shift, scale = rearrange(self.modulation(emb), "b (two d) -> two b 1 d", two=2)
        return rearrange(
            self.head(modulated(tokens, shift, scale)),
            "b (h w) (p q c) -> b c (h p) (w q)",
            h=h,
            w=w,
            p=p,
            q=p,
        )


SIZES = {  # depth, width, heads: the paper's table 1
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
