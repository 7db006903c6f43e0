"""What `auto` of train.compile and train.channels_last means: measured on a GPU, False on a CPU.

On a GPU, before a training begins, each combination of the options trains a network for a few
steps on images of noise, without dropout. The fastest is chosen of those whose loss and gradient
agree with the plain network's; then fewer micro-batches are tried with it. The choice is cached for
this kind of GPU, torch version and network, and stays in the run's config. The measurements are
tested on a CPU; they have not run on a GPU yet.
"""

import gc
import hashlib
import json
import time
from functools import partial
from typing import NamedTuple

import torch

from ddpm.common import errors
from ddpm.common.files import cache_dir, read_cached_json, write_cached_json
from ddpm.config import defaults, files
from ddpm.experiment import build, memory
from ddpm.experiment import step as experiment_step
from ddpm.runtime.compile import of_kernels
from ddpm.runtime.out_of_memory import BatchDoesNotFit, ran_out

LIMIT = 600.0  # seconds that all measurements may take
SHARE = 0.05  # of the training's time that they may take
COMPILE_SECONDS = 60.0  # that a compilation takes at the least: none begins with less time left
GAIN = 1.03  # how many times as fast a way must be to be preferred
WARM_UP = 2  # steps before the timed ones
TIMED_SECONDS = 2.0  # of timed steps: 2 to 20 of them
TOLERANCE = {torch.float32: 1e-3}  # of loss and gradient norm, as a share of the plain network's
FAILED = "torch.compile failed"
HALF_TOLERANCE = 0.02  # in half precision, where the order of sums and fused kernels matter more
KEYS = ("train.compile", "train.channels_last", files.MICRO_BATCHES)
# options that change how long a step takes; a dot at the end is for a section
MATTERS = (
    *KEYS,
    "model.",
    "diffusion.",
    "data.image_size",
    "data.channels",
    "data.augment",
    "train.batch_size",
    "train.optimizer",
    "train.deterministic",
    "train.activation_checkpointing",
    "ema.extra_decays",
    "ema.sigma_rels",
)


class Way(NamedTuple):
    """Values of the options KEYS: one way to compute the same training step."""

    compile: bool | str
    channels_last: bool
    micro_batches: int

    @property
    def options(self):
        return dict(zip(KEYS, self, strict=True))

    @property
    def words(self):
        return ", ".join(f"{key}={value}" for key, value in self.options.items())


class Result(NamedTuple):
    """What a trial measured: seconds a step, first loss and gradient norm, bytes at the peak."""

    seconds: float
    loss: float
    norm: float
    peak: int


class Unusable(Exception):
    """A way that does not serve, with the reason."""


# Ways with fewer micro-batches are tried with the best of these; channels_last pays compiled
COMBINATIONS = (
    (False, False),
    (False, True),
    (True, True),
    (True, False),
    ("stages", True),
    ("stages", False),
)


def measures(machine):
    """Whether `auto` is measured on this machine."""
    return machine.device.type == "cuda"


def resolve(config, saved, machine, steps, say):
    """(the config with values in place of `auto`, lines on how they were chosen).

    A training that continues takes those of its `saved` config. `steps` is how long the training
    is; `say(text)` announces each trial. All ranks take part and get the same.
    """
    if saved:
        config = files.with_measured(config, saved)
    unresolved = [key for key in files.MEASURED if defaults.flatten(config)[key] == "auto"]
    if not unresolved:
        return config, []
    if not measures(machine) or config.train.fully_shard:  # compiled only if named
        return files.changed(config, dict.fromkeys(unresolved, False)), []
    name = f"autotune/{fingerprint(config, machine)}"
    way = machine.broadcast(cached_way(config, name) if machine.main else None)
    file = cache_dir() / f"{name}.json"
    if way:
        notes = [f"chosen by earlier measurements: {way.words}; to measure again, delete {file}"]
    else:
        trials = Trials(config, machine, steps, say)
        way = trials.run()
        notes = trials.notes
        if trials.complete and machine.main:
            write_cached_json(name, way._asdict())
    return files.changed(config, way.options), notes


