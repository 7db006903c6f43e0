"""Is this folder fit to train on? `python -m ddpm.doctor data/cats [--image_size=128] [--out=DIR]`,
or `--config=FILE`.

It reads the folder as training does, with the same functions, and what training would leave out, it
names. With --out it writes report.json and sheet.png. Exit codes: 0 fit, 1 not fit (with --strict
also for a warning), 2 your mistake.
"""

import json
import os
import statistics
from collections import Counter
from pathlib import Path

from absl import flags
from PIL import Image

from ddpm.common import errors, pixels, registry
from ddpm.common.files import atomic_write, make_folder
from ddpm.common.registry import quantity
from ddpm.config import flags as config_flags
from ddpm.config.defaults import OPTIONS, base
from ddpm.data import decode, duplicates, folder, inspect, order, source
from ddpm.data.contact_sheet import COLUMNS, Cell, draw_sheet
from ddpm.sampling import formats

IMBALANCE = 10  # times as many images in the largest class as in the smallest
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7")  # Okabe and Ito 2008


def diagnose(path, image_size, fraction):
    """The report on a folder at a size of images, of which a fraction is held out: what can be
    written as JSON.

    Raises ValueError where there is no such folder.
    """
    found = folder.scan_folder(path)
    faults = found.faults(image_size)
    kept = [number for number, fault in enumerate(faults) if not fault]
    names = [found.names[k] for k in kept]
    facts = [found.facts[k] for k in kept]
    labels, classes = folder.classes_of(names) if names else (None, None)
    counts = Counter(labels or ())
    whole = [one for one in found.facts if not one.fault]
    sides = sorted(min(one.width, one.height) for one in whole)
    lost = {
        name: 1 - min(one.width, one.height) / max(one.width, one.height)
        for name, one in zip(names, facts, strict=True)
    }
    unread = found.unreadable_pictures()
    unnamed = {
        name: form
        for name in found.other_names
        if name not in unread and (form := inspect.format_of(found.root / name))
    }
    alike = duplicates.near_duplicates(found.root, facts)
    held_out = order.split(len(kept), fraction, 0)[1]

    def named(holds):
        return [name for name, one in zip(names, facts, strict=True) if holds(name, one)]

    report = {
        "folder": str(found.root),
        "image_size": image_size,
        "files": len(found.names),
        "kept": len(kept),
        "held_out": [names[k] for k in held_out],
        "formats": dict(Counter(one.format for one in whole).most_common()),
        "shorter_side": dict(
            zip(
                ("least", "median", "most"),
                (sides[0], statistics.median(sides), sides[-1]),
                strict=True,
            )
        )
        if sides
        else {},
        "left_out": {
            fault: [name for name, one in zip(found.names, faults, strict=True) if one == fault]
            for fault in decode.FAULTS
            if fault in faults
        },
        "near_duplicates": [[names[k] for k in group] for group in alike],
        "across": duplicates.split_leakage(alike, held_out),
        "one_colour": named(lambda _, one: one.one_colour),
        "turned": named(lambda _, one: one.orientation != 1),
        "transparent": named(lambda _, one: one.transparent),
        "cmyk": named(lambda _, one: one.mode == "CMYK"),
        "animated": named(lambda _, one: one.animated),
        "misnamed": {
            name: one.format
            for name, one in zip(names, facts, strict=True)
            if one.format != decode.SUFFIXES[Path(name).suffix.lower()]
        },
        "without_suffix": unnamed,
        "other_colours": {
            name: one.profile for name, one in zip(names, facts, strict=True) if one.profile
        },
        "unread_profile": named(lambda _, one: one.unread_profile),
        "dark": found.dark_images(image_size),
        "unread": unread,
        "remarks": found.remarks(image_size),
        "not_read": found.other_files(),
        "no_pictures": found.other_files(but={*unread, *unnamed}),
        "cropped_away": dict(sorted(lost.items(), key=lambda item: -item[1])),
        "classes": {name: counts[number] for number, name in enumerate(classes)} if classes else {},
    }
    return report | verdict(report)


def verdict(report):
    """Why a folder is not fit, and what to look at first: `{"not_fit": lines, "warnings":
    lines}`.
    """
    faults = [fault for fault, names in report["left_out"].items() for _ in names]
    not_fit, warnings = folder.fitness(report["kept"], report["files"], faults)
    if not report["files"]:
        not_fit = [folder.no_images_message(report["folder"], report["not_read"])]
    if report["across"]:
        warnings.append(
            f"{report['across']:,} of {len(report['held_out']):,} held-out images have a "
            "near-duplicate that is learned from, so val/loss and eval/copying flatter: keep one "
            "of each group"
        )
    elif report["near_duplicates"]:
        warnings.append(
            "near-duplicates are learned more often than others, and copied sooner: keep one of "
            "each group"
        )
    warnings += report["remarks"]
    if report["one_colour"]:
        count = len(report["one_colour"])
        images = "1 image is" if count == 1 else f"{count:,} images are"
        samples = "samples like it: remove it" if count == 1 else "samples like them: remove them"
        warnings.append(f"{images} of one colour and will lead to {samples}")
    if report["without_suffix"]:
        unnamed = quantity(len(report["without_suffix"]), "picture is", "pictures are")
        warnings.append(f"{unnamed} not read for want of a suffix of theirs: rename them")
    counts = report["classes"].values()
    if counts and max(counts) > IMBALANCE * min(counts):
        warnings.append(
            f"the largest class has {max(counts) / min(counts):.0f} times as many images as the "
            "smallest, which will be drawn worse"
        )
    return {"not_fit": not_fit, "warnings": warnings}


