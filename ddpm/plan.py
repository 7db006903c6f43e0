"""What a run will need, before it starts: `python -m ddpm.plan --config=configs/cats128.py
[--vram=8]`, without a GPU or data.

Memory and the bytes that kernels move are counted on the very training step, run on tensors without
numbers; operations are counted on the network. Times follow from them and from the peak and the
bandwidth that the makers of GPUs publish. A step takes no less than the host needs to launch its
kernels, which limits small networks. experiments/plan compares the estimate with published runs. A
training tracks the share of the peak that it reaches as `speed/mfu`: --run=runs/NAME reads it, and
--mfu sets it, in place of the estimate.
"""

# ruff: noqa: E402
# The command line is read above the imports of torch, which take a second.

from absl import flags

from ddpm.config import flags as config_flags

USUAL = (
    "RTX 3060,RTX 4060,RTX 4070 Laptop,RTX 4070,RTX 4090,RTX 5070,RTX 5090,RX 7900 XTX,"
    "T4,L4,A100,H100,H200"
)

if __name__ == "__main__":
    config_flags.define_config_flag()
    flags.DEFINE_float("vram", 8.0, "Memory of the GPU in GiB.", lower_bound=0.1)
    help_text = "Share of a GPU's published peak that is reached; by default estimated."
    flags.DEFINE_float("mfu", None, help_text, lower_bound=0.001, upper_bound=1.0)
    flags.DEFINE_string("run", "", "Run folder whose median speed/mfu is the --mfu.")
    help_text = "How many GPUs the last columns of the hours are for."
    flags.DEFINE_integer("num_gpus", 8, help_text, lower_bound=1)
    help_text = "GPUs to show, by the names that torch gives them, joined by commas; or all."
    flags.DEFINE_string("gpus", USUAL, help_text)
    help_text = "Classes of a class-conditional config; by default those in its data."
    flags.DEFINE_integer("classes", None, help_text, lower_bound=1)
    flags.adopt_module_key_flags(config_flags)
    config_flags.read_command_line()

import contextlib
import gc
import math
from typing import NamedTuple

import torch
from tqdm import tqdm

from ddpm import data
from ddpm.common import durations, errors
from ddpm.config import defaults
from ddpm.config.files import changed
from ddpm.data import source
from ddpm.experiment import build, cost, remarks
from ddpm.experiment import memory as experiment_memory
from ddpm.runtime import memory
from ddpm.runtime.gpus import GPUS, known, meant
from ddpm.studies.runs import read_run
from ddpm.studies.tables import amount, plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = memory.GIB
ASSUMED = 10_000  # images in the data, where these are missing and a length is in epochs
CLASSES = 1000  # classes in the data, likewise
# Seconds that the host needs for an operation. Compiled: 3.8 microseconds were measured without
# graphs on a V100 for kernels that compute 2.9 (NVIDIA 2019, "Getting Started with CUDA Graphs"),
# and on a B200 (arXiv 2512.22219). Eager: a step on next to no arithmetic took a CPU core 11.5 ms
# for the 1,286 operations of digits, and 20.5 ms for the 2,183 of ddpm_cifar10.
LAUNCH = 3.8e-6
EAGER_LAUNCH = 9e-6
# Assumptions about kernels: the share of the peak that convolutions and matrix products reach where
# bandwidth does not limit them, the share of the bandwidth that all others reach, and the share of
# the bytes of those that the compiler leaves
REACHED, STREAMED, FUSED = 0.6, 0.8, 0.45
BACKWARD = 2 / 3  # of the time of a micro-batch, behind which gradients are exchanged


