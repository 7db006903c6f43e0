"""Spacings: at which times a sampler stops on its way from noise to clean.

spacing(process, steps, *, options) -> `steps` falling times in [0, T-1], which may be fractional
"""

import math

import torch


def linear(process, steps):
    """Evenly from T-1 to 0, both included."""
    return torch.linspace(process.timesteps - 1, 0, steps, dtype=torch.float64).round().tolist()


def trailing(process, steps):
    """Evenly in strides of T/steps, down from T-1 (Lin et al. 2024, table 2)."""
    return [round(process.timesteps * k / steps) - 1.0 for k in range(steps, 0, -1)]


def leading(process, steps):
    """Evenly in strides of T//steps, up from 0, as DDIM was published; starts below T-1."""
    return [float(process.timesteps // steps * k) for k in reversed(range(steps))]


def quadratic(process, steps):
    """Times whose roots lie evenly from that of T-1 to 0 (Song et al. 2021, DDIM, appendix D.2),
    many at low noise.

    Times are fractional: whole ones, as published, would coincide near 0. (The authors' code begins
    at 0.8 T.)
    """
    return (
        torch.linspace(1, 0, steps, dtype=torch.float64) ** 2 * (process.timesteps - 1)
    ).tolist()


def karras(process, steps, *, rho=7.0, sigma_max=80.0):
    """Fractional times at which (sigma/alpha)^(1/rho) falls evenly to that of 0 (Karras et al.
    2022, eq. 5 and table 1).

    It begins at sigma/alpha = sigma_max, or where tables without so much noise begin: a cosine
    schedule goes up to 20,000, on which steps would be wasted. Raises ValueError for rho not above
    0.
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
    """The timesteps in equal sections, from low noise to high, with so many steps in each (Nichol &
    Dhariwal 2021, code).

    Evenly from the first to the last of a section, or its first where there is one step: then it
    starts below T-1. Raises ValueError for counts that do not sum to `steps` or do not fit into
    their section.
    """
    if not all(type(count) is int and count > 0 for count in counts):
        raise ValueError(
            f"counts {counts} are out of range; give whole numbers of 1 or more, such as (10, 8, "
            "4, 2, 1)"
        )
    if sum(counts) != steps:
        raise ValueError(
            f"sections of {counts} make {sum(counts)} steps, not {steps}; ask for {sum(counts)} "
            "steps or give other counts"
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
