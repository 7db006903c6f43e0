"""The sinks that write files: metrics.jsonl, and training.log with the progress bar."""

import errno
import json
import math
import os
import sys
import time
from collections import deque

from tqdm import tqdm

from ddpm.common.errors import one_line_with_type
from ddpm.common.files import atomic_write
from ddpm.tracking import rows


class Sink:
    """Receives the events of a tracker; a subclass defines those that it handles."""

    waiting = ()  # lines that are not written yet

    def nothing(self, *arguments):
        """Ignore an event."""

    write = tick = progress = say = keep = summary = close = nothing


class Lines:
    """A file that grows by complete lines; lines that a full disk refuses wait, in order."""

    def __init__(self, path):
        self.path = path
        self.waiting = deque()

    def add(self, line):
        self.waiting.append(f"{line}\n".encode(errors="backslashreplace"))
        self.write()

    def write(self):
        """Write the waiting lines; raises OSError where the disk is full."""
        with open(self.path, "ab", buffering=0) as file:
            while self.waiting:
                size = file.tell()
                # or the next line would continue half of this one
                if file.write(self.waiting[0]) < len(self.waiting[0]):
                    file.truncate(size)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.waiting.popleft()


class Rows(Sink):
    """metrics.jsonl: one strict JSON object a line, `{"step": 100, "train/loss": ...}`."""

    name = "metrics.jsonl"

    def __init__(self, path, start_step):
        """Remove rows after `start_step` and invalid lines; all rows if it is None."""
        self.lines = Lines(path)
        self.waiting = self.lines.waiting
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        valid = [] if start_step is None else rows.rows_of(path, start_step)
        self.last = valid[-1]["step"] if valid else None
        if len(valid) < len(lines):
            with atomic_write(path) as part:
                part.write_text("".join(json.dumps(row) + "\n" for row in valid))

    def write(self, step, row, images):
        self.lines.add(json.dumps({"step": step, **row}, allow_nan=False))

    def close(self, exit_code, hurry):
        self.lines.write()


class Text(Sink):
    """training.log and stdout; on a terminal, a progress bar in place of rows without scores."""

    name = "training.log"

    def __init__(self, path, start_step, total_steps):
        self.lines = Lines(path)
        self.start_step = start_step
        self.total_steps = total_steps
        self.waiting = self.lines.waiting
        self.began = time.monotonic()
        self.seconds_per_step = None  # as last measured, at step `measured`
        self.measured = start_step
        self.working = 0.0  # seconds of the steps since `start_step`
        self.console_lost = False
        self.bar = tqdm(
            total=total_steps, initial=start_step, unit="step", disable=not sys.stderr.isatty()
        )

    def write(self, step, row, images):
        values = {
            key: math.nan if value is None else value
            for key, value in row.items()
            if not isinstance(value, str)
        }
        known = [form.format(values[key]) for key, form in SHOWN.items() if key in values]
        scores = [
            f"{key} {value:.4g}"
            for key, value in values.items()
            if key.startswith(("val/", "eval/"))
        ]
        line = "  ".join(
            [
                self.position(step),
                *known,
                *scores,
                *(f"{key}: {value}" for key, value in row.items() if isinstance(value, str)),
                *(f"{key} drawn" for key in images),
                f"eta {tqdm.format_interval(self.seconds_left(step, row))}",
            ]
        )
        self.tick(step)
        if self.bar.disable or any(key.startswith("eval/") for key in row):
            self.say(line)
        else:
            self.bar.set_postfix_str(", ".join([*known[:1], *scores]))
            self.keep(line)

    def position(self, step):
        return f"step {step}/{self.total_steps} ({step / self.total_steps:.1%})"

    def progress(self, step, loss):
        left = tqdm.format_interval(self.seconds_left(step, {}))
        if self.bar.disable:
            self.say(f"{self.position(step)}  loss {loss:.4f}  eta {left}")
        else:
            self.bar.set_postfix_str(f"loss {loss:.4f}")

    def seconds_left(self, step, row):
        """Seconds to the end: steps at the last speed, with pauses (drawing ...) as until now."""
        now = time.monotonic()
        if "speed/step_ms" in row:
            seconds = row["speed/step_ms"] / 1000
            if self.seconds_per_step is None:  # what was set up until here is no pause
                self.began = now
                self.start_step = step
            else:
                self.working += (step - self.measured) * seconds
            self.seconds_per_step = seconds
            self.measured = step
        elapsed = now - self.began
        done = max(step - self.start_step, 1)
        if self.seconds_per_step is None:
            return (self.total_steps - step) * elapsed / done
        pauses = max(elapsed - self.working, 0) / done
        return (self.total_steps - step) * (self.seconds_per_step + pauses)

    def tick(self, step):
        self.bar.update(step - self.bar.n)

    def say(self, text):
        try:
            tqdm.write(text)  # above the bar, if there is one
            sys.stdout.flush()
        except OSError as error:
            if not self.console_lost:
                self.console_lost = True
                reason = one_line_with_type(error)
                self.keep(f"the console takes no more lines ({reason}); this file has all of them")
        self.keep(text)

    def keep(self, text):
        self.lines.add(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def close(self, exit_code, hurry):
        self.bar.close()
        self.lines.write()


SHOWN = {  # in training.log, next to all of val/ and eval/
    "train/loss": "loss {:.4f}",
    "speed/images_per_second": "{:.1f} images/s",
    "memory/vram_peak_gib": "vram {:.2f} GiB",
    "memory/rss_gib": "rss {:.2f} GiB",
    "progress/epoch": "epoch {:.2f}",
    "progress/epoch_seconds": "{:.1f} s/epoch",
}
