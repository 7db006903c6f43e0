"""Power-function averages of weights, and any of their profiles after the training (Karras et al.
2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3 and appendix
C).

After n steps the profile gamma weighs the weights of time t by (gamma + 1) t^gamma / n^(gamma + 1):
the same shape at any n, zero at the beginning. It is named by its standard deviation in units of n,
sigma_rel, 0.05 to 0.15 in the paper. Averages of two profiles, stored now and then ("snapshots"),
nearly span all others.

    steps, gammas [k]: after how many steps each stored average was taken, and its profile; profiles
    and sums in float64
"""

import math

import torch
from einops import rearrange

WIDEST = 12**-0.5  # sigma_rel of the plain mean of all steps, gamma = 0
MISFIT = 0.1  # a profile that snapshots miss by more of its norm is another profile


def sigma_rel_of(gamma):
    """The standard deviation of a profile over the length of the training (eq. 123)."""
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel):
    """The profile of a width (eq. 126), in closed form; raises ValueError outside (0, 0.288].

    With m = gamma + 2 it is the largest of the three real roots of
    m^3 + m^2 - m / sigma_rel^2 + 1 / sigma_rel^2 = 0.
    """
    if not 0 < sigma_rel <= WIDEST:
        raise ValueError(f"sigma_rel is {sigma_rel}; it must be in (0, 0.288], such as 0.1")
    s = sigma_rel**-2
    p = -s - 1 / 3
    q = 4 * s / 3 + 2 / 27  # of the same equation in m + 1/3, which has no square
    angle = math.acos(1.5 * q / p * math.sqrt(-3 / p)) / 3
    return 2 * math.sqrt(-p / 3) * math.cos(angle) - 7 / 3


def power_function(sigma_rel):
    """The decay of an EMA's update n = 0, 1, ... that makes it the average of that width (eq. 127).

    Update n then weighs (n + 1)^(gamma + 1) - n^(gamma + 1), the integral of the profile over that
    step; the first one, 1: the initial weights are forgotten, and there is nothing to warm up.
    """
    exponent = gamma_of(sigma_rel) + 1
    return lambda n: (1 - 1 / (n + 1)) ** exponent


def inner(a, gamma, b, delta):
    """The integral of profile `gamma` after `a` steps times `delta` after `b` (eq. 151)."""
    shorter = torch.minimum(a, b)
    longer = torch.maximum(a, b)
    scale = (gamma + 1) * (delta + 1) / (gamma + delta + 1)
    return scale * (shorter / longer) ** torch.where(a < b, delta, gamma) / longer


def coefficients(steps, gammas, step, gamma):
    """(combination [k] of stored averages nearest to `gamma` after `step` steps, relative error).

    Least squares over all of time (algorithm 3), with averages scaled to length 1.
    """
    steps, gammas, step, gamma = (
        torch.as_tensor(value, dtype=torch.float64) for value in (steps, gammas, step, gamma)
    )
    lengths = inner(steps, gammas, steps, gammas).sqrt()
    products = inner(
        rearrange(steps, "k -> k 1"), rearrange(gammas, "k -> k 1"), steps, gammas
    ) / torch.outer(lengths, lengths)
    length = inner(step, gamma, step, gamma).sqrt()
    wanted = inner(steps, gammas, step, gamma) / lengths / length
    solution = torch.linalg.solve(products, wanted)
    misfit = (1 - 2 * solution @ wanted + solution @ products @ solution).clamp(min=0).sqrt().item()
    combination = solution / lengths
    return combination / combination.sum(), misfit


def reconstruct(stored, sigma_rel):
    """The average of width `sigma_rel`, float32, from `[(step, sigma_rel, read)]` by step.

    `read()` returns the average stored there, name -> tensor; one is held at a time. Integers are
    the last one's. Raises ValueError if the stored ones do not span the profile.
    """
    steps, widths, reads = zip(*stored, strict=True)
    weights, misfit = coefficients(
        steps, [gamma_of(width) for width in widths], steps[-1], gamma_of(sigma_rel)
    )
    if misfit > MISFIT:
        there = ", ".join(map(str, sorted(set(widths))))
        raise ValueError(
            f"sigma_rel {sigma_rel} cannot be made from {len(set(steps))} snapshots of {there}: "
            f"they miss it by {misfit:.0%}; choose one nearer to those, or train with a shorter "
            "every.snapshot"
        )
    total = {}
    for coefficient, read in zip(weights.tolist(), reads, strict=True):
        for name, value in read().items():
            if not value.is_floating_point():
                total[name] = value
            elif name in total:
                total[name].add_(value.float(), alpha=coefficient)
            else:
                total[name] = value.float() * coefficient
    return total
