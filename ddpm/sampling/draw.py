"""Weights and image numbers -> images, uint8 [b, c, h, w].

Image k draws all its noise at (seed, k), so it is the same at any batch size and number of ranks.
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange, repeat

from ddpm.common import pixels as common_pixels
from ddpm.common import registry, rng
from ddpm.common.progress import Progress
from ddpm.diffusion import editing, samplers
from ddpm.diffusion.denoiser import Guidance, unconditional
from ddpm.diffusion.process import initial_noise


class Recipe(NamedTuple):
    """How images are drawn: a sampler's spec, its number of steps and their spacing, the seed, and
    how many at once.

    Image k has the k-th of `labels`, which come round again, or no label; `classes` says in words
    which they are. `guidance`, `interval` and `guide`, which says in words what guides if not the
    network itself, are of diffusion.denoiser.
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
        said = f"{self.sampler}, {self.steps} steps, {self.spacing} spacing, seed {self.seed}"
        if self.guidance != 1:
            said += f", guidance {self.guidance}"
            said += (
                f" in sigma/alpha {self.interval[0]} to {self.interval[1]}" if self.interval else ""
            )
            said += f" by {self.guide}" if self.guide else ""
        return said + (f", classes {self.classes}" if self.labels else "")


def evaluations(model, recipe, edit=None):
    """How often networks are asked for an image: by the sampler, or by an Edit, and where guidance
    applies once more.

    Raises ValueError where the recipe cannot make the edit.
    """
    sampler = registry.resolve("sampler", model.samplers, recipe.sampler)
    guidance = Guidance(None, recipe.guidance, recipe.interval)
    levels = model.process.levels(recipe.steps, recipe.spacing)
    at = (
        editing.visited_levels(edit, sampler, levels)
        if edit
        else samplers.visited_levels(sampler, levels, model.learned)
    )
    return len(at) + sum(map(guidance.applies, at))


def afresh(sampler, denoiser, levels, noise, seeds):
    """Walk from noise alone."""
    x = initial_noise(levels[0], noise(0))
    yield x
    yield from sampler(denoiser(), x, levels, noise)


def edited(edit, pictures, mask, count, machine):
    """The walk of an Edit of `pictures`, uint8 [c, h, w] each, with a mask [h, w] or None, to
    the results 0 .. count - 1.
    """

    def walk(sampler, denoiser, levels, noise, seeds):
        given = [
            repeat(
                machine.to_device(common_pixels.encode(pixels)), "c h w -> b c h w", b=len(seeds)
            )
            for pixels in pictures
        ]
        places = machine.to_device(torch.tensor(seeds, dtype=torch.float64) / max(count - 1, 1))
        area = None if mask is None else rearrange(machine.to_device(mask), "h w -> 1 1 h w")
        yield from edit.walk(
            sampler, denoiser, levels, noise, editing.EditInput(tuple(given), area, places)
        )

    return walk


def trajectory(
    model, recipe, seeds, shape, machine, guide=None, walk=afresh, evaluated=lambda: None
):
    """Yield x [b, c, h, w] in about [-1, 1] on the device: where the walk of `seeds` begins, then x
    after each of its steps.

    `guide` is the network net(x, t, y) that guides, in evaluation mode, or None for the model's own
    without labels. `evaluated()` is called after each evaluation of a network.
    """

    def noise(k):
        return machine.to_device(rng.normal(recipe.seed, "sample", k, seeds, shape))

    def autocast(net):
        def ask(x, t, y=None):
            machine.stop.check()
            with machine.autocast():
                out = net(x, t, y).float()
            evaluated()
            return out

        return ask

    y = (
        machine.to_device(torch.tensor([recipe.labels[k % len(recipe.labels)] for k in seeds]))
        if recipe.labels
        else None
    )
    guidance = Guidance(
        autocast(guide or unconditional(model.net)), recipe.guidance, recipe.interval
    )
    sampler = registry.resolve("sampler", model.samplers, recipe.sampler)
    levels = model.process.levels(recipe.steps, recipe.spacing)
    model.net.eval()
    with torch.no_grad():
        yield from walk(
            sampler, lambda: model.denoiser(autocast(model.net), y, guidance), levels, noise, seeds
        )


def progress(model, recipe, count, size, machine, times):
    """The Progress of drawing `count` images, `size` at a time, in `times` network evaluations
    each, or the recipe's number.
    """
    times = evaluations(model, recipe) if times is None else times
    return Progress("drawing", count, size, times, shown=machine.main)


def draw(model, recipe, seeds, shape, machine, guide=None, walk=afresh, times=None):
    """Yield (seeds, uint8 [b, c, h, w] on the host), batch by batch, for this rank's share of
    `seeds`.

    Batches are smaller than the recipe's where memory runs out. The main rank shows its progress.

    `model` is the DDPM around the plain network with the weights to draw from, `shape` is (c, h,
    w), `guide` as above, `times` the number of network evaluations of a `walk` that is not
    `afresh`.
    """
    mine = list(seeds)[machine.rank_slice(len(seeds))]
    with progress(model, recipe, len(mine), recipe.batch_size, machine, times) as shown:

        def last(batch):
            steps = trajectory(model, recipe, batch, shape, machine, guide, walk, shown.evaluated)
            return common_pixels.decode(deque(steps, maxlen=1).pop()).cpu()

        for batch, pixels in machine.room.in_batches("drawing", mine, recipe.batch_size, last):
            shown.finished(len(batch))
            yield batch, pixels


def gathered(model, recipe, seeds, shape, machine, guide=None, walk=afresh, times=None):
    """The same for all of `seeds`, on the main rank and in their order; the others draw their
    shares and yield nothing.
    """
    if machine.world == 1:
        yield from draw(model, recipe, seeds, shape, machine, guide, walk, times)
        return
    for first in range(0, len(seeds), BLOCK):
        some = seeds[first : first + BLOCK]
        pixels = machine.gather(
            joined(draw(model, recipe, some, shape, machine, guide, walk, times))
        )
        if machine.main:
            yield list(some), pixels


BLOCK = 1024  # images that are held at once where they are gathered


def frames(model, recipe, seeds, shape, machine, guide=None, walk=afresh, times=None):
    """Yield (seeds, uint8 [b, c, h, w]) for each step, once all are done: how the images of
    `seeds` come out of the noise.
    """
    seeds = list(seeds)
    parts = []
    with progress(model, recipe, len(seeds), len(seeds), machine, times) as shown:

        def film(batch):
            steps = trajectory(model, recipe, batch, shape, machine, guide, walk, shown.evaluated)
            return torch.stack([common_pixels.decode(x).cpu() for x in steps])

        for batch, part in machine.room.in_batches("drawing", seeds, len(seeds), film):
            shown.finished(len(batch))
            parts.append(part)
    for pixels in torch.cat(parts, dim=1):
        yield seeds, pixels


def joined(batches):
    """All images of a drawing in one uint8 tensor [n, c, h, w]; of no images, an empty one."""
    return torch.cat([images for _, images in batches] or [torch.empty(0, dtype=torch.uint8)])
