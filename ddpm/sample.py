"""Draw one grid, for a quick look: `python -m ddpm.sample --checkpoint=RUN_OR_FILE
--out=grid.png --num_images=64`.
"""

# ruff: noqa: E402
# The command line is read above the imports of torch, which take a second.

from absl import flags

from ddpm.config import flags as config_flags

if __name__ == "__main__":
    config_flags.define_checkpoint_flags("sample")
    flags.DEFINE_integer("num_images", 16, "How many images.", lower_bound=1)
    flags.DEFINE_alias("num_samples", "num_images")
    flags.DEFINE_string("out", "samples.png", "The picture: png, jpg or webp.")
    flags.adopt_module_key_flags(config_flags)
    config_flags.read_command_line()

from pathlib import Path

from ddpm.common import errors
from ddpm.common import pixels as common_pixels
from ddpm.common.registry import quantity
from ddpm.experiment import build, cost, drawing, load
from ddpm.sampling.draw import concatenate, gathered


@config_flags.also_called(
    checkpoint_path="checkpoint", ckpt_path="checkpoint", out_path="out", num_samples="num_images"
)
def sample_from_checkpoint(
    checkpoint=None, out="samples.png", num_images=16, device=None, **options
):
    """Draw a grid from a run folder or checkpoint file, by default the newest run of runs/, into
    the picture `out`; returns [its path].

    `options` are the flags of `python -m ddpm.sample`, `steps=25`, or any option,
    `**{"diffusion.clip": False}`. Raises ValueError for a missing or damaged checkpoint, options
    that cannot be, and an unknown picture format.
    """
    common_pixels.check_picture(out)
    config_flags.check_count(num_images)
    options = config_flags.options(options, "sample")
    name, _, trained, machine, net = load.load(checkpoint, device, **options)
    recipe = build.grid_recipe(trained)
    times = f"{cost.count_nfe(trained, recipe)} network evaluations an image"
    print(f"drawing {quantity(num_images, 'image')} from {name}: {recipe}; {times}", flush=True)
    pixels = concatenate(drawing.drawer(trained, net, machine, gathered)(range(num_images), recipe))
    if machine.main:
        common_pixels.save_image_grid(pixels, out)
    return [Path(out)]


def main():
    """Draw what the flags say; returns the exit code."""
    given = flags.FLAGS
    (path,) = sample_from_checkpoint(
        given.checkpoint, given.out, given.num_images, given.device, **config_flags.drawing()
    )
    print(f"wrote {path}")
    return errors.DONE


if __name__ == "__main__":
    config_flags.run_command(main)
