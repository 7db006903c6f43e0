"""Distances between sets of features: FID, KID, precision, recall, copying; and the values of a
perfect generator.

Features [n, d] are float32. Products of features are float32 too, on the device of the features,
with TF32 off: a squared distance has an error of about 1e-6 of the squared norms. Sums of them,
means and covariances are float64.
"""

import math
import statistics
from dataclasses import dataclass
from typing import NamedTuple

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
ROWS = 2000  # of features in float64 at once
PAIRS = 2**24  # of features compared at once: 64 MB for each number of a pair
NEIGHBOURS = 3  # precision and recall look at the third (Kynkaanniemi et al. 2019)
SUBSETS = 100  # of the kernel distance, as torch-fidelity draws them


@dataclass
class Moments:
    """Count, mean [d] and scatter [d, d] of features: (count - 1) times the covariance; float64."""

    count: int
    mean: torch.Tensor
    scatter: torch.Tensor

    @classmethod
    def of(cls, features, times=None):
        """The moments of features [n, d], each counted `times` [n], by default once."""
        times = features.new_ones(len(features)) if times is None else times
        moments = cls.none(features.shape[1], features.device)
        for rows, counts in zip(features.split(ROWS), times.split(ROWS), strict=True):
            moments.add(rows, counts)
        return moments

    @classmethod
    def none(cls, width, device=None):
        kind = {"dtype": torch.float64, "device": device}
        return cls(0, torch.zeros(width, **kind), torch.zeros(width, width, **kind))

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
        self.scatter.addmm_(apart.T, times[:, None] * apart)
        self.scatter.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = int(total)


class Gaussian(NamedTuple):
    """Mean [d] and root [k, d] with root^T root = the covariance and k <= d; float64."""

    mean: torch.Tensor
    root: torch.Tensor

    @classmethod
    def of(cls, features, times=None):
        """The Gaussian of features [n, d], each counted `times` [n], by default once.

        Where n < d, the root is the centred features, and no [d, d] matrix is computed.
        """
        if len(features) >= features.shape[1]:
            return cls.of_moments(Moments.of(features, times))
        features = features.double()
        times = features.new_ones(len(features)) if times is None else times.double()
        mean = times @ features / times.sum()
        weights = (times / (times.sum() - 1)).sqrt()
        return cls(mean, weights[:, None] * (features - mean))

    @classmethod
    def of_moments(cls, moments):
        """The root is a Cholesky factor, or from eigenvalues where the covariance is singular."""
        factor, failed = torch.linalg.cholesky_ex(moments.covariance)
        if failed:
            values, vectors = torch.linalg.eigh(moments.covariance)
            factor = vectors * values.clamp(min=0).sqrt()
        return cls(moments.mean, factor.T)


@exact()
def compare(generated, reference, extractor, seed=0, left_out=None):
    """(The extractor's four numbers of generated features [n, d] against a Reference, distance [n]
    of each to the nearest real one, which one [n]), computed on the device of `generated`.

    Frechet distance (Heusel et al. 2017, eq. 6) to the moments of all real images; kernel distance
    (Binkowski et al. 2018, eq. 4) over torch-fidelity's subsets, precision and recall
    (Kynkaanniemi et al. 2019, eq. 1 to 3), these three to the features that are kept. The nearest
    is none of the rows where `left_out` [m] is True. Raises ValueError for fewer than four images.
    """
    device = generated.device
    real = reference.features.to(device)
    real_radii = reference.radii.to(device)
    # below the count, or the subsets are all the same
    size = min(extractors.KID_SUBSET, smallest_count(len(generated), len(real)) - 1)
    ours, theirs = subsets(len(generated), len(real), size, seed, device)
    own = cached(
        reference,
        f"kernel sums of {size} in {len(real)} beside {len(generated)}, seed {seed}",
        lambda: within(real, theirs)[0].tolist(),
    )
    within_ours, radii = within(generated, ours)
    across = torch.zeros_like(within_ours)
    precise, minima = [], []
    covered = torch.zeros(len(real), dtype=torch.bool, device=device)
    for part, products, squared in blocks(generated, real):
        across += kernel_sums(products, ours[part], theirs, real.shape[1])
        precise.append((squared <= real_radii).any(1))
        covered |= (squared <= radii[part, None]).any(0)
        if left_out is not None:
            squared.masked_fill_(left_out, torch.inf)
        minima.append(squared.min(dim=1))
    pairs = size * (size - 1)
    kernel = (within_ours.cpu() + torch.tensor(own)) / pairs - 2 * across.cpu() / size**2
    numbers = (
        frechet_of(Gaussian.of(generated), reference.gaussian(device)),
        kernel.mean().item(),
        torch.cat(precise).float().mean().item(),
        covered.float().mean().item(),
    )
    return dict(zip(extractor.metric_names, numbers, strict=True)), *joined(minima)


