"""Spacings: the times at which a sampler calls the network.

spacing(process, steps, *, options) -> list of `steps` falling times in [0, T-1], floats
"""

import math

import torch


def linear(process, steps):
    """Evenly from T-1 to 0, both included, rounded to integers."""
    return torch.linspace(process.timesteps - 1, 0, steps, dtype=torch.float64).round().tolist()


def trailing(process, steps):
    """Strides of T/steps down from T-1 (Lin et al. 2024, table 2)."""
    return [round(process.timesteps * k / steps) - 1.0 for k in range(steps, 0, -1)]


def leading(process, steps):
    """Strides of T//steps up from 0, as in DDIM's paper; sampling starts below T-1."""
    return [float(process.timesteps // steps * k) for k in reversed(range(steps))]


def quadratic(process, steps):
    """Square roots evenly from sqrt(T-1) to 0; fractional (Song et al. 2021, DDIM, app. D.2)."""
    roots = torch.linspace(1, 0, steps, dtype=torch.float64)
    return (roots**2 * (process.timesteps - 1)).tolist()


def karras(process, steps, *, rho=7.0, sigma_max=80.0):
    """(sigma/alpha)^(1/rho) evenly down to t = 0, fractional (Karras et al. 2022, eq. 5, table 1).

    Begins at sigma_max, or the noisiest level if that is lower. Raises ValueError for rho <= 0.
    """
    if not 0 < rho < math.inf:
        raise ValueError(f"rho {rho} is out of range; give a number above 0, such as 7")
    first = process.level_of(sigma_max)
    last = process.level(0)
    roots = torch.linspace(
        first.ratio ** (1 / rho), last.ratio ** (1 / rho), steps, dtype=torch.float64
    )
    return [first.t, *(process.level_of(root**rho).t for root in roots[1:-1].tolist()), 0.0][:steps]


def sections(process, steps, *, counts=(10, 8, 4, 2, 1)):
    """Equal sections of the timesteps, low noise first, `counts` steps in each (Nichol & Dhariwal).

    As in the code of the 2021 paper: steps lie evenly from the first to the last timestep of a
    section; a single step is the first one. Raises ValueError for counts that do not sum to `steps`
    or do not fit into their section.
    """
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(
            f"counts {counts} are out of range; give whole numbers of 1 or more, such as (10, 8, "
            "4, 2, 1)"
        )
    if sum(counts) != steps:
        raise ValueError(
            f"sections of {counts} have {sum(counts)} steps, not {steps}; use {sum(counts)} steps "
            "or give other counts"
        )
    size, longer = divmod(process.timesteps, len(counts))
    times = []
    start = 0
    for k, count in enumerate(counts):
        end = start + size + (k < longer)
        if count > end - start:
            raise ValueError(
                f"{count} steps do not fit into a section of {end - start} timesteps; give a "
                "smaller count"
            )
        times += [
            float(start + round(i * (end - 1 - start) / max(count - 1, 1))) for i in range(count)
        ]
        start = end
    return times[::-1]


SPACINGS = {
    "linear": linear,
    "trailing": trailing,
    "leading": leading,
    "quadratic": quadratic,
    "karras": karras,
    "sections": sections,
}
