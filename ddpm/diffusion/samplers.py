"""Samplers: generators that walk an image from noise to clean, yielding it after every step.

    sampler(denoise, x, levels, noise, *, knobs) -> iterator of x [b, c, h, w]; the last is the sample
    denoise(x, level) -> (x0, eps); levels from noisy to CLEAN, as of Process.levels
    noise(k) -> standard normal, like x, for step k = 1, 2, ...; k = 0 was the initial latent, which the caller drew

Numbers of a level are Python floats, so that no step waits for the device. No noise is added on the step to CLEAN.
"""

import math
from itertools import pairwise

from ddpm import spec
from ddpm.diffusion.process import VARIANCES, posterior


def ddpm(denoise, x, levels, noise, *, variance="small"):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any levels; with `small` variance it is `ddim(eta=1)`.

    Raises ValueError for a variance that is neither `small` nor `large`.
    """
    spec.check_choice("variance", variance, VARIANCES)
    for k, (t, s) in enumerate(pairwise(levels), start=1):
        x0, _ = denoise(x, t)
        step = posterior(s, t)
        x = step.of_x0 * x0 + step.of_x * x
        if s.sigma > 0:
            x = x + math.sqrt(getattr(step, variance)) * noise(k)
        yield x


def ddim(denoise, x, levels, noise, *, eta=0.0):
    """Denoising diffusion implicit models (Song et al. 2021, eqs. 12, 16); eta from 0, deterministic, to 1, ancestral.

    At eta = 0 a step is x_s / alpha_s = x_t / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t) eps: Euler's method in
    y = x / alpha over sigma / alpha on the probability flow. Raises ValueError for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is out of range; give a number from 0 (no noise) to 1 (as much as ddpm)")
    for k, (t, s) in enumerate(pairwise(levels), start=1):
        x0, eps = denoise(x, t)
        variance = eta**2 * posterior(s, t).small
        x = s.alpha * x0 + math.sqrt(s.sigma**2 - variance) * eps
        if variance > 0:
            x = x + math.sqrt(variance) * noise(k)
        yield x


SAMPLERS = {
    "ddpm": ddpm,
    "ddim": ddim,
}
