"""Drawn images become numbers: distances to the real ones, each with how it was made; used while training and after.

    draw(seeds, recipe) -> iterator of (seeds, uint8 [b, c, h, w]): this rank's share
"""

from functools import cached_property

import numpy as np
import torch
from tqdm import tqdm

from ddpm import metrics

PAIRS = 32  # drawn images that are shown beside the training image nearest to them


class Scorer:
    """Measures `num_samples` drawn images against all images of a data set, through one feature extractor.

    `learned` and `held_out` are the indices of the images that the network was trained on, and was not.
    """

    def __init__(self, extractor, dataset, learned, held_out, recipe, num_samples, weights, machine):
        self.extractor, self.dataset, self.recipe, self.machine = extractor, dataset, recipe, machine
        self.learned, self.held_out = learned, held_out
        self.seeds = range(num_samples)
        self.made = (f"{extractor.name}; {num_samples} samples of the {weights} weights in {str(machine.dtype)[6:]}; {recipe}; "
                     f"against {len(dataset)} images {dataset.fingerprint[:12]}")

    @cached_property
    def reference(self):
        """Features [n, d] of the real images, computed by one rank and read from the cache by the others."""
        if self.machine.main:
            features = metrics.reference(self.extractor, self.dataset)
        self.machine.agree("the reference is in the cache")
        return features if self.machine.main else metrics.reference(self.extractor, self.dataset)

    @cached_property
    def split(self):
        """Rows of the reference that were learned from, with the indices of their images, and how near held-out ones lie."""
        places = np.asarray(metrics.reference_indices(len(self.dataset)))
        learned, held_out = (torch.from_numpy(np.flatnonzero(np.isin(places, part))) for part in (self.learned, self.held_out))
        near = metrics.nearest(self.reference[held_out], self.reference[learned])[0] if len(held_out) else None
        return learned, places[learned], near

    def __call__(self, draw):
        """Draw and measure; returns the same on every rank.

        First the numbers: distances, their floors, closeness to the training images and `eval/made`, which says how. Then
        pictures uint8 [b, c, h, w]: `eval/nearest` has the first drawn images, each before the training image nearest to it.
        """
        reference, first = self.reference, []
        drawn = metrics.extract(self.extractor, self.watched(draw(self.seeds, self.recipe), first))
        drawn, first = self.machine.gather(drawn), self.machine.gather(torch.cat(first or [torch.empty(0, dtype=torch.uint8)]))
        numbers = metrics.compare(drawn, reference, self.extractor) | metrics.floor(reference, len(drawn), self.extractor)

        learned, images, held_out = self.split
        distances, which = metrics.nearest(drawn, reference[learned])
        if held_out is not None:
            numbers |= metrics.copying(distances, held_out)
        originals = torch.stack([self.dataset[int(images[which[k]])] for k in range(len(first))])
        pairs = torch.stack([first, originals], dim=1).flatten(0, 1)
        return {f"eval/{name}": value for name, value in numbers.items()} | {"eval/made": self.made}, {"eval/nearest": pairs}

    def watched(self, batches, first):
        """The images of a drawing, counted on a bar on a terminal; those with the first seeds are put into `first`."""
        with tqdm(total=len(self.seeds[self.machine.share(len(self.seeds))]), desc="drawing for the evaluation", unit="image",
                  leave=False, disable=None if self.machine.main else True) as bar:
            for seeds, images in batches:
                first.append(images[[seed < PAIRS for seed in seeds]])
                yield images
                bar.update(len(seeds))


def no_score(draw):
    """Stands where no extractor is to be had: nothing is drawn and nothing is measured."""
    return {}, {}
