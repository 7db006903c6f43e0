"""Draw images from a checkpoint: `python -m ddpm.generate --checkpoint=RUN_OR_FILE --num_images=16 --out=DIR --format=png`.

Image k begins at noise that depends on (seed, k) alone. Network and sampler are those of the checkpoint's own config.
With `--edit=inpaint --image=PATH --mask=PATH`, or another of EDITS, it edits pictures of your own.
"""

import sys
from functools import partial
from pathlib import Path

import torch
from absl import flags
from tqdm import tqdm

from ddpm import build, command, draw
from ddpm.diffusion.editing import EDITS, get_edit
from ddpm.files import make_folder
from ddpm.images import FORMATS, save_image_grid
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
    recipe, film = build.grid_recipe(trained), format == "gif"  # a picture a step, of all images at once
    times = build.evaluations(trained, recipe)
    drawn = build.drawer(trained, net, machine, draw.frames if film else draw.draw)(range(num_images), recipe)
    make_folder(output_dir)
    print("\n".join([f"drawing {num_images} images from {name}: {recipe}; {times} network evaluations an image",
                     *build.remarks(trained, "sample")]))
    with progress(recipe.steps + 1 if film else num_images, film) as bar:
        return write(Path(output_dir), shown(drawn, bar, by_image=not film))


def edit_images(checkpoint_path, edit, images, output_dir, mask=None, num_images=None, device=None, format="png", **knobs):
    """Edit pictures by a run folder or checkpoint file into `output_dir`; returns the paths written.

    `edit` names an entry of EDITS, `"inpaint"` or `"sdedit(strength=0.6)"`; `images` is the path of a picture, or a list of as
    many as it takes, `mask` that of a picture that is white where `inpaint` paints anew. There are `num_images` results, 16 by
    default, and a `grid.png` of them with what was given. The rest is as for `generate_images`. Raises ValueError, one line,
    also for pictures that cannot be used and for a sampler that cannot make the edit.
    """
    write, made = FORMATS[check_choice("format", format, list(FORMATS))], get_edit(edit)
    paths = [images] if isinstance(images, (str, Path)) else list(images)
    count = edit_count(edit, made, paths, mask, num_images)
    name, _, trained, machine, net = build.load(checkpoint_path, device, **knobs)
    pictures, area = build.pictures(trained, paths, mask)
    recipe = build.edit_recipe(trained)
    times = build.evaluations(trained, recipe, made)
    make_folder(output_dir)
    print("\n".join([f"{edit}: {count} image{'s' * (count > 1)} from {name}: {recipe}; {times} network evaluations an image",
                     *build.remarks(trained, "sample")]))
    film, results = format == "gif", []
    how = partial(draw.frames if film else draw.draw, walk=draw.edited(made, pictures, area, count, machine))
    with progress(None if film else count, film) as bar:
        batches = shown(build.drawer(trained, net, machine, how)(range(count), recipe), bar, by_image=not film)
        written = write(Path(output_dir), remembered(batches, results))
    first, *others = pictures
    hidden = [] if area is None else [first.masked_fill(area, 127)]
    cells = [first, *hidden, *draw.joined(results[-1:] if film else results), *others]
    grid = Path(output_dir) / "grid.png"
    save_image_grid(torch.stack(cells), grid, nrow=len(cells) if others else None)  # between two images: in a row
    return list(dict.fromkeys([*written, grid]))


def edit_count(edit, made, paths, mask, num_images):
    """How many results an edit makes; raises ValueError where it takes other pictures than it was given, or another number."""
    if len(paths) != made.images:
        raise ValueError(f"edit {edit!r} takes {made.images} image{'s' * (made.images > 1)}, not {len(paths)}; write "
                         f"{' '.join(['--image=PATH'] * made.images)}")
    if made.mask and mask is None:
        raise ValueError(f"edit {edit!r} takes a mask; write --mask=PATH, a picture, white where painted anew")
    if mask is not None and not made.mask:
        raise ValueError(f"edit {edit!r} takes no mask; leave out --mask, or write --edit=inpaint")
    if made.single and num_images not in (None, 1):
        raise ValueError(f"edit {edit!r} makes one image; leave out --num_images")
    if num_images is not None and num_images < 1:
        raise ValueError(f"num_images is {num_images}; give 1 or more")
    return 1 if made.single else num_images or 16


def progress(total, film):
    """A progress bar of images, or of a film's steps; `total` is None where it is not known."""
    return tqdm(total=total, unit="step" if film else "image", leave=False, disable=not sys.stderr.isatty())


def remembered(batches, kept):
    """The same batches, which are also put into the list `kept`."""
    for batch in batches:
        kept.append(batch)
        yield batch


def shown(batches, bar, by_image):
    """The same batches, counted on a progress bar."""
    for seeds, pixels in batches:
        yield seeds, pixels
        bar.update(len(seeds) if by_image else 1)


def main():
    """Draw what the flags say; returns the exit code."""
    given, knobs = flags.FLAGS, command.sample_knobs("sample")
    if given.edit:
        paths = edit_images(given.checkpoint, given.edit, given.image, given.out, given.mask, given.num_images, given.device,
                            given.format, **knobs)
    elif given.image or given.mask:
        raise ValueError(f"--image and --mask are for an edit; write --edit= and one of {', '.join(EDITS)}")
    else:
        paths = generate_images(given.checkpoint, given.num_images or 16, given.out, given.device, given.format, **knobs)
    print(f"wrote {paths[0]}" + (f" to {paths[-1]}" if len(paths) > 1 else ""))
    return command.DONE


if __name__ == "__main__":
    command.define_checkpoint_flags()
    flags.DEFINE_integer("num_images", None, "How many images; by default 16.", lower_bound=1)
    flags.DEFINE_string("out", "samples", "Folder for the images.")
    flags.DEFINE_string("format", "png", f"One of {', '.join(FORMATS)}; gif shows how the images come out of the noise.")
    flags.DEFINE_string("edit", None, "inpaint(resamplings=10), sdedit(strength=0.6), invert or interpolate, of an --image.")
    flags.DEFINE_multi_string("image", [], "Picture to edit; given twice to interpolate.")
    flags.DEFINE_string("mask", None, "Picture for inpaint, white where the image is painted anew.")
    flags.adopt_module_key_flags(command)
    command.run_door(main)
