"""Trains a little while something is wrong with W&B: `PYTHONPATH=.:tests python
tests/support/troubled.py FOLDER FAULT...`, of FAULTS.

The server is the stand-in. Prints a JSON list of what each came to: seconds that the longest `log`,
the training and `close` took, what was said, and the rows that metrics.jsonl has, that the server
has, and that it has after the command that was named to the person. Faults of the disk need
`unshare -rm` before the command.
"""

import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import wandb
from wandb.sdk.data_types._private import MEDIA_TMP

from ddpm.tracking import tracker
from ddpm.tracking import wandb as tracking_wandb
from support import wandb_server

ROOT = Path(__file__).parents[2]
STEPS = 40
tracking_wandb.LEAVE_SECONDS = 5
tracking_wandb.STUCK_SECONDS = 5  # a test does not wait for longer
WAITS = {
    "WANDB_INIT_TIMEOUT": "2",
    "WANDB_FINISH_TIMEOUT": "2",
    "WANDB__FILE_STREAM_TRANSMIT_INTERVAL": "1",
}


class Trial:
    """A training of STEPS rows."""

    def __init__(self, folder, server):
        self.folder = folder
        self.server = server
        self.mode = "online"
        self.tracker = None
        self.disk = None

    def run(self, before=None, half=None, late=None, end=None):
        """Train, with what happens before it, after half of it, three quarters and at the end;
        returns what came of it.
        """
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            if before:
                before(self)
            self.tracker = self.open(0)
            if half:
                self.log(1)
                self.tracker.flush()
                until(self.sent if self.mode == "online" else self.held, "W&B has a row")
            began = time.monotonic()
            worst = 0.0
            for step in range(2 if half else 1, STEPS + 1):
                if what := {STEPS // 2: half, 3 * STEPS // 4: late}.get(step):
                    what(self)
                before_log = time.monotonic()
                self.log(step)
                worst = max(worst, time.monotonic() - before_log)
                time.sleep(0.02)
            trained = time.monotonic() - began
            if end:
                end(self)
            began = time.monotonic()
            self.tracker.close()
            closed = time.monotonic() - began
        return {
            "log": worst,
            "train": trained,
            "close": closed,
            "said": said.getvalue().splitlines(),
        }

    def open(self, start):
        options = dict.fromkeys(("project", "entity", "name", "group"), "") | {
            "mode": self.mode,
            "tags": (),
        }
        return tracker.open_tracker(
            self.folder,
            config={},
            wandb=options,
            start_step=start,
            total_steps=STEPS,
            state=self.tracker.state_dict() if start else None,
        )

    def log(self, step):
        images = {"samples": np.full((8, 8, 3), step, np.uint8)} if step % 10 == 0 else {}
        self.tracker.tick(step)
        self.tracker.log(step, row(step), images)

    def rows(self):
        """The steps whose rows in metrics.jsonl are complete and right."""
        lines = [
            json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()
        ]
        return [
            line["step"] for line in lines if line == {"step": line["step"]} | row(line["step"])
        ]

    def held(self):
        """The steps that W&B's logs have."""
        return tracking_wandb.held_in_folder(
            self.folder, self.tracker.state["wandb_id"], [{"step": 1}]
        )

    def sent(self):
        """The steps whose rows on the server are complete and right."""
        run = self.server.runs.get(self.tracker.state["wandb_id"])
        return (
            [line["_step"] for line in run.history if row(line["_step"]).items() <= line.items()]
            if run
            else []
        )


def row(step):
    """What is tracked at a step: some hundred bytes, so that a full disk is felt."""
    return {"train/loss": 1 / step} | {
        f"train/loss_q{quartile}": step + quartile / 7 for quartile in range(20)
    }


def until(condition, what, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.02)


def service():
    """The id of W&B's own process."""
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = entry.read_text().partition(") ")
            if "wandb-core" in name and rest.split()[:2] == ["S", str(os.getpid())]:
                return int(entry.parent.name)
    raise AssertionError("W&B has no process")


def recover(said, folder):
    """Run the commands that were named, the last one of each training, as one."""
    commands = [
        re.findall(r"wandb sync (?:--include-online )?(.+)", "\n".join(lines)) for lines in said
    ]
    logs = " ".join(found[-1] for found in commands if found)
    if logs:
        subprocess.run(
            f"{sys.executable} -m wandb sync --include-online {logs}",
            shell=True,
            check=True,
            capture_output=True,
            cwd=folder,
            timeout=120,
        )


def broken(name):
    return lambda trial: setattr(trial.server, "fault", wandb_server.FAULTS[name])


def disk(trial, below="", size="1m"):
    """Put a part of the run folder on a small disk of its own."""
    trial.disk = trial.folder / below
    trial.disk.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(trial.disk)], check=True
    )


