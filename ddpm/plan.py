"""What a run will need, before it starts: `python -m ddpm.plan --config=configs/cats128.py
[--vram=8]`, without a GPU or data.

Memory is counted on the very training step, run on tensors without numbers; operations are counted
on the network. Times follow from what the makers of GPUs publish and from --mfu, the share of it
that is reached, which is a guess until it is measured: a training tracks its own as `speed/mfu`. A
step takes no less than the launches of its kernels, which limit small networks.
"""

# ruff: noqa: E402
# The command line is read above the imports of torch, which take a second.

from absl import flags

from ddpm.config import flags as config_flags

USUAL = (
    "RTX 3060,RTX 4060,RTX 4070 Laptop,RTX 4070,RTX 4090,RTX 5070,RTX 5090,RX 7900 "
    "XTX,T4,L4,A100,H100,H200"
)

if __name__ == "__main__":
    config_flags.define_config_flag()
    flags.DEFINE_float(
        "vram", 8.0, "Memory of the GPU that is asked about, in GiB.", lower_bound=0.1
    )
    flags.DEFINE_float(
        "mfu",
        0.4,
        "Share of a GPU's published peak that is reached.",
        lower_bound=0.001,
        upper_bound=1.0,
    )
    flags.DEFINE_integer(
        "num_gpus", 8, "How many GPUs the last columns of the hours are for.", lower_bound=1
    )
    flags.DEFINE_string(
        "gpus", USUAL, "GPUs to show, by the names that torch gives them, joined by commas; or all."
    )
    flags.DEFINE_integer(
        "classes",
        None,
        "Classes in the data of a class-conditional config; by default as many as there are.",
        lower_bound=1,
    )
    flags.adopt_module_key_flags(config_flags)
    config_flags.read_command_line()

import contextlib
import math
from typing import NamedTuple

import torch
from tqdm import tqdm

from ddpm import data
from ddpm.common import durations, errors
from ddpm.config.files import changed
from ddpm.data import source
from ddpm.experiment import build, cost, trainer
from ddpm.experiment import memory as experiment_memory
from ddpm.runtime import memory
from ddpm.runtime.gpus import GPUS, known, meant
from ddpm.studies.tables import amount, plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = memory.GIB
# images in the data, where these are not at hand and anything is counted in epochs
ASSUMED = 10_000
CLASSES = 1000  # in the data, likewise
# seconds a kernel takes at least, an assumption: measured on a V100 for kernels that compute 2.9 of
# them
LAUNCH = 3.8e-6
# (NVIDIA 2019, "Getting Started with CUDA Graphs", without graphs) and on a B200 (arXiv
# 2512.22219); without what torch adds


class Memory(NamedTuple):
    """How one arithmetic, with so many levels recomputed, takes memory: at the config's
    micro-batch, and at most on a GPU.
    """

    types: str
    checkpointing: str
    account: memory.Account
    # images at a time in the memory that was asked about; -1 where not even the weights fit
    most: int


def memory_of(config, images, vram):
    """A `Memory` for each size of number, without and with activation checkpointing, on a GPU
    of `vram` bytes.
    """
    with torch.device("meta"):
        count = len(build.network(config).levels)
    with tqdm(total=8, desc="counting memory", unit="step", leave=False, disable=None) as bar:
        for types, dtype in (("fp32", torch.float32), ("bf16, fp16", torch.bfloat16)):
            for name, levels in (("none", 0), ("all", count)):
                accounts = []
                for n in (images, 2 * images):
                    accounts.append(experiment_memory.account(config, dtype, n, levels))
                    bar.update()
                one, other = accounts
                yield Memory(
                    types, name, one, memory.most_images(one, images, other, 2 * images, vram)
                )


