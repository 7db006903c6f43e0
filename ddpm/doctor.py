"""Is a folder of images fit to train on? `python -m ddpm.doctor data/cats [--image_size=128]
[--out=DIR]`, or `--config=FILE`.

Reads the folder with the functions of training and names what training would leave out. With --out
it writes report.json and sheet.png. Exit codes: 0 fit, 1 not fit (with --strict also for a
warning), 2 usage error.
"""

# ruff: noqa: E402
# The command line is read above the imports of torch, which take a second.

from absl import flags

from ddpm.config import flags as config_flags
from ddpm.config.defaults import OPTIONS, base

if __name__ == "__main__":
    config_flags.define_config_flag()
    SIZE = OPTIONS["data.image_size"]
    SIZE_HELP = "Pixels a side to train at; by default the config's, or 128."
    flags.DEFINE_integer("image_size", None, SIZE_HELP, SIZE.low, SIZE.high)
    OUT_HELP = "Folder for report.json and sheet.png, a picture of what is in the folder."
    flags.DEFINE_string("out", None, OUT_HELP)
    flags.DEFINE_boolean("strict", False, "Exit with 1 for a warning too.")
    flags.adopt_module_key_flags(config_flags)
    config_flags.read_command_line(
        takes="a folder of images such as data/cats, or --config=configs/cats128.py"
    )

import json
import os
import statistics
from collections import Counter
from functools import partial
from pathlib import Path

from PIL import Image

from ddpm.common import errors, pixels, registry
from ddpm.common.files import atomic_write, make_folder
from ddpm.common.registry import quantity
from ddpm.data import decode, duplicates, folder, inspect, limits, order
from ddpm.data.contact_sheet import COLUMNS, Cell, draw_sheet
from ddpm.data.source import shorten
from ddpm.sampling import formats

MAX_IMBALANCE = 10  # times as many images in the largest class as in the smallest
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito 2008


def diagnose(path, image_size, fraction):
    """The report on a folder at an image size, with a fraction of the images held out.

    A dict that JSON can write. Raises ValueError where there is no such folder.
    """
    scan = folder.scan_folder(path)
    faults = scan.faults(image_size)
    images = {
        name: info
        for name, info, fault in zip(scan.names, scan.infos, faults, strict=True)
        if not fault
    }
    names = list(images)
    labels, classes = folder.classes_of(names) if names else (None, None)
    counts = Counter(labels or ())
    groups = duplicates.near_duplicates(scan.root, list(images.values()))
    held_out = order.split(len(names), fraction, 0)[1]
    report = {
        "folder": str(scan.root),
        "image_size": image_size,
        "files": len(scan.names),
        "kept": len(names),
        "held_out": [names[k] for k in held_out],
        "near_duplicates": [[names[k] for k in group] for group in groups],
        "across": duplicates.split_leakage(groups, held_out),
        "classes": {name: counts[number] for number, name in enumerate(classes or ())},
    }
    report |= describe_files(scan, image_size, faults) | describe_images(images)
    return report | verdict(report)


def describe_files(scan, image_size, faults):
    """The part of a report on all files of a FolderScan: sizes, faults, and what is not read."""
    infos = [info for info in scan.infos if not info.fault]
    sides = sorted(min(info.width, info.height) for info in infos)
    left_out = {fault: [] for fault in limits.FAULTS if fault in faults}
    for name, fault in zip(scan.names, faults, strict=True):
        if fault in left_out:
            left_out[fault].append(name)
    unreadable = scan.unreadable_pictures()
    others = [name for name in scan.other_names if name not in unreadable]
    without_suffix = {name: inspect.format_of(scan.root / name) for name in others}
    without_suffix = {name: form for name, form in without_suffix.items() if form}
    shorter_side = {}
    if sides:
        median = statistics.median(sides)
        shorter_side = {"least": sides[0], "median": median, "most": sides[-1]}
    return {
        "formats": dict(Counter(info.format for info in infos).most_common()),
        "shorter_side": shorter_side,
        "left_out": left_out,
        "without_suffix": without_suffix,
        "dark": scan.dark_images(image_size),
        "unread": unreadable,
        "remarks": scan.remarks(image_size),
        "not_read": scan.other_files(),
        "no_pictures": scan.other_files(exclude={*unreadable, *without_suffix}),
    }


