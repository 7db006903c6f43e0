"""Training step and sampling beside diffusers and denoising-diffusion-pytorch: `python
experiments/throughput/run.py`.

About ten minutes on two otherwise idle CPU cores, of which it computes on one; on a GPU as long,
with more rows. Writes results.json, and from it README.md and step.png; `--report` does the latter
alone, and `--toy` all of it in seconds, at a size that says nothing, in a folder of its own.
Reading images is measured by data.py beside it, the host's time by host.py. Needs
`pip install -e '.[bench]'`.
"""

import argparse
import gc
import itertools
import json
import os
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import words
from contenders import CONTENDERS, Ours, Task
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from ddpm.config import defaults, files
from ddpm.experiment import build
from ddpm.runtime import gpus
from ddpm.studies.archive import commit, this_machine
from ddpm.studies.report import listed

HERE = Path(__file__).parent
# name: config, variant, options, batch on a CPU, batch on a GPU, dim and dim_mults of the peer's
# Unet, steps a turn
TASKS = {
    "digits 16x16x1": ("digits", None, {}, 64, 64, 32, (1, 2, 2), 4),
    "CIFAR-10 32x32x3": ("ddpm_cifar10", None, {}, 16, 128, 144, (1, 2, 2, 2), 1),
    "cats128:tiny 64x64x3": (
        "cats128",
        "tiny",
        {"data.image_size": 64},
        16,
        64,
        64,
        (1, 2, 3, 4),
        1,
    ),
}
TOY = {
    "toy 16x16x1": (
        "digits",
        None,
        {
            "model.model_channels": 8,
            "model.channel_mult": (1, 2),
            "model.conventions": "ho(norm_num_groups=8)",
        },
        16,
        16,
        8,
        (1, 2),
        1,
    )
}
NEEDED = ("accelerate", "denoising_diffusion_pytorch", "diffusers", "matplotlib")
SAMPLERS = {
    "ddpm": ("ddim", "ddpm"),
    "diffusers": ("ddim", "ddpm"),
    "denoising-diffusion-pytorch": ("ddim",),
}


def task_of(name, folder, tasks):
    """The Task of a name, float32 and eager, with images of noise: a step takes as long as on
    any others.
    """
    file, variant, options, on_cpu, on_gpu, dim, dim_mults, _ = tasks[name]
    found = spec_from_file_location(file, HERE.parents[1] / "configs" / f"{file}.py")
    found.loader.exec_module(module := module_from_spec(found))
    given = files.changed(defaults.freeze(module.get_config(variant)), options)
    shape = build.image_shape(given)
    size = on_gpu if torch.cuda.is_available() else on_cpu
    pixels = torch.randint(
        0,
        256,
        (max(size, 128), *shape),
        dtype=torch.uint8,
        generator=torch.Generator().manual_seed(0),
    )
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for number, image in enumerate(pixels):
        Image.fromarray(np.ascontiguousarray(image.movedim(0, -1).squeeze(-1))).save(
            photos / f"{number}.png"
        )
    return Task(given, dim, dim_mults, folder, photos, pixels[:size])


