"""Noise schedules: how fast an image drowns in noise.

A schedule is `f(timesteps, *, options) -> (alpha, sigma)`, float64 [T] on the host, with x_t =
alpha x0 + sigma eps for t = 0 .. T-1. The beta family of Ho et al. 2020, q(x_t | x_{t-1}) =
N(sqrt(1 - beta_t) x_{t-1}, beta_t), is brought to this form by `tables`.
"""

import math
from numbers import Integral

import torch

from ddpm.common import registry

# Nichol & Dhariwal 2021: keeps the last steps, where alpha_bar nears 0, from being singular
MAX_BETA = 0.999


def tables(betas):
    """Turn betas [T] into alpha = sqrt(alpha_bar) and sigma = sqrt(1 - alpha_bar), both to full
    relative precision.
    """
    log_alpha_bar = torch.log1p(-betas).cumsum(0)
    return torch.exp(log_alpha_bar / 2), torch.sqrt(-torch.expm1(log_alpha_bar))


def line(start, end, points):
    """Float64 [points] from `start` to `end`, both included."""
    return torch.linspace(start, end, points, dtype=torch.float64)


def linear(timesteps, *, start=1e-4, end=0.02):
    """Betas on a line (Ho et al. 2020, section 4), scaled by 1000/T so that the last step is as
    noisy at any T.
    """
    betas = line(start, end, timesteps) * (1000 / timesteps)
    return tables(betas.clamp(max=MAX_BETA))


def quadratic(timesteps, *, start=1e-4, end=0.02):
    """Betas whose roots lie on a line (`quad` in the code of Ho et al. 2020), scaled by 1000/T
    like `linear`.
    """
    betas = line(math.sqrt(start), math.sqrt(end), timesteps) ** 2 * (1000 / timesteps)
    return tables(betas.clamp(max=MAX_BETA))


def cosine(timesteps, *, s=0.008):
    """alpha_bar = cos^2 u / cos^2 u_0 with u = (t/T + s)/(1 + s) pi/2 (Nichol & Dhariwal 2021,
    eq. 17).
    """
    u = (line(0, 1, timesteps + 1) + s) / (1 + s) * (math.pi / 2)
    before = u[:-1]
    after = u[1:]
    # 1 - cos^2(after) / cos^2(before), without the cancellation at small t
    betas = torch.sin(after + before) * torch.sin(after - before) / torch.cos(before) ** 2
    return tables(betas.clamp(max=MAX_BETA))


def sigmoid(timesteps, *, start=-3.0, end=3.0, tau=1.0):
    """alpha_bar falls from 1 to 0 as sigmoid(-u/tau), u from start to end (Jabri et al. 2022;
    Chen 2023, alg. 1).
    """
    u = line(start / tau, end / tau, timesteps + 1)
    before = u[:-1]
    after = u[1:]
    # 1 - (S(u_T) - S(after)) / (S(u_T) - S(before)) for the logistic S, without the cancellation at
    # either end
    betas = (
        torch.sigmoid(after)
        / torch.sigmoid(u[-1])
        * torch.expm1(before - after)
        / torch.expm1(before - u[-1])
    )
    return tables(betas.clamp(max=MAX_BETA))


def from_log_snr(values):
    """Turn log(alpha^2 / sigma^2) [T] into variance-preserving tables."""
    return torch.sigmoid(values).sqrt(), torch.sigmoid(-values).sqrt()


def laplace(timesteps, *, mean=0.0, scale=0.5):
    """log(SNR) Laplace-distributed over t: most steps near its mean (Hang et al. 2024, Improved
    Noise Schedule, table 1).
    """
    t = line(0, 1, timesteps + 2)[1:-1]
    return from_log_snr(mean - scale * torch.sign(0.5 - t) * torch.log1p(-2 * (t - 0.5).abs()))


