"""Augmentation that does not leak: the network is told what was done to each image, and samples are
drawn of "nothing".

    x [b, c, h, w]; numbers [b, NUMBERS] standard normal, whatever they are drawn by;
    told [b, TOLD], 0 where nothing was done

After Karras et al. 2022, appendix F.2 (and "Training GANs with Limited Data", 2020): small folders
of photos are learned by heart later.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange

from ddpm.common import rng

NUM_RANDOM = 14  # six coins, and eight that say how
NUM_CONDITIONS = (
    9  # mirrored, upside down, log2 of the size, turned (2), log2 of the stretch (2), moved (2)
)


def augment(x, numbers, probability):
    """Return images, each transformation done to each with `probability`, and what the network is
    told of it.

    Mirrored, which half of all images are at any probability, as published; upside down; sized by
    2^(0.2 n); turned by any angle; stretched by 2^(0.2 n) in any direction, and pressed across it;
    moved by n/8 of the size. What comes in from outside is mirrored at the border. An image to
    which nothing was done is the same bit for bit.
    """
    coins = (
        numbers[:, :6]
        < math.sqrt(2) * torch.erfinv(torch.tensor(2 * probability - 1, dtype=torch.float64)).item()
    )
    coins[:, 0] = True  # of the mirror, which has a second one in its number
    flips, size, turned, stretch, direction, moved = (
        numbers[:, 6:8],
        *numbers[:, 8:12].T,
        numbers[:, 12:14],
    )
    flips = (coins[:, :2] & (flips < 0)).to(numbers.dtype)
    size = coins[:, 2] * 0.2 * size
    turned = coins[:, 3] * 2 * math.pi * torch.special.ndtr(turned)
    stretch = coins[:, 4] * 0.2 * stretch
    direction = 2 * math.pi * torch.special.ndtr(direction)
    moved = rearrange(coins[:, 5], "b -> b 1") * moved / 8
    told = torch.stack(
        [
            *flips.T,
            size,
            turned.cos() - 1,
            turned.sin(),
            stretch * (2 * direction).cos(),
            stretch * (2 * direction).sin(),
            *moved.T,
        ],
        dim=1,
    )

    mirrored = torch.diag_embed(1.0 - 2.0 * flips)
    stretched = (
        rotation(direction)
        @ torch.diag_embed(torch.stack([2**stretch, 2**-stretch], dim=1))
        @ rotation(-direction)
    )
    shape = rotation(turned) @ stretched @ mirrored * rearrange(2**size, "b -> b 1 1")
    # where each pixel comes from; places go from -1 to 1, so a move by n/8 is 2 n/8
    back = torch.linalg.inv_ex(shape).inverse
    origin = -back @ rearrange(2 * moved, "b two -> b two 1")
    aspect = x.shape[-1] / x.shape[-2]
    back[:, 0, 1] /= aspect
    back[:, 1, 0] /= 1 / aspect
    grid = F.affine_grid(
        torch.cat([back, origin], dim=2).to(x.dtype), list(x.shape), align_corners=False
    )
    changed = F.grid_sample(
        x, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    touched = rearrange((told != 0).any(dim=1), "b -> b 1 1 1")
    return torch.where(touched, changed, x), told.to(x.dtype)


def rotation(angle):
    """Matrices [b, 2, 2] that turn by angles [b]."""
    cos = angle.cos()
    sin = angle.sin()
    return rearrange(torch.stack([cos, -sin, sin, cos]), "(two too) b -> b two too", two=2)


def flip(batch, seed, step, indices, put=lambda tensor: tensor):
    """Mirror each image of [b, c, h, w] left to right with probability 1/2, at the address (seed,
    "flip", step, index).

    `indices` are the b places in the effective batch; `put(tensor)` brings what is drawn to where
    the batch is.
    """
    mirrored = put(rng.uniform(seed, "flip", step, indices) < 0.5)
    return torch.where(rearrange(mirrored, "b -> b 1 1 1"), batch.flip(-1), batch)


def drop_labels(labels, share, seed, step, indices):
    """Drop each of the labels [b] with probability `share`: it becomes -1, at the address (seed,
    "label drop", step, index).

    `indices` are the b places in the effective batch.
    """
    return torch.where(rng.uniform(seed, "label drop", step, indices) < share, -1, labels)
