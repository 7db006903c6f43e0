"""Durations with a unit, and clocks: `"500 epochs"`, `"20000 steps"`, `"2000000 images"`, `"10
minutes"`.

A length is one duration that can be repeated, so never minutes. An interval may join several with
commas, `"1000 steps, 10 minutes"`, and is due when any of them is. `"0 steps"` means never.
"""

import math
import re
import time
from fractions import Fraction

SECONDS = {"second": 1, "minute": 60, "hour": 3600}
UNITS = ("days", 86400), ("hours", 3600), ("minutes", 60)
COUNTS = ("step", "epoch", "image")


def parse_duration(text, times=True):
    """Split `"2.5 epochs"` into `(Fraction(5, 2), "epoch")`, exact, so that no rounding shifts a
    rhythm by a step.

    Raises ValueError for another form, or for a time where `times` is False.
    """
    units = COUNTS + (tuple(SECONDS) if times else ())
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:e\d\d?)?)\s*([a-z]+?)s?\s*", str(text))
    if not match or match[2] not in units:
        choices = ", ".join(f"{unit}s" for unit in units)
        why = (
            " (a length in minutes could not be repeated)" if match and match[2] in SECONDS else ""
        )
        raise ValueError(
            f"cannot read the duration {text!r}; write a number and one of {choices}, such as "
            f"'500 steps'{why}"
        )
    return Fraction(match[1]), match[2]


def steps_of(text, batch_size, dataset_size):
    """The whole number of optimiser steps in a duration counted in steps, epochs or images (rounded
    up).

    Raises ValueError for a duration in time units.
    """
    amount, unit = parse_duration(text, times=False)
    images = {"step": batch_size, "epoch": dataset_size, "image": 1}[unit] * amount
    return math.ceil(images / batch_size)


def in_words(seconds):
    """A duration for people, in the unit that gives a number they can grasp: `"40 seconds"`,
    `"3.5 hours"`.
    """
    unit, size = next(((unit, size) for unit, size in UNITS if seconds >= 2 * size), ("seconds", 1))
    return (
        f"{seconds / size:,.0f} {unit}" if seconds >= 10 * size else f"{seconds / size:.2g} {unit}"
    )


class Every:
    """Tells when something that happens at an interval is due; asked once at each step, in order.

    Counted intervals depend on the step alone, so that a resumed run keeps the rhythm; time counts
    from the start of the process. Raises ValueError for a text that is not one or several
    durations.
    """

    def __init__(self, text, batch_size, dataset_size, now=time.monotonic):
        durations = [parse_duration(part) for part in str(text).split(",")]
        scale = {"step": batch_size, "epoch": dataset_size, "image": 1}
        self.images = [
            amount * scale[unit] for amount, unit in durations if unit in scale and amount
        ]
        self.seconds = [
            float(amount * SECONDS[unit])
            for amount, unit in durations
            if unit in SECONDS and amount
        ]
        self.never = not (self.images or self.seconds)
        self.batch_size = batch_size
        self.now = now
        self.last = now()

    def first(self):
        """The first step at which it is due; None where it is never, or that hangs on the time."""
        return None if self.never or self.seconds else math.ceil(min(self.images) / self.batch_size)

    def due(self, step):
        """True when an interval ends with `step`, the number of steps done so far."""
        seen = step * self.batch_size
        before = (step - 1) * self.batch_size
        counted = any(seen // images > before // images for images in self.images)
        timed = any(self.now() - self.last >= seconds for seconds in self.seconds)
        hit = counted or timed
        if hit:
            self.last = self.now()
        return hit

    def times(self, total):
        """How often it is due in `total` steps, the last of which counts in any case; None where
        it hangs on the time.
        """
        if self.seconds:
            return None
        seen = total * self.batch_size
        ends = {
            math.ceil(k * images / self.batch_size)
            for images in self.images
            for k in range(1, int(seen // images) + 1)
        }
        return 0 if self.never else len(ends | {total})
