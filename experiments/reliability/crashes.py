"""SIGKILL at any moment and at chosen points, and the same command again: the run goes on as if nothing had been."""

import io
import itertools
import os
import time
from pathlib import Path

import numpy as np
import torch
from faults import Found, before_call, die, differences, forked, small, training

ALL = 10**9  # more than there are calls


def half_saved(at):
    """Die in the `at`-th torch.save, with half of the file written."""
    original, calls = torch.save, itertools.count(1)

    def counted(content, file):
        if next(calls) != at:
            return original(content, file)
        original(content, whole := io.BytesIO())
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        die()

    torch.save = counted
    return lambda: next(calls) - 1


def inside(arm):
    """A fault: kills in a function that a training calls. `arm(at)` makes this process die in its `at`-th call of it.

    A run is killed at a call that is drawn among those that it has left, goes on, is killed again ... and comes to its end.
    """

    def do(folder, times, seed):
        rng, counts, done, lost = np.random.default_rng(seed), folder / "calls", 0, []

        def counting():
            calls = arm(None)
            training(small(), folder / "whole")()
            counts.write_text(str(calls()))

        assert forked(counting, folder / "log") == 0
        for number in itertools.count():
            run, left = folder / f"run {number}", int(counts.read_text())
            while left and done < times:
                at = int(rng.integers(1, left + 1))
                left -= at
                code = forked(lambda: (arm(at), training(small(), run)())[1], folder / "log")  # noqa: B023
                if code != -9:
                    lost += [f"{run.name}: exit code {code} instead of a kill at call {at}"]
                    break
                done += 1
            lost += finished(folder, run)
            if done == times or lost:
                return Found(done, lost)

    return do


def at_any_time(folder, times, seed):
    """Kills at moments that are drawn from the seconds that a training has left."""
    rng, done, lost = np.random.default_rng(seed), 0, []
    begun = time.monotonic()
    assert forked(training(small(), folder / "whole"), folder / "log") == 0
    takes = time.monotonic() - begun
    for number in itertools.count():
        run, left = folder / f"run {number}", takes
        while left > takes / 20 and done < times:
            moment = rng.uniform(0, left)
            left -= moment
            code = forked(training(small(), run), folder / "log", kill_after=moment)
            if code == 0:
                break
            if code != -9:
                return Found(done, [*lost, f"{run.name}: exit code {code} instead of a kill after {moment:.3f} s"])
            done += 1
        lost += finished(folder, run)
        if done == times or lost:
            return Found(done, lost, f"a run takes {takes:.1f} s")


def finished(folder, run):
    """What a killed run has lost when the same command has brought it to its end."""
    code = forked(training(small(), run), folder / "log")
    return [f"{run.name}: exit code {code} when it should go on"] if code else differences(folder / "whole", run)


def call(home, attribute):
    """`arm` for `inside`: die before a call of a function."""
    return lambda at: before_call(home, attribute, at)


any_fsync, any_rename, any_deletion = call(os, "fsync"), call(os, "replace"), call(Path, "unlink")
