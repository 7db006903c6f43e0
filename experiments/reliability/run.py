"""Things go wrong, on purpose: what was done, how often, and what was lost. `python
experiments/reliability/run.py`.

Each fault of the table is done so many times and writes its row to results.json; README.md is made
from that alone (`--report` does no more). Rows of this commit stay, so the same command goes on
where it was stopped; `--only=NAME,...` does those again. `--short` is what the tests do, in a
minute, into a new folder; `--times=10` does each at most ten times. Needs `pip install -e
'.[test]'`. Exit code 1 where anything was lost.
"""

import argparse
import json
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from textwrap import fill

import bad_images
import crashes
import damage
import divergence
import fuzz
import hostile
import preemption
import ranks
import torch
from faults import Fault, Found, on_a_slow_disk

import tracking
from ddpm.common.files import atomic_write
from ddpm.studies.archive import commit, this_machine
from ddpm.studies.tables import markdown

HERE = Path(__file__).parent
SAME = (
    "the same command goes on to the same weights, rows and pictures, bit for bit, and leaves "
    "no half file"
)

FAULTS = {
    "kill": Fault(crashes.at_any_time, "SIGKILL at random moments of a training", SAME, 300, 2),
    "kill in staging": Fault(
        crashes.inside("staging"), "SIGKILL with half of the copy made that is saved", SAME, 20, 1
    ),
    "kill on a slow disk": Fault(
        on_a_slow_disk(crashes.at_any_time),
        "SIGKILL at random moments while each fsync takes 0.1 s: in the middle of a save, with the "
        "next one waiting",
        SAME,
        40,
        1,
    ),
    "kill in serialising": Fault(
        crashes.inside("serialising"), "SIGKILL with half of a checkpoint written", SAME, 20, 1
    ),
    "kill in fsync": Fault(
        crashes.inside("fsync"), "SIGKILL before an fsync of a file or folder", SAME, 20, 1
    ),
    "kill in rename": Fault(
        crashes.inside("rename"), "SIGKILL before a new file gets its name", SAME, 20, 1
    ),
    "kill in deletion": Fault(
        crashes.inside("deletion"),
        "SIGKILL before an old checkpoint, or a half file, is deleted",
        SAME,
        20,
        1,
    ),
    "kill in image write": Fault(
        crashes.inside("picture"), "SIGKILL with half of a sample grid written", SAME, 20, 1
    ),
    "kill in generate": Fault(
        crashes.drawing,
        "SIGKILL with half a picture of `ddpm.generate` written, or before it gets its name, in "
        "each format",
        "the same command writes the same files, bit for bit, and leaves no half one",
        28,
        1,
    ),
    "kill in cache build": Fault(
        crashes.cache_build,
        "SIGKILL while photos are examined and decoded, or before the cache is synced or gets its "
        "name",
        SAME,
        21,
        1,
    ),
    "kill in W&B flush": Fault(
        crashes.inside("row", crashes.unsynced, wandb__mode="offline"),
        "SIGKILL before or after a row goes to W&B's offline log, half of them with W&B's own "
        "process",
        f"{SAME}; `wandb sync` of the logs uploads every row once",
        20,
        1,
    ),
    "flipped bits": Fault(
        damage.unseen,
        "one bit flipped anywhere in a checkpoint or in exported weights, or the file cut short",
        "it is refused as damaged, or all that is read from it is what was written",
        2000,
        60,
    ),
    "damaged checkpoint": Fault(
        damage.rotten,
        "the newest checkpoint, or the newest two, damaged so",
        f"a line says so, the damaged file is kept, and from the one before {SAME}",
        40,
        2,
    ),
    "all checkpoints damaged": Fault(
        damage.all_rotten,
        "every checkpoint cut short",
        "one line, exit code 2, and no file of the run is changed",
        20,
        1,
    ),
    "disk full": Fault(
        damage.full,
        "the disk full, or a file too long for it, at any point of a training",
        f"one line says what is in the way, exit code 1, checkpoints are whole; with room {SAME}",
        40,
        1,
    ),
    "two processes": Fault(
        damage.shared,
        "a second training begun in the run folder of a first, in its middle",
        "the second is refused in one line, exit code 2, and the first ends as alone",
        20,
        1,
    ),
    "hostile files": Fault(
        hostile.refused,
        "checkpoints, exported weights, diffusers folders and configs inside them that are made "
        "to run code, to leave their folder or to claim terabytes, at every command that takes "
        "one, which may take 1 GiB more than before",
        "one line, exit code 2, no code is run, no file is made",
        3,
        1,
    ),
    "hostile caches": Fault(
        hostile.caches,
        "the same, and flipped bits, in place of what is kept in `$DDPM_CACHE` between runs",
        "what was kept is worked out anew and replaced",
        1,
        1,
    ),
    "pre-emption": Fault(
        preemption.at_any_time,
        "SIGTERM, SIGUSR1, SIGINT at random moments of a training that mostly draws and measures",
        "it saves and exits with 75; " + SAME,
        50,
        2,
    ),
    "pre-emption on a slow disk": Fault(
        on_a_slow_disk(preemption.while_saving),
        "the same signals to a training that saves at each step, while each fsync takes 0.1 s",
        "it saves and exits with 75; " + SAME,
        30,
        1,
    ),
    "divergence": Fault(
        divergence.in_turn,
        "batches, weights or learning rates that no training survives",
        "the step is skipped, or the run goes back and ends well, or it stops with 3 and a "
        "diagnosis",
        20,
        1,
    ),
    "bad images": Fault(
        bad_images.among_good_ones,
        "files of images that are damaged, or made to do harm, beside twelve good ones",
        "a training learns from what can be read as if nothing else were there, bit for bit",
        1000,
        20,
    ),
    "images that change": Fault(
        bad_images.while_read,
        "a folder is read while its files are written, cut off, removed, replaced by pipes",
        "it can be read, and afterwards each file is taken for what it is",
        300,
        10,
    ),
    "kill a rank": Fault(
        ranks.rank_killed,
        "SIGKILL of one of two ranks at random moments, by torchrun --max-restarts",
        "torchrun starts the ranks again, and the weights, rows and pictures are the same, bit "
        "for bit",
        20,
        0,
    ),
    "other ranks": Fault(
        ranks.other_worlds,
        "a run goes on from its checkpoint on another number of ranks, 1, 2 or 4",
        "the losses are the same but for rounding",
        10,
        0,
    ),
    "nodes": Fault(
        ranks.nodes_come_and_go,
        "of two nodes (torchrun --nnodes=1:2) one is killed, agent and rank, and joins again",
        "the other goes on alone, then both do; each step has its row",
        10,
        0,
    ),
    **tracking.FAULTS,
    **fuzz.FAULTS,
}


