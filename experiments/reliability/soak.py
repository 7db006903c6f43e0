"""An hour of trainings, kills, restarts, evaluations and sweeps: does anything grow? `python
experiments/reliability/soak.py`.

Two trainings of one config run side by side, by the commands that users call. One, `steady`, is
never disturbed; the other, `killed`, is stopped at random moments, by SIGKILL and SIGTERM in turn,
and the same command goes on with it; between its lives it is measured and drawn from, and a sweep
runs. Memory, open files, threads and processes are read all the while. At the end both must hold
the same weights wherever both kept a milestone, and nothing that was started may still be there.

Writes soak.json and soak.csv, and from them soak.md and soak.png (`--report` does the latter
alone). Needs `pip install -e '.[test]'` and Linux. Exit code 1 where anything was lost or left
behind.
"""

import argparse
import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
from textwrap import fill

import psutil
import torch
from faults import equal
from PIL import Image

from ddpm.config import defaults
from ddpm.experiment import build
from ddpm.studies import figures
from ddpm.studies.archive import commit, this_machine
from ddpm.studies.tables import markdown
from ddpm.training import checkpoint

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SIZE = [
    "model.model_channels=8",
    "model.num_res_blocks=1",
    "model.channel_mult=1,2",
    "model.attention_resolutions=8,",
    "diffusion.timesteps=100",
    "train.batch_size=16",
    "sample.steps=5",
    "sample.num_images=16",
    "evaluate.num_samples=64",
    "evaluate.steps=5",
    "evaluate.sampler=ddim",
    "evaluate.extractor=digits",
]
LONG = [
    "train.length=10000000 steps",
    "every.log=50 steps",
    "every.sample=500 steps",
    "every.validate=250 steps",
    "every.evaluate=500 steps",
    "every.save=100 steps",
    "every.milestone=1000 steps",
    "data.num_workers=1",
]
SWEEP = """
project: soak
name: sweep
method: grid
metric: {name: val/loss, goal: minimize}
parameters:
  config.seed: {values: [0, 1]}
  config.train.length: {value: 20 steps}
  config.every.evaluate: {value: 20 steps}
"""
AGE = 30  # seconds after which a life is looked at, to compare it with the others
SETTLED = 1 / 6  # of the time: until then caches fill


class Watched:
    """A command that runs in a session of its own, so that what it leaves behind is found."""

    def __init__(self, folder, name, *words):
        self.name = name
        self.born = time.monotonic()
        self.log = folder / f"{name}.out"
        home = {
            "HOME": str(folder),
            "DDPM_CACHE": str(folder / "cache"),
            "TMPDIR": str(folder / "tmp"),
            "OMP_NUM_THREADS": "1",
            "WANDB_MODE": "offline",
            "PYTHONPATH": str(ROOT),
        }
        with open(self.log, "ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=folder,
                env=os.environ | home,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, seconds=300):
        """Its exit code, when it ends in time."""
        return self.process.wait(seconds)

    def left(self):
        """The living processes of its session."""
        found = []
        for one in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                if os.getsid(one.pid) == self.process.pid and one.status() != psutil.STATUS_ZOMBIE:
                    found.append(one)
        return found

    def reading(self):
        """What it has now: MiB and threads, its own and its children's; open files and
        processes; None when it is gone.
        """
        with contextlib.suppress(psutil.Error):
            main = psutil.Process(self.process.pid)
            tree = [main, *main.children(recursive=True)]
            mib = [one.memory_info().rss / 2**20 for one in tree]
            threads = [one.num_threads() for one in tree]
            return {
                "mib": mib[0],
                "children_mib": sum(mib[1:]),
                "files": sum(one.num_fds() for one in tree),
                "threads": threads[0],
                "children_threads": sum(threads[1:]),
                "processes": len(tree),
            }


