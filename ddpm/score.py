"""A model becomes numbers, each with how it was made, while training and after: what it draws, and how likely it finds images.

    draw(seeds, recipe) -> iterator of (seeds, uint8 [b, c, h, w]): this rank's share
"""

import math
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from ddpm import images, metrics, rng
from ddpm.diffusion import likelihood
from ddpm.dist import exact
from ddpm.files import written_beside
from ddpm.progress import Progress

SURE = 3  # standard deviations that make a number no chance: once in 700 times
PAIRS = 32  # drawn images that are shown beside the training image nearest to them


class Scorer:
    """Measures `num_samples` drawn images against all images of a data set, through one feature extractor.

    `learned` and `held_out` are the indices of the images that the network was trained on, and was not; of each those are
    used whose features the reference keeps. `evaluations` is how often the network is asked for an image.
    """

    def __init__(self, extractor, dataset, learned, held_out, recipe, num_samples, weights, evaluations, machine):
        self.extractor, self.dataset, self.recipe, self.machine = extractor, dataset, recipe, machine
        self.places = np.asarray(metrics.reference_indices(len(dataset)))  # the image behind each row of the reference
        self.learned, self.held_out = map(self.rows, (learned, held_out))
        self.seeds, self.evaluations = range(num_samples), evaluations
        fewer = f", by {len(self.places)} of them except for the Frechet distance" if len(self.places) < len(dataset) else ""
        self.made = (f"{extractor.name}; {num_samples} samples of the {weights} weights in {str(machine.dtype)[6:]}; {recipe}; "
                     f"against {len(dataset)} images {dataset.fingerprint[:12]}{fewer}")
        few, lacking = len(self.held_out) < metrics.ONE_IN - 1, "is" if len(self.held_out) else "and eval/copying are"
        self.notes = [f"eval/copies {lacking} not measured: that takes {metrics.ONE_IN - 1} held-out images, and there are "
                      f"{len(self.held_out)}; raise data.validation_fraction in a new run"] if few else []

    def rows(self, indices):
        """The rows of the reference that belong to the images at `indices`."""
        return torch.from_numpy(np.flatnonzero(np.isin(self.places, indices)))

    @cached_property
    def reference(self):
        """The metrics.Reference of the real images, computed by one rank and read from the cache by the others."""
        if self.machine.main:
            found = metrics.reference(self.extractor, self.dataset)
        self.machine.agree("the reference is in the cache")
        return found if self.machine.main else metrics.reference(self.extractor, self.dataset)

    @cached_property
    def perfect(self):
        """The Frechet distance that a perfect generator gets at as many samples, computed by one rank."""
        n = len(self.seeds)
        return self.machine.agree(metrics.perfect(self.reference, n, self.extractor) if self.machine.main else None)

    @cached_property
    def unseen(self):
        """How near [m] held-out images lie to the nearest that were learned from."""
        features = self.reference.features
        return metrics.nearest(features[self.held_out], features[self.learned])[0]

    def __call__(self, draw):
        """Draw and measure; returns the same on every rank.

        First the numbers: distances, closeness to the training images, what a perfect generator gets, and `eval/made`, which
        says how. Then pictures uint8 [b, c, h, w]: `eval/nearest` has the first drawn images, each before the training image
        nearest to it.
        """
        first = []
        drawn = metrics.extract(self.extractor, self.watched(draw(self.seeds, self.recipe), first))
        drawn, first = self.machine.gather(drawn), self.machine.gather(torch.cat(first or [torch.empty(0, dtype=torch.uint8)]))
        numbers = metrics.compare(drawn, self.reference, self.extractor) | self.perfect | {"evaluations": self.evaluations}

        distances, which = metrics.nearest(drawn, self.reference.features[self.learned])
        if len(self.held_out):
            numbers |= metrics.copying(distances, self.unseen)
        originals = torch.stack([self.dataset[int(self.places[self.learned[which[k]]])] for k in range(len(first))])
        pairs = torch.stack([first, originals], dim=1).flatten(0, 1)
        return {f"eval/{name}": value for name, value in numbers.items()} | {"eval/made": self.made}, {"eval/nearest": pairs}

    def watched(self, batches, first):
        """The images of a drawing; those with the first seeds are put into `first`."""
        for seeds, pixels in batches:
            first.append(pixels[[seed < PAIRS for seed in seeds]])
            yield pixels


def copies(numbers, picture):
    """A line that says that samples are copies, where the numbers of an evaluation show it, and which picture does; or none.

    They do where they lie further above those of a perfect generator than SURE of their standard deviations.
    """
    shown = []
    for name in ("eval/copies", "eval/copying"):
        value, usual, deviation = (numbers.get(f"{name}{end}") for end in ("", "_perfect", "_perfect_sd"))
        if value is not None and value > usual + SURE * deviation:
            shown.append(f"{name} is {value:.2f}, and {usual:.2f} ± {deviation:.2f} where nothing is copied")
    return [f"samples are copies of training images: {'; '.join(shown)}; {picture}"] if shown else []


