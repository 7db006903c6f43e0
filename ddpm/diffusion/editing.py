"""Edits: walks that begin at an image, or hold on to one, over the same denoiser and samplers as
drawing does.

x, image, known [b, c, h, w] in [-1, 1]; mask bool [b or 1, 1, h, w], True where painted anew; share
[b] sampler(denoise, x, levels, noise), denoise(x, level), noise(k) as in samplers.py; denoiser()
makes a denoise for one walk an edit's walk(sampler, denoiser, levels, noise, given) -> iterator of
x; the last is the result
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
from ddpm.diffusion.process import latent

# a step knows nothing of the one before
STEPWISE = (samplers.ddpm, samplers.ddim, samplers.euler, samplers.euler_ancestral)


class Given(NamedTuple):
    """What an edit is made of: images, each [b, c, h, w], the mask, and where between the first
    and the last a result lies.
    """

    images: tuple
    mask: torch.Tensor | None = None
    share: torch.Tensor | None = None


class Edit(NamedTuple):
    """A way to edit: its walk, how many images it takes, whether a mask, and whether more
    results than one would be alike.
    """

    walk: Callable  # (sampler, denoiser, levels, noise, given) -> iterator of x
    images: int = 1
    mask: bool = False
    single: bool = False


def repaint(sampler, denoise, x, levels, noise, known, mask, jump_length=10, resamplings=10):
    """Walk x from noise to `known` outside of the mask and what suits it inside (Lugmayr et al.
    2022, RePaint, algorithm 1).

    After each `jump_length` steps x is noised again by as many, until they have been walked
    `resamplings` times; once each is plain replacement (Song et al. 2021, SDEs, appendix I). Known
    and new pixels share a step's noise, of which each uses its own. Raises ValueError for a sampler
    that is not one of STEPWISE, and for fewer steps than a jump needs.
    """
    if inner(sampler) not in STEPWISE:
        raise ValueError(
            f"sampler {inner(sampler).__name__!r} cannot inpaint, for it looks beyond one step; "
            f"use {', '.join(way.__name__ for way in STEPWISE)}"
        )
    steps = len(levels) - 1
    if resamplings > 1 and steps <= jump_length:
        raise ValueError(
            f"a jump of {jump_length} steps needs more than {jump_length} steps, not {steps}; "
            f"give more steps, or inpaint(jump_length={max(steps - 1, 1)})"
        )
    places = resampled(steps, jump_length, resamplings)
    for k, (t, s) in enumerate(pairwise(levels[steps - place] for place in places), start=1):
        fresh = noise(k)
        if s.ratio < t.ratio:
            x = deque(sampler(denoise, x, [t, s], lambda _, fresh=fresh: fresh), maxlen=1).pop()
            x = torch.where(mask, x, s.alpha * known + s.sigma * fresh)
        else:
            gain = s.alpha / t.alpha
            x = gain * x + math.sqrt(s.sigma**2 - (gain * t.sigma) ** 2) * fresh
        yield x


def resampled(steps, jump_length, resamplings):
    """How many steps are left at each stop of RePaint's walk, from `steps` to 0 (the authors'
    code; the paper's figure 9).
    """
    jumps = dict.fromkeys(range(1, steps - jump_length + 1, jump_length), resamplings - 1)
    left = steps
    places = [steps]
    while left > 0:
        left -= 1
        places.append(left)
        if jumps.get(left, 0) > 0:
            jumps[left] -= 1
            left += jump_length
            places.append(left)
    return places


def redraw(sampler, denoise, image, levels, noise, strength):
    """Noise an image and draw it again by the last `strength` of the steps (Meng et al. 2022,
    SDEdit, algorithm 1).

    At 0 it is the image bit for bit; at 1 nothing is left of it and this is plain sampling.
    """
    steps = len(levels) - 1
    start = steps - round(strength * steps)
    level = levels[start]
    x = level.alpha * image + level.sigma * noise(0) if start else latent(level, noise(0))
    yield x
    if start < steps:
        yield from sampler(denoise, x, levels[start:], noise)


def invert(denoise, x, levels):
    """Walk clean images up to the latents they are drawn from: DDIM the other way round (Song et
    al. 2021, section 4.3).

    It is Euler's method on the probability flow, and asks the network at the lower end of each
    step, where drawing asks at the upper: on more steps each is the other's inverse. At CLEAN the
    network cannot be asked; there it is at the upper end.
    """
    for s, t in pairwise(reversed(levels)):
        asked = s if s.sigma > 0 else t
        _, eps, *_ = denoise(asked.alpha / s.alpha * x, asked)
        gain = t.alpha / s.alpha
        x = gain * x + (t.sigma - gain * s.sigma) * eps
        yield x


def slerp(a, b, share):
    """Go `share` of the way from a to b on a great circle, or on a line where they are parallel
    (DDIM, appendix D.5).
    """
    norms = (reduce(end.double() ** 2, "b c h w -> b", "sum").sqrt() for end in (a, b))
    cosine = reduce(a.double() * b.double(), "b c h w -> b", "sum") / math.prod(norms).clamp(
        min=1e-300
    )
    angle = cosine.clamp(-1, 1).acos()
    parallel = angle.sin() < 1e-6
    weights = (
        torch.where(parallel, part, (part * angle).sin() / torch.where(parallel, 1, angle.sin()))
        for part in (1 - share, share)
    )
    return sum(
        rearrange(weight, "b -> b 1 1 1").to(a.dtype) * end
        for weight, end in zip(weights, (a, b), strict=True)
    )


def inpaint(*, jump_length=10, resamplings=10):
    """What is under the mask is painted anew, the rest stays. Raises ValueError for options below
    1.
    """
    if jump_length < 1 or resamplings < 1:
        raise ValueError(
            f"jump_length {jump_length}, resamplings {resamplings} are out of range; give whole "
            "numbers of 1 or more; inpaint(resamplings=1) is the fastest"
        )

    def walk(sampler, denoiser, levels, noise, given):
        x = latent(levels[0], noise(0))
        yield x
        yield from repaint(
            sampler,
            denoiser(),
            x,
            levels,
            noise,
            *given.images,
            given.mask,
            jump_length,
            resamplings,
        )

    return Edit(walk, mask=True)


def sdedit(*, strength=0.6):
    """The image is noised and drawn again. Raises ValueError for a strength outside [0, 1]."""
    if not 0 <= strength <= 1:
        raise ValueError(
            f"strength {strength} is out of range; give a number from 0 (the image) to 1 (nothing "
            "of it)"
        )
    return Edit(
        lambda sampler, denoiser, levels, noise, given: redraw(
            sampler, denoiser(), *given.images, levels, noise, strength
        )
    )


def inversion():
    """The image's latent is found and drawn again."""

    def walk(sampler, denoiser, levels, noise, given):
        (image,) = given.images
        yield image
        for x in invert(denoiser(), image, levels):
            yield x
        yield from sampler(denoiser(), x, levels, lambda k: refuse_noise(sampler))

    return Edit(walk, single=True)


