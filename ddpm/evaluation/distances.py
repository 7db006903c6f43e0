"""Distances between sets of features: FID, KID, precision, recall, copying; and the values of a
perfect generator.
"""

import math
import statistics
from dataclasses import dataclass

import numpy as np
import torch

from ddpm.common import files, rng
from ddpm.evaluation import extractors
from ddpm.runtime.device import exact

DRAWS = 100
WIDE = 512
# of a perfect generator: fewer from so many features on, which vary less and cost more
FEWER_DRAWS = 10
ONE_IN = 20  # a copy lies nearer to a training image than all but one in so many held-out images do
ROWS = 2000  # of the distances between neighbours at once: 400 MB against that many


@dataclass
class Moments:
    """Count, mean [d] and scatter [d, d] of features: (count - 1) times the covariance; float64."""

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, features, times=None):
        """The moments of features [n, d], each counted `times` [n], by default once."""
        times = torch.ones(len(features), dtype=torch.float64) if times is None else times
        moments = cls.none(features.shape[1])
        for rows, counts in zip(features.split(ROWS), times.split(ROWS), strict=True):
            moments.add(rows, counts)
        return moments

    @classmethod
    def none(cls, width):
        return cls(
            0,
            torch.zeros(width, dtype=torch.float64),
            torch.zeros(width, width, dtype=torch.float64),
        )

    @property
    def covariance(self):
        return self.scatter / (self.count - 1)

    def add(self, features, times):
        """Count features [b, d] `times` [b] each (Chan, Golub & LeVeque 1983, eq. 2.1)."""
        features = features.double()
        times = times.double()
        count = times.sum().item()
        mean = times @ features / times.sum()
        apart = features - mean
        shift = mean - self.mean
        total = self.count + count
        self.scatter += apart.T @ (times[:, None] * apart) + shift.outer(shift) * (
            self.count * count / total
        )
        self.mean += shift * (count / total)
        self.count = int(total)


