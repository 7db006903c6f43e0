"""Datasets as pure functions `index -> uint8 image [c, h, w]`, and the addresses at which training reads them.

A source knows its labels, a fingerprint of its content and what a person should read about it in the log. Nothing here
is random: order, held-out split and flips are functions of (seed, step, index), read through `ddpm.rng`, so that a
resumed run, another number of workers or another number of GPUs sees the same images.
"""

import atexit
import contextlib
import contextvars
import hashlib
import inspect
import io
import json
import os
import signal
import weakref
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from tqdm import tqdm

from ddpm import cache, images, likeness, pictures, rng, spec
from ddpm.files import expanded
from ddpm.pictures import MODES, SUFFIXES, TOO_SMALL, WHITE, Facts, Refused, decode, decode_file, examine, to_pixels

PREPROCESSING = "square crop, bicubic, 1"  # in every fingerprint: count it up when the same file gives other pixels
SRGB = 2  # in that of what gave other pixels before, as only PIL read it: it is converted to sRGB, or a rare kind
PASSING = "not readable"  # a fault of the disk or the memory, which may be gone the next time
SCAN = 2  # count it up when `pictures.examine` says other things of the same file

Report = namedtuple("Report", "digest fault label species", defaults=("", "", -1, ""))  # on a torchvision image


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset: `source[i]` is a uint8 tensor [c, h, w] and always the same one.

    `labels` holds a class number per image or is None, `classes` their names or None; `fingerprint` (sha256 in hex) is
    the same wherever the content, size and preprocessing are; `notes` are lines for the log; `alike` are groups of indices
    of near-duplicates, where they were looked for. Where the images are `in_memory`, `fetch` takes an array of indices too, for
    a batch.
    """

    fetch: Callable
    length: int
    image_shape: tuple
    fingerprint: str
    labels: list | None = None
    classes: list | None = None
    notes: tuple = ()
    in_memory: bool = False
    alike: tuple = ()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if not 0 <= index < self.length:
            raise IndexError(f"image {index} of {self.length}")
        return self.fetch(int(index))

    def batch(self, indices):
        """The images at some indices, uint8 [b, c, h, w]; from memory at once, which is several times faster."""
        return self.fetch(np.asarray(indices)) if self.in_memory else torch.stack([self[index] for index in indices])


def open_source(text, image_size, channels=3, matte=WHITE):
    """Build the source that a spec such as `"digits"` or `"folder(path='data/cats')"` names.

    Images come as [channels, image_size, image_size]; transparency is laid over the colour `matte` (r, g, b), or kept
    as alpha by 2 and 4 channels. Raises ValueError for an unknown source, a wrong knob, or data that is not there.
    """
    spec.check_choice("number of channels", channels, list(MODES))
    if not (len(matte) == 3 and all(isinstance(value, int) and 0 <= value <= 255 for value in matte)):
        raise ValueError(f"matte {matte!r} is no colour; give three whole numbers from 0 to 255, such as {WHITE}")
    if image_size < 1:
        raise ValueError(f"image_size {image_size} is not a number of pixels; use 1 or more")
    return spec.choose("data source", SOURCES, text)(image_size, channels, tuple(matte))


def digits(image_size, channels, matte):
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 grey levels, brought bilinearly to 16 or 32 pixels.

    Raises ValueError for another size than 8, 16 or 32.
    """
    from sklearn.datasets import load_digits  # a second of start-up that other sources need not pay

    if image_size not in (8, 16, 32):
        raise ValueError(f"digits are 8x8 and come as 8, 16 or 32 pixels, not {image_size}; set image_size to 16 or 32")
    found = load_digits()
    grey = torch.from_numpy(found.images).unsqueeze(1)
    grey = F.interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    grey = (grey * (255 / 16)).round().clamp(0, 255).to(torch.uint8)
    colours = 1 if channels < 3 else 3
    pixels = repeat(grey, "n 1 h w -> n c h w", c=colours)
    if channels != colours:
        pixels = torch.cat([pixels, torch.full_like(grey, 255)], dim=1)
    return Source(
        fetch=partial(take, pixels.numpy()),
        length=len(pixels),
        image_shape=tuple(pixels.shape[1:]),
        fingerprint=fingerprint("digits", pixels.shape, hashlib.sha256(pixels.numpy().tobytes()).hexdigest()),
        labels=found.target.tolist(),
        classes=[str(name) for name in found.target_names],
        notes=(f"digits: {len(pixels)} images of 8x8 pixels as {image_size}x{image_size}",),
        in_memory=True,
    )


