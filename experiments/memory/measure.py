"""The planner's memory against what a real training step takes: `python
experiments/memory/measure.py [--device=cuda]`.

Minutes on a CPU or a GPU. Each case writes its row to results.json as it ends, in place of the one
of before; README.md is made from that alone, and `--report` does no more. `--only=NAME` measures
the networks with that in their names.
"""

import argparse
import gc
import itertools
import json
import os
from importlib.metadata import version
from pathlib import Path
from textwrap import fill

import torch
from torch.profiler import ProfilerActivity, profile

from ddpm.common.files import atomic_write
from ddpm.config import defaults, files
from ddpm.experiment import build
from ddpm.experiment import memory as experiment_memory
from ddpm.experiment import step as experiment_step
from ddpm.runtime import device as runtime_device
from ddpm.runtime import memory
from ddpm.studies.archive import commit, this_machine
from ddpm.studies.report import listed
from ddpm.studies.tables import markdown

HERE = Path(__file__).parent
TYPES = {"cpu": ("off", "bf16"), "cuda": ("off", "bf16", "fp16")}  # train.amp by device
CASES = {  # name: options over base()
    "digits": {
        "data.image_size": 16,
        "model.model_channels": 32,
        "model.num_res_blocks": 1,
        "train.batch_size": 64,
    },
    "32 px, Ho's CIFAR-10 U-Net": {
        "data.image_size": 32,
        "data.channels": 3,
        "model.model_channels": 128,
        "model.channel_mult": (1, 2, 2, 2),
        "model.attention_resolutions": (16,),
        "train.batch_size": 8,
    },
    "32 px, DiT-S/2": {
        "data.image_size": 32,
        "data.channels": 3,
        "model.name": "dit(size='S', patch_size=2)",
        "train.batch_size": 8,
    },
    "64 px, unet_edm2, 64 channels": {
        "data.image_size": 64,
        "data.channels": 3,
        "model.name": "unet_edm2",
        "model.channel_mult": (1, 2, 3),
        "model.attention_resolutions": (16,),
        "train.batch_size": 4,
    },
    "64 px, U-Net of 64 channels, 2 micro-batches": {
        "data.image_size": 64,
        "data.channels": 3,
        "model.channel_mult": (1, 2, 3),
        "model.attention_resolutions": (16,),
        "train.batch_size": 8,
        "train.gradient_accumulation_steps": 2,
    },
    "128 px, cats128, 1 image at a time": {
        "data.image_size": 128,
        "data.channels": 3,
        "model.model_channels": 192,
        "model.channel_mult": (1, 2, 3, 4),
        "model.attention_resolutions": (16,),
        "model.num_head_channels": 64,
        "train.batch_size": 1,
    },
}


