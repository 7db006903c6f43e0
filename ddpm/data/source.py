"""What every source of images has: pixels by index, labels, a fingerprint of its content, notes
for the log.
"""

import contextlib
import contextvars
import hashlib
import json
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ddpm.common import registry

TRANSIENT_FAULT = (
    "not readable"  # a fault of the disk or the memory, which may be gone the next time
)
SCAN_VERSION = 3  # count it up when `inspect.inspect_image` says other things of the same file

# on a torchvision image
ItemInfo = namedtuple("ItemInfo", "digest fault label species", defaults=("", "", -1, ""))


@dataclass(frozen=True, eq=False)
class Source:
    """A dataset: `source[i]` is a uint8 tensor [c, h, w], always the same for the same i.

    fetch: index -> image; with `in_memory` also an array of indices -> batch
    fingerprint: sha256 in hex of content, image size and preprocessing
    labels, classes: a class number per image and the names of the classes, or None
    notes: lines for the log
    near_duplicates: groups of indices, where the source looks for them
    """

    fetch: Callable
    length: int
    image_shape: tuple
    fingerprint: str
    labels: list | None = None
    classes: list | None = None
    notes: tuple = ()
    in_memory: bool = False
    near_duplicates: tuple = ()

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        if not 0 <= index < self.length:
            raise IndexError(f"image {index} of {self.length}")
        return self.fetch(int(index))

    def batch(self, indices: Sequence[int] | np.ndarray) -> torch.Tensor:
        """The images at some indices, uint8 [b, c, h, w]; from memory at once, which is several
        times faster.
        """
        return (
            self.fetch(np.asarray(indices))
            if self.in_memory
            else torch.stack([self[index] for index in indices])
        )


def left_out_lines(names, faults):
    """One line per fault: how many images have it, and all of them by name."""
    found = {}
    for name, fault in zip(names, faults, strict=True):
        if fault:
            found.setdefault(fault, []).append(name)
    return [
        f"left out {len(names)} {fault}: {shorten(names, len(names))}"
        for fault, names in sorted(found.items())
    ]


def shorten(names, most=5):
    """The first few names and how many more there are, on one line and safe to print on any
    terminal.
    """
    text = ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def fingerprint(*parts):
    """Sha256 in hex over anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def row(pixels, index):
    """A copy of the image at an index of an array [n, c, h, w], or of a batch at an array of
    indices.
    """
    return torch.from_numpy(pixels.take(index, axis=0))


def download_address(make):
    """Where a torchvision set comes from: the first web address that its class names, else its
    page in the manual.
    """
    found = ""
    looked = list(vars(make).values())
    while looked and not found:
        item = looked.pop(0)
        looked += (
            item.values()
            if isinstance(item, dict)
            else item
            if isinstance(item, (list, tuple))
            else ()
        )
        found = item if isinstance(item, str) and item.startswith(("https://", "http://")) else ""
    page = f"https://docs.pytorch.org/vision/stable/generated/torchvision.datasets.{make.__name__}"
    return found or f"what {page}.html names"


DOWNLOADS = contextvars.ContextVar("DOWNLOADS", default=True)


@contextlib.contextmanager
def without_downloads():
    """Inside, a source whose data are not on this machine raises ValueError instead of
    downloading them.
    """
    before = DOWNLOADS.set(False)
    try:
        yield
    finally:
        DOWNLOADS.reset(before)


def class_numbers(wanted, classes):
    """The numbers of classes that are given by name, or else by number: `("dog", "0") -> [1, 0]`,
    for classes cat and dog.

    Raises ValueError for one that is neither.
    """
    known = {str(number): number for number in range(len(classes))} | {
        name: number for number, name in enumerate(classes)
    }
    for one in wanted:
        if str(one) not in known:
            raise ValueError(
                f"unknown class {one!r}{registry.suggest(one, classes)}; choose one of "
                f"{shorten(list(classes))}, or a number from 0 to {len(classes) - 1}"
            )
    return [known[str(one)] for one in wanted]


def subset(source, indices):
    """The source of some of a source's images."""
    indices = [int(index) for index in indices]
    return replace(
        source,
        fetch=partial(fetch_subset, source.fetch, indices),
        length=len(indices),
        notes=(),
        in_memory=False,
        near_duplicates=(),
        labels=[source.labels[index] for index in indices] if source.labels else None,
        fingerprint=fingerprint("part", source.fingerprint, indices),
    )


def fetch_subset(fetch, indices, index):
    return fetch(indices[index])


class DatasetCheck:
    """What must not change of the data at `source` while a run goes on: a checkpoint part that
    is compared, not loaded.
    """

    def __init__(self, source, **facts):
        self.source = source
        self.facts = facts

    def state_dict(self):
        return dict(self.facts)

    def load_state_dict(self, state):
        if changes := self.changes(state):
            raise ValueError(
                f"the data of this run have changed since its checkpoint ({changes}); bring them "
                "back, say where they are now by --config.data.source, or begin a new run with "
                "--workdir and --config.train.init_from"
            )

    def changes(self, state):
        """What is another than in a state, in words: a fingerprint where nothing else is, and
        nothing where all is the same.
        """
        found = [
            f"{name} were {in_words(state.get(name))}, are {in_words(fact)}"
            for name, fact in self.facts.items()
            if state.get(name) != fact and name != "fingerprint"
        ]
        was = state.get("fingerprint")
        now = self.facts["fingerprint"]
        found = (
            found if found or was == now else [f"fingerprint was {str(was)[:12]}, is {now[:12]}"]
        )
        return "; ".join([f"in {self.source}", *found]) if found else ""


def in_words(fact):
    """A number, or a list of names in brackets."""
    return f"({shorten(list(fact), 20)})" if isinstance(fact, (list, tuple)) else fact
