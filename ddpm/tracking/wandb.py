"""Weights & Biases, fed by a thread that opens it again after a failure and logs missing rows.

Facts about the client (wandb 0.31) that decide how: a full disk makes its log lose rows without an
error, so the log is read back with `wandb leet inspect` before it is called complete; `wandb sync`
uploads only part of a log with a torn end, so torn ends are cut first.
"""

import contextlib
import itertools
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

from ddpm.common import files as common_files
from ddpm.common import pixels
from ddpm.common.errors import one_line_with_type
from ddpm.tracking import files
from ddpm.tracking import rows as tracking_rows

# seconds for the server, unless WANDB_INIT_TIMEOUT or WANDB_FINISH_TIMEOUT is set
WAITS = {"init_timeout": 30, "finish_timeout": 60}
# seconds for W&B's own process after that, and for everything once a signal has come
LEAVE_SECONDS = 15
STUCK_SECONDS = 60  # for W&B to accept a row
AGAIN_SECONDS = 60  # between two attempts to open W&B after a failure
FLUSH_SECONDS = 0.1  # between two writes of W&B's log (its default is 15): what SIGKILL loses
HEADER = 7  # bytes at the start of W&B's log
BLOCK = 1 << 15  # bytes in a block of it
JPEG_ABOVE = 512  # pixels a side: encoding a larger PNG takes too long


