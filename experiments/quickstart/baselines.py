"""What the quickstart's distance is worth: the same measure on noise, on the untrained network and
of a perfect generator.

python experiments/quickstart/baselines.py        about a minute on two CPU cores
"""

import importlib.util
from pathlib import Path

import numpy as np
import torch

from ddpm.common import rng
from ddpm.config.defaults import freeze
from ddpm.experiment import build, drawing
from ddpm.runtime import device

HERE = Path(__file__).parent
RECIPE = importlib.util.spec_from_file_location("digits", HERE.parents[1] / "configs" / "digits.py")


def noise(seeds, recipe):
    """Images of uniform noise, drawn as the scorer asks."""
    for seed in seeds:
        yield (
            [seed],
            torch.from_numpy(
                rng.generator(0, "baseline", 0, seed).integers(
                    0, 256, (1, 1, 16, 16), dtype=np.uint8
                )
            ),
        )


def main():
    module = importlib.util.module_from_spec(RECIPE)
    RECIPE.loader.exec_module(module)
    config = freeze(module.get_config())
    machine = device.start()
    measure = drawing.scorer(config, build.dataset(config), machine)
    mean, deviation = measure.perfect.values()
    print(f"perfect generator    eval/fd_digits {mean:.4f} ± {deviation:.4f}", flush=True)
    for name, draw in (
        ("uniform noise", noise),
        ("untrained network", drawing.drawer(config, build.network(config), machine)),
    ):
        numbers, _ = measure(draw)
        print(
            f"{name:20} eval/fd_digits {numbers['eval/fd_digits']:.2f}   {numbers['eval/protocol']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