class Readings:
    """What is watched, read every few seconds by a thread; rows of soak.csv."""

    def __init__(self, every):
        self.rows = []
        self.watched = {}
        self.begun = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self.read, args=(every,), daemon=True)
        self.thread.start()

    def read(self, every):
        while not self.over.wait(every):
            for one in list(self.watched.values()):
                if found := one.reading():
                    now = time.monotonic()
                    self.rows.append(
                        {
                            "seconds": round(now - self.begun, 1),
                            "who": one.name,
                            "age": round(now - one.born, 1),
                        }
                        | {key: round(value, 1) for key, value in found.items()}
                    )

    def stop(self):
        self.over.set()
        self.thread.join()


def options(words):
    return [f"--config.{word}" for word in words]


def training(folder, name):
    source = f"data.source=folder(path='{folder / 'photos'}')"
    return Watched(
        folder,
        name,
        "ddpm.main",
        f"--config={ROOT / 'configs' / 'digits.py'}",
        *options([*SIZE, *LONG, source]),
        f"--workdir={folder / name}",
    )


def last_row(folder):
    """The step of the last whole row of metrics.jsonl; -1 where there is none."""
    with contextlib.suppress(OSError, IndexError, ValueError):
        return json.loads((folder / "metrics.jsonl").read_bytes().splitlines()[-1])["step"]
    return -1


def life(folder, readings, draw, number, longest):
    """Let `killed` live for a random time and end it; what it was like."""
    begun = time.monotonic()
    before = last_row(folder / "killed")
    one = training(folder, "killed")
    readings.watched["killed"] = one
    until = begun + draw.uniform(0.2, 1) * longest
    first = None
    while time.monotonic() < until and one.process.poll() is None:
        if first is None and last_row(folder / "killed") > before:
            first = time.monotonic() - begun
        time.sleep(0.2)
    hard = number % 2 == 0
    asked = time.monotonic()
    one.process.send_signal(signal.SIGKILL if hard else signal.SIGTERM)
    code = one.wait()
    took = time.monotonic() - asked
    del readings.watched["killed"]
    return {
        "life": number,
        "begun": round(begun - readings.begun, 1),
        "signal": "SIGKILL" if hard else "SIGTERM",
        "code": code,
        "seconds": round(asked - begun, 1),
        "to_first_row": first and round(first, 1),
        "to_exit": round(took, 1),
        "step": last_row(folder / "killed"),
        "left": leftovers([one]),
    }


def leftovers(ended, patience=30):
    """How many processes of commands that have ended are still there after `patience` seconds."""
    until = time.monotonic() + patience
    while (left := sum((one.left() for one in ended), [])) and time.monotonic() < until:
        time.sleep(0.5)
    return len(left)


def command(folder, name, *words):
    """Run a command to its end: its exit code, and what it left behind."""
    one = Watched(folder, name, *words)
    code = one.wait()
    return {
        "command": name,
        "code": code,
        "seconds": round(time.monotonic() - one.born, 1),
        "left": leftovers([one]),
    }


def lying_about(folder):
    """Files that nobody should find: temporary and half-written ones, shared memory; and how
    many checkpoints there are.
    """
    kept = [
        path
        for _, path in checkpoint.checkpoints(folder / "killed")
        if not path.name.endswith(".keep.pt")
    ]
    # W&B's command line's
    temporary = sum(path.is_file() for path in (folder / "tmp").rglob("*") if path.suffix != ".log")
    return {
        "temporary": temporary,
        "parts": len(list(folder.rglob("*.part"))),
        "shared_memory": len(list(Path("/dev/shm").iterdir())),
        "checkpoints": len(kept),
    }


