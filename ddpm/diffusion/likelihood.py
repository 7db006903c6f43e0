"""Likelihood in bits per dimension: -log2 p(image) / (c h w).

    x0, x [b, c, h, w], x0 in [-1, 1] on the 256 values of a pixel; t [b] int64
    bits [b] float32; log-densities [b] float64, in nats

`bound` is the variational upper bound for ancestral sampling (Ho et al. 2020, eq. 5), term by term.
`flow_bits` is the likelihood of the deterministic samplers, from the probability-flow ODE (Song et
al. 2021, Score SDE, eq. 39). Both run without guidance and without self-conditioning.
"""

import math
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import reduce

BITS = 1 / math.log(2)  # in a nat
HALF_PIXEL = 1 / 255  # half the distance of the 256 pixel values in [-1, 1]


class Measurement(NamedTuple):
    """What is measured: `by` bound, flow or both, of at most so many images, by so many NFE an
    image.
    """

    by: tuple = ()
    images: int = 0
    nfe: int = 0


def measurement(*by, images=256, nfe=100):
    """The Measurement of some of bound and flow; raises ValueError for counts out of range."""
    for name, value, low, high in (("images", images, 1, 10_000_000), ("nfe", nfe, 4, 10_000)):
        if not low <= value <= high:
            raise ValueError(f"{name} is {value}; it must lie between {low} and {high}")
    return Measurement(by, images, nfe)


def normal_kl(mean, log_variance, other_mean, other_log_variance):
    """Return KL(N(mean, e^log_variance) || N(other_mean, e^other_log_variance)), nats."""
    ratio = torch.exp(log_variance - other_log_variance)
    distance = (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance + ratio + distance - 1)


def discretized_gaussian_log_likelihood(x0, mean, log_variance):
    """Return log P(x0's pixel value) under N(mean, e^log_variance), nats (Ho et al., eq. 13).

    Elementwise. Black and white take the tails. Probabilities are differences of survival functions
    on the side where these are small, so that they stay exact far from the mean.
    """
    scale = torch.exp(-0.5 * log_variance)
    # by symmetry, values above the mean are mirrored below it
    distance = (x0 - mean).abs()
    inner = torch.special.log_ndtr(-(distance - HALF_PIXEL) * scale)
    outer = torch.special.log_ndtr(-(distance + HALF_PIXEL) * scale)
    between = inner + torch.log(-torch.expm1((outer - inner).clamp(max=-1e-12)))
    lowest = x0 < -1 + HALF_PIXEL
    highest = x0 > 1 - HALF_PIXEL
    below = torch.special.log_ndtr((x0 - mean + HALF_PIXEL) * scale)
    above = torch.special.log_ndtr(-(x0 - mean - HALF_PIXEL) * scale)
    return torch.where(lowest, below, torch.where(highest, above, between))


def bound_term(process, x0, x_t, t, mean, log_variance):
    """Return the bound's term at t [b], float32 [b] in bits per dimension (Ho et al. 2020, eq. 5).

    KL(q(x_{t-1} | x_t, x_0) || N(mean, e^log_variance)), at t = 0 -log p(x_0 | x_t). The bound is
    the sum over t plus `prior_term`; T times the term at a uniform t is an unbiased estimate.
    """
    true_mean, _, true_log_variance = process.posterior(x0, x_t, t)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    reconstruction = -discretized_gaussian_log_likelihood(x0, mean, log_variance)
    kl = reduce(kl.float(), "b c h w -> b", "mean") * BITS
    reconstruction = reduce(reconstruction.float(), "b c h w -> b", "mean") * BITS
    return torch.where(t == 0, reconstruction, kl)


def prior_term(process, x0):
    """Return KL(q(x_{T-1} | x_0) || N(0, alpha^2 + sigma^2)), bits per dimension [b].

    It does not depend on the network, and is 0 where the tables end in pure noise.
    """
    level = process.at(torch.full((len(x0),), process.timesteps - 1, device=x0.device))
    start = (level.alpha**2 + level.sigma**2).log()
    kl = normal_kl(level.alpha * x0, 2 * level.sigma.log(), torch.zeros_like(start), start)
    return (reduce(kl, "b c h w -> b", "mean") * BITS).float()


class Bound(NamedTuple):
    """The terms of each image's bound, bits per dimension; `kl` [b, n] by stratum of t > 0."""

    prior: torch.Tensor
    kl: torch.Tensor
    reconstruction: torch.Tensor

    @property
    def total(self):
        """The bound [b], bits per dimension."""
        return self.prior + self.kl.sum(1) + self.reconstruction


