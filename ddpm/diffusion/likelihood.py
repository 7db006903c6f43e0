"""Likelihood by the variational bound, in bits a dimension (Ho et al. 2020, eq. 5; Nichol & Dhariwal 2021, section 2).

    x0, x [b, c, h, w], x0 in [-1, 1] on the 256 values of a pixel; t [b] int64; a term is float32 [b]
"""

import math

import torch
from einops import reduce

BITS = 1 / math.log(2)
HALF_PIXEL = 1 / 255  # of 256 values over [-1, 1]


def normal_kl(mean, log_variance, other_mean, other_log_variance):
    """KL(N(mean, e^log_variance) || N(other_mean, e^other_log_variance)) in nats, element by element."""
    ratio = torch.exp(log_variance - other_log_variance)
    distance = (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    return 0.5 * (other_log_variance - log_variance + ratio + distance - 1)


def discretized_gaussian_log_likelihood(x0, mean, log_variance):
    """log of the mass of N(mean, e^log_variance) on x0's pixel value, in nats, element by element (Ho et al. 2020, eq. 13).

    Black and white take the tails. Masses are differences of survival functions on the side where they are small, so that
    they stay exact far from the mean.
    """
    scale = torch.exp(-0.5 * log_variance)
    distance = (x0 - mean).abs()  # the mass is symmetric: what lies above the mean is mirrored below it
    inner = torch.special.log_ndtr(-(distance - HALF_PIXEL) * scale)
    outer = torch.special.log_ndtr(-(distance + HALF_PIXEL) * scale)
    between = inner + torch.log(-torch.expm1((outer - inner).clamp(max=-1e-12)))
    lowest, highest = x0 < -1 + HALF_PIXEL, x0 > 1 - HALF_PIXEL
    below = torch.special.log_ndtr((x0 - mean + HALF_PIXEL) * scale)
    above = torch.special.log_ndtr(-(x0 - mean - HALF_PIXEL) * scale)
    return torch.where(lowest, below, torch.where(highest, above, between))


def bound_term(process, x0, x_t, t, mean, log_variance):
    """The term of each image's bound at its t: KL(q(x_{t-1} | x_t, x0) || N(mean, e^log_variance)), at t = 0 -log p(x0 | x_t).

    float32 [b], bits a dimension. Their sum over t, and the prior's, is the bound; T times one at a uniform t estimates it.
    """
    true_mean, _, true_log_variance = process.posterior(x0, x_t, t)
    kl = normal_kl(true_mean, true_log_variance, mean, log_variance)
    reconstruction = -discretized_gaussian_log_likelihood(x0, mean, log_variance)
    of_image = [reduce(term.float(), "b c h w -> b", "mean") * BITS for term in (kl, reconstruction)]
    return torch.where(t == 0, of_image[1], of_image[0])