def fingerprint(config, machine):
    """A hash of what decides how fast a way is: GPU, torch, ranks and the options in MATTERS."""
    on_gpu = machine.device.type == "cuda"
    options = defaults.flatten(config)
    facts = {key: value for key, value in options.items() if key.startswith(MATTERS)} | {
        "gpu": torch.cuda.get_device_name(machine.device) if on_gpu else "cpu",
        "torch": torch.__version__,
        "ranks": machine.world,
        "dtype": str(machine.dtype),
        "classes": len(config.data.classes),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def cached_way(config, name):
    """The Way cached under a name, or None if there is none that the config allows."""
    content = read_cached_json(name)
    parts = content.get("micro_batches")
    if content.keys() != set(Way._fields) or type(parts) is not int or parts < 1:
        return None
    way = Way(**content)
    allowed = way[:2] in COMBINATIONS and config.train.gradient_accumulation_steps % parts == 0
    return way if allowed else None


class Trials:
    """Measures ways to compute a config's training step; `notes` are lines on each of them.

    `complete` is False if the compiler failed, or the training is too short to try all.
    """

    def __init__(self, config, machine, steps, say):
        self.config = config
        self.machine = machine
        self.steps = steps
        self.say = say
        self.notes = []
        self.skipped = []  # in words, for lack of time
        self.complete = True
        self.began = time.monotonic()
        self.budget = LIMIT

    def run(self):
        """The Way to train; the plain network in the config's micro-batches if none is faster."""
        section = self.config.train
        parts = section.gradient_accumulation_steps
        allowed = [section.compile]
        if section.compile == "auto":  # several ranks compile by stage, also where it is True
            allowed = [False, "stages"] if self.machine.world > 1 else [False, True, "stages"]
        plain, *others = [
            Way(*pair, parts)
            for pair in COMBINATIONS
            if pair[0] in allowed and section.channels_last in ("auto", pair[1])
        ]
        self.say(
            "measuring the fastest way to compute a step, as train.compile or train.channels_last "
            f"is auto, in {LIMIT / 60:.0f} minutes at most ..."
        )
        reference = self.trial(plain)
        best, fastest = plain, reference
        if reference:
            # rank 0's clock decides, and a short training is not worth long measurements
            seconds = min(LIMIT, SHARE * self.steps * reference.seconds)
            self.budget = self.machine.broadcast(seconds)
            for way in others:
                result = self.trial(way, reference)
                if result and result.seconds * GAIN < fastest.seconds:
                    best, fastest = way, result
            for fewer in [n for n in range(parts - 1, 0, -1) if parts % n == 0]:
                way = best._replace(micro_batches=fewer)
                result = self.trial(way, reference)
                if not result or result.seconds * GAIN >= fastest.seconds:
                    break
                best, fastest = way, result
        if self.skipped:
            self.notes.append(f"not tried, for lack of time: {'; '.join(self.skipped)}")
        gain = f", {reference.seconds / fastest.seconds:.2f} times as fast" if best != plain else ""
        self.notes.append(f"this training takes {best.words}{gain}")
        return best

    def trial(self, way, reference=None):
        """The Result of a way, or None if it does not serve; adds a note on it.

        Its loss and gradient must agree with those of the Result `reference`, if there is one.
        """
        self.machine.check_stop()
        left = self.budget - (time.monotonic() - self.began)
        if not self.machine.broadcast(left >= (COMPILE_SECONDS if way.compile else 0)):
            self.complete = self.complete and self.budget == LIMIT
            self.skipped.append(way.words)
            return None
        self.say(f"trying {way.words} ...")
        try:
            # masks of dropout depend on the layout and the micro-batch: nothing would agree
            options = way.options | {"model.dropout": 0.0}
            result = measure(files.changed(self.config, options), self.machine)
            if reference:
                check_agreement(result, reference, self.machine.dtype)
        except Unusable as reason:
            self.complete = self.complete and FAILED not in str(reason)
            self.notes.append(f"{way.words}: {reason}")
            result = None
        gc.collect()  # the trial's network, compiled code and memory
        torch.compiler.reset()
        self.machine.empty_cache()
        if result:
            rate = self.config.train.batch_size / result.seconds
            peak = f", {result.peak / 2**30:.2f} GiB" if result.peak else ""
            speed = f"{1000 * result.seconds:.4g} ms a step, {rate:,.4g} images/s{peak}"
            self.notes.append(f"{way.words}: {speed}")
        return result


def measure(config, machine):
    """The Result of training a new network of a config for some steps; Unusable if that fails."""
    step, batch = on_all_ranks(machine, partial(throw_away_step, config, machine))
    machine.reset_peak()
    on_all_ranks(machine, partial(step, 0, batch))
    readings = step.meters.read()
    first = on_all_ranks(machine, partial(seconds_of, step, batch, range(1, 1 + WARM_UP)))
    count = min(max(int(TIMED_SECONDS / max(machine.all_gather(first))), 2), 20)
    numbers = range(1 + WARM_UP, 1 + WARM_UP + count)
    seconds = on_all_ranks(machine, partial(seconds_of, step, batch, numbers))
    return Result(
        max(machine.all_gather(seconds)),
        readings["train/loss"],
        readings["train/grad_norm"],
        max(machine.all_gather(machine.reset_peak())),
    )


def throw_away_step(config, machine):
    """(TrainStep, batch of noise) of a new network that shares nothing with the training's."""
    net = build.network(config)
    with torch.no_grad():  # weights that begin as zeros would hide a part of the network
        for weight in net.parameters():
            if not weight.any():
                weight.normal_(std=0.02)
    levels = memory.choose_recomputed_levels(config, net, machine, lambda text: None)
    network = experiment_step.wrap_network(config, net, machine, levels, lambda text: None)
    averages = list(experiment_step.averages(config, network.weights).values())
    model = build.diffusion(config, None)
    step = experiment_step.step(config, model, network, averages, config.train.batch_size)
    # both are called where a training would go on in another way
    network.say = step.say = refuse
    if config.train.compile:
        network.use_compiler(config.train.compile)
    images, labels = experiment_step.blank(config, len(step.places))
    images.random_(0, 256, generator=torch.Generator().manual_seed(machine.rank))
    return step, (images, labels)


def refuse(text):
    """Raise Unusable with the first part of a text; the rest advises what a training can do."""
    raise Unusable(text.partition(";")[0])


def on_all_ranks(machine, work):
    """The value of `work()`; Unusable on all ranks if memory or the compiler fails on one."""
    value = None
    why = ""
    try:
        value = work()
    except Unusable as reason:
        why = str(reason)
    except Exception as error:  # a compiler has many
        if isinstance(error, BatchDoesNotFit) or ran_out(error):
            why = "out of memory"
        elif of_kernels(error):
            raise
        else:
            why = f"{FAILED}: {errors.one_line_with_type(error)}"
    reasons = [reason for reason in machine.all_gather(why) if reason]
    if reasons:
        raise Unusable(reasons[0])
    return value


def seconds_of(step, batch, numbers):
    """The mean seconds of the steps with these numbers on this rank."""
    machine = step.machine
    machine.wait()
    began = time.monotonic()
    for number in numbers:
        machine.check_stop()
        step(number, batch)
    machine.wait()
    return (time.monotonic() - began) / len(numbers)


def check_agreement(result, reference, dtype):
    """Raise Unusable if loss and gradient norm of a Result are not those of another one."""
    tolerance = TOLERANCE.get(dtype, HALF_TOLERANCE)
    pairs = ((result.loss, reference.loss), (result.norm, reference.norm))
    if any(not abs(value - expected) <= tolerance * abs(expected) for value, expected in pairs):
        raise Unusable(
            f"its loss {result.loss:.5g} and gradient norm {result.norm:.5g} differ from "
            f"{reference.loss:.5g} and {reference.norm:.5g} by more than {tolerance:.1%}"
        )
