"""Draw images from a checkpoint: `python -m ddpm.generate --checkpoint=RUN_OR_FILE --num_images=16 --out=DIR --format=png`.

Image k begins at noise that depends on (seed, k) alone. Network and sampler are those of the checkpoint's own config.
"""

import sys
from pathlib import Path

from absl import flags
from tqdm import tqdm

from ddpm import build, command, draw
from ddpm.files import make_folder
from ddpm.images import FORMATS
from ddpm.spec import check_choice


def generate_images(checkpoint_path, num_images, output_dir, device=None, format="png", **knobs):
    """Draw `num_images` images from a run folder or checkpoint file into `output_dir`; returns the paths written.

    `format` is one of FORMATS; `knobs` as in `{"sample.steps": 25}` take the place of the checkpoint's own. Raises ValueError,
    one line, for a missing or damaged checkpoint and for options that cannot be.
    """
    write = FORMATS[check_choice("format", format, list(FORMATS))]
    if num_images < 1:
        raise ValueError(f"num_images is {num_images}; give 1 or more")
    name, _, trained, machine, net = build.load(checkpoint_path, device, **knobs)
    make_folder(output_dir)
    recipe = build.grid_recipe(trained)
    times = build.evaluations(trained, recipe)
    print("\n".join([f"drawing {num_images} images from {name}: {recipe}; {times} network evaluations an image",
                     *build.remarks(trained, "sample")]))
    film = format == "gif"  # a picture a step, of all images at once
    drawn = build.drawer(trained, net, machine, draw.frames if film else draw.draw)(range(num_images), recipe)
    total, unit = (recipe.steps + 1, "step") if film else (num_images, "image")
    with tqdm(total=total, unit=unit, leave=False, disable=not sys.stderr.isatty()) as bar:
        return write(Path(output_dir), shown(drawn, bar, by_image=not film))


def shown(batches, bar, by_image):
    """The same batches, counted on a progress bar."""
    for seeds, pixels in batches:
        yield seeds, pixels
        bar.update(len(seeds) if by_image else 1)


def main():
    """Draw what the flags say; returns the exit code."""
    given = flags.FLAGS
    paths = generate_images(given.checkpoint, given.num_images, given.out, given.device, given.format,
                            **command.sample_knobs("sample"))
    print(f"wrote {paths[0]}" + (f" to {paths[-1]}" if len(paths) > 1 else ""))
    return command.DONE


if __name__ == "__main__":
    command.define_checkpoint_flags()
    flags.DEFINE_integer("num_images", 16, "How many images.", lower_bound=1)
    flags.DEFINE_string("out", "samples", "Folder for the images.")
    flags.DEFINE_string("format", "png", f"One of {', '.join(FORMATS)}; gif shows how the images come out of the noise.")
    flags.adopt_module_key_flags(command)
    command.run_door(main)
