"""Likelihood in bits a dimension, -log2 of an image's probability over its c h w numbers: how well
a model could compress.

    x0, x [b, c, h, w], x0 in [-1, 1] on the 256 values of a pixel; t [b] int64; bits [b]
    float32, log-densities [b] float64

A network that draws in two ways has two likelihoods. `bound` is of ancestral sampling and holds
from above: the variational bound (Ho et al. 2020, eq. 5), in named terms. `flow_bits` is of the
deterministic samplers, whose ODE carries a density along (Song et al. 2021, Score SDE, eq. 39).
Neither network call is guided, nor told an earlier estimate of its own.
"""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import reduce

BITS = 1 / math.log(2)
HALF_PIXEL = 1 / 255  # of 256 values over [-1, 1]
LIKELIHOODS = ("none", "bound", "flow", "both")


def normal_kl(mean, log_variance, other_mean, other_log_variance):
    """KL(N(mean, e^log_variance) || N(other_mean, e^other_log_variance)) in nats, element by
    element.
    """
    ratio = torch.exp(log_variance - other_log_variance)
    distance = (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance + ratio + distance - 1)


def discretized_gaussian_log_likelihood(x0, mean, log_variance):
    """log of the mass of N(mean, e^log_variance) on x0's pixel value, in nats, element by element
    (Ho et al. 2020, eq. 13).

    Black and white take the tails. Masses are differences of survival functions on the side where
    they are small, so that they stay exact far from the mean.
    """
    scale = torch.exp(-0.5 * log_variance)
    # the mass is symmetric: what lies above the mean is mirrored below it
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
    """The term of each image's bound at its t: KL(q(x_{t-1} | x_t, x0) || N(mean, e^log_variance)),
    at t = 0 -log p(x0 | x_t).

    float32 [b], bits a dimension. Their sum over t, and the prior's, is the bound; T times one at a
    uniform t estimates it.
    """
    true_mean, _, true_log_variance = process.posterior(x0, x_t, t)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    reconstruction = -discretized_gaussian_log_likelihood(x0, mean, log_variance)
    of_image = [
        reduce(term.float(), "b c h w -> b", "mean") * BITS for term in (kl, reconstruction)
    ]
    return torch.where(t == 0, of_image[1], of_image[0])


def prior_term(process, x0):
    """KL(q(x_{T-1} | x0) || N(0, alpha^2 + sigma^2)), the latter where sampling starts
    (`process.latent`): bits [b].

    It holds no network, is 0 where the tables end in pure noise, and beyond repair by training
    elsewhere.
    """
    level = process.at(torch.full((len(x0),), process.timesteps - 1, device=x0.device))
    start = (level.alpha**2 + level.sigma**2).log()
    kl = normal_kl(level.alpha * x0, 2 * level.sigma.log(), torch.zeros_like(start), start)
    return (reduce(kl, "b c h w -> b", "mean") * BITS).float()


class Bound(NamedTuple):
    """The terms of each image's bound, in bits a dimension; `kl` [b, n] has the sums over n
    stretches of t above 0.
    """

    prior: torch.Tensor
    kl: torch.Tensor
    reconstruction: torch.Tensor

    @property
    def total(self):
        return self.prior + self.kl.sum(1) + self.reconstruction


def stretches(process, count):
    """t = 0 alone, and 1 .. T-1 cut into count - 1 stretches: the first t of each, and T, as a list
    of rising numbers.

    A stretch holds one t, or more where they hold no more than its share of log(1 + SNR), which
    falls by twice what white noise adds to the bound at a t: many stretches at low noise, where
    terms are large. With a `count` of T or more each t is one. Raises ValueError for less than 2.
    """
    if count < 2:
        raise ValueError(f"{count} stretches of t are too few; give 2 or more, T for every t")
    pieces = min(count, process.timesteps) - 1
    if pieces == 0:
        return [0, 1]
    information = torch.log1p((process.alpha / process.sigma) ** 2)
    share = (information[0] - information) / (information[0] - information[-1]) * pieces
    place = torch.arange(pieces)
    # of the t at which so many shares are full
    first = torch.searchsorted(share, place.double()).clamp(min=1)
    # each stretch has one t at least, and so have those that follow
    first = (first - place).cummax(0).values + place
    return [
        0,
        *torch.minimum(first, process.timesteps - pieces + place).tolist(),
        process.timesteps,
    ]


