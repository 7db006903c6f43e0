"""The training objective: the loss, its weighting over noise levels, the distribution of timesteps.

    error, loss, weight [b] float32; t [b] int64; level (t, alpha, sigma) of float64 [b, 1, 1, 1]
    weighting(error, level, target, *, options) -> loss [b], from the mean squared error
    times(process, positions, batch_size, u, *, options) -> (t, importance), for the images at
    `positions` of an effective batch; u(indices) returns a uniform number in [0, 1) for each index;
    importance is None or the factors [b] of the losses

An entry that has parameters, remembers losses or needs all tables is an nn.Module, constructed with
the process.
"""

import torch
from torch import nn

from ddpm.common import registry
from ddpm.diffusion import timesteps, weightings


class Objective(nn.Module):
    """The objective of a loss, a weighting and a distribution of times; part of a checkpoint.

    `loss` names an entry of LOSSES: the weighted mean squared error, that plus a share of the
    variational bound, by which the variance learns (Nichol & Dhariwal 2021, eq. 16), or the bound.
    `weights` float64 [T] are those of the error on the target at the start of training. Raises
    ValueError for unknown names and for options that contradict each other.
    """

    def __init__(
        self, process, target, loss="mse", weighting="simple", times="uniform", learned=False
    ):
        super().__init__()
        self.mse, self.bound = registry.resolve("loss", LOSSES, loss)()
        check_loss(registry.parse(loss)[0], self.bound, weighting, learned)
        self.weighting = instantiate(
            registry.resolve("weighting", weightings.WEIGHTINGS, weighting), process
        )
        level = process.at(torch.arange(process.timesteps))
        ones = torch.ones(process.timesteps, dtype=torch.float64)
        self.weights = self.weighting(ones, level, target).detach()
        if not (self.weights.isfinite() & (self.weights >= 0)).all():
            raise ValueError(
                f"weighting {weighting!r} is negative or not finite at some noise level; choose "
                "other arguments, or none for the published ones"
            )
        self.times = instantiate(
            registry.resolve("time distribution", timesteps.TIMES, times), process
        )

    def observe(self, t, losses):
        """Update an adaptive distribution of times by an effective batch's t and losses [n]."""
        if self.adapts_times:
            self.times.observe(t, losses)

    @property
    def adapts_times(self):
        """Whether the distribution of times adapts to the losses."""
        return isinstance(self.times, nn.Module)


def check_loss(loss, bound, weighting, learned):
    """Raise ValueError for a loss that does not fit the weighting or the kind of variance."""
    if learned and not bound:
        raise ValueError(
            "the loss 'mse' does not train a learned variance; set diffusion.loss=hybrid or vlb, "
            "or diffusion.variance=small"
        )
    if loss == "hybrid" and not learned:
        raise ValueError(
            "the loss 'hybrid' needs a learned variance; set diffusion.variance=learned, or "
            "diffusion.loss=mse"
        )
    if loss == "vlb" and weighting != "simple":
        raise ValueError(
            "the loss 'vlb' has its own weights; set diffusion.weighting=simple, not "
            f"{weighting!r}, or diffusion.loss=mse"
        )


def instantiate(entry, process):
    """Return the module of a table's class for this process; a function stays as it is."""
    return entry(process) if isinstance(entry.func, type) else entry


def mse():
    """(1, 0): weights of the squared error and of the bound."""
    return 1.0, 0.0


def hybrid(*, vlb_weight=0.001):
    """(1, vlb_weight), the bound being a sum over t (Nichol & Dhariwal 2021, eq. 16)."""
    return 1.0, vlb_weight


def vlb():
    """(0, 1): the variational bound alone (Ho et al. 2020, eq. 5)."""
    return 0.0, 1.0


LOSSES = {
    "mse": mse,
    "hybrid": hybrid,
    "vlb": vlb,
}
