"""The interface between a run and its records: `log(step, scalars, images)`, `close()`.

A tracker hands every row to its sinks: metrics.jsonl (the record), training.log with the console or
a progress bar, and Weights & Biases. `scalars` are numbers by tracked key, `images` uint8 pictures
[h, w, c]. A step has one row: values logged for it are merged, and written when the step advances,
at `flush` and at `close`. A tracker without sinks does nothing.

A sink that fails is reported once and neither ends nor delays a training. Lines that a full disk
refuses wait in memory until it accepts them. A thread opens, feeds and closes W&B; after a failure
it opens W&B again and logs the missing rows from metrics.jsonl.
"""

import copy
import logging
import os
import secrets
import shlex
import subprocess
import sys
import zlib
from importlib.metadata import version
from pathlib import Path

from ddpm.common import errors
from ddpm.common.registry import quantity
from ddpm.tracking import files
from ddpm.tracking import rows as tracking_rows
from ddpm.tracking import wandb as tracking_wandb


class Tracker:
    """Merges the values of a step into one row and hands rows to the sinks.

    Call `flush` before a checkpoint is saved: then all rows up to it are written, and a resumed run
    removes later ones.
    """

    def __init__(self, sinks=(), last=None, state=None):
        self.sinks = list(sinks)
        self.last = last
        self.state = copy.deepcopy(state or {})
        self.step = None
        self.row = {}
        self.images = {}
        self.reported = set()

    def log(self, step: int, scalars: dict, images: dict | None = None) -> None:
        """Add scalars and pictures to the row of `step`, a step after the last written row."""
        if step != self.step:
            self.flush()
            assert self.last is None or step > self.last, (
                f"step {step} is logged after the row of step {self.last}"
            )
            self.step = step
        self.row |= {key: tracking_rows.plain(value) for key, value in scalars.items()}
        self.images |= images or {}

    def flush(self):
        """Write the current row, if there is one."""
        if self.step is None:
            return
        for key in [key for key, value in self.row.items() if value is None]:
            self.say_once(key, f"{key} is not finite at step {self.step}; it is stored as null")
        self._send("write", self.step, self.row, self.images)
        self.last = self.step
        self.forget(self.step)

    def forget(self, step):
        """Discard the current row if it is that of `step`: the step will run again."""
        if self.step == step:
            self.step = None
            self.row = {}
            self.images = {}

    def tick(self, step):
        """Move the progress bar."""
        self._send("tick", step)

    def progress(self, step, loss):
        """Show the progress of slow steps between two rows; nothing is recorded."""
        self._send("progress", step, loss)

    def say(self, text):
        """Print a line, also to training.log."""
        self._send("say", text)

    def keep(self, text):
        """Add a line to training.log only."""
        self._send("keep", text)

    def summary(self, key, value):
        """Set a number or string of the run as a whole, such as `best/val_loss_ema`."""
        value = tracking_rows.plain(value)
        self.state.setdefault("summary", {})[key] = value
        self._send("summary", key, value)

    def state_dict(self):
        """The id and summary of the W&B run, for a checkpoint; `open_tracker` takes them back."""
        return copy.deepcopy(self.state)

    def close(self, exit_code=0, hurry=lambda: False):
        """Write the current row and close all sinks in bounded time, in seconds once `hurry()`.

        W&B shows exit code 0 as finished, 75 as preempted and others as failed.
        """
        self.flush()
        WARNINGS.follow(None)
        self._send("close", exit_code, hurry)
        for sink in self.sinks:
            if sink.waiting:
                self.say_once(
                    (sink, "close"),
                    f"{sink.name} is missing its last {quantity(len(sink.waiting), 'line')}",
                )

    def _send(self, event, *arguments):
        for sink in self.sinks:
            behind = len(sink.waiting)
            try:
                getattr(sink, event)(*arguments)
            except Exception as error:
                self.say_once(
                    sink,
                    f"{sink.name} is incomplete from here: {errors.one_line_with_type(error)}; "
                    "training continues",
                )
            else:
                if behind and not sink.waiting:
                    self.reported.discard(sink)
                    self.say(f"{sink.name} is complete again")

    def say_once(self, cause, text):
        """Say a line unless one was said for the same `cause`, any hashable value."""
        if cause not in self.reported:
            self.reported.add(cause)
            self.say(text)