DARK = 2**15  # of 65535: a picture of 16 bits that goes no further has values of 15 bits or fewer, or signs


class Survey(NamedTuple):
    """A folder of images: the files of images with their facts, and the names of what else lies there."""

    root: Path
    names: list  # relative posix paths, sorted
    facts: list
    others: list  # relative posix paths, sorted
    closed: int  # folders that may not be read

    def faults(self, image_size):
        """Why each image is left out at a size, a key of `pictures.FAULTS`; "" for those that are kept."""
        return [one.fault or (TOO_SMALL if min(one.width, one.height) < image_size else "") for one in self.facts]

    def strangers(self):
        """What is not read, in words: how many files of which suffix."""
        kinds = Counter(f"{suffix} files" if (suffix := Path(name).suffix.lower()) else "files without a suffix"
                        for name in self.others)
        kinds += Counter({"folders that may not be read": self.closed})
        return most_first(kinds)

    def unread(self):
        """The pictures of formats that are not read: name -> format."""
        kinds = {name: pictures.UNREAD.get(Path(name).suffix.lower(), "") for name in self.others}
        kinds |= {name: one.fault for name, one in zip(self.names, self.facts, strict=True)}
        return {name: kind for name, kind in kinds.items() if kind in pictures.CONVERTIBLE}

    def dark(self, image_size):
        """The images of more than 8 bits a channel that use no more than half of their range: name -> the largest value."""
        return {name: one.reach for name, one, fault in zip(self.names, self.facts, self.faults(image_size), strict=True)
                if not fault and 0 < one.reach < DARK}

    def remarks(self, image_size):
        """What a person must know who trains on this folder, in lines."""
        unread, dark, lines = self.unread(), self.dark(image_size), []
        if unread:
            verb = "picture is" if len(unread) == 1 else "pictures are"
            lines.append(f"{len(unread):,} {verb} not read ({most_first(Counter(unread.values()))}): {pictures.CONVERT}")
        if dark:
            most = max(dark.values())
            bits = most.bit_length()
            lines.append(f"images with more than 8 bits a channel ({len(dark):,}) reach only {most} of 65535, as values of "
                         f"{bits} bits do, and are learned at {most / 65535:.1%} of white: multiply their values by "
                         f"{2**(16 - bits)}")
        return lines


def survey(path, example="data/cats"):
    """The Survey of a folder and its sub-folders; each file is read once and for all runs.

    Raises ValueError, with an example of what to write, where there is no folder.
    """
    root = expanded(str(path))
    if not root.is_dir():
        raise ValueError(f"image folder {os.path.abspath(root)!r} {'is a file' if root.exists() else 'does not exist'}; "
                         f"give the path of a folder that holds images: {example}")
    names, others, closed = find_images(root)
    return Survey(root, names, scan_files(root, names), others, closed)


# Small networks drew copies of 300 faces, now and then of 3,000, and hardly of 30,000 (Somepalli et al. 2023); with another
# measure, Kadkhodaie et al. 2024 found copies up to about 1,000 and none at 100,000. Rules of thumb: other images differ.
FEWEST, FEW, ENOUGH = 300, 3000, 30000
DAMAGE = ("empty", "no image", "truncated", "broken", "not readable")
MOST_DAMAGE = 0.1  # share of the files: more is a copy that went wrong


def fitness(kept, files=0, damaged=0):
    """(why images are not fit to train on, what to look at): lines, by how many are kept, and how many files are damaged."""
    not_fit, warnings = [], []
    if kept < FEWEST:
        not_fit.append(f"{spec.counted(kept, 'image is', 'images are')} too few: a network draws copies of its training images "
                       f"where it has {FEWEST} or less; find more, or start from a run on similar images with "
                       "--config.train.init_from=runs/OTHER")
    elif kept < FEW:
        warnings.append(f"{kept:,} images are few, and some will be copied: set data.flip, data.augment=0.12 or "
                        "model.dropout=0.2, and watch eval/copying")
    if damaged > MOST_DAMAGE * files:
        not_fit.append(f"{damaged:,} of {spec.counted(files, 'file is', 'files are')} damaged: bring the folder here again")
    elif damaged:
        warnings.append(f"{spec.counted(damaged, 'file is', 'files are')} damaged, and left out")
    return not_fit, warnings


