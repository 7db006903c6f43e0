"""The diffusion process: from tables to noising, posteriors and noise levels.

    x0, x, eps, noise [b, c, h, w]; t [b] integers from 0 (nearly clean) to T-1 (nearly noise)
    a level is (t, alpha, sigma) with x_t = alpha x0 + sigma eps: Python floats for samplers,
    float64 [b, 1, 1, 1] for batches

Nothing here assumes alpha^2 + sigma^2 = 1.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange

from ddpm.common import registry
from ddpm.diffusion.spacings import SPACINGS


class Level(NamedTuple):
    """A noise level: x_t = alpha x0 + sigma eps. `t` is what the network is told; it may be
    fractional.
    """

    t: float | torch.Tensor
    alpha: float | torch.Tensor
    sigma: float | torch.Tensor

    @property
    def ratio(self):
        """sigma/alpha of a level of Python floats: 0 at CLEAN, infinite in pure noise."""
        return self.sigma / self.alpha if self.alpha else math.inf


class Levels(list):
    """The levels of a walk, from noisy to CLEAN; `level_of(ratio)` is the process's level at any
    sigma/alpha between them.
    """

    def __init__(self, levels, level_of):
        super().__init__(levels)
        self.level_of = level_of

    def __getitem__(self, key):
        part = super().__getitem__(key)
        return Levels(part, self.level_of) if isinstance(key, slice) else part


# one step below t = 0, which is slightly noisy already; the network is never asked here
CLEAN = Level(-1.0, 1.0, 0.0)


class Posterior(NamedTuple):
    """q(x_s | x_t, x0): its mean is x0 * of_x0 + x * of_x; `small` and `large` are two choices
    of its variance.
    """

    of_x0: float | torch.Tensor
    of_x: float | torch.Tensor
    small: float | torch.Tensor
    large: float | torch.Tensor

    def learned(self, mix):
        """The variance between them, in the logarithm, at the network's `mix`, 0 to 1 (Nichol &
        Dhariwal 2021, eq. 15).
        """
        low = log(self.small)
        high = log(self.large)
        low, between = (
            part.to(mix) if isinstance(part, torch.Tensor) else part for part in (low, high - low)
        )
        return torch.exp(low + mix * between)


def posterior(s, t):
    """Return q(x_s | x_t, x0) for levels s < t, any distance apart (Kingma et al. 2021, VDM,
    appendix A.2).

    `small` is the true variance, right for data that is one point; `large`, that of q(x_t | x_s),
    is right for data that is unit white noise, where alpha^2 + sigma^2 = 1 (Ho et al. 2020, section
    3.2). For neighbours this is Ho et al., eqs. 6-7; for others it is the same on respaced betas
    (Nichol & Dhariwal 2021, eq. 19). Written with rho = (sigma/alpha)_s / (sigma/alpha)_t it is
    finite at s = CLEAN and at alpha_t = 0.
    """
    rho = (s.sigma * t.alpha) / (t.sigma * s.alpha)
    gain = (1 - rho) * (1 + rho)
    return Posterior(s.alpha * gain, rho * s.sigma / t.sigma, s.sigma**2 * gain, t.sigma**2 * gain)


class Process:
    """A forward process from its tables alpha and sigma, float64 [T]: `timesteps`, levels,
    noising and posterior.
    """

    def __init__(self, alpha, sigma):
        self.alpha = alpha
        self.sigma = sigma
        self.timesteps = len(alpha)
        clean = torch.tensor([CLEAN.alpha, CLEAN.sigma], dtype=torch.float64)
        self.size = next(
            (
                size
                for size in SIZES
                if max(
                    abs(size(*pair) - 1)
                    for pair in zip(alpha.tolist(), sigma.tolist(), strict=True)
                )
                < 1e-9
            ),
            math.hypot,
        )
        host = torch.cat([rearrange(clean, "table -> table 1"), torch.stack([alpha, sigma])], dim=1)
        # device -> (alpha, sigma) [2, 1 + T]: CLEAN stands before t = 0
        self.tables = {host.device: host}

    def level(self, t):
        """Return the level at time t in [0, T-1]; between integers, the log of sigma/alpha goes on
        a line.

        Where one of SIZES is 1 at all integers it is 1 between them, so that the level lies on the
        path. Raises ValueError for a time outside the tables.
        """
        if not 0 <= t <= self.timesteps - 1:
            raise ValueError(
                f"time {t} is outside the schedule; give a number from 0 to {self.timesteps - 1}"
            )
        below = int(t)
        part = t - int(t)
        alpha = self.alpha[below].item()
        sigma = self.sigma[below].item()
        if part == 0:
            return Level(float(t), alpha, sigma)
        above = self.level(below + 1)
        ratio = (
            sigma / alpha * (above.sigma / above.alpha / (sigma / alpha)) ** part
            if above.alpha
            else math.inf
        )
        size = self.size(alpha, sigma) ** (1 - part) * self.size(above.alpha, above.sigma) ** part
        return Level(float(t), size / self.size(1, ratio), size / self.size(1 / ratio, 1))

    def level_of(self, ratio):
        """Return the level at which sigma/alpha is `ratio`, the inverse of `level`; beyond the
        tables, their nearest end.
        """
        above = int(torch.searchsorted(self.sigma / self.alpha, ratio))
        if above in (0, self.timesteps):
            return self.level(min(above, self.timesteps - 1))
        low = self.level(above - 1)
        high = self.level(above)
        return self.level(
            above - 1 + math.log(ratio / low.ratio) / math.log(high.ratio / low.ratio)
        )

    def levels(self, steps, spacing="linear"):
        """Return the steps + 1 Levels of a sampling run, from the noisiest down to CLEAN.

        `spacing` names an entry of SPACINGS. Raises ValueError for steps outside 1 .. T, or that
        the spacing cannot make.
        """
        space = registry.resolve("spacing", SPACINGS, spacing)
        if not isinstance(steps, int) or not 1 <= steps <= self.timesteps:
            raise ValueError(
                f"{steps!r} steps is out of range; give 1 to {self.timesteps} (the timesteps)"
            )
        times = space(self, steps)
        if not all(before > after for before, after in pairwise(times)):
            raise ValueError(
                f"spacing {spacing!r} finds no {steps} different levels here; give fewer steps or "
                "another spacing"
            )
        return Levels([self.level(t) for t in times] + [CLEAN], self.level_of)

    def at(self, t):
        """Return the level of each t [b] of a batch (-1 is CLEAN), float64 [b, 1, 1, 1] on t's
        device.
        """
        # moved once, so that a training step never waits for the host
        if t.device not in self.tables:
            self.tables[t.device] = next(iter(self.tables.values())).to(t.device)
        alpha, sigma = rearrange(self.tables[t.device][:, t.long() + 1], "table b -> table b 1 1 1")
        return Level(t, alpha, sigma)

    def q_sample(self, x0, t, noise):
        """Return x_t ~ q(x_t | x0): the images noised to times t [b], in x0's dtype (Ho et al.
        2020, eq. 4).
        """
        _, alpha, sigma = self.at(t)
        return alpha.to(x0.dtype) * x0 + sigma.to(x0.dtype) * noise

    def posterior(self, x0, x_t, t, variance="small", mix=None):
        """Return mean [b, c, h, w], variance and log-variance [b, 1, 1, 1] of q(x_{t-1} | x_t, x0),
        in x_t's dtype.

        `variance` is one of VARIANCES; with `learned` ones, all are [b, c, h, w] and lie at `mix`
        between small and large. The log-variance at t = 0, where the true one is -inf, is that of
        `small` at t = 1. Ho et al. 2020, eqs. 6-7.
        """
        step = posterior(self.at(t - 1), self.at(t))
        mean = step.of_x0.to(x_t.dtype) * x0 + step.of_x.to(x_t.dtype) * x_t
        inner = t.clamp(min=min(1, self.timesteps - 1))
        inner_step = posterior(self.at(inner - 1), self.at(inner))
        at_zero = rearrange(t == 0, "b -> b 1 1 1")
        # with T = 1 there is no t = 1
        small = torch.where(at_zero, inner_step.small, step.small).clamp(min=1e-20)
        if variance == "learned":
            between = step._replace(small=small).learned(mix)
            return mean, between, between.log()
        clipped = torch.where(at_zero, inner_step.small, getattr(inner_step, variance))
        log_variance = clipped.clamp(min=1e-20).log()
        return mean, getattr(step, variance).to(x_t.dtype), log_variance.to(x_t.dtype)


def log(value):
    """The logarithm of a number or a tensor."""
    return value.log() if isinstance(value, torch.Tensor) else math.log(value)


def latent(level, noise):
    """Scale standard-normal noise to the spread that unit-variance images have at a level: where
    sampling starts.
    """
    return math.hypot(level.alpha, level.sigma) * noise


# of (alpha, sigma): what is 1 on a variance-preserving, a straight and a variance-exploding path
SIZES = (math.hypot, lambda alpha, sigma: alpha + sigma, lambda alpha, sigma: alpha)
VARIANCES = ("small", "large", "learned")
