"""Measures the images that a model draws, during and after training.

draw(seeds, recipe) -> iterator of (seeds, uint8 [b, c, h, w]): this rank's share
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ddpm.common.files import atomic_write
from ddpm.evaluation import distances as measures
from ddpm.evaluation import extractors
from ddpm.evaluation import reference as evaluation_reference

SURE = 3  # standard deviations beyond which chance gets one time in 700
PAIRS = 32  # drawn images in a grid, each with the training image nearest to it


class Scorer:
    """Measures `num_samples` drawn images against all images of a data set, in the features of one
    extractor.

    `learned` and `held_out` are the indices of training and held-out images, of which those count
    whose features the reference keeps. `nfe` is the number of function evaluations per image.
    `protocol` describes the measurement; `notes` has lines for the log.
    """

    def __init__(
        self,
        extractor,
        dataset,
        learned,
        held_out,
        recipe,
        num_samples,
        weights,
        nfe,
        machine,
    ):
        self.extractor = extractor
        self.dataset = dataset
        self.recipe = recipe
        self.machine = machine
        self.places = np.asarray(
            evaluation_reference.reference_indices(len(dataset))
        )  # the image behind each row of the reference
        self.learned, self.held_out = map(self.rows, (learned, held_out))
        self.seeds = range(num_samples)
        self.nfe = nfe
        fewer = (
            f", by {len(self.places)} of them except for the Frechet distance"
            if len(self.places) < len(dataset)
            else ""
        )
        self.protocol = (
            f"{extractor.name}; {num_samples} samples of the {weights} weights in "
            f"{str(machine.dtype)[6:]}; {recipe}; against {len(dataset)} images "
            f"{dataset.fingerprint[:12]}{fewer}"
        )
        self.notes = []
        if len(self.held_out) < measures.ONE_IN - 1:
            lacking = "is" if len(self.held_out) else "and eval/copying are"
            self.notes.append(
                f"eval/copies {lacking} not measured: that takes {measures.ONE_IN - 1} held-out "
                f"images, and there are {len(self.held_out)}; raise data.validation_fraction in a "
                "new run"
            )

    def rows(self, indices):
        """The rows of the reference that belong to the images at `indices`."""
        return torch.from_numpy(np.flatnonzero(np.isin(self.places, indices)))

    @cached_property
    def reference(self):
        """The Reference of the real images."""
        return evaluation_reference.reference(self.extractor, self.dataset)

    @cached_property
    def perfect(self):
        """The Frechet distance of a perfect generator at as many samples."""
        return self.extractor.on_device(
            lambda device: measures.perfect_generator(
                self.reference, len(self.seeds), self.extractor, device
            )
        )

    @cached_property
    def unseen(self):
        """The distances [m] of held-out images to their nearest training images."""
        features = self.reference.features
        return self.extractor.on_device(
            lambda device: measures.nearest(
                features[self.held_out].to(device), features[self.learned].to(device)
            )
        )[0]

    def __call__(self, draw):
        """Draw and measure; returns (numbers, pictures), the same on every rank.

        The numbers are distances, closeness to the training images, the values of a perfect
        generator, and `eval/protocol`. The picture `eval/nearest`, uint8 [b, c, h, w], has the
        first drawn images, each followed by the training image nearest to it.
        """
        first = []
        drawn = extractors.extract(
            self.extractor, self.watched(draw(self.seeds, self.recipe), first)
        )
        drawn = self.machine.gather(drawn)
        result = None
        # minutes with Inception on a CPU; the other ranks wait
        with self.machine.raise_on_all_ranks(), self.machine.stop.interruptible():
            if self.machine.main:
                result = self.measure(drawn)
        numbers, which = self.machine.broadcast(result)
        first = self.machine.gather(torch.cat(first or [torch.empty(0, dtype=torch.uint8)]))
        originals = torch.stack(
            [self.dataset[int(self.places[row])] for row in which[: len(first)]]
        )
        pairs = torch.stack([first, originals], dim=1).flatten(0, 1)
        return {f"eval/{name}": value for name, value in numbers.items()} | {
            "eval/protocol": self.protocol
        }, {"eval/nearest": pairs}

    def measure(self, drawn):
        """(Numbers of drawn features [n, d], the rows of the reference nearest to the first)."""
        apart = torch.ones(len(self.places), dtype=torch.bool)
        apart[self.learned] = False
        numbers, distances, which = self.extractor.on_device(
            lambda device: measures.compare(
                drawn.to(device), self.reference, self.extractor, left_out=apart.to(device)
            )
        )
        numbers |= self.perfect | {"nfe": self.nfe}
        if len(self.held_out):
            numbers |= measures.copying(distances, self.unseen)
        return numbers, which[:PAIRS].tolist()

    def watched(self, batches, first):
        """Yield the images of `batches`; appends those with the first seeds to `first`."""
        for seeds, pixels in batches:
            first.append(pixels[[seed < PAIRS for seed in seeds]])
            yield pixels


def copying_warning(numbers, picture):
    """A list with a line that says that samples are copies, naming the picture; empty where the
    numbers are within SURE standard deviations of a perfect generator's.
    """
    shown = []
    for name in ("eval/copies", "eval/copying"):
        value, usual, deviation = (
            numbers.get(f"{name}{end}") for end in ("", "_perfect", "_perfect_sd")
        )
        if value is not None and value > usual + SURE * deviation:
            shown.append(
                f"{name} is {value:.2f}, and {usual:.2f} ± {deviation:.2f} where nothing is copied"
            )
    return (
        [f"samples are copies of training images: {'; '.join(shown)}; {picture}"] if shown else []
    )


class NullScorer:
    """A Scorer that draws and measures nothing."""

    protocol = ""
    notes = ()

    def __call__(self, *arguments):
        return {}, {}


def write_texts(folder, files):
    """Write {file name: text} into a folder."""
    for name, text in files.items():
        with atomic_write(Path(folder, name)) as part:
            part.write_text(text)
