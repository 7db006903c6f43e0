"""Datasets as pure functions `index -> uint8 image [c, h, w]`, and the addresses at which training
reads them.

A source knows its labels, a fingerprint of its content and what a person should read about it in
the log. Nothing here is random: order, held-out split and flips are functions of (seed, step,
index), read through `ddpm.common.rng`, so that a resumed run, another number of workers or another
number of GPUs sees the same images.
"""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import PIL

from ddpm.common import files as common_files
from ddpm.common import registry
from ddpm.common.files import expand_user
from ddpm.data import cache, decode, duplicates, source
from ddpm.data.decode import SUFFIXES, TOO_SMALL, ImageInfo, UnreadableImage, decode_file
from ddpm.data.inspect import inspect_image

# in that of what gave other pixels before, as only PIL read it: it is converted to sRGB, or a rare
# kind
CONVERSION_VERSION = 2


# of 65535: a picture of 16 bits that goes no further has values of 15 bits or fewer, or signs
DARK_LIMIT = 2**15


class FolderScan(NamedTuple):
    """A folder of images: the files of images with their facts, and the names of what else lies
    there.
    """

    root: Path
    names: list  # relative posix paths, sorted
    facts: list
    other_names: list  # relative posix paths, sorted
    num_unreadable_folders: int

    def faults(self, image_size):
        """Why each image is left out at a size, a key of `pictures.FAULTS`; "" for those that
        are kept.
        """
        return [
            one.fault or (TOO_SMALL if min(one.width, one.height) < image_size else "")
            for one in self.facts
        ]

    def other_files(self, but=()):
        """What is not read, in words: how many files of which suffix; `but` are names that are
        not counted.
        """
        suffixes = Counter(
            Path(name).suffix.lower() for name in self.other_names if name not in but
        )
        kinds = {
            (f"{suffix} file", f"{suffix} files"): count
            for suffix, count in suffixes.items()
            if suffix
        }
        kinds |= {
            ("file without a suffix", "files without a suffix"): suffixes[""],
            (
                "folder that may not be read",
                "folders that may not be read",
            ): self.num_unreadable_folders,
        }
        return largest_first(kinds)

    def unreadable_pictures(self):
        """The pictures of formats that are not read: name -> format."""
        kinds = {
            name: decode.UNREADABLE_SUFFIXES.get(Path(name).suffix.lower(), "")
            for name in self.other_names
        }
        kinds |= {name: one.fault for name, one in zip(self.names, self.facts, strict=True)}
        return {name: kind for name, kind in kinds.items() if kind in decode.CONVERTIBLE_FAULTS}

    def dark_images(self, image_size):
        """The images of more than 8 bits a channel that use no more than half of their range:
        name -> the largest value.
        """
        return {
            name: one.max_value
            for name, one, fault in zip(
                self.names, self.facts, self.faults(image_size), strict=True
            )
            if not fault and 0 < one.max_value < DARK_LIMIT
        }

    def remarks(self, image_size):
        """What a person must know who trains on this folder, in lines."""
        unread = self.unreadable_pictures()
        dark = self.dark_images(image_size)
        lines = []
        if unread:
            formats = Counter((form, form) for form in unread.values())
            lines.append(
                f"{registry.quantity(len(unread), 'picture is', 'pictures are')} not read "
                f"({largest_first(formats)}): {decode.CONVERT}"
            )
        if dark:
            most = max(dark.values())
            bits = most.bit_length()
            lines.append(
                f"images with more than 8 bits a channel ({len(dark):,}) reach only {most} of "
                f"65535, as values of {bits} bits do, and are learned at {most / 65535:.1%} of "
                f"white: multiply their values by {2 ** (16 - bits)}"
            )
        return lines


def check_folder(path, example="data/cats"):
    """The Path of a folder; raises ValueError, with an example, where there is no folder."""
    root = expand_user(str(path))
    if not root.is_dir():
        raise ValueError(
            f"image folder {os.path.abspath(root)!r} "
            f"{'is a file' if root.exists() else 'does not exist'}; give the path of a folder "
            f"that holds images: {example}"
        )
    return root


def scan_folder(path, example="data/cats"):
    """The Survey of a folder and its sub-folders; each file is read once and for all runs.

    Raises ValueError as `check_folder` does.
    """
    root = check_folder(path, example)
    names, others, closed = find_images(root)
    return FolderScan(root, names, scan_files(root, names), others, closed)


