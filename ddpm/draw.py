"""Weights and seeds become images: uint8 [b, c, h, w], each beginning at noise that is its own.

Image k of a drawing reads all its noise at (seed, k), so it is the same image at any batch size and on any number of ranks.
"""

from collections import deque
from typing import NamedTuple

import torch

from ddpm import images, rng, spec
from ddpm.diffusion.process import latent


class Recipe(NamedTuple):
    """How images are drawn: a sampler's spec, its number of steps and their spacing, the seed, and how many at once."""

    sampler: str
    steps: int
    spacing: str
    seed: int
    batch_size: int

    def __str__(self):
        return f"{self.sampler}, {self.steps} steps, {self.spacing} spacing, seed {self.seed}"


def trajectory(model, recipe, seeds, shape, machine):
    """Yield x [b, c, h, w] in about [-1, 1] on the device: the latents of `seeds`, then x after each step of the sampler."""

    def noise(k):
        return machine.put(rng.normal(recipe.seed, "sample", k, seeds, shape))

    def autocast(x, t, y=None):
        with machine.autocast():
            return model.net(x, t, y).float()

    sampler = spec.choose("sampler", model.samplers, recipe.sampler)
    levels = model.process.levels(recipe.steps, recipe.spacing)
    model.net.eval()
    with torch.no_grad():
        x = latent(levels[0], noise(0))
        yield x
        yield from sampler(model.denoiser(autocast), x, levels, noise)


def draw(model, recipe, seeds, shape, machine):
    """Yield (seeds, uint8 [b, c, h, w] on the host), batch by batch, for this rank's share of `seeds`.

    `model` is the DDPM around the plain network with the weights to draw from, `shape` is (c, h, w).
    """
    mine = list(seeds)[machine.share(len(seeds))]
    for start in range(0, len(mine), recipe.batch_size):
        batch = mine[start:start + recipe.batch_size]
        steps = trajectory(model, recipe, batch, shape, machine)
        yield batch, images.decode(deque(steps, maxlen=1).pop()).cpu()


def frames(model, recipe, seeds, shape, machine):
    """Yield (seeds, uint8 [b, c, h, w]) after each step: how the images of `seeds` come out of the noise."""
    for x in trajectory(model, recipe, list(seeds), shape, machine):
        yield list(seeds), images.decode(x).cpu()


def joined(batches):
    """All images of a drawing in one uint8 tensor [n, c, h, w]; of no images, an empty one."""
    return torch.cat([images for _, images in batches] or [torch.empty(0, dtype=torch.uint8)])
