"""Durations with a unit, and clocks: `"500 epochs"`, `"20000 steps"`, `"2000000 images"`, `"10 minutes"`.

A length is one duration that can be repeated, so never minutes. An interval may join several with commas, `"1000 steps, 10
minutes"`, and is due when any of them is. `"0 steps"` means never.
"""

import contextlib
import itertools
import math
import re
import time
from fractions import Fraction

SECONDS = {"second": 1, "minute": 60, "hour": 3600}
UNITS = ("days", 86400), ("hours", 3600), ("minutes", 60)
COUNTS = ("step", "epoch", "image")
WARM_UP = 3  # steps in which a process sets up kernels and memory


def parse_duration(text, times=True):
    """Split `"2.5 epochs"` into `(Fraction(5, 2), "epoch")`, exact, so that no rounding shifts a rhythm by a step.

    Raises ValueError for another form, or for a time where `times` is False.
    """
    units = COUNTS + (tuple(SECONDS) if times else ())
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d\d?)?)\s*([a-z]+?)s?\s*", str(text))
    if not match or match[2] not in units:
        choices = ", ".join(f"{unit}s" for unit in units)
        why = " (a length in minutes could not be repeated)" if match and match[2] in SECONDS else ""
        raise ValueError(f"cannot read the duration {text!r}; write a number and one of {choices}, such as '500 steps'{why}")
    return Fraction(match[1]), match[2]


def steps_of(text, batch_size, dataset_size):
    """The whole number of optimiser steps in a duration counted in steps, epochs or images (rounded up).

    Raises ValueError for a duration in time units.
    """
    amount, unit = parse_duration(text, times=False)
    images = {"step": batch_size, "epoch": dataset_size, "image": 1}[unit] * amount
    return math.ceil(images / batch_size)


def in_words(seconds):
    """A duration for people, in the unit that gives a number they can grasp: `"40 seconds"`, `"3.5 hours"`."""
    unit, size = next(((unit, size) for unit, size in UNITS if seconds >= 2 * size), ("seconds", 1))
    return f"{seconds / size:,.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.2g} {unit}"


class Every:
    """Tells when something that happens at an interval is due; asked once at each step, in order.

    Counted intervals depend on the step alone, so that a resumed run keeps the rhythm; time counts from the start of the
    process. Raises ValueError for a text that is not one or several durations.
    """

    def __init__(self, text, batch_size, dataset_size, now=time.monotonic):
        durations = [parse_duration(part) for part in str(text).split(",")]
        scale = {"step": batch_size, "epoch": dataset_size, "image": 1}
        self.images = [amount * scale[unit] for amount, unit in durations if unit in scale and amount]
        self.seconds = [float(amount * SECONDS[unit]) for amount, unit in durations if unit in SECONDS and amount]
        self.never = not (self.images or self.seconds)
        self.batch_size, self.now, self.last = batch_size, now, now()

    def first(self):
        """The first step at which it is due; None where it is never, or that hangs on the time."""
        return None if self.never or self.seconds else math.ceil(min(self.images) / self.batch_size)

    def due(self, step):
        """True when an interval ends with `step`, the number of steps done so far."""
        seen, before = step * self.batch_size, (step - 1) * self.batch_size
        counted = any(seen // images > before // images for images in self.images)
        timed = any(self.now() - self.last >= seconds for seconds in self.seconds)
        hit = counted or timed
        if hit:
            self.last = self.now()
        return hit

    def times(self, total):
        """How often it is due in `total` steps, the last of which counts in any case; None where it hangs on the time."""
        if self.seconds:
            return None
        seen = total * self.batch_size
        ends = {math.ceil(k * images / self.batch_size) for images in self.images for k in range(1, int(seen // images) + 1)}
        return 0 if self.never else len(ends | {total})


class Stopwatch:
    """Seconds that were worked, without the pauses; `lap()` returns them and begins anew."""

    def __init__(self, now=time.monotonic):
        self.now, self.start, self.paused = now, now(), 0.0

    @contextlib.contextmanager
    def pause(self):
        """The time inside this context does not count."""
        entered = self.now()
        yield
        self.paused += self.now() - entered

    def read(self):
        """The seconds since the last lap."""
        return self.now() - self.start - self.paused

    def lap(self):
        seconds = self.read()
        self.start, self.paused = self.now(), 0.0
        return seconds


class Speed:
    """How fast the training goes: images and steps a second, and the share of the time spent waiting for images.

    The first WARM_UP steps of a process do not count, nor do pauses; `wait()` lets the device come to an end of its work first.
    With `peak`, the operations a second that the devices are made for, also the share of them that the training reaches (model
    FLOPs utilisation, Chowdhery et al. 2022, appendix B: what is computed twice to save memory does not count).
    """

    def __init__(self, batch_size, dataset_size, flops_per_image=0, peak=0, wait=lambda: None, now=time.monotonic):
        self.batch_size, self.dataset_size = batch_size, dataset_size
        self.flops_per_image, self.peak, self.wait = flops_per_image, peak, wait
        self.watch, self.steps, self.waited = Stopwatch(now), 0, 0.0
        self.rate = None  # images a second, as of the last reading

    def timed(self, batches):
        """The same batches, while the wait for each is measured."""
        batches = iter(batches)
        for count in itertools.count():
            if count == WARM_UP:
                self.wait()
                self.watch.lap()
                self.steps, self.waited = 0, 0.0
            before = self.watch.now()
            batch = next(batches, None)
            self.waited += self.watch.now() - before
            if batch is None:
                return
            self.steps += count >= WARM_UP
            yield batch

    def pause(self):
        """The time inside this context does not count."""
        return self.watch.pause()

    def progress(self, done):
        """How far the training is after `done` steps: epochs, images, and operations in 10^15 (forward and backward)."""
        images = done * self.batch_size
        return {"progress/epoch": images / self.dataset_size, "progress/images": images,
                "progress/petaflop": images * self.flops_per_image / 1e15}

    def seconds(self, images):
        """About how long the training takes for so many images, at the speed last measured; None before there is one."""
        now = self.steps * self.batch_size / max(self.watch.read(), 1e-9)
        rate = self.rate or now
        return images / rate if rate else None

    def read(self, done):
        """The rates since the last reading, at the end of a step, and how far the training is after `done` steps.

        There are no rates before the first step that counts.
        """
        seconds, steps = max(self.watch.lap(), 1e-9), self.steps
        if not steps:
            return self.progress(done)
        rate = self.rate = steps * self.batch_size / seconds
        readings = {
            "speed/images_per_second": rate,
            "speed/step_ms": 1000 * seconds / steps,
            "speed/loader_wait": self.waited / seconds,
            "progress/epoch_seconds": self.dataset_size / rate,
        } | ({"speed/mfu": rate * self.flops_per_image / self.peak} if self.peak else {}) | self.progress(done)
        self.steps, self.waited = 0, 0.0
        return readings