def verdict(not_fit, warnings):
    """What `fitness` found, as lines for people."""
    return [*(f"not fit: {line}" for line in not_fit), *(f"look at: {line}" for line in warnings)]


def no_image(root, strangers):
    """Words for a folder without a file that is named as an image's; `strangers` says in words what it holds instead."""
    return (f"no image in {str(root)!r} (found {strangers or 'nothing'}); read is {', '.join(SUFFIXES)}; "
            f"{pictures.CONVERT} what is a picture")


def folder(image_size, channels, matte, *, path):
    """Every image in a folder and its sub-folders, in the order of their relative paths.

    Ones that `pictures` refuses and ones whose shorter side is below `image_size` are left out and named in the notes.
    First-level sub-folders are classes if no image lies beside them. Raises ValueError where no image is left.
    """
    found = survey(path, "--config.data.source=\"folder(path='data/cats')\"")
    root, names, strangers = found.root, found.names, found.strangers()
    if not names:
        raise ValueError(no_image(root, strangers))
    faults = found.faults(image_size)
    kept = [i for i, fault in enumerate(faults) if not fault]
    said = left_out(names, faults)
    if not kept:
        remedy = f"use an image_size below {image_size}" if TOO_SMALL in faults else "use other files"
        raise ValueError(f"none of the {len(names)} images in {str(root)!r} can be used: {'; '.join(said)}; {remedy}")
    notes = [f"folder {root}: {len(kept)} of {len(names)} images kept", *said]
    notes += verdict(*fitness(len(kept), len(names), sum(fault in DAMAGE for fault in faults)))
    notes += [f"not read: {strangers}"] if strangers else []
    notes += found.remarks(image_size)
    names, facts = [names[i] for i in kept], [found.facts[i] for i in kept]
    labels, classes = classes_of(names)
    if classes:
        tops = Counter(labels)
        number = spec.counted(len(classes), "class", "classes")
        notes.append(f"{number}: {shortened([f'{name} ({tops[k]})' for k, name in enumerate(classes)])}")
    alike, blank = near_duplicates(root, facts), sum(one.blank for one in facts)
    doubtful = [f"{sum(map(len, alike))} in {spec.counted(len(alike), 'group')} of near-duplicates"] if alike else []
    doubtful += [f"{blank} of one colour"] if blank else []
    if doubtful:
        notes.append(f"kept, but look at them with python -m ddpm.doctor {shortened([str(root)])}: {', '.join(doubtful)}")
    return Source(
        fetch=partial(fetch_file, root, names, image_size, channels, matte),
        length=len(names),
        image_shape=(channels, image_size, image_size),
        fingerprint=fingerprint("folder", PREPROCESSING, image_size, channels, matte, names, list(map(content_of, facts))),
        labels=labels,
        classes=classes,
        notes=tuple(notes),
        alike=alike,
    )


def content_of(one):
    """What stands for the content of a file in a fingerprint, by its Facts: other where its pixels are others than before."""
    return f"{one.digest} {SRGB} {one.done}" if one.done else one.digest


def classes_of(names):
    """Class numbers of images by their first-level sub-folders, and those folders' names; None both where one lies beside."""
    if not all("/" in name for name in names):
        return None, None
    tops = [name.split("/")[0] for name in names]
    classes = sorted(set(tops))
    numbers = {name: number for number, name in enumerate(classes)}
    return [numbers[top] for top in tops], classes


