"""How training draws the timesteps of a batch: functions of uniform numbers in [0, 1), one a
row.
"""

import torch
from torch import nn


def uniform(process, places, batch_size, u):
    """Every t as often (Ho et al. 2020, algorithm 1)."""
    return whole(process, u(places)), None


def stratified(process, places, batch_size, u):
    """One number for the batch, moved by 1/batch_size from image to image (Kingma et al. 2021,
    VDM, appendix I.1).
    """
    return whole(
        process, (u([0]) + torch.tensor(places, dtype=torch.float64) / batch_size) % 1
    ), None


def antithetic(process, places, batch_size, u):
    """In pairs, t and T - 1 - t (Song et al. 2021, DDIM, code)."""
    t = whole(process, u([place // 2 for place in places]))
    return torch.where(torch.tensor(places) % 2 == 1, process.timesteps - 1 - t, t), None


def logit_normal(process, places, batch_size, u, *, mean=0.0, std=1.0):
    """t/T the sigmoid of a normal number: the middle more often (Esser et al. 2024, eq. 19)."""
    return whole(process, torch.sigmoid(mean + std * torch.special.ndtri(u(places)))), None


def lognormal(process, places, batch_size, u, *, mean=-1.2, std=1.2):
    """The t whose ln(sigma/alpha) is nearest to a normal number (Karras et al. 2022, table 1:
    P_mean, P_std).
    """
    noise = (process.sigma / process.alpha).log()
    middles = (noise[1:] + noise[:-1]) / 2
    return torch.searchsorted(middles, mean + std * torch.special.ndtri(u(places))), None


class Importance(nn.Module):
    """t as often as the root of its loss's second moment over the last `history` losses (Nichol &
    Dhariwal 2021, eq. 18).

    Every t is as likely until all have so many losses; then a share of `uniform` stays so. The loss
    is divided by how much more often its t comes, so that its mean stays the same.
    """

    def __init__(self, process, *, history=10, uniform=0.001):
        super().__init__()
        if history < 1 or not 0 < uniform <= 1:
            raise ValueError(
                f"importance(history={history}, uniform={uniform}) is out of range; give a "
                "history of 1 or more, and uniform above 0, up to 1"
            )
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(process.timesteps, history))
        self.register_buffer("counts", torch.zeros(process.timesteps, dtype=torch.int64))

    def forward(self, process, places, batch_size, u):
        """Return (t, importance), on the device of the losses: the host does not wait for it
        where u's numbers are there.
        """
        timesteps, history = self.losses.shape
        moments = self.losses.double().square().mean(1).sqrt()
        known = (self.counts >= history).all() & (moments.sum() > 0)
        share = torch.where(known, moments / moments.sum().clamp(min=1e-300), 1 / timesteps)
        share = (1 - self.uniform) * share + self.uniform / timesteps
        edges = share.cumsum(0)
        t = torch.searchsorted(edges, u(places).to(edges.device) * edges[-1], right=True).clamp(
            max=timesteps - 1
        )
        return t, (1 / (timesteps * share[t])).float()

    def observe(self, t, losses):
        """Remember the losses [n] of an effective batch, in its order; those that are not finite
        are passed over.
        """
        history = self.losses.shape[1]
        t = t[order := torch.argsort(t, stable=True)]
        losses = losses.detach()[order]
        good = losses.isfinite()
        earlier = good.cumsum(0) - good.long()  # good ones before this one
        first = torch.searchsorted(t, t)  # where its t begins
        nth = earlier - earlier[first]
        last = torch.zeros_like(self.counts).index_add_(0, t, good.long())  # good ones of each t
        kept = good & (nth >= last[t] - history)  # the others are pushed out in the same step
        slot = (self.counts[t] + nth) % history
        # a loss that is not kept is written where it does no harm: behind the end
        flat = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        flat[torch.where(kept, t * history + slot, len(flat) - 1)] = losses.to(flat.dtype)
        self.losses.copy_(flat[:-1].view_as(self.losses))
        self.counts += last


def whole(process, u):
    """The t of numbers in [0, 1)."""
    return (u * process.timesteps).long().clamp(0, process.timesteps - 1)


TIMES = {
    "uniform": uniform,
    "stratified": stratified,
    "antithetic": antithetic,
    "logit_normal": logit_normal,
    "lognormal": lognormal,
    "importance": Importance,
}