def soak(folder, minutes, seed):
    """All of it; what is written to soak.json, and the rows of soak.csv."""
    (folder / "tmp").mkdir()
    write_photos(folder / "photos")
    (folder / "sweep.yaml").write_text(
        SWEEP
        + "command: "
        + json.dumps(
            [
                "${env}",
                "${interpreter}",
                "-m",
                "ddpm.main",
                f"--config={ROOT / 'configs' / 'digits.py'}",
                *options(SIZE),
                "${args}",
            ]
        )
    )
    until = time.monotonic() + 60 * minutes
    longest = min(180, 20 * minutes)
    draw = random.Random(seed)
    readings = Readings(every=min(5, minutes))
    lives = []
    commands = []
    lying = [lying_about(folder)]
    steady = readings.watched["steady"] = training(folder, "steady")
    while time.monotonic() < until or not lives:
        lives.append(life(folder, readings, draw, len(lives), longest))
        if checkpoint.checkpoints(folder / "killed"):
            commands.append(
                command(folder, "evaluate", "ddpm.evaluate", f"--checkpoint={folder / 'killed'}")
            )
            commands.append(
                command(
                    folder,
                    "generate",
                    "ddpm.generate",
                    f"--checkpoint={folder / 'killed'}",
                    "--num_images=8",
                    f"--out={folder / 'drawn'}",
                    "--format=png",
                )
            )
        if len(lives) % 4 == 1:
            runs = folder / f"sweep{len(lives)}"
            commands.append(
                command(folder, "sweep", "ddpm.sweep", f"{folder / 'sweep.yaml'}", f"--runs={runs}")
            )
        lying.append(lying_about(folder))
        print(lives[-1], commands[-3:], lying[-1], flush=True)
    readings.stop()
    steady.process.send_signal(signal.SIGTERM)
    code = steady.wait()
    same, other = milestones(folder)
    return {
        "commit": commit(),
        "machine": this_machine(),
        "minutes": minutes,
        "seed": seed,
        "lives": lives,
        "commands": commands,
        "lying": lying,
        "steady": {"code": code, "step": last_row(folder / "steady"), "left": leftovers([steady])},
        "rows_missing": missing_rows(folder / "killed"),
        "milestones_same": same,
        "milestones_other": other,
    }, readings.rows


def milestones(folder):
    """How many milestones of both runs hold the same weights, averages and optimiser, to the
    bit, and how many do not.
    """
    paths = [dict(checkpoint.checkpoints(folder / name)) for name in ("steady", "killed")]
    found = []
    for step in paths[0].keys() & paths[1].keys():
        one, other = (checkpoint.load(path[step])["parts"] for path in paths)
        found.append(all(equal(one[name], other[name]) for name in ("net", "ema", "optimizer")))
    return sum(found), len(found) - sum(found)


def missing_rows(folder):
    """Steps of the rhythm of every.log that lack their row, or have two."""
    try:
        steps = [
            json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
        ]
    except OSError:
        return ["all"]
    return sorted(set(range(50, max(steps), 50)) - set(steps)) + [
        step for step in set(steps) if steps.count(step) > 1
    ]


def write_photos(folder):
    """The digits as files, for loader workers and the cache of decoded images to have work."""
    images = build.dataset(defaults.freeze(defaults.base()))
    folder.mkdir()
    for index in range(len(images)):
        Image.fromarray(images[index][0].numpy()).save(folder / f"{index:04d}.png")


# the report


def growth(rows, who, key):
    """(median after the caches have filled, median at the end, least-squares slope an hour
    between) of a column.
    """
    mine = [row for row in rows if row["who"] == who]
    end = max(row["seconds"] for row in mine)
    settled = [row for row in mine if row["seconds"] >= SETTLED * end]
    early, late = (
        [row[key] for row in settled if low * end <= row["seconds"] <= high * end]
        for low, high in ((SETTLED, 2 * SETTLED), (1 - SETTLED, 1))
    )
    x, y = (
        torch.tensor([row[name] for row in settled], dtype=torch.float64)
        for name in ("seconds", key)
    )
    x = x - x.mean()
    return median(early), median(late), (x @ (y - y.mean()) / (x @ x) * 3600).item()


