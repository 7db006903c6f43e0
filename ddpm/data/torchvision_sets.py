"""Image sets that torchvision can download."""

import contextlib
import hashlib
import inspect
import os
from functools import partial
from pathlib import Path

import numpy as np

from ddpm.common import registry
from ddpm.common.files import expand_user
from ddpm.data import cache, decode, folder, source
from ddpm.data.decode import TOO_SMALL, to_pixels


def torchvision_set(image_size, channels, matte, *, name, root="data", split="", only=""):
    """A set of `torchvision.datasets` by its class name, downloaded below `root` where it is not
    there yet.

    `split` is the set's own word ("train", "test", ...; empty for its default), `only` the one
    class to keep, for OxfordIIITPet also 'cats' or 'dogs'. Raises ValueError for an unknown name
    and where a download is not possible.
    """
    found = open_torchvision(name, expand_user(root), split)
    reports = cache.map_in_threads(
        partial(inspect_item, found, image_size), range(len(found)), f"reading {name}"
    )
    classes = class_names(found, reports)
    chosen = indices_of_class(name, reports, classes, only) if only else list(range(len(reports)))
    # a set of small images, such as MNIST at 32 pixels
    if all(reports[i].fault == TOO_SMALL for i in chosen):
        kept = chosen
        faults = [f"all images are below {image_size} pixels and are enlarged"]
    else:
        kept = [i for i in chosen if not reports[i].fault]
        faults = source.left_out_lines(
            [f"image {i}" for i in chosen], [reports[i].fault for i in chosen]
        )
    if not kept:
        raise ValueError(
            f"no image of torchvision set {name!r} can be used: {'; '.join(faults)}; load it afresh"
        )
    labels = [reports[i].label for i in kept]
    if only and classes:
        left = sorted(set(labels))
        classes = [classes[label] for label in left]
        labels = [left.index(label) for label in labels]
    digests = [reports[i].digest for i in kept]
    return source.Source(
        fetch=partial(fetch_item, found, kept, image_size, channels, matte),
        length=len(kept),
        image_shape=(channels, image_size, image_size),
        fingerprint=source.fingerprint(
            "torchvision", decode.PREPROCESSING, image_size, channels, matte, digests
        ),
        labels=labels if classes else None,
        classes=classes,
        notes=(
            f"torchvision {name}: {len(kept):,} of {registry.quantity(len(found), 'image')} kept",
            *faults,
            *folder.verdict(*folder.fitness(len(kept))),
        ),
    )


def inspect_item(found, image_size, index):
    """Read and hash one image of a torchvision set."""
    try:
        image, target = found[index]
        content = f"{image.mode} {image.size}".encode() + image.tobytes()
        _, done = decode.to_srgb_8bit(image)
        content += f" {folder.CONVERSION_VERSION} {done}".encode() if done else b""
    except Exception as error:
        if decode.is_our_fault(error):
            raise
        return source.ItemInfo(fault="broken")
    category, *species = target if isinstance(target, tuple) else (target,)
    return source.ItemInfo(
        digest=hashlib.sha256(content).hexdigest(),
        fault=TOO_SMALL if min(image.size) < image_size else "",
        label=int(category) if isinstance(category, (int, np.integer)) else -1,
        species=PETS[species[0]] if species else "",
    )


def fetch_item(found, kept, image_size, channels, matte, index):
    """Image `index` of those kept of a torchvision set."""
    image = found[kept[index]][0]
    return to_pixels(image, image_size, channels, matte, image.size)


def open_torchvision(name, root, split):
    """The torchvision set `name` as it lies below `root`, else downloaded to there."""
    registry.check_choice("torchvision set", name, list(FOLDERS))
    from torchvision import datasets  # a second of start-up that other sources need not pay

    make = getattr(datasets, name)
    options = inspect.signature(make).parameters
    arguments = {"root": str(root)}
    if "train" in options:
        arguments["train"] = (
            registry.check_choice(f"split of {name}", split or "train", ["train", "test"])
            == "train"
        )
    elif split and "split" not in options:
        raise ValueError(f"torchvision set {name!r} has no splits; leave split={split!r} away")
    elif split:
        arguments["split"] = split
    if name == "OxfordIIITPet":
        arguments["target_types"] = ["category", "binary-category"]
    try:
        return make(**arguments, download=False)
    except (RuntimeError, OSError):  # not there, or not whole
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
            root.rmdir()  # which the attempt may have made; not if anything is in it
        raise ValueError(
            f"torchvision set {name!r} is not in {str(place)!r} and cannot be downloaded "
            f"({cause}); download {source.download_address(make)} elsewhere and put its files "
            "there, or run once where there is a network"
        ) from None


def class_names(found, reports):
    """The names of a torchvision set's classes, their numbers where it gives no names, None
    where it has no labels.
    """
    most = max(report.label for report in reports)
    names = getattr(found, "classes", None) or range(most + 1)
    return (
        [str(name[0] if isinstance(name, tuple) else name) for name in names] if most >= 0 else None
    )


def indices_of_class(name, reports, classes, only):
    """The indices of the images whose class, or species, is called `only`, in any case; 'cats'
    is 'cat'.
    """
    choices = [word.lower() for word in classes or []] + (
        list(PETS) if name == "OxfordIIITPet" else []
    )
    word = only.lower() if only.lower() in choices else only.lower().removesuffix("s")
    registry.check_choice(f"class of {name}", word, choices)
    return [
        i
        for i, report in enumerate(reports)
        if report.label >= 0 and word in (classes[report.label].lower(), report.species)
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