def isolated(home):
    """Let nothing of the person who runs this be read or changed: caches, logins and settings
    are below `home`.
    """
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(
        {
            name: str(home)
            for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME", "DDPM_CACHE")
        }
    )


def found_of(fault, folder, times):
    """The Found of a fault that is done so often in a new folder; where its own script fails,
    that is a loss too.
    """
    try:
        return fault.do(folder, times, 0)
    except Exception as error:
        traceback.print_exc()
        return Found(
            0,
            [" ".join(f"the script of this fault failed: {type(error).__name__}: {error}".split())],
        )


def do(names, short, most, out, again):
    """Do the faults of these names, at most so many times each, and keep a row for each as it ends;
    those that have one of this commit only `again`.
    """
    head = commit()
    path = out / "results.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for name in names:
        fault = FAULTS[name]
        times = min(fault.short if short else fault.times, most or fault.times)
        if not times:
            print(f"{name}: in full only")
            continue
        if (
            not again
            and (row := kept.get(name))
            and (row["commit"], row["asked"]) == (head, times)
            and not row["lost"]
        ):
            continue
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="ddpm-") as folder:
            found = found_of(fault, Path(folder), times)
        kept[name] = {
            "what": fault.what,
            "holds": fault.holds,
            "asked": times,
            **found._asdict(),
            "seconds": round(time.monotonic() - begun, 1),
            "commit": head,
            "torch": torch.__version__,
            "machine": this_machine(),
        }
        with atomic_write(path) as part:
            part.write_text(
                json.dumps({name: kept[name] for name in FAULTS if name in kept}, indent=1) + "\n"
            )
        print(
            f"{name}: {found.done} of {times} times in {kept[name]['seconds']} s, "
            f"{losses(kept[name])}",
            flush=True,
        )


