"""One waist between what a run measures and where it is kept: `log(step, scalars, images)`, `close()`.

Right of it stand three sinks that hear every row: metrics.jsonl (the record), Weights & Biases (its copy, completed at
every start) and what a person reads (training.log; a progress bar on a terminal, plain lines elsewhere). Scalars are
numbers under their reported names; images are uint8 pictures [h, w, c]. A step has one row: what is logged for it is
merged, and written when the step advances, at `flush` and at `close`. A tracker without sinks is silent. Whatever goes
wrong in a sink is said once and never ends a training.
"""

import contextlib
import copy
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from ddpm import images as pixels
from ddpm.files import written_beside

INIT_SECONDS, FINISH_SECONDS = 30, 60  # for the server; WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT go before
FLUSH_SECONDS = 0.1  # so often W&B's log is written (15 is its default), and so much SIGKILL costs
JPEG_ABOVE = 512  # pixels a side, from where encoding a PNG holds up the training


class Tracker:
    """Gathers what is measured at one step into a row and hands it to the sinks.

    `flush` before saving a checkpoint: then no row up to the checkpoint can be lost, and later ones are cut on resume.
    """

    def __init__(self, sinks=(), last=None, state=None):
        self.sinks, self.last, self.state = list(sinks), last, copy.deepcopy(state or {})
        self.step, self.row, self.images = None, {}, {}
        self.said = set()

    def log(self, step, scalars, images=None):
        """Add numbers and pictures to the row of `step`, which lies after the last row written."""
        if step != self.step:
            self.flush()
            assert self.last is None or step > self.last, f"step {step} is logged after the row of step {self.last}"
            self.step = step
        self.row |= {key: plain(value) for key, value in scalars.items()}
        self.images |= images or {}

    def flush(self):
        """Write the row that is being gathered, if there is one."""
        if self.step is None:
            return
        for key in [key for key, value in self.row.items() if value is None]:
            self._say_once(key, f"{key} is not finite at step {self.step}; it is kept as null")
        self._tell("write", self.step, self.row, self.images)
        self.last, self.step, self.row, self.images = self.step, None, {}, {}

    def forget(self, step):
        """Drop the row of a step, if it is being gathered: that step will be measured anew."""
        if self.step == step:
            self.step, self.row, self.images = None, {}, {}

    def tick(self, step):
        """Move the progress bar."""
        self._tell("tick", step)

    def say(self, text):
        """Print a line, and keep it in training.log."""
        self._tell("say", text)

    def summary(self, key, value):
        """Set one number that stands for the run, such as `best/fid`."""
        self.state.setdefault("summary", {})[key] = plain(value)
        self._tell("summary", key, plain(value))

    def state_dict(self):
        """What a checkpoint keeps for `open_tracker`: the id and the summary of the W&B run."""
        return copy.deepcopy(self.state)

    def close(self, exit_code=0):
        """Write what is left and end the sinks, in bounded time; code 75 marks the run preempted, others but 0 as failed."""
        self.flush()
        self._tell("close", exit_code)

    def _tell(self, event, *arguments):
        for sink in self.sinks:
            try:
                getattr(sink, event)(*arguments)
            except Exception as problem:
                self._say_once(sink, f"{sink.name} is incomplete from here: {in_short(problem)}; training goes on")

    def _say_once(self, cause, text):
        if cause not in self.said:
            self.said.add(cause)
            self.say(text)


class Sink:
    """Answers those events that concern it."""

    def nothing(self, *arguments):
        """Other events pass."""

    write = tick = say = summary = close = nothing


class Rows(Sink):
    """metrics.jsonl: one strict JSON object a line, `{"step": 100, "train/loss": ...}`."""

    name = "metrics.jsonl"

    def __init__(self, path, start_step):
        """Keep the rows up to `start_step`, cut later ones and torn lines; keep none if it is None."""
        self.path = path
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        rows = [] if start_step is None else filter(None, map(whole_row, lines))
        self.kept = [row for row in rows if row["step"] <= start_step]
        if len(self.kept) < len(lines):
            with written_beside(path) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in self.kept))

    def write(self, step, row, images):
        line = (json.dumps({"step": step, **row}, allow_nan=False) + "\n").encode()
        with open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(line) < len(line):  # the disk is full: the next row must not join half a line
                file.truncate(size)
                raise OSError("no space left on device")