def describe_images(images):
    """The part of a report on the images of training, a dict name -> ImageInfo."""
    cropped = {}
    misnamed = {}
    for name, info in images.items():
        cropped[name] = 1 - min(info.width, info.height) / max(info.width, info.height)
        if info.format != limits.SUFFIXES[folder.suffix_of(name)]:
            misnamed[name] = info.format
    return {
        "one_colour": [name for name, info in images.items() if info.one_colour],
        "turned": [name for name, info in images.items() if info.orientation != 1],
        "transparent": [name for name, info in images.items() if info.transparent],
        "cmyk": [name for name, info in images.items() if info.mode == "CMYK"],
        "animated": [name for name, info in images.items() if info.animated],
        "unread_profile": [name for name, info in images.items() if info.unread_profile],
        "other_colours": {name: info.profile for name, info in images.items() if info.profile},
        "misnamed": misnamed,
        "cropped_away": dict(sorted(cropped.items(), key=lambda item: -item[1])),
    }


def verdict(report):
    """`{"not_fit": lines, "warnings": lines}`: why a folder is not fit, and what to check first."""
    counted = Counter({fault: len(names) for fault, names in report["left_out"].items()})
    faults = list(counted.elements())
    not_fit, warnings = folder.fitness(report["kept"], report["files"], faults)
    if not report["files"]:
        not_fit = [folder.no_images_message(report["folder"], report["not_read"])]
    if report["across"]:
        warnings.append(
            f"{report['across']:,} of {len(report['held_out']):,} held-out images have a "
            "near-duplicate among the training images, so val/loss and eval/copying look too "
            "good: keep one image of each group"
        )
    elif report["near_duplicates"]:
        warnings.append(
            "near-duplicates are trained on more often than other images and copied sooner: keep "
            "one image of each group"
        )
    warnings += report["remarks"]
    if names := report["one_colour"]:
        it = "it" if len(names) == 1 else "them"
        images = quantity(len(names), "image is", "images are")
        warnings.append(f"{images} of one colour and will lead to samples like {it}: remove {it}")
    if names := report["without_suffix"]:
        it = "it" if len(names) == 1 else "them"
        why = "as the name does not end in an image suffix"
        images = quantity(len(names), "image is", "images are")
        warnings.append(f"{images} not read, {why}: rename {it}")
    counts = report["classes"].values()
    if counts and max(counts) > MAX_IMBALANCE * min(counts):
        more = f"{max(counts) / min(counts):.0f} times as many images as the smallest"
        warnings.append(f"the largest class has {more}, whose samples will be worse")
    return {"not_fit": not_fit, "warnings": warnings}


def report_lines(report):
    """The report as lines of text, on one screen."""
    advice = folder.verdict(report["not_fit"], report["warnings"])
    if not report["files"]:
        return advice
    size = report["image_size"]
    images = f"{report['kept']:,} of {quantity(report['files'], 'image')}"
    header = f"{shorten([report['folder']])}: {images} can be used at {size}x{size}, "
    header += f"{len(report['held_out']):,} of them held out"
    rows = {name: text for name, text in (file_rows(report) | image_rows(report)).items() if text}
    width = 2 + max(map(len, rows), default=0)
    lines = [header, "", *(f"{name:<{width}}{text}" for name, text in rows.items()), "", *advice]
    if report["not_fit"]:
        return lines
    if report["kept"] < folder.FEW_IMAGES:
        return [*lines, "fit to train on"]
    is_enough = report["kept"] >= folder.MANY_IMAGES
    enough = "enough that copies are rare" if is_enough else "enough to start with"
    return [*lines, f"fit to train on: {report['kept']:,} images are {enough}"]


