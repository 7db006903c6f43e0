"""One waist between what a run measures and where it is kept: `log(step, scalars, images)`,
`close()`.

Right of it stand three sinks that hear every row: metrics.jsonl (the record), Weights & Biases (its
copy, completed at every start) and what a person reads (training.log; a progress bar on a terminal,
plain lines elsewhere). Scalars are numbers under their reported names; images are uint8 pictures
[h, w, c]. A step has one row: what is logged for it is merged, and written when the step advances,
at `flush` and at `close`. A tracker without sinks is silent.

Whatever goes wrong in a sink is said once and never ends a training, nor holds it up. Lines that
the disk does not take wait in memory and are written when it does again; a training that cannot
save its checkpoints either stops there. W&B is opened, fed and ended by a thread, and where it
fails, opened anew and completed from metrics.jsonl.
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
from ddpm.tracking import files
from ddpm.tracking import rows as tracking_rows
from ddpm.tracking import wandb as tracking_wandb


class Tracker:
    """Gathers what is measured at one step into a row and hands it to the sinks.

    `flush` before saving a checkpoint: then no row up to the checkpoint can be lost, and later ones
    are cut on resume.
    """

    def __init__(self, sinks=(), last=None, state=None):
        self.sinks = list(sinks)
        self.last = last
        self.state = copy.deepcopy(state or {})
        self.step = None
        self.row = {}
        self.images = {}
        self.said = set()

    def log(self, step: int, scalars: dict, images: dict | None = None) -> None:
        """Add numbers and pictures to the row of `step`, which lies after the last row written."""
        if step != self.step:
            self.flush()
            assert self.last is None or step > self.last, (
                f"step {step} is logged after the row of step {self.last}"
            )
            self.step = step
        self.row |= {key: tracking_rows.plain(value) for key, value in scalars.items()}
        self.images |= images or {}

    def flush(self):
        """Write the row that is being gathered, if there is one."""
        if self.step is None:
            return
        for key in [key for key, value in self.row.items() if value is None]:
            self.say_once(key, f"{key} is not finite at step {self.step}; it is kept as null")
        self._tell("write", self.step, self.row, self.images)
        self.last = self.step
        self.step = None
        self.row = {}
        self.images = {}

    def forget(self, step):
        """Drop the row of a step, if it is being gathered: that step will be measured anew."""
        if self.step == step:
            self.step = None
            self.row = {}
            self.images = {}

    def tick(self, step):
        """Move the progress bar."""
        self._tell("tick", step)

    def progress(self, step, loss):
        """Show that the training goes on, between two rows; nothing is recorded."""
        self._tell("progress", step, loss)

    def say(self, text):
        """Print a line, and keep it in training.log."""
        self._tell("say", text)

    def keep(self, text):
        """Keep a line in training.log that the console has had already."""
        self._tell("keep", text)

    def summary(self, key, value):
        """Set one number or word that stands for the run, such as `best/val_loss_ema`."""
        self.state.setdefault("summary", {})[key] = tracking_rows.plain(value)
        self._tell("summary", key, tracking_rows.plain(value))

    def state_dict(self):
        """What a checkpoint keeps for `open_tracker`: the id and the summary of the W&B run."""
        return copy.deepcopy(self.state)

    def close(self, exit_code=0, hurry=lambda: False):
        """Write what is left and end the sinks, in bounded time, within seconds from when `hurry()`
        is true.

        Code 75 marks the run preempted, others but 0 as failed.
        """
        self.flush()
        WARNINGS.follow(None)
        self._tell("close", exit_code, hurry)
        for sink in self.sinks:
            if sink.waiting:
                self.say_once(
                    (sink, "close"), f"{sink.name} lacks its last {len(sink.waiting)} lines"
                )

    def _tell(self, event, *arguments):
        for sink in self.sinks:
            behind = len(sink.waiting)
            try:
                getattr(sink, event)(*arguments)
            except Exception as problem:
                self.say_once(
                    sink,
                    f"{sink.name} is incomplete from here: {errors.one_line_with_type(problem)}; "
                    "training goes on",
                )
            else:
                if behind and not sink.waiting:
                    self.said.discard(sink)
                    self.say(f"{sink.name} is whole again")

    def say_once(self, cause, text):
        """Say what has a cause that nothing was said of yet."""
        if cause not in self.said:
            self.said.add(cause)
            self.say(text)


class Warnings(logging.Handler):
    """Warnings of this package, as lines on stderr and, from when a tracker is open, as what it
    says: also those until then.
    """

    def __init__(self):
        super().__init__(logging.WARNING)
        self.tracker = None
        self.earlier = []

    def attach(self):
        """Take the warnings, which no other handler gets then; absl, which the commands use,
        lets no others through.
        """
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
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the first rank of a machine tells
            print(text, file=sys.stderr, flush=True)

    def follow(self, tracker):
        """Let a tracker say them from now on; None ends that."""
        self.tracker = tracker
        for text in self.earlier if tracker else ():
            tracker.keep(text)
        self.earlier = []


def commit():
    """The commit of this package's tree, wherever the command is given, such as "0494cba"; "" where
    it is not known.

    Where files were changed since, with a checksum of the package's code, which tells two such
    trees apart.
    """
    root = Path(__file__).parents[2]
    # of the command's own tree
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
    except (OSError, subprocess.SubprocessError):  # there is no git, or it does not answer
        return ""


def open_tracker(folder, *, config, wandb, start_step, total_steps, state=None, main=True, code=""):
    """Return the tracker of the run in `folder`, whose rows continue after `start_step`; a silent
    one where not `main`.

    `config` is a flat dict of plain values under a sweep's names. `wandb` is a dict of mode (one of
    `MODES`), project, entity, name, group, tags and notes, where empty leaves W&B's default, or the
    folder's name. `state` is the `state_dict()` in the checkpoint of `start_step`, None for a run
    from the start. `code` is the commit of the code.
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
        except Exception as problem:
            tracker.say(
                f"W&B is off in this run: {errors.one_line_with_type(problem)}; metrics.jsonl has "
                "every row"
            )
    return tracker


WARNINGS = Warnings()