def near_duplicates(root, facts):
    """Groups of near-duplicates among images of a folder, tuples of their numbers; remembered until the images are others.

    What has the same bytes is compared once, and what is of one colour is like nothing.
    """
    content = fingerprint([(one.digest, one.trace) for one in facts], likeness.ALIKE)
    name = f"alike/{fingerprint(os.path.realpath(root))}"
    known = cache.recalled(name)
    if known.get("content") != content:
        same = {}
        for number, one in enumerate(facts):
            same.setdefault(one.digest, []).append(number)
        firsts = [numbers[0] for numbers in same.values() if not facts[numbers[0]].blank]
        near = likeness.groups(np.array([facts[number].likeness for number in firsts]))
        joined = [[number for k in group for number in same[facts[firsts[k]].digest]] for group in near]
        alone = {number for group in joined for number in group}
        joined += [numbers for numbers in same.values() if len(numbers) > 1 and numbers[0] not in alone]
        known = {"content": content, "groups": sorted(sorted(group) for group in joined)}
        with cache.remembered(name) as kept:  # nobody waits for the comparing
            kept.update(known)
    return tuple(map(tuple, known["groups"]))


def across(alike, held_out):
    """How many of the held-out images have a near-duplicate that is learned from."""
    held_out = set(map(int, held_out))
    return sum(len(held) for group in alike if len(held := held_out & set(group)) < len(group))


def torchvision_set(image_size, channels, matte, *, name, root="data", split="", only=""):
    """A set of `torchvision.datasets` by its class name, downloaded below `root` where it is not there yet.

    `split` is the set's own word ("train", "test", ...; empty for its default), `only` the one class to keep, for
    OxfordIIITPet also 'cats' or 'dogs'. Raises ValueError for an unknown name and where a download is not possible.
    """
    found = open_torchvision(name, expanded(root), split)
    reports = scan(partial(examine_item, found, image_size), range(len(found)), f"reading {name}")
    classes = class_names(found, reports)
    chosen = pick(name, reports, classes, only) if only else list(range(len(reports)))
    if all(reports[i].fault == TOO_SMALL for i in chosen):  # a set of small images, such as MNIST at 32 pixels
        kept, faults = chosen, [f"all images are below {image_size} pixels and are enlarged"]
    else:
        kept = [i for i in chosen if not reports[i].fault]
        faults = left_out([f"image {i}" for i in chosen], [reports[i].fault for i in chosen])
    if not kept:
        raise ValueError(f"no image of torchvision set {name!r} can be used: {'; '.join(faults)}; load it afresh")
    labels = [reports[i].label for i in kept]
    if only and classes:
        left = sorted(set(labels))
        classes, labels = [classes[label] for label in left], [left.index(label) for label in labels]
    digests = [reports[i].digest for i in kept]
    return Source(
        fetch=partial(fetch_item, found, kept, image_size, channels, matte),
        length=len(kept),
        image_shape=(channels, image_size, image_size),
        fingerprint=fingerprint("torchvision", PREPROCESSING, image_size, channels, matte, digests),
        labels=labels if classes else None,
        classes=classes,
        notes=(f"torchvision {name}: {len(kept)} of {len(found)} images kept", *faults, *verdict(*fitness(len(kept)))),
    )


def streaming(image_size, channels, matte, *, path, remote="", cache_limit="", image="image", label=""):
    """Shards that MosaicML Streaming wrote, in the folder `path`: for images beyond one disk or machine.

    What is not there is brought from `remote` (a folder, s3://, gs://, ...) when it is first asked for; with a `cache_limit`
    ("200gb") what came first goes again. The column `image` holds contents of image files, pictures or uint8 arrays [h, w] and
    [h, w, c]; `label`, if given, class numbers or names, all read once. Images are not looked at beforehand: smaller ones are
    enlarged. Raises ValueError where that is not so, and at an image that cannot be read.
    """
    from ddpm.shards import Shards  # its library is optional, and seconds of start-up

    shards = Shards(str(path), remote if DOWNLOADS.get() else "", cache_limit)
    for name in (image, label) if label else (image,):
        if name not in shards.columns:
            raise ValueError(f"the shards in {str(path)!r} have no column {name!r}{spec.suggest(name, shards.columns)}; choose "
                             f"image= and label= of {', '.join(shards.columns) or 'none'}")
    shape = (channels, image_size, image_size)
    fetch = partial(fetch_sample, shards, image, image_size, channels, matte)
    fetch(0)
    labels, classes = labels_of(shards, label) if label else (None, None)
    return Source(
        fetch=fetch,
        length=len(shards),
        image_shape=shape,
        fingerprint=fingerprint("streaming", PREPROCESSING, SRGB, shape, matte, image, label, shards.digest),
        labels=labels,
        classes=classes,
        notes=(f"streaming {path}: {len(shards)} images in {len(shards.sizes)} shards{f' of {remote}' if remote else ''}",
               *verdict(*fitness(len(shards)))),
    )