def file_rows(report):
    """{name: text} of the rows on formats, sizes and what is left out or not read."""
    formats = [f"{count:,} {form}" for form, count in report["formats"].items()]
    rows = {"formats": ", ".join(formats)}
    if side := report["shorter_side"]:
        span = f"{side['least']:,} to {side['most']:,} pixels, median {side['median']:,.0f}"
        small = len(report["left_out"].get(limits.TOO_SMALL, ()))
        rows["shorter side"] = f"{span}; {small:,} below {report['image_size']}"
    if shares := report["cropped_away"]:
        worst, share = next(iter(shares.items()))
        usual = f"{statistics.median(shares.values()):.0%} of the pixels in the median image"
        rows["cropped away"] = f"{usual}, at most {share:.0%}: {shorten([worst])}"
    left_out = {fault: list(names) for fault, names in report["left_out"].items()}
    listed = set().union(*left_out.values())
    for name, form in report["unread"].items():
        if name not in listed:  # its suffix is not of an image that is read
            left_out.setdefault(form, []).append(name)
    for fault, names in left_out.items():
        remedy = limits.FAULTS.get(fault, limits.CONVERT)
        rows[f"left out: {fault}"] = f"{some(names)} ({remedy})"
    rows["no image suffix"] = some(report["without_suffix"], "; add the suffix of the format")
    return rows | {"not read": report["no_pictures"]}


def image_rows(report):
    """{name: text} of the rows on what is special in the images of training."""
    rows = {"near-duplicates": ""}
    if groups := report["near_duplicates"]:
        images = f"{sum(map(len, groups)):,} images in {quantity(len(groups), 'group')}"
        rows["near-duplicates"] = f"{images}, such as {shorten(groups[0], 3)}"
    dark = {name: f"up to {value}" for name, value in report["dark"].items()}
    for name, key, remark in SPECIAL:
        rows[name] = some(dark if key == "dark" else report[key], remark)
    classes = sorted(report["classes"].items(), key=lambda item: -item[1])
    if classes:
        sizes = shorten([f"{name} ({count:,})" for name, count in classes], 6)
        rows["classes"] = f"{len(classes)}: {sizes}"
    return rows


SPECIAL = (  # name of a row, its key in the report, what training does with the images
    ("one colour", "one_colour", ""),
    ("rotated by EXIF", "turned", "; turned upright"),
    ("transparent", "transparent", "; laid over data.background"),
    ("CMYK", "cmyk", "; converted to RGB"),
    ("colour profile", "other_colours", "; converted to sRGB"),
    ("unread profile", "unread_profile", "; treated as sRGB"),
    ("dark 16 bits", "dark", ""),
    ("animated", "animated", "; only the first frame is used"),
    ("wrong suffix", "misnamed", "; read as what they are"),
)


def some(names, remark="", limit=3):
    """The number of names, the first few, and a remark; names of a dict with their values."""
    if not names:
        return ""
    if isinstance(names, dict):
        names = [f"{name} ({value})" for name, value in names.items()]
    return f"{len(names):,}: {shorten(list(names), limit)}{remark}"


def contact_sheet(report, matte):
    """The PIL image of a folder's contact sheet: what training sees, then what is doubtful."""
    size = report["image_size"]
    limit = 2 * COLUMNS
    root = Path(report["folder"])
    see = partial(training_cell, root, size, matte)
    shown = order.evenly_spaced(sorted(report["cropped_away"]), 4 * COLUMNS)
    cropped = [
        Cell(show_crop(root / name), f"{share:.0%}  {shorten([name])}")
        for name, share in list(report["cropped_away"].items())[:COLUMNS]
        if share
    ]
    special = {}  # names, in order
    for key in ("turned", "transparent", "cmyk", "animated", "other_colours"):
        special |= dict.fromkeys(report[key])
    groups = quantity(len(report["near_duplicates"]), "group")
    heading = "Rotated, transparent, animated, CMYK or other colours, as training sees them"
    sections = {
        "As training sees them": [see(name, caption="") for name in shown],
        f"Near-duplicates: {groups}, one colour each": twin_cells(report, see)[: 2 * limit],
        "Cropped most: dimmed parts are lost": cropped,
        heading: [see(name) for name in list(special)[:limit]],
        "Of one colour": [see(name) for name in report["one_colour"][:COLUMNS]],
        "Left out": left_out_cells(report, see)[:limit],
    }
    images = quantity(report["kept"], "image")
    title = f"{shorten([report['folder']])}: {images} at {size}x{size}"
    return draw_sheet(title, sections.items())


