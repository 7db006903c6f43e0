"""How the loss counts at each timestep: functions of the signal-to-noise ratio, stated on x0 or
on eps.
"""

import math

import torch
from einops import rearrange
from torch import nn


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
    """-dlog(SNR)/dt sigmoid(bias - log SNR) on eps (Kingma & Gao 2023, section 4; Hoogeboom et al.
    2025, eq. 5).

    With uniform times each log-SNR then counts as much on every schedule. The derivative is divided
    by its mean over t, so that the loss keeps its scale; on the schedule `edm` it is 1.
    """

    def __init__(self, process, *, bias=2.0):
        super().__init__()
        self.bias = bias
        # which the schedule makes again
        self.register_buffer("slope", log_snr_slope(process), persistent=False)

    def forward(self, error, level, target):
        return self.slope[level.t.long()].to(error.dtype) * sigmoid_eps(
            error, level, target, bias=self.bias
        )


def log_snr_slope(process):
    """-dlog(SNR)/dt over its mean, float64 [T]: central differences of the tables, one-sided at
    both ends.

    Pure noise, whose log-SNR is infinite, has 1: an error on eps weighs nothing there, whatever the
    slope.
    """
    log_snr = 2 * (process.alpha / process.sigma).log()
    slope = torch.ones_like(log_snr)
    finite = int((process.alpha > 0).sum())
    if finite > 1:
        difference = -torch.gradient(log_snr[:finite])[0]
        slope[:finite] = difference / difference.mean()
    return slope


def sigmoid_eps(error, level, target, *, bias=2.0):
    """sigmoid(bias - log SNR) on eps: `sigmoid` without the derivative of the log-SNR; with bias
    0 it is p2.
    """
    return on_x0(error, level, target, snr(level) * torch.sigmoid(bias - snr(level).log()))


def edm(error, level, target, *, sigma_data=0.5):
    """(sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on x0 (Karras et al. 2022, table 1);
    `simple` on the target `edm`.
    """
    return on_x0(error, level, target, snr(level) + 1 / sigma_data**2)


class Uncertainty(nn.Module):
    """error / e^u + u with u(log SNR) learned beside the network (Karras et al. 2024, EDM2, eq.
    21): u tends to log(error).

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
        # ln(sigma/alpha)/4, finite in pure noise
        c_noise = (-0.125 * snr(level).log()).clamp(-10, 10).float()
        features = torch.cos(
            rearrange(c_noise, "b -> b 1") * self.frequency + self.phase
        ) * math.sqrt(2)
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