def labels_of(shards, column):
    """Class numbers of all samples by a column of numbers or names, and the classes' names; remembered once they are read."""
    with cache.remembered(f"labels/{fingerprint(shards.digest, column)}") as known:
        if "labels" not in known:
            found = scan(lambda index: shards[index][column], range(len(shards)), f"reading {column!r}")
            known["labels"] = [one if isinstance(one, str) else int(one) if isinstance(one, (int, np.integer)) else None
                               for one in found]
        given = known["labels"]
    kinds = {type(one) for one in given}
    if kinds == {str}:
        classes = sorted(set(given))
        numbers = {name: number for number, name in enumerate(classes)}
        return [numbers[name] for name in given], classes
    if kinds != {int} or min(given) < 0:
        raise ValueError(f"the column {column!r} holds no labels; give one of numbers from 0 on, or of names")
    return given, [str(number) for number in range(max(given) + 1)]


def find_images(root):
    """Below `root` the files of images and the others, as sorted relative posix paths, and how many folders may not be read.

    Hidden files and folders are passed over; links are followed, but no folder is entered twice.
    """
    names, others, entered, closed = [], [], {os.path.realpath(root)}, []
    for base, folders, files in os.walk(root, onerror=closed.append, followlinks=True):
        candidates = sorted(filter(visible, folders), reverse=True)
        places = {os.path.realpath(os.path.join(base, name)): name for name in candidates}
        folders[:] = sorted(name for place, name in places.items() if place not in entered)
        entered.update(places)
        for file in filter(visible, files):
            kind = names if os.path.splitext(file)[1].lower() in SUFFIXES else others
            kind.append(Path(base, file).relative_to(root).as_posix())
    return sorted(names), sorted(others), len(closed)


def visible(name):
    """Whether a name is neither hidden nor the shadow folder that macOS packs into archives."""
    return not name.startswith(".") and name != "__MACOSX"


def scan(examine, items, title):
    """`[examine(item) for item in items]` in threads, with a progress bar on a terminal."""
    with ThreadPool() as pool:
        work = pool.imap(examine, items, chunksize=8)
        return list(tqdm(work, title, len(items), leave=False, disable=None, unit=" images"))


def scan_files(root, names):
    """The Facts of each file below a folder; one that could be read, and that nobody has touched since, is not read again."""
    with cache.remembered(f"files/{fingerprint(SCAN, PREPROCESSING, PIL.__version__, os.path.realpath(root))}") as known:
        stamps = {name: stamp(root / name) for name in names}
        new = [name for name in names if not (stamps[name] and known.get(name, [""])[0] == stamps[name]
                                              and Facts(*known[name][1:]).fault != PASSING)]
        read = scan(lambda name: examine(root / name), new, f"reading {shortened([str(root)])}")
        known.update({name: [stamps[name], *facts] for name, facts in zip(new, read, strict=True)})
        for name in known.keys() - stamps.keys():
            del known[name]
    return [Facts(*known[name][1:]) for name in names]


def stamp(path):
    """What changes when a file is written to, or another takes its place; None where it cannot be said."""
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    except OSError:
        return None


def examine_item(found, image_size, index):
    """Read and hash one image of a torchvision set."""
    try:
        image, target = found[index]
        content = f"{image.mode} {image.size}".encode() + image.tobytes()
        _, done = pictures.plain(image)
        content += f" {SRGB} {done}".encode() if done else b""
    except Exception as error:
        if pictures.is_ours(error):
            raise
        return Report(fault="broken")
    category, *species = target if isinstance(target, tuple) else (target,)
    return Report(
        digest=hashlib.sha256(content).hexdigest(),
        fault=TOO_SMALL if min(image.size) < image_size else "",
        label=int(category) if isinstance(category, (int, np.integer)) else -1,
        species=PETS[species[0]] if species else "",
    )


def left_out(names, faults):
    """One line per fault: how many images have it, and all of them by name."""
    found = {}
    for name, fault in zip(names, faults, strict=True):
        if fault:
            found.setdefault(fault, []).append(name)
    return [f"left out {len(names)} {fault}: {shortened(names, len(names))}" for fault, names in sorted(found.items())]