def fill(trial):
    with contextlib.suppress(OSError), open(trial.disk / "filler", "wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))


def free(trial):
    (trial.disk / "filler").unlink(missing_ok=True)


def fork(trial):
    """As for the workers that read images: the child prints, and ends."""
    if not (child := os.fork()):
        print("from the child", flush=True)
        os._exit(0)
    until(lambda: os.waitpid(child, os.WNOHANG)[0], "the child has ended", 10)


def interrupt(seconds):
    return lambda trial: threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def end_service(number):
    return lambda trial: os.kill(service(), number)


def limit(size):
    """No file of W&B's own process grows beyond `size` bytes, as on a full disk."""
    return lambda trial: resource.prlimit(
        service(), resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY)
    )


def log_out(trial):
    wandb.teardown()  # which has read it
    del os.environ["WANDB_API_KEY"]


def log_in(trial):
    os.environ["WANDB_API_KEY"] = trial.server.login["WANDB_API_KEY"]


def offline(then=lambda trial: None):
    def before(trial):
        trial.mode = "offline"
        then(trial)

    return before


def small_temporary(trial):
    """The folder into which W&B puts pictures first is on a small disk."""
    disk(trial, MEDIA_TMP.name)


FAULTS = {name: {"half": broken(name)} for name in wandb_server.FAULTS}
FAULTS |= {
    "well": {},
    "no login": {"before": log_out, "end": log_in},
    "Ctrl-C at the end": {"half": broken("silent"), "end": interrupt(0.3)},
    "silent at the start": {"before": broken("silent")},
    "gone at the start": {"before": lambda trial: trial.server.vanish()},
    "gone": {"half": lambda trial: trial.server.vanish()},
    "gone and back": {
        "half": lambda trial: trial.server.vanish(),
        "late": lambda trial: trial.server.appear(),
    },
    "deleted": {"half": lambda trial: trial.server.runs.pop(trial.tracker.state["wandb_id"])},
    "service killed": {"half": end_service(signal.SIGKILL)},
    "a fork": {"half": fork},
    "log disk full": {"before": lambda trial: disk(trial, "wandb"), "half": fill},
    "log disk full, offline": {"before": offline(lambda trial: disk(trial, "wandb")), "half": fill},
    "log disk full for a while": {
        "before": offline(lambda trial: disk(trial, "wandb")),
        "half": fill,
        "late": free,
    },
    "disk full": {"before": disk, "half": fill},
    "disk full for a while": {"before": offline(disk), "half": fill, "late": free},
    "temporary disk full": {"before": small_temporary, "half": fill},
    "service killed, offline": {"before": offline(), "half": end_service(signal.SIGKILL)},
    "service stopped": {"half": end_service(signal.SIGSTOP)},
    "log of limited size": {
        "before": offline(),
        "half": limit(10_000),
        "late": limit(resource.RLIM_INFINITY),
    },
}


def losses(found):
    """What of a fault's outcome is not as it must be, in lines."""
    every = list(range(1, STEPS + 1))
    lost = [] if found["rows"] == every else [f"metrics.jsonl has the rows {found['rows']}"]
    # W&B keeps one row a step; a log that is sent again sends all
    if sorted(set(found["recovered"])) != every:
        lost.append(f"W&B has the rows {found['recovered']}")
    if found["log"] > 1:  # a request that is waited for takes five seconds
        lost.append(f"a row took {found['log']:.1f} s")
    # twice the seconds that are set, and a new process of W&B in between, on a loaded machine
    if found["close"] > 40:
        lost.append(f"the end took {found['close']:.1f} s")
    return lost


# W&B takes a status of 200 for yes, and makes a deleted run again
UNTOLD = ("garbled", "cut off", "deleted")
UNHEALED = ("log disk full, offline",)  # until the training goes on


def main(folder, *names):
    server = wandb_server.Server()
    folder = Path(folder).resolve()
    os.environ |= server.login | WAITS  # W&B reads it once
    trials = []
    for number, name in enumerate(names):
        trial = Trial(folder / f"{number}, {name}", server)
        found = trial.run(**FAULTS[name]) | {
            "fault": name,
            "rows": trial.rows(),
            "sent": trial.sent(),
        }
        if name in ("gone", "gone at the start"):
            server.appear()
        server.fault = None
        if trial.disk:
            free(trial)
        if name in UNHEALED:
            with contextlib.redirect_stdout(None):
                trial.open(STEPS).close()
        if name in UNTOLD:
            # as the README says
            found["said"].append(f"wandb sync --include-online '{trial.folder}'/wandb/*run-*")
        if name == "temporary disk full":
            subprocess.run(["umount", str(trial.disk)], check=True)
        trials.append((trial, found))
    recover([found["said"] for _, found in trials], folder)
    print(json.dumps([found | {"recovered": trial.sent()} for trial, found in trials]))


if __name__ == "__main__":
    main(*sys.argv[1:])
