"""Datasets as pure functions `index -> uint8 image [c, h, w]`, and the addresses at which training reads them.

A source knows its labels, a fingerprint of its content and what a person should read about it in the log. Nothing here
is random: order, held-out split and flips are functions of (seed, step, index), read through `ddpm.rng`, so that a
resumed run, another number of workers or another number of GPUs sees the same images.
"""

import atexit
import contextlib
import hashlib
import inspect
import io
import json
import os
import signal
import warnings
import weakref
from collections import Counter, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import PIL
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image
from tqdm import tqdm

from ddpm import cache, images, rng, spec

WHITE = (255, 255, 255)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
PREPROCESSING = "square crop, bicubic, 1"  # in every fingerprint: count it up when the same file gives other pixels
TOO_SMALL = "too small"

Report = namedtuple("Report", "digest fault label species", defaults=("", "", -1, ""))  # what a scan says of one image

# PIL warns on stderr of oddities in files that it reads all the same; what is left out stands in a source's notes.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset: `source[i]` is a uint8 tensor [c, h, w] and always the same one.

    `labels` holds a class number per image or is None, `classes` their names or None; `fingerprint` (sha256 in hex) is
    the same wherever the content, size and preprocessing are; `notes` are lines for the log. Where the images are `in_memory`,
    `fetch` takes an array of indices too, for a batch.
    """

    fetch: Callable
    length: int
    image_shape: tuple
    fingerprint: str
    labels: list | None = None
    classes: list | None = None
    notes: tuple = ()
    in_memory: bool = False

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


def folder(image_size, channels, matte, *, path):
    """Every image in a folder and its sub-folders, in the order of their relative paths.

    Each file is read here, once and for all runs: unreadable ones and ones whose shorter side is below `image_size` are left
    out and named in the notes. First-level sub-folders are classes if no image lies beside them. Raises ValueError where no
    image is left.
    """
    root = Path(str(path)).expanduser()
    if not root.is_dir():
        fault = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"image folder {str(root)!r} {fault}; give the path of a folder that holds images")
    names, others = find_images(root)
    strangers = shortened([f"{others[kind]} {kind}" for kind in sorted(others, key=lambda kind: (-others[kind], kind))])
    if not names:
        raise ValueError(f"no image in {str(root)!r} (found {strangers or 'nothing'}); read is {', '.join(SUFFIXES)}")
    reports = examine(root, names, image_size)
    kept = [i for i, report in enumerate(reports) if not report.fault]
    faults = left_out(names, reports)
    if not kept:
        small = any(report.fault == TOO_SMALL for report in reports)
        remedy = f"use an image_size below {image_size}" if small else "use other files"
        raise ValueError(f"none of the {len(names)} images in {str(root)!r} can be used: {'; '.join(faults)}; {remedy}")
    notes = [f"folder {root}: {len(kept)} of {len(names)} images kept", *faults]
    notes += [f"not read: {strangers}"] if others else []
    names, digests = [names[i] for i in kept], [reports[i].digest for i in kept]
    labels = classes = None
    if all("/" in name for name in names):
        tops = Counter(name.split("/")[0] for name in names)
        classes = sorted(tops)
        numbers = {name: number for number, name in enumerate(classes)}
        labels = [numbers[name.split("/")[0]] for name in names]
        notes.append(f"{len(classes)} classes: {shortened([f'{name} ({tops[name]})' for name in classes])}")
    return Source(
        fetch=partial(fetch_file, root, names, image_size, channels, matte),
        length=len(names),
        image_shape=(channels, image_size, image_size),
        fingerprint=fingerprint("folder", PREPROCESSING, image_size, channels, matte, names, digests),
        labels=labels,
        classes=classes,
        notes=tuple(notes),
    )


def torchvision_set(image_size, channels, matte, *, name, root="data", split="", only=""):
    """A set of `torchvision.datasets` by its class name, downloaded below `root` where it is not there yet.

    `split` is the set's own word ("train", "test", ...; empty for its default), `only` the one class to keep, for
    OxfordIIITPet also 'cats' or 'dogs'. Raises ValueError for an unknown name and where a download is not possible.
    """
    found = open_torchvision(name, Path(root).expanduser(), split)
    reports = scan(partial(examine_item, found, image_size), range(len(found)), f"reading {name}")
    classes = class_names(found, reports)
    chosen = pick(name, reports, classes, only) if only else list(range(len(reports)))
    if all(reports[i].fault == TOO_SMALL for i in chosen):  # a set of small images, such as MNIST at 32 pixels
        kept, faults = chosen, [f"all images are below {image_size} pixels and are enlarged"]
    else:
        kept = [i for i in chosen if not reports[i].fault]
        faults = left_out([f"image {i}" for i in chosen], [reports[i] for i in chosen])
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
        notes=(f"torchvision {name}: {len(kept)} of {len(found)} images kept", *faults),
    )


def streaming(image_size, channels, matte, *, path, remote="", cache_limit="", image="image", label=""):
    """Shards that MosaicML Streaming wrote, in the folder `path`: for images beyond one disk or machine.

    What is not there is brought from `remote` (a folder, s3://, gs://, ...) when it is first asked for; with a `cache_limit`
    ("200gb") what came first goes again. The column `image` holds contents of image files, pictures or uint8 arrays [h, w] and
    [h, w, c]; `label`, if given, class numbers or names, all read once. Images are not looked at beforehand: smaller ones are
    enlarged. Raises ValueError where that is not so, and at an image that cannot be read.
    """
    from ddpm.shards import Shards  # its library is optional, and seconds of start-up

    shards = Shards(str(path), remote, cache_limit)
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
        fingerprint=fingerprint("streaming", PREPROCESSING, shape, matte, image, label, shards.digest),
        labels=labels,
        classes=classes,
        notes=(f"streaming {path}: {len(shards)} images in {len(shards.sizes)} shards{f' of {remote}' if remote else ''}",),
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


def decode_file(file, image_size, channels, matte=WHITE):
    """Read an image file (path or open file) upright, its first frame, as uint8 [channels, image_size, image_size].

    Raises what PIL raises, and ValueError for pixels without an agreed range.
    """
    with Image.open(file) as image:
        return decode(image, image_size, channels, matte)


def decode(image, image_size, channels, matte):
    """A PIL image, whose pixels may not have been loaded yet -> uint8 [channels, image_size, image_size], upright.

    JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves twice what is needed: a photo of 11 megapixels
    costs a fifth, and pixels hardly change.
    """
    reduced = image.draft(None, (2 * image_size, 2 * image_size))
    image.load()
    extent = reduced[1][2:] if reduced else image.size
    return to_pixels(image, image_size, channels, matte, extent, orientation_of(image))


def orientation_of(image):
    """A PIL image's EXIF orientation, 1 to 8; 1 is upright."""
    try:
        return image.getexif().get(ORIENTATION, 1)
    except Exception:  # a broken EXIF block does not make a picture unreadable
        return 1


def open_picture(path, image_size, channels, matte=WHITE):
    """Read a picture that a person names as `decode_file` does: (uint8 [channels, image_size, image_size], (width, height)).

    Width and height are those of the upright picture. Raises ValueError where it is missing or cannot be read.
    """
    try:
        with Image.open(path) as image:
            size = image.size[::-1] if orientation_of(image) >= 5 else image.size
        return decode_file(path, image_size, channels, matte), size
    except FileNotFoundError:
        raise ValueError(f"there is no picture {str(path)!r}; give the path of an image file") from None
    except Exception as error:  # PIL's plugins raise OSError, SyntaxError, struct.error, ValueError, DecompressionBombError ...
        raise ValueError(f"cannot read {str(path)!r} as a picture ({type(error).__name__}); give another file, one of "
                         f"{', '.join(SUFFIXES)}") from None


def to_pixels(image, image_size, channels, matte, extent, orientation=1):
    """A PIL image of any mode -> uint8 [channels, image_size, image_size]: converted, cropped, resized and turned.

    `extent` is its width and height: a reduced JPEG ends within its last pixel, and half of one is a visible shift.
    The filter is bicubic with antialiasing, as clean-fid's (Parmar et al. 2022): Lanczos rings more at hard edges.
    """
    side = min(extent)
    left, top = ((length - side) / 2 for length in extent)
    if side == image_size:  # a crop alone must not blur: whole pixels
        left, top = int(left), int(top)
    box = (left, top, left + side, top + side)
    image = in_mode(image, channels, matte).resize((image_size, image_size), Image.Resampling.BICUBIC, box=box)
    image = image.transpose(TURNS[orientation]) if orientation in TURNS else image
    pixels = torch.from_numpy(np.array(image))
    return rearrange(pixels, "h w -> 1 h w" if channels == 1 else "h w c -> c h w").contiguous()


def in_mode(image, channels, matte):
    """The PIL image in the mode of that many channels: 16 bits scaled to 8, transparency laid over `matte` or kept."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit pixels have no agreed range")
        image = Image.fromarray(((values.astype(np.int32) + 128) // 257).astype(np.uint8))
    if channels in (1, 3) and image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*matte, 255))
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert(MODES[channels])


def find_images(root):
    """The image files below `root` as sorted relative posix paths, and a Counter of what else lies there.

    Hidden files and folders are passed over; links are followed, but no folder is entered twice.
    """
    names, others, entered = [], Counter(), {os.path.realpath(root)}

    def refused(error):
        others["folders that may not be read"] += 1

    for base, folders, files in os.walk(root, onerror=refused, followlinks=True):
        candidates = sorted(filter(visible, folders), reverse=True)
        places = {os.path.realpath(os.path.join(base, name)): name for name in candidates}
        folders[:] = sorted(name for place, name in places.items() if place not in entered)
        entered.update(places)
        for file in filter(visible, files):
            suffix = os.path.splitext(file)[1].lower()
            if suffix in SUFFIXES:
                names.append(Path(base, file).relative_to(root).as_posix())
            else:
                others[f"{suffix} files" if suffix else "files without a suffix"] += 1
    return sorted(names), others


def visible(name):
    """Whether a name is neither hidden nor the shadow folder that macOS packs into archives."""
    return not name.startswith(".") and name != "__MACOSX"


def scan(examine, items, title):
    """`[examine(item) for item in items]` in threads, with a progress bar on a terminal."""
    with ThreadPool() as pool:
        work = pool.imap(examine, items, chunksize=8)
        return list(tqdm(work, title, len(items), leave=False, disable=None, unit=" images"))


def examine(root, names, image_size):
    """A report on each file below a folder; one that nobody has touched since it was read last is not read again."""
    with cache.remembered(f"files/{fingerprint(PREPROCESSING, PIL.__version__, os.path.realpath(root))}") as known:
        stamps = {name: stamp(root / name) for name in names}
        new = [name for name in names if stamps[name] is None or known.get(name, [None])[0] != stamps[name]]
        read = scan(partial(examine_file, root), new, f"reading {root}")
        known.update({name: [stamps[name], *facts] for name, facts in zip(new, read, strict=True)})
        for name in known.keys() - stamps.keys():
            del known[name]

    def report(stamp, digest, side):
        return Report(digest, "unreadable" if not digest else TOO_SMALL if side < image_size else "")

    return [report(*known[name]) for name in names]


def stamp(path):
    """What changes when a file is written to, or another takes its place; None where it cannot be said."""
    try:
        status = path.stat()
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    except OSError:
        return None


def examine_file(root, name):
    """Read and decode a file: the sha256 of its content, empty where it is no image that can be read, and its shorter side."""
    try:
        content = (root / name).read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            side = min(image.size)
        decode_file(io.BytesIO(content), 1, 3)
    except Exception:  # PIL's plugins raise OSError, SyntaxError, struct.error, ValueError, DecompressionBombError ...
        return "", 0
    return hashlib.sha256(content).hexdigest(), side


def examine_item(found, image_size, index):
    """Read and hash one image of a torchvision set."""
    try:
        image, target = found[index]
        content = f"{image.mode} {image.size}".encode() + image.tobytes()
    except Exception:
        return Report(fault="unreadable")
    category, *species = target if isinstance(target, tuple) else (target,)
    return Report(
        digest=hashlib.sha256(content).hexdigest(),
        fault=TOO_SMALL if min(image.size) < image_size else "",
        label=int(category) if isinstance(category, (int, np.integer)) else -1,
        species=PETS[species[0]] if species else "",
    )


def left_out(names, reports):
    """One line per fault: how many images have it, and all of them by name."""
    faults = {}
    for name, report in zip(names, reports, strict=True):
        if report.fault:
            faults.setdefault(report.fault, []).append(name)
    return [f"left out {len(found)} {fault}: {shortened(found, len(found))}" for fault, found in sorted(faults.items())]


def shortened(names, most=5):
    """The first few names and how many more there are, safe to print on any terminal."""
    text = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return text.encode("utf-8", "replace").decode()


def fingerprint(*parts):
    """Sha256 in hex over anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def take(pixels, index):
    """A copy of the image at an index of an array [n, c, h, w], or of a batch at an array of indices."""
    return torch.from_numpy(pixels.take(index, axis=0))


def fetch_file(root, names, image_size, channels, matte, index):
    """Image `index` of a folder."""
    return decode_file(root / names[index], image_size, channels, matte)


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
        return decode(Image.fromarray(value) if isinstance(value, np.ndarray) else value, image_size, channels, matte)
    except Exception as error:  # as above, and whatever else a column may hold
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
    except (RuntimeError, OSError):
        pass  # not there, or not whole
    try:
        return make(**arguments, download=True)
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        place = root / TORCHVISION[name]
        with contextlib.suppress(OSError):
            root.rmdir()  # which the attempt may have made; not if anything is in it
        raise ValueError(
            f"torchvision set {name!r} is not in {str(place)!r} and cannot be downloaded ({cause}); "
            f"put its files there, or run once where there is a network"
        ) from None


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
            raise ValueError(f"unknown class {one!r}{spec.suggest(one, classes)}; choose of {shortened(list(classes))}, or a "
                             f"number from 0 to {len(classes) - 1}")
    return [known[str(one)] for one in wanted]


def part(source, indices):
    """The source of some of a source's images."""
    indices = [int(index) for index in indices]
    return replace(
        source, fetch=partial(fetch_part, source.fetch, indices), length=len(indices), notes=(), in_memory=False,
        labels=[source.labels[index] for index in indices] if source.labels else None,
        fingerprint=fingerprint("part", source.fingerprint, indices))


def fetch_part(fetch, indices, index):
    return fetch(indices[index])


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


ORIENTATION = 0x0112  # EXIF

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

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