def shifted_cosine(timesteps, *, resolution=128, base=64):
    """Cosine with log(SNR) moved by 2 log(base / resolution): large images need more noise
    (Hoogeboom et al. 2023, eq. 9).
    """
    t = line(0, 1, timesteps + 2)[1:-1]
    return from_log_snr(-2 * torch.tan(t * (math.pi / 2)).log() + 2 * math.log(base / resolution))


def flow(timesteps, *, shift=1.0):
    """The straight path alpha = 1 - t, sigma = t, of rectified flow (Liu et al. 2023; Lipman et al.
    2023), up to pure noise.

    `shift` moves times to more noise, t -> shift t / (1 + (shift - 1) t), as large images need
    (Esser et al. 2024, eq. 23).
    """
    t = line(0, 1, timesteps + 1)[1:]
    t = shift * t / (1 + (shift - 1) * t)
    return 1 - t, t


def edm(timesteps, *, sigma_min=0.002, sigma_max=80.0):
    """alpha = 1 and sigma from sigma_min to sigma_max, evenly in the logarithm (the range of
    Karras et al. 2022, table 1).
    """
    sigma = torch.exp(line(math.log(sigma_min), math.log(sigma_max), timesteps))
    return torch.ones_like(sigma), sigma


def zero_terminal_snr(alpha, sigma):
    """Move alpha, at its radius, so that the last is 0 and the first stays (Lin et al. 2024,
    algorithm 1).
    """
    radius = torch.hypot(alpha, sigma)
    share = alpha / radius
    share = (share - share[-1]) * (share[0] / (share[0] - share[-1]))
    return share * radius, torch.sqrt((1 - share) * (1 + share)) * radius


def get_schedule(name, timesteps, zero_terminal=False):
    """Return the tables (alpha, sigma), float64 [T], of a schedule named like `"cosine"` or
    `"sigmoid(tau=0.5)"`.

    `zero_terminal` rescales them by `zero_terminal_snr`. Raises ValueError for an unknown name or
    option, T outside 1 .. 10,000, or options under which noise does not grow.
    """
    schedule = registry.resolve("schedule", SCHEDULES, name)
    if (
        isinstance(timesteps, bool)
        or not isinstance(timesteps, Integral)
        or not 1 <= timesteps <= 10_000
    ):
        raise ValueError(
            f"timesteps {timesteps!r} is out of range; give a whole number from 1 to 10000"
        )
    try:
        alpha, sigma = schedule(timesteps)
        if zero_terminal and timesteps > 1:
            alpha, sigma = zero_terminal_snr(alpha, sigma)
        grows = bool(
            (alpha >= 0).all() and (sigma > 0).all() and (torch.diff(sigma / alpha) > 0).all()
        )
    except (ValueError, ZeroDivisionError):  # the root of a negative start, a width of zero
        grows = False
    if not grows:
        raise ValueError(
            f"schedule {name!r} with {timesteps} timesteps does not add noise at every step; "
            "choose other arguments, or none for the published ones"
        )
    return alpha, sigma


def get_beta_schedule(name, timesteps):
    """Return the betas, float64 [T] in (0, 1], of a variance-preserving schedule; they are exact to
    about 1e-15.

    Raises ValueError as `get_schedule` does, and for a path off the circle alpha^2 + sigma^2 = 1,
    which has no betas.
    """
    alpha, sigma = get_schedule(name, timesteps)
    if (alpha**2 + sigma**2 - 1).abs().max() > 1e-9:
        raise ValueError(
            f"schedule {name!r} has no betas (alpha^2 + sigma^2 is not 1); use get_schedule for "
            "tables"
        )
    return 1 - (alpha / torch.cat([torch.ones(1, dtype=torch.float64), alpha[:-1]])) ** 2


SCHEDULES = {
    "linear": linear,
    "cosine": cosine,
    "quadratic": quadratic,
    "sigmoid": sigmoid,
    "laplace": laplace,
    "shifted_cosine": shifted_cosine,
    "flow": flow,
    "edm": edm,
}
