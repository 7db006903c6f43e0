"""What a person should know of a config before it trains or draws: lines, mostly none."""

import math
from functools import partial

from ddpm.common import durations, registry
from ddpm.config import defaults
from ddpm.experiment import build, step
from ddpm.models.layers import ResidualBlock

UNTRAINED = 0.05  # share of the first weights in an average that blurs or greys what is drawn


def sampling_remarks(config, section):
    """Remarks on how the section `sample` or `evaluate` of the config draws: lines, mostly none."""
    sampler = registry.parse(config[section].sampler)[0]
    if config.diffusion.variance == "learned" and sampler != "ddpm":
        return [
            f"the sampler {sampler!r} has no use for the learned variance; {section}.sampler=ddpm "
            "has"
        ]
    return []


def unused_remarks(config):
    """A remark on options that are set and have no effect: lines, mostly none."""
    values = build.spelled_out(config)
    usual = build.spelled_out(defaults.base())
    idle = {key: other for key, other in build.unused(config).items() if values[key] != usual[key]}
    if not idle:
        return []
    options = ", ".join(f"{key}={values[key]}" for key in idle)
    names = {
        key: registry.parse(values[key])[0] if isinstance(values[key], str) else values[key]
        for key in idle.values()
    }
    causes = " and ".join(f"{key}={name}" for key, name in names.items())
    return [f"{options} {'have' if len(idle) > 1 else 'has'} no effect with {causes}"]


def conditioning_remarks(net):
    """A remark on residual blocks that do not depend on time and class: lines, mostly none."""
    blocks = [layer for layer in net.modules() if isinstance(layer, ResidualBlock)]
    count = sum(not block.is_conditioned for block in blocks)
    if not count:
        return []
    return [
        f"{count} of {len(blocks)} residual blocks do not depend on time and class, because a "
        "norm with one channel a group removes what is added before it; for a new run leave "
        "norm_num_groups of model.conventions at 0"
    ]


def loss_remarks(config, model):
    """A remark on a loss without weight at the level where grids start: lines, mostly none."""
    weights = model.objective.weights
    start = int(model.process.levels(config.sample.steps, config.sample.spacing)[0].t)
    if weights[start] > 0:
        return []
    share = weights[-math.ceil(len(weights) / 20) :].sum() / weights.sum()
    return [
        f"the loss gives no weight to t = {start}, where sampling starts, and {share:.1e} of its "
        "weight to the last 5 % of t, so the network hardly learns what it predicts there; "
        "diffusion.weighting=simple weighs every t"
    ]


def length_remarks(config, dataset_size):
    """What does not fit the length of a training on so many images: lines, mostly none."""
    batch_size = config.train.batch_size
    steps = partial(durations.steps_of, batch_size=batch_size, dataset_size=dataset_size)
    total = steps(config.train.length)
    every = {
        key: durations.Every(text, batch_size, dataset_size)
        for key, text in config.every.items()
        if text != "auto"
    }
    late = [f"every.{key}" for key, interval in every.items() if (interval.first() or 0) > total]
    rate = step.rate(config, dataset_size)
    length = registry.quantity(total, "step")
    lines = []
    if 0 < dataset_size < batch_size:
        lines.append(
            f"train.batch_size is {batch_size}, more than the "
            f"{registry.quantity(dataset_size, 'image')} to learn from, so each step learns from "
            f"an image {batch_size / dataset_size:.2g} times on average; set "
            f"train.batch_size={dataset_size} or less"
        )
    lines += rate_remarks(config.train, steps, total, rate)
    for decay in (config.ema.decay, *config.ema.extra_decays):
        if not config.ema.warmup and not config.ema.rampup and decay**total > UNTRAINED:
            lines.append(
                f"{decay**total:.0%} of an average of decay {decay:g} without ema.warmup are "
                f"untrained weights after {length}; set ema.warmup=True, or a decay up to "
                f"{UNTRAINED ** (1 / total):.3g}"
            )
    if "every.milestone" in late:
        late.remove("every.milestone")
        lines.append(
            f"every.milestone is longer than the training of {length}, which keeps no milestone"
        )
    if late:
        names = ", ".join(late)
        lines.append(f"{names}: longer than the training of {length}, so only once, at its end")
    return lines


def rate_remarks(section, steps, total, rate):
    """Lines on a warm-up over half a training, and a decay that ends long before or after it."""
    length = registry.quantity(total, "step")
    warmup = steps(section.warmup)
    if 2 * warmup > total:
        words = f"more than half of the training of {length}"
        if warmup > total:
            words = (
                f"longer than the training of {length}, which ends at the rate "
                f"{rate(total - 1):.2g} of {section.learning_rate:.2g}"
            )
        # commas join durations
        shorter = registry.quantity(max(total // 20, 1), "step").replace(",", "")
        yield f"train.warmup is {section.warmup!r}, {words}; set train.warmup={shorter!r}"
    name, arguments = registry.parse(section.learning_rate_decay)
    decay = steps(arguments["length"]) if "length" in arguments else total
    # which falls on and on
    if 0.95 * total <= decay <= 1.05 * total or name == "inverse_sqrt" and decay < total:
        return
    late = "begins after the end" if name == "inverse_sqrt" else "goes on after the end"
    what = late if decay > total else "is over before the end"
    yield (
        f"train.learning_rate_decay is {section.learning_rate_decay!r}, which {what} of the "
        f"training of {length}; give it the length {section.length!r}"
    )
