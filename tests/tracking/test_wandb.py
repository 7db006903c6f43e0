"""Whatever is wrong with W&B: no row is lost, nothing waits for it, and one line reports it. Kinds:
tests/support/troubled.py.
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from support import troubled
from support.commands import PYTHONPATH, python
from support.wandb_server import FAULTS, Run
from support.wandb_server import server as server

ALL = list(range(1, troubled.STEPS + 1))
ALONE = ["unshare", "-rm"]  # mounts of a process are seen by nobody else, and go with it
BEHIND = "W&B's server has not taken everything; to upload it: wandb sync --include-online"
OFFLINE = [
    "this run is logged offline",
    "W&B's log is complete on this disk; to upload it: wandb sync",
]
SAID = {  # what a person reads, each line once
    "well": [],
    "no login": ["W&B is not online: not logged in; use `wandb login`", *OFFLINE],
    "silent": [BEHIND],
    "slow": [BEHIND],
    "403": ["W&B is interrupted: OSError: the server refuses its rows", *OFFLINE],
    "cut off": [],
    "gone and back": [],
    "silent at the start": ["W&B is not online: CommError", *OFFLINE],
    "gone at the start": ["W&B is not online: CommError", *OFFLINE],
    "a fork": [],
    "Ctrl-C at the end": ["W&B did not finish in time; to upload it: wandb sync --include-online"],
    "service killed": ["W&B is interrupted: "],
    "service stopped": ["W&B is interrupted: "],
    "log of limited size": ["W&B is interrupted: OSError: its log is missing rows", OFFLINE[1]],
    "disk full for a while": [
        "metrics.jsonl is incomplete from here: OSError: [Errno 28] No space left on device",
        "metrics.jsonl is complete again",
        "W&B is interrupted: OSError: its log is missing rows",
        OFFLINE[1],
    ],
    "temporary disk full": ["W&B is missing pictures from step 20 on: OSError"],
}
# also right: whether the two seconds are enough is up to the machine
WAITS = {"gone and back": [BEHIND]}
MOUNTS = ("disk full for a while", "temporary disk full")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each fault came to; a hang is a failure."""
    folder = tmp_path_factory.mktemp("troubled")
    mounts = (
        subprocess.run(
            [*ALONE, "mount", "-t", "tmpfs", "tmpfs", str(folder)], capture_output=True
        ).returncode
        == 0
    )
    clean = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("WANDB_", "NETRC"))
    }
    command = [
        sys.executable,
        troubled.__file__,
        str(folder),
        *(name for name in SAID if mounts or name not in MOUNTS),
    ]
    done = subprocess.run(
        command if not mounts else ALONE + command,
        capture_output=True,
        text=True,
        timeout=400,
        env=clean | {"HOME": str(folder), "PYTHONPATH": PYTHONPATH},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return {each["fault"]: each for each in json.loads(done.stdout)}


@pytest.mark.parametrize("fault", SAID)
def test_no_row_is_lost_and_nothing_waits(found, fault):
    if fault not in found:
        pytest.skip("no disk can be mounted here")
    one = found[fault]
    assert troubled.losses(one) == []
    # a request that is waited for takes five seconds, this loop one
    assert one["train"] < 4 * found["well"]["train"]
    said = [
        line for line in one["said"] if line.startswith(("W&B", "metrics.jsonl", "training.log"))
    ]
    for line in [
        *SAID[fault],
        *(line for line in WAITS.get(fault, []) if any(line in each for each in said)),
    ]:
        assert sum(line in each for each in said) == 1, said


def test_a_server_that_is_well_has_all_at_the_end(found):
    for fault in ("well", "a fork", "service killed", "service stopped", "temporary disk full"):
        assert found[fault]["sent"] == ALL


def test_a_server_that_fails_while_runs_are_read_is_one_line(server, tmp_path):
    server.runs["a"] = Run("a", "p", state="finished")
    asked = itertools.count()
    server.fault = lambda handler: next(asked) > 1 and FAULTS["403"](handler)
    done = subprocess.run(
        [python(), "-m", "ddpm.compare", "me/p"],
        cwd=tmp_path,
        timeout=120,
        env=os.environ | server.login | {"PYTHONPATH": PYTHONPATH},
        text=True,
        capture_output=True,
    )
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (
        2,
        "",
        1,
    ) and "cannot be read from W&B" in done.stderr
    assert next(asked) > 2, "it was being read"


@pytest.mark.parametrize(
    "at, number, code", [("step 4/", signal.SIGTERM, 75), ("done; ", signal.SIGINT, 0)]
)
def test_a_signal_while_wandb_waits_for_a_silent_server(server, tmp_path, at, number, code):
    """While it is being opened, the training goes on; and at its end it is waited for fifteen
    seconds.
    """
    server.fault = FAULTS["silent"]
    length = 12 if code == 0 else 100_000
    options = {
        "model.model_channels": 8,
        "train.batch_size": 8,
        "train.length": f"{length} steps",
        "every.log": "4 steps",
        "every.sample": "0 steps",
        "every.validate": "0 steps",
        "every.evaluate": "0 steps",
    }
    command = [
        python(),
        "-m",
        "ddpm.main",
        f"--config={troubled.ROOT}/configs/digits.py",
        f"--workdir={tmp_path}/run",
        *(f"--config.{key}={value}" for key, value in options.items()),
    ]
    environment = os.environ | server.login | {"PYTHONPATH": PYTHONPATH}
    with subprocess.Popen(
        command, env=environment, cwd=tmp_path, text=True, stdout=subprocess.PIPE
    ) as process:
        try:
            while not (line := process.stdout.readline()).startswith(at):
                assert line, "it ends before"
            began = time.monotonic()
            process.send_signal(number)
            said, _ = process.communicate(timeout=60)
        finally:
            process.kill()
    # the latter where a loaded machine has just opened it
    left = "W&B did not finish", "W&B's log is complete on this disk"
    assert process.returncode == code and sum(said.count(words) for words in left) == 1
    assert time.monotonic() - began < 15 + 25  # the rest for a loaded machine