@torch.no_grad()
def bound(model, x0, edges, u, noise, y=None):
    """The Bound on the likelihood of pixels x0 under a DDPM's ancestral sampling in all its T steps
    (Ho et al. 2020, eq. 5).

    It is of the model as `ddpm` samples it: with its variance and with clipping if it clips. In
    stretch k of `edges`, as of `stretches`, each image is noised by noise(k) [b, c, h, w] to the t
    at share u(k) [b] in [0, 1) of it, whose term stands for all of them: right in the mean over u,
    and in every case where a stretch is one t. Of a network that learns classes y, it is the
    likelihood of an image given its class.
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
    """The log-density [b] of y, in nats, where the probability flow from noise at the first of
    `levels` passes the last.

    Levels fall, and none is CLEAN or pure noise; the noise is that of `process.latent`. In y =
    x/alpha and r = sigma/alpha the flow is dy/dr = eps, along which a log-density changes by minus
    the divergence of eps (Song et al. 2021, eq. 39). The classic Runge-Kutta method of fourth order
    takes both up from the last level, in four evaluations a step; Heun's needs four times as many
    for the same error. `divergence(f, y)` gives f(y) and its divergence [b].
    """

    def at(level, y):
        return divergence(lambda y: denoise(level.alpha * y, level)[1], y)

    change = 0
    for s, t in pairwise(levels[::-1]):
        h = t.ratio - s.ratio
        middle = levels.level_of((s.ratio + t.ratio) / 2)
        eps1, spread1 = at(s, y)
        eps2, spread2 = at(middle, y + h / 2 * eps1)
        eps3, spread3 = at(middle, y + h / 2 * eps2)
        eps4, spread4 = at(t, y + h * eps3)
        y = y + h / 6 * (eps1 + 2 * eps2 + 2 * eps3 + eps4)
        change = change + h / 6 * (spread1 + 2 * spread2 + 2 * spread3 + spread4)
    variance = 1 + levels[0].ratio ** 2
    start = -0.5 * (y.double() ** 2 / variance + math.log(2 * math.pi * variance))
    return reduce(start, "b c h w -> b", "sum") + change


def hutchinson(probe):
    """The divergence of f as v (df/dy) v for a probe v [b, c, h, w] of signs, right in the mean
    over probes (Hutchinson 1990).

    One vector-Jacobian product (Song et al. 2021, eq. 40); of all probes, signs vary least.
    """

    def divergence(f, y):
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            value = f(y)
            (pulled,) = torch.autograd.grad(value, y, probe)
        return value.detach(), reduce((pulled * probe).double(), "b c h w -> b", "sum")

    return divergence


def flow_bits(model, x0, levels, u, probe, y=None):
    """Bits of pixels x0 under a DDPM's probability flow: those of the deterministic samplers, short
    of their step to CLEAN.

    The density is taken where `levels` end, at t = 0, and at x0 with uniform noise, u in [0, 1)
    over each pixel, which in the mean gives no less than the bits of the model's pixels (Theis et
    al. 2016, eq. 6), so that it compares with the bound. Estimates of x0 are not clipped; the
    divergence is estimated with `probe`, as of `hutchinson`.
    """

    def denoise(x, level):
        # made anew, or it remembers its last estimate
        return model.denoiser(y=y, clip=False)(x, level)

    log_density = flow(denoise, x0 + (2 * u - 1) * HALF_PIXEL, levels, hutchinson(probe))
    return (-log_density / x0[0].numel() * BITS - math.log2(2 * HALF_PIXEL)).float()