def hours(images, flops, gpu, dtype, mfu, num_gpus=1, batch_size=1, weights=0, kernels=0):
    """Hours for so many images on one GPU or several, and the images a second.

    A step takes no less than the launches of its `kernels`. Several GPUs exchange gradients of
    `weights` bytes after every step, around a ring (2 (n - 1) / n of them through each link), and
    nothing of that is taken to be hidden behind computation.
    """
    computed = max(batch_size / num_gpus * flops / (mfu * gpu.peak(dtype)), kernels * LAUNCH)
    step = computed + 2 * (num_gpus - 1) / num_gpus * weights / (gpu.link * 1e9)
    return images / batch_size * step / 3600, batch_size / step


def plan(config, vram, mfu, num_gpus, gpus=USUAL):
    """Yield the plan as lines, with a row for each of `gpus`, or for `all`.

    Raises ValueError, one line, for a config that cannot be run and for a GPU that is not known.
    """
    shown = listed(gpus)
    build.check(config)
    section = config.train
    images = config.train.batch_size // config.train.gradient_accumulation_steps
    with torch.device("meta"):
        weights = sum(one.numel() for one in build.network(config).parameters())
    asked = cost.operations(config)
    shape = "x".join(map(str, build.image_shape(config)[::-1]))
    flops = asked.training
    kernels = section.gradient_accumulation_steps * asked.kernels
    yield (
        f"{config.model.name}: {weights:,} parameters, images {shape}, {flops / 1e9:,.4g} GFLOP "
        "an image, forward and backward\n"
    )

    yield (
        f"memory of a training step on one GPU, GiB, {images} images at a time (a batch of "
        f"{section.batch_size} in {section.gradient_accumulation_steps} parts); most images at a "
        f"time on a GPU of {vram:g} GiB"
    )
    sharded = None
    with contextlib.suppress(ValueError):  # of a network that cannot be
        sharded = changed(
            config,
            {"train.fully_shard": True, "train.compile": False, "train.channels_last": False},
        )
    rows = [
        [
            "type",
            "checkpointing",
            "weights",
            "EMA",
            "optimizer",
            "gradients",
            "activations",
            "workspace",
            "sum",
            "GPU has",
            "most images",
            f"of {num_gpus} sharded",
        ]
    ]
    for found in memory_of(config, images, vram * GIB):
        each = sharded
        if sharded:
            total = experiment_memory.on_each(sharded, found.account, num_gpus)
            each = f"{memory.with_margin(total) / GIB:.2f}"
        parts = (*found.account.parts, found.account.total, memory.with_margin(found.account.total))
        rows.append(
            [
                found.types,
                found.checkpointing,
                *(f"{part / GIB:.2f}" for part in parts),
                str(max(found.most, 0)),
                each or "cannot be",
            ]
        )
        if found.checkpointing == "none":
            fewest = next(
                (
                    parts
                    for parts in range(1, section.gradient_accumulation_steps)
                    if section.batch_size % parts == 0 and section.batch_size // parts <= found.most
                ),
                None,
            )
    yield (
        plain(rows)
        + "\n'gradients' are those that live at the peak: none at the end of the forward pass of "
        "a batch in one part;\n'GPU has' is the sum, a tenth and half a GiB: kernels' own "
        "workspace and gaps are not counted;\n"
        f"the last column is what each of {num_gpus} GPUs has by train.fully_shard, {images} "
        "images at a time on each\n"
    )
    if fewest:
        yield (
            "faster in bf16 or fp16 on such a GPU, in fewer parts: "
            f"--config.train.gradient_accumulation_steps={fewest}\n"
        )

    total, size, among = length(config)
    evaluated = cost.plan_evaluation(config, size, asked)
    yield (
        f"time at the least, if a GPU reaches {mfu:.0%} of what its maker publishes (--mfu) and "
        f"launches each of the {kernels:,} kernels of a step in {LAUNCH * 1e6:g} microseconds: "
        f"{section.length} are {total * section.batch_size:,} images{among}"
    )
    equal = num_gpus * section.gradient_accumulation_steps
    together = math.ceil(section.batch_size / equal) * equal
    rows = [
        [
            "GPU",
            "GiB",
            "type",
            "images/s",
            "training",
            f"images/s, {num_gpus} GPUs",
            "training",
            "an evaluation",
        ]
    ]
    for name in shown:
        gpu = GPUS[name]
        kind = chosen(section.amp, gpu)
        rates = [
            hours(
                total * section.batch_size,
                flops,
                gpu,
                DTYPES[kind],
                mfu,
                n,
                batch,
                4 * weights,
                kernels,
            )
            for n, batch in ((1, section.batch_size), (num_gpus, together))
        ]
        measured = evaluated.operations / (mfu * gpu.peak(DTYPES[kind])) / 3600
        rows.append(
            [
                name,
                str(gpu.gib),
                kind,
                *(words for spent, rate in rates for words in (amount(rate), spell(spent))),
                spell(measured),
            ]
        )
    yield plain(rows) + f"\nother GPUs: --gpus=all, or by name, --gpus='{list(GPUS)[0]}'"
    if together != section.batch_size:
        yield (
            f"on {num_gpus} GPUs a batch of {section.batch_size} cannot be cut into {num_gpus} "
            f"ranks x {section.gradient_accumulation_steps} parts: those columns are for "
            f"--config.train.batch_size={together}"
        )
    yield (
        f"{evaluated.words}\nan evaluation of {evaluated.config.evaluate.num_samples:,} images "
        f"costs as much as training on {evaluated.operations / flops:,.0f}\n"
    )

    if remarks := trainer.length_remarks(config, size):
        yield "\n".join(remarks) + "\n"

    file = 4 * weights / GIB
    state = file * (4 + len(config.ema.more) + len(config.ema.profiles))
    yield (
        f"disk, GiB: {state:.2f} a checkpoint, of which two are kept, beside best and final of "
        f"{file:.2f} each: {2 * state + 2 * file:.2f}, and {state:.2f} more while one is written; "
        f"{math.prod(build.image_shape(config)):,} bytes for each decoded image of a folder "
        "(data.cache)"
        + (f", {size * math.prod(build.image_shape(config)) / GIB:.2f} in all" if size else "")
    )
    if config.ema.profiles:
        count = len(config.ema.profiles)
        rhythm = config.every.snapshot
        times = durations.Every(rhythm, section.batch_size, size).times(total)
        each = file / 2 * count
        yield (
            f"and a snapshot of {count} averages in half precision (every.snapshot={rhythm}) "
            f"{each:.2f}" + ("" if times is None else f", {times} of them {times * each:.2f}")
        )


