"""What every source of images has: pixels by index, labels, a fingerprint, notes for the log.

Nothing here is random: order, split and flips are functions of (seed, step, index) in
`ddpm.common.rng`, so a resumed run, or one with more workers or GPUs, sees the same images.
"""

import contextlib
import contextvars
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from ddpm.common import registry


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
        """The images at some indices, uint8 [b, c, h, w]; with `in_memory` in one call."""
        if self.in_memory:
            return self.fetch(np.asarray(indices))
        return torch.stack([self[index] for index in indices])


def row(pixels, index):
    """A copy, as a tensor, of row `index` of an array [n, c, h, w], or of rows at an array."""
    return torch.from_numpy(pixels.take(index, axis=0))


def subset(source, indices):
    """The Source of the images of a source at some indices."""
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


def fingerprint(*parts):
    """Sha256 in hex of anything that JSON can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def left_out_lines(names, faults):
    """One line per fault: the number of images that have it, and all their names."""
    by_fault = {}
    for name, fault in zip(names, faults, strict=True):
        if fault:
            by_fault.setdefault(fault, []).append(name)
    return [
        f"left out {len(names)} {fault}: {shorten(names, len(names))}"
        for fault, names in sorted(by_fault.items())
    ]


def shorten(names, limit=5):
    """The first `limit` names and the number of the others, on one line of printable text."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    text = ", ".join(names[:limit]) + more
    return "".join(letter if letter.isprintable() else "?" for letter in text)


DOWNLOADS = contextvars.ContextVar("DOWNLOADS", default=True)


@contextlib.contextmanager
def without_downloads():
    """In the block, a source whose data are not on this machine raises ValueError."""
    before = DOWNLOADS.set(False)
    try:
        yield
    finally:
        DOWNLOADS.reset(before)


def class_numbers(wanted, classes):
    """Classes by name or number: `("dog", "0") -> [1, 0]`; ValueError for others."""
    known = {str(number): number for number in range(len(classes))}
    known |= {name: number for number, name in enumerate(classes)}
    for name in wanted:
        if str(name) not in known:
            raise ValueError(
                f"unknown class {name!r}{registry.suggest(name, classes)}; choose one of "
                f"{shorten(list(classes))}, or a number from 0 to {len(classes) - 1}"
            )
    return [known[str(name)] for name in wanted]


class DatasetCheck:
    """A checkpoint part that compares facts on the data of a run, and loads nothing."""

    def __init__(self, source, **facts):
        self.source = source
        self.facts = facts

    def state_dict(self):
        return dict(self.facts)

    def load_state_dict(self, state):
        """Raise ValueError where the data differ from those of the checkpoint."""
        if changes := self.changes(state):
            raise ValueError(
                f"the data of this run have changed since its checkpoint ({changes}); bring "
                "them back, give their new place as --config.data.source, or start a new run with "
                "--workdir and --config.train.init_from"
            )

    def changes(self, state):
        """What differs from a checkpoint, in words, or ""; the fingerprint only if nothing else."""
        changes = [
            f"{name} were {in_words(state.get(name))}, are {in_words(fact)}"
            for name, fact in self.facts.items()
            if state.get(name) != fact and name != "fingerprint"
        ]
        before = state.get("fingerprint")
        now = self.facts["fingerprint"]
        if not changes and before != now:
            changes = [f"fingerprint was {str(before)[:12]}, is {now[:12]}"]
        return "; ".join([f"in {self.source}", *changes]) if changes else ""


def in_words(fact):
    """A number, or a list of names in parentheses."""
    return f"({shorten(list(fact), 20)})" if isinstance(fact, (list, tuple)) else fact
