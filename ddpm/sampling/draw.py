"""Weights and image numbers -> images, uint8 [b, c, h, w].

Image k draws all its noise at (seed, k), so it is the same at any batch size and number of ranks.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat

from ddpm.common import pixels as common_pixels
from ddpm.common import registry
from ddpm.common.progress import Progress
from ddpm.diffusion import editing, samplers
from ddpm.diffusion.denoiser import Guidance, unconditional
from ddpm.diffusion.process import initial_noise


class Recipe(NamedTuple):
    """How images are drawn; `sampler` and `spacing` are names with arguments.

    Image k has label k of `labels`, modulo their number, or none; `classes` names them in words.
    `guidance` and `interval` are those of diffusion.denoiser.Guidance; `guide` names the network
    that guides, if it is another one.
    """

    sampler: str
    steps: int
    spacing: str
    seed: int
    batch_size: int
    labels: Sequence[int] = ()
    classes: str = ""
    guidance: float = 1.0
    interval: tuple = ()
    guide: str = ""

    def __str__(self):
        text = f"{self.sampler}, {self.steps} steps, {self.spacing} spacing, seed {self.seed}"
        if self.guidance != 1:
            text += f", guidance {self.guidance}"
            if self.interval:
                text += f" in sigma/alpha {self.interval[0]} to {self.interval[1]}"
            if self.guide:
                text += f" by {self.guide}"
        return text + (f", classes {self.classes}" if self.labels else "")


def count_nfe(model, recipe, edit=None):
    """The network evaluations of an image, guidance included; ValueError for an impossible edit."""
    sampler = registry.resolve("sampler", model.samplers, recipe.sampler)
    guidance = Guidance(None, recipe.guidance, recipe.interval)
    levels = model.process.levels(recipe.steps, recipe.spacing)
    if edit:
        visited = editing.visited_levels(edit, sampler, levels)
    else:
        visited = samplers.visited_levels(sampler, levels, model.learns_variance)
    return len(visited) + sum(map(guidance.applies, visited))


def walk_from_noise(sampler, denoiser, levels, noise, seeds):
    """The walk of a sampler from pure noise: yields x after each step."""
    x = initial_noise(levels[0], noise(0))
    yield x
    yield from sampler(denoiser(), x, levels, noise)


def edited(edit, pictures, mask, count, machine):
    """The walk of an Edit of `pictures`, uint8 [c, h, w], and a mask [h, w], to `count` results."""

    def walk(sampler, denoiser, levels, noise, seeds):
        images = [machine.to_device(common_pixels.encode(pixels)) for pixels in pictures]
        images = tuple(repeat(image, "c h w -> b c h w", b=len(seeds)) for image in images)
        share = machine.to_device(torch.tensor(seeds, dtype=torch.float64) / max(count - 1, 1))
        area = None if mask is None else rearrange(machine.to_device(mask), "h w -> 1 1 h w")
        inputs = editing.EditInput(images, area, share)
        yield from edit.walk(sampler, denoiser, levels, noise, inputs)

    return walk


def trajectory(
    model, recipe, seeds, shape, machine, guide=None, walk=walk_from_noise, evaluated=lambda: None
):
    """Yield x [b, c, h, w] in about [-1, 1] on the device: a walk's start, then x after each step.

    `seeds` are image numbers. `guide` is the network net(x, t, y) that guides, in evaluation mode,
    or None for the model's own without labels. `evaluated()` is called after each evaluation of a
    network. Raises StopTraining before one if a training is requested to stop.
    """

    numbers = machine.random_numbers(recipe.seed)

    def noise(k):
        return machine.to_device(numbers.normal("sample", k, seeds, shape))

    def autocast(net):
        def call(x, t, y=None):
            machine.stop.check()
            with machine.autocast():
                out = net(x, t, y).float()
            evaluated()
            return out

        return call

    labels = recipe.labels
    y = (
        machine.to_device(torch.tensor([labels[k % len(labels)] for k in seeds]))
        if labels
        else None
    )
    weaker = autocast(guide or unconditional(model.net))
    guidance = Guidance(weaker, recipe.guidance, recipe.interval)
    sampler = registry.resolve("sampler", model.samplers, recipe.sampler)
    levels = model.process.levels(recipe.steps, recipe.spacing)
    model.net.eval()

    def denoiser():
        return model.denoiser(autocast(model.net), y, guidance)

    with torch.no_grad(), numbers:
        yield from walk(sampler, denoiser, levels, noise, seeds)


def progress(model, recipe, count, size, machine, times):
    """The Progress of drawing `count` images in batches of `size`, each in `times` NFE."""
    times = count_nfe(model, recipe) if times is None else times
    return Progress("drawing", count, size, times, shown=machine.main)


def draw(model, recipe, seeds, shape, machine, guide=None, walk=walk_from_noise, times=None):
    """Yield (seeds, uint8 [b, c, h, w] on the host) in batches for this rank's share of `seeds`.

    Batches are smaller than the recipe's if memory runs out. `model` is the DDPM around the plain
    network with the weights to draw from, `shape` is (c, h, w), `guide` as in `trajectory`, `times`
    the NFE of a `walk` other than `walk_from_noise`. The main rank shows its progress.
    """
    mine = list(seeds)[machine.rank_slice(len(seeds))]
    with progress(model, recipe, len(mine), recipe.batch_size, machine, times) as shown:

        def last(batch):
            steps = trajectory(model, recipe, batch, shape, machine, guide, walk, shown.evaluated)
            return common_pixels.decode(deque(steps, maxlen=1).pop()).cpu()

        for batch, pixels in machine.room.in_batches("drawing", mine, recipe.batch_size, last):
            shown.finished(len(batch))
            yield batch, pixels


def gathered(model, recipe, seeds, shape, machine, guide=None, walk=walk_from_noise, times=None):
    """As `draw`, for all of `seeds` in order on the main rank; other ranks yield nothing."""
    if machine.world == 1:
        yield from draw(model, recipe, seeds, shape, machine, guide, walk, times)
        return
    for first in range(0, len(seeds), BLOCK):
        some = seeds[first : first + BLOCK]
        drawn = draw(model, recipe, some, shape, machine, guide, walk, times)
        pixels = machine.gather(concatenate(drawn))
        if machine.main:
            yield list(some), pixels


BLOCK = 1024  # images that are gathered at once


def frames(model, recipe, seeds, shape, machine, guide=None, walk=walk_from_noise, times=None):
    """Yield (seeds, uint8 [b, c, h, w]) for the start and each step of a walk, after its end."""
    seeds = list(seeds)
    parts = []
    with progress(model, recipe, len(seeds), len(seeds), machine, times) as shown:

        def steps_of(batch):
            steps = trajectory(model, recipe, batch, shape, machine, guide, walk, shown.evaluated)
            return torch.stack([common_pixels.decode(x).cpu() for x in steps])

        for batch, part in machine.room.in_batches("drawing", seeds, len(seeds), steps_of):
            shown.finished(len(batch))
            parts.append(part)
    for pixels in torch.cat(parts, dim=1):
        yield seeds, pixels


def concatenate(batches):
    """All images of a drawing, uint8 [n, c, h, w]; an empty tensor if there are none."""
    return torch.cat([images for _, images in batches] or [torch.empty(0, dtype=torch.uint8)])