def shortened(names, most=5):
    """The first few names and how many more there are, on one line and safe to print on any terminal."""
    text = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def most_first(counts):
    """Counts of kinds in words, the largest first."""
    return shortened([f"{counts[kind]} {kind}" for kind in sorted(counts, key=lambda kind: (-counts[kind], kind))])


def fingerprint(*parts):
    """Sha256 in hex over anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def take(pixels, index):
    """A copy of the image at an index of an array [n, c, h, w], or of a batch at an array of indices."""
    return torch.from_numpy(pixels.take(index, axis=0))


def fetch_file(root, names, image_size, channels, matte, index):
    """Image `index` of a folder; raises ValueError for a file that is no longer what it was when the folder was read."""
    try:
        return decode_file(root / names[index], image_size, channels, matte)
    except Refused as error:
        raise ValueError(f"{shortened([str(root / names[index])])} could be read before, and now is {error}; bring it back, or "
                         "run again to leave it out") from None


def fetch_item(found, kept, image_size, channels, matte, index):
    """Image `index` of those kept of a torchvision set."""
    image = found[kept[index]][0]
    return to_pixels(image, image_size, channels, matte, image.size)


def fetch_sample(shards, column, image_size, channels, matte, index):
    """Image `index` of shards; raises ValueError where their column holds none."""
    sample = shards[index]
    try:
        value = sample[column]
        if isinstance(value, bytes):
            return decode_file(io.BytesIO(value), image_size, channels, matte)
        if not isinstance(value, (np.ndarray, Image.Image)):
            raise Refused("no image", type(value).__name__)
        return decode(Image.fromarray(value) if isinstance(value, np.ndarray) else value, image_size, channels, matte)
    except Exception as error:
        if pictures.is_ours(error):
            raise
        raise ValueError(f"column {column!r} of sample {index} in {shards.folder} is no image that can be read "
                         f"({type(error).__name__}); name another column by image=, or write the shards anew") from None


def open_torchvision(name, root, split):
    """The torchvision set `name` as it lies below `root`, else downloaded to there."""
    spec.check_choice("torchvision set", name, list(TORCHVISION))
    from torchvision import datasets  # a second of start-up that other sources need not pay

    make = getattr(datasets, name)
    knobs = inspect.signature(make).parameters
    arguments = {"root": str(root)}
    if "train" in knobs:
        arguments["train"] = spec.check_choice(f"split of {name}", split or "train", ["train", "test"]) == "train"
    elif split and "split" not in knobs:
        raise ValueError(f"torchvision set {name!r} has no splits; leave split={split!r} away")
    elif split:
        arguments["split"] = split
    if name == "OxfordIIITPet":
        arguments["target_types"] = ["category", "binary-category"]
    try:
        return make(**arguments, download=False)
    except (RuntimeError, OSError):  # not there, or not whole
        if not DOWNLOADS.get():
            raise ValueError(f"torchvision set {name!r} is not in {str(root / TORCHVISION[name])!r}") from None
    try:
        return make(**arguments, download=True)
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        place = Path(os.path.abspath(root), TORCHVISION[name])
        with contextlib.suppress(OSError):
            root.rmdir()  # which the attempt may have made; not if anything is in it
        raise ValueError(
            f"torchvision set {name!r} is not in {str(place)!r} and cannot be downloaded ({cause}); "
            f"download {address(make)} elsewhere and put its files there, or run once where there is a network"
        ) from None


def address(make):
    """Where a torchvision set comes from: the first web address that its class names, else its page in the manual."""
    found, looked = "", list(vars(make).values())
    while looked and not found:
        item = looked.pop(0)
        looked += item.values() if isinstance(item, dict) else item if isinstance(item, (list, tuple)) else ()
        found = item if isinstance(item, str) and item.startswith(("https://", "http://")) else ""
    return found or f"what https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.{make.__name__}.html names"


DOWNLOADS = contextvars.ContextVar("DOWNLOADS", default=True)


@contextlib.contextmanager
def without_downloads():
    """Inside, a source whose data are not on this machine raises ValueError instead of downloading them."""
    before = DOWNLOADS.set(False)
    try:
        yield
    finally:
        DOWNLOADS.reset(before)


def class_names(found, reports):
    """The names of a torchvision set's classes, their numbers where it gives no names, None where it has no labels."""
    most = max(report.label for report in reports)
    names = getattr(found, "classes", None) or range(most + 1)
    return [str(name[0] if isinstance(name, tuple) else name) for name in names] if most >= 0 else None