class Wandb(Sink):
    """A run of Weights & Biases, whose step is the training step; `stopped` is set where it was stopped there, for good."""

    name = "W&B"

    def __init__(self, image, run, folder, notice, stopped):
        self.image, self.run, self.folder, self.notice, self.stopped = image, run, folder, notice, stopped
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")

    def write(self, step, row, images):
        pictures = {key: self.picture(image, f"{key} at step {step}") for key, image in images.items()}
        self.run.log({"train/step": step, **row, **pictures}, step=step, commit=True)

    def picture(self, image, caption):
        kind = "jpg" if max(image.shape[:2]) > JPEG_ABOVE else "png"
        return self.image(pixels.flattened(pixels.picture(image)), caption=caption, file_type=kind)

    def summary(self, key, value):
        self.run.summary[key] = value  # not define_metric(summary="min"), which makes it a dict that no sweep can read

    def close(self, exit_code):
        logs = f"{self.folder}/wandb/offline-run-*-{self.run.id}*" if self.run.offline else ""
        try:
            if exit_code == os.EX_TEMPFAIL and not self.stopped.is_set():  # 75: saved, and a sweep hands the run out again
                self.run.mark_preempting()
            self.run.finish(exit_code=exit_code)
        except TimeoutError:
            logs = f"--include-online {self.run.settings.sync_dir}"
        if logs:
            self.notice(f"W&B's log is complete on this disk; to upload it: wandb sync {logs}")


class Text(Sink):
    """training.log, and its lines on the console; on a terminal a progress bar stands for all but the evaluations."""

    name = "training.log"

    def __init__(self, path, start_step, total_steps):
        self.path, self.start_step, self.total_steps = path, start_step, total_steps
        self.began = time.monotonic()
        self.bar = tqdm(total=total_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty())

    def write(self, step, row, images):
        values = {key: math.nan if value is None else value for key, value in row.items() if not isinstance(value, str)}
        known = [form.format(values[key]) for key, form in SHOWN.items() if key in values]
        scores = [f"{key} {value:.4g}" for key, value in values.items() if key.startswith(("val/", "eval/"))]
        left = (self.total_steps - step) / max(step - self.start_step, 1) * (time.monotonic() - self.began)
        line = "  ".join([f"step {step}/{self.total_steps} ({step / self.total_steps:.1%})", *known, *scores,
                          *(f"{key}: {value}" for key, value in row.items() if isinstance(value, str)),
                          *(f"{key} drawn" for key in images), f"eta {tqdm.format_interval(left)}"])
        self.tick(step)
        if self.bar.disable or any(key.startswith("eval/") for key in row):
            self.say(line)
        else:
            self.bar.set_postfix_str(", ".join([*known[:1], *scores]))
            self.keep(line)

    def tick(self, step):
        self.bar.update(step - self.bar.n)

    def say(self, text):
        try:
            tqdm.write(text)  # above the bar, if there is one
            sys.stdout.flush()
        finally:
            self.keep(text)

    def keep(self, text):
        with open(self.path, "a") as file:
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def close(self, exit_code):
        self.bar.close()


def open_tracker(folder, *, config, wandb, start_step, total_steps, state=None, main=True):
    """Return the tracker of the run in `folder`, whose rows continue after `start_step`; a silent one where not `main`.

    `config` is a flat dict of plain values under a sweep's names. `wandb` is a dict of mode (one of `MODES`), project,
    entity, name, group, tags and notes, where empty leaves W&B's default, or the folder's name. `state` is the
    `state_dict()` in the checkpoint of `start_step`, None for a run from the start.
    """
    if not main:
        return Tracker()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rows = Rows(folder / "metrics.jsonl", None if state is None else start_step)
    last = rows.kept[-1]["step"] if rows.kept else None
    tracker = Tracker([Text(folder / "training.log", start_step, total_steps), rows], last, state)
    origin = "from the start" if state is None else f"resumed from step {start_step}"
    tracker.say(f"{shlex.join(sys.argv)} ({origin}; torch {version('torch')})")
    mode = wandb_mode(wandb["mode"])
    if mode != "disabled":
        try:
            run_id = None if state is None else os.environ.get("WANDB_RUN_ID") or state.get("wandb_id")
            tracker.sinks.append(open_wandb(tracker, folder, config, wandb, mode, run_id, rows.kept))
        except Exception as problem:
            tracker.say(f"W&B is off in this run: {in_short(problem)}; metrics.jsonl has every row")
    return tracker


def wandb_mode(given):
    """The mode that was asked for; `auto` leaves it to WANDB_MODE."""
    named = os.environ.get("WANDB_MODE", "auto") if given == "auto" else given
    named = {"dryrun": "offline", "run": "online", "shared": "online"}.get(named, named)
    return named if named in MODES else "auto"


