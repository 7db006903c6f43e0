"""Targets: what a network is trained to say, and the denoiser that samplers call, which reads x0
from what it says.

    x0, x, eps, out [b, c, h, w]; a level is (t, alpha, sigma) with x = alpha x0 + sigma eps,
    of floats or of [b, 1, 1, 1]
    denoise(x, level) -> (x0, eps), both [b, c, h, w], and where the variance is learned a
    third, `mix`, in about [0, 1]

The inverses are general: they hold off alpha^2 + sigma^2 = 1 as well.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from ddpm.common import registry
from ddpm.diffusion.process import log


class Target(NamedTuple):
    """What a network is trained to say, and how x0 is read from it; alpha and sigma are numbers
    or [b, 1, 1, 1].
    """

    make: Callable  # (x0, eps, alpha, sigma) -> target
    x0: Callable  # (x, out, alpha, sigma) -> x0, linear in x and out
    pure_noise: bool = True  # whether it tells x0 where alpha = 0
    shown: Callable = lambda x, alpha, sigma: x  # what the network sees of x
    told: Callable = lambda t, alpha, sigma: t  # what it is told of the level
    # whether that is a logarithm of sigma/alpha instead of a timestep
    tells_log_noise: bool = False

    def gain(self, alpha, sigma):
        """How far x0 moves with the network's output: errors on x0 are this often those on the
        target.
        """
        return self.x0(0, 1, alpha, sigma)


def eps():
    """The noise (Ho et al. 2020, eq. 14)."""
    return Target(
        lambda x0, eps, alpha, sigma: eps,
        lambda x, out, alpha, sigma: (x - sigma * out) / alpha,
        pure_noise=False,
    )


def x0():
    """The image."""
    return Target(lambda x0, eps, alpha, sigma: x0, lambda x, out, alpha, sigma: out)


def v():
    """The velocity on the circle, alpha eps - sigma x0 (Salimans & Ho 2022, section 4)."""
    return Target(
        lambda x0, eps, alpha, sigma: alpha * eps - sigma * x0,
        lambda x, out, alpha, sigma: (alpha * x - sigma * out) / (alpha**2 + sigma**2),
    )


def flow():
    """The velocity on a straight line, eps - x0 (Liu et al. 2023, rectified flow; Lipman et al.
    2023).
    """
    return Target(
        lambda x0, eps, alpha, sigma: eps - x0,
        lambda x, out, alpha, sigma: (x - sigma * out) / (alpha + sigma),
    )


def edm(*, sigma_data=0.5):
    """EDM's preconditioning c_skip, c_out, c_in, c_noise (Karras et al. 2022, table 1) at their
    sigma = sigma/alpha here.

    `sigma_data` is the standard deviation of the images; with 1 on alpha^2 + sigma^2 = 1 this is
    -v. Raises ValueError where it is not above 0.
    """
    if not 0 < sigma_data < math.inf:
        raise ValueError(
            f"sigma_data {sigma_data} is out of range; give the images' standard deviation, such "
            "as 0.5"
        )

    def spread(alpha, sigma):
        return (sigma**2 + (alpha * sigma_data) ** 2) ** 0.5

    def read(x, out, alpha, sigma):
        c_skip = alpha * sigma_data**2 / spread(alpha, sigma) ** 2
        c_out = sigma * sigma_data / spread(alpha, sigma)
        return c_skip * x + c_out * out

    return Target(
        lambda x0, eps, alpha, sigma: (
            (sigma * x0 - alpha * sigma_data**2 * eps) / (sigma_data * spread(alpha, sigma))
        ),
        read,
        pure_noise=False,  # c_noise is infinite there
        shown=lambda x, alpha, sigma: x / spread(alpha, sigma),
        told=lambda t, alpha, sigma: log(sigma / alpha) / 4,
        tells_log_noise=True,
    )


def get_target(name, time_scale=1):
    """Return the Target of a name like `"v"` or `"edm(sigma_data=0.5)"`, where networks hear t
    times `time_scale`.

    Raises ValueError for an unknown name.
    """
    target = registry.resolve("target", TARGETS, name)()
    if time_scale == 1:
        return target
    return target._replace(told=lambda t, alpha, sigma: target.told(t * time_scale, alpha, sigma))


TARGETS = {
    "eps": eps,
    "x0": x0,
    "v": v,
    "flow": flow,
    "edm": edm,
}