def subsets(n, m, size, seed, device):
    """Members of torch-fidelity's subsets of n and m images: 1 or 0, [n, SUBSETS], [m, SUBSETS]."""
    chance = np.random.RandomState(seed)
    members = np.zeros((n, SUBSETS), np.float32), np.zeros((m, SUBSETS), np.float32)
    for column in range(SUBSETS):
        for side in members:
            side[chance.choice(len(side), size, replace=False), column] = 1
    return [torch.from_numpy(side).to(device) for side in members]


def blocks(features, others):
    """Yield (slice of the features, inner products [b, m], squared distances [b, m]) of features
    [n, d] and others [m, d].
    """
    norms = features.square().sum(1)
    other_norms = others.square().sum(1)
    size = max(PAIRS // len(others), 1)
    for start in range(0, len(features), size):
        part = slice(start, start + size)
        products = features[part] @ others.T
        squared = torch.sub(norms[part, None] + other_norms, products, alpha=2)
        yield part, products, squared.clamp_(min=0)


def kernel_sums(products, members, other_members, width):
    """The sum [SUBSETS] of the kernel (x^T y / d + 1)^3 over the pairs of each subset in a block
    of inner products [b, m]; `members` [b, SUBSETS], `other_members` [m, SUBSETS].
    """
    kernel = (products / width + 1).pow_(3)
    return (kernel @ other_members).mul_(members).sum(0, dtype=torch.float64)


@exact()
def within(features, members):
    """Of features [n, d]: the sums [SUBSETS] of the kernel over pairs of different `members`
    [n, SUBSETS], and the squared distance [n] of each to its third neighbour.
    """
    width = features.shape[1]
    alike = (features.square().sum(1, keepdim=True) / width + 1).pow(3)
    sums = -(alike * members).sum(0, dtype=torch.float64)
    radii = []
    for part, products, squared in blocks(features, features):
        sums += kernel_sums(products, members[part], members, width)
        # the nearest is the image itself
        radii.append(squared.topk(min(NEIGHBOURS + 1, len(features)), largest=False).values[:, -1])
    return sums, torch.cat(radii)


@exact()
def nearest(features, others):
    """The distance [n] of each of the features [n, d] to its nearest among `others` [m, d], and
    which one [n] that is.
    """
    return joined([squared.min(dim=1) for _, _, squared in blocks(features, others)])


def joined(minima):
    """(Distances [n], indices [n]) on the CPU of the minima of blocks of squared distances."""
    values, indices = (torch.cat(side).cpu() for side in zip(*minima, strict=True))
    return values.sqrt(), indices


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


def perfect_generator(reference, n, extractor, device=None):
    """The Frechet distance of a perfect generator at `n` samples, {"fid_perfect": mean,
    "fid_perfect_sd": standard deviation of one evaluation}; cached.
    """
    mean, deviation = cached(
        reference, f"{n} samples", lambda: fid_of_reference_resample(reference, n, device)
    )
    return {
        f"{extractor.metric_names[0]}_perfect": mean,
        f"{extractor.metric_names[0]}_perfect_sd": deviation,
    }


def cached(reference, key, measure):
    """The numbers of `measure()`, which depend on the reference alone, cached by its name."""
    if not reference.name:
        return measure()
    with files.cached_json(f"{reference.name}-perfect", "it measures the real images") as known:
        try:
            return list(map(float, known[key]))
        except (KeyError, TypeError, ValueError):
            known[key] = list(measure())
            return known[key]


def fid_of_reference_resample(reference, n, device=None):
    """(Mean, standard deviation) of the Frechet distance between two bootstrap samples of the real
    images, one of `n` and one of as many as there are.

    A perfect generator draws from the distribution of the real images, so both sides vary by
    chance. Against the real images themselves the distance would be about half: that of a generator
    which has memorized them.
    """
    real = reference.features.to(device)
    smallest_count(n, len(real))

    def drawn(draw, side, count):
        places = rng.generator(0, f"perfect {side}", draw).integers(len(real), size=count)
        times = torch.from_numpy(np.bincount(places, minlength=len(real))).to(device)
        return Gaussian.of(real[times > 0], times[times > 0])

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
    return frechet_of(Gaussian.of(first), Gaussian.of(second))


def frechet_of(first, second):
    """The Frechet distance between two Gaussians: |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)).

    With C = R^T R and C' = S^T S the eigenvalues of C C' are the squared singular values of R S^T,
    here those of its smaller Gram matrix, which is symmetric: that keeps them real.
    """
    cross = first.root @ second.root.T
    cross = cross if len(cross) <= cross.shape[1] else cross.T
    overlap = torch.linalg.eigvalsh(cross @ cross.T).clamp(min=0).sqrt().sum()
    apart = (first.mean - second.mean).square().sum()
    return (apart + first.root.square().sum() + second.root.square().sum() - 2 * overlap).item()