# Small networks drew copies of 300 faces, now and then of 3,000, and hardly of 30,000 (Somepalli et
# al. 2023); with another measure, Kadkhodaie et al. 2024 found copies up to about 1,000 and none at
# 100,000. Rules of thumb: other images differ.
MIN_IMAGES = 300
FEW_IMAGES = 3000
MANY_IMAGES = 30000
# faults of a copy that went wrong, and the share of the files that may have them
UNREADABLE = ("empty", "not an image", "truncated", "broken", "broken link", "not readable")
MAX_UNREADABLE_SHARE = 0.1


def fitness(kept, files=0, faults=()):
    """(reasons why a set of images is not fit to train on, warnings), lists of lines.

    `kept` is the number of images among `files`; `faults` holds the fault of each file left out.
    """
    not_fit = []
    warnings = []
    if kept < MIN_IMAGES:
        not_fit.append(
            f"{registry.quantity(kept, 'image is', 'images are')} too few: a network draws copies "
            f"of its training images where it has {MIN_IMAGES} or less; find more, or start from a "
            "run on similar images with --config.train.init_from=runs/OTHER"
        )
    elif kept < FEW_IMAGES:
        warnings.append(
            f"{kept:,} images are few, and some will be copied: set data.flip, data.augment=0.12 "
            "or model.dropout=0.2, and watch eval/copying"
        )
    unreadable = Counter((fault, fault) for fault in faults if fault in UNREADABLE)
    count = unreadable.total()
    if count > MAX_UNREADABLE_SHARE * files:
        not_fit.append(
            f"{count:,} of {registry.quantity(files, 'file')} cannot be read as images "
            f"({largest_first(unreadable)}): copy the folder here again"
        )
    elif count:
        warnings.append(
            f"{registry.quantity(count, 'file')} cannot be read as "
            f"{'an image' if count == 1 else 'images'} ({largest_first(unreadable)}): left out"
        )
    return not_fit, warnings


def verdict(not_fit, warnings):
    """What `fitness` found, as lines for people."""
    return [*(f"not fit: {line}" for line in not_fit), *(f"look at: {line}" for line in warnings)]


def no_images_message(root, strangers):
    """Words for a folder without a file that is named as an image's; `strangers` says in words
    what it holds instead.
    """
    return (
        f"no image in {str(root)!r} (found {strangers or 'nothing'}); read is "
        f"{', '.join(SUFFIXES)}; {decode.CONVERT} what is a picture"
    )


def folder(image_size, channels, matte, *, path):
    """Every image in a folder and its sub-folders, in the order of their relative paths.

    Ones that `pictures` refuses and ones whose shorter side is below `image_size` are left out and
    named in the notes. First-level sub-folders are classes if no image lies beside them. Raises
    ValueError where no image is left.
    """
    found = scan_folder(path, "--config.data.source=\"folder(path='data/cats')\"")
    root = found.root
    names = found.names
    if not names:
        raise ValueError(no_images_message(root, found.other_files()))
    faults = found.faults(image_size)
    kept = [i for i, fault in enumerate(faults) if not fault]
    said = source.left_out_lines(names, faults)
    if not kept:
        remedy = (
            f"use an image_size below {image_size}" if TOO_SMALL in faults else "use other files"
        )
        raise ValueError(f"no image in {str(root)!r} can be used: {'; '.join(said)}; {remedy}")
    notes = [
        f"folder {root}: {len(kept):,} of {registry.quantity(len(names), 'image')} kept",
        *said,
    ]
    notes += verdict(*fitness(len(kept), len(names), faults))
    notes += (
        [f"not read: {others}"]
        if (others := found.other_files(but=found.unreadable_pictures()))
        else []
    )
    notes += found.remarks(image_size)
    names = [names[i] for i in kept]
    facts = [found.facts[i] for i in kept]
    labels, classes = classes_of(names)
    if classes:
        tops = Counter(labels)
        number = registry.quantity(len(classes), "class", "classes")
        sizes = [f"{name} ({tops[k]})" for k, name in enumerate(classes)]
        notes.append(f"{number}: {source.shorten(sizes)}")
    alike = duplicates.near_duplicates(root, facts)
    blank = sum(one.one_colour for one in facts)
    doubtful = (
        [f"{sum(map(len, alike))} in {registry.quantity(len(alike), 'group')} of near-duplicates"]
        if alike
        else []
    )
    doubtful += [f"{blank} of one colour"] if blank else []
    if doubtful:
        notes.append(
            f"kept, but look at them with python -m ddpm.doctor {source.shorten([str(root)])}: "
            f"{', '.join(doubtful)}"
        )
    return source.Source(
        fetch=partial(fetch_file, root, names, image_size, channels, matte),
        length=len(names),
        image_shape=(channels, image_size, image_size),
        fingerprint=source.fingerprint(
            "folder",
            decode.PREPROCESSING,
            image_size,
            channels,
            matte,
            names,
            list(map(content_id, facts)),
        ),
        labels=labels,
        classes=classes,
        notes=tuple(notes),
        near_duplicates=alike,
    )