class Training(NamedTuple):
    """What is known of a training before it starts."""

    config: defaults.FrozenConfigDict
    weights: int  # parameters of the network
    flops: cost.Flops
    steps: int
    num_images: int  # in the data; 0 where nothing is counted in epochs
    data_words: str  # about the images in the data
    evaluation: cost.EvalPlan
    mfu: float | None = None  # the share of the peak that is reached; None: to be estimated

    @property
    def compiled(self):
        return self.config.train.compile is not False

    @property
    def launch(self):
        """Seconds that the host needs for an operation."""
        return LAUNCH if self.compiled else EAGER_LAUNCH

    @property
    def channels_last(self):
        return self.config.train.channels_last is not False

    def batch_on(self, num_gpus):
        """The batch size, rounded up to what the ranks and micro-batches divide."""
        multiple = num_gpus * self.config.train.gradient_accumulation_steps
        return math.ceil(self.config.train.batch_size / multiple) * multiple


class Memory(NamedTuple):
    """The memory of the config's micro-batch in one type of number, with or without activation
    checkpointing.
    """

    types: str
    checkpointing: str
    accounts: list  # of `images` at a time, and of twice as many
    images: int
    most: int  # images at a time that fit on the GPU; -1 where not even the weights fit

    @property
    def account(self):
        return self.accounts[0]

    def traffic(self, count):
        """The memory.Traffic of a micro-batch of `count` images."""
        few, more = self.accounts
        return memory.traffic_of(few, self.images, more, 2 * self.images, count)


def plan(config, vram, mfu, num_gpus, gpus=USUAL):
    """Yield the plan as lines, with a row for each of `gpus`, or for `all`.

    Raises ValueError for a config that cannot be run and for an unknown GPU.
    """
    gpus = listed(gpus)
    training = training_of(config)._replace(mfu=mfu)
    shape = "x".join(map(str, build.image_shape(config)[::-1]))
    yield (
        f"{config.model.name}: {training.weights:,} parameters, images {shape}, "
        f"{training.flops.training / 1e9:,.4g} GFLOP an image, forward and backward\n"
    )
    images = config.train.batch_size // config.train.gradient_accumulation_steps
    variants = list(memory_of(config, images, vram * GIB))
    yield from memory_lines(config, variants, vram, num_gpus)
    yield from time_lines(training, variants, num_gpus, gpus)
    if lines := remarks.length_remarks(config, training.num_images):
        yield "\n".join(lines) + "\n"
    yield disk_line(training)
    if config.ema.sigma_rels:
        yield snapshot_line(training)


def training_of(config):
    """The Training of a config; raises ValueError for one that cannot be run."""
    model = build.check(config)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in build.network(config).parameters())
    flops = cost.count_flops(config)
    steps, num_images, words = length(config)
    evaluation = cost.plan_evaluation(config, num_images, flops, model=model)
    return Training(config, weights, flops, steps, num_images, words, evaluation)


PARTS = ["weights", "EMA", "optimizer", "gradients", "activations", "workspace"]  # of an Account
MEMORY_COLUMNS = ["type", "checkpointing", *PARTS, "sum", "GPU needs", "most images"]


