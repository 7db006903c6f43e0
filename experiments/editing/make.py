"""The figure of edits: `python experiments/editing/make.py RUN`, with a run on the 16x16 digits,
writes `edits.png`.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ddpm import data
from ddpm.common.pixels import make_grid
from ddpm.generate import edit_images

CELLS = 12  # a row
THREE = 13
EIGHT = 18  # among the digits


def main(run):
    """Make five rows of edits and save them as one picture, enlarged three times."""
    digits = data.open_source("digits", 16, 1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for k in (THREE, EIGHT):
            Image.fromarray(digits[k][0].numpy()).save(folder / f"{k}.png")
        mask = np.zeros((16, 16), dtype=np.uint8)
        mask[8:] = 255
        Image.fromarray(mask).save(folder / "mask.png")

        def results(edit, count, *images, **given):
            paths = edit_images(
                run,
                edit,
                [folder / f"{k}.png" for k in images],
                folder / "out",
                num_images=count,
                **given,
            )
            return [torch.from_numpy(np.array(Image.open(path)))[None] for path in paths[:count]]

        masked = digits[THREE].masked_fill(torch.from_numpy(mask > 0), 127)
        for resamplings in (1, 10):
            edit = f"inpaint(resamplings={resamplings})"
            rows += [
                digits[THREE],
                masked,
                *results(edit, CELLS - 2, THREE, mask=folder / "mask.png"),
            ]
        for strength in (0.5, 0.8):
            rows += [digits[THREE], *results(f"sdedit(strength={strength})", CELLS - 1, THREE)]
        deterministic = {"sample.sampler": "ddim", "sample.steps": 100}
        rows += [
            digits[THREE],
            *results("interpolate", CELLS - 2, THREE, EIGHT, **deterministic),
            digits[EIGHT],
        ]
        (rounded,) = results("invert", 1, THREE, **deterministic)
        print(
            "largest error of inversion and drawing:",
            (rounded.int() - digits[THREE].int()).abs().max().item(),
            "of 255",
        )
    picture = make_grid(torch.stack(rows), nrow=CELLS)[..., 0]
    height, width = picture.shape
    Image.fromarray(picture).resize((3 * width, 3 * height), Image.Resampling.NEAREST).save(
        Path(__file__).with_name("edits.png"), optimize=True
    )


if __name__ == "__main__":
    main(sys.argv[1])
