"""Checks of a whole config: types, ranges, choices, and options that contradict each other.

What needs torch is imported where it is used, so that a wrong type or range is told at once.
"""

import contextlib
import importlib
import math
from functools import cache

from ddpm.common import durations
from ddpm.common.registry import check_choice, parse, resolve
from ddpm.config import defaults
from ddpm.config.defaults import OPTIONS


def check(config):
    """Raise a ValueError, one line with the remedy, for a value or a combination that cannot run.

    Nothing is allocated. What only the network knows about its arguments is checked when `build`
    makes it.
    """
    options = defaults.flatten(config)
    check_types(options)
    check_ranges(options)
    check_source(options["data.source"])
    for key, option in OPTIONS.items():
        with about(key):
            if option.kind in KINDS:
                KINDS[option.kind](key, options[key], option)
    for rule in RULES:
        rule(options)


def check_types(options):
    """Raise a ValueError for a value of another type than the default's."""
    for key, option in OPTIONS.items():
        if type(options[key]) not in option.types:
            raise ValueError(f"config.{key} is {options[key]!r}; it takes {option.takes}")


def check_ranges(options):
    """Raise a ValueError for a number among some options that lies out of its range."""
    for key, value in options.items():
        option = OPTIONS[key]
        if option.kind == "number" and not option.low <= value <= option.high:
            raise ValueError(
                f"config.{key} is {value}; it must lie between {option.low} and {option.high}"
            )


def check_source(name):
    """Raise a ValueError for a path in place of the name of a source."""
    if "/" in name and "(" not in name:
        raise ValueError(
            f'config.data.source is {name!r}; for a folder of images write "folder(path={name!r})"'
        )


@contextlib.contextmanager
def about(key):
    """A ValueError raised inside names the option that it is about."""
    try:
        yield
    except ValueError as error:
        known = f"config.{key}" in str(error)
        raise ValueError(str(error) if known else f"config.{key}: {error}") from None