def memory_lines(config, variants, vram, num_gpus):
    """Yield the table of memory, and advice where a batch fits in fewer micro-batches."""
    batch_size = config.train.batch_size
    parts = config.train.gradient_accumulation_steps
    images = batch_size // parts
    yield (
        f"memory of a training step on one GPU, GiB, {images} images at a time (a batch of "
        f"{batch_size} in {parts} parts); most images at a time on a GPU of {vram:g} GiB"
    )
    options = {"train.fully_shard": True, "train.channels_last": False}
    sharded = None
    with contextlib.suppress(ValueError):  # a network that cannot be sharded
        sharded = changed(config, options)
    rows = [memory_row(variant, sharded, num_gpus) for variant in variants]
    yield (
        plain([[*MEMORY_COLUMNS, f"of {num_gpus} sharded"], *rows])
        + "\n'gradients' are those that live at the peak: none at the end of the forward pass of "
        "a batch in one part;\n'GPU needs' is the sum, a tenth and half a GiB: kernels' own "
        "workspace and gaps are not counted;\n"
        f"the last column is what each of {num_gpus} GPUs needs with train.fully_shard, {images} "
        "images at a time on each; NCCL's buffers on several GPUs are not counted\n"
    )
    most = [variant.most for variant in variants if variant.checkpointing == "none"][-1]
    fewer = [n for n in range(1, parts) if batch_size % n == 0 and batch_size // n <= most]
    if fewer:
        yield (
            "faster in bf16 or fp16 on such a GPU, in fewer parts: "
            f"--config.train.gradient_accumulation_steps={fewer[0]}\n"
        )


def memory_of(config, images, vram):
    """Yield a Memory for each type, without and with checkpointing, on a GPU of `vram` bytes."""
    with torch.device("meta"):
        count = len(build.network(config).levels)
    with tqdm(total=8, desc="counting memory", unit="step", leave=False, disable=None) as bar:
        for types, dtype in (("fp32", torch.float32), ("bf16, fp16", torch.bfloat16)):
            for name, levels in (("none", 0), ("all", count)):
                accounts = []
                for n in (images, 2 * images):
                    accounts.append(experiment_memory.estimate(config, dtype, n, levels))
                    bar.update()
                most = memory.most_images(accounts[0], images, accounts[1], 2 * images, vram)
                yield Memory(types, name, accounts, images, most)


def memory_row(variant, sharded, num_gpus):
    """The row of a Memory; `sharded` is the config with sharded weights, None if impossible."""
    account = variant.account
    on_each = "cannot be"
    if sharded:
        total = experiment_memory.bytes_per_gpu(sharded, account, num_gpus)
        on_each = f"{memory.with_margin(total) / GIB:.2f}"
    sizes = (*account.parts, account.total, memory.with_margin(account.total))
    sizes = [f"{size / GIB:.2f}" for size in sizes]
    return [variant.types, variant.checkpointing, *sizes, str(max(variant.most, 0)), on_each]


def time_lines(training, variants, num_gpus, gpus):
    """Yield the table of hours on each of `gpus`, and what an evaluation costs."""
    section = training.config.train
    yield (
        f"time, {way_words(training)}: {section.length} are "
        f"{training.steps * section.batch_size:,} images{training.data_words}"
    )
    columns = ["GPU", "GiB", "type", "images/s", "MFU", "training"]
    columns += [f"images/s, {num_gpus} GPUs", "training", "an evaluation"]
    rows = [time_row(training, variants, name, num_gpus) for name in gpus]
    yield (
        plain([columns, *rows])
        + "\n'MFU' is the share of the GPU's published peak that one GPU reaches; several exchange "
        "gradients after the\nbackward pass, or, as the higher number, during it\n"
        f"other GPUs: --gpus=all, or by name, --gpus='{[*GPUS][0]}'"
    )
    together = training.batch_on(num_gpus)
    if together != section.batch_size:
        yield (
            f"on {num_gpus} GPUs a batch of {section.batch_size} cannot be cut into {num_gpus} "
            f"ranks x {section.gradient_accumulation_steps} parts: those columns are for "
            f"--config.train.batch_size={together}"
        )
    evaluation = training.evaluation
    images = evaluation.operations / training.flops.training
    yield (
        f"{evaluation.words}\nan evaluation of {evaluation.config.evaluate.num_samples:,} images "
        f"costs as much as training on {images:,.0f}\n"
    )


def way_words(training):
    """How the times are estimated, in words."""
    compiled = "compiled" if training.compiled else "not compiled (--config.train.compile=True)"
    if training.config.train.compile == "auto":
        compiled = (
            "compiled, if train.compile=auto chooses that (--config.train.compile=False: without)"
        )
    if training.mfu:
        return f"{compiled}, if a GPU reaches {training.mfu:.1%} of its published peak (--mfu)"
    layout = "" if training.channels_last else ", without channels_last"
    return (
        f"{compiled}{layout}, estimated from arithmetic, bandwidth and launches (published "
        "trainings on A100 took 1.3 to 2.6 times as long as estimated without compilation, "
        "experiments/plan)"
    )


def time_row(training, variants, name, num_gpus):
    """The row of a GPU in the table of hours."""
    gpu = GPUS[name]
    kind = chosen(training.config.train.amp, gpu)
    row = [name, str(gpu.gib), kind]
    images = training.steps * training.config.train.batch_size
    _, rate = rates(training, variants, gpu, kind, 1)
    mfu = rate * training.flops.training / gpu.peak(DTYPES[kind])
    row += [amount(rate), f"{mfu:.2f}", spell(images / rate / 3600)]
    together = rates(training, variants, gpu, kind, num_gpus)
    slow, fast = map(amount, together)
    row += [slow if slow == fast else f"{slow} to {fast}", spell(images / together[0] / 3600)]
    evaluation = training.evaluation.operations / training.flops.training / rate
    return [*row, spell(evaluation / 3600)]


def rates(training, variants, gpu, kind, num_gpus):
    """Images a second on so many GPUs: at the least, and with gradients exchanged meanwhile."""
    parts = training.config.train.gradient_accumulation_steps
    batch_size = training.config.train.batch_size if num_gpus == 1 else training.batch_on(num_gpus)
    images = batch_size // num_gpus // parts
    again = training.config.train.activation_checkpointing == "all"
    flops = images * (training.flops.training + again * training.flops.forward)
    names = ("fp32" if kind == "fp32" else "bf16, fp16", "all" if again else "none")
    (variant,) = (each for each in variants if (each.types, each.checkpointing) == names)
    traffic = variant.traffic(images)
    micro = micro_batch_seconds(training, gpu, kind, flops, traffic)
    update = 0  # which --mfu includes
    if not training.mfu:
        moved = traffic.update / (STREAMED * gpu.bandwidth * 1e9)
        update = max(moved, traffic.update_launches * training.launch)
    exchange = exchange_seconds(4 * training.weights, gpu, num_gpus)
    step = parts * micro + update
    hidden = step + max(exchange - BACKWARD * micro, 0)
    return batch_size / (step + exchange), batch_size / hidden


def micro_batch_seconds(training, gpu, kind, flops, traffic):
    """The time of a forward and backward pass that computes `flops` and moves a Traffic.

    Convolutions and products are limited by the peak or by bandwidth, all other kernels by
    bandwidth, and both together by the host, which launches them.
    """
    peak = gpu.peak(DTYPES[kind])
    host = traffic.launches * training.launch
    if training.mfu:
        return max(flops / (training.mfu * peak), host)
    bandwidth = gpu.bandwidth * 1e9
    passes = traffic.passes * (FUSED if training.compiled else 1)
    if kind != "fp32" and not training.channels_last:  # cuDNN's tensor cores compute in NHWC
        passes += traffic.transposes
    products = max(flops / (REACHED * peak), traffic.products / bandwidth)
    return max(products + passes / (STREAMED * bandwidth), host)


def exchange_seconds(weights, gpu, num_gpus):
    """The time in which gradients of `weights` bytes go around a ring of GPUs.

    2 (n - 1) / n of them go through each link.
    """
    return 2 * (num_gpus - 1) / num_gpus * weights / (gpu.link * 1e9)


def mfu_of(folder):
    """The median of a run's tracked speed/mfu; raises ValueError where it has none."""
    mfu = read_run(folder).median("speed/mfu")
    if not mfu:
        raise ValueError(f"--run={folder}: the run tracked no speed/mfu; set --mfu instead")
    return mfu


def disk_line(training):
    """What checkpoints, exported weights and decoded images take."""
    config = training.config
    file = 4 * training.weights / GIB
    state = file * (4 + len(config.ema.extra_decays) + len(config.ema.sigma_rels))
    image = math.prod(build.image_shape(config))
    num_images = training.num_images
    return (
        f"disk, GiB: {state:.2f} a checkpoint, of which two are kept, beside best and final of "
        f"{file:.2f} each: {2 * state + 2 * file:.2f}, and {state:.2f} more while one is written, "
        f"also in host memory; {image:,} bytes for each decoded image of a folder (data.cache)"
        + (f", {num_images * image / GIB:.2f} in all" if num_images else "")
    )


def snapshot_line(training):
    """What the snapshots of averages take, which are half precision."""
    config = training.config
    every = config.every.snapshot
    count = len(config.ema.sigma_rels)
    size = 2 * training.weights / GIB * count
    interval = durations.Every(every, config.train.batch_size, training.num_images)
    times = interval.times(training.steps)
    total = "" if times is None else f", {times} of them {times * size:.2f}"
    return (
        f"and a snapshot of {count} averages in half precision (every.snapshot={every}) "
        f"{size:.2f}{total}"
    )


def spell(hours):
    """A time for people: `< 1 s`, `35 s`, `3 min`, `12.4 h`, `9.2 days`."""
    for unit, size, least, places in UNITS:
        if hours >= least * size:
            return f"{hours / size:.{places}f} {unit}"
    return "< 1 s"


# name, hours, from how many on, decimal places
UNITS = (("days", 24, 100, 1), ("h", 1, 2, 1), ("min", 1 / 60, 2, 0), ("s", 1 / 3600, 1, 0))


def listed(gpus):
    """The names in GPUS of `"all"`, or of names joined by commas; ValueError for unknown ones."""
    if gpus == "all":
        return list(GPUS)
    names = [name.strip() for name in gpus.split(",")]
    for name in names:
        if not known(name):
            near = " or ".join(f"{gpu!r} ({GPUS[gpu].gib:g} GiB)" for gpu in meant(name))
            question = f" (did you mean {near}?)" if near else ""
            raise ValueError(
                f"unknown GPU {name!r}{question}; --gpus=all shows those that are known"
            )
    return [known(name) for name in names]


def chosen(amp, gpu):
    """The arithmetic of a run on a GPU, as `train.amp` says."""
    if amp == "auto":
        return "bf16" if gpu.bf16 else "fp16"
    return "fp32" if amp == "off" else amp


def length(config):
    """(steps of the training, images in the data, words about them).

    The images are counted where an option is in epochs, else 0; ASSUMED where the data are missing.
    """
    section = config.train
    size = 0
    words = ""
    counted = section.length, section.warmup, section.learning_rate_decay, *config.every.values()
    if any("epoch" in text for text in counted):
        try:
            size = len(build.split(config, at_hand(config))[0])
            words = f", of {size:,} in the data"
        except ValueError as error:
            size = ASSUMED
            words = f", with {ASSUMED:,} images assumed, as the data are not here ({cause(error)})"
    return durations.steps_of(section.length, section.batch_size, size), size, words


def cause(error):
    """What an error says is wrong, without the remedy after it."""
    return str(error).partition(";")[0]


def at_hand(config):
    """The Source of a config; raises ValueError where its data are not on this machine."""
    section = config.data
    with source.without_downloads():
        return data.open_source(
            section.source, section.image_size, section.channels, section.background
        )


def with_classes(config, count=None):
    """(the config with names of its classes, words about them).

    There are `count` classes, by default those of the data, or CLASSES where the data are missing.
    """
    section = config.data
    words = ""
    if not section.class_labels or section.classes:
        return config, words
    # those that the config names
    names = dict.fromkeys(map(str, (*config.sample.classes, *config.evaluate.classes)))
    if count is None:
        try:
            return build.with_classes(config, build.class_names(config, at_hand(config))), words
        except ValueError as error:
            count = CLASSES
            words = (
                f"{CLASSES:,} classes are assumed, as the data are not here ({cause(error)}); "
                "--classes=10 says how many\n"
            )
    names = list(names | dict.fromkeys(map(str, range(count))))[: max(count, len(names))]
    return changed(config, {"data.classes": tuple(names)}), words


def main():
    """Print the plan of the config that the flags name; returns the exit code."""
    gc.disable()  # a seventh of the time; fake tensors are freed when they are last used
    values = flags.FLAGS
    given, words = with_classes(config_flags.given_config()[0], values.classes)
    if words:
        print(words, flush=True)
    mfu = mfu_of(values.run) if values.run else values.mfu
    for lines in plan(given, values.vram, mfu, values.num_gpus, values.gpus):
        print(lines, flush=True)
    return errors.DONE


if __name__ == "__main__":
    config_flags.run_command(main)
