"""A folder of image files: which files can be used, their classes, and whether they are enough."""

import os
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import PIL

from ddpm.common import files
from ddpm.common.registry import quantity
from ddpm.data import cache, decode, duplicates, inspect, limits, source
from ddpm.data.limits import SUFFIXES, TOO_SMALL, UnreadableImage

# of 65535: a 16-bit image that stays below has values of 15 bits or fewer, or signed ones
DARK_LIMIT = 2**15

# Small networks drew copies of 300 faces, now and then of 3,000, and hardly of 30,000 (Somepalli et
# al. 2023); with another measure, Kadkhodaie et al. 2024 found copies up to about 1,000 and none at
# 100,000. Rules of thumb: other images differ.
MIN_IMAGES = 300
FEW_IMAGES = 3000
MANY_IMAGES = 30000
# faults of a copy that went wrong, and the share of the files that may have them
UNREADABLE = ("empty", "not an image", "truncated", "broken", "broken link", "not readable")
MAX_UNREADABLE_SHARE = 0.1


class FolderScan(NamedTuple):
    """The files in a folder and its sub-folders, as sorted relative posix paths.

    `names` have the suffix of an image and `infos` their contents; `other_names` have another one.
    """

    root: Path
    names: list
    infos: list
    other_names: list
    num_unreadable_folders: int

    def faults(self, image_size):
        """Why each image is left out at a size, a key of `limits.FAULTS`, or ""."""
        return [
            info.fault or (TOO_SMALL if min(info.width, info.height) < image_size else "")
            for info in self.infos
        ]

    def other_files(self, exclude=()):
        """What is not read, in words: the number of files of each suffix, without some names."""
        names = [name for name in self.other_names if name not in exclude]
        suffixes = Counter(Path(name).suffix.lower() for name in names)
        unnamed = suffixes.pop("", 0)
        kinds = {(f"{suffix} file", f"{suffix} files"): suffixes[suffix] for suffix in suffixes}
        kinds["file without a suffix", "files without a suffix"] = unnamed
        kinds["unreadable folder", "unreadable folders"] = self.num_unreadable_folders
        return largest_first(kinds)

    def unreadable_pictures(self):
        """The images of formats that are not read: name -> format."""
        kinds = {name: limits.UNREADABLE_SUFFIXES.get(suffix_of(name)) for name in self.other_names}
        kinds |= {name: info.fault for name, info in zip(self.names, self.infos, strict=True)}
        return {name: kind for name, kind in kinds.items() if kind in limits.CONVERTIBLE_FAULTS}

    def dark_images(self, image_size):
        """Images over 8 bits a channel that stay below DARK_LIMIT: name -> largest value."""
        images = zip(self.names, self.infos, self.faults(image_size), strict=True)
        return {
            name: info.max_value
            for name, info, fault in images
            if not fault and 0 < info.max_value < DARK_LIMIT
        }

    def remarks(self, image_size):
        """Lines on unreadable formats and dark images, for a person who trains on this folder."""
        unreadable = self.unreadable_pictures()
        dark = self.dark_images(image_size)
        lines = []
        if unreadable:
            formats = Counter((form, form) for form in unreadable.values())
            lines.append(
                f"{quantity(len(unreadable), 'image is', 'images are')} in a format that is not "
                f"read ({largest_first(formats)}): {limits.CONVERT}"
            )
        if dark:
            largest = max(dark.values())
            bits = largest.bit_length()
            lines.append(
                f"images with more than 8 bits a channel ({len(dark):,}) have values up to "
                f"{largest} of 65535 only ({bits} bits), so training sees them at "
                f"{largest / 65535:.1%} of full brightness: multiply their values by "
                f"{2 ** (16 - bits)}"
            )
        return lines


def suffix_of(name):
    return os.path.splitext(name)[1].lower()


def check_folder(path, example="data/cats"):
    """The Path of a folder; raises ValueError, with an example, where there is no folder."""
    root = files.expand_user(str(path))
    if not root.is_dir():
        fault = "is a file; give" if root.exists() else "does not exist; put images there, or give"
        raise ValueError(
            f"image folder {os.path.abspath(root)!r} {fault} the path of a folder that holds "
            f"images: {example}"
        )
    return root


