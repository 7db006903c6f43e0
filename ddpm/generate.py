"""Draw images from a checkpoint: `python -m ddpm.generate --checkpoint=RUN_OR_FILE --num_images=16
--out=DIR --format=png`.

Image k begins at noise that depends on (seed, k) alone. Network and sampler are those of the
checkpoint's own config. With `--edit=inpaint --image=PATH --mask=PATH`, or another of EDITS, it
edits pictures of your own.
"""

# ruff: noqa: E402
# The command line is read above the imports of torch, which take a second.

from absl import flags

from ddpm.config import flags as config_flags

if __name__ == "__main__":
    config_flags.define_checkpoint_flags("sample")
    flags.DEFINE_integer("num_images", None, "How many images; by default 16.", lower_bound=1)
    flags.DEFINE_alias("num_samples", "num_images")
    flags.DEFINE_string(
        "out", "samples", "Folder for the images, or the one file of a grid, npz, zip or gif."
    )
    HELP = "One of png, jpg, webp, grid, npz, zip, gif; gif shows how images come out of the noise."
    flags.DEFINE_string("format", "png", HELP)
    HELP = "inpaint(resamplings=10), sdedit(strength=0.6), invert or interpolate, of an --image."
    flags.DEFINE_string("edit", None, HELP)
    flags.DEFINE_multi_string("image", [], "Picture to edit; given twice to interpolate.")
    HELP = "Picture for inpaint: white where it paints again, black or transparent elsewhere."
    flags.DEFINE_string("mask", None, HELP)
    flags.adopt_module_key_flags(config_flags)
    config_flags.read_command_line()

import itertools
from collections import deque
from functools import partial
from pathlib import Path

import torch

from ddpm.common import errors, pixels
from ddpm.common.files import make_folder
from ddpm.common.pixels import SINGLE
from ddpm.common.registry import check_choice, quantity
from ddpm.diffusion.editing import EDITS, get_edit
from ddpm.experiment import build, cost, drawing, load, remarks
from ddpm.sampling import draw
from ddpm.sampling.formats import FORMATS


@config_flags.also_called(checkpoint_path="checkpoint", output_dir="out", num_samples="num_images")
def generate_images(
    checkpoint=None, num_images=16, out="samples", device=None, format="png", **options
):
    """Draw images from a run folder or checkpoint file, by default the newest run of runs/, into
    the folder `out`; returns the paths written.

    `format` is one of FORMATS; `out` may also name the one file that it makes, such as a grid's.
    `options` are the flags of `python -m ddpm.generate`, `steps=25`, or any option,
    `**{"diffusion.clip": False}`. Removes numbered pictures of an earlier drawing. Raises
    ValueError for a missing or damaged checkpoint, options that cannot be, and a folder with
    numbered pictures that no drawing wrote.
    """
    write = FORMATS[check_choice("format", format, list(FORMATS))]
    config_flags.check_count(num_images)
    folder = pixels.folder_of(out, format)
    options = config_flags.options(options, "sample")
    name, _, trained, machine, net = load.load(checkpoint, device, **options)
    recipe = build.grid_recipe(trained)
    times = cost.count_nfe(trained, recipe)
    how = draw.gathered if format in SINGLE else draw.draw
    if format == "gif":
        how = draw.frames  # a picture a step, of all images at once
    drawn = drawing.drawer(trained, net, machine, how)(range(num_images), recipe)
    make_place(out, folder, format, machine)
    say(f"drawing {quantity(num_images, 'image')} from {name}", trained, recipe, times)
    return written(write, out, drawn, format, num_images, machine, alone=format in SINGLE)


@config_flags.also_called(
    checkpoint_path="checkpoint", output_dir="out", num_samples="num_images", image="images"
)
def edit_images(
    checkpoint,
    edit,
    images,
    out="samples",
    mask=None,
    num_images=None,
    device=None,
    format="png",
    **options,
):
    """Edit pictures by a run folder or checkpoint file into a folder; returns the paths written.

    `edit` names an entry of EDITS, `"inpaint"` or `"sdedit(strength=0.6)"`; `images` is the path of
    a picture, or a list of as many as it takes; `mask` is a picture, white where `inpaint` paints
    again. Makes `num_images` results, 16 by default, and a `grid.png` of pictures and results. The
    rest is as for `generate_images`. Raises ValueError also for pictures that cannot be used, an
    empty mask, and a sampler that cannot make the edit.
    """
    write = FORMATS[check_choice("format", format, list(FORMATS))]
    method = edit_named(edit)
    paths = list(images) if isinstance(images, (list, tuple)) else [images]
    count = edit_count(edit, method, paths, mask, num_images)
    folder = pixels.folder_of(out, format, only=format != "grid")
    options = config_flags.options(options, "sample")
    name, _, trained, machine, net = load.load(checkpoint, device, **options)
    pictures, area, notes = drawing.pictures(trained, paths, mask)
    recipe = build.edit_recipe(trained)
    times = cost.count_nfe(trained, recipe, method)
    make_place(out, folder, format, machine)
    notes += masked_words(mask, area)
    say(f"{edit}: {quantity(count, 'image')} from {name}", trained, recipe, times, notes)
    film = format == "gif"
    walk = draw.edited(method, pictures, area, count, machine)
    how = partial(draw.frames if film else draw.gathered, walk=walk, times=times)
    drawn, again = itertools.tee(drawing.drawer(trained, net, machine, how)(range(count), recipe))
    files = written(write, out, drawn, format, count, machine, alone=True)
    results = list(again)
    first, *others = pictures
    hidden = [] if area is None else [first.masked_fill(area, 127)]
    cells = [first, *hidden, *draw.concatenate(results[-1:] if film else results), *others]
    grid = pixels.file_or_in(out, "grid") if format == "grid" else Path(out, "grid.png")
    if machine.main:
        # between two images: in a row
        pixels.save_image_grid(torch.stack(cells), grid, nrow=len(cells) if others else None)
    return list(dict.fromkeys([*files, grid]))