def content_id(one):
    """What stands for the content of a file in a fingerprint, by its ImageInfo: other where its
    pixels are others than before.
    """
    return f"{one.digest} {CONVERSION_VERSION} {one.conversions}" if one.conversions else one.digest


def classes_of(names):
    """Class numbers of images by their first-level sub-folders, and those folders' names; None
    both where one lies beside.
    """
    if not all("/" in name for name in names):
        return None, None
    tops = [name.split("/")[0] for name in names]
    classes = sorted(set(tops))
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[top] for top in tops], classes


def find_images(root):
    """Below `root` the files of images and the others, as sorted relative posix paths, and how many
    folders may not be read.

    Hidden files and folders are passed over; links are followed, but no folder is entered twice.
    """
    names = []
    others = []
    entered = {os.path.realpath(root)}
    closed = []
    for base, folders, files in os.walk(root, onerror=closed.append, followlinks=True):
        candidates = sorted(filter(is_visible, folders), reverse=True)
        places = {os.path.realpath(os.path.join(base, name)): name for name in candidates}
        folders[:] = sorted(name for place, name in places.items() if place not in entered)
        entered.update(places)
        for file in filter(is_visible, files):
            kind = names if os.path.splitext(file)[1].lower() in SUFFIXES else others
            kind.append(Path(base, file).relative_to(root).as_posix())
    return sorted(names), sorted(others), len(closed)


def is_visible(name):
    """Whether a name is neither hidden nor the shadow folder that macOS packs into archives."""
    return not name.startswith(".") and name != "__MACOSX"


def scan_files(root, names):
    """The ImageInfo of each file in a folder, cached until the file changes."""
    versions = source.SCAN_VERSION, decode.PREPROCESSING, PIL.__version__
    name = f"files/{source.fingerprint(*versions, os.path.realpath(root))}"
    with common_files.cached_json(name) as known:
        stamps = {name: file_version(root / name) for name in names}
        new = [
            name
            for name in names
            if not (
                stamps[name]
                and known.get(name, [""])[0] == stamps[name]
                and ImageInfo(*known[name][1:]).fault != source.TRANSIENT_FAULT
            )
        ]
        read = cache.map_in_threads(
            lambda name: inspect_image(root / name), new, f"reading {source.shorten([str(root)])}"
        )
        known.update({name: [stamps[name], *facts] for name, facts in zip(new, read, strict=True)})
        for name in known.keys() - stamps.keys():
            del known[name]
    return [ImageInfo(*known[name][1:]) for name in names]


def file_version(path):
    """What changes when a file is written to, or another takes its place; None where it cannot
    be said.
    """
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    except OSError:
        return None


def largest_first(counts):
    """Counts of kinds, each given as (singular, plural), in words, the largest first."""
    kinds = sorted(filter(counts.get, counts), key=lambda kind: (-counts[kind], kind))
    return source.shorten([registry.quantity(counts[kind], *kind) for kind in kinds])


def fetch_file(root, names, image_size, channels, matte, index):
    """Image `index` of a folder; raises ValueError for a file that is no longer what it was when
    the folder was read.
    """
    try:
        return decode_file(root / names[index], image_size, channels, matte)
    except UnreadableImage as error:
        raise ValueError(
            f"{source.shorten([str(root / names[index])])} could be read before, and now is "
            f"{error}; bring it back, or run again to leave it out"
        ) from None