def interpolate():
    """Images between two images: between the latents that they are drawn from."""

    def walk(sampler, denoiser, levels, noise, given):
        ends = (deque(invert(denoiser(), image, levels), maxlen=1).pop() for image in given.images)
        x = slerp(*ends, given.share)
        yield x
        yield from sampler(denoiser(), x, levels, lambda k: refuse_noise(sampler))

    return Edit(walk, images=2)


def refuse_noise(sampler):
    """Raise a ValueError: a sampler that asks for noise does not lead back to the image that was
    inverted.
    """
    raise ValueError(
        f"sampler {inner(sampler).__name__!r} draws fresh noise, so it does not lead back to an "
        "image; use ddim, euler, heun, dpmpp or unipc, without eta and churn"
    )


def inner(sampler):
    """The function of samplers.py in a sampler with its options set."""
    return getattr(sampler, "func", sampler)


def get_edit(text):
    """Return the Edit of a name like `"inpaint"` or `"sdedit(strength=0.6)"`; raises ValueError
    for an unknown one.
    """
    return registry.resolve("edit", EDITS, text)()


def asked(edit, sampler, levels):
    """Return the levels at which an edit asks for an estimate, by walking it on next to nothing.

    Raises ValueError for a sampler, or a number of steps, with which the edit cannot be made.
    """
    at = []
    nothing = torch.zeros(1, 1, 1, 1)

    def denoise(x, level):
        at.append(level)
        return x, x, x

    given = Given((nothing,) * edit.images, nothing.bool(), torch.zeros(1))
    deque(edit.walk(sampler, lambda: denoise, levels, lambda k: nothing, given), maxlen=0)
    return at


EDITS = {
    "inpaint": inpaint,
    "sdedit": sdedit,
    "invert": inversion,
    "interpolate": interpolate,
}
