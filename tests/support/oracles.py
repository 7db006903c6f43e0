"""Exact denoisers and flows of Gaussians and mixtures, references for the samplers."""

import math

import torch
from torch import nn

from ddpm.common import registry
from ddpm.diffusion.process import Process
from ddpm.diffusion.samplers import SAMPLERS
from ddpm.diffusion.schedules import get_schedule

SHAPE = (2, 3, 4, 4)
# tolerance: diffusers' float32 tables are off by 1e-6 to 3e-4 over 10 to 1000 steps; twice that
FLOAT32_TABLES = 6e-4
MEAN = 0.4
SPREAD = 0.3  # mean and standard deviation of the data of `gaussian`


def process(name="linear", timesteps=1000):
    return Process(*get_schedule(name, timesteps))


def noises(shape=SHAPE, dtype=torch.float64):
    """Return noise(k), which gives the same noise for the same step in every call."""
    return lambda k: torch.randn(shape, generator=torch.Generator().manual_seed(k), dtype=dtype)


def gaussian(x, level):
    """Return E[x0 | x] and eps for data ~ N(MEAN, SPREAD^2): the optimal denoiser, exact."""
    total = (level.alpha * SPREAD) ** 2 + level.sigma**2
    x0 = MEAN + level.alpha * SPREAD**2 / total * (x - level.alpha * MEAN)
    return x0, (x - level.alpha * x0) / level.sigma


class Tiny(nn.Module):
    """A fixed random network of x and t, with outputs of about unit size."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer(
            "weight", torch.randn(3, 3, 3, 3, generator=generator, dtype=torch.float64) / 4
        )

    def forward(self, x, t, y=None):
        phase = torch.cos(t.double() / 100).reshape(-1, 1, 1, 1)
        return torch.tanh(nn.functional.conv2d(x, self.weight, padding=1) + phase)


def last(walk):
    *_, x = walk
    return x


def flow_to(x, start, end):
    """Move x from level `start` to `end` on the exact probability flow of N(MEAN, SPREAD^2)."""

    def spread(level):
        return math.hypot(level.alpha * SPREAD, level.sigma)

    return end.alpha * MEAN + spread(end) / spread(start) * (x - start.alpha * MEAN)


VARIANTS = [
    *SAMPLERS,
    "heun(churn=40.0)",
    "dpmpp(order=1)",
    "dpmpp(order=3)",
    "dpmpp_sde(eta=0.5, order=3)",
    "unipc(order=3)",
]


def sampler(text):
    return registry.resolve("sampler", SAMPLERS, text)


def pure(timesteps):
    """Return the linear schedule rescaled to end in pure noise (Lin et al. 2024, algorithm 1)."""
    alpha = process("linear", timesteps).alpha
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    return Process(alpha, (1 - alpha**2).sqrt())


def straight(timesteps):
    """Rectified flow: alpha = 1 - sigma, down to pure noise."""
    sigma = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    return Process(1 - sigma, sigma)


def exploding(timesteps):
    """EDM: alpha = 1, and sigma from 0.002 to 80."""
    sigma = torch.linspace(math.log(0.002), math.log(80), timesteps, dtype=torch.float64).exp()
    return Process(torch.ones_like(sigma), sigma)


PATHS = {
    "linear": lambda timesteps: process("linear", timesteps),
    "pure": pure,
    "straight": straight,
    "exploding": exploding,
}


def mixture(x, level):
    """Return E[x0 | x] and eps for 0.3 N(-0.6, 0.2^2) + 0.7 N(0.5, 0.1^2), exact."""
    total_density = 0
    weighted = 0
    for weight, mean, spread in ((0.3, -0.6, 0.2), (0.7, 0.5, 0.1)):
        variance = (level.alpha * spread) ** 2 + level.sigma**2
        distance = x - level.alpha * mean
        density = weight * torch.exp(-(distance**2) / (2 * variance)) / math.sqrt(variance)
        weighted = weighted + density * (mean + level.alpha * spread**2 / variance * distance)
        total_density = total_density + density
    x0 = weighted / total_density
    return x0, (x - level.alpha * x0) / level.sigma
