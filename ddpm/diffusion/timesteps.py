"""Distributions of the timesteps that training draws.

times(process, positions, batch_size, u, *, options) -> (t, importance)
positions: which images of the effective batch; u(indices) -> float64 in [0, 1), one per index
t int64 [b] in 0 .. T-1; importance: factors [b] of the losses, or None
"""

import torch
from torch import nn


def uniform(process, positions, batch_size, u):
    """Every t equally often (Ho et al. 2020, algorithm 1)."""
    return to_timestep(process, u(positions)), None


def stratified(process, positions, batch_size, u):
    """One offset plus position/batch_size (Kingma et al. 2021, VDM, appendix I.1)."""
    fractions = torch.tensor(positions, dtype=torch.float64) / batch_size
    return to_timestep(process, (u([0]) + fractions) % 1), None


def antithetic(process, positions, batch_size, u):
    """Pairs of t and T - 1 - t (Song et al. 2021, DDIM, code)."""
    t = to_timestep(process, u([position // 2 for position in positions]))
    return torch.where(torch.tensor(positions) % 2 == 1, process.timesteps - 1 - t, t), None


def logit_normal(process, positions, batch_size, u, *, mean=0.0, std=1.0):
    """t/T = sigmoid(N(mean, std^2)), most often in the middle (Esser et al. 2024, eq. 19)."""
    return to_timestep(process, torch.sigmoid(mean + std * torch.special.ndtri(u(positions)))), None


def lognormal(process, positions, batch_size, u, *, mean=-1.2, std=1.2):
    """The t with ln(sigma/alpha) nearest to N(mean, std^2) (Karras et al. 2022, table 1)."""
    noise = (process.sigma / process.alpha).log()
    midpoints = (noise[1:] + noise[:-1]) / 2
    return torch.searchsorted(midpoints, mean + std * torch.special.ndtri(u(positions))), None


class Importance(nn.Module):
    """t in proportion to the root mean square of its losses (Nichol & Dhariwal 2021, eq. 18).

    Counts the last `history` losses of each t. Uniform until every t has that many, then mixed with
    a share `uniform` of the uniform distribution. Importance factors keep the mean of the loss
    unbiased. Raises ValueError for options out of range.
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

    def forward(self, process, positions, batch_size, u):
        """Return (t, importance) on the losses' device, without a host wait if u is there too."""
        timesteps, history = self.losses.shape
        moments = self.losses.double().square().mean(1).sqrt()
        known = (self.counts >= history).all() & (moments.sum() > 0)
        share = torch.where(known, moments / moments.sum().clamp(min=1e-300), 1 / timesteps)
        share = (1 - self.uniform) * share + self.uniform / timesteps
        edges = share.cumsum(0)
        points = u(positions).to(edges.device) * edges[-1]
        t = torch.searchsorted(edges, points, right=True).clamp(max=timesteps - 1)
        return t, (1 / (timesteps * share[t])).float()

    def observe(self, t, losses):
        """Store the finite losses [n] of an effective batch at times t [n], in batch order."""
        history = self.losses.shape[1]
        order = torch.argsort(t, stable=True)
        t = t[order]
        losses = losses.detach()[order]
        finite = losses.isfinite()
        earlier = finite.cumsum(0) - finite.long()  # finite losses before this one
        first = torch.searchsorted(t, t)  # index of the first loss with the same t
        nth = earlier - earlier[first]
        new = torch.zeros_like(self.counts).index_add_(0, t, finite.long())
        stored = finite & (nth >= new[t] - history)  # later losses of this batch replace the others
        slot = (self.counts[t] + nth) % history
        # a loss that is not stored goes to an extra element at the end, which is dropped
        flat = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        flat[torch.where(stored, t * history + slot, len(flat) - 1)] = losses.to(flat.dtype)
        self.losses.copy_(flat[:-1].view_as(self.losses))
        self.counts += new


def to_timestep(process, u):
    """Return the timesteps of numbers u in [0, 1), int64."""
    return (u * process.timesteps).long().clamp(0, process.timesteps - 1)


TIMES = {
    "uniform": uniform,
    "stratified": stratified,
    "antithetic": antithetic,
    "logit_normal": logit_normal,
    "lognormal": lognormal,
    "importance": Importance,
}
