"""What is minimised: the loss, how it is weighted over noise levels, and how often each level is drawn.

    error, loss, weight [b] float32; t [b] int64; a level (t, alpha, sigma) of float64 [b, 1, 1, 1]
    weighting(error, level, target, *, knobs) -> loss [b], of the mean squared error on the target
    times(process, places, batch_size, u, *, knobs) -> (t, importance), for the images at `places` of an effective batch;
    u(indices) gives a number in [0, 1) for each index; importance is [b] or None, and what the loss is multiplied by

Weightings are published for errors on x0 or eps; `on_x0` brings them to the error on any target. Of those, `sigmoid` alone
has the factor -dlog(SNR)/dt of the bound, as in its papers. What has parameters, remembers losses or needs the whole process
is a module, made with the process.
"""

import math

import torch
from einops import rearrange
from torch import nn

from ddpm import spec


def simple(error, level, target):
    """The error on the target as it is (Ho et al. 2020, eq. 14)."""
    return error


def min_snr(error, level, target, *, gamma=5.0):
    """min(SNR, gamma) on x0 (Hang et al. 2023, eq. 8): no more to low noise than to SNR = gamma."""
    return on_x0(error, level, target, snr(level).clamp(max=gamma))


def soft_min_snr(error, level, target, *, gamma=5.0):
    """SNR gamma / (SNR + gamma) on x0, without the corner (Crowson et al. 2024, eq. 2)."""
    return on_x0(error, level, target, gamma * snr(level) / (snr(level) + gamma))


def p2(error, level, target, *, k=1.0, gamma=1.0):
    """(k + SNR)^-gamma on eps (Choi et al. 2022, eq. 8): less to low noise."""
    return on_x0(error, level, target, snr(level) * (k + snr(level)) ** -gamma)


class Sigmoid(nn.Module):
    """-dlog(SNR)/dt sigmoid(bias - log SNR) on eps (Kingma & Gao 2023, section 4; Hoogeboom et al. 2025, eq. 5).

    With uniform times each log-SNR then counts as much on every schedule. The derivative is divided by its mean over t, so
    that the loss keeps its scale; on the schedule `edm` it is 1.
    """

    def __init__(self, process, *, bias=2.0):
        super().__init__()
        self.bias = bias
        self.register_buffer("slope", log_snr_slope(process), persistent=False)  # which the schedule makes again

    def forward(self, error, level, target):
        return self.slope[level.t.long()].to(error.dtype) * sigmoid_eps(error, level, target, bias=self.bias)


def log_snr_slope(process):
    """-dlog(SNR)/dt over its mean, float64 [T]: central differences of the tables, one-sided at both ends.

    Pure noise, whose log-SNR is infinite, has 1: an error on eps weighs nothing there, whatever the slope.
    """
    log_snr = 2 * (process.alpha / process.sigma).log()
    slope, finite = torch.ones_like(log_snr), int((process.alpha > 0).sum())
    if finite > 1:
        difference = -torch.gradient(log_snr[:finite])[0]
        slope[:finite] = difference / difference.mean()
    return slope


def sigmoid_eps(error, level, target, *, bias=2.0):
    """sigmoid(bias - log SNR) on eps: `sigmoid` without the derivative of the log-SNR; with bias 0 it is p2."""
    return on_x0(error, level, target, snr(level) * torch.sigmoid(bias - snr(level).log()))