def scan_folder(path, example="data/cats"):
    """The FolderScan of a folder, cached for all runs; raises ValueError as `check_folder` does."""
    root = check_folder(path, example)
    names, other_names, num_unreadable = find_images(root)
    return FolderScan(root, names, scan_files(root, names), other_names, num_unreadable)


def fitness(kept, num_files=0, faults=()):
    """(reasons why a set of images is not fit to train on, warnings), lists of lines.

    `kept` is the number of images among `num_files`; `faults` has the fault of each one left out.
    """
    not_fit = []
    warnings = []
    if kept < MIN_IMAGES:
        not_fit.append(
            f"{quantity(kept, 'image is', 'images are')} too few: below {MIN_IMAGES} a network "
            "draws copies of its training images; find more, or start from a run on similar "
            "images with --config.train.init_from=runs/OTHER"
        )
    elif kept < FEW_IMAGES:
        warnings.append(
            f"{kept:,} images are few, and some will be copied: set data.flip, data.augment=0.12 "
            "or model.dropout=0.2, and watch eval/copying"
        )
    kinds = Counter((fault, fault) for fault in faults if fault in UNREADABLE)
    count = sum(kinds.values())
    if count > MAX_UNREADABLE_SHARE * num_files:
        not_fit.append(
            f"{count:,} of {quantity(num_files, 'file')} cannot be read as images "
            f"({largest_first(kinds)}): copy the folder here again"
        )
    elif count:
        images = "an image" if count == 1 else "images"
        warnings.append(
            f"{quantity(count, 'file')} cannot be read as {images} ({largest_first(kinds)}) and "
            f"{'is' if count == 1 else 'are'} left out"
        )
    return not_fit, warnings


def verdict(not_fit, warnings):
    """The results of `fitness` as lines for the log."""
    return [*(f"not fit: {line}" for line in not_fit), *(f"look at: {line}" for line in warnings)]


def no_images_message(root, other_files):
    """The message for a folder without image files, which contains `other_files`, in words."""
    return (
        f"no image in {str(root)!r} (found {other_files or 'nothing'}); give a folder with "
        f"{', '.join(SUFFIXES)} files; convert other formats to JPEG or PNG"
    )


def folder(image_size, channels, matte, *, path):
    """Every image in a folder and its sub-folders, in the order of their relative paths.

    The notes name images that are left out: unreadable, or with a side below `image_size`.
    First-level folders are classes if no image lies beside them. ValueError if no image is left.
    """
    scan = scan_folder(path, "--config.data.source=\"folder(path='data/cats')\"")
    root = scan.root
    if not scan.names:
        raise ValueError(no_images_message(root, scan.other_files()))
    faults = scan.faults(image_size)
    kept = [k for k, fault in enumerate(faults) if not fault]
    if not kept:
        smaller = f"use an image_size below {image_size}"
        raise ValueError(
            f"no image in {str(root)!r} can be used: "
            f"{'; '.join(source.left_out_lines(scan.names, faults))}; "
            f"{smaller if TOO_SMALL in faults else 'use other files'}"
        )
    names = [scan.names[k] for k in kept]
    infos = [scan.infos[k] for k in kept]
    labels, classes = classes_of(names)
    near_duplicates = duplicates.near_duplicates(root, infos)
    notes = [
        *notes_on_files(scan, image_size, faults),
        *notes_on_classes(labels, classes),
        *notes_on_doubtful(root, infos, near_duplicates),
    ]
    content = [content_id(info) for info in infos]
    return source.Source(
        fetch=partial(fetch_file, root, names, image_size, channels, matte),
        length=len(names),
        image_shape=(channels, image_size, image_size),
        fingerprint=source.fingerprint(
            "folder", decode.PREPROCESSING, image_size, channels, matte, names, content
        ),
        labels=labels,
        classes=classes,
        notes=tuple(notes),
        near_duplicates=near_duplicates,
    )


def notes_on_files(scan, image_size, faults):
    """Lines for the log: how many files are used, which are left out and what else is there."""
    kept = faults.count("")
    total = quantity(len(scan.names), "image")
    not_read = scan.other_files(exclude=scan.unreadable_pictures())
    return [
        f"folder {scan.root}: {kept:,} of {total} kept",
        *source.left_out_lines(scan.names, faults),
        *verdict(*fitness(kept, len(scan.names), faults)),
        *([f"not read: {not_read}"] if not_read else []),
        *scan.remarks(image_size),
    ]


