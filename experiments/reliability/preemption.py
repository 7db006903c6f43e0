"""A machine that is taken back: SIGTERM, SIGUSR1 and SIGINT at any moment, and the same command
again.
"""

import itertools
import os
import signal
import time

import numpy as np
from faults import Found, differences, forked, last_line, small, training

ASKED = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# most of it is drawing and measuring; saved at each step, so that the same two checkpoints stay
EVENTFUL = dict(
    train__length="12 steps",
    every__save="1 step",
    every__milestone="8 steps",
    every__log="2 steps",
    every__validate="4 steps",
    every__sample="4 steps",
    sample__steps=20,
    every__evaluate="6 steps",
    evaluate__steps=10,
    evaluate__num_samples=32,
    evaluate__likelihood="both(images=8, nfe=16)",
)
# hardly more than steps and saves
SAVING = dict(
    every__save="1 step",
    every__milestone="8 steps",
    every__validate="10 steps",
    every__sample="0 steps",
)


def plainly(work):
    """The same work; signals that come before it hears them end the process by themselves."""
    return lambda: (signal.signal(signal.SIGINT, signal.SIG_DFL), work())[1]


def while_saving(folder, times, seed):
    """Signals at moments of a training that saves at each step."""
    return at_any_time(folder, times, seed, SAVING)


def at_any_time(folder, times, seed, options=EVENTFUL):
    """Signals at moments that are drawn from the seconds that a training has left, which
    measures itself twice.
    """
    rng = np.random.default_rng(seed)
    given = small(**options)
    done = 0
    waits = []
    begun = time.monotonic()
    assert forked(training(given, folder / "whole"), folder / "log") == 0
    takes = time.monotonic() - begun
    for number in itertools.count():
        run = folder / f"run {number}"
        left = takes
        code = None
        while left > takes / 20 and done < times and code != 0:
            moment = rng.uniform(0.05, max(left, 0.1))
            left -= moment
            begun = time.monotonic()
            code = forked(
                plainly(training(given, run)),
                folder / "log",
                kill_after=moment,
                by=ASKED[done % len(ASKED)],
            )
            if code == os.EX_TEMPFAIL:
                done = done + 1
                waits = [*waits, time.monotonic() - begun - moment]
            elif code > 0:
                return Found(
                    done,
                    [f"{run.name}: exit code {code} in place of 75: {last_line(folder / 'log')}"],
                )
        code = forked(training(given, run), folder / "log")
        lost = (
            [f"{run.name}: exit code {code} when it should go on"]
            if code
            else differences(folder / "whole", run)
        )
        if done == times or lost:
            said = (
                f"from signal to exit {np.median(waits):.2f} s in the median, {max(waits):.2f} "
                "s at most"
            )
            return Found(done, lost, f"a run takes {takes:.1f} s; {said}")
