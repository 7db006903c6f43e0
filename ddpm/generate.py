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
    flags.DEFINE_string(
        "format",
        "png",
        "One of png, jpg, webp, grid, npz, zip, gif; gif shows how images come out of the noise.",
    )
    flags.DEFINE_string(
        "edit",
        None,
        "inpaint(resamplings=10), sdedit(strength=0.6), invert or interpolate, of an --image.",
    )
    flags.DEFINE_multi_string("image", [], "Picture to edit; given twice to interpolate.")
    flags.DEFINE_string(
        "mask",
        None,
        "Picture for inpaint, white where the image is painted again, black or "
        "transparent elsewhere.",
    )
    flags.adopt_module_key_flags(config_flags)
    config_flags.read_command_line()

import itertools
from collections import deque
from functools import partial
from pathlib import Path

import torch

from ddpm.common import errors
from ddpm.common.files import make_folder
from ddpm.common.pixels import (
    SINGLE,
    file_or_in,
    folder_of,
    recorded,
    remove_drawing,
    save_image_grid,
)
from ddpm.common.registry import check_choice, quantity
from ddpm.diffusion.editing import EDITS, get_edit
from ddpm.experiment import build, cost, drawing, load, remarks
from ddpm.sampling import draw
from ddpm.sampling.formats import FORMATS


@config_flags.also_called(checkpoint_path="checkpoint", output_dir="out", num_samples="num_images")
def generate_images(
    checkpoint=None, num_images=16, out="samples", device=None, format="png", **options
):
    """Draw `num_images` images from a run folder or checkpoint file into the folder `out`; returns
    the paths written.

    The newest run of runs/ is taken where none is given. `format` is one of FORMATS; `out` may also
    name the one file that it makes, such as a grid's. `options` are those of `python -m
    ddpm.generate --help` by the same names, `steps=25`, or any by its full name,
    `**{"diffusion.clip": False}`. Numbered pictures that an earlier drawing left in the folder are
    removed. Raises ValueError, one line, for a missing or damaged checkpoint, for options that
    cannot be, and for a folder that holds numbered pictures which no drawing wrote.
    """
    write = FORMATS[check_choice("format", format, list(FORMATS))]
    config_flags.check_count(num_images)
    folder = folder_of(out, format)
    name, _, trained, machine, net = load.load(
        checkpoint, device, **config_flags.options(options, "sample")
    )
    recipe = build.grid_recipe(trained)
    times = cost.count_nfe(trained, recipe)
    how = draw.gathered if format in SINGLE else draw.draw
    if format == "gif":
        how = draw.frames  # a picture a step, of all images at once
    drawn = drawing.drawer(trained, net, machine, how)(range(num_images), recipe)
    make_place(out, folder, format, machine)
    say(
        f"drawing {quantity(num_images, 'image')} from {name}: {recipe}; {times} network "
        "evaluations an image",
        trained,
    )
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
    """Edit pictures by a run folder or checkpoint file into the folder `out`; returns the paths
    written.

    `edit` names an entry of EDITS, `"inpaint"` or `"sdedit(strength=0.6)"`; `images` is the path of
    a picture, or a list of as many as it takes, `mask` that of a picture that is white where
    `inpaint` paints again, and black or transparent elsewhere; the share to be painted is printed,
    with a warning where that is everything. There are `num_images` results, 16 by default, and a
    `grid.png` of them with what was given. The rest is as for `generate_images`. Raises ValueError,
    one line, also for pictures that cannot be used, for a mask of nothing and for a sampler that
    cannot make the edit.
    """
    write = FORMATS[check_choice("format", format, list(FORMATS))]
    made = edit_named(edit)
    paths = list(images) if isinstance(images, (list, tuple)) else [images]
    for path in paths:
        if not isinstance(path, (str, Path)):
            raise ValueError(
                f"images has a {type(path).__name__}; give the path of a picture, or a list of them"
            )
    count = edit_count(edit, made, paths, mask, num_images)
    folder = folder_of(out, format, only=format != "grid")
    name, _, trained, machine, net = load.load(
        checkpoint, device, **config_flags.options(options, "sample")
    )
    pictures, area, notes = drawing.pictures(trained, paths, mask)
    recipe = build.edit_recipe(trained)
    times = cost.count_nfe(trained, recipe, made)
    make_place(out, folder, format, machine)
    say(
        f"{edit}: {quantity(count, 'image')} from {name}: {recipe}; {times} network evaluations an "
        "image",
        trained,
        *notes,
        *masked_words(mask, area),
    )
    film = format == "gif"
    results = []
    how = partial(
        draw.frames if film else draw.gathered,
        walk=draw.edited(made, pictures, area, count, machine),
        times=times,
    )
    drawn = remembered(drawing.drawer(trained, net, machine, how)(range(count), recipe), results)
    files = written(write, out, drawn, format, count, machine, alone=True)
    first, *others = pictures
    hidden = [] if area is None else [first.masked_fill(area, 127)]
    cells = [first, *hidden, *draw.concatenate(results[-1:] if film else results), *others]
    grid = file_or_in(out, "grid") if format == "grid" else Path(out, "grid.png")
    if machine.main:
        # between two images: in a row
        save_image_grid(torch.stack(cells), grid, nrow=len(cells) if others else None)
    return list(dict.fromkeys([*files, grid]))