def pick(name, reports, classes, only):
    """The indices of the images whose class, or species, is called `only`, in any case; 'cats' is 'cat'."""
    choices = [word.lower() for word in classes or []] + (list(PETS) if name == "OxfordIIITPet" else [])
    word = only.lower() if only.lower() in choices else only.lower().removesuffix("s")
    spec.check_choice(f"class of {name}", word, choices)
    return [
        i for i, report in enumerate(reports)
        if report.label >= 0 and word in (classes[report.label].lower(), report.species)
    ]


def split(n, fraction, seed):
    """Hold out a fraction of n images: `(train, validation)` as sorted int64 arrays, the same for the same arguments.

    At least one image on either side where fraction > 0 and n >= 2. Raises ValueError for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"held-out fraction {fraction} is outside [0, 1); use 0 for none, or such as 0.1")
    held = min(max(round(n * fraction), 1), n - 1) if fraction > 0 else 0
    shuffled = rng.permutation(seed, "split", 0, n)
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])


def thinned(indices, most):
    """At most so many of the indices, evenly from first to last: of a folder sorted by class, all classes."""
    kept = min(len(indices), most)
    return [int(indices[k * len(indices) // kept]) for k in range(kept)]


@lru_cache(maxsize=4)  # a batch lies in one epoch, or in a few neighbours
def epoch_order(seed, n, epoch):
    return rng.permutation(seed, "order", epoch, n)


def order(seed, n, position):
    """Which of n images stands at a position of the endless sequence of epochs, each a fresh permutation of all n."""
    return int(epoch_order(seed, n, position // n)[position % n])


def batch_indices(seed, n, step, batch_size):
    """The images of a step, int64 [batch_size]: the step's share of `order`, across epochs, none dropped."""
    first = step * batch_size
    return np.array([order(seed, n, position) for position in range(first, first + batch_size)], dtype=np.int64)


def flip(batch, seed, step, indices, put=lambda tensor: tensor):
    """Mirror each image of [b, c, h, w] left to right with probability 1/2, at the address (seed, "flip", step, index).

    `indices` are the b places in the effective batch; `put(tensor)` brings what is drawn to where the batch is.
    """
    mirrored = put(rng.uniform(seed, "flip", step, indices) < 0.5)
    return torch.where(rearrange(mirrored, "b -> b 1 1 1"), batch.flip(-1), batch)


def drop(labels, share, seed, step, indices):
    """Drop each of the labels [b] with probability `share`: it becomes -1, at the address (seed, "label drop", step, index).

    `indices` are the b places in the effective batch.
    """
    return torch.where(rng.uniform(seed, "label drop", step, indices) < share, -1, labels)


def class_numbers(wanted, classes):
    """The numbers of classes that are given by name, or else by number: `("dog", "0") -> [1, 0]`, for classes cat and dog.

    Raises ValueError for one that is neither.
    """
    known = {str(number): number for number in range(len(classes))} | {name: number for number, name in enumerate(classes)}
    for one in wanted:
        if str(one) not in known:
            raise ValueError(f"unknown class {one!r}{spec.suggest(one, classes)}; choose one of {shortened(list(classes))}, or "
                             f"a number from 0 to {len(classes) - 1}")
    return [known[str(one)] for one in wanted]


def part(source, indices):
    """The source of some of a source's images."""
    indices = [int(index) for index in indices]
    return replace(
        source, fetch=partial(fetch_part, source.fetch, indices), length=len(indices), notes=(), in_memory=False, alike=(),
        labels=[source.labels[index] for index in indices] if source.labels else None,
        fingerprint=fingerprint("part", source.fingerprint, indices))


def fetch_part(fetch, indices, index):
    return fetch(indices[index])