class Wandb(files.Sink):
    """A run of Weights & Biases whose step is the training step; a thread does all work with it.

    After a failure the thread opens it again at once, then at most every minute, and at the end,
    and logs the rows of metrics.jsonl that W&B does not have.
    """

    name = "W&B"

    def __init__(self, folder, *, config, options, mode, run_id, known, last, summaries, notice):
        """Start run `run_id`, or continue it if `known`, with rows to `last`; `notice` prints."""
        import wandb  # here: it takes a second, and may fail only runs that use it

        if not common_files.is_writable(
            os.environ.get("WANDB_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        ):
            # or W&B prints its log to the console
            os.environ["WANDB_CACHE_DIR"] = str(folder.resolve() / "wandb")
        # W&B stores it as UTF-8
        sys.argv[:] = [word.encode(errors="backslashreplace").decode() for word in sys.argv]
        # error reports to W&B's makers would delay the end by 10 s a server
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
        self.pictures_failed = False
        self.again = 0.0  # when it may be opened again
        self.deadline = math.inf  # when the thread counts as stuck
        self.stopped = threading.Event()  # by the button on W&B's page
        self.leaving = threading.Event()
        self.ended = threading.Event()
        # or W&B, on a full disk, logs without end that it could not log
        logging.raiseExceptions = False
        self.calls = queue.SimpleQueue()
        self.news = deque()
        threading.Thread(target=self._serve, name="W&B", daemon=True).start()

    def write(self, step, row, images):
        self.calls.put((step, self._log, step, row, images))
        self.tick(step)

    def summary(self, key, value):
        self.summaries[key] = value
        # define_metric(summary="min") would make it a dict, which no sweep can read
        self.calls.put((None, lambda: self.run.summary.update({key: value})))

    def tick(self, step):
        while self.news:
            self.notice(self.news.popleft())
        if time.monotonic() > self.deadline:
            self.deadline = math.inf
            self._kill_service()  # the call that waits for it raises

    def close(self, exit_code, hurry):
        """Finish the run in the thread, waiting in bounded time; a second Ctrl-C ends the wait."""
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
                self._kill_service()  # it is stuck; a new one may work
        if not self.ended.is_set():
            self.leaving.set()
            self._kill_service()  # or the process could not end
            self.ended.wait(LEAVE_SECONDS)
            self.news.append(f"W&B did not finish in time; {self._upload()}")
        elif self.failed:
            self.news.append(f"W&B is missing rows that metrics.jsonl has; {self._upload()}")
        self.tick(None)

    def _ended_within(self, seconds, hurry):
        """Wait `seconds` for the thread, LEAVE_SECONDS once `hurry()`; True if it is done."""
        end = time.monotonic() + seconds
        hurried = False
        while not self.ended.wait(0.1) and time.monotonic() < end:
            if hurry() and not hurried:
                end = min(end, time.monotonic() + LEAVE_SECONDS)
                hurried = True
        return self.ended.is_set()

    # the methods below run in the thread

    def _serve(self):
        self._do(lambda: None)
        for step, act, *arguments in iter(self.calls.get, None):
            self._do(act, *arguments)
            self.reached = self.reached if step is None else step
        self.ended.set()

    def _do(self, act, *arguments):
        """Call `act` on the open run, opening it first; after a failure try once more."""
        for _ in range(2):
            try:
                if self.run is None:
                    if self.leaving.is_set() or time.monotonic() < self.again:
                        return None
                    self.again = time.monotonic() + AGAIN_SECONDS
                    opening = 3 * self.waits["init_timeout"] + STUCK_SECONDS
                    self.deadline = time.monotonic() + opening
                    self.run = self._open()
                    self.failed = False
                self.deadline = time.monotonic() + STUCK_SECONDS
                return act(*arguments)
            except Exception as error:
                self._fail(error)
            finally:
                self.deadline = math.inf

    def _fail(self, error):
        if not self.failed and not self.leaving.is_set():
            self.news.append(
                f"W&B is interrupted: {one_line_with_type(error)}; training continues, and "
                "metrics.jsonl has every row"
            )
        run = self.run
        self.run = None
        self.failed = True
        self._kill_service()
        with contextlib.suppress(Exception, SystemExit):
            run.finish()  # releases the console
        self._forget_service()

    def _open(self):
        """Open the run, online or else offline, log the rows that it does not have, return it."""
        mend_logs(self.folder, self.run_id)
        rows = self._rows()
        last = rows[-1]["step"] if rows else 0
        run = None
        logged = held_in_folder(self.folder, self.run_id, rows) if self.known else None
        known = self.known
        self.known = True
        self._start_service()
        if self.mode != "offline":
            try:
                if not self.wandb.login(prompt=False, verify=False):
                    raise self.wandb.errors.UsageError(
                        "not logged in; use `wandb login` or set WANDB_API_KEY"
                    )
                run, logged = (
                    self._continue_online(last)
                    if known
                    else (self._begin("online", id=self.run_id), None)
                )
            except Exception as error:
                if self.leaving.is_set():
                    raise
                self.news.append(
                    f"W&B is not online: {one_line_with_type(error)}; this run is logged offline"
                )
        if run is None and logged is None:
            run = self._begin("offline", id=self.run_id)
        elif run is None:
            logged = min(logged, last)
            run = self._begin("offline", resume_from=f"{self.run_id}?_step={logged}")
        run.define_metric("train/step")
        run.define_metric("*", step_metric="train/step")
        for row in rows:
            step = row.pop("step")
            if logged is None or step > logged:
                run.log({"train/step": step, **row}, step=step, commit=True)
        for key, value in list(self.summaries.items()):
            run.summary[key] = value
        self.news.append(
            f"W&B {self.wandb.__version__}, run {run.id}: "
            f"{run.settings.sync_dir if run.offline else run.url}"
        )
        return run

    def _rows(self):
        """The rows of metrics.jsonl up to the step that the thread has reached."""
        return tracking_rows.rows_of(self.folder / files.Rows.name, self.reached)

    def _begin(self, mode, **which):
        named = {key: self.options[key] or None for key in ("entity", "group", "tags")}
        settings = self.wandb.Settings(  # a new object each time: `init` changes it
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
            self._kill_service()  # or it says at the next try that the id is in use
            self._forget_service()
            if not self.leaving.is_set():
                self._start_service()
            raise

    def _continue_online(self, last):
        """(the run on the server, rewound to step `last`; its last step, None if new there)."""
        errors = self.wandb.errors
        # raised for a run that the server does not know
        with contextlib.suppress(errors.UsageError):
            run = self._begin("online", id=self.run_id, resume="must")
            if run.starting_step - 1 <= last:
                return run, run.starting_step - 1
            run.finish()
        # raised for an unknown run, or by a server that cannot rewind
        with contextlib.suppress(errors.CommError):
            return self._begin("online", resume_from=f"{self.run_id}?_step={last}"), last
        # the server ignores rows up to its last step
        run = self._begin("online", id=self.run_id, resume="allow")
        return run, run.starting_step - 1 if run.resumed else None

    def _log(self, step, row, images):
        try:
            pictures = {
                key: self._picture(image, f"{key} at step {step}") for key, image in images.items()
            }
            self.run.log({"train/step": step, **row, **pictures}, step=step, commit=True)
        except OSError as error:
            if not images or isinstance(error, ConnectionError):
                raise
            if not self.pictures_failed:
                self.news.append(
                    f"W&B is missing pictures from step {step} on: {one_line_with_type(error)}"
                )
            self.pictures_failed = True
            self.run.log({"train/step": step, **row}, step=step, commit=True)

    def _picture(self, image, caption):
        kind = "jpg" if max(image.shape[:2]) > JPEG_ABOVE else "png"
        return self.wandb.Image(
            pixels.flattened(pixels.picture(image)), caption=caption, file_type=kind
        )

    def _finish(self, exit_code):
        run = self.run
        try:
            # saved: a sweep starts the run again
            if exit_code == os.EX_TEMPFAIL and not self.stopped.is_set():
                run.mark_preempting()
            run.finish(exit_code=exit_code)
        except TimeoutError:
            self.news.append(f"W&B's server has not taken everything; {self._upload()}")
            return
        self._check_taken(run)
        if run.offline:
            rows = self._rows()
            if rows and held_in_folder(self.folder, run.id, rows) != rows[-1]["step"]:
                raise OSError("its log is missing rows")  # W&B does not report a full disk
            self.news.append(f"W&B's log is complete on this disk; {self._upload()}")

    def _upload(self):
        """The command that uploads the logs of all sessions of this run, in words."""
        mend_logs(self.folder, self.run_id)
        if not logs_in(self.folder, self.run_id):
            return "it has nothing to upload, and metrics.jsonl has every row"
        online = any(self.folder.glob(f"wandb/run-*-{self.run_id}"))
        which, prefix = ("--include-online ", "*") if online else ("", "offline-")
        path = f"{shlex.quote(str(self.folder))}/wandb/{prefix}run-*-{self.run_id}*"
        return f"to upload it: wandb sync {which}{path}"

    def _check_taken(self, run):
        """Raise OSError if the server refuses the run's rows, which W&B writes to a file only."""
        if run.offline:
            return
        if "fatal error" in Path(run.settings.log_internal).read_text(errors="replace"):
            raise OSError("the server refuses its rows")

    def _stop(self):
        """Stop the training as SIGTERM does, for the button on W&B's page; W&B also calls this
        after a fatal error, which stops nothing.
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

    # W&B's own process, which has no public name

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
    """Raise ValueError for an option or environment variable that W&B's client refuses."""
    if wandb_mode(options["mode"]) == "disabled":
        return
    try:
        import wandb
    except ImportError:  # a run says so and continues without
        return
    for key, (setting, variable) in SETTINGS.items():
        name = f"config.wandb.{key}" if options.get(key) else variable
        value = options.get(key) or os.environ.get(variable)
        if not value:
            continue
        try:
            wandb.Settings(**{setting: value})
        except Exception as error:  # pydantic's, or W&B's own
            why = error.errors()[0]["msg"] if hasattr(error, "errors") else error
            raise ValueError(
                f"{name} is {value!r}, which W&B refuses ({' '.join(str(why).split())}); give "
                "another, or --config.wandb.mode=disabled"
            ) from None


def wandb_mode(mode):
    """The mode of MODES to use: that of the option, or of WANDB_MODE where the option is `auto`."""
    mode = os.environ.get("WANDB_MODE", "auto") if mode == "auto" else mode
    mode = {"dryrun": "offline", "run": "online", "shared": "online"}.get(mode, mode)
    return mode if mode in MODES else "auto"


def logs_in(folder, run_id):
    """W&B's logs of a run in `folder`, online and offline, in the order of their sessions."""
    logs = folder.glob(f"wandb/*run-*-{run_id}*/run-{run_id}.wandb")
    return sorted(logs, key=lambda log: log.parent.name.split("run-", 1)[1])


def mend_logs(folder, run_id):
    """Cut torn ends off W&B's logs, as a full disk or a kill leaves them, and remove empty logs.

    The format is LevelDB's: chunks of 4 bytes of checksum, 2 of length and 1 of type, which is 1
    for a complete record and 2, 3, 4 for its first, middle and last part.
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
    """The step up to which W&B's logs in `folder` have all of `rows`; None if they have no row."""
    from wandb.util import get_core_path

    inspect = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file"]
    for log in reversed(logs_in(folder, run_id)):
        command = [*inspect, str(log)]
        done = subprocess.run(command, check=True, capture_output=True, timeout=60)
        held = None
        steps = set()
        for line in done.stdout.splitlines():
            record = json.loads(line)
            if "branch_point" in record.get("run", {}):
                held = int(record["run"]["branch_point"].get("value", 0))
            elif "history" in record:
                steps.add(int(record["history"]["step"]["num"]))
        if held is not None or steps:
            held = held or 0
            later = [row["step"] for row in rows if row["step"] > held]
            return max(itertools.takewhile(steps.__contains__, later), default=held)
    return None


def seconds_in_environment(name, default):
    try:
        return float(os.environ[name])
    except (KeyError, ValueError):
        return default


MODES = ("auto", "online", "offline", "disabled")

# option -> W&B's name for it, and the environment variable that counts where it is empty
SETTINGS = {
    "project": ("project", "WANDB_PROJECT"),
    "entity": ("entity", ""),
    "name": ("run_name", "WANDB_NAME"),
    "group": ("run_group", ""),
    "tags": ("run_tags", ""),
    "run_id": ("run_id", "WANDB_RUN_ID"),
}
