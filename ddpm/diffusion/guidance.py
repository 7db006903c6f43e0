"""Guidance: what a network says is moved away from what a worse one says at the same x and level.

The worse one is the network itself without its label (Ho & Salimans 2022, classifier-free
guidance), or a weaker network (Karras et al. 2024, "Guiding a diffusion model with a bad version of
itself", autoguidance). Targets are linear in x0 and eps, so guiding the output guides the score:
that of p^scale q^(1 - scale), for p of the network and q of the worse one.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Guidance(NamedTuple):
    """How far, and at which levels, answers are moved away from those of `worse(x, t, y) -> out`.

    `scale` 1 is no guidance, and `worse` is not asked. `interval` is (low, high], in sigma/alpha,
    or () for everywhere (Kynkaanniemi et al. 2024, "Applying Guidance in a Limited Interval", whose
    sigma is sigma/alpha here).
    """

    worse: Callable | None = None
    scale: float = 1.0
    interval: tuple = ()

    def applies(self, level):
        """Whether the worse network is asked at a level of Python floats."""
        low, high = self.interval or (-1.0, float("inf"))
        return self.scale != 1 and low < level.ratio <= high

    def move(self, out, worse, channels):
        """worse + scale (out - worse) in the first `channels`, the target; a variance beside it
        stays the network's own.
        """
        said = out[:, :channels]
        beside = out[:, channels:]
        worse = worse[:, :channels]
        return torch.cat([worse + self.scale * (said - worse), beside], dim=1)


NONE = Guidance()


def unlabelled(net):
    """The network without its label."""
    return lambda x, t, y=None: net(x, t)
