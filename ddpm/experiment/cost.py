"""How a training is evaluated within a budget: drawn how, of how many images, how often.

The choice hangs on operations alone, never on speed, so that a run that goes on, and one elsewhere,
choose the same.
"""

import contextlib
import math
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from ddpm.common import durations
from ddpm.config import defaults, files
from ddpm.evaluation import extractors
from ddpm.experiment import build
from ddpm.sampling import draw
from ddpm.training import meters

# images: few numbers, so that runs that cost nearly the same compare
COUNTS = (1000, 2000, 5000, 10_000, 20_000, 50_000)
COMPARED = 10_000  # images that a distance should rest on before it is drawn at leisure
# as good as 24 steps of any sampler without fresh noise: experiments/solvers
FAST = ("dpmpp", 20, "karras")
CURVE = 5  # evaluations that make a curve
MOST = 20  # more show nothing new


class Way(NamedTuple):
    """How images are drawn, and the operations that one takes, drawn and looked at."""

    sampler: str
    steps: int
    cost: float
    spacing: str = "auto"


def choose(room, ways, each=0.0, count=0, times=0):
    """(way, count, times): evaluations that together take no more than `room` operations; `times` 0
    where not one fits.

    An evaluation takes `each` operations beside its images. Of `ways`, the best first, it takes one
    by which five evaluations of 10,000 images fit, else the last and fastest; of COUNTS the most
    images that leave five evaluations, else the fewest; and then as many evaluations as fit, up to
    twenty. A `count` or `times` that is given stays, whatever it costs, and takes the place of
    those 10,000 or five.
    """
    enough = times or CURVE

    def fit(way, count):
        cost = each + count * way.cost
        return int(room // cost) if cost else MOST

    way = next((way for way in ways if fit(way, count or COMPARED) >= enough), ways[-1])
    count = count or max((some for some in COUNTS if fit(way, some) >= enough), default=COUNTS[0])
    return way, count, times or min(fit(way, count), MOST)


def evaluations(config, recipe, edit=None):
    """How many network evaluations an image takes, drawn or edited; raises ValueError where the
    recipe cannot make the edit.
    """
    return draw.evaluations(build.diffusion(config, None), recipe, edit)


class Operations(NamedTuple):
    """The floating-point operations of a network on one image, and the kernels that it launches
    for a micro-batch at least.
    """

    forward: int
    training: int  # forward and backward
    kernels: int = 0  # forward and backward, where it is not compiled


def operations(config):
    """The Operations of a config's network, counted without computing any."""
    with (
        torch.device("meta"),
        FlopCounterMode(display=False) as counter,
        build.Kernels() as launched,
    ):
        net, (_, *size) = build.network(config), build.image_shape(config)
        launched.count = 0  # the weights' first values are no part of a step
        out = net(
            torch.empty(1, build.channels_in(config), *size), torch.zeros(1, dtype=torch.long)
        )
        forward = counter.get_total_flops()
        out.sum().backward()
    guess = forward * config.diffusion.self_condition  # which is given its own estimate
    return Operations(forward, counter.get_total_flops() + guess, launched.count)


def drawing_operations(config, asked):
    """The operations of one image that an evaluation draws and looks at, by a network that takes
    the Operations `asked`.
    """
    if config.evaluate.extractor == "none":
        return 0
    looks = extractors.OPERATIONS[build.extractor_name(config)]
    return (
        evaluations(config, build.recipe(config, config.evaluate, (), "")) * asked.forward + looks
    )


def likelihood_operations(config, asked):
    """The operations, at most, of the bits a dimension in one evaluation."""
    section = config.evaluate
    each = {"none": 0, "bound": asked.forward, "flow": asked.training, "both": sum(asked[:2])}[
        section.likelihood
    ]
    return section.likelihood_images * section.likelihood_evaluations * each


def settled(config, sampler="", steps=0, spacing="auto", count=COMPARED):
    """The config with what its section `evaluate` leaves open: these, or as the section `sample`
    draws.

    `spacing` belongs to `sampler`, and is left out where the config names another; `auto` stays,
    and is `sample.spacing`.
    """
    section = config.evaluate
    shared = config.sample
    return files.changed(
        config,
        {
            "evaluate.sampler": (sampler or shared.sampler)
            if section.sampler == "auto"
            else section.sampler,
            "evaluate.spacing": spacing
            if section.sampler == section.spacing == "auto"
            else section.spacing,
            "evaluate.steps": section.steps or steps or shared.steps,
            "evaluate.num_samples": section.num_samples or count,
        },
    )


def ways(config, asked, spacing):
    """The budget's Ways in which an evaluation may be drawn: as the section `sample` draws, and a
    faster one, if there is.

    `spacing` is that of the faster one.
    """
    found, (fast, steps, _) = [], FAST
    for given in ((), (fast, min(steps, config.diffusion.timesteps), spacing)):
        with contextlib.suppress(ValueError):  # a spacing may know no such number of steps
            one = settled(config, *given)
            section = one.evaluate
            found.append(
                Way(section.sampler, section.steps, drawing_operations(one, asked), section.spacing)
            )
    return found if found[-1].cost < found[0].cost else found[:1]


class Evaluated(NamedTuple):
    """How a training is evaluated: by a config that leaves nothing open, how often, and what
    that takes.
    """

    config: defaults.FrozenConfigDict
    interval: str
    operations: int  # of one evaluation
    # of the training's operations, all evaluations; None where the interval hangs on the time
    share: float | None
    words: str  # for people


def evaluated(config, images, asked, spacing=FAST[2]):
    """The Evaluated of a training that learns from `images` images, by a network that takes the
    Operations `asked`.

    `evaluate.budget` chooses what is left open, as of `resolve`; `spacing` comes with its faster
    sampler. The features of the real images are kept for all runs, and not counted.
    """
    section = config.evaluate
    train = config.train
    interval = config.every.evaluate
    steps = durations.steps_of(train.length, train.batch_size, images)
    auto = interval == "auto"
    whole = steps * train.batch_size * asked.training
    bits = likelihood_operations(config, asked)
    allowed = f"evaluate.budget is {section.budget:.1%}"

    def one(config):
        return config.evaluate.num_samples * drawing_operations(config, asked) + bits

    def never(words):
        usual = settled(config)
        return Evaluated(usual, "0 steps", one(usual), 0.0, words)

    times = 0 if auto else durations.Every(interval, train.batch_size, images).times(steps)
    if section.extractor == section.likelihood == "none":
        return never("no evaluation, as evaluate.extractor and evaluate.likelihood are none")
    if times == 0 and not (auto and section.budget):
        return never(f"no evaluation, as {allowed if auto else f'every.evaluate is {interval!r}'}")

    possible = ways(config, asked, spacing)
    way, count, chosen = choose(
        section.budget * whole, possible, bits, section.num_samples, times or 0
    )
    made = settled(config, way.sampler, way.steps, way.spacing, count)
    how = (
        f"{count:,} images by {way.sampler} in {way.steps} steps" if way.cost else "bits/dim alone"
    )
    how += f", {meters.portion(one(made) / whole, ' of')} the training's operations"
    if not auto and section.num_samples and section.steps and section.sampler != "auto":
        allowed = "all as the config says, so that evaluate.budget chooses nothing"
    if auto and not chosen:
        return never(
            f"no evaluation: one of {how}, is too much, as {allowed}; to get one at the end "
            f"anyway, set --config.every.evaluate={train.length!r}"
        )
    if auto:
        interval = f"{math.ceil(steps / chosen)} steps"
        times = durations.Every(interval, train.batch_size, images).times(steps)
    share = None if times is None else times * one(made) / whole
    when = "at the end" if times == 1 else f"every {interval} and at the end"
    total = (
        ""
        if times == 1
        else " each"
        if times is None
        else f" each, {meters.portion(share)} for all {times}"
    )
    return Evaluated(
        made, interval, one(made), share, f"evaluation {when}: {how}{total} ({allowed})"
    )
