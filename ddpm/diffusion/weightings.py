"""Loss weightings: functions of the signal-to-noise ratio SNR = alpha^2 / sigma^2.

    weighting(error, level, target, *, options) -> loss [b]; error [b], the mean squared error on
    the target; level (t, alpha, sigma) of float64 [b, 1, 1, 1]

Papers state weights for the error on x0 or on eps; `on_x0` converts them to the error on any
target. Only `sigmoid` has the factor -dlog(SNR)/dt of the variational bound, as its papers do.
"""

import math

import torch
from einops import rearrange
from torch import nn


def simple(error, level, target):
    """Weight 1 on the target (Ho et al. 2020, eq. 14)."""
    return error


def min_snr(error, level, target, *, gamma=5.0):
    """min(SNR, gamma) on x0 (Hang et al. 2023, eq. 8): low noise weighs as much as SNR = gamma."""
    return on_x0(error, level, target, snr(level).clamp(max=gamma))


def soft_min_snr(error, level, target, *, gamma=5.0):
    """SNR gamma / (SNR + gamma) on x0, a smooth `min_snr` (Crowson et al. 2024, eq. 2)."""
    return on_x0(error, level, target, gamma * snr(level) / (snr(level) + gamma))


def p2(error, level, target, *, k=1.0, gamma=1.0):
    """(k + SNR)^-gamma on eps, smaller at low noise (Choi et al. 2022, eq. 8)."""
    return on_x0(error, level, target, snr(level) * (k + snr(level)) ** -gamma)


class Sigmoid(nn.Module):
    """-dlog(SNR)/dt sigmoid(bias - log SNR) on eps (Kingma & Gao 2023, section 4).

    With uniform times each log-SNR counts equally on every schedule (Hoogeboom et al. 2025, eq. 5).
    The derivative is divided by its mean over t, so that the loss keeps its scale; on the schedule
    `edm` it is 1.
    """

    def __init__(self, process, *, bias=2.0):
        super().__init__()
        self.bias = bias
        # not saved: it follows from the schedule
        self.register_buffer("slope", log_snr_slope(process), persistent=False)

    def forward(self, error, level, target):
        return self.slope[level.t.long()].to(error.dtype) * sigmoid_eps(
            error, level, target, bias=self.bias
        )


def log_snr_slope(process):
    """Return -dlog(SNR)/dt over its mean, float64 [T]; 1 in pure noise, whose weight is 0."""
    log_snr = 2 * (process.alpha / process.sigma).log()
    slope = torch.ones_like(log_snr)
    finite = int((process.alpha > 0).sum())
    if finite > 1:
        difference = -torch.gradient(log_snr[:finite])[0]
        slope[:finite] = difference / difference.mean()
    return slope


def sigmoid_eps(error, level, target, *, bias=2.0):
    """sigmoid(bias - log SNR) on eps: `sigmoid` without the derivative; with bias 0 it is `p2`."""
    return on_x0(error, level, target, snr(level) * torch.sigmoid(bias - snr(level).log()))


def edm(error, level, target, *, sigma_data=0.5):
    """SNR + 1 / sigma_data^2 on x0 (Karras et al. 2022, table 1); on the target `edm`, `simple`."""
    return on_x0(error, level, target, snr(level) + 1 / sigma_data**2)


class Uncertainty(nn.Module):
    """error / e^u + u with a learned u(log SNR), which tends to log(error) (EDM2, eq. 21).

    u is linear in `channels` random Fourier features of log SNR, and initially 0.
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
        angles = rearrange(c_noise, "b -> b 1") * self.frequency + self.phase
        features = torch.cos(angles) * math.sqrt(2)
        u = rearrange(self.u(features), "b 1 -> b")
        return error / u.exp() + u


def snr(level):
    """Return alpha^2 / sigma^2, float64 [b]."""
    return ((level.alpha / level.sigma) ** 2).flatten()


def on_x0(error, level, target, weight):
    """Return the loss [b] from the error [b] on the target, for `weight` [b] on x0's error."""
    gain = target.gain(level.alpha, level.sigma)  # [b, 1, 1, 1], or a constant
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