def report_lines(report):
    """The report in one screen of text."""

    def some(found, most=3):
        return f"{len(found):,}: {source.shorten(list(found), most)}" if found else ""

    advice = folder.verdict(report["not_fit"], report["warnings"])
    if not report["files"]:
        yield from advice
        return
    lost = report["cropped_away"]
    side = report["shorter_side"]
    groups = report["near_duplicates"]
    small = len(report["left_out"].get(decode.TOO_SMALL, ()))
    rows = [
        ("formats", ", ".join(f"{count:,} {form}" for form, count in report["formats"].items()))
    ]
    if side:
        rows.append(
            (
                "shorter side",
                f"{side['least']:,} to {side['most']:,} pixels, median {side['median']:,.0f}; "
                f"{small:,} below {report['image_size']}",
            )
        )
    if lost:
        worst = next(iter(lost))
        rows.append(
            (
                "cropped away",
                f"{statistics.median(lost.values()):.0%} of the pixels in the median, at most "
                f"{lost[worst]:.0%}: {source.shorten([worst])}",
            )
        )
    left_out = {fault: list(names) for fault, names in report["left_out"].items()}
    listed = {name for names in left_out.values() for name in names}
    for name, kind in report["unread"].items():
        if name not in listed:  # as its suffix is none that is read
            left_out.setdefault(kind, []).append(name)
    for fault, names in left_out.items():
        rows.append(
            (f"left out: {fault}", f"{some(names)} ({decode.FAULTS.get(fault, decode.CONVERT)})")
        )
    if groups:
        rows.append(
            (
                "near-duplicates",
                f"{sum(map(len, groups)):,} images in {quantity(len(groups), 'group')}, such as "
                f"{source.shorten(groups[0], 3)}",
            )
        )
    misnamed = [f"{name} ({form})" for name, form in report["misnamed"].items()]
    coloured = [f"{name} ({profile})" for name, profile in report["other_colours"].items()]
    unnamed = [f"{name} ({form})" for name, form in report["without_suffix"].items()]
    rows += [
        ("of one colour", some(report["one_colour"])),
        ("turned upright", some(report["turned"])),
        ("transparent", some(report["transparent"])),
        ("CMYK", some(report["cmyk"])),
        ("colour profile", f"{some(coloured)}; converted to sRGB" if coloured else ""),
        (
            "unread profile",
            f"{some(report['unread_profile'])}; taken for sRGB" if report["unread_profile"] else "",
        ),
        ("dark 16 bits", some([f"{name} (up to {most})" for name, most in report["dark"].items()])),
        (
            "animated",
            f"{some(report['animated'])}; the first frame counts" if report["animated"] else "",
        ),
        ("another format", some(misnamed)),
        ("no image suffix", f"{some(unnamed)}; rename them to be read" if unnamed else ""),
        ("not read", report["no_pictures"]),
        (
            "classes",
            f"{len(report['classes'])}: "
            + source.shorten(
                [
                    f"{name} ({count:,})"
                    for name, count in sorted(report["classes"].items(), key=lambda item: -item[1])
                ],
                6,
            )
            if report["classes"]
            else "",
        ),
    ]
    size = report["image_size"]
    files = quantity(report["files"], "image")
    yield (
        f"{source.shorten([report['folder']])}: {report['kept']:,} of {files} can be learned "
        f"from at {size}x{size}, {len(report['held_out']):,} of them held out\n"
    )
    width = 2 + max(len(name) for name, _ in rows)
    yield from (f"{name:<{width}}{text}" for name, text in rows if text)
    yield ""
    yield from advice
    if not report["not_fit"]:
        enough = (
            "enough that copies are rare"
            if report["kept"] >= folder.MANY_IMAGES
            else "enough to begin with"
        )
        yield (
            f"fit to train on: {report['kept']:,} images are {enough}"
            if report["kept"] >= folder.FEW_IMAGES
            else "fit to train on"
        )