def edm(error, level, target, *, sigma_data=0.5):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0 (Karras et al. 2022, table 1); `simple` on the target `edm`."""
    return on_x0(error, level, target, snr(level) + 1 / sigma_data**2)


class Uncertainty(nn.Module):
    """error / e^u + u with u(log SNR) learned beside the network (Karras et al. 2024, EDM2, eq. 21): u tends to log(error).

    u is linear in `channels` random Fourier features, and 0 at first.
    """

    def __init__(self, process, *, channels=128):
        super().__init__()
        generator = torch.Generator().manual_seed(0)  # the same features in every run
        self.register_buffer("frequency", 2 * math.pi * torch.randn(channels, generator=generator))
        self.register_buffer("phase", 2 * math.pi * torch.rand(channels, generator=generator))
        self.u = nn.Linear(channels, 1)
        nn.init.zeros_(self.u.weight)
        nn.init.zeros_(self.u.bias)

    def forward(self, error, level, target):
        c_noise = (-0.125 * snr(level).log()).clamp(-10, 10).float()  # ln(sigma/alpha)/4, finite in pure noise
        features = torch.cos(rearrange(c_noise, "b -> b 1") * self.frequency + self.phase) * math.sqrt(2)
        u = rearrange(self.u(features), "b 1 -> b")
        return error / u.exp() + u


def snr(level):
    """alpha^2 / sigma^2, float64 [b]."""
    return ((level.alpha / level.sigma) ** 2).flatten()


def on_x0(error, level, target, weight):
    """The loss of an error on the target when `weight` [b] is that of the error on x0."""
    gain = target.gain(level.alpha, level.sigma)  # [b, 1, 1, 1], or a number that no level changes
    gain = gain.flatten() if isinstance(gain, torch.Tensor) else gain
    return (weight * gain**2).to(error.dtype) * error


def uniform(process, places, batch_size, u):
    """Every t as often (Ho et al. 2020, algorithm 1)."""
    return whole(process, u(places)), None


def stratified(process, places, batch_size, u):
    """One number for the batch, moved by 1/batch_size from image to image (Kingma et al. 2021, VDM, appendix I.1)."""
    return whole(process, (u([0]) + torch.tensor(places, dtype=torch.float64) / batch_size) % 1), None


def antithetic(process, places, batch_size, u):
    """In pairs, t and T - 1 - t (Song et al. 2021, DDIM, code)."""
    t = whole(process, u([place // 2 for place in places]))
    return torch.where(torch.tensor(places) % 2 == 1, process.timesteps - 1 - t, t), None


def logit_normal(process, places, batch_size, u, *, mean=0.0, std=1.0):
    """t/T the sigmoid of a normal number: the middle more often (Esser et al. 2024, eq. 19)."""
    return whole(process, torch.sigmoid(mean + std * torch.special.ndtri(u(places)))), None


def lognormal(process, places, batch_size, u, *, mean=-1.2, std=1.2):
    """The t whose ln(sigma/alpha) is nearest to a normal number (Karras et al. 2022, table 1: P_mean, P_std)."""
    noise = (process.sigma / process.alpha).log()
    middles = (noise[1:] + noise[:-1]) / 2
    return torch.searchsorted(middles, mean + std * torch.special.ndtri(u(places))), None


class Importance(nn.Module):
    """t as often as the root of its loss's second moment over the last `history` losses (Nichol & Dhariwal 2021, eq. 18).

    Every t is as likely until all have so many losses; then a share of `uniform` stays so. The loss is divided by how much
    more often its t comes, so that its mean stays the same.
    """

    def __init__(self, process, *, history=10, uniform=0.001):
        super().__init__()
        if history < 1 or not 0 < uniform <= 1:
            raise ValueError(f"importance(history={history}, uniform={uniform}) is out of range; give a history of 1 or "
                             "more, and uniform above 0, up to 1")
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(process.timesteps, history))
        self.register_buffer("counts", torch.zeros(process.timesteps, dtype=torch.int64))

    def forward(self, process, places, batch_size, u):
        """Return (t, importance), on the device of the losses: the host does not wait for it where u's numbers are there."""
        timesteps, history = self.losses.shape
        moments = self.losses.double().square().mean(1).sqrt()
        known = (self.counts >= history).all() & (moments.sum() > 0)
        share = torch.where(known, moments / moments.sum().clamp(min=1e-300), 1 / timesteps)
        share = (1 - self.uniform) * share + self.uniform / timesteps
        edges = share.cumsum(0)
        t = torch.searchsorted(edges, u(places).to(edges.device) * edges[-1], right=True).clamp(max=timesteps - 1)
        return t, (1 / (timesteps * share[t])).float()

    def observe(self, t, losses):
        """Remember the losses [n] of an effective batch, in its order; those that are not finite are passed over."""
        history = self.losses.shape[1]
        t, losses = t[order := torch.argsort(t, stable=True)], losses.detach()[order]
        good = losses.isfinite()
        earlier = (good.cumsum(0) - good.long())  # good ones before this one
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


class Objective(nn.Module):
    """Names become what is minimised: `loss` with its knob, a weighting and a distribution of times; a checkpoint part.

    `loss` is one of LOSSES: the weighted mean squared error, that plus a share of the bound by which the variance learns
    (Nichol & Dhariwal 2021, eq. 16), or the bound. `weights` [T] are those of the error on the target, at first.
    Raises ValueError for unknown names and for what contradicts itself.
    """

    def __init__(self, process, target, loss="mse", weighting="simple", times="uniform", learned=False):
        super().__init__()
        self.mse, self.bound = spec.choose("loss", LOSSES, loss)()
        name = spec.parse(loss)[0]
        if learned and not self.bound:
            raise ValueError("a learned variance learns nothing from the loss 'mse'; set diffusion.loss=hybrid or vlb, or "
                             "diffusion.variance=small")
        if name == "hybrid" and not learned:
            raise ValueError("the loss 'hybrid' is for a learned variance; set diffusion.variance=learned, or "
                             "diffusion.loss=mse")
        if name == "vlb" and weighting != "simple":
            raise ValueError(f"the loss 'vlb' has its own weights; set diffusion.weighting=simple, not {weighting!r}, or "
                             "diffusion.loss=mse")
        self.weighting = made(spec.choose("weighting", WEIGHTINGS, weighting), process)
        level = process.at(torch.arange(process.timesteps))
        self.weights = self.weighting(torch.ones(process.timesteps, dtype=torch.float64), level, target).detach()
        if not (self.weights.isfinite() & (self.weights >= 0)).all():
            raise ValueError(f"weighting {weighting!r} has no finite weight of 0 or more at every noise level; choose other "
                             "arguments, or none for the published ones")
        self.times = made(spec.choose("time distribution", TIMES, times), process)

    def observe(self, t, losses):
        """Let the distribution of times learn from the losses [n] of a whole effective batch, in its order."""
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

WEIGHTINGS = {
    "simple": simple,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "p2": p2,
    "sigmoid": Sigmoid,
    "sigmoid_eps": sigmoid_eps,
    "edm": edm,
    "uncertainty": Uncertainty,
}

TIMES = {
    "uniform": uniform,
    "stratified": stratified,
    "antithetic": antithetic,
    "logit_normal": logit_normal,
    "lognormal": lognormal,
    "importance": Importance,
}