@exact()
def compare(generated, reference, extractor, seed=0):
    """The extractor's four numbers of generated features [n, d] against a Reference.

    Frechet distance (Heusel et al. 2017, eq. 6) to the moments of all real images; kernel distance
    (Binkowski et al. 2018), precision and recall (Kynkaanniemi et al. 2019), the latter two with
    three neighbours, to the features that are kept. Raises ValueError for fewer than four images.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real = reference.features
    # below the count, or its 100 subsets are all the same
    size = min(extractors.KID_SUBSET, smallest_count(len(generated), len(real)) - 1)
    kernel = kid_features_to_metric(
        generated, real, kid_subset_size=size, rng_seed=seed, verbose=False
    )
    cover = prc_features_to_metric(
        generated, real, save_cpu_ram=True, prc_batch_size=ROWS, verbose=False
    )
    numbers = (
        frechet_of(Moments.of(generated), reference.moments),
        kernel["kernel_inception_distance_mean"],
        cover["precision"],
        cover["recall"],
    )
    return dict(zip(extractor.metric_names, numbers, strict=True))


@exact()
def nearest(features, others):
    """The distance [n] of each of the features [n, d] to its nearest among `others` [m, d], and
    which one [n] that is.
    """
    minima = [torch.cdist(rows, others).min(dim=1) for rows in features.split(ROWS)]
    return torch.cat([each.values for each in minima]), torch.cat([each.indices for each in minima])


def copying(drawn, held_out):
    """How much nearer drawn images lie to the training images than unseen ones do, from both
    distances [n] and [m].

    `copying` is the probability that a drawn image lies nearer than a held-out one (Meehan et al.
    2020, section 3.1: the Mann-Whitney statistic). `copies` is the share of drawn images that lie
    nearer than the k-th nearest held-out one, where k = (m + 1) // 20; fewer than 19 held-out
    images leave it out. Equal distances count as if in random order.

    `_perfect` is what a perfect generator gets, whose images are exchangeable with the held-out
    ones: 1/2, and k / (m + 1). `_perfect_sd` is the standard deviation, exact where all distances
    differ.
    """
    n = len(drawn)
    m = len(held_out)
    held_out = held_out.sort().values
    nearer = torch.searchsorted(held_out, drawn)
    as_near = torch.searchsorted(held_out, drawn, right=True) - nearer
    numbers = {
        "copying": 1 - (2 * nearer + as_near).double().mean().item() / (2 * m),
        "copying_perfect": 0.5,
        "copying_perfect_sd": math.sqrt((n + m + 1) / (12 * n * m)),
    }
    if k := (m + 1) // ONE_IN:
        # below the k-th nearest lies a share ~ Beta(k, m + 1 - k), and of n drawn images a binomial
        # one
        share = k / (m + 1)
        numbers |= {
            "copies": ((k - nearer) / (as_near + 1)).clamp(0, 1).double().mean().item(),
            "copies_perfect": share,
            "copies_perfect_sd": math.sqrt(share * (1 - share) * (n + m + 1) / (n * (m + 2))),
        }
    return numbers


def perfect_generator(reference, n, extractor):
    """The Frechet distance of a perfect generator at `n` samples, {"fid_perfect": mean,
    "fid_perfect_sd": standard deviation of one evaluation}.

    Cached by the name of the reference: one draw at Inception's 2,048 features takes 15 s on one
    CPU thread for 50,000 samples and images, and 100 draws at the digits' 64 features take 2 s.
    """
    with files.cached_json(
        f"{reference.name}-perfect", "it measures what a perfect generator gets"
    ) as known:
        try:
            mean, deviation = map(float, known[f"{n} samples"])
        except (KeyError, TypeError, ValueError):
            mean, deviation = known[f"{n} samples"] = fid_of_reference_resample(reference, n)
    return {
        f"{extractor.metric_names[0]}_perfect": mean,
        f"{extractor.metric_names[0]}_perfect_sd": deviation,
    }


def fid_of_reference_resample(reference, n):
    """(Mean, standard deviation) of the Frechet distance between two bootstrap samples of the real
    images, one of `n` and one of as many as there are.

    A perfect generator draws from the distribution of the real images, so both sides vary by
    chance. Against the real images themselves the distance would be about half: that of a generator
    which has memorized them.
    """
    real = reference.features
    smallest_count(n, len(real))

    def drawn(draw, side, count):
        places = rng.generator(0, f"perfect {side}", draw).integers(len(real), size=count)
        times = torch.from_numpy(np.bincount(places, minlength=len(real)))
        return Moments.of(real[times > 0], times[times > 0])

    distances = [
        frechet_of(drawn(draw, "generated", n), drawn(draw, "real", reference.moments.count))
        for draw in range(DRAWS if real.shape[1] < WIDE else FEWER_DRAWS)
    ]
    return statistics.fmean(distances), statistics.stdev(distances)


def smallest_count(*counts):
    """The smallest of the counts of images; raises ValueError where it is too few to compare."""
    if min(counts) < extractors.MIN_IMAGES:
        raise ValueError(
            f"{min(counts)} images are too few to compare; measure at least "
            f"{extractors.MIN_IMAGES}, better 1000 or more"
        )
    return min(counts)


def frechet(first, second):
    """The Frechet distance between two sets of features [n, d] and [m, d]."""
    return frechet_of(Moments.of(first), Moments.of(second))


def frechet_of(first, second):
    """The Frechet distance between Gaussians with these Moments: |m - m'|^2 + tr(C + C' - 2 (C
    C')^(1/2)).

    With C = L L^T the eigenvalues of C C' are those of L^T C' L, which is symmetric: that keeps
    them real and not negative, and takes 3 to 5 s on one CPU thread at 2,048 features, instead of 9
    s.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = vectors * values.clamp(min=0).sqrt()
    overlap = torch.linalg.eigvalsh(root.T @ second.covariance @ root).clamp(min=0).sqrt().sum()
    apart = (first.mean - second.mean).square().sum()
    return (apart + first.covariance.trace() + second.covariance.trace() - 2 * overlap).item()