def training_cell(root, size, matte, name, caption=None, colour=""):
    """The Cell of an image of a folder as training sees it, or of its fault."""
    try:
        image = decode.decode_file(root / name, size, 3, matte)
        picture = pixels.picture(formats.channels_last(image[None])[0])
    except limits.UnreadableImage as error:
        picture = error.fault
    return Cell(picture, shorten([name]) if caption is None else caption, colour)


def twin_cells(report, see):
    """The Cells of near-duplicates, up to four of a group, with the group's colour."""
    held_out = set(report["held_out"])
    cells = []
    for number, group in enumerate(report["near_duplicates"][: 2 * COLUMNS]):
        for name in group[:4]:
            caption = f"{'held out: ' if name in held_out else ''}{shorten([name])}"
            cells.append(see(name, caption, COLOURS[number % len(COLOURS)]))
    return cells


def left_out_cells(report, see):
    """The Cells of images that are left out: small ones as they are, others by their fault."""
    cells = []
    for fault, names in report["left_out"].items():
        for name in names[:COLUMNS]:
            is_small = fault == limits.TOO_SMALL
            cells.append(see(name) if is_small else Cell(fault, shorten([name])))
    return cells


def show_crop(path):
    """A small copy of a whole image with the parts outside its square crop dimmed, or its fault."""
    try:
        picture = decode.open_thumbnail(path, 224)
    except limits.UnreadableImage as error:
        return error.fault
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    box = (left, top, left + side, top + side)
    dimmed = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.7)
    dimmed.paste(picture.crop(box), box)
    return dimmed


def parse_arguments(arguments):
    """(path, image size, held-out fraction, matte) of the command line; raises ValueError."""
    config = base()
    config.data.image_size = 128
    if flags.FLAGS.config is not None:
        config, _, _ = config_flags.given_config()
    if len(arguments) > 1:
        raise ValueError(f"did not expect {arguments[1]!r}; give one folder")
    name, options = registry.parse(config.data.source)
    if not arguments and name != "folder":
        given = f"config.data.source is {config.data.source!r}"
        remedy = "write python -m ddpm.doctor data/cats"
        raise ValueError(f"the doctor looks at folders of files, and {given}; {remedy}")
    path = arguments[0] if arguments else options["path"]
    size = flags.FLAGS.image_size or config.data.image_size
    return path, size, config.data.validation_fraction, tuple(config.data.background)


def main(arguments):
    """Report on the folder that the command line names; returns the exit code."""
    path, image_size, fraction, matte = parse_arguments(arguments)
    folder.check_folder(path)
    out = flags.FLAGS.out
    if out and not os.access(make_folder(out), os.W_OK):
        raise ValueError(f"cannot write to {out}: permission denied; give another folder as --out")
    report = diagnose(path, image_size, fraction)
    print("\n".join(report_lines(report)))
    if out:
        with atomic_write(Path(out) / "report.json") as part:
            part.write_text(json.dumps(report, indent=1) + "\n")
        with atomic_write(Path(out) / "sheet.png") as part:
            contact_sheet(report, matte).save(part, "PNG")
        print(f"wrote {Path(out) / 'report.json'} and {Path(out) / 'sheet.png'}")
    not_fit = report["not_fit"] or flags.FLAGS.strict and report["warnings"]
    return errors.FAILED if not_fit else errors.DONE


if __name__ == "__main__":
    config_flags.run_command(main)