def spell(hours):
    """A time for people: `< 1 s`, `35 s`, `3 min`, `12.4 h`, `9.2 days`."""
    for unit, size, least in (
        ("days", 24, 100),
        ("h", 1, 2),
        ("min", 1 / 60, 2),
        ("s", 1 / 3600, 1),
    ):
        if hours >= least * size:
            return f"{hours / size:.{1 if unit in ('days', 'h') else 0}f} {unit}"
    return "< 1 s"


def listed(gpus):
    """The names in the table of GPUs that a person names, `"all"` or several joined by commas;
    raises ValueError for others.
    """
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
    """(steps, images, words): the length of the training; the data's images, where anything is
    counted in epochs, else 0.

    Where they are not at hand there are taken to be ASSUMED, which the words say.
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
    """The images of a config, none of them decoded; raises ValueError where they are not on this
    machine.
    """
    section = config.data
    with source.without_downloads():
        return data.open_source(section.source, section.image_size, section.channels, section.matte)


def with_classes(config, count=None):
    """(config, words): the config with names for its classes, `count` of them; without one they are
    those of its data.

    Where the data are not at hand there are taken to be CLASSES, which the words say.
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
    values = flags.FLAGS
    given, words = with_classes(config_flags.given_config()[0], values.classes)
    if words:
        print(words, flush=True)
    for lines in plan(given, values.vram, values.mfu, values.num_gpus, values.gpus):
        print(lines, flush=True)
    return errors.DONE


if __name__ == "__main__":
    config_flags.run_command(main)
