"""How long a training stands still for a save, with and without the thread that writes:
`PYTHONPATH=.:tests python experiments/saves/measure.py`.

One process saves alternately both ways, with some steps after each save, and writes results.json
and README.md. Without the thread, `checkpoint.save` is called as it was before: that is what
happens where the host is short of memory.
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path

import torch

from ddpm.common.safe_load import tensors_in
from ddpm.experiment.trainer import build_trainer
from ddpm.runtime import device
from ddpm.studies.archive import commit, this_machine
from ddpm.studies.tables import markdown
from ddpm.tracking.tracker import Tracker
from ddpm.training import background, checkpoint
from support.runs import tiny

HERE = Path(__file__).parent
WAYS = {"before": lambda: -math.inf, "after": background.free_memory}
OPTIONS = dict(model__model_channels=56, model__channel_mult=(1, 2, 3), model__num_res_blocks=2)


def seconds_of(work):
    """How long a call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def measured(folder, rounds, steps, options):
    """Seconds by way: of `save`, of the steps after it, and of the rest of the write."""
    trainer = build_trainer(
        tiny(**options, train__length="100000 steps"), folder, device.start(), tracker=Tracker()
    )
    batch = next(iter(trainer.batches(0)))
    seconds = {way: {"save": [], "steps": [], "rest": []} for way in WAYS}
    seconds["no save"] = {"steps": []}

    def learn():
        for _ in range(steps):
            trainer.step(0, batch)

    learn()
    for number in range(rounds + 1):  # the first one allocates, and does not count
        done = {"no save": {"steps": seconds_of(learn)}}
        for way, free_memory in WAYS.items():
            background.free_memory = free_memory
            done[way] = {
                "save": seconds_of(lambda: trainer.save(number)),  # noqa: B023
                "steps": seconds_of(learn),
                "rest": seconds_of(trainer.write.wait),
            }
        for way, found in done.items() if number else ():
            for name, value in found.items():
                seconds[way][name].append(value)
    content = checkpoint.load(checkpoint.checkpoints(folder)[-1][1])
    return sum(tensor.nbytes for tensor in tensors_in(content)), seconds


def report(row):
    """The text of README.md."""
    seconds = row["seconds"]
    calls = {way: seconds[way]["save"] for way in WAYS}
    middle = {way: statistics.median(values) for way, values in calls.items()}
    lines = [["", "the call, s: median", "least", "most", f"{row['steps']} steps, s: median"]]
    for way, found in seconds.items():
        values = calls.get(way)
        call = [f"{f(values):.3f}" for f in (statistics.median, min, max)] if values else [""] * 3
        lines.append([way, *call, f"{statistics.median(found['steps']):.2f}"])
    return TEXT.format(
        ratio=middle["before"] / middle["after"],
        least=min(calls["before"]) / min(calls["after"]),
        table=markdown(lines),
        **{key: row[key] for key in ("mib", "rounds", "commit", "torch", "machine")},
    )


TEXT = """# Saves: how long the training stands still

**Question.** How long does a training stand still for a checkpoint of {mib:.0f} MiB, before and after a thread writes it?

**Answer.** On a CPU the call of `save` takes 1 / {ratio:.1f} of the time in the median, and 1 / {least:.1f} at its fastest. Not
measured on a GPU.

{table}

{rounds} rounds; before, after and steps without a save alternate in one process beside other work, which is most of the
spread. "Before" calls the same `checkpoint.save` without the thread: serialise, checksum, write, fsync, rename, delete.
"After" copies the state to memory of the host that is used again, and writes in the thread. The steps follow the save
directly; while the thread writes, it takes time of a core.

`PYTHONPATH=.:tests OMP_NUM_THREADS=1 python experiments/saves/measure.py`, commit {commit}, {machine}, torch {torch}.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=5, help="after each save")
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        size, seconds = measured(Path(folder, "run"), given.rounds, given.steps, OPTIONS)
    row = {
        "mib": size / 2**20,
        "rounds": given.rounds,
        "steps": given.steps,
        "commit": commit(),
        "torch": torch.__version__,
        "machine": this_machine(),
        "seconds": {
            way: {name: [round(value, 4) for value in values] for name, values in found.items()}
            for way, found in seconds.items()
        },
    }
    (given.out / "results.json").write_text(json.dumps(row, indent=1) + "\n")
    (given.out / "README.md").write_text(report(row))
    print(report(row))


if __name__ == "__main__":
    main()
