"""What the faults stand on: a training of two seconds, children that can be killed, and what is
told of them.

The training is the tests' own (tests/support/runs.py), run by the command's function. Children are
forked from a process that has imported everything, so that a kill costs a second and not the start
of torch.
"""

import itertools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from ddpm import main
from ddpm.common import errors
from ddpm.training import checkpoint
from support.runs import equal, rows, tiny


class Found(NamedTuple):
    """What came of a fault."""

    done: int  # how often it was really done
    lost: list[str]  # a line for each thing that was lost or came out differently
    said: str = ""  # figures, for the report


class Fault(NamedTuple):
    """A row of the table."""

    do: Callable  # (folder, times, seed) -> Found; the folder is new and its own
    what: str  # was done, in words
    holds: str  # what must hold afterwards
    times: int  # how often in full
    short: int  # and in the tests, where all of it takes a few seconds; 0 where it takes longer


def small(**options):
    """A config of 30 steps that logs, validates, draws, saves and keeps a milestone on its way."""
    return tiny(**dict(train__length="30 steps", every__milestone="20 steps") | options)


def training(given, folder):
    """`work` for `forked`: train a config in a folder as the command does, and end with its exit
    code.
    """
    return as_command(lambda: main.train_experiment(given, folder))


def as_command(work):
    """The same work, with a user's mistake as one line and exit code 2, as `command.run_door`
    has it.
    """

    def command():
        try:
            return work()
        except (ValueError, OSError) as error:
            print(f"error: {errors.one_line(error)}")
            return errors.USAGE_ERROR

    return command


def forked(work, log, kill_after=None, limit=600, by=signal.SIGKILL):
    """Do `work()` in a child, whose output is added to the file `log`; returns its exit code, -9
    where it was killed.

    The child is killed after `kill_after` seconds, or sent the signal `by`. Raises TimeoutError
    where none were given and it is not done after `limit`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            # a test's are no files of the system
            sys.stdout = sys.stderr = open(log, "a", buffering=1)
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stdout.fileno(), 2)
            code = work() or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    seconds, by = (limit, signal.SIGKILL) if kill_after is None else (kill_after, by)
    clock = threading.Timer(seconds, os.kill, (child, by))
    clock.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    late = not clock.is_alive()
    clock.cancel()
    clock.join()
    if late and kill_after is None:
        raise TimeoutError(
            f"a child was not done after {limit} seconds; it said {last_line(log)!r}"
        )
    return code


def die():
    """End this process as the power does."""
    os.kill(os.getpid(), signal.SIGKILL)


def before_call(home, attribute, at, then=die):
    """From now on `home.attribute` does `then()` in place of its `at`-th call; with `at=None` it
    only counts.

    Returns a function that says how many calls there were.
    """
    original = getattr(home, attribute)
    calls = itertools.count(1)

    def counted(*arguments, **options):
        if next(calls) == at:
            then()
        return original(*arguments, **options)

    setattr(home, attribute, counted)
    return lambda: next(calls) - 1


def on_a_slow_disk(fault, seconds=0.1):
    """The same fault while each fsync takes some seconds more: a save is nearly always under way,
    and the next one waits for it.
    """

    def do(folder, times, seed):
        original = os.fsync

        def slowly(handle):
            time.sleep(seconds)
            original(handle)

        os.fsync = slowly
        try:
            return fault(folder, times, seed)
        finally:
            os.fsync = original

    return do


def last_line(log):
    return (log.read_text().strip().splitlines() or [""])[-1]


def differences(whole, other):
    """Lines that say in what a finished run differs from `whole`, the same one left alone: none,
    if nothing was lost.
    """
    found = []
    (left, right) = (checkpoint.checkpoints(folder) for folder in (whole, other))
    if [path.name for _, path in left] != [path.name for _, path in right]:
        found.append(f"checkpoints {', '.join(path.name for _, path in right)}")
    else:
        for (_, one), (_, two) in zip(left, right, strict=True):
            ours, theirs = (checkpoint.load(path)["parts"] for path in (one, two))
            found += [
                f"part {name} in {two.name}"
                for name in ours
                if name != "tracker" and not equal(ours[name], theirs[name])
            ]
    names = sorted(
        {
            path.relative_to(folder)
            for folder in (whole, other)
            for path in [*folder.glob("*.safetensors"), *folder.glob("samples/*")]
        }
    )
    for name in names:
        one = whole / name
        two = other / name
        if not (one.exists() and two.exists() and one.read_bytes() == two.read_bytes()):
            found.append(str(name))
    if rows(whole) != rows(other):
        found.append("rows of metrics.jsonl")
    found += [f"{path.relative_to(other)} is left behind" for path in other.rglob("*.part")]
    return [f"{other.name}: {line}" for line in found]