def contact_sheet(report, matte):
    """The PIL image of a folder's contact sheet: what training sees, then what is doubtful."""
    root = Path(report["folder"])
    size = report["image_size"]
    most = 2 * COLUMNS
    left_out = {name for names in report["left_out"].values() for name in names}
    held_out = set(report["held_out"])
    kept = sorted(set(report["cropped_away"]))

    def seen(name, caption=None, colour=""):
        try:
            picture = pixels.picture(
                formats.channels_last(decode.decode_file(root / name, size, 3, matte)[None])[0]
            )
        except decode.UnreadableImage as refused:
            picture = refused.fault
        return Cell(picture, source.shorten([name]) if caption is None else caption, colour)

    def cut(name, share):
        return Cell(show_crop(root / name), f"{share:.0%}  {source.shorten([name])}")

    twins = [
        seen(
            name,
            f"{'held out: ' if name in held_out else ''}{source.shorten([name])}",
            COLOURS[k % len(COLOURS)],
        )
        for k, group in enumerate(report["near_duplicates"][:most])
        for name in group[:4]
    ][: 2 * most]
    unlike = [
        *report["turned"],
        *report["transparent"],
        *report["cmyk"],
        *report["animated"],
        *report["other_colours"],
    ]
    unlike = [name for name in dict.fromkeys(unlike) if name not in left_out]
    outside = [
        Cell(fault, source.shorten([name])) if fault != decode.TOO_SMALL else seen(name)
        for fault, names in report["left_out"].items()
        for name in names[:COLUMNS]
    ]
    worst = [
        cut(name, share) for name, share in list(report["cropped_away"].items())[:COLUMNS] if share
    ]
    return draw_sheet(
        f"{source.shorten([report['folder']])}: {quantity(report['kept'], 'image')} at "
        f"{size}x{size}",
        [
            (
                "As training sees them",
                [seen(name, "") for name in evenly_spaced(kept, 4 * COLUMNS)],
            ),
            (
                f"Near-duplicates: {quantity(len(report['near_duplicates']), 'group')}, a colour "
                "each",
                twins,
            ),
            ("Cropped most: what is dimmed is lost", worst),
            (
                "Turned, transparent, animated, CMYK or other colours, as training sees them",
                [seen(name) for name in unlike[:most]],
            ),
            ("Of one colour", [seen(name) for name in report["one_colour"][:COLUMNS]]),
            ("Left out", outside[: 2 * most]),
        ],
    )


def evenly_spaced(names, most):
    """So many of the names, evenly from first to last."""
    return [names[k] for k in order.evenly_spaced(range(len(names)), most)] if names else []


def show_crop(path):
    """A whole picture, small, its parts dimmed that the square crop leaves out; the fault in a
    word where it cannot be read.
    """
    try:
        picture = decode.open_thumbnail(path, 224)
    except decode.UnreadableImage as refused:
        return refused.fault
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    box = (left, top, left + side, top + side)
    dimmed = Image.blend(picture, Image.new("RGB", picture.size, "white"), 0.7)
    dimmed.paste(picture.crop(box), box)
    return dimmed


def parse_arguments(arguments):
    """(path, image size, held-out fraction, matte) that the command line asks about."""
    given = flags.FLAGS
    config = base()
    config.data.image_size = 128
    if given.config is not None:
        config, _, _ = config_flags.given_config()
    if len(arguments) > 1:
        raise ValueError(f"did not expect {arguments[1]!r}; give one folder")
    name, options = registry.parse(config.data.source)
    if not arguments and name != "folder":
        raise ValueError(
            "the doctor looks at folders of files, and config.data.source is "
            f"{config.data.source!r}; write python -m ddpm.doctor data/cats"
        )
    path = arguments[0] if arguments else options["path"]
    return (
        path,
        given.image_size or config.data.image_size,
        config.data.validation_fraction,
        tuple(config.data.matte),
    )


def check_writable(out):
    """Make the folder of --out; raises ValueError where no file can be written to it."""
    if not os.access(make_folder(out), os.W_OK):
        raise ValueError(f"cannot write to {out}: permission denied; give another folder as --out")


def main(arguments):
    """Report on the folder that the command line names; returns the exit code."""
    path, image_size, fraction, matte = parse_arguments(arguments)
    folder.check_folder(path)
    if out := flags.FLAGS.out:
        check_writable(out)
    report = diagnose(path, image_size, fraction)
    print("\n".join(report_lines(report)))
    if out:
        with atomic_write(Path(out) / "report.json") as part:
            part.write_text(json.dumps(report, indent=1) + "\n")
        with atomic_write(Path(out) / "sheet.png") as part:
            contact_sheet(report, matte).save(part, "PNG")
        print(f"wrote {Path(out) / 'report.json'} and {Path(out) / 'sheet.png'}")
    return (
        errors.FAILED
        if report["not_fit"] or flags.FLAGS.strict and report["warnings"]
        else errors.DONE
    )


if __name__ == "__main__":
    config_flags.define_config_flag()
    flags.DEFINE_integer(
        "image_size",
        None,
        "Pixels a side to train at; by default the config's, or 128.",
        OPTIONS["data.image_size"].low,
        OPTIONS["data.image_size"].high,
    )
    flags.DEFINE_string(
        "out", None, "Folder for report.json and sheet.png, a picture of what is in the folder."
    )
    flags.DEFINE_boolean("strict", False, "Exit with 1 for a warning too.")
    flags.adopt_module_key_flags(config_flags)
    config_flags.run_command(
        main, takes="a folder of images such as data/cats, or --config=configs/cats128.py"
    )