def open_wandb(tracker, folder, config, options, mode, run_id, rows):
    """Return the sink of a new run, or of `run_id` rewound to the last of `rows`; offline where no server can be had.

    Rows that W&B lacks are written again: they died with the process before they were flushed or sent, or it was off.
    """
    import wandb  # not above: it takes a second, and its failures concern only runs that use it

    quiet = wandb.Settings(silent=True, mode="online")
    waits = {"init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
    waits = {key: seconds for key, seconds in waits.items() if f"WANDB_{key.upper()}" not in os.environ}
    named = {key: options[key] or None for key in ("entity", "group", "tags", "notes")}
    named["project"] = options["project"] or os.environ.get("WANDB_PROJECT") or "ddpm"

    stopped = threading.Event()

    def stop():
        """The button of W&B's page: the run is interrupted, once, where it can save, as by SIGTERM."""
        stopped.set()
        interrupt_main(signal.SIGTERM if callable(signal.getsignal(signal.SIGTERM)) else signal.SIGINT)

    def begin(mode, **which):
        settings = wandb.Settings(  # made anew each time: `init` writes into it
            silent=True, reinit="create_new", finish_timeout_raises=True, **waits, stop_fn=stop,
            x_transaction_log_flush_interval=FLUSH_SECONDS)
        name = options["name"] or os.environ.get("WANDB_NAME") or folder.name
        try:
            return wandb.init(dir=folder.resolve(), mode=mode, config=config, name=name, settings=settings, **named, **which)
        except Exception:
            wandb.teardown()  # or W&B's service calls the id in use when it is tried again
            wandb.setup(quiet)
            raise

    last = rows[-1]["step"] if rows else 0
    run, held = None, held_in_folder(folder, run_id) if run_id else None
    if mode != "offline":
        try:
            wandb.setup(quiet)
            logged_in = wandb.login(prompt=False, verify=False)
            if mode == "online" and not logged_in:
                raise wandb.errors.UsageError("not logged in; use `wandb login` or set WANDB_API_KEY")
            if logged_in:
                run, held = continue_online(begin, run_id, last) if run_id else (begin("online"), None)
        except Exception as problem:
            tracker.say(f"W&B is not online: {in_short(problem)}; this run is logged offline")
    if run is None:
        held = None if held is None else min(held, last)
        run = begin("offline", **({"id": run_id} if held is None else {"resume_from": f"{run_id}?_step={held}"}))
    sink = Wandb(wandb.Image, run, folder, tracker.say, stopped)
    for row in rows:
        if held is None or row["step"] > held:
            sink.write(row["step"], {key: value for key, value in row.items() if key != "step"}, {})
    for key, value in tracker.state.get("summary", {}).items():
        sink.summary(key, value)
    tracker.state["wandb_id"] = run.id
    tracker.say(f"W&B {wandb.__version__}, run {run.id}: {run.settings.sync_dir if run.offline else run.url}")
    return sink


def continue_online(begin, run_id, last):
    """Return the run on the server, cut after step `last`, and the last step that it holds (None: it is new there)."""
    from wandb.errors import CommError, UsageError

    with contextlib.suppress(UsageError):  # raised where the server does not know the run
        run = begin("online", id=run_id, resume="must")
        if run.starting_step - 1 <= last:
            return run, run.starting_step - 1
        run.finish()
    with contextlib.suppress(CommError):  # raised where it does not know the run or cannot rewind
        return begin("online", resume_from=f"{run_id}?_step={last}"), last
    run = begin("online", id=run_id, resume="allow")  # W&B ignores rows up to those that it has
    return run, run.starting_step - 1 if run.resumed else None


def held_in_folder(folder, run_id):
    """The last step of the run that W&B's own logs in `folder` hold, None where there is none."""
    logs = folder.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb")
    for log in sorted(logs, key=lambda log: log.parent.name.split("run-", 1)[1], reverse=True):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
        held = None
        for line in subprocess.run(command, check=True, capture_output=True).stdout.splitlines():
            record = json.loads(line)
            if "branch_point" in record.get("run", {}):
                held = int(record["run"]["branch_point"].get("value", 0))
            elif "history" in record:
                held = record["history"]["step"]["num"]
        if held is not None:
            return held
    return None


def plain(value):
    """A word as it is, or the number in a Python, numpy or torch scalar; None where it is not finite, which JSON cannot say."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, str) or math.isfinite(value) else None


def whole_row(line):
    """The row in a line of metrics.jsonl, None in a line that is torn, or holds no row."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line) if line.endswith(b"\n") else None
        return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def in_short(problem):
    """An exception in one line."""
    return " ".join([f"{type(problem).__name__}:", *str(problem).strip().splitlines()[:1]])


MODES = ("auto", "online", "offline", "disabled")

SHOWN = {  # in training.log, beside all of val/ and eval/
    "train/loss": "loss {:.4f}",
    "speed/images_per_second": "{:.1f} images/s",
    "memory/vram_peak_gib": "vram {:.2f} GiB",
    "memory/rss_gib": "rss {:.2f} GiB",
    "progress/epoch": "epoch {:.2f}",
    "progress/epoch_seconds": "{:.1f} s/epoch",
}
