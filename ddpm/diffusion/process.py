"""The forward process q(x_t | x_0): noising, posteriors and the noise levels of a sampling run.

    x0, x, eps, noise [b, c, h, w], images in [-1, 1]
    t [b] int64 from 0 (nearly clean) to T-1 (nearly noise)
    level (t, alpha, sigma) with x_t = alpha x_0 + sigma eps: Python floats for samplers, so that
    no step waits for the device; float64 [b, 1, 1, 1] for batches

All formulas hold for any alpha and sigma, also where alpha^2 + sigma^2 is not 1. In y = x/alpha
the probability flow is dy / d(sigma/alpha) = eps.
"""

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from einops import rearrange

from ddpm.common import registry
from ddpm.diffusion.spacings import SPACINGS

# Python floats for samplers, float64 tensors [b, 1, 1, 1] for batches
Number = Any


class Level(NamedTuple):
    """A noise level, x_t = alpha x_0 + sigma eps. The network time `t` may be fractional."""

    t: Number
    alpha: Number
    sigma: Number

    @property
    def ratio(self) -> float:
        """sigma/alpha of a level of Python floats: 0 at CLEAN, infinite in pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf


# one step below t = 0, which has a little noise already; the network is not called at this level
CLEAN = Level(-1.0, 1.0, 0.0)


class Levels(list):
    """Levels of a sampling run, noisiest first; `level_of(ratio)` is Process.level_of."""

    def __init__(self, levels, level_of):
        super().__init__(levels)
        self.level_of = level_of

    def __getitem__(self, key):
        item = super().__getitem__(key)
        return Levels(item, self.level_of) if isinstance(key, slice) else item


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) with mean of_x0 * x_0 + of_x * x_t; `small`, `large`: two variances."""

    of_x0: Number
    of_x: Number
    small: Number
    large: Number

    def learned_variance(self, frac):
        """Return exp(frac log(large) + (1 - frac) log(small)) (Nichol & Dhariwal 2021, eq. 15)."""
        low = log(self.small)
        width = log(self.large) - low
        if isinstance(low, torch.Tensor):
            low = low.to(frac)
            width = width.to(frac)
        return torch.exp(low + frac * width)


def posterior(s: Level, t: Level) -> Posterior:
    """Return q(x_s | x_t, x_0) for levels s < t at any distance (Kingma et al. 2021, appendix A.2).

    `small` is the true variance, right for data that is a single point; `large` is the variance of
    q(x_t | x_s), right for unit white noise (Ho et al. 2020, section 3.2). For neighbours these are
    Ho et al., eqs. 6-7; otherwise the respaced betas of Nichol & Dhariwal 2021, eq. 19. Written in
    rho = (sigma/alpha)_s / (sigma/alpha)_t, all is finite at s = CLEAN and at alpha_t = 0.
    """
    rho = (s.sigma * t.alpha) / (t.sigma * s.alpha)
    gain = (1 - rho) * (1 + rho)
    return Posterior(s.alpha * gain, rho * s.sigma / t.sigma, s.sigma**2 * gain, t.sigma**2 * gain)


