"""Edits of given images: inpainting, SDEdit, DDIM inversion and interpolation.

x, image, known [b, c, h, w] in [-1, 1]; mask bool [b or 1, 1, h, w], True where repainted
share [b] in [0, 1]; sampler(denoise, x, levels, noise), denoise, noise(k) as in samplers.py
denoiser() -> denoise, for one sampling run
an edit's walk(sampler, denoiser, levels, noise, inputs) -> iterator of x, the last the result
"""

import math
from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange, reduce

from ddpm.common import registry
from ddpm.diffusion import samplers
from ddpm.diffusion.process import initial_noise

# samplers whose steps do not depend on earlier ones
STEPWISE = (samplers.ddpm, samplers.ddim, samplers.euler, samplers.euler_ancestral)


class EditInput(NamedTuple):
    """An edit's images, each [b, c, h, w], its mask, and the interpolation weights `share`."""

    images: tuple
    mask: torch.Tensor | None = None
    share: torch.Tensor | None = None


class Edit(NamedTuple):
    """An edit; `single`: all results of one image are the same, so one is enough."""

    walk: Callable  # (sampler, denoiser, levels, noise, inputs) -> iterator of x
    images: int = 1
    mask: bool = False
    single: bool = False


def repaint(sampler, denoise, x, levels, noise, known, mask, jump_length=10, resamplings=10):
    """Inpaint: x outside the mask follows `known` (Lugmayr et al. 2022, RePaint, algorithm 1).

    After each `jump_length` steps x is noised by as many steps again, until they have been done
    `resamplings` times; 1 is plain replacement (Song et al. 2021, SDEs, appendix I). Known and new
    pixels share one noise tensor per step, of different pixels. Raises ValueError for a sampler
    that is not in STEPWISE, and for fewer steps than a jump needs.
    """
    function = sampler_function(sampler)
    if function not in STEPWISE:
        raise ValueError(
            f"sampler {function.__name__!r} cannot inpaint: its steps depend on earlier ones; use "
            f"{', '.join(stepwise.__name__ for stepwise in STEPWISE)}"
        )
    steps = len(levels) - 1
    if resamplings > 1 and steps <= jump_length:
        raise ValueError(
            f"a jump of {jump_length} steps needs more than {jump_length} steps, not {steps}; "
            f"give more steps, or inpaint(jump_length={max(steps - 1, 1)})"
        )
    visited = [levels[steps - left] for left in resampled(steps, jump_length, resamplings)]
    for k, (t, s) in enumerate(pairwise(visited), start=1):
        fresh = noise(k)
        if s.ratio < t.ratio:
            x = deque(sampler(denoise, x, [t, s], lambda _, fresh=fresh: fresh), maxlen=1).pop()
            x = torch.where(mask, x, s.alpha * known + s.sigma * fresh)
        else:
            gain = s.alpha / t.alpha
            x = gain * x + math.sqrt(s.sigma**2 - (gain * t.sigma) ** 2) * fresh
        yield x


def resampled(steps, jump_length, resamplings):
    """Return the steps left at each stop of RePaint, from `steps` to 0 (its code, figure 9)."""
    jumps = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), resamplings - 1)
    left = steps
    stops = [steps]
    while left > 0:
        left -= 1
        stops.append(left)
        if jumps.get(left, 0) > 0:
            jumps[left] -= 1
            left += jump_length
            stops.append(left)
    return stops


def redraw(sampler, denoise, image, levels, noise, strength):
    """Noise an image, denoise it by the last `strength` of the steps (SDEdit, Meng et al. 2022)."""
    steps = len(levels) - 1
    start = steps - round(strength * steps)
    level = levels[start]
    x = level.alpha * image + level.sigma * noise(0) if start else initial_noise(level, noise(0))
    yield x
    if start < steps:
        yield from sampler(denoise, x, levels[start:], noise)


def invert(denoise, x, levels):
    """Yield x from clean images to their initial noise: reversed DDIM (Song et al., section 4.3).

    Euler's method on the probability flow, evaluated at the lower end of each step, where sampling
    evaluates at the upper end: with more steps each is the other's inverse. The step from CLEAN,
    where the network is undefined, is evaluated at its upper end.
    """
    for s, t in pairwise(reversed(levels)):
        level = s if s.sigma > 0 else t
        _, eps, *_ = denoise(level.alpha / s.alpha * x, level)
        gain = t.alpha / s.alpha
        x = gain * x + (t.sigma - gain * s.sigma) * eps
        yield x


