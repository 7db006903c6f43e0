"""Faults of tracking: the server, W&B's own process, its disk and its login, by
tests/support/troubled.py in a process.
"""

import itertools
import json
import os
import subprocess
import sys

from faults import Fault, Found

from support import troubled
from support.commands import PYTHONPATH

ALONE = ["unshare", "-rm"]  # small disks are mounted where nobody else sees them
KEPT = (
    "metrics.jsonl has every row, no step waits, the end takes seconds, and W&B has every row "
    "after `wandb sync`"
)


def trouble(*names):
    """A `do` that trains so many times, with these kinds of trouble in turn."""

    def do(folder, times, seed):
        if not times:
            return Found(0, [])
        command = [
            *ALONE,
            sys.executable,
            troubled.__file__,
            str(folder),
            *itertools.islice(itertools.cycle(names), times),
        ]
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=60 * times,
            check=True,
            env=os.environ | {"PYTHONPATH": PYTHONPATH},
        )
        found = json.loads(done.stdout)
        lost = [f"{each['fault']}: {line}" for each in found for line in troubled.losses(each)]
        longest = {key: max(each[key] for each in found) for key in ("log", "close")}
        return Found(
            len(found),
            lost,
            f"a row takes {1000 * longest['log']:.0f} ms, the end {longest['close']:.1f} s at most",
        )

    return do


FAULTS = {  # in the tests they are tests/tracking/test_wandb.py
    name: Fault(trouble(*kinds), what, KEPT, times, 0)
    for name, kinds, what, times in (
        (
            "W&B cannot be reached",
            ("silent at the start", "gone at the start", "no login"),
            "at the start the server refuses, or never answers, or nobody is logged in",
            15,
        ),
        (
            "W&B goes away",
            ("gone", "gone and back", "silent", "slow"),
            "in the middle the server ends, ends and comes back, does not answer, or takes 5 s "
            "for an answer",
            20,
        ),
        (
            "W&B refuses",
            ("500", "429", "401", "403", "409", "deleted"),
            "in the middle the server answers with such a status, or the run is deleted there",
            30,
        ),
        (
            "W&B lies",
            ("garbled", "cut off"),
            "in the middle its answers are no JSON, or end half-way, with status 200",
            10,
        ),
        (
            "W&B's process",
            ("service killed", "service killed, offline", "service stopped"),
            "its own process gets SIGKILL or SIGSTOP in the middle",
            30,
        ),
        (
            "W&B's disk",
            (
                "log disk full",
                "log disk full, offline",
                "log disk full for a while",
                "log of limited size",
                "temporary disk full",
            ),
            "the disk of its log or of its pictures is full from the middle on",
            25,
        ),
        (
            "the rows' disk",
            ("disk full for a while",),
            "the whole run folder's disk is full for a quarter of the training",
            10,
        ),
        (
            "the end and a fork",
            ("Ctrl-C at the end", "a fork"),
            "Ctrl-C while the end waits for a silent server; a fork while W&B runs",
            20,
        ),
    )
}