def notes_on_classes(labels, classes):
    """A line for the log on the sizes of the classes; none without classes."""
    if not classes:
        return []
    counts = Counter(labels)
    sizes = [f"{name} ({counts[number]})" for number, name in enumerate(classes)]
    return [f"{quantity(len(classes), 'class', 'classes')}: {source.shorten(sizes)}"]


def notes_on_doubtful(root, infos, near_duplicates):
    """A line for the log on near-duplicates and images of one colour; none where there are none."""
    num_one_colour = sum(info.one_colour for info in infos)
    doubtful = [f"{num_one_colour} of one colour"] if num_one_colour else []
    if near_duplicates:
        groups = quantity(len(near_duplicates), "group")
        doubtful.insert(0, f"{sum(map(len, near_duplicates))} in {groups} of near-duplicates")
    command = f"python -m ddpm.doctor {source.shorten([str(root)])}"
    return [f"kept, but check with {command}: {', '.join(doubtful)}"] if doubtful else []


def content_id(info):
    """What a fingerprint has for the content of a file: its digest, and how it is converted."""
    if not info.conversions:
        return info.digest
    return f"{info.digest} {decode.CONVERSION_VERSION} {info.conversions}"


def classes_of(names):
    """(class numbers by top folder, class names); (None, None) if an image is in none."""
    if not all("/" in name for name in names):
        return None, None
    tops = [name.split("/")[0] for name in names]
    classes = sorted(set(tops))
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[top] for top in tops], classes


def find_images(root):
    """(names of image files, names of others, number of folders that cannot be read) below `root`.

    Names are sorted relative posix paths. Hidden files and folders are skipped; links are followed,
    but no folder is entered twice.
    """
    names = []
    other_names = []
    entered = {os.path.realpath(root)}
    errors = []
    for base, folders, file_names in os.walk(root, onerror=errors.append, followlinks=True):
        candidates = sorted(filter(is_visible, folders), reverse=True)
        places = {os.path.realpath(os.path.join(base, name)): name for name in candidates}
        folders[:] = sorted(name for place, name in places.items() if place not in entered)
        entered.update(places)
        for name in filter(is_visible, file_names):
            target = names if suffix_of(name) in SUFFIXES else other_names
            target.append(Path(base, name).relative_to(root).as_posix())
    return sorted(names), sorted(other_names), len(errors)


def is_visible(name):
    """Whether a name is neither hidden nor the `__MACOSX` folder that macOS adds to archives."""
    return not name.startswith(".") and name != "__MACOSX"


def scan_files(root, names):
    """The ImageInfo of each file in a folder, cached until the file changes."""
    versions = inspect.SCAN_VERSION, decode.PREPROCESSING, PIL.__version__
    cache_name = f"files/{source.fingerprint(*versions, os.path.realpath(root))}"
    with files.cached_json(cache_name) as known:
        current = {name: file_version(root / name) for name in names}

        def is_known(name):
            version, *info = known.get(name, [None])
            # a file that was not readable may be now: the disk or the memory was full
            return version and version == current[name] and info[:1] != ["not readable"]

        new = [name for name in names if not is_known(name)]
        infos = cache.map_in_threads(
            lambda name: inspect.inspect_image(root / name),
            new,
            f"reading {source.shorten([str(root)])}",
        )
        for name, info in zip(new, infos, strict=True):
            known[name] = [current[name], *info]
        for name in known.keys() - current.keys():
            del known[name]
    return [inspect.ImageInfo(*known[name][1:]) for name in names]


def file_version(path):
    """What changes when a file is written or replaced; None where it cannot be read."""
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    except OSError:
        return None


def largest_first(counts):
    """Counts by (singular, plural), in words, the largest first."""
    kinds = sorted(filter(counts.get, counts), key=lambda kind: (-counts[kind], kind))
    return source.shorten([quantity(counts[kind], *kind) for kind in kinds])


def fetch_file(root, names, image_size, channels, matte, index):
    """Image `index` of a folder; raises ValueError for a file that has changed since the scan."""
    try:
        return decode.decode_file(root / names[index], image_size, channels, matte)
    except UnreadableImage as error:
        raise ValueError(
            f"{source.shorten([str(root / names[index])])} could be read before, and now is "
            f"{error}; restore it, or run again to leave it out"
        ) from None
