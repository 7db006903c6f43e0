"""Weights & Biases, fed by a thread: opened again where it fails, completed from metrics.jsonl."""

import contextlib
import json
import logging
import math
import os
import queue
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from collections import deque
from pathlib import Path

from ddpm.common import errors as common_errors
from ddpm.common import files as common_files
from ddpm.common import pixels
from ddpm.tracking import files
from ddpm.tracking import rows as tracking_rows

# s for the server; WANDB_INIT_TIMEOUT and WANDB_FINISH_TIMEOUT go before
WAITS = {"init_timeout": 30, "finish_timeout": 60}
# for W&B's own process at the end, beyond that; and in all once a signal has come: a scheduler
# waits
LEAVE_SECONDS = 15
STUCK_SECONDS = 60  # for it to take a row
AGAIN_SECONDS = 60  # between two attempts to open a W&B that has failed
FLUSH_SECONDS = 0.1  # so often W&B's log is written (15 is its default), and so much SIGKILL costs
HEADER = 7
BLOCK = 1 << 15  # bytes, of W&B's log
JPEG_ABOVE = 512  # pixels a side, from where encoding a PNG holds up the training


class Wandb(files.Sink):
    """A run of Weights & Biases, whose step is the training step. A thread opens, feeds and ends
    it: nothing waits for W&B.

    Where it fails it is opened anew: at once, then every minute at most, and at the end. Rows that
    it lacks are written again each time it is opened, from metrics.jsonl: they died with a process
    before they were flushed or sent, or it was off.
    """

    name = "W&B"

    def __init__(self, folder, *, config, options, mode, run_id, known, last, summaries, notice):
        """Begin run `run_id`, or where it is `known` continue it, with the rows up to step
        `last`. `notice(text)` tells.
        """
        import wandb  # not above: it takes a second, and its failures concern only runs that use it

        if not common_files.is_writable(
            os.environ.get("WANDB_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        ):
            # or it logs all that it does on the console
            os.environ["WANDB_CACHE_DIR"] = str(folder.resolve() / "wandb")
        # which it keeps, as UTF-8
        sys.argv[:] = [word.encode(errors="backslashreplace").decode() for word in sys.argv]
        # what it tells its makers would hold up the end: 10 s a server
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        self.wandb = wandb
        self.folder = folder
        self.config = config
        self.options = options
        self.mode = mode
        self.run_id = run_id
        self.known = known
        self.reached = last
        self.summaries = dict(summaries)
        self.notice = notice
        self.waits = {
            key: seconds_in_environment(f"WANDB_{key.upper()}", seconds)
            for key, seconds in WAITS.items()
        }
        self.run = None
        self.service = None
        self.failed = False
        self.blind = False
        self.again = 0.0
        # when it may be opened anew, and when the thread is taken for stuck
        self.deadline = math.inf
        # the first on W&B's page, for good
        self.stopped, self.leaving, self.ended = (threading.Event() for _ in range(3))
        # or W&B, whose log's disk is full, logs that it could not log, for ever
        logging.raiseExceptions = False
        self.calls = queue.SimpleQueue()
        self.news = deque()
        threading.Thread(target=self._serve, name="W&B", daemon=True).start()

    def write(self, step, row, images):
        self.calls.put((step, self._log, step, row, images))
        self.tick(step)

    def summary(self, key, value):
        self.summaries[key] = value
        self.calls.put((None, self._summarize, key, value))

    def tick(self, step):
        while self.news:
            self.notice(self.news.popleft())
        if time.monotonic() > self.deadline:
            self.deadline = math.inf
            self._kill_service()  # which fails what waits for it

    def close(self, exit_code, hurry):
        """Hand over the end and wait for it, in bounded time; a second Ctrl-C ends the waiting."""
        self.calls.put((None, self._finish, exit_code))
        self.calls.put(None)
        finishing = self.waits["finish_timeout"] or math.inf
        opening = 3 * self.waits["init_timeout"]
        with contextlib.suppress(KeyboardInterrupt):
            for seconds in (
                finishing + LEAVE_SECONDS + (0 if self.run else opening),
                opening + finishing + LEAVE_SECONDS,
            ):
                self.again = 0.0
                if self._ended_within(seconds, hurry) or hurry():
                    break
                self._kill_service()  # it is stuck; a new one may do
        if not self.ended.is_set():
            self.leaving.set()
            self._kill_service()  # or the process could not end
            self.ended.wait(LEAVE_SECONDS)
            self.news.append(f"W&B is left behind, unfinished; {self._upload()}")
        elif self.failed:
            self.news.append(f"W&B lacks rows that metrics.jsonl has; {self._upload()}")
        self.tick(None)

    def _ended_within(self, seconds, hurry):
        """Wait for the thread so long, and LEAVE_SECONDS from when there is a hurry; True where
        it is done.
        """
        end = time.monotonic() + seconds
        hurried = False
        while not self.ended.wait(0.1) and time.monotonic() < end:
            if hurry() and not hurried:
                end = min(end, time.monotonic() + LEAVE_SECONDS)
                hurried = True
        return self.ended.is_set()

    # done by the thread

    def _serve(self):
        self._do(lambda: None)
        for step, act, *arguments in iter(self.calls.get, None):
            self._do(act, *arguments)
            self.reached = self.reached if step is None else step
        self.ended.set()

    def _do(self, act, *arguments):
        """Do something with the run, which is opened first where it is not open."""
        for _ in range(2):
            try:
                if self.run is None:
                    if self.leaving.is_set() or time.monotonic() < self.again:
                        return None
                    self.again = time.monotonic() + AGAIN_SECONDS
                    self.deadline = (
                        time.monotonic() + 3 * self.waits["init_timeout"] + STUCK_SECONDS
                    )
                    self.run = self._open()
                    self.failed = False
                self.deadline = time.monotonic() + STUCK_SECONDS
                return act(*arguments)
            except Exception as problem:
                self._fail(problem)
            finally:
                self.deadline = math.inf

    def _fail(self, problem):
        if not self.failed and not self.leaving.is_set():
            self.news.append(
                f"W&B is interrupted: {common_errors.one_line_with_type(problem)}; training goes "
                "on, and metrics.jsonl has every row"
            )
        run = self.run
        self.run = None
        self.failed = True
        self._kill_service()
        with contextlib.suppress(Exception, SystemExit):
            run.finish()  # lets go of the console
        self._forget_service()

    def _open(self):
        """Return the run, which holds the rows up to the step reached: online, or offline where
        no server can be had.
        """
        mend_logs(self.folder, self.run_id)
        rows = tracking_rows.rows_of(self.folder / files.Rows.name, self.reached)
        last = rows[-1]["step"] if rows else 0
        run = None
        held = held_in_folder(self.folder, self.run_id, rows) if self.known else None
        known = self.known
        self.known = True
        self._start_service()
        if self.mode != "offline":
            try:
                if not self.wandb.login(prompt=False, verify=False):
                    raise self.wandb.errors.UsageError(
                        "not logged in; use `wandb login` or set WANDB_API_KEY"
                    )
                run, held = (
                    self._continue_online(last)
                    if known
                    else (self._begin("online", id=self.run_id), None)
                )
            except Exception as problem:
                if self.leaving.is_set():
                    raise
                self.news.append(
                    f"W&B is not online: {common_errors.one_line_with_type(problem)}; this run is "
                    "logged offline"
                )
        if run is None:
            held = None if held is None else min(held, last)
            run = self._begin(
                "offline",
                **(
                    {"id": self.run_id}
                    if held is None
                    else {"resume_from": f"{self.run_id}?_step={held}"}
                ),
            )
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")
        for row in rows:
            if held is None or row["step"] > held:
                run.log(
                    {"train/step": row["step"]}
                    | {key: value for key, value in row.items() if key != "step"},
                    step=row["step"],
                    commit=True,
                )
        for key, value in list(self.summaries.items()):
            run.summary[key] = value
        self.news.append(
            f"W&B {self.wandb.__version__}, run {run.id}: "
            f"{run.settings.sync_dir if run.offline else run.url}"
        )
        return run

    def _begin(self, mode, **which):
        named = {key: self.options[key] or None for key in ("entity", "group", "tags", "notes")}
        settings = self.wandb.Settings(  # made anew each time: `init` writes into it
            silent=True,
            reinit="create_new",
            finish_timeout_raises=True,
            **self.waits,
            stop_fn=lambda: self._stop(),
            stop_on_fatal_error=True,
            x_transaction_log_flush_interval=FLUSH_SECONDS,
        )
        try:
            return self.wandb.init(
                dir=self.folder.resolve(),
                mode=mode,
                config=self.config,
                settings=settings,
                **named,
                **which,
                name=self.options["name"] or os.environ.get("WANDB_NAME") or self.folder.name,
                project=self.options["project"] or os.environ.get("WANDB_PROJECT") or "ddpm",
            )
        except Exception:
            self._kill_service()  # or it calls the id in use when it is tried again
            self._forget_service()
            if not self.leaving.is_set():
                self._start_service()
            raise

    def _continue_online(self, last):
        """Return the run on the server, cut after step `last`, and the last step that it holds
        (None: it is new there).
        """
        errors = self.wandb.errors
        # raised where the server does not know the run
        with contextlib.suppress(errors.UsageError):
            run = self._begin("online", id=self.run_id, resume="must")
            if run.starting_step - 1 <= last:
                return run, run.starting_step - 1
            run.finish()
        # raised where it does not know the run or cannot rewind
        with contextlib.suppress(errors.CommError):
            return self._begin("online", resume_from=f"{self.run_id}?_step={last}"), last
        # W&B ignores rows up to those that it has
        run = self._begin("online", id=self.run_id, resume="allow")
        return run, run.starting_step - 1 if run.resumed else None

    def _log(self, step, row, images):
        try:
            pictures = {
                key: self._picture(image, f"{key} at step {step}") for key, image in images.items()
            }
            self.run.log({"train/step": step, **row, **pictures}, step=step, commit=True)
        except OSError as problem:
            if not images or isinstance(problem, ConnectionError):
                raise
            if not self.blind:
                self.news.append(
                    f"W&B lacks pictures, from step {step} on: "
                    f"{common_errors.one_line_with_type(problem)}"
                )
            self.blind = True
            self.run.log({"train/step": step, **row}, step=step, commit=True)

    def _picture(self, image, caption):
        kind = "jpg" if max(image.shape[:2]) > JPEG_ABOVE else "png"
        return self.wandb.Image(
            pixels.flattened(pixels.picture(image)), caption=caption, file_type=kind
        )

    def _summarize(self, key, value):
        # not define_metric(summary="min"), which makes it a dict that no sweep can read
        self.run.summary[key] = value

    def _finish(self, exit_code):
        run = self.run
        try:
            # 75: saved, and a sweep hands the run out again
            if exit_code == os.EX_TEMPFAIL and not self.stopped.is_set():
                run.mark_preempting()
            run.finish(exit_code=exit_code)
        except TimeoutError:
            self.news.append(f"W&B's server has not taken everything; {self._upload()}")
            return
        self._check_taken(run)
        if run.offline:
            rows = tracking_rows.rows_of(self.folder / files.Rows.name, self.reached)
            if rows and held_in_folder(self.folder, run.id, rows) != rows[-1]["step"]:
                raise OSError("its log lacks rows")  # of a full disk W&B says nothing
            self.news.append(f"W&B's log is complete on this disk; {self._upload()}")

    def _upload(self):
        """What brings the server all that the sessions of this run have logged, if there is
        anything.
        """
        mend_logs(self.folder, self.run_id)
        if not logs_in(self.folder, self.run_id):
            return "it has nothing to upload, and metrics.jsonl has every row"
        online = any(self.folder.glob(f"wandb/run-*-{self.run_id}"))
        which, prefix = ("--include-online ", "*") if online else ("", "offline-")
        path = f"{shlex.quote(str(self.folder))}/wandb/{prefix}run-*-{self.run_id}*"
        return f"to upload it: wandb sync {which}{path}"

    def _check_taken(self, run):
        """Raise OSError where the server refuses what the run sends: W&B goes on logging, and
        writes that into a file alone.
        """
        said = (
            Path(run.settings.log_internal).read_text(errors="replace") if not run.offline else ""
        )
        if "fatal error" in said:
            raise OSError("the server refuses its rows")

    def _stop(self):
        """The button of W&B's page, or a fatal error: the run is interrupted, once, where it can
        save, as by SIGTERM.
        """
        try:
            self._check_taken(self.run)
        except OSError:
            self.calls.put((None, self._check_taken, self.run))
            return
        self.stopped.set()
        interrupt_main(
            signal.SIGTERM if callable(signal.getsignal(signal.SIGTERM)) else signal.SIGINT
        )

    # W&B's own process, for which it has no public name

    def _start_service(self):
        self.wandb.setup(self.wandb.Settings(silent=True, mode="online"))
        with contextlib.suppress(AttributeError):
            self.service = self.wandb.setup().assert_service()._proc._process

    def _kill_service(self):
        if self.service:
            self.service.kill()

    def _forget_service(self):
        with contextlib.suppress(Exception, SystemExit):
            self.wandb.teardown()


def check(options):
    """Raise a ValueError for what W&B's own client refuses of the options of `open_tracker` and
    of its environment.
    """
    if wandb_mode(options["mode"]) == "disabled":
        return
    try:
        import wandb
    except ImportError:  # which a run tells and does without
        return
    given = {
        f"config.wandb.{key}": (setting, options[key])
        for key, setting in SETTINGS.items()
        if options[key]
    }
    given |= {
        name: (setting, os.environ[name])
        for name, (setting, key) in ENVIRONMENT.items()
        if os.environ.get(name) and not options.get(key)
    }
    for name, (setting, value) in given.items():
        try:
            wandb.Settings(**{setting: value})
        except Exception as error:  # pydantic's, or W&B's own
            said = error.errors()[0]["msg"] if hasattr(error, "errors") else error
            raise ValueError(
                f"{name} is {value!r}, which W&B refuses ({' '.join(str(said).split())}); give "
                "another, or --config.wandb.mode=disabled"
            ) from None


def wandb_mode(given):
    """The mode that was asked for; `auto` leaves it to WANDB_MODE."""
    named = os.environ.get("WANDB_MODE", "auto") if given == "auto" else given
    named = {"dryrun": "offline", "run": "online", "shared": "online"}.get(named, named)
    return named if named in MODES else "auto"


def logs_in(folder, run_id):
    """W&B's own logs of a run in `folder`, online and offline, in the order of their sessions."""
    logs = folder.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb")
    return sorted(logs, key=lambda log: log.parent.name.split("run-", 1)[1])


def mend_logs(folder, run_id):
    """Cut the torn ends that a full disk or a kill left of W&B's logs, and remove empty logs:
    `wandb sync` stops there.

    The format is LevelDB's: chunks with 4 bytes of checksum, 2 of length and a type: 1 is a whole
    record, 2, 3, 4 its parts.
    """
    for log in logs_in(folder, run_id):
        content = log.read_bytes()
        at = end = HEADER
        while at + 7 <= len(content):
            if BLOCK - at % BLOCK < 7:  # filled with zeros
                at += BLOCK - at % BLOCK
                continue
            length, kind = struct.unpack_from("<HB", content, at + 4)
            at += 7 + length
            if at > len(content) or kind not in (1, 2, 3, 4):
                break
            end = at if kind in (1, 4) else end
        if end == HEADER:
            shutil.rmtree(log.parent, ignore_errors=True)
        elif end < len(content):
            os.truncate(log, end)


def held_in_folder(folder, run_id, rows):
    """The step up to which W&B's own logs in `folder` hold all of `rows`, None where they hold
    no row of the run.
    """
    from wandb.util import get_core_path

    for log in reversed(logs_in(folder, run_id)):
        command = [
            get_core_path(),
            "leet",
            "inspect",
            "--no-observability",
            "--json",
            "--run-file",
            str(log),
        ]
        held = None
        steps = set()
        for line in subprocess.run(
            command, check=True, capture_output=True, timeout=60
        ).stdout.splitlines():
            record = json.loads(line)
            if "branch_point" in record.get("run", {}):
                held = int(record["run"]["branch_point"].get("value", 0))
            elif "history" in record:
                steps.add(int(record["history"]["step"]["num"]))
        if held is not None or steps:
            held = held or 0
            for step in (row["step"] for row in rows if row["step"] > held):
                if step not in steps:
                    break
                held = step
            return held
    return None


def seconds_in_environment(name, default):
    try:
        return float(os.environ[name])
    except (KeyError, ValueError):
        return default


MODES = ("auto", "online", "offline", "disabled")

SETTINGS = {  # W&B's names for options
    "project": "project",
    "entity": "entity",
    "name": "run_name",
    "group": "run_group",
    "tags": "run_tags",
    "notes": "run_notes",
}
ENVIRONMENT = {  # its setting, and the option in whose place it stands
    "WANDB_PROJECT": ("project", "project"),
    "WANDB_NAME": ("run_name", "name"),
    "WANDB_RUN_ID": ("run_id", ""),
}