class Warnings(logging.Handler):
    """Sends warnings to stderr; once open, to the tracker, whose log gets earlier ones too."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.tracker = None
        self.earlier = []

    def attach(self):
        """Handle the warnings of `ddpm` here alone: absl, used by the commands, drops them."""
        logger = logging.getLogger("ddpm")
        logger.setLevel(logging.WARNING)
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record):
        text = record.getMessage()
        if self.tracker:
            self.tracker.say(text)
            return
        self.earlier.append(text)
        if os.environ.get("LOCAL_RANK", "0") == "0":  # one rank per machine prints
            print(text, file=sys.stderr, flush=True)

    def follow(self, tracker):
        """Send warnings to `tracker` from now on; to stderr if it is None."""
        self.tracker = tracker
        for text in self.earlier if tracker else ():
            tracker.keep(text)
        self.earlier = []


def commit():
    """The commit of the source, "0494cba", and a checksum of changed code; "" if unknown."""
    root = Path(__file__).parents[2]
    # GIT_DIR and the like may name another tree
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def git(*words):
        return subprocess.run(
            ["git", "--no-optional-locks", *words],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
            env=environment,
        ).stdout.strip()

    try:
        head = git("rev-parse", "--short=7", "HEAD") if git("ls-files", "ddpm") else ""
        if head and git("status", "--porcelain", "--", "ddpm", "configs"):
            code = b"".join(path.read_bytes() for path in sorted(root.glob("ddpm/**/*.py")))
            return f"{head} with changes {zlib.crc32(code):08x}"
        return head
    except (OSError, subprocess.SubprocessError):  # no git, or no answer
        return ""


def open_tracker(folder, *, config, wandb, start_step, total_steps, state=None, main=True, code=""):
    """Return the tracker of the run in `folder`; one without sinks unless `main`.

    Rows continue after `start_step`. `config` is a flat dict of plain values, `config.a.b`. `wandb`
    is a dict of mode (one of `MODES`), project, entity, name, group and tags; an empty value
    leaves W&B's default, or the folder's name. `state` is the `state_dict()` in the checkpoint of
    `start_step`, None for a new run. `code` is the commit of the code.
    """
    if not main:
        WARNINGS.follow(tracker := Tracker())
        return tracker
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = files.Rows(folder / "metrics.jsonl", None if state is None else start_step)
    tracker = Tracker(
        [files.Text(folder / "training.log", start_step, total_steps), rows], rows.last, state
    )
    origin = "from the start" if state is None else f"resumed from step {start_step}"
    WARNINGS.follow(tracker)
    at = f"; ddpm at commit {code}" if code else ""
    tracker.say(f"{shlex.join(sys.argv)} ({origin}; torch {version('torch')}{at})")
    mode = tracking_wandb.wandb_mode(wandb["mode"])
    if mode != "disabled":
        known = None if state is None else os.environ.get("WANDB_RUN_ID") or state.get("wandb_id")
        run_id = known or os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)
        try:
            tracker.sinks.append(
                tracking_wandb.Wandb(
                    folder,
                    config=config,
                    options=wandb,
                    mode=mode,
                    run_id=run_id,
                    known=known is not None,
                    last=-1 if rows.last is None else rows.last,
                    summaries=tracker.state.get("summary", {}),
                    notice=tracker.say,
                )
            )
            tracker.state["wandb_id"] = run_id
        except Exception as error:
            tracker.say(
                f"W&B is off in this run: {errors.one_line_with_type(error)}; metrics.jsonl has "
                "every row"
            )
    return tracker


WARNINGS = Warnings()
