"""Lengths and intervals: `"500 epochs"`, `"20000 steps"`, `"2000000 images"`, `"10 minutes"`.

A length is one duration in steps, epochs or images: time is not reproducible. An interval may join
several with commas, `"1000 steps, 10 minutes"`, and is due when any of them is. `"0 steps"` means
never.
"""

import math
import re
import time
from fractions import Fraction

SECONDS = {"second": 1, "minute": 60, "hour": 3600}
UNITS = ("days", 86400), ("hours", 3600), ("minutes", 60)
COUNTS = ("step", "epoch", "image")


def parse_duration(text, times=True):
    """Parse `"2.5 epochs"` into `(Fraction(5, 2), "epoch")`; `times` allows units of time.

    Raises ValueError for any other text.
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
    """The optimizer steps of steps, epochs or images, rounded up; ValueError for units of time."""
    amount, unit = parse_duration(text, times=False)
    images = {"step": batch_size, "epoch": dataset_size, "image": 1}[unit] * amount
    return math.ceil(images / batch_size)


def in_words(seconds):
    """Seconds in a readable unit: `"40 seconds"`, `"3.5 hours"`."""
    unit, size = next(((unit, size) for unit, size in UNITS if seconds >= 2 * size), ("seconds", 1))
    amount = seconds / size
    return f"{amount:,.0f} {unit}" if seconds >= 10 * size else f"{amount:.2g} {unit}"


class Every:
    """An interval; call `due(step)` once per step, in order.

    Steps, epochs and images depend on the step alone, so a resumed run continues the intervals.
    Time counts from the start of the process, then from the last step that was due for any reason.
    Raises ValueError for text that is not an interval.
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
        """The first step at which it is due; None if never, or if that depends on time."""
        return None if self.never or self.seconds else math.ceil(min(self.images) / self.batch_size)

    def counted(self, step):
        """True when steps, epochs or images make it due: the same on all ranks."""
        seen = step * self.batch_size
        before = (step - 1) * self.batch_size
        return any(seen // images > before // images for images in self.images)

    def due(self, step):
        """True when an interval ends with `step`, the number of completed steps."""
        timed = any(self.now() - self.last >= seconds for seconds in self.seconds)
        hit = self.counted(step) or timed
        if hit:
            self.last = self.now()
        return hit

    def times(self, total):
        """How often it is due in `total` steps, counting the last; None if that depends on time."""
        if self.seconds:
            return None
        seen = total * self.batch_size
        steps = {total}
        for images in self.images:
            counts = range(1, int(seen // images) + 1)
            steps |= {math.ceil(count * images / self.batch_size) for count in counts}
        return 0 if self.never else len(steps)
