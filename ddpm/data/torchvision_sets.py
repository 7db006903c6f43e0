"""Image sets that torchvision can download."""

import contextlib
import hashlib
import inspect
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddpm.common import registry
from ddpm.common.files import expand_user
from ddpm.data import cache, decode, folder, source
from ddpm.data.limits import TOO_SMALL


class ItemInfo(NamedTuple):
    """What a scan finds in one image of a set."""

    digest: str = ""
    fault: str = ""
    label: int = -1
    species: str = ""


def torchvision_set(image_size, channels, matte, *, name, root="data", split="", only=""):
    """A set of `torchvision.datasets` by its class name, downloaded below `root` if needed.

    `split` is the set's own word ("train", "test", ...; empty for its default), `only` the one
    class to keep, for OxfordIIITPet also 'cats' or 'dogs'. Raises ValueError for an unknown name
    and where a download fails.
    """
    items = open_torchvision(name, expand_user(root), split)
    infos = cache.map_in_threads(
        partial(inspect_item, items, image_size), range(len(items)), f"reading {name}"
    )
    classes = class_names(items, infos)
    chosen = indices_of_class(name, infos, classes, only) if only else list(range(len(infos)))
    # a set of small images, such as MNIST at 32 pixels
    if all(infos[i].fault == TOO_SMALL for i in chosen):
        kept = chosen
        lines = [f"all images are below {image_size} pixels and are enlarged"]
    else:
        kept = [i for i in chosen if not infos[i].fault]
        names = [f"image {i}" for i in chosen]
        lines = source.left_out_lines(names, [infos[i].fault for i in chosen])
    if not kept:
        raise ValueError(
            f"no image of torchvision set {name!r} can be used: {'; '.join(lines)}; download it "
            "again"
        )
    labels = [infos[i].label for i in kept]
    if only and classes:
        remaining = sorted(set(labels))
        classes = [classes[label] for label in remaining]
        labels = [remaining.index(label) for label in labels]
    digests = [infos[i].digest for i in kept]
    return source.Source(
        fetch=partial(fetch_item, items, kept, image_size, channels, matte),
        length=len(kept),
        image_shape=(channels, image_size, image_size),
        fingerprint=source.fingerprint(
            "torchvision", decode.PREPROCESSING, image_size, channels, matte, digests
        ),
        labels=labels if classes else None,
        classes=classes,
        notes=(
            f"torchvision {name}: {len(kept):,} of {registry.quantity(len(items), 'image')} kept",
            *lines,
            *folder.verdict(*folder.fitness(len(kept))),
        ),
    )


def inspect_item(items, image_size, index):
    """The ItemInfo of one image of a torchvision set."""
    try:
        image, target = items[index]
        content = f"{image.mode} {image.size}".encode() + image.tobytes()
        _, conversions = decode.to_srgb_8bit(image)
    except Exception as error:
        if decode.is_our_fault(error):
            raise
        return ItemInfo(fault="broken")
    if conversions:
        content += f" {decode.CONVERSION_VERSION} {conversions}".encode()
    label, *species = target if isinstance(target, tuple) else (target,)
    return ItemInfo(
        digest=hashlib.sha256(content).hexdigest(),
        fault=TOO_SMALL if min(image.size) < image_size else "",
        label=int(label) if isinstance(label, (int, np.integer)) else -1,
        species=PETS[species[0]] if species else "",
    )


def fetch_item(items, kept, image_size, channels, matte, index):
    """Image `index` of the kept images of a torchvision set."""
    image = items[kept[index]][0]
    return decode.to_pixels(image, image_size, channels, matte, image.size)


def open_torchvision(name, root, split):
    """The torchvision set `name` in the folder `root`, downloaded if it is not there."""
    registry.check_choice("torchvision set", name, list(FOLDERS))
    from torchvision import datasets  # a second of start-up that other sources need not pay

    make = getattr(datasets, name)
    options = inspect.signature(make).parameters
    arguments = {"root": str(root)}
    if "train" in options:
        part = registry.check_choice(f"split of {name}", split or "train", ["train", "test"])
        arguments["train"] = part == "train"
    elif split and "split" not in options:
        raise ValueError(f"torchvision set {name!r} has no splits; leave out split={split!r}")
    elif split:
        arguments["split"] = split
    if name == "OxfordIIITPet":
        arguments["target_types"] = ["category", "binary-category"]
    try:
        return make(**arguments, download=False)
    except (RuntimeError, OSError):  # missing or incomplete
        if not source.DOWNLOADS.get():
            raise ValueError(
                f"torchvision set {name!r} is not in {str(root / FOLDERS[name])!r}"
            ) from None
    try:
        return make(**arguments, download=True)
    except Exception as error:
        cause = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        place = Path(os.path.abspath(root), FOLDERS[name])
        with contextlib.suppress(OSError):
            root.rmdir()  # which the attempt may have made; fails if anything is in it
        raise ValueError(
            f"torchvision set {name!r} is not in {str(place)!r} and cannot be downloaded "
            f"({cause}); download {download_address(make)} elsewhere and put its files there, or "
            "run once where there is a network"
        ) from None


def download_address(make):
    """The first web address in the class of a torchvision set, else its page in the manual."""
    queue = list(vars(make).values())
    while queue:
        item = queue.pop(0)
        if isinstance(item, str) and item.startswith(("https://", "http://")):
            return item
        if isinstance(item, (list, tuple, dict)):
            queue += item.values() if isinstance(item, dict) else item
    page = f"https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.{make.__name__}"
    return f"what {page}.html names"


def class_names(items, infos):
    """The names of a set's classes, or their numbers if they have no names; None without labels."""
    largest = max(info.label for info in infos)
    if largest < 0:
        return None
    names = getattr(items, "classes", None) or range(largest + 1)
    return [str(name[0] if isinstance(name, tuple) else name) for name in names]


def indices_of_class(name, infos, classes, only):
    """The indices of images of the class or species `only`, in any case; 'cats' means 'cat'."""
    choices = [word.lower() for word in classes or []]
    choices += PETS if name == "OxfordIIITPet" else ()
    word = only.lower() if only.lower() in choices else only.lower().removesuffix("s")
    registry.check_choice(f"class of {name}", word, choices)
    return [
        i
        for i, info in enumerate(infos)
        if info.label >= 0 and word in (classes[info.label].lower(), info.species)
    ]


PETS = ("cat", "dog")  # OxfordIIITPet's binary category, in its order

# torchvision class -> the folder below `root` where it looks for its files.
FOLDERS = {
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
