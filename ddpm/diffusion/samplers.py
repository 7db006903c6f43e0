"""Samplers: generators that take x from noise to an image and yield it after every step.

    sampler(denoise, x, levels, noise, *, options) -> iterator of x [b, c, h, w], the last the image
    denoise(x, level) -> (x0, eps), or (x0, eps, frac) with a learned variance
    levels: from noisy to CLEAN, as Process.levels returns them, Python floats
    noise(k) -> standard normal, like x, for step k = 1, 2, ...; k = 0 was the initial noise

No noise is added on the step to CLEAN. The x and sigma of papers that write x = x0 + sigma eps are
x/alpha and sigma/alpha here, in which the probability flow is dx/dsigma = eps. Every formula below
is finite in pure noise (alpha = 0) and at CLEAN, for any alpha and sigma.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol

import torch

from ddpm.common import registry
from ddpm.diffusion.denoiser import Denoiser
from ddpm.diffusion.process import VARIANCES, Levels, posterior


class Sampler(Protocol):
    """An entry of SAMPLERS with its options bound; see the module's docstring."""

    def __call__(
        self,
        denoise: Denoiser,
        x: torch.Tensor,
        levels: Levels,
        noise: Callable[[int], torch.Tensor],
        /,
    ) -> Iterator[torch.Tensor]: ...


def ddpm(denoise, x, levels, noise, *, variance="small"):
    """Ancestral sampling (Ho et al. 2020, algorithm 2); with `small` variance it is `ddim(eta=1)`.

    Raises ValueError for an unknown variance, or `learned` if the network predicts none.
    """
    registry.check_choice("variance", variance, VARIANCES)
    for k, (t, s) in enumerate(pairwise(levels), start=1):
        x0, _, *frac = denoise(x, t)
        step = posterior(s, t)
        x = step.of_x0 * x0 + step.of_x * x
        if variance == "learned" and not frac:
            raise ValueError(
                "the network does not predict a variance; use ddpm(variance='small') or "
                "ddpm(variance='large')"
            )
        if s.sigma > 0:
            if variance == "learned":
                deviation = step.learned_variance(*frac).sqrt()
            else:
                deviation = math.sqrt(getattr(step, variance))
            x = x + deviation * noise(k)
        yield x


def ddim(denoise, x, levels, noise, *, eta=0.0):
    """DDIM (Song et al. 2021, eqs. 12, 16); eta from 0 (deterministic) to 1 (ancestral).

    At eta = 0 a step is Euler's method on the probability flow in y = x/alpha: x_s/alpha_s =
    x_t/alpha_t + (sigma_s/alpha_s - sigma_t/alpha_t) eps. Raises ValueError for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(
            f"eta {eta} is out of range; give a number from 0 (no noise) to 1 (as much as ddpm)"
        )
    for k, (t, s) in enumerate(pairwise(levels), start=1):
        x0, eps, *_ = denoise(x, t)
        variance = eta**2 * posterior(s, t).small
        x = s.alpha * x0 + math.sqrt(s.sigma**2 - variance) * eps
        if variance > 0:
            x = x + math.sqrt(variance) * noise(k)
        yield x


def euler(denoise, x, levels, noise):
    """Euler's method on the probability flow (Karras et al. 2022): `ddim(eta=0)` on any levels."""
    return ddim(denoise, x, levels, noise)


def euler_ancestral(denoise, x, levels, noise, *, eta=1.0):
    """An Euler step to a lower level, then fresh noise (k-diffusion): `ddim` with the same eta."""
    return ddim(denoise, x, levels, noise, eta=eta)


# fall of sigma/alpha in a step from which heun and dpm2 take Euler's step: t.ratio / 2 times the
# difference of two estimates would dominate x
LARGE_FALL = 100


