"""What training changes on a batch: flips, dropped labels, and non-leaking augmentation.

    x [b, c, h, w]; numbers [b, NUM_RANDOM] standard normal, from any generator;
    conditions [b, NUM_CONDITIONS], 0 where nothing was done

Non-leaking augmentation (Karras et al. 2022, appendix F.2; Karras et al. 2020, "Training GANs with
Limited Data"): the network is conditioned on the transformations and sampled without any. It delays
overfitting on small datasets.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange

NUM_RANDOM = 14  # six decide whether, eight how
# mirror, flip, log2 of scale, rotation (2), log2 of stretch (2), translation (2)
NUM_CONDITIONS = 9


def augment(x, numbers, probability):
    """(augmented images, conditions), each transformation applied with `probability`.

    Mirror (half of all images at any probability, as published), vertical flip, scale by 2^(0.2 n),
    rotation by any angle, stretch by 2^(0.2 n) in any direction, translation by n/8 of the size.
    Pixels from outside are reflected at the border. Untransformed images keep their bits.
    """
    quantile = torch.erfinv(torch.tensor(2 * probability - 1, dtype=torch.float64)).item()
    applied = numbers[:, :6] < math.sqrt(2) * quantile
    applied[:, 0] = True  # the mirror is decided by its second number alone
    scale, rotation, stretch, direction = numbers[:, 8:12].T
    flips = (applied[:, :2] & (numbers[:, 6:8] < 0)).to(numbers.dtype)
    scale = applied[:, 2] * 0.2 * scale
    rotation = applied[:, 3] * 2 * math.pi * torch.special.ndtr(rotation)
    stretch = applied[:, 4] * 0.2 * stretch
    direction = 2 * math.pi * torch.special.ndtr(direction)
    translation = rearrange(applied[:, 5], "b -> b 1") * numbers[:, 12:14] / 8
    turns = rotation.cos() - 1, rotation.sin()
    stretches = stretch * (2 * direction).cos(), stretch * (2 * direction).sin()
    conditions = torch.stack([*flips.T, scale, *turns, *stretches, *translation.T], dim=1)

    mirrored = torch.diag_embed(1.0 - 2.0 * flips)
    stretched = torch.diag_embed(torch.stack([2**stretch, 2**-stretch], dim=1))
    stretched = rotation_matrix(direction) @ stretched @ rotation_matrix(-direction)
    transform = rotation_matrix(rotation) @ stretched @ mirrored * rearrange(2**scale, "b -> b 1 1")
    # where each pixel comes from; coordinates go from -1 to 1, so a translation of n/8 is 2 n/8
    inverse = torch.linalg.inv_ex(transform).inverse
    origin = -inverse @ rearrange(2 * translation, "b two -> b two 1")
    aspect = x.shape[-1] / x.shape[-2]
    inverse[:, 0, 1] /= aspect
    inverse[:, 1, 0] /= 1 / aspect
    matrix = torch.cat([inverse, origin], dim=2).to(x.dtype)
    grid = F.affine_grid(matrix, list(x.shape), align_corners=False)
    changed = F.grid_sample(
        x, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    is_changed = rearrange((conditions != 0).any(dim=1), "b -> b 1 1 1")
    return torch.where(is_changed, changed, x), conditions.to(x.dtype)


def rotation_matrix(angle):
    """Matrices [b, 2, 2] that rotate by angles [b]."""
    cos = angle.cos()
    sin = angle.sin()
    return rearrange(torch.stack([cos, -sin, sin, cos]), "(two too) b -> b two too", two=2)


def flip(batch, mirrored):
    """Mirror the images of [b, c, h, w] where `mirrored`, bool [b] on their device."""
    return torch.where(rearrange(mirrored, "b -> b 1 1 1"), batch.flip(-1), batch)


def drop_labels(labels, numbers, probability):
    """Set labels [b] to -1 with a probability, by uniform numbers [b] in [0, 1)."""
    return torch.where(numbers < probability, -1, labels)
