"""Exact denoisers and flows of Gaussians and mixtures, to hold samplers against."""

import math

import torch
from torch import nn

from ddpm.common import registry
from ddpm.diffusion.process import Process
from ddpm.diffusion.samplers import SAMPLERS
from ddpm.diffusion.schedules import get_schedule

SHAPE = (2, 3, 4, 4)
# as diffusers has them: off by 1e-6 to 3e-4 over 10 to 1000 steps; twice that
FLOAT32_TABLES = 6e-4
MEAN = 0.4
SPREAD = 0.3  # the Gaussian whose exact denoiser `gaussian` is


def process(name="linear", timesteps=1000):
    return Process(*get_schedule(name, timesteps))


def noises(shape=SHAPE, dtype=torch.float64):
    """The same noise for the same step, whoever asks."""
    return lambda k: torch.randn(shape, generator=torch.Generator().manual_seed(k), dtype=dtype)


def gaussian(x, level):
    """The best denoiser for data ~ N(MEAN, SPREAD^2): E[x0 | x], from the joint Gaussian of x0
    and x.
    """
    total = (level.alpha * SPREAD) ** 2 + level.sigma**2
    x0 = MEAN + level.alpha * SPREAD**2 / total * (x - level.alpha * MEAN)
    return x0, (x - level.alpha * x0) / level.sigma


class Tiny(nn.Module):
    """A fixed random network that knows its time, answering about one in size."""

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
    """The probability flow of N(MEAN, SPREAD^2), exact: it keeps x at its quantile from level to
    level.
    """

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
    """The linear schedule shifted and scaled to end in pure noise (Lin et al. 2024, algorithm
    1).
    """
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
    """The best denoiser for data that are -0.6 (spread 0.2) with probability 0.3, else 0.5
    (spread 0.1).
    """
    parts = []
    for weight, mean, spread in ((0.3, -0.6, 0.2), (0.7, 0.5, 0.1)):
        total = (level.alpha * spread) ** 2 + level.sigma**2
        rest = x - level.alpha * mean
        parts.append(
            (
                weight * torch.exp(-(rest**2) / (2 * total)) / math.sqrt(total),
                mean + level.alpha * spread**2 / total * rest,
            )
        )
    x0 = sum(likely * mean for likely, mean in parts) / sum(likely for likely, _ in parts)
    return x0, (x - level.alpha * x0) / level.sigma