class Same:
    """What must not change of the data at `source` while a run goes on: a checkpoint part that is compared, not loaded."""

    def __init__(self, source, **facts):
        self.source, self.facts = source, facts

    def state_dict(self):
        return dict(self.facts)

    def load_state_dict(self, state):
        if changes := self.changes(state):
            raise ValueError(f"the data of this run have changed since its checkpoint ({changes}); bring them back, say where "
                             "they are now by --config.data.source, or begin a new run with --workdir and "
                             "--config.train.init_from")

    def changes(self, state):
        """What is another than in a state, in words: a fingerprint where nothing else is, and nothing where all is the same."""
        found = [f"{name} were {in_words(state.get(name))}, are {in_words(fact)}"
                 for name, fact in self.facts.items() if state.get(name) != fact and name != "fingerprint"]
        was, now = state.get("fingerprint"), self.facts["fingerprint"]
        found = found if found or was == now else [f"fingerprint was {str(was)[:12]}, is {now[:12]}"]
        return "; ".join([f"in {self.source}", *found]) if found else ""


def in_words(fact):
    """A number, or a list of names in brackets."""
    return f"({shortened(list(fact), 20)})" if isinstance(fact, (list, tuple)) else fact


class Batches(torch.utils.data.Dataset):
    """A source by lists of indices: uint8 [b, c, h, w] and labels int64 [b], -1 where there are none."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, indices):
        labels = self.source.labels
        return self.source.batch(indices), torch.tensor([labels[index] if labels else -1 for index in indices])


def loader(source, batches, num_workers=0, pin_memory=False):
    """Iterate once over an iterable of index lists: (uint8 [b, c, h, w], int64 labels [b], -1 where there are none).

    The batches are the same for any number of workers, and torch's global generator is left alone. What is in memory needs no
    workers: they would only carry it from process to process.
    """
    num_workers = 0 if source.in_memory else num_workers
    running = load(source, batches, num_workers, pin_memory)
    if num_workers:  # workers that ignore SIGTERM would hold up the end of a process that left a loader standing
        atexit.register(close_if_alive, weakref.ref(running))
    return running


def load(source, batches, num_workers, pin_memory):
    yield from torch.utils.data.DataLoader(
        Batches(source),
        sampler=batches,
        batch_size=None,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_the_trainer,
        generator=torch.Generator(),
    )


def close_if_alive(reference):
    running = reference()
    if running is not None:
        running.close()


def leave_signals_to_the_trainer(worker):
    """Let a worker outlive Ctrl-C and a scheduler's SIGTERM or SIGUSR1, which reach the whole group: the trainer saves first.

    The second SIGTERM counts: it comes from the trainer, which has asked before by the usual way.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))


class ImageDataset(torch.utils.data.Dataset):
    """Float images [3, image_size, image_size] in [-1, 1] from a folder, or "digits", for a training loop of one's own.

    With `augment` images are mirrored at random by torch's generator. Raises ValueError as `folder` and `digits` do.
    """

    def __init__(self, data_dir, image_size, augment=False):
        text = "digits" if str(data_dir) == "digits" else f"folder(path={str(data_dir)!r})"
        self.source = open_source(text, image_size, 3)
        self.augment = augment

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image = images.encode(self.source[index])
        return image.flip(-1) if self.augment and torch.rand(()) < 0.5 else image


PETS = ("cat", "dog")  # OxfordIIITPet's binary category, in its order

# torchvision class -> the folder below `root` where it looks for its files.
TORCHVISION = {
    "CIFAR10": "cifar-10-batches-py",
    "CIFAR100": "cifar-100-python",
    "MNIST": "MNIST/raw",
    "FashionMNIST": "FashionMNIST/raw",
    "KMNIST": "KMNIST/raw",
    "USPS": ".",
    "SVHN": ".",
    "STL10": "stl10_binary",
    "Imagenette": "imagenette2",
    "Flowers102": "flowers-102",
    "OxfordIIITPet": "oxford-iiit-pet",
    "CelebA": "celeba",
    "Food101": "food-101",
    "FGVCAircraft": "fgvc-aircraft-2013b",
    "DTD": "dtd",
    "EuroSAT": "eurosat",
    "Country211": "country211",
}

# name -> f(image_size, channels, matte, **knobs) -> Source
SOURCES = {
    "digits": digits,
    "folder": folder,
    "torchvision": torchvision_set,
    "streaming": streaming,
}
