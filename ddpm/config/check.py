"""Checks of a whole config: types, ranges, choices, and options that contradict each other."""

import contextlib
import math

from ddpm import data
from ddpm.common import durations
from ddpm.common.registry import check_choice, parse, resolve
from ddpm.config import defaults
from ddpm.data import source
from ddpm.diffusion.likelihood import LIKELIHOODS
from ddpm.diffusion.losses import LOSSES
from ddpm.diffusion.process import CLEAN, VARIANCES, Level, Process
from ddpm.diffusion.samplers import SAMPLERS, count_nfe
from ddpm.diffusion.schedules import SCHEDULES, get_schedule
from ddpm.diffusion.spacings import SPACINGS
from ddpm.diffusion.targets import TARGETS
from ddpm.diffusion.timesteps import TIMES
from ddpm.diffusion.weightings import WEIGHTINGS
from ddpm.evaluation import extractors
from ddpm.models import MODELS
from ddpm.runtime import device
from ddpm.tracking import wandb
from ddpm.training.optim import DECAYS, OPTIMIZERS

RANGES = {
    "seed": (0, 2**63 - 1),
    "data.image_size": (1, 4096),
    "data.augment": (0, 0.9),
    "data.validation_fraction": (0, 0.9),
    "data.num_workers": (0, 256),
    "model.model_channels": (1, 65536),
    "model.num_res_blocks": (1, 64),
    "model.num_heads": (1, 1024),
    "model.num_head_channels": (0, 65536),
    "model.dropout": (0, 0.99),
    "model.freq_shift": (0, 1),
    "model.downsample_padding": (0, 1),
    "model.norm_num_groups": (0, 1024),
    "model.norm_eps": (0, 1),
    "diffusion.timesteps": (1, 10_000),
    "train.batch_size": (1, 2**20),
    "train.gradient_accumulation_steps": (1, 2**20),
    "train.learning_rate": (0, 1),
    "train.spike": (0, 1_000_000),
    "train.rollback": (0, 1),
    "train.gradient_clip": (0, float("inf")),
    "train.label_dropout": (0, 0.99),
    "train.max_hours": (0, 10_000),
    "ema.decay": (0, 0.999999999),
    "ema.rampup": (0, 1),
    "sample.steps": (1, 10_000),
    "sample.guidance": (0, 1000),
    "sample.num_images": (1, 4096),
    "sample.batch_size": (1, 65536),
    "sample.ema": (0, 0.999999999),
    "sample.seed": (0, 2**63 - 1),
    "evaluate.budget": (0, 1),
    "evaluate.num_samples": (0, 10_000_000),
    "evaluate.steps": (0, 10_000),
    "evaluate.batch_size": (1, 65536),
    "evaluate.likelihood_images": (1, 10_000_000),
    "evaluate.likelihood_evaluations": (4, 10_000),
}
CHOICES = {
    "data.channels": (1, 3, 4),
    "model.augmentation_place": ("before", "after"),
    "model.initialization": ("glorot", "torch"),
    "model.noise_embedding": ("auto", "sines"),
    "diffusion.variance": VARIANCES,
    "train.amp": device.AMP,
    "train.cudnn_benchmark": device.BENCHMARK,
    "train.activation_checkpointing": ("none", "auto", "all"),
    "evaluate.extractor": ("auto", *extractors.EXTRACTORS, "none"),
    "evaluate.likelihood": LIKELIHOODS,
    "wandb.mode": wandb.MODES,
}
SPECS = {
    "data.source": data.SOURCES,
    "model.name": MODELS,
    "diffusion.beta_schedule": SCHEDULES,
    "diffusion.predict": TARGETS,
    "diffusion.loss": LOSSES,
    "diffusion.weighting": WEIGHTINGS,
    "diffusion.times": TIMES,
    "train.optimizer": OPTIMIZERS,
    "train.learning_rate_decay": DECAYS,
    "sample.sampler": SAMPLERS,
    "sample.spacing": SPACINGS,
    "evaluate.sampler": SAMPLERS,
    "evaluate.spacing": SPACINGS,
}
REHEARSAL = [Level(0.0, math.sqrt(0.5), math.sqrt(0.5)), CLEAN]
LENGTHS = ("train.length", "train.warmup")
INTEGER_TUPLES = {
    "data.matte": (0, 255),
    "model.channel_mult": (1, 64),
    "model.res_blocks_per_level": (1, 64),
    "model.attention_resolutions": (1, 4096),
}
FRACTION_TUPLES = {  # apart, so that a number says which of the two it is
    "ema.more": (0.3, 0.999999999, (0.999, 0.9995)),
    "ema.profiles": (0.001, 0.288, (0.05, 0.1)),
}
KINDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a tuple such as (1, 2)",
}


