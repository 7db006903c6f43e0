"""Guidance against closed forms of Gaussians, and how often it asks a network."""

import math

import pytest
import torch
from einops import rearrange
from torch import nn

from ddpm.diffusion.ddpm import DDPM
from ddpm.diffusion.denoiser import Guidance, denoiser, unconditional
from ddpm.diffusion.process import Level
from ddpm.diffusion.samplers import SAMPLERS
from ddpm.diffusion.targets import TARGETS, get_target
from ddpm.runtime import device
from ddpm.sampling import draw

MEANS = torch.tensor([-0.6, 0.1, 0.5], dtype=torch.float64)
SPREAD = 0.2  # of the classes, each a Gaussian
MEAN = 0.0
WIDTH = 0.7  # of what an unlabelled network takes the data for
LEVELS = [Level(3.0, 0.8, 0.6), Level(7.0, 1.0, 2.5), Level(5.0, 0.3, 0.7)]  # on and off the circle


def best(x, alpha, sigma, mean, spread):
    """E[x0 | x] for x0 ~ N(mean, spread^2), from the joint Gaussian of x0 and x."""
    return mean + alpha * spread**2 / ((alpha * spread) ** 2 + sigma**2) * (x - alpha * mean)


class Knowing:
    """A network that says the best target at a level, for the Gaussian of each image's class, or
    for all of them together.
    """

    def __init__(self, target, level, channels=()):
        self.target = target
        self.level = level
        self.channels = channels
        self.asked = 0

    def __call__(self, shown, t, y=None):
        self.asked += 1
        alpha = self.level.alpha
        sigma = self.level.sigma
        x = shown / self.target.scale_input(1.0, alpha, sigma)
        mean, spread = (MEAN, WIDTH) if y is None else (rearrange(MEANS[y], "b -> b 1 1 1"), SPREAD)
        x0 = best(x, alpha, sigma, mean, spread)
        out = self.target.compute(x0, (x - alpha * x0) / sigma, alpha, sigma)
        return torch.cat(
            [out, *(torch.full_like(out, channel) for channel in self.channels)], dim=1
        )


def batch():
    return torch.randn(
        3, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ), torch.arange(3)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("scale", [0.0, 0.5, 2.0, 5.0])
@pytest.mark.parametrize("predict", TARGETS)
def test_the_score_is_that_of_the_tilted_gaussian(predict, scale, level):
    """p^s q^(1 - s) of two Gaussians in x is a Gaussian whose precision and precision-weighted
    mean are their sums.
    """
    x, y = batch()
    net = Knowing(get_target(predict), level)
    x0, eps = denoiser(
        net, predict=predict, clip=False, y=y, guidance=Guidance(unconditional(net), scale)
    )(x, level)
    narrow, wide = (
        1 / ((level.alpha * spread) ** 2 + level.sigma**2) for spread in (SPREAD, WIDTH)
    )
    precision = scale * narrow + (1 - scale) * wide
    centre = (
        level.alpha
        * (scale * narrow * rearrange(MEANS[y], "b -> b 1 1 1") + (1 - scale) * wide * MEAN)
        / precision
    )
    score = -precision * (x - centre)
    # float64 throughout except for sums of five terms of size ten
    torch.testing.assert_close(eps, -level.sigma * score, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        x0, (x + level.sigma**2 * score) / level.alpha, rtol=1e-11, atol=1e-11
    )


def test_another_network_guides_with_the_same_label():
    x, y = batch()
    level = LEVELS[0]
    target = get_target("v")
    net = Knowing(target, level)
    weaker = Knowing(target, level)
    alone, guided = (
        denoiser(net, predict="v", clip=False, y=y, guidance=guidance)(x, level)[0]
        for guidance in (Guidance(), Guidance(weaker, 3.0))
    )
    assert weaker.asked == 1
    # as bad as the network itself, it moves nothing
    torch.testing.assert_close(guided, alone, rtol=1e-12, atol=1e-12)


def test_guidance_comes_before_clipping_and_leaves_a_learned_variance_alone():
    x, y = batch()
    level = LEVELS[1]
    net = Knowing(get_target("eps"), level, channels=[0.5])
    worse = Knowing(get_target("eps"), level, channels=[-0.5])

    def told(guide, clip):
        guidance = Guidance(unconditional(guide), 4.0)
        return denoiser(net, predict="eps", clip=clip, y=y, learned=True, guidance=guidance)(
            x, level
        )

    free = told(worse, clip=False)
    held = told(worse, clip=True)
    assert free[0].abs().max() > 1
    assert torch.equal(held[0], free[0].clamp(-1, 1))
    assert torch.equal(held[2], torch.full_like(x, 0.75))  # (0.5 + 1) / 2, the network's own
    plain = Knowing(get_target("eps"), level)  # a guide that has learned no variance
    assert all(torch.equal(a, b) for a, b in zip(told(plain, clip=True), held, strict=True))


class Tiny(nn.Module):
    """A network that knows its label and counts how often it is called."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.labels = []

    def forward(self, x, t, y=None):
        self.labels.append(None if y is None else y.tolist())
        return self.weight * torch.tanh(x + (0 if y is None else rearrange(y, "b -> b 1 1 1")))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "guidance, interval", [(1.0, ()), (2.0, ()), (2.0, (0.3, 3.0)), (1.0, (0.3, 3.0))]
)
def test_the_network_is_asked_as_often_as_is_said(sampler, guidance, interval):
    """Once a level without guidance, twice with it, and again once outside of its interval."""
    if sampler == "ddpm":
        sampler = "ddpm(variance='small')"
    net = Tiny()
    machine = device.start()
    model = DDPM(net, timesteps=50, beta_schedule="cosine")
    recipe = draw.Recipe(sampler, 6, "linear", 0, 3, [2, 0], "2, 0", guidance, interval)
    list(draw.draw(model, recipe, range(3), (1, 4, 4), machine))
    told = net.labels.count([2, 0, 2])
    dropped = net.labels.count(None)
    assert told + dropped == len(net.labels) == draw.count_nfe(model, recipe)
    assert told == draw.count_nfe(model, recipe._replace(guidance=1.0))
    if guidance == 1 or not interval:
        assert dropped == (0 if guidance == 1 else told)
    else:
        inside = sum(
            interval[0] < level.ratio <= interval[1] for level in model.process.levels(6)[:-1]
        )
        assert 0 < inside < 6 and inside <= dropped < told


def test_sample_follows_labels_more_with_guidance():
    model = DDPM(Tiny(), timesteps=10, beta_schedule="cosine", predict="x0")
    y = torch.tensor([1, 1])
    plain, more = (
        model.sample((2, 1, 4, 4), y=y, noise=lambda k: torch.zeros(2, 1, 4, 4), guidance=scale)
        .mean()
        .item()
        for scale in (1.0, 2.0)
    )
    # from nothing the network says tanh(1) with its label and 0 without; twice the difference is
    # more
    assert more > plain > math.tanh(0.5)


def test_a_recipe_tells_how_it_guides():
    plain = draw.Recipe("ddim", 5, "linear", 0, 4)
    assert str(plain) == "ddim, 5 steps, linear spacing, seed 0"
    # guidance 1 uses neither
    assert str(plain._replace(interval=(0.2, 5.0), guide="runs/weak")) == str(plain)
    told = plain._replace(
        labels=[3, 5], classes="3, 5", guidance=2.0, interval=(0.2, 5.0), guide="runs/weak"
    )
    assert (
        str(told) == f"{plain}, guidance 2.0 in sigma/alpha 0.2 to 5.0 by runs/weak, classes 3, 5"
    )