class Process:
    """A forward process of `timesteps` steps T from its tables alpha and sigma, float64 [T]."""

    def __init__(self, alpha: torch.Tensor, sigma: torch.Tensor):
        self.alpha = alpha
        self.sigma = sigma
        self.timesteps = len(alpha)
        self.norm = path_norm(alpha, sigma)
        clean = torch.tensor([[CLEAN.alpha], [CLEAN.sigma]], dtype=torch.float64)
        tables = torch.cat([clean, torch.stack([alpha, sigma])], dim=1)
        # device -> (alpha, sigma) [2, 1 + T]: CLEAN stands before t = 0
        self.tables = {tables.device: tables}

    def level(self, t: float) -> Level:
        """Return the level at time t; log(sigma/alpha) and the norm are interpolated geometrically.

        Levels lie on the path if one of NORMS is 1. Raises ValueError outside [0, T-1].
        """
        if not 0 <= t <= self.timesteps - 1:
            raise ValueError(
                f"time {t} is outside the schedule; give a number from 0 to {self.timesteps - 1}"
            )
        below = int(t)
        part = t - below
        alpha = self.alpha[below].item()
        sigma = self.sigma[below].item()
        if part == 0:
            return Level(float(t), alpha, sigma)
        above = self.level(below + 1)
        ratio = math.inf
        if above.alpha:
            ratio = sigma / alpha * (above.sigma / above.alpha / (sigma / alpha)) ** part
        norm = self.norm(alpha, sigma) ** (1 - part) * self.norm(above.alpha, above.sigma) ** part
        # a norm scales with its arguments: norm(alpha, alpha * ratio) = alpha * norm(1, ratio)
        return Level(float(t), norm / self.norm(1, ratio), norm / self.norm(1 / ratio, 1))

    def level_of(self, ratio: float) -> Level:
        """Return the level whose sigma/alpha is `ratio`; beyond the tables, their nearest end."""
        above = int(torch.searchsorted(self.sigma / self.alpha, ratio))
        if above in (0, self.timesteps):
            return self.level(min(above, self.timesteps - 1))
        low = self.level(above - 1).ratio
        high = self.level(above).ratio
        return self.level(above - 1 + math.log(ratio / low) / math.log(high / low))

    def levels(self, steps: int, spacing: str = "linear") -> Levels:
        """Return steps + 1 Levels, noisiest first, CLEAN last; ValueError for impossible steps."""
        space = registry.resolve("spacing", SPACINGS, spacing)
        if not isinstance(steps, int) or not 1 <= steps <= self.timesteps:
            raise ValueError(
                f"{steps!r} steps is out of range; give 1 to {self.timesteps} (the timesteps)"
            )
        times = space(self, steps)
        if not all(before > after for before, after in pairwise(times)):
            raise ValueError(
                f"spacing {spacing!r} has no {steps} distinct times on this schedule; give fewer "
                "steps or another spacing"
            )
        return Levels([self.level(t) for t in times] + [CLEAN], self.level_of)

    def at(self, t: torch.Tensor) -> Level:
        """Return the level of each t [b], -1 for CLEAN: float64 [b, 1, 1, 1] on t's device."""
        # copied to a device once, so that a training step never waits for the host
        if t.device not in self.tables:
            self.tables[t.device] = next(iter(self.tables.values())).to(t.device)
        alpha, sigma = rearrange(self.tables[t.device][:, t.long() + 1], "table b -> table b 1 1 1")
        return Level(t, alpha, sigma)

    def q_sample(self, x0, t, noise):
        """Return x_t ~ q(x_t | x_0) at times t [b], in x0's dtype (Ho et al. 2020, eq. 4)."""
        _, alpha, sigma = self.at(t)
        return alpha.to(x0.dtype) * x0 + sigma.to(x0.dtype) * noise

    def posterior(self, x0, x_t, t, variance="small", frac=None):
        """Return mean, variance and log-variance of q(x_{t-1} | x_t, x_0) (Ho et al., eqs. 6-7).

        The mean is [b, c, h, w]; the variances are [b, 1, 1, 1], all in x_t's dtype. `variance` is
        one of VARIANCES; `learned` interpolates at `frac` [b, c, h, w] and has its shape. At t = 0
        the log-variance is that of `small` at t = 1, also for `large`: the true one is -inf there.
        """
        step = posterior(self.at(t - 1), self.at(t))
        mean = step.of_x0.to(x_t.dtype) * x0 + step.of_x.to(x_t.dtype) * x_t
        inner = t.clamp(min=min(1, self.timesteps - 1))
        inner_step = posterior(self.at(inner - 1), self.at(inner))
        at_zero = rearrange(t == 0, "b -> b 1 1 1")
        if variance == "learned":
            # at least 1e-20, for with T = 1 there is no t = 1
            small = torch.where(at_zero, inner_step.small, step.small).clamp(min=1e-20)
            between = step._replace(small=small).learned_variance(frac)
            return mean, between, between.log()
        clipped = torch.where(at_zero, inner_step.small, getattr(inner_step, variance))
        log_variance = clipped.clamp(min=1e-20).log()
        return mean, getattr(step, variance).to(x_t.dtype), log_variance.to(x_t.dtype)


def path_norm(alpha, sigma):
    """Return the function of NORMS that is 1 along tables alpha and sigma [T]; else `hypot`."""
    pairs = list(zip(alpha.tolist(), sigma.tolist(), strict=True))
    for norm in NORMS:
        if all(abs(norm(*pair) - 1) < 1e-9 for pair in pairs):
            return norm
    return math.hypot


def log(value):
    """Return the natural logarithm of a number or a tensor."""
    return value.log() if isinstance(value, torch.Tensor) else math.log(value)


def initial_noise(level: Level, noise: torch.Tensor) -> torch.Tensor:
    """Scale standard-normal noise to the standard deviation of unit-variance images at a level."""
    return math.hypot(level.alpha, level.sigma) * noise


# functions of (alpha, sigma), each 1 on one kind of path
NORMS = (
    math.hypot,  # variance preserving
    lambda alpha, sigma: alpha + sigma,  # straight
    lambda alpha, sigma: alpha,  # variance exploding
)
VARIANCES = ("small", "large", "learned")