def heun(denoise, x, levels, noise, *, churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0):
    """Heun's second-order method with churn (Karras et al. 2022, algorithm 2); NFE 2 a step.

    The options are their S_churn, S_min, S_max, S_noise; churn never exceeds the first level. Steps
    on which sigma/alpha falls by a factor of 100 or more are Euler's, with one evaluation: the step
    to CLEAN, as in the paper, and one from (nearly) pure noise. Raises ValueError for negative
    options, and for s_min above s_max.
    """
    if not (0 <= churn < math.inf and 0 <= s_min <= s_max and 0 <= s_noise < math.inf):
        raise ValueError(
            f"churn {churn}, s_min {s_min}, s_max {s_max}, s_noise {s_noise} are out of range; "
            "give numbers of 0 or more, s_min at most s_max"
        )
    gamma = min(churn / (len(levels) - 1), math.sqrt(2) - 1)
    for k, (t, s) in enumerate(pairwise(levels), start=1):
        if gamma > 0 and s_min <= t.ratio <= s_max and t.ratio < levels[0].ratio:
            raised = levels.level_of(min((1 + gamma) * t.ratio, levels[0].ratio))
            added = math.sqrt(max(raised.ratio**2 - t.ratio**2, 0))
            x = raised.alpha * (x / t.alpha + s_noise * added * noise(k))
            t = raised
        x0, eps, *_ = denoise(x, t)
        x = s.alpha * x0 + s.sigma * eps
        if t.ratio < LARGE_FALL * s.ratio:
            x = x + s.alpha * (s.ratio - t.ratio) / 2 * (denoise(x, s)[1] - eps)
        yield x


def dpm2(denoise, x, levels, noise):
    """DPM-Solver-2 (Lu et al. 2022, algorithm 1): midpoint rule in log(sigma/alpha); NFE 2 a step.

    Steps on which sigma/alpha falls by a factor of 100 or more are Euler's, as in `heun`.
    """
    for t, s in pairwise(levels):
        x0, eps, *_ = denoise(x, t)
        if t.ratio < LARGE_FALL * s.ratio:
            middle = levels.level_of(math.sqrt(t.ratio * s.ratio))
            _, eps, *_ = denoise(middle.alpha * x0 + middle.sigma * eps, middle)
            x0 = (x - t.sigma * eps) / t.alpha
        x = s.alpha * x0 + s.sigma * eps
        yield x


def dpmpp(denoise, x, levels, noise, *, order=2):
    """DPM-Solver++ multistep (Lu et al. 2022, algorithm 2): order 1 is `ddim(eta=0)`, 2 is 2M.

    Order 3 integrates the parabola through three estimates of x0 exactly and converges with order
    3. The published 3M, `dpmpp_3m`, has order 2, and the smaller error in practice. Raises
    ValueError for other orders.
    """
    return multistep(denoise, x, levels, noise, order)


def dpmpp_3m(denoise, x, levels, noise):
    """DPM-Solver++ 3M as in Lu et al.'s code and diffusers: half the quadratic term, so order 2.

    With the exact denoiser of a mixture, cosine schedule, Karras spacing, its error is below that
    of `dpmpp(order=3)` at 5 to 80 steps and of 2M at 12 and more; with a network trained on digits
    2M beats both at 6 and 12 steps.
    """
    return multistep(denoise, x, levels, noise, 3, published=True)


def dpmpp_sde(denoise, x, levels, noise, *, eta=1.0, order=2):
    """DPM-Solver++ 2M on the reverse SDE (Lu et al. 2022); order 1 is `ddpm`, eta 0 is `dpmpp`.

    The 2M SDE of diffusers, and of k-diffusion (`sample_dpmpp_2m_sde`, `solver_type="midpoint"`),
    whose `sample_dpmpp_sde` is another method, singlestep with NFE 2 a step. `eta` scales the
    noise, as in k-diffusion. Raises ValueError for eta < 0 and for orders other than 1, 2, 3.
    """
    return multistep(denoise, x, levels, noise, order, eta=check_eta(eta))


def dpmpp_3m_sde(denoise, x, levels, noise, *, eta=1.0):
    """`dpmpp_3m` on the reverse SDE (k-diffusion's `sample_dpmpp_3m_sde`); eta 0 is `dpmpp_3m`.

    k-diffusion differs at both ends: its second step uses the full slope, and its last but one is
    of third order. Raises ValueError for eta < 0.
    """
    return multistep(denoise, x, levels, noise, 3, eta=check_eta(eta), published=True)


def check_eta(eta):
    """Return eta, the noise scale of an SDE solver; raises ValueError if negative or infinite."""
    if not 0 <= eta < math.inf:
        raise ValueError(
            f"eta {eta} is out of range; give a number from 0 (no noise) up, such as 1 (the "
            "reverse process)"
        )
    return eta