def rise(machine, work):
    """The most bytes that are allocated at one time while `work()` runs, beyond those of before."""
    gc.collect()
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(machine.device)
        before = torch.cuda.memory_allocated(machine.device)
        work()
        return torch.cuda.max_memory_allocated(machine.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        work()
    events = sorted(watch.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return max(
        itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    )


def measured(given, machine, levels):
    """The peak of a real training step on a machine, in bytes, `levels` of the network recomputed.

    It is the weights, averages and optimiser's state, and what a step adds to them: no buffer that
    a library keeps between steps, such as cuBLAS's.
    """
    network = experiment_step.wrap_network(given, build.network(given), machine, levels, print)
    averages = list(experiment_step.averages(given, network.weights).values())
    step = experiment_step.step(given, build.diffusion(given, None), network, averages, 100)
    batch = experiment_step.blank(given, given.train.batch_size)
    step(0, batch)  # the optimiser has begun
    held = [
        *network.weights.state_dict().values(),
        *(value for average in averages for value in average.shadow.values()),
        *(value for state in step.optimizer.state.values() for value in state.values()),
    ]
    return memory.size_of_all(held) + rise(machine, lambda: step(1, batch))


def planned(given, dtype, levels):
    """What the planner says of the same step, in bytes."""
    images = given.train.batch_size // given.train.gradient_accumulation_steps
    return experiment_memory.estimate(given, dtype, images, levels).total


def computes(machine):
    """Whether this device has arithmetic in the machine's type.

    A CPU without bfloat16 unfolds images for its convolutions, nine times as large, as no GPU
    does.
    """
    if machine.dtype != torch.bfloat16:
        return True
    if machine.device.type == "cpu":
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cuda.is_bf16_supported(including_emulation=False)


def key(row):
    return row["network"], row["type"], row["checkpointing"], row["device"]


def rows_of(path):
    """The rows of a results.json by their keys, none where there is no such file; raises
    ValueError for one that is damaged.
    """
    try:
        return (
            {key(row): row for row in json.loads(path.read_text()) if cells(row)}
            if path.is_file()
            else {}
        )
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from None


def measure(names, device, out):
    """Plan and measure the networks of these names on a device.

    Where it cannot compute in a type, what was measured elsewhere stays, and is planned anew.
    """
    kept = rows_of(out / "results.json")
    at = {"commit": commit(), "torch": version("torch")}
    place = this_machine() if device == "cuda" else f"{os.cpu_count()} CPU cores"
    for name, amp, levels in itertools.product(names, TYPES[device], (0, 99)):
        given = files.changed(defaults.freeze(defaults.base()), CASES[name])
        machine = runtime_device.start(amp, device=device)
        row = {
            "network": name,
            "type": str(machine.dtype).removeprefix("torch."),
            "checkpointing": "all" if levels else "none",
            "device": device,
        }
        if not computes(machine) and key(row) not in kept:
            continue
        row["planned"] = {"mib": round(planned(given, machine.dtype, levels) / 2**20, 1), **at}
        row["measured"] = (
            kept[key(row)]["measured"]
            if not computes(machine)
            else {"mib": round(measured(given, machine, levels) / 2**20, 1), **at, "machine": place}
        )
        kept[key(row)] = row
        with atomic_write(out / "results.json") as part:
            part.write_text("[\n" + ",\n".join(map(json.dumps, kept.values())) + "\n]\n")
        print("  ".join(cells(row)), flush=True)


# the report


def ratio(row):
    return row["planned"]["mib"] / row["measured"]["mib"]


def cells(row):
    """A row of the table."""
    at = row["measured"]
    return [
        row["network"],
        row["type"],
        row["checkpointing"],
        f"{row['planned']['mib']:,.1f}",
        f"{at['mib']:,.1f}",
        f"{ratio(row):.3f}",
        ", ".join((at["machine"], f"torch {at['torch']}", at["commit"])),
    ]


def report(out):
    """Write README.md from results.json."""
    rows = list(rows_of(out / "results.json").values())
    answer = []
    for device, words in (
        ("cpu", "that torch's profiler sees on a CPU"),
        ("cuda", "that torch's allocator sees on a GPU"),
    ):
        if ratios := [ratio(row) for row in rows if row["device"] == device]:
            answer.append(
                f"between {min(ratios):.3f} and {max(ratios):.3f} of the peak {words}, in "
                f"{len(ratios)} cases"
            )
    answer = (
        f"**Answer.** The plan is {listed(answer)}. "
        f"{ANSWER}{'' if 'cuda' in {row['device'] for row in rows} else NO_GPU}"
    )
    table = [
        [
            "network",
            "type",
            "checkpointing",
            "planned, MiB",
            "measured, MiB",
            "planned / measured",
            "measured on",
        ]
    ]
    plans = dict.fromkeys(
        f"{row['planned']['commit']} (torch {row['planned']['torch']})" for row in rows
    )
    (out / "README.md").write_text(
        TEXT.format(
            answer=fill(answer, 128),
            table=markdown(table + [cells(row) for row in rows]),
            plans=listed(list(plans)),
        )
    )


ANSWER = """Of what kernels take for themselves one thing is counted: convolutions bring image and weights, in the backward
pass gradient and image, into a layout of their own, as oneDNN does on a CPU and cuDNN for tensor cores. Measured is what goes
through torch's allocator, without what libraries keep between steps; the plan's margin, a tenth and half a GiB, is for the
rest."""
NO_GPU = """ No GPU was at hand: how far it goes there is not measured."""
TEXT = """# Memory: planned against measured

**Question.** How far is the memory that `python -m ddpm.plan` counts, on tensors without numbers, from what a training step
takes?

{answer}

{table}

By `python experiments/memory/measure.py`, planned at commit {plans}; each row says where and at which commit it was measured.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=TYPES, default="cpu", help="where to measure")
    parser.add_argument(
        "--only",
        default="",
        help=f"those of the networks with this in their names: {'; '.join(CASES)}",
    )
    parser.add_argument(
        "--report", action="store_true", help="write the report of results.json anew"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE, help="folder for the results and the report"
    )
    given = parser.parse_args(arguments)
    names = [name for name in CASES if given.only in name]
    results = given.out / "results.json"
    if not names:
        parser.error(f"no network has {given.only!r} in its name; they are {'; '.join(CASES)}")
    if given.report and not results.is_file():
        parser.error(f"there is no {results}; measure first, without --report")
    try:
        if not given.report:
            measure(names, given.device, given.out)
        report(given.out)
    except ValueError as error:
        parser.error(error)


if __name__ == "__main__":
    main()