@figures.style()
def curves(rows):
    """Memory, open files and threads against time: the steady training, and the lives of the
    other.
    """
    figure, ((memory, counts),) = figures.canvas(columns=2, height=3)
    for number, (who, key, label) in enumerate(
        (
            ("steady", "mib", "steady, main process"),
            ("steady", "children_mib", "its children"),
            ("killed", "mib", "lives of the other, main process"),
        )
    ):
        mine = [row for row in rows if row["who"] == who]
        memory.plot(
            [row["seconds"] / 60 for row in mine],
            [row[key] for row in mine],
            "." if who == "killed" else "-",
            markersize=2,
            color=figures.COLOURS[number],
            label=label,
        )
    for number, key in enumerate(("files", "threads", "children_threads", "processes")):
        mine = [row for row in rows if row["who"] == "steady"]
        counts.plot(
            [row["seconds"] / 60 for row in mine],
            [row[key] for row in mine],
            label=key.replace("_", " "),
            **figures.line_style(number),
        )
    memory.set(xlabel="minutes", ylabel="resident memory, MiB", ylim=(0, None))
    counts.set(xlabel="minutes", ylabel="of steady and its children", ylim=(0, None))
    for axis in (memory, counts):
        axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1))
    return figure


def faults(found, rows):
    """What should not have been, in words; empty where all is well. An allocator may keep a
    tenth more than it did at first.
    """
    lives = found["lives"]
    commands = found["commands"]
    lying = found["lying"]
    wrong = [
        f"life {one['life']} ended with {one['code']}"
        for one in lives
        if one["code"] != (-signal.SIGKILL if one["signal"] == "SIGKILL" else os.EX_TEMPFAIL)
    ]
    wrong += [f"{one['command']} ended with {one['code']}" for one in commands if one["code"]]
    wrong += [
        f"{one['left']} processes were left"
        for one in (*lives, *commands, found["steady"])
        if one["left"]
    ]
    wrong += [f"the steady run ended with {found['steady']['code']}"] * (
        found["steady"]["code"] != os.EX_TEMPFAIL
    )
    wrong += [f"rows are missing or twice: {found['rows_missing']}"] * bool(found["rows_missing"])
    wrong += [f"{found['milestones_other']} milestones differ"] * bool(found["milestones_other"])
    wrong += [
        f"{key} grew from {lying[0][key]} to {lying[-1][key]}"
        for key in ("temporary", "parts", "shared_memory")
        if lying[-1][key] > lying[0][key]
    ]
    for key, allowed in GROWTH.items():
        early, late, _ = growth(rows, "steady", key)
        wrong += [f"{key} grew from {early:.1f} to {late:.1f}"] * (late > allowed * early)
    return wrong


GROWTH = {
    "mib": 1.1,
    "children_mib": 1.1,
    "files": 1,
    "threads": 1,
    "children_threads": 1,
    "processes": 1,
}


def outcome(codes):
    return ", ".join(f"{codes.count(code)} with {code}" for code in sorted(set(codes)))


def words(found, rows):
    """The report in Markdown."""
    lives = found["lives"]
    commands = found["commands"]
    wrong = faults(found, rows)
    table = [
        [
            "steady, its main process and children",
            "after the first sixth",
            "in the last sixth",
            "slope an hour",
        ]
    ]
    for key, name in (
        ("mib", "resident memory, main process, MiB"),
        ("children_mib", "resident memory, children, MiB"),
        ("files", "open files"),
        ("threads", "threads, main process"),
        ("children_threads", "threads, children"),
        ("processes", "processes"),
    ):
        early, late, slope = growth(rows, "steady", key)
        table.append([name, f"{early:.1f}", f"{late:.1f}", f"{slope:+.2f}"])
    starts = [one["to_first_row"] for one in lives if one["to_first_row"]]
    young = [mib for mib in (at_age(rows, one) for one in lives) if mib is not None]
    exits = [one["to_exit"] for one in lives if one["signal"] == "SIGTERM"]
    end = lying_words(found["lying"])
    lines = [
        f"`killed` had {len(lives)} lives ({outcome([one['code'] for one in lives])}) and came to "
        f"step {lives[-1]['step']:,}; `steady` came to {found['steady']['step']:,}.",
        f"Between them {outcome_of_commands(commands)}.",
        f"{found['milestones_same']} milestones of both hold the same weights, averages and "
        f"optimiser to the bit, {found['milestones_other']} do not; rows of metrics.jsonl missing "
        f"or twice: {len(found['rows_missing'])}.",
        *(
            [f"Seconds from the start of a life to its first row, in the median: {thirds(starts)}."]
            if starts
            else []
        ),
        *([f"MiB of a life that is {AGE} s old, in the median: {thirds(young)}."] if young else []),
        *(
            [
                f"From SIGTERM to the exit: {median(exits):.1f} s in the median, {max(exits):.1f} "
                "s at most."
            ]
            if exits
            else []
        ),
        f"At the end: {end}.",
    ]
    answer = "**Answer.** " + (
        "; ".join(wrong) + "." if wrong else "Nothing was lost and nothing was left behind."
    )
    return TEXT.format(
        answer=fill(answer, 128),
        table=markdown(table),
        lines="\n".join(f"- {one}" for one in lines),
        **{key: found[key] for key in ("minutes", "commit", "machine", "seed")},
    )


