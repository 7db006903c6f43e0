"""Samplers: generators that walk an image from noise to clean, yielding it after every step.

    sampler(denoise, x, levels, noise, *, options) -> iterator of x [b, c, h, w], the last of
    which is the sample
    denoise(x, level) -> (x0, eps), and a third where the variance is learned; levels from noisy to
    CLEAN, as of Process.levels
    noise(k) -> standard normal, like x, for step k = 1, 2, ...; k = 0 was the initial latent, which
    the caller drew

Numbers of a level are Python floats, so that no step waits for the device. No noise is added on the
step to CLEAN. Papers that write x = x0 + sigma eps speak of x / alpha and sigma / alpha here; in
these the probability flow is dx / dsigma = eps. Every form below is finite in pure noise (alpha =
0) and at CLEAN, on and off alpha^2 + sigma^2 = 1.
"""

import math
from collections import deque
from itertools import pairwise

import torch

from ddpm.common import registry
from ddpm.diffusion.process import VARIANCES, posterior


def ddpm(denoise, x, levels, noise, *, variance="small"):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), on any levels; with `small` variance it is
    `ddim(eta=1)`.

    Raises ValueError for a variance that is not one of VARIANCES, and for `learned` with a network
    that has learned none.
    """
    registry.check_choice("variance", variance, VARIANCES)
    for k, (t, s) in enumerate(pairwise(levels), start=1):
        x0, _, *mix = denoise(x, t)
        step = posterior(s, t)
        x = step.of_x0 * x0 + step.of_x * x
        if variance == "learned" and not mix:
            raise ValueError(
                "the network has learned no variance; use ddpm(variance='small') or "
                "ddpm(variance='large')"
            )
        if s.sigma > 0:
            deviation = (
                step.learned(*mix).sqrt()
                if variance == "learned"
                else math.sqrt(getattr(step, variance))
            )
            x = x + deviation * noise(k)
        yield x


def ddim(denoise, x, levels, noise, *, eta=0.0):
    """Denoising diffusion implicit models (Song et al. 2021, eqs. 12, 16); eta from 0,
    deterministic, to 1, ancestral.

    At eta = 0 a step is x_s / alpha_s = x_t / alpha_t + (sigma_s / alpha_s - sigma_t / alpha_t)
    eps: Euler's method in y = x / alpha over sigma / alpha on the probability flow. Raises
    ValueError for eta outside [0, 1].
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
    """Euler's method on the probability flow (Karras et al. 2022; k-diffusion), which is
    `ddim(eta=0)` on any levels.
    """
    return ddim(denoise, x, levels, noise)


def euler_ancestral(denoise, x, levels, noise, *, eta=1.0):
    """Euler's method down to a lower level, then up by fresh noise (k-diffusion), which is
    `ddim` with the same eta.
    """
    return ddim(denoise, x, levels, noise, eta=eta)


