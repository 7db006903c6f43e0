"""DiT (Peebles & Xie 2023, "Scalable Diffusion Models with Transformers"): `net(x, t, y) -> out`.

x [b, c, h, w] in [-1, 1]; t [b], float or integer, in training timesteps
y [b] int64 class labels or None; out [b, out_channels, h, w]
tokens [b, n, d], one a patch, row by row; emb [b, d], the embedding of time and class
"""

from math import gcd, lcm

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import nn

from ddpm.common.registry import check_choice
from ddpm.models import layers

# limits beyond any network, so that a number in a file cannot fill the memory
LARGEST = 65536
DEEPEST = 1024
FREQUENCIES = 256  # sines and cosines of the time, at any width


def positions(h, w, width, device):
    """Return fixed position embeddings [h w, width]: half sines of the column, half of the row."""
    column, row = (
        layers.timestep_embedding(torch.arange(n, device=device), width // 2, freq_shift=0)
        for n in (w, h)
    )
    return torch.cat(
        [repeat(column, "w d -> (h w) d", h=h), repeat(row, "h d -> (h w) d", w=w)], dim=1
    )


def modulated(tokens, shift, scale):
    """Return layer-normed tokens times (1 + scale) plus shift, both [b, 1, d]: adaptive norm."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6).to(scale.dtype) * (1 + scale) + shift


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: [b, n, width] -> the same shape."""

    def __init__(self, width, heads, qk_norm=False):
        super().__init__()
        self.heads = heads
        self.qkv = layers.linear(width, 3 * width)
        self.norm_q, self.norm_k = layers.query_key_norms(width // heads, qk_norm)
        self.project = layers.linear(width, width)

    def forward(self, tokens):
        q, k, v = rearrange(
            self.qkv(tokens), "b n (three heads d) -> three b heads n d", three=3, heads=self.heads
        )
        out = F.scaled_dot_product_attention(self.norm_q(q), self.norm_k(k), v)
        return self.project(rearrange(out, "b heads n d -> b n (heads d)"))


class Block(nn.Module):
    """Attention, then an MLP, each modulated, gated by emb and added: adaLN-Zero.

    The gates start at zero, so a fresh block returns its tokens [b, n, d].
    """

    def __init__(self, width, heads, dropout=0, qk_norm=False):
        super().__init__()
        self.modulation = nn.Sequential(nn.SiLU(), layers.linear(width, 6 * width, zero=True))
        self.attention = Attention(width, heads, qk_norm)
        self.perceptron = nn.Sequential(
            layers.linear(width, 4 * width), nn.GELU("tanh"), layers.linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens, emb):
        shift1, scale1, gate1, shift2, scale2, gate2 = rearrange(
            self.modulation(emb), "b (six d) -> six b 1 d", six=6
        )
        tokens = tokens + gate1 * self.dropout(self.attention(modulated(tokens, shift1, scale1)))
        return tokens + gate2 * self.dropout(self.perceptron(modulated(tokens, shift2, scale2)))


def resolved_size(size, depth, width, heads):
    """Return depth, width and heads of an entry of SIZES, with numbers other than 0 replaced."""
    check_choice("size of a DiT", size, list(SIZES))
    default_depth, default_width, default_heads = SIZES[size]
    return depth or default_depth, width or default_width, heads or default_heads


class DiT(layers.ConditionedNetwork):
    """A transformer on image patches with fixed sine positions, conditioned by adaLN-Zero.

    image_size      int or (h, w); the network runs on any size that `patch_size` divides
    size            an entry of SIZES; depth, width and heads other than 0 replace its numbers
    num_classes     rows of the class embedding; label -1 adds 0
    dropout         of each branch before its gate, and `qk_norm` a norm of each head's queries and
                    keys; the paper has neither
    augmentation    as in UNet

    The last layer starts at zero, so a fresh network returns zeros. Raises ValueError for an image
    size that the patch does not divide, an unknown size, a width that the heads do not divide,
    numbers out of range, and labels without classes.
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
        depth, width, heads = resolved_size(size, depth, width, heads)
        counts = dict(in_channels=in_channels, out_channels=out_channels, patch_size=patch_size)
        counts |= dict(depth=depth, width=width, heads=heads)
        if num_classes is not None:
            counts["num_classes"] = num_classes
        layers.check_counts(counts, LARGEST)
        if depth > DEEPEST:
            raise ValueError(f"depth is {depth}; use up to {DEEPEST} blocks")
        self.patch_size = patch_size
        self.check_size((image_size,) * 2 if isinstance(image_size, int) else tuple(image_size))
        multiple = lcm(4, heads)  # sines and cosines of row and column are four parts
        if width % multiple:
            raise ValueError(
                f"width {width} is not a multiple of 4 and of {heads} heads; use a multiple of "
                f"{multiple}"
            )

        # weights are drawn in this order, the same as in recorded runs
        self.patches = layers.linear(in_channels * patch_size**2, width)
        self.add_embeddings(FREQUENCIES, width, num_classes, augmentation, augmentation_place)
        self.blocks = nn.ModuleList(Block(width, heads, dropout, qk_norm) for _ in range(depth))
        self.levels = [[block] for block in self.blocks]  # all at one size of the image
        self.modulation = nn.Sequential(nn.SiLU(), layers.linear(width, 2 * width, zero=True))
        self.head = layers.linear(width, out_channels * patch_size**2, zero=True)
        for layer in (self.time_embedding[0], self.time_embedding[2], self.class_embedding):
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.02)  # as in the paper's code

    def check_size(self, sides):
        """Raise ValueError if the patch does not divide both sides (h, w)."""
        fitting = ", ".join(str(n) for n in (1, 2, 4, 8, 16) if gcd(*sides) % n == 0)
        layers.check_multiple(
            sides,
            self.patch_size,
            f"cannot be cut into patches of {self.patch_size}",
            f"a patch_size of {fitting}",
        )

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None = None,
        augmentation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.check_size(x.shape[-2:])
        features = layers.timestep_embedding(t, FREQUENCIES, freq_shift=0)
        features = features.roll(FREQUENCIES // 2, dims=1)  # the paper has cosines first
        emb = self.embed(features.to(x.dtype), y, augmentation)
        p = self.patch_size
        h, w = (side // p for side in x.shape[-2:])
        tokens = self.patches(rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p))
        tokens = tokens + positions(h, w, tokens.shape[-1], x.device).to(x.dtype)
        for block in self.blocks:
            tokens = block(tokens, emb)
        shift, scale = rearrange(self.modulation(emb), "b (two d) -> two b 1 d", two=2)
        out = self.head(modulated(tokens, shift, scale))
        return rearrange(out, "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=p, q=p)


SIZES = {  # depth, width, heads: the paper's table 1
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}
