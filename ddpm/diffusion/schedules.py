"""Noise schedules: the signal and noise levels of every timestep.

    schedule(timesteps, *, options) -> (alpha, sigma), float64 [T] on the host
    x_t = alpha_t x_0 + sigma_t eps for t = 0 .. T-1

`tables` converts the betas of Ho et al. 2020, q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1},
beta_t).
"""

import math
from numbers import Integral
from typing import Protocol

import torch

from ddpm.common import registry

# Nichol & Dhariwal 2021, section 3.2: no singularity where alpha_bar nears 0
MAX_BETA = 0.999
MAX_TIMESTEPS = 10_000


class Schedule(Protocol):
    """An entry of SCHEDULES with its options bound: T -> (alpha, sigma), float64 [T]."""

    def __call__(self, timesteps: int, /) -> tuple[torch.Tensor, torch.Tensor]: ...


def tables(betas):
    """Return alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) of betas [T], fully precise."""
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar))


def line(start, end, points):
    """Return float64 [points] from `start` to `end`, both included."""
    return torch.linspace(start, end, points, dtype=torch.float64)


def linear(timesteps, *, start=1e-4, end=0.02):
    """Linear betas (Ho et al. 2020, section 4) times 1000/T: the same final noise at any T."""
    betas = line(start, end, timesteps) * (1000 / timesteps)
    return tables(betas.clamp(max=MAX_BETA))


def quadratic(timesteps, *, start=1e-4, end=0.02):
    """Squares of linear sqrt(beta) (`quad` in the code of Ho et al. 2020), times 1000/T."""
    betas = line(math.sqrt(start), math.sqrt(end), timesteps) ** 2 * (1000 / timesteps)
    return tables(betas.clamp(max=MAX_BETA))


def cosine(timesteps, *, s=0.008):
    """alpha_bar = cos^2 u / cos^2 u_0, u = (t/T + s)/(1 + s) pi/2 (Nichol & Dhariwal, eq. 17)."""
    u = (line(0, 1, timesteps + 1) + s) / (1 + s) * (math.pi / 2)
    before = u[:-1]
    after = u[1:]
    # 1 - cos^2(after) / cos^2(before), without the cancellation at small t
    betas = torch.sin(after + before) * torch.sin(after - before) / torch.cos(before) ** 2
    return tables(betas.clamp(max=MAX_BETA))


def sigmoid(timesteps, *, start=-3.0, end=3.0, tau=1.0):
    """alpha_bar = sigmoid(-u/tau), u in [start, end], rescaled to [0, 1] (Chen 2023, alg. 1)."""
    u = line(start / tau, end / tau, timesteps + 1)
    before = u[:-1]
    after = u[1:]
    # 1 - (S(u_T) - S(after)) / (S(u_T) - S(before)), S the logistic function, without cancellation
    ratio = torch.sigmoid(after) / torch.sigmoid(u[-1])
    betas = ratio * torch.expm1(before - after) / torch.expm1(before - u[-1])
    return tables(betas.clamp(max=MAX_BETA))


def from_log_snr(values):
    """Return the variance-preserving tables of log(alpha^2 / sigma^2) [T]."""
    return torch.sigmoid(values).sqrt(), torch.sigmoid(-values).sqrt()


def laplace(timesteps, *, mean=0.0, scale=0.5):
    """log(SNR) Laplace-distributed over t (Hang et al. 2024, Improved Noise Schedule, table 1)."""
    t = line(0, 1, timesteps + 2)[1:-1]
    return from_log_snr(mean - scale * torch.sign(0.5 - t) * torch.log1p(-2 * (t - 0.5).abs()))


def shifted_cosine(timesteps, *, resolution=128, base=64):
    """Cosine with log(SNR) + 2 log(base/resolution) for large images (Hoogeboom 2023, eq. 9)."""
    t = line(0, 1, timesteps + 2)[1:-1]
    return from_log_snr(-2 * torch.tan(t * (math.pi / 2)).log() + 2 * math.log(base / resolution))


def flow(timesteps, *, shift=1.0):
    """The straight path alpha = 1 - t, sigma = t to pure noise (rectified flow, Liu et al. 2023).

    `shift` > 1 adds noise for large images (Esser et al. 2024, eq. 23).
    """
    t = line(0, 1, timesteps + 1)[1:]
    t = shift * t / (1 + (shift - 1) * t)
    return 1 - t, t


def edm(timesteps, *, sigma_min=0.002, sigma_max=80.0):
    """alpha = 1, log(sigma) linear from sigma_min to sigma_max (range of Karras 2022, table 1)."""
    sigma = torch.exp(line(math.log(sigma_min), math.log(sigma_max), timesteps))
    return torch.ones_like(sigma), sigma


def zero_terminal_snr(alpha, sigma):
    """Shift and scale alpha to end at 0, alpha^2 + sigma^2 unchanged (Lin et al. 2024, alg. 1)."""
    radius = torch.hypot(alpha, sigma)
    cos = alpha / radius
    cos = (cos - cos[-1]) * (cos[0] / (cos[0] - cos[-1]))
    return cos * radius, torch.sqrt((1 - cos) * (1 + cos)) * radius


def get_schedule(
    name: str, timesteps: int, zero_terminal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (alpha, sigma), float64 [T], of a name such as `"cosine"` or `"sigmoid(tau=0.5)"`.

    `zero_terminal` applies `zero_terminal_snr`. Raises ValueError for an unknown name or option, T
    outside 1 .. 10,000, and options for which sigma/alpha does not increase at every step.
    """
    schedule = registry.resolve("schedule", SCHEDULES, name)
    is_integer = isinstance(timesteps, Integral) and not isinstance(timesteps, bool)
    if not is_integer or not 1 <= timesteps <= MAX_TIMESTEPS:
        raise ValueError(
            f"timesteps {timesteps!r} is out of range; give a whole number from 1 to "
            f"{MAX_TIMESTEPS}"
        )
    try:
        alpha, sigma = schedule(timesteps)
        if zero_terminal and timesteps > 1:
            alpha, sigma = zero_terminal_snr(alpha, sigma)
        in_range = (alpha >= 0).all() and (sigma > 0).all()
        valid = bool(in_range and (torch.diff(sigma / alpha) > 0).all())
    except (ValueError, ZeroDivisionError):  # the root of a negative start, a width of zero
        valid = False
    if not valid:
        raise ValueError(
            f"schedule {name!r} with {timesteps} timesteps does not add noise at every step; "
            "choose other arguments, or none for the published ones"
        )
    return alpha, sigma


def get_beta_schedule(name: str, timesteps: int) -> torch.Tensor:
    """Return the betas, float64 [T], exact to 1e-15; ValueError if not variance preserving."""
    alpha, sigma = get_schedule(name, timesteps)
    if (alpha**2 + sigma**2 - 1).abs().max() > 1e-9:
        raise ValueError(
            f"schedule {name!r} has no betas (alpha^2 + sigma^2 is not 1); use get_schedule for "
            "tables"
        )
    return 1 - (alpha / torch.cat([torch.ones(1, dtype=torch.float64), alpha[:-1]])) ** 2


SCHEDULES: dict[str, Schedule] = {
    "linear": linear,
    "cosine": cosine,
    "quadratic": quadratic,
    "sigmoid": sigmoid,
    "laplace": laplace,
    "shifted_cosine": shifted_cosine,
    "flow": flow,
    "edm": edm,
}