def slerp(a, b, share):
    """Return the spherical interpolation at share [b] from a to b (DDIM, appendix D.5)."""
    norms = (reduce(end.double() ** 2, "b c h w -> b", "sum").sqrt() for end in (a, b))
    product = reduce(a.double() * b.double(), "b c h w -> b", "sum")
    angle = (product / math.prod(norms).clamp(min=1e-300)).clamp(-1, 1).acos()
    parallel = angle.sin() < 1e-6
    sine = torch.where(parallel, 1, angle.sin())

    def weight(part):
        weight = torch.where(parallel, part, (part * angle).sin() / sine)
        return rearrange(weight, "b -> b 1 1 1").to(a.dtype)

    return weight(1 - share) * a + weight(share) * b


def inpaint(*, jump_length=10, resamplings=10):
    """Repaint the masked pixels, keep the others. Raises ValueError for options below 1."""
    if jump_length < 1 or resamplings < 1:
        raise ValueError(
            f"jump_length {jump_length}, resamplings {resamplings} are out of range; give whole "
            "numbers of 1 or more; inpaint(resamplings=1) is the fastest"
        )

    def walk(sampler, denoiser, levels, noise, inputs):
        (known,) = inputs.images
        x = initial_noise(levels[0], noise(0))
        yield x
        yield from repaint(
            sampler, denoiser(), x, levels, noise, known, inputs.mask, jump_length, resamplings
        )

    return Edit(walk, mask=True)


def sdedit(*, strength=0.6):
    """Noise the image and denoise it. Raises ValueError for a strength outside [0, 1]."""
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength {strength} is out of range; give a number from 0 (the image) to 1 (nothing "
            "of it)"
        )

    def walk(sampler, denoiser, levels, noise, inputs):
        (image,) = inputs.images
        return redraw(sampler, denoiser(), image, levels, noise, strength)

    return Edit(walk)


def inversion():
    """Invert the image to its initial noise and sample from that."""

    def walk(sampler, denoiser, levels, noise, inputs):
        (image,) = inputs.images
        yield image
        for x in invert(denoiser(), image, levels):
            yield x
        yield from sampler(denoiser(), x, levels, lambda k: refuse_noise(sampler))

    return Edit(walk, single=True)


def interpolate():
    """Sample between the initial noises of two images."""

    def walk(sampler, denoiser, levels, noise, inputs):
        ends = (deque(invert(denoiser(), image, levels), maxlen=1).pop() for image in inputs.images)
        x = slerp(*ends, inputs.share)
        yield x
        yield from sampler(denoiser(), x, levels, lambda k: refuse_noise(sampler))

    return Edit(walk, images=2)


def refuse_noise(sampler):
    """Raise ValueError: with fresh noise a sampler does not return to the inverted image."""
    raise ValueError(
        f"sampler {sampler_function(sampler).__name__!r} adds noise, so it cannot reproduce an "
        "inverted image; use ddim, euler, heun, dpmpp or unipc, without eta and churn"
    )


def sampler_function(sampler):
    """Return the function of samplers.py of a sampler with its options bound."""
    return getattr(sampler, "func", sampler)


def get_edit(text):
    """Return the Edit of a name such as `"sdedit(strength=0.6)"`; ValueError if unknown."""
    return registry.resolve("edit", EDITS, text)()


def visited_levels(edit, sampler, levels):
    """Return the levels of an edit's network calls; ValueError for what the edit cannot use."""
    zero = torch.zeros(1, 1, 1, 1)
    inputs = EditInput((zero,) * edit.images, zero.bool(), torch.zeros(1))

    def walk(denoise, x, levels, noise):
        return edit.walk(sampler, lambda: denoise, levels, noise, inputs)

    return samplers.visited_levels(walk, levels, learned=True)


EDITS = {
    "inpaint": inpaint,
    "sdedit": sdedit,
    "invert": inversion,
    "interpolate": interpolate,
}