def unipc(denoise, x, levels, noise, *, order=2):
    """UniPC with B_2(h) (Zhao et al. 2023): `dpmpp` steps corrected by the next step's evaluation.

    That raises the order by one at no further NFE. Raises ValueError for orders not in 1, 2, 3.
    """
    return multistep(denoise, x, levels, noise, order, correct=True)


# extrapolate up to this ratio of a step to the previous one, where the weights are 2 and -1
GROWTH = 2.0


def multistep(denoise, x, levels, noise, order, eta=0.0, correct=False, published=False):
    """Sample by `integrate` with the last `order` estimates of x0, fewer at both ends.

    `correct` repeats each step with the estimate of the next one. A step in log(sigma/alpha) of
    more than GROWTH times the previous one restarts with one estimate, because extrapolation would
    amplify the estimates' errors: the step to CLEAN, and in `linear` and `leading` spacing on a
    cosine schedule the step to t = 0. Raises ValueError for orders other than 1, 2, 3.
    """
    if order not in (1, 2, 3):
        raise ValueError(f"order {order} is out of range; give 1, 2 or 3")
    past = deque(maxlen=order)
    known = []
    start = x
    before = math.inf
    for k, (t, s) in enumerate(pairwise(levels), start=1):
        x0, *_ = denoise(x, t)
        if correct and before < math.inf:
            x = integrate(start, past[-1][0], t, [*known, (t, x0)])
        h = math.log(t.ratio / s.ratio) if s.sigma else math.inf
        # `before` is infinite on the first step, and after a step from pure noise
        if before == math.inf or h > GROWTH * before:
            past.clear()
        past.append((t, x0))
        # the last steps use fewer estimates: one for the last, two for the one before
        left = len(levels) - k if levels[-1].sigma == 0 else order
        known = list(past)[-left:]
        start = x
        x = integrate(x, t, s, known, eta, published)
        before = h
        if eta > 0 and s.sigma > 0:
            x = x + s.sigma * math.sqrt(1 - (s.ratio / t.ratio) ** (2 * eta)) * noise(k)
        yield x


def integrate(x, t, s, estimates, eta=0.0, published=False):
    """Return x at level s from x at t; `estimates` are pairs (level, x0), 1 to 3 of them.

    x0 is the polynomial in log(sigma/alpha) through the estimates. The integral is exact (Lu et al.
    2022, DPM-Solver++, proposition 4.1; with eta of the SDE without its noise), except that two
    estimates weigh the slope by half the step, as published. `published` halves the quadratic term
    of three estimates too, as the authors' code does.
    """
    fall = s.ratio / t.ratio
    moments = [1 - fall ** (1 + eta)]  # of u^i over the step, u from 0 at t to 1 at s
    weights = moments
    if len(estimates) > 1:
        h = -math.log(fall)
        for i in range(1, len(estimates)):
            exact = 1 - i / (h * (1 + eta)) * moments[-1]
            moments.append(moments[0] / 2 if len(estimates) == 2 else exact)
        if published and len(estimates) == 3:
            moments[2] /= 2
        u = [math.log(t.ratio / level.ratio) / h for level, _ in estimates]
        vandermonde = torch.linalg.vander(torch.tensor(u, dtype=torch.float64))
        moments = torch.tensor(moments, dtype=torch.float64)
        weights = torch.linalg.solve(vandermonde.T, moments).tolist()
    mean = sum(weight * x0 for weight, (_, x0) in zip(weights, estimates, strict=True))
    return s.sigma / t.sigma * fall**eta * x + s.alpha * mean


def visited_levels(sampler, levels, learned=False):
    """Return the levels at which a sampler calls the denoiser; ValueError for its options."""
    visited = []

    def denoise(x, level):
        visited.append(level)
        return (x, x, x) if learned else (x, x)

    deque(sampler(denoise, torch.zeros(1), levels, lambda k: torch.zeros(1)), maxlen=0)
    return visited


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
    "dpm2": dpm2,
    "dpmpp": dpmpp,
    "dpmpp_3m": dpmpp_3m,
    "dpmpp_sde": dpmpp_sde,
    "dpmpp_3m_sde": dpmpp_3m_sde,
    "unipc": unipc,
}