def table(name):
    """The object of a dotted name below `ddpm`, such as `diffusion.schedules.SCHEDULES`."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(f"ddpm.{module}"), attribute)


def allowed(option):
    """The values that a choice or an entry of a table may have."""
    values = []
    for choice in option.choices:
        values += list(table(choice)) if "." in str(choice) else [choice]
    return values


# --- what each kind of option takes: f(key, value, option) ---


def check_one_of(key, value, option):
    """Raise a ValueError for a value that is none of the choices."""
    check_choice(f"config.{key}", value, allowed(option))


def check_entry(key, value, option):
    """Raise a ValueError for a name that the table lacks, or arguments that its entry refuses."""
    if value in option.choices:
        return
    for renamed, before, name, reused in defaults.RENAMED_VALUES:
        if renamed == key and reused is None and parse(value)[0] == before:
            raise ValueError(
                f"config.{key} is {value!r}, which is called {name!r} now; write "
                f"--config.{key}={name}"
            )
    resolve(f"config.{key}", table(option.choices[-1]), value)


def check_numbers(key, value, option):
    """Raise a ValueError for a tuple with an item of another type, or out of range."""
    kind = type(option.low)
    in_range = all(type(item) is kind and option.low <= item <= option.high for item in value)
    if len(value) > 64 or not in_range:
        noun, example = {
            int: ("whole numbers", (1, 2, 2)),
            float: ("numbers", (0.999, 0.9995) if option.high > 0.5 else (0.05, 0.1)),
        }[kind]
        raise ValueError(
            f"config.{key} is {value}; it takes {noun} between {option.low} and {option.high}, "
            f"such as {example}"
        )


def check_length(key, value, option):
    """Raise a ValueError for a text that is no duration in steps, epochs or images."""
    durations.parse_duration(value, times=False)


def check_interval(key, value, option):
    """Raise a ValueError for a text that is no list of durations."""
    if value != option.default:
        durations.Every(value, 1, 1)


KINDS = {
    "choice": check_one_of,
    "measured": check_one_of,
    "entry": check_entry,
    "numbers": check_numbers,
    "length": check_length,
    "interval": check_interval,
}


# --- what options take together: f(options) ---


def check_averages(options):
    """Raise a ValueError for averages that are asked for twice, or never stored."""
    for key in ("ema.extra_decays", "ema.sigma_rels"):
        if len({*options[key], options["ema.decay"]}) <= len(options[key]):
            raise ValueError(
                f"config.{key} is {options[key]} beside ema.decay {options['ema.decay']}; give "
                "each number once"
            )
    if options["ema.sigma_rels"] and durations.Every(options["every.snapshot"], 1, 1).never:
        raise ValueError(
            f"config.ema.sigma_rels is {options['ema.sigma_rels']}, but never stored; set "
            "config.every.snapshot, such as '500 steps'"
        )


def check_tuples(options):
    """Raise a ValueError for tuples with too few items, or with items that are no words."""
    if len(options["data.background"]) != 3:
        raise ValueError(
            f"config.data.background is {options['data.background']}; it takes red, green and "
            "blue, such as (255, 255, 255)"
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


def check_training(options):
    """Raise a ValueError for a training of no length, a decay that cannot be, or two beginnings."""
    from ddpm.training.optim import DECAYS

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


def check_arguments(options):
    """Raise a ValueError for arguments out of range, of entries that need nothing else."""
    for key in ("model.conventions", "evaluate.likelihood"):
        with about(key):
            resolve(f"config.{key}", table(OPTIONS[key].choices[-1]), options[key])()


@cache
def process_of(beta_schedule, timesteps, zero_terminal_snr):
    """The Process of a config, built once: a start checks several configs that differ elsewhere."""
    from ddpm.diffusion import process, schedules

    return process.Process(*schedules.get_schedule(beta_schedule, timesteps, zero_terminal_snr))


def check_levels(options):
    """Raise a ValueError for a sampler, a number of steps or a spacing that the schedule cannot
    serve.
    """
    from ddpm.diffusion import process, samplers

    rehearsal = [process.Level(0.0, math.sqrt(0.5), math.sqrt(0.5)), process.CLEAN]
    learned = options["diffusion.variance"] == "learned"
    for key in ("sample.sampler", "evaluate.sampler"):
        if options[key] != "auto":
            with about(key):  # a sampler refuses arguments when it runs
                sampler = resolve(f"config.{key}", samplers.SAMPLERS, options[key])
                samplers.visited_levels(sampler, rehearsal, learned)
    names = ("beta_schedule", "timesteps", "zero_terminal_snr")
    with about("diffusion.beta_schedule"):
        levels = process_of(*(options[f"diffusion.{name}"] for name in names))
    measured = "sample" if options["evaluate.spacing"] == "auto" else "evaluate"
    for key, section in (("sample.steps", "sample"), ("evaluate.steps", measured)):
        if options[key] > options["diffusion.timesteps"]:
            raise ValueError(
                f"config.{key} is {options[key]} with only {options['diffusion.timesteps']} "
                f"timesteps; use {options['diffusion.timesteps']} or fewer"
            )
        with about(f"{section}.spacing"):
            levels.levels(options[key] or options["sample.steps"], options[f"{section}.spacing"])


def check_sharded(options):
    """Raise a ValueError for what a network that ranks share out cannot be."""
    if not options["train.fully_shard"]:
        return
    if options["train.channels_last"] not in ("auto", False):
        raise ValueError(
            "config.train.fully_shard and config.train.channels_last are both True; choose one of "
            "them"
        )
    if parse(options["model.name"])[0] == "unet_edm2":
        raise ValueError(
            "config.train.fully_shard cannot be True with config.model.name 'unet_edm2', whose "
            "layers write into their weights while they compute; choose another network, or "
            "train.fully_shard=False"
        )


def check_num_samples(options):
    """Raise a ValueError for evaluations of fewer images than precision and recall need."""
    from ddpm.evaluation.extractors import MIN_IMAGES

    count = options["evaluate.num_samples"]
    if 0 < count < MIN_IMAGES:
        raise ValueError(
            f"config.evaluate.num_samples is {count}; it takes {MIN_IMAGES} or more, or 0 for "
            "10,000, or for as many as the data have where these are fewer"
        )


def check_classes(options):
    """Raise a ValueError for guidance that the network cannot follow, and for unknown classes."""
    from ddpm.data.source import class_numbers

    learned = options["data.class_labels"]
    classes = options["data.classes"]
    for key in ("data.classes", "sample.classes", "evaluate.classes"):
        if not all(
            type(name) is str or type(name) is int and key != "data.classes"
            for name in options[key]
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
                class_numbers(options[key], classes)
    between = options["sample.guidance_interval"]
    if between != () and not (
        len(between) == 2
        and all(type(level) in (int, float) for level in between)
        and 0 <= between[0] < between[1]
    ):
        raise ValueError(
            f"config.sample.guidance_interval is {between}; it takes two noise levels "
            "sigma/alpha, the lower first, such as (0.2, 5.0), or () for all"
        )
    if options["sample.guidance"] == 1 or options["sample.guide_checkpoint"]:
        return
    given = f"config.sample.guidance is {options['sample.guidance']}, and the network"
    otherwise = "name a weaker run as sample.guide_checkpoint, or set sample.guidance=1"
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


RULES = (
    check_tuples,
    check_averages,
    check_arguments,
    check_classes,
    check_sharded,
    check_training,
    check_num_samples,
    check_levels,
)