def thirds(numbers):
    count = max(len(numbers) // 3, 1)
    return (
        f"{median(numbers[:count]):.1f} in the first third of them and "
        f"{median(numbers[-count:]):.1f} in the last"
    )


def lying_words(lying):
    first = lying[0]
    last = lying[-1]
    return (
        f"{last['checkpoints']} checkpoints beside milestones, {last['parts']} half files, "
        f"{last['temporary']} temporary files ({first['temporary']} at the start), "
        f"{last['shared_memory']} objects of shared memory ({first['shared_memory']})"
    )


def at_age(rows, life):
    """MiB of the main process of a life of `killed` when it was AGE seconds old; None for one
    that died younger.
    """
    begun = life["begun"]
    end = life["begun"] + life["seconds"]
    mine = [
        row["mib"]
        for row in rows
        if row["who"] == "killed" and begun <= row["seconds"] <= end and row["age"] >= AGE
    ]
    return mine[0] if mine else None


def outcome_of_commands(commands):
    names = dict.fromkeys(one["command"] for one in commands)
    return (
        "; ".join(
            f"`ddpm.{name}` ran {sum(one['command'] == name for one in commands)} times "
            f"({outcome([one['code'] for one in commands if one['command'] == name])})"
            for name in names
        )
        or "no command ran"
    )


TEXT = """# An hour of kills, restarts, evaluations and sweeps

**Question.** Does anything grow or stay behind when trainings are stopped and continued over and over, and measured in between?

{answer}

![Memory, open files and threads](soak.png)

{table}

{lines}

**Protocol.** For {minutes:g} minutes two trainings of one small config (digits from files through a loader process and the
cache, W&B offline, validation, grids and FD (digits) every few hundred steps) run side by side on two cores, one thread each.
`steady` is left alone. `killed` is stopped at moments drawn from a seed, by SIGKILL and SIGTERM in turn, and the same command
goes on with it; after each of its lives `ddpm.evaluate` and `ddpm.generate` take its newest checkpoint, and after every fourth
a sweep of two trainings runs. Each process has a session of its own, in which nothing may be left half a minute after its end.

**What this does not show.** GPUs, several ranks, days.

By `python experiments/reliability/soak.py --seed={seed}` at commit {commit}, {machine}.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--report", action="store_true", help="write the report of soak.json and soak.csv anew"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="folder for what is written")
    given = parser.parse_args(arguments)
    if not given.report:
        given.out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            found, rows = soak(Path(folder), given.minutes, given.seed)
        (given.out / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
        with (given.out / "soak.csv").open("w", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    found = json.loads((given.out / "soak.json").read_text())
    with (given.out / "soak.csv").open() as lines:
        rows = [
            {key: value if key == "who" else float(value) for key, value in line.items()}
            for line in csv.DictReader(lines)
        ]
    figures.save(curves(rows), given.out / "soak.png")
    (given.out / "soak.md").write_text(words(found, rows))
    print((given.out / "soak.md").read_text())
    return bool(faults(found, rows))


if __name__ == "__main__":
    sys.exit(main())