def losses(row):
    return f"lost: {'; '.join(row['lost'][:3])}" if row["lost"] else "nothing"


def report(out):
    """Write README.md from results.json; returns True where nothing was lost."""
    kept = json.loads((out / "results.json").read_text())
    lines = [["fault", "what was done", "times", "what must hold", "lost", "figures"]]
    lines += [
        [name, row["what"], f"{row['done']:,}", row["holds"], losses(row), row["said"]]
        for name, row in kept.items()
    ]
    bad = [name for name, row in kept.items() if row["lost"]]
    done = sum(row["done"] for row in kept.values())
    answer = f"**Answer.** {len(kept)} kinds of fault were done {done:,} times in all, and "
    answer += (
        f"something was lost in {len(bad)} of them: {', '.join(bad)}."
        if bad
        else "nothing was lost."
    )
    made = {
        key: ", ".join(dict.fromkeys(row[key] for row in kept.values()))
        for key in ("commit", "torch", "machine")
    }
    hours = sum(row["seconds"] for row in kept.values()) / 3600
    (out / "README.md").write_text(
        TEXT.format(answer=fill(answer, 128), table=markdown(lines), hours=hours, **made)
    )
    return not bad


TEXT = """# Reliability: what a run survives

**Question.** What is lost when a run is killed, its disk fills up, its files rot, or somebody hands it a hostile one?

{answer}

{table}

**Protocol.** Each fault is really done: processes die by SIGKILL, disks are full, bytes are changed on the disk. The training
is a small one, 30 steps of the embedded digits in about two seconds, by the function behind `python -m ddpm.main`; it logs,
validates, draws, saves and keeps a milestone on its way. What was hit is run again by the same command to its end and held
against a run that was left alone: tensors of every checkpoint, the bytes of exported weights and pictures, the rows of
metrics.jsonl but for what depends on the machine's speed. Which moments and points are hit is drawn from a fixed seed.

**What this does not show.** A power cut: SIGKILL ends the process, not the machine, so what the kernel holds is still written.
That files are synced before they get their names is a test (tests/common/test_files.py); that a disk keeps what it has synced
is up to the disk. Whether anything grows in a long run is asked in [soak.md](soak.md).

By `python experiments/reliability/run.py` ({hours:.1f} hours) at commit {commit}, torch {torch}, {machine}.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="each fault as seldom as in the tests")
    parser.add_argument(
        "--only", default="", help=f"some of the faults, again: {', '.join(FAULTS)}"
    )
    parser.add_argument(
        "--times", type=int, default=0, help="at most so many times each; 0, the default, for all"
    )
    parser.add_argument(
        "--report", action="store_true", help="write the report of results.json anew"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results and the report; by default this one, in full",
    )
    given = parser.parse_args(arguments)
    given.out = given.out or (Path(tempfile.mkdtemp(prefix="ddpm-short-")) if given.short else HERE)
    names = [name.strip() for name in given.only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in FAULTS]:
        parser.error(f"there is no fault {unknown[0]!r}; choose one of {', '.join(FAULTS)}")
    if given.report and not (given.out / "results.json").is_file():
        parser.error(f"there is no results.json in {given.out}; leave out --report")
    if not given.report:
        with tempfile.TemporaryDirectory(prefix="ddpm-home-") as home:
            isolated(home)
            do(names or FAULTS, given.short, given.times, given.out, again=bool(names))
        print(f"wrote {given.out / 'README.md'}")
    return 0 if not (given.out / "results.json").is_file() or report(given.out) else 1


if __name__ == "__main__":
    sys.exit(main())