def now():
    """Seconds that were computed: of this process on one CPU thread, whatever else the machine
    does; else of the clock.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.get_num_threads() == 1:
        return time.process_time()
    return time.perf_counter()


def seconds(work, *arguments):
    start = now()
    work(*arguments)
    return now() - start


def prepared(make, task):
    """A contender after two steps, the seconds that this took, and the most memory that it took, in
    bytes.

    On a CPU that is the sum of torch's allocations, as its profiler records them.
    """

    def begin():
        made.append(make(task))
        made[0].train(1)
        made[0].train(1)

    made = []
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        spent = seconds(begin)
        return made[0], spent, torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watch:
        spent = seconds(begin)
    events = sorted(watch.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return (
        made[0],
        spent,
        max(itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")),
    )


def variants(task):
    """The same task in the types and ways that this machine is for: on a CPU float32, eager."""
    yield task
    if torch.cuda.is_available():
        yield task._replace(compiled=True)
        for amp in ("bf16", "fp16"):
            yield task._replace(amp=amp)
            yield task._replace(amp=amp, compiled=True)
            yield task._replace(amp=amp, compiled=True, channels_last=True)


def train(name, task, rounds, steps):
    """Yield a row for each contender: seconds of a step in each of so many rounds, in which all
    take turns.
    """
    made = {}
    rows = {}
    for contender, make in CONTENDERS.items():
        if task.compiled and contender == "denoising-diffusion-pytorch":
            continue  # its loop compiles nothing
        made[contender], start, peak = prepared(make, task)
        rows[contender] = {
            "task": name,
            "contender": contender,
            "type": "float32" if task.amp == "off" else task.amp,
            "way": "compiled" * task.compiled + ", channels last" * task.channels_last,
            "batch": len(task.pixels),
            "parameters": made[contender].parameters,
            "flops": made[contender].flops,
            "peak_bytes": peak,
            "start_seconds": start,
            "seconds": [],
        }
    assert len({(row["parameters"], row["flops"]) for row in list(rows.values())[:2]}) == 1, (
        "diffusers' network is not ours"
    )
    for _ in range(rounds):
        for contender, training in made.items():
            rows[contender]["seconds"].append(seconds(training.train, steps) / steps)
    yield from rows.values()


def stages(name, task, steps):
    """Where the seconds of our step go, each stage the mean of so many steps; on a GPU the host
    waits after each.
    """
    ours = Ours(task)
    spent = Counter()
    step = ours.made.step
    batches = ours.made.batches(0)
    step(0, next(batches))
    places = {
        "noise, network, loss": [(step.diffusion, "losses")],
        "backward": [(torch.Tensor, "backward")],
        "gradient norm": [(step.diffusion.net, "norm"), (torch.nn.utils, "clip_grads_with_norm_")],
        "optimiser": [(step.optimizer, "step")],
        "EMA": [(average, "update") for average in step.averages],
    }

    def timed(stage, work):
        def inside(*arguments, **named):
            start = now()
            try:
                return work(*arguments, **named)
            finally:
                spent[stage] += now() - start

        return inside

    with ExitStack() as stack:
        for stage, owners in places.items():
            for owner, attribute in owners:
                stack.enter_context(
                    mock.patch.object(owner, attribute, timed(stage, getattr(owner, attribute)))
                )
        start = now()
        for number in range(1, steps + 1):
            batch = timed("data", next)(batches)
            step(number, batch)
        spent["the rest"] = now() - start - spent.total()
    each = {stage: spent[stage] / steps for stage in ("data", *places, "the rest")}
    return {"task": name, "batch": len(task.pixels), "seconds": each}


def watched(net, work, *arguments):
    """The seconds of `work`, those of them inside of the network's calls, and how many calls
    there were.
    """
    marks = []
    hooks = [
        net.register_forward_pre_hook(lambda *_: marks.append(-now())),
        net.register_forward_hook(lambda *_: marks.append(now())),
    ]
    whole = seconds(work, *arguments)
    for hook in hooks:
        hook.remove()
    return whole, sum(marks), len(marks) // 2


def draw(name, task, rounds, count, steps):
    """Yield a row for each contender and sampler: seconds of drawing `count` images in `steps`,
    and of the network in it.
    """
    made = {contender: make(task) for contender, make in CONTENDERS.items()}
    ways = [(contender, sampler) for contender in made for sampler in SAMPLERS[contender]]
    found = {way: [] for way in ways}
    for _ in range(rounds + 1):
        for contender, sampler in ways:
            drawing = made[contender]
            found[contender, sampler].append(
                watched(drawing.net, drawing.draw, count, steps, sampler)
            )
    for (contender, sampler), (_, *turns) in found.items():  # the first warmed up
        whole, inside, calls = zip(*turns, strict=True)
        yield {
            "task": name,
            "contender": contender,
            "sampler": sampler,
            "images": count,
            "steps": steps,
            "evaluations": calls[0],
            "seconds": whole,
            "network_seconds": inside,
        }


def measure(tasks, rounds, count, steps):
    """Everything, as it goes into results.json."""
    found = {"steps": [], "stages": [], "draws": []}
    for number, name in enumerate(tasks):
        with tempfile.TemporaryDirectory() as folder:
            task = task_of(name, Path(folder), tasks)
            turn = tasks[name][-1] * (20 if torch.cuda.is_available() else 1)  # steps
            for variant in variants(task):
                rows = list(train(name, variant, rounds, turn))
                found["steps"] += rows
                print(words.terminal(rows), flush=True)
            fast = task._replace(amp="bf16") if torch.cuda.is_available() else task
            found["stages"].append(stages(name, fast, 2 * turn))
            if number == 0:  # the smallest network hides least
                found["draws"] += draw(name, task, rounds, count, steps)
    return found | {"made": made()}


def made():
    """How and where it was measured."""
    machine = this_machine()
    gpu = torch.cuda.is_available()
    published = gpus.gpu_of(machine) if gpu else None
    types = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return {
        "machine": machine,
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "peaks": {name: published.peak(dtype) for name, dtype in types.items()}
        if published
        else {},
        "clock": "wall time"
        if gpu or torch.get_num_threads() > 1
        else "CPU seconds of the process",
        "versions": {
            name: version(name)
            for name in ("torch", "diffusers", "denoising-diffusion-pytorch", "accelerate")
        },
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--toy",
        action="store_true",
        help="seconds instead of minutes, and figures that say nothing",
    )
    either.add_argument(
        "--report", action="store_true", help="write the report of results.json anew"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each contender")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results and the report, else this one; of --toy a new one",
    )
    given = parser.parse_args(arguments)
    if not 1 <= given.threads <= os.cpu_count() or given.rounds < 1:
        parser.error(f"--threads is 1 to {os.cpu_count()}, the cores here, and --rounds at least 1")
    if not given.report and (missing := [name for name in NEEDED if not find_spec(name)]):
        parser.error(f"there is no {listed(missing)}; pip install -e '.[bench]'")
    out = given.out or (Path(tempfile.mkdtemp(prefix="ddpm-toy-")) if given.toy else HERE)
    results = out / "results.json"
    if given.report and not results.is_file():
        parser.error(f"there is no {results}; measure first, without --report")
    torch.set_num_threads(given.threads)
    if not given.report:
        out.mkdir(parents=True, exist_ok=True)
        print(
            ", ".join(f"{name} {number}" for name, number in made()["versions"].items()),
            "on",
            this_machine(),
            flush=True,
        )
        found = measure(TOY, 1, 2, 5) if given.toy else measure(TASKS, given.rounds, 16, 50)
        results.write_text(json.dumps(found, indent=1) + "\n")
    try:
        words.write(json.loads(results.read_text()), out)
    except (ValueError, LookupError, TypeError) as error:
        parser.error(f"no report can be made of {results}: {type(error).__name__}: {error}")
    print(f"the report is {out / 'README.md'}")


if __name__ == "__main__":
    main()
