"""Targets: what a network is trained to predict, and how x0 is computed from its output.

    x0, x, eps, out [b, c, h, w] with x = alpha x0 + sigma eps; alpha, sigma: floats or [b, 1, 1, 1]

The inverses hold for any alpha and sigma, also where alpha^2 + sigma^2 is not 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from ddpm.common import registry
from ddpm.diffusion.process import log


class Target(NamedTuple):
    """A prediction target; x0 is linear in x and in the network's output."""

    compute: Callable  # (x0, eps, alpha, sigma) -> target
    x0: Callable  # (x, out, alpha, sigma) -> x0
    defined_at_zero_snr: bool = True  # whether the output determines x0 where alpha = 0
    scale_input: Callable = lambda x, alpha, sigma: x  # EDM's c_in x: x as the network gets it
    c_noise: Callable = lambda t, alpha, sigma: t  # the network's time argument
    is_log_noise: bool = False  # whether c_noise is a log of sigma/alpha instead of a timestep

    def gain(self, alpha, sigma):
        """Return d x0 / d out: the error on x0 for an error of 1 on the target."""
        return self.x0(0, 1, alpha, sigma)


def eps():
    """The noise (Ho et al. 2020, eq. 14)."""
    return Target(
        compute=lambda x0, eps, alpha, sigma: eps,
        x0=lambda x, out, alpha, sigma: (x - sigma * out) / alpha,
        defined_at_zero_snr=False,
    )


def x0():
    """The image (Salimans & Ho 2022, section 4)."""
    return Target(compute=lambda x0, eps, alpha, sigma: x0, x0=lambda x, out, alpha, sigma: out)


def v():
    """The velocity on the circle, alpha eps - sigma x0 (Salimans & Ho 2022, section 4)."""
    return Target(
        compute=lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
        x0=lambda x, out, alpha, sigma: (alpha * x - sigma * out) / (alpha**2 + sigma**2),
    )


def flow():
    """The velocity on a straight path, eps - x0 (Liu et al. 2023; Lipman et al. 2023)."""
    return Target(
        compute=lambda x0, eps, alpha, sigma: eps - x0,
        x0=lambda x, out, alpha, sigma: (x - sigma * out) / (alpha + sigma),
    )


def edm(*, sigma_data=0.5):
    """EDM preconditioning (Karras et al. 2022, table 1), their sigma being sigma/alpha here.

    `sigma_data` is the standard deviation of the images. With sigma_data = 1 and alpha^2 + sigma^2
    = 1 the target is -v. Raises ValueError for sigma_data that is not positive.
    """
    if not 0 < sigma_data < math.inf:
        raise ValueError(
            f"sigma_data {sigma_data} is out of range; give the images' standard deviation, such "
            "as 0.5"
        )

    def spread(alpha, sigma):
        return (sigma**2 + (alpha * sigma_data) ** 2) ** 0.5

    def compute(x0, eps, alpha, sigma):
        return (sigma * x0 - alpha * sigma_data**2 * eps) / (sigma_data * spread(alpha, sigma))

    def to_x0(x, out, alpha, sigma):
        c_skip = alpha * sigma_data**2 / spread(alpha, sigma) ** 2
        c_out = sigma * sigma_data / spread(alpha, sigma)
        return c_skip * x + c_out * out

    return Target(
        compute,
        to_x0,
        defined_at_zero_snr=False,  # c_noise is infinite there
        scale_input=lambda x, alpha, sigma: x / spread(alpha, sigma),
        c_noise=lambda t, alpha, sigma: log(sigma / alpha) / 4,
        is_log_noise=True,
    )


def get_target(name: str, time_scale: float = 1) -> Target:
    """Return the Target of a name such as `"v"`; the network gets t times `time_scale`.

    Raises ValueError for an unknown name.
    """
    target = registry.resolve("target", TARGETS, name)()
    if time_scale == 1:
        return target
    return target._replace(
        c_noise=lambda t, alpha, sigma: target.c_noise(t * time_scale, alpha, sigma)
    )


TARGETS = {
    "eps": eps,
    "x0": x0,
    "v": v,
    "flow": flow,
    "edm": edm,
}