def edit_named(text):
    """The Edit of a name such as `"sdedit(strength=0.6)"`; a ValueError names the edit."""
    try:
        return get_edit(text)
    except ValueError as error:
        named = "edit" in str(error)
        raise ValueError(str(error) if named else f"edit {text!r}: {error}") from None


def make_place(out, folder, format, machine):
    """Make the folder of a drawing, and remove the numbered pictures of an earlier one; beside a
    file that `out` names they stay.
    """
    with machine.raise_on_all_ranks():
        make_folder(folder)
        removed = 0
        if machine.main and Path(out) == folder:
            removed = remove_drawing(folder, others_stay=format in SINGLE)
        if removed:
            print(f"removed {quantity(removed, 'image')} of an earlier drawing from {folder}")


def written(write, out, batches, format, count, machine, alone):
    """Write batches in a format, on all ranks or on the main one `file_lock`; returns the paths of
    all ranks.

    A KeyboardInterrupt says how many of `count` images are kept.
    """
    try:
        paths = write(out, batches) if machine.main or not alone else []
        deque(batches, maxlen=0)  # of a rank that writes nothing: it draws its share
        return list(itertools.chain(*machine.all_gather(paths)))
    except KeyboardInterrupt:
        kept = 0 if format in SINGLE else len(recorded(out))
        whole = f"{kept} of {quantity(count, 'image')} {'is' if kept == 1 else 'are'} in {out}"
        raise KeyboardInterrupt(whole if kept else f"nothing is written to {out}") from None


def say(text, config, *more):
    """Say how a config draws, with what a person should know of it."""
    lines = map(config_flags.as_typed, remarks.sampling_remarks(config, "sample"))
    print("\n".join([text, *lines, *more]), flush=True)


def masked_words(mask, area):
    """What a person should know of a mask, bool [h, w]: lines, none without one."""
    if area is None:
        return []
    if area.all():
        return [
            f"warning: mask {str(mask)!r} is white everywhere, so nothing of the picture is kept; "
            "make it black or transparent where the picture is to stay"
        ]
    return [f"painting {area.float().mean():.1%} of the picture"]


def edit_count(edit, made, paths, mask, num_images):
    """How many results an edit makes; raises ValueError where it takes other pictures than it
    was given, or another number.
    """
    if len(paths) != made.images:
        raise ValueError(
            f"edit {edit!r} takes {quantity(made.images, 'image')}, not {len(paths)}; write "
            f"{' '.join(['--image=PATH'] * made.images)}"
        )
    if made.mask and mask is None:
        raise ValueError(
            f"edit {edit!r} takes a mask; write --mask=PATH, a picture, white where painted again"
        )
    if mask is not None and not made.mask:
        raise ValueError(f"edit {edit!r} takes no mask; leave out --mask, or write --edit=inpaint")
    if made.single and num_images not in (None, 1):
        raise ValueError(f"edit {edit!r} makes one image; leave out --num_images")
    config_flags.check_count(1 if num_images is None else num_images)
    return 1 if made.single else num_images or 16


def remembered(batches, kept):
    """The same batches, which are also put into the list `kept`."""
    for batch in batches:
        kept.append(batch)
        yield batch


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
    if given.edit:
        paths = edit_images(
            given.checkpoint,
            given.edit,
            given.image,
            given.out,
            given.mask,
            given.num_images,
            given.device,
            given.format,
            **options,
        )
    elif given.image or given.mask:
        raise ValueError(
            f"--image and --mask are for an edit; write --edit= and one of {', '.join(EDITS)}"
        )
    else:
        paths = generate_images(
            given.checkpoint,
            given.num_images or 16,
            given.out,
            given.device,
            given.format,
            **options,
        )
    print(wrote(paths))
    return errors.DONE


if __name__ == "__main__":
    config_flags.run_command(main)
