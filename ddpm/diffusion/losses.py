"""What is minimised: the loss, how it is weighted over noise levels, and how often each level is
drawn.

    error, loss, weight [b] float32; t [b] int64; a level (t, alpha, sigma) of float64 [b, 1, 1, 1]
    weighting(error, level, target, *, options) -> loss [b], of the mean squared error on the target
    times(process, places, batch_size, u, *, options) -> (t, importance), for the images at `places`
    of an effective batch;
    u(indices) gives a number in [0, 1) for each index; importance is [b] or None, and what the loss
    is multiplied by

Weightings are published for errors on x0 or eps; `on_x0` brings them to the error on any target. Of
those, `sigmoid` alone has the factor -dlog(SNR)/dt of the bound, as in its papers. What has
parameters, remembers losses or needs the whole process is a module, made with the process.
"""

import torch
from torch import nn

from ddpm.common import registry
from ddpm.diffusion import timesteps, weightings


class Objective(nn.Module):
    """Names become what is minimised: `loss` with its option, a weighting and a distribution of
    times; a checkpoint part.

    `loss` is one of LOSSES: the weighted mean squared error, that plus a share of the bound by
    which the variance learns (Nichol & Dhariwal 2021, eq. 16), or the bound. `weights` [T] are
    those of the error on the target, at first. Raises ValueError for unknown names and for what
    contradicts itself.
    """

    def __init__(
        self, process, target, loss="mse", weighting="simple", times="uniform", learned=False
    ):
        super().__init__()
        self.mse, self.bound = registry.resolve("loss", LOSSES, loss)()
        name = registry.parse(loss)[0]
        if learned and not self.bound:
            raise ValueError(
                "a learned variance learns nothing from the loss 'mse'; set diffusion.loss=hybrid "
                "or vlb, or diffusion.variance=small"
            )
        if name == "hybrid" and not learned:
            raise ValueError(
                "the loss 'hybrid' is for a learned variance; set diffusion.variance=learned, or "
                "diffusion.loss=mse"
            )
        if name == "vlb" and weighting != "simple":
            raise ValueError(
                "the loss 'vlb' has its own weights; set diffusion.weighting=simple, not "
                f"{weighting!r}, or diffusion.loss=mse"
            )
        self.weighting = made(
            registry.resolve("weighting", weightings.WEIGHTINGS, weighting), process
        )
        level = process.at(torch.arange(process.timesteps))
        self.weights = self.weighting(
            torch.ones(process.timesteps, dtype=torch.float64), level, target
        ).detach()
        if not (self.weights.isfinite() & (self.weights >= 0)).all():
            raise ValueError(
                f"weighting {weighting!r} has no finite weight of 0 or more at every noise level; "
                "choose other arguments, or none for the published ones"
            )
        self.times = made(registry.resolve("time distribution", timesteps.TIMES, times), process)

    def observe(self, t, losses):
        """Let the distribution of times learn from the losses [n] of a whole effective batch, in
        its order.
        """
        if self.watches:
            self.times.observe(t, losses)

    @property
    def watches(self):
        """Whether the distribution of times learns from losses."""
        return isinstance(self.times, nn.Module)


def made(chosen, process):
    """A function of a table as it is; a module made with the process."""
    return chosen(process) if isinstance(chosen.func, type) else chosen


def mse():
    """Shares of the squared error and of the bound."""
    return 1.0, 0.0


def hybrid(*, vlb_weight=0.001):
    """The same; the bound, as a sum over t, counts this much (Nichol & Dhariwal 2021, eq. 16)."""
    return 1.0, vlb_weight


def vlb():
    """The same."""
    return 0.0, 1.0


LOSSES = {
    "mse": mse,
    "hybrid": hybrid,
    "vlb": vlb,
}