def heun(denoise, x, levels, noise, *, churn=0.0, s_min=0.0, s_max=math.inf, s_noise=1.0):
    """Heun's second-order method with noise thrown in (Karras et al. 2022, algorithm 2): two
    evaluations a step, then one.

    The options are their S_churn, S_min, S_max and S_noise. Noise is raised to that of the first
    level at most. A step on which sigma/alpha falls a hundredfold is Euler's: the one to CLEAN, as
    there, and one from pure noise or nearly. Raises ValueError for options below 0, and s_min above
    s_max.
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
        # else half of t.ratio times a difference of two estimates swamps x
        if t.ratio < 100 * s.ratio:
            x = x + s.alpha * (s.ratio - t.ratio) / 2 * (denoise(x, s)[1] - eps)
        yield x


def dpm2(denoise, x, levels, noise):
    """DPM-Solver-2 (Lu et al. 2022, algorithm 1): the slope from halfway in log(sigma/alpha), two
    evaluations a step.

    Steps on which sigma/alpha falls a hundredfold are Euler's, as in `heun`.
    """
    for t, s in pairwise(levels):
        x0, eps, *_ = denoise(x, t)
        if t.ratio < 100 * s.ratio:
            middle = levels.level_of(math.sqrt(t.ratio * s.ratio))
            _, eps, *_ = denoise(middle.alpha * x0 + middle.sigma * eps, middle)
            x0 = (x - t.sigma * eps) / t.alpha
        x = s.alpha * x0 + s.sigma * eps
        yield x


def dpmpp(denoise, x, levels, noise, *, order=2):
    """DPM-Solver++ with 1, 2 or 3 estimates of x0 (Lu et al. 2022, algorithm 2): `ddim(eta=0)`, 2M,
    and a third order.

    Order 3 integrates the parabola through three estimates exactly and converges with order 3. The
    published 3M, which is `dpmpp_3m`, has order 2, and the smaller error in practice. Raises
    ValueError for another order.
    """
    return multistep(denoise, x, levels, noise, order)


def dpmpp_3m(denoise, x, levels, noise):
    """DPM-Solver++ 3M as published (Lu et al. 2022, code; diffusers): half of the parabola's
    quadratic term, so order 2.

    With the exact denoiser of a mixture, on the cosine schedule in Karras spacing, it errs less
    than `dpmpp(order=3)` at 5 to 80 steps, and less than 2M at 12 and more; with a network on the
    digits 2M is ahead of both at 6 and 12 steps.
    """
    return multistep(denoise, x, levels, noise, 3, published=True)


def dpmpp_sde(denoise, x, levels, noise, *, eta=1.0, order=2):
    """DPM-Solver++ 2M on the reverse SDE (Lu et al. 2022; eta as in k-diffusion); of order 1 it is
    `ddpm`.

    This is the 2M SDE of diffusers and k-diffusion (`sample_dpmpp_2m_sde` there, with
    `solver_type="midpoint"`). What k-diffusion calls `sample_dpmpp_sde` is another method: a single
    step with two evaluations. eta is how much noise, from 0, where it is `dpmpp`. Raises ValueError
    for eta below 0 and for orders that are not 1, 2, 3.
    """
    return multistep(denoise, x, levels, noise, order, eta=check_eta(eta))


def dpmpp_3m_sde(denoise, x, levels, noise, *, eta=1.0):
    """`dpmpp_3m` on the reverse SDE, with the coefficients of k-diffusion's `sample_dpmpp_3m_sde`;
    at eta 0 it is `dpmpp_3m`.

    k-diffusion differs at both ends: its second step takes the slope in full, and its last step but
    one is of third order. Raises ValueError for eta below 0.
    """
    return multistep(denoise, x, levels, noise, 3, eta=check_eta(eta), published=True)


def check_eta(eta):
    """Return eta, how much noise a solver of the reverse SDE adds; raises ValueError where it is
    below 0 or not finite.
    """
    if not 0 <= eta < math.inf:
        raise ValueError(
            f"eta {eta} is out of range; give a number from 0 (no noise) up, such as 1 (the "
            "reverse process)"
        )
    return eta


def unipc(denoise, x, levels, noise, *, order=2):
    """UniPC with B_2(h) (Zhao et al. 2023): `dpmpp` steps, each corrected by the evaluation that
    the next one makes anyway.

    The corrected step is an order higher. Raises ValueError for orders that are not 1, 2, 3.
    """
    return multistep(denoise, x, levels, noise, order, correct=True)


# at most, of a step over the one before it, to extrapolate: then two estimates have the weights 2
# and -1
GROWTH = 2.0


def multistep(denoise, x, levels, noise, order, eta=0.0, correct=False, published=False):
    """Walk by `integrate` with the last `order` estimates of x0, fewer at both ends; `correct`
    redoes each step with the next.

    A step in log(sigma/alpha) of more than GROWTH times the one before begins again with one
    estimate: farther out, extrapolation multiplies the errors of the estimates. The step to CLEAN
    is such a step, and so is the step onto t = 0 in `linear` and `leading` spacing, 3 to 5 times
    the one before on a cosine schedule. Raises ValueError for orders that are not 1, 2, 3.
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
        # before is infinite on the first step, and after one from pure noise
        if not h <= GROWTH * before < math.inf:
            past.clear()
        past.append((t, x0))
        left = len(levels) - k if levels[-1].sigma == 0 else order
        known = list(past)[-left:]
        start = x
        x = integrate(x, t, s, known, eta, published)
        before = h
        if eta > 0 and s.sigma > 0:
            x = x + s.sigma * math.sqrt(1 - (s.ratio / t.ratio) ** (2 * eta)) * noise(k)
        yield x


def integrate(x, t, s, estimates, eta=0.0, published=False):
    """Take x from level t to s, with x0 a polynomial in log(sigma/alpha) through `estimates`, pairs
    (level, x0).

    The integral is exact (Lu et al. 2022, DPM-Solver++, proposition 4.1; with eta that of the SDE,
    less its noise), but that the slope through two estimates counts as half the step, as published.
    `published` also takes half of the quadratic term through three, as the authors' code does.
    """
    fall = s.ratio / t.ratio
    moments = [1 - fall ** (1 + eta)]  # of u^i over the step, u from 0 at t to 1 at s
    weights = moments
    if len(estimates) > 1:
        h = -math.log(fall)
        for i in range(1, len(estimates)):
            moments.append(
                moments[0] / 2 if len(estimates) == 2 else 1 - i / (h * (1 + eta)) * moments[-1]
            )
        if published and len(estimates) == 3:
            moments[2] /= 2
        u = torch.tensor(
            [math.log(t.ratio / level.ratio) / h for level, _ in estimates], dtype=torch.float64
        )
        weights = torch.linalg.solve(
            torch.linalg.vander(u).T, torch.tensor(moments, dtype=torch.float64)
        ).tolist()
    mean = sum(weight * x0 for weight, (_, x0) in zip(weights, estimates, strict=True))
    return s.sigma / t.sigma * fall**eta * x + s.alpha * mean


def evaluations(sampler, levels, learned=False):
    """Return how often a sampler asks for an estimate on its way through levels; options and
    errors as of `asked`.
    """
    return len(asked(sampler, levels, learned))


def asked(sampler, levels, learned=False):
    """Return the levels at which a sampler asks for an estimate on its way through levels, by
    walking it on next to nothing.

    `learned` says whether the network tells a variance. Raises ValueError for options that the
    sampler refuses.
    """
    at = []

    def denoise(x, level):
        at.append(level)
        return (x, x, x) if learned else (x, x)

    deque(sampler(denoise, torch.zeros(1), levels, lambda k: torch.zeros(1)), maxlen=0)
    return at


SAMPLERS = {
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