def check(config):
    """Raise a ValueError, one line with the remedy, for a value or a combination that cannot be
    run.

    Nothing is allocated; what only the network knows about its arguments is checked when `build`
    makes it.
    """
    options = defaults.flatten(config)
    for key, default in defaults.flatten(defaults.base()).items():
        if type(options[key]) is not type(default):
            raise ValueError(f"config.{key} is {options[key]!r}; it takes {KINDS[type(default)]}")
    check_ranges(options)
    for key, allowed in CHOICES.items():
        check_choice(f"config.{key}", options[key], list(allowed))
    if "/" in options["data.source"] and "(" not in options["data.source"]:
        raise ValueError(
            f"config.data.source is {options['data.source']!r}; for a folder of images write "
            f'"folder(path={options["data.source"]!r})"'
        )
    for key, table in SPECS.items():
        if key in ("evaluate.sampler", "evaluate.spacing") and options[key] == "auto":
            continue
        with about(key):
            check_renamed(key, options[key])
            chosen = resolve(f"config.{key}", table, options[key])
            if table is SAMPLERS:
                # which refuses what it cannot do
                count_nfe(chosen, REHEARSAL, options["diffusion.variance"] == "learned")
    for key, (low, high) in INTEGER_TUPLES.items():
        if len(options[key]) > 64 or not all(
            type(item) is int and low <= item <= high for item in options[key]
        ):
            raise ValueError(
                f"config.{key} is {options[key]}; it takes whole numbers between {low} and {high}, "
                "such as (1, 2, 2)"
            )
    for key, (low, high, example) in FRACTION_TUPLES.items():
        if not all(type(item) is float and low <= item <= high for item in options[key]):
            raise ValueError(
                f"config.{key} is {options[key]}; it takes numbers between {low} and {high}, such "
                f"as {example}"
            )
        if len({*options[key], options["ema.decay"]}) <= len(options[key]):
            raise ValueError(
                f"config.{key} is {options[key]} beside ema.decay {options['ema.decay']}; give "
                "each number once"
            )
    if len(options["data.matte"]) != 3:
        raise ValueError(
            f"config.data.matte is {options['data.matte']}; it takes red, green and blue, such as "
            "(255, 255, 255)"
        )
    if not options["model.channel_mult"]:
        raise ValueError(
            "config.model.channel_mult is empty; it takes a factor for each level, such as (1, 2, "
            "2)"
        )
    if not all(type(tag) is str for tag in options["wandb.tags"]):
        raise ValueError(
            f"config.wandb.tags is {options['wandb.tags']}; it takes words, such as ('cats', "
            "'small')"
        )
    check_classes(options)
    check_sharded(options)
    for key in LENGTHS:
        with about(key):
            durations.parse_duration(options[key], times=False)
    if not durations.parse_duration(options["train.length"])[0]:
        raise ValueError(
            f"config.train.length is {options['train.length']!r}; it takes more than nothing, such "
            "as '1 step'"
        )
    with about("train.learning_rate_decay"):
        name, arguments = parse(options["train.learning_rate_decay"])
        if "length" in arguments:
            arguments["length"] = durations.steps_of(arguments["length"], 1, 1)
        DECAYS[name](0, **arguments)
    for key in config["every"]:
        if (key, options[f"every.{key}"]) != ("evaluate", "auto"):
            with about(f"every.{key}"):
                durations.Every(options[f"every.{key}"], 1, 1)
    check_budget(options)
    if options["ema.profiles"] and durations.Every(options["every.snapshot"], 1, 1).never:
        raise ValueError(
            f"config.ema.profiles is {options['ema.profiles']}, but never stored; set "
            "config.every.snapshot, such as '500 steps'"
        )
    if options["train.deterministic"] and options["train.cudnn_benchmark"] == "on":
        raise ValueError(
            "config.train.deterministic is True and config.train.cudnn_benchmark is 'on', which "
            "takes whichever convolution was faster this time; set train.cudnn_benchmark=auto, or "
            "train.deterministic=False"
        )
    if options["train.init_from"] and options["train.resume_from"]:
        raise ValueError(
            f"config.train.init_from is {options['train.init_from']!r} and "
            f"config.train.resume_from {options['train.resume_from']!r}; choose init_from to "
            "start from weights alone, or resume_from to continue with the optimizer, the "
            "averages and the step"
        )
    size = options["train.batch_size"]
    parts = options["train.gradient_accumulation_steps"]
    if size % parts:
        raise ValueError(
            f"config.train.batch_size {size} cannot be cut into {parts} equal micro-batches; "
            f"choose gradient_accumulation_steps among the divisors of {size}"
        )
    with about("diffusion.beta_schedule"):
        process = Process(
            *get_schedule(
                *(
                    options[f"diffusion.{key}"]
                    for key in ("beta_schedule", "timesteps", "zero_terminal_snr")
                )
            )
        )
    usual = options["sample.spacing"]
    measured = options["evaluate.spacing"]
    named = ("sample", usual) if measured == "auto" else ("evaluate", measured)
    for key, (section, spacing) in (("sample.steps", ("sample", usual)), ("evaluate.steps", named)):
        if options[key] > options["diffusion.timesteps"]:
            raise ValueError(
                f"config.{key} is {options[key]} with only {options['diffusion.timesteps']} "
                f"timesteps; use {options['diffusion.timesteps']} or fewer"
            )
        with about(f"{section}.spacing"):
            process.levels(options[key] or options["sample.steps"], spacing)


