"""The interfaces of CONTRIBUTING.md next to those who provide and use them; mypy checks this file.

Nothing here runs: an assignment states that its right side has the type on the left.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from ddpm.data.source import Source
from ddpm.diffusion import samplers, schedules
from ddpm.diffusion.denoiser import Denoiser, Guidance, Network, denoiser, unconditional
from ddpm.diffusion.process import Level, Levels, Process, initial_noise
from ddpm.diffusion.samplers import Sampler
from ddpm.diffusion.schedules import Schedule, get_schedule
from ddpm.models.dit import DiT
from ddpm.models.unet import UNet
from ddpm.models.unet_edm2 import UNetEDM2
from ddpm.tracking.tracker import Tracker


def schedule() -> Process:
    cosine: Schedule = schedules.cosine
    alpha, sigma = cosine(1000)
    alpha, sigma = get_schedule("cosine", 1000)
    return Process(alpha, sigma)


def networks(unet: UNet, edm2: UNetEDM2, dit: DiT) -> list[Network]:
    return [unet.forward, edm2.forward, dit.forward, unconditional(unet.forward)]


def denoisers(net: Network, x: torch.Tensor, level: Level) -> Denoiser:
    guidance = Guidance(unconditional(net), 2.0)
    denoise: Denoiser = denoiser(net, predict="v", clip=True, guidance=guidance)
    x0, eps, *_ = denoise(x, level)
    return denoise


def sampling(
    denoise: Denoiser, process: Process, noise: Callable[[int], torch.Tensor]
) -> Iterator[torch.Tensor]:
    ddim: Sampler = samplers.ddim
    levels: Levels = process.levels(50)
    return ddim(denoise, initial_noise(levels[0], noise(0)), levels, noise)


def source(images: Source, indices: np.ndarray) -> torch.Tensor:
    image: torch.Tensor = images[0]
    batch: torch.Tensor = images.batch(indices)
    return image if len(images) == 1 else batch


def tracking(tracker: Tracker, picture: np.ndarray) -> None:
    tracker.log(1, {"train/loss": 0.5}, {"samples": picture})
    tracker.close()