def timestep_strata(process, count):
    """Return the edges of `count` strata of 0 .. T-1: the first t of each, then T, a list of ints.

    t = 0 is a stratum of its own. The others split log(1 + SNR) evenly, with at least one t each:
    most strata lie at low noise, where the bound's terms are large, since white noise adds half the
    decrease of log(1 + SNR) at each t. With `count` >= T each t is a stratum. Raises ValueError for
    a count below 2.
    """
    if count < 2:
        raise ValueError(f"{count} strata of t are too few; give 2 or more, T for every t")
    strata = min(count, process.timesteps) - 1
    if strata == 0:
        return [0, 1]
    information = torch.log1p((process.alpha / process.sigma) ** 2)
    position = (information[0] - information) / (information[0] - information[-1]) * strata
    index = torch.arange(strata)
    first = torch.searchsorted(position, index.double()).clamp(min=1)
    # at least one t for each stratum and for each that follows
    first = (first - index).cummax(0).values + index
    first = torch.minimum(first, process.timesteps - strata + index)
    return [0, *first.tolist(), process.timesteps]


@torch.no_grad()
def bound(model, x0, edges, u, noise, y=None):
    """Return the Bound of pixels x0 for a DDPM's ancestral sampling in T steps (Ho et al., eq. 5).

    It is that of the sampler `ddpm`, with the model's variance and clipping. In stratum k of
    `edges` (see `timestep_strata`) each image is noised by noise(k) [b, c, h, w] to the t at
    fraction u(k) [b] in [0, 1) of the stratum, whose term stands for the stratum's: unbiased over
    u, exact where a stratum is one t. With class labels y it is the likelihood given the class.
    """
    terms = []
    for k, (first, end) in enumerate(pairwise(edges)):
        t = first + (u(k) * (end - first)).long()
        x_t = model.q_sample(x0, t, noise(k))
        step = model.p_mean_variance(x_t, t, y)
        terms.append(
            (end - first) * bound_term(model.process, x0, x_t, t, step.mean, step.log_variance)
        )
    return Bound(prior_term(model.process, x0), torch.stack(terms, dim=1)[:, 1:], terms[0])


@torch.no_grad()
def flow(denoise, y, levels, divergence):
    """Return the log-density [b] in nats of y = x/alpha at the last of `levels`, by the ODE.

    `levels` fall, without CLEAN and pure noise; the density at the first is that of
    `initial_noise`. In y = x/alpha and r = sigma/alpha the probability flow is dy/dr = eps, and the
    log-density changes by minus the divergence of eps (Song et al. 2021, eq. 39). Integrated from
    the last level by the classic fourth-order Runge-Kutta method, NFE 4 a step; Heun's method takes
    four times the NFE for the same error. `divergence(f, y)` returns f(y) and its divergence [b].
    """

    def at(level, y):
        return divergence(lambda y: denoise(level.alpha * y, level)[1], y)

    change = 0
    for s, t in pairwise(levels[::-1]):
        h = t.ratio - s.ratio
        middle = levels.level_of((s.ratio + t.ratio) / 2)
        eps1, trace1 = at(s, y)
        eps2, trace2 = at(middle, y + h / 2 * eps1)
        eps3, trace3 = at(middle, y + h / 2 * eps2)
        eps4, trace4 = at(t, y + h * eps3)
        y = y + h / 6 * (eps1 + 2 * eps2 + 2 * eps3 + eps4)
        change = change + h / 6 * (trace1 + 2 * trace2 + 2 * trace3 + trace4)
    variance = 1 + levels[0].ratio ** 2
    log_prior = -0.5 * (y.double() ** 2 / variance + math.log(2 * math.pi * variance))
    return reduce(log_prior, "b c h w -> b", "sum") + change


def hutchinson(probe):
    """Return `divergence(f, y) -> (f(y), v (df/dy) v)` for a probe v of signs (Hutchinson 1990)."""

    def divergence(f, y):
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            value = f(y)
            (pulled,) = torch.autograd.grad(value, y, probe)
        return value.detach(), reduce((pulled * probe).double(), "b c h w -> b", "sum")

    return divergence


def flow_bits(model, x0, levels, u, probe, y=None):
    """Return the bits [b] of pixels x0 by a DDPM's probability flow, up to t = 0.

    The density is taken at the last of `levels`, and at x0 with uniform dequantisation noise, u in
    [0, 1) within each pixel: in the mean an upper bound on the bits of the pixels (Theis et al.
    2016, eq. 6), so that it compares with `bound`. Estimates of x0 are not clipped; `probe` as in
    `hutchinson`.
    """

    def denoise(x, level):
        # a new denoiser for each call, without a previous estimate of x0
        return model.denoiser(y=y, clip=False)(x, level)

    log_density = flow(denoise, x0 + (2 * u - 1) * HALF_PIXEL, levels, hutchinson(probe))
    return (-log_density / x0[0].numel() * BITS - math.log2(2 * HALF_PIXEL)).float()


# name -> f(*, images, nfe) -> Measurement
LIKELIHOODS = {
    "none": Measurement,
    "bound": partial(measurement, "bound"),
    "flow": partial(measurement, "flow"),
    "both": partial(measurement, "bound", "flow"),
}