def check_ranges(options):
    """Raise a ValueError for a number among some options that lies out of its range."""
    for key in [key for key in RANGES if key in options]:
        low, high = RANGES[key]
        if not low <= options[key] <= high:
            raise ValueError(
                f"config.{key} is {options[key]}; it must lie between {low} and {high}"
            )


def check_renamed(key, value):
    """Raise a ValueError for a value that has another name now."""
    for renamed, before, name, reused in defaults.RENAMED:
        if renamed == key and reused is None and parse(value)[0] == before:
            raise ValueError(
                f"config.{key} is {value!r}, which is called {name!r} now; write "
                f"--config.{key}={name}"
            )


def check_sharded(options):
    """Raise a ValueError for what a network that ranks share out cannot be."""
    if not options["train.fully_shard"]:
        return
    for key in ("train.compile", "train.channels_last"):
        if options[key]:
            raise ValueError(
                f"config.train.fully_shard and config.{key} are both True; choose one of them"
            )
    if parse(options["model.name"])[0] == "unet_edm2":
        raise ValueError(
            "config.train.fully_shard cannot be True with config.model.name 'unet_edm2', whose "
            "layers write into their weights while they compute; choose another network, or "
            "train.fully_shard=False"
        )


def check_budget(options):
    """Raise a ValueError for what leaves the budget of evaluations nothing to choose a number of
    images by.
    """
    count = options["evaluate.num_samples"]
    often = options["every.evaluate"]
    if 0 < count < extractors.MIN_IMAGES:
        raise ValueError(
            f"config.evaluate.num_samples is {count}; it takes {extractors.MIN_IMAGES} or more, or "
            "0 for as many as evaluate.budget allows"
        )
    if count or often == "auto" or (every := durations.Every(often, 1, 1)).never:
        return
    if every.seconds:
        raise ValueError(
            f"config.every.evaluate is {often!r}, and no budget can tell how often that will be; "
            "give evaluate.num_samples too, such as 10000"
        )
    if not options["evaluate.budget"]:
        raise ValueError(
            f"config.every.evaluate is {often!r}, and evaluate.budget 0 allows no image; give "
            "evaluate.num_samples, such as 10000, or a budget, such as 0.05"
        )


def check_classes(options):
    """Raise a ValueError for what cannot be of guidance, and of classes as far as they are known
    yet.
    """
    learned = options["data.class_labels"]
    classes = options["data.classes"]
    for key in ("data.classes", "sample.classes", "evaluate.classes"):
        if not all(
            type(one) is str or type(one) is int and key != "data.classes" for one in options[key]
        ):
            raise ValueError(
                f"config.{key} is {options[key]}; it takes the names of classes, such as ('cat', "
                "'dog')"
            )
        if options[key] and not learned:
            raise ValueError(
                f"config.{key} is {','.join(map(str, options[key]))}, and the network knows no "
                "classes; leave it out, or train with data.class_labels=True"
            )
        if classes:
            with about(key):
                source.class_numbers(options[key], classes)
    between = options["sample.guidance_interval"]
    if between != () and not (
        len(between) == 2
        and all(type(one) in (int, float) for one in between)
        and 0 <= between[0] < between[1]
    ):
        raise ValueError(
            f"config.sample.guidance_interval is {between}; it takes two noise levels "
            "sigma/alpha, the lower first, such as (0.2, 5.0), or () for all"
        )
    if options["sample.guidance"] == 1 or options["sample.guide"]:
        return
    given = f"config.sample.guidance is {options['sample.guidance']}, and the network"
    otherwise = "name a weaker run as sample.guide, or set sample.guidance=1"
    if not learned:
        raise ValueError(
            f"{given} knows no classes to be guided by; train with data.class_labels=True, "
            f"{otherwise}"
        )
    if not options["train.label_dropout"]:
        raise ValueError(
            f"{given} has never done without its label; train with train.label_dropout=0.1, "
            f"{otherwise}"
        )


@contextlib.contextmanager
def about(key):
    """A ValueError raised inside names the option that it is about."""
    try:
        yield
    except ValueError as error:
        known = f"config.{key}" in str(error)
        raise ValueError(str(error) if known else f"config.{key}: {error}") from None