def edit_named(text):
    """The Edit of a name such as `"sdedit(strength=0.6)"`; a ValueError names the edit."""
    try:
        return get_edit(text)
    except ValueError as error:
        named = "edit" in str(error)
        raise ValueError(str(error) if named else f"edit {text!r}: {error}") from None


def make_place(out, folder, format, machine):
    """Make a drawing's folder; where `out` is a folder, remove an earlier drawing's pictures."""
    with machine.raise_on_all_ranks():
        make_folder(folder)
        removed = 0
        if machine.main and Path(out) == folder:
            removed = pixels.remove_drawing(folder, others_stay=format in SINGLE)
        if removed:
            print(f"removed {quantity(removed, 'image')} of an earlier drawing from {folder}")


def written(write, out, batches, format, count, machine, alone):
    """Write batches in a format, on all ranks or `alone` on the main one; returns all paths.

    A KeyboardInterrupt says how many of `count` images are kept.
    """
    try:
        paths = write(out, batches) if machine.main or not alone else []
        deque(batches, maxlen=0)  # of a rank that writes nothing: it draws its share
        return list(itertools.chain(*machine.all_gather(paths)))
    except KeyboardInterrupt:
        complete = 0 if format in SINGLE else len(pixels.recorded(out))
        are = "is" if complete == 1 else "are"
        text = f"{complete} of {quantity(count, 'image')} {are} in {out}"
        raise KeyboardInterrupt(text if complete else f"nothing is written to {out}") from None


def say(text, config, recipe, times, notes=()):
    """Print what is drawn by which recipe, in how many network evaluations, and remarks."""
    lines = map(config_flags.as_typed, remarks.sampling_remarks(config, "sample"))
    text = f"{text}: {recipe}; {times} network evaluations an image"
    print("\n".join([text, *lines, *notes]), flush=True)


def masked_words(mask, area):
    """What a person should know of a mask, bool [h, w]: lines, none without one."""
    if area is None:
        return []
    if area.all():
        fault = f"mask {str(mask)!r} is white everywhere, so nothing of the picture is kept"
        return [f"warning: {fault}; make it black or transparent where the picture is to stay"]
    return [f"painting {area.float().mean():.1%} of the picture"]


def edit_count(edit, method, paths, mask, num_images):
    """How many results an edit makes; raises ValueError for pictures that it does not take."""
    for path in paths:
        if not isinstance(path, (str, Path)):
            remedy = "give the path of a picture, or a list of them"
            raise ValueError(f"images has a {type(path).__name__}; {remedy}")
    fault = ""
    if len(paths) != method.images:
        flags_needed = " ".join(["--image=PATH"] * method.images)
        images = quantity(method.images, "image")
        fault = f"takes {images}, not {len(paths)}; write {flags_needed}"
    elif method.mask and mask is None:
        fault = "takes a mask; write --mask=PATH, a picture, white where painted again"
    elif mask is not None and not method.mask:
        fault = "takes no mask; leave out --mask, or write --edit=inpaint"
    elif method.single and num_images not in (None, 1):
        fault = "makes one image; leave out --num_images"
    if fault:
        raise ValueError(f"edit {edit!r} {fault}")
    config_flags.check_count(1 if num_images is None else num_images)
    return 1 if method.single else num_images or 16


def wrote(paths):
    """What was written, in words."""
    numbered = [path for path in paths if path.stem.isdigit()]
    others = [str(path) for path in paths if path not in numbered]
    last = f" ... {numbered[-1].name}" if numbered[1:] else ""
    pictures = [f"{quantity(len(numbered), 'image')}, {numbered[0]}{last}"] if numbered else []
    return f"wrote {', and '.join(pictures + others)}"


def main():
    """Draw what the flags say; returns the exit code."""
    given = flags.FLAGS
    options = config_flags.drawing()
    options |= {name: given[name].value for name in ("checkpoint", "out", "device", "format")}
    if given.edit:
        paths = edit_images(
            edit=given.edit,
            images=given.image,
            mask=given.mask,
            num_images=given.num_images,
            **options,
        )
    elif given.image or given.mask:
        remedy = f"write --edit= and one of {', '.join(EDITS)}"
        raise ValueError(f"--image and --mask are for an edit; {remedy}")
    else:
        paths = generate_images(num_images=given.num_images or 16, **options)
    print(wrote(paths))
    return errors.DONE


if __name__ == "__main__":
    config_flags.run_command(main)