class Likelihood:
    """Measures in bits a dimension how likely a model finds the images at `indices`, by what `kind` of LIKELIHOODS names.

    `whose` says in a word which images these are, `weights` which weights the model has; `labels` are those of all images, for
    a network that learns them. The network is asked `evaluations` times for an image: by the bound at one t in each of so many
    stretches, or at every t where there are no more; by the flow in steps of Karras spacing. In float32, whatever drawing is
    in: terms at low noise are small differences. An image has its own noise, the same for every seed, so that runs compare.
    """

    def __init__(self, dataset, indices, whose, model, kind, evaluations, batch_size, weights, machine, labels=None):
        self.dataset, self.indices, self.model, self.batch_size, self.machine = dataset, indices, model, batch_size, machine
        self.labels = labels
        self.by = [name for name in ("bound", "flow") if kind in (name, "both")]
        process = model.process
        self.edges = likelihood.stretches(process, evaluations)
        self.levels = process.levels(min(evaluations // 4 + 1, process.timesteps), "karras")[:-1]
        self.made = (f"bits/dim of {len(indices)} {whose} images of {dataset.fingerprint[:12]}"
                     f"{'' if labels is None else ', given their labels,'} under the {weights} weights, by {evaluations} "
                     "evaluations")

    @exact()
    def __call__(self):
        """Measure; returns the same on every rank: the numbers, and as a text for likelihood.csv the terms over t."""
        self.model.net.eval()
        times = {"bound": len(self.edges) - 1, "flow": 4 * (len(self.levels) - 1)}  # network evaluations of an image
        found = {name: self.mean(getattr(self, name), times[name]) for name in self.by}
        numbers, files = {}, {}
        if "bound" in found:
            terms = prior, reconstruction, *kl = found["bound"].tolist()
            numbers = {"eval/bits_per_dim": sum(terms), "eval/bits_per_dim_prior": prior,
                       "eval/bits_per_dim_kl": sum(kl), "eval/bits_per_dim_reconstruction": reconstruction}
            files = {"likelihood.csv": self.curve(prior, [reconstruction, *kl])}
        if "flow" in found:
            numbers["eval/bits_per_dim_flow"] = found["flow"].item()
        return numbers | {"eval/bits_per_dim_made": self.made}, files

    def bound(self, x0, batch):
        """The terms of the bound of images x0 at the indices `batch`: prior, reconstruction and kl [b, 1 + stretches]."""
        def u(k):
            return self.machine.put(rng.uniform(0, "likelihood time", k, batch))

        def noise(k):
            return self.noise("noise", k, batch, x0)

        found = likelihood.bound(self.model, x0, self.edges, u, noise, self.y(batch))
        return torch.column_stack([found.prior, found.reconstruction, found.kl])

    def flow(self, x0, batch):
        """The bits under the flow [b, 1]."""
        u, probe = torch.special.ndtr(self.noise("pixel", 0, batch, x0)), self.noise("probe", 0, batch, x0).sign()
        return torch.column_stack([likelihood.flow_bits(self.model, x0, self.levels, u, probe, self.y(batch))])

    def y(self, batch):
        """The labels of the images at the indices `batch`, or None."""
        return None if self.labels is None else self.machine.put(torch.tensor([self.labels[index] for index in batch]))

    def noise(self, purpose, k, batch, like):
        return self.machine.put(rng.normal(0, f"likelihood {purpose}", k, batch, like.shape[1:]))

    def mean(self, measure, times):
        """The mean [columns] of `measure(x0, indices) -> [b, columns]` over all images, of which each rank takes a share.

        `times` is how many network evaluations an image takes.
        """
        def of(batch):
            return measure(images.encode(self.machine.put(self.dataset.batch(batch))), batch).double().cpu()

        mine, found = self.indices[self.machine.share(len(self.indices))], []
        with Progress("measuring bits/dim", len(mine), self.batch_size, times, shown=self.machine.main) as shown:
            hook = self.model.net.register_forward_hook(shown.evaluated)
            try:
                for batch, bits in self.machine.room.in_batches("measuring bits/dim of", mine, self.batch_size, of):
                    found.append(bits)
                    shown.finished(len(batch))
            finally:
                hook.remove()
        return self.machine.gather(torch.cat(found or [torch.empty(0)])).mean(0)

    def curve(self, prior, terms):
        """The terms as csv, from the pixels to pure noise: each with its t, or its stretch of t, and log SNR in its middle."""
        ends = [*((first, end - 1) for first, end in pairwise(self.edges)), (self.edges[-1] - 1,) * 2]
        names = ["reconstruction", *["kl"] * (len(terms) - 1), "prior"]
        lines = ["term,first_t,last_t,log_snr,bits_per_dim"]
        for name, (first, last), bits in zip(names, ends, [*terms, prior], strict=True):
            log_snr = -2 * math.log(self.model.process.level((first + last) // 2).ratio)
            lines.append(f"{name},{first},{last},{log_snr:.6g},{bits:.6g}")
        return "\n".join(lines) + "\n"


class Nothing:
    """Stands where nothing is to be measured; nothing is drawn for it."""

    made, notes = "", ()

    def __call__(self, *arguments):
        return {}, {}


def keep(folder, files):
    """Write texts by their names into a folder."""
    for name, text in files.items():
        with written_beside(Path(folder, name)) as part:
            part.write_text(text)
