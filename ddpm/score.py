"""Drawn images become numbers: distances to the real ones, each with how it was made; used while training and after.

    draw(seeds, recipe) -> iterator of (seeds, uint8 [b, c, h, w]): this rank's share
"""

from functools import cached_property

from ddpm import metrics


class Scorer:
    """Measures `num_samples` drawn images against all images of a data set, through one feature extractor."""

    def __init__(self, extractor, dataset, recipe, num_samples, weights, machine):
        self.extractor, self.dataset, self.recipe, self.machine = extractor, dataset, recipe, machine
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

    def __call__(self, draw):
        """Return the distances, their floors and `eval/made`, which says how; the same on every rank."""
        reference = self.reference
        drawn = metrics.extract(self.extractor, (images for _, images in draw(self.seeds, self.recipe)))
        drawn = self.machine.gather(drawn)
        numbers = metrics.compare(drawn, reference, self.extractor) | metrics.floor(reference, len(drawn), self.extractor)
        return {f"eval/{name}": value for name, value in numbers.items()} | {"eval/made": self.made}


def no_score(draw):
    """Stands where no extractor is to be had: nothing is drawn and nothing is measured."""
    return {}
