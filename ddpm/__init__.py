"""A research workbench for denoising diffusion models of images: train, draw, measure and compare.

The program `ddpm`, or `python -m ddpm`, lists the commands; each is a module too. From Python,
`ddpm.main.train_experiment` trains, `ddpm.generate.generate_images` and `edit_images` draw,
`ddpm.evaluate.evaluate` measures, and `ddpm.compare.compare` compares.
"""

import importlib
import sys

__version__ = "0.2.0"

PUBLIC = {  # imported when first used: torch takes seconds
    "UNet": "ddpm.models.unet",
    "UNetEDM2": "ddpm.models.unet_edm2",
    "DiT": "ddpm.models.dit",
    "DDPM": "ddpm.diffusion.ddpm",
    "get_beta_schedule": "ddpm.diffusion.schedules",
    "EMA": "ddpm.training.ema",
    "ImageDataset": "ddpm.data",
    "denormalize": "ddpm.common.pixels",
    "save_image_grid": "ddpm.common.pixels",
    "train_experiment": "ddpm.main",
    "generate_images": "ddpm.generate",
    "edit_images": "ddpm.generate",
    "sample_from_checkpoint": "ddpm.sample",
}


def __getattr__(name):
    if name not in PUBLIC:
        raise AttributeError(f"module 'ddpm' has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__():
    return [*globals(), *PUBLIC]


# `python -m ddpm.X`, which imports torch next: Ctrl-C ends it with one line, not a traceback
if sys.argv[0] == "-m":
    from ddpm.runtime import signals

    signals.handle(signals.end_before_start)
