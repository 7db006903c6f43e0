"""The operations of a network, a drawing and an evaluation, and how often a training is evaluated.

The interval follows from operations alone, never from speed, so that a run chooses the same when it
is resumed, and on another machine.
"""

import math
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm.common import durations
from ddpm.config import defaults, files
from ddpm.evaluation import distances, extractors, reference
from ddpm.experiment import build
from ddpm.sampling import draw
from ddpm.training import meters

# how samples are drawn where evaluate.sampler and evaluate.spacing are both auto: as good as 24
# steps of any sampler without fresh noise (experiments/solvers)
SAMPLER, STEPS, SPACING = "dpmpp", 20, "karras"
SAMPLES = 10_000  # images drawn, or as many as the training has where it has fewer
WAY = ("sampler", "steps", "spacing")
MOST = 20  # evaluations of a training: more show nothing new


def count_nfe(config, recipe, edit=None, model=None):
    """The network evaluations of an image, drawn or edited; ValueError for an impossible edit."""
    return draw.count_nfe(model or build.diffusion(config, None), recipe, edit)


class Flops(NamedTuple):
    """A network's floating-point operations on one image."""

    forward: int
    training: int  # forward and backward


def count_flops(config):
    """The Flops of a config's network, counted without computing any."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        net, (_, *size) = build.network(config), build.image_shape(config)
        out = net(
            torch.empty(1, build.channels_in(config), *size), torch.zeros(1, dtype=torch.long)
        )
        forward = counter.get_total_flops()
        out.sum().backward()
    guess = forward * config.diffusion.self_condition  # which is given its own estimate
    return Flops(forward, counter.get_total_flops() + guess)


def drawing_operations(config, flops, model=None):
    """The operations to draw and measure one image, by a network of these Flops."""
    if config.evaluate.extractor == "none":
        return 0
    looks = extractors.OPERATIONS[build.extractor_name(config)]
    recipe = build.recipe(config, config.evaluate, (), "")
    return count_nfe(config, recipe, model=model) * flops.forward + looks


def comparison_operations(config, images):
    """The operations of the distances between the drawn images of an evaluation and `images` real
    ones.
    """
    if config.evaluate.extractor == "none":
        return 0
    n = config.evaluate.num_samples
    m = min(images, reference.MAX_FEATURES)
    width = extractors.WIDTHS[build.extractor_name(config)]
    pairs = 2 * n * (n + m) * (width + distances.SUBSETS)
    fewer, more = sorted([min(n, width), min(m, width)])
    # and its Cholesky factor; below, the product of two roots, its Gram matrix and the eigenvalues
    covariance = (2 * n * width**2 + width**3 // 3) * (n >= width)
    return pairs + covariance + 2 * fewer * more * (width + fewer) + 4 * fewer**3 // 3


def likelihood_operations(config, flops):
    """The operations, at most, of the bits a dimension in one evaluation."""
    by, images, nfe = build.likelihood(config)
    each = {"bound": flops.forward, "flow": flops.training}
    return images * nfe * sum(each[name] for name in by)


def resolve_evaluation(config, images=SAMPLES, before=None):
    """The config with the open values of its section `evaluate`, auto or 0, filled in.

    If sampler and spacing are open, they and the steps are those of `before`, a resumed run's
    config, else the defaults above; if one is named, the others are those of `sample`. `images`
    is the number that the training learns from.
    """
    section = config.evaluate
    sampler, steps, spacing = config.sample.sampler, config.sample.steps, "auto"
    if section.sampler == section.spacing == "auto":
        sampler, steps, spacing = SAMPLER, min(STEPS, config.diffusion.timesteps), SPACING
        if before and before.evaluate.sampler != "auto":
            sampler, steps, spacing = (before.evaluate[key] for key in WAY)
    count = before.evaluate.num_samples if before else 0
    return files.changed(
        config,
        {
            "evaluate.sampler": sampler if section.sampler == "auto" else section.sampler,
            "evaluate.steps": section.steps or steps,
            "evaluate.spacing": spacing if section.spacing == "auto" else section.spacing,
            "evaluate.num_samples": section.num_samples
            or count
            or max(min(SAMPLES, images or SAMPLES), extractors.MIN_IMAGES),
        },
    )


class EvalPlan(NamedTuple):
    """How a training is evaluated: its config with nothing left open, how often, at what cost."""

    config: defaults.FrozenConfigDict
    interval: str
    operations: int  # of one evaluation
    # of all evaluations, in operations of the training; None where the interval hangs on the time
    share: float | None
    words: str  # for people


def plan_evaluation(config, images, flops, before=None, model=None):
    """The EvalPlan of a training on so many images, by a network of the Flops `flops`.

    `before` is the config of a continued run, `model` the DDPM, if built. `every.evaluate=auto` is
    as often as `evaluate.budget` allows, up to MOST times; the cached reference does not count.
    """
    train = config.train
    interval = config.every.evaluate
    config = resolve_evaluation(config, images, before)
    section = config.evaluate
    steps = durations.steps_of(train.length, train.batch_size, images)
    training = steps * train.batch_size * flops.training
    drawing = drawing_operations(config, flops, model)
    cost = (
        section.num_samples * drawing
        + comparison_operations(config, images)
        + likelihood_operations(config, flops)
    )
    budget = f"evaluate.budget is {section.budget:.1%}"

    def never(words):
        return EvalPlan(config, "0 steps", cost, 0.0, f"no evaluation{words}")

    if section.extractor == section.likelihood == "none":
        return never(", as evaluate.extractor and evaluate.likelihood are none")
    how = (
        f"{section.num_samples:,} images by {section.sampler} in {section.steps} steps"
        if drawing
        else "bits/dim alone"
    )
    if interval == "auto":
        if not section.budget:
            return never(f", as {budget}")
        times = min(int(section.budget * training // cost), MOST)
        if not times:
            return never(
                f": one ({how}) takes {meters.portion(cost / training, ' of')} the training's "
                f"operations, and {budget}; to evaluate at the end anyway, set "
                f"--config.every.evaluate={train.length!r}, or a smaller evaluate.num_samples"
            )
        interval = f"{math.ceil(steps / times)} steps"
    times = durations.Every(interval, train.batch_size, images).times(steps)
    if times == 0:
        return never(f", as every.evaluate is {interval!r}")
    share = None if times is None else times * cost / training
    when = "at the end" if times == 1 else f"every {interval} and at the end"
    total = {None: " each", 1: ""}.get(
        times, f" each, {meters.portion(share or 0)} for all {times}"
    )
    words = f"evaluation {when}: {how}, {meters.portion(cost / training, ' of')} the training's "
    return EvalPlan(config, interval, cost, share, f"{words}operations{total} ({budget})")
