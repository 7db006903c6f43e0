"""What long work with a network shows while it goes on: a bar on a terminal, elsewhere lines on
stderr, ten seconds apart.

A line comes when an evaluation of the network ends: where one takes longer than ten seconds, after
each.
"""

import sys
import time

from tqdm import tqdm

SECONDS = 10  # between two lines


class Progress:
    """Counts the network evaluations of work on `images` images, `times` of them for each batch of
    `size` images.

    A context, on whose end the bar goes. `evaluated()` counts an evaluation of one batch,
    `finished(count)` a batch of so many images. What is not `shown` is silent.
    """

    def __init__(self, doing, images, size, times, shown=True):
        self.doing = doing
        self.images = images
        self.times = times
        self.evaluations = 0
        self.total = -(-images // max(size, 1)) * times
        self.done = 0
        self.began = self.told = time.monotonic()
        self.lines = shown and not sys.stderr.isatty()
        self.bar = tqdm(
            desc=doing,
            total=self.total,
            unit=" evaluations",
            leave=False,
            dynamic_ncols=True,
            postfix=self.made,
            disable=not shown or self.lines,
        )

    @property
    def made(self):
        """How many images are done, in words."""
        return f"{self.done} of {self.images} images"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def evaluated(self, *_):
        """Count one evaluation of a batch; takes what a forward hook is given."""
        self.evaluations += 1
        self.bar.update()
        if self.lines and (now := time.monotonic()) - self.told >= SECONDS:
            self.told = now
            spent = now - self.began
            left = tqdm.format_interval(
                spent / self.evaluations * max(self.total - self.evaluations, 0)
            )
            print(
                f"{self.doing}: {self.evaluations} of {self.total} network evaluations, "
                f"{self.made}, {tqdm.format_interval(spent)} so far, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def finished(self, count):
        """Count a batch of images; where memory ran out, the others are expected in batches of
        that size.
        """
        self.done += count
        self.bar.total = self.total = (
            self.evaluations + -(-(self.images - self.done) // count) * self.times
        )
        self.bar.set_postfix_str(self.made)
