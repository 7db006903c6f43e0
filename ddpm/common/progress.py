"""Progress of long work with a network: a bar on a terminal, elsewhere a line on stderr every ten
seconds, printed after a network evaluation.
"""

import sys
import time

from tqdm import tqdm

SECONDS = 10  # between two lines


class Progress:
    """A context that counts network evaluations: `images` images in batches of `size`.

    A batch takes `times` evaluations. Prints nothing unless `shown`.
    """

    def __init__(self, doing, images, size, times, shown=True):
        self.doing = doing
        self.images = images
        self.times = times
        self.evaluations = 0
        self.total = -(-images // max(size, 1)) * times
        self.done = 0
        self.began = self.last_line = time.monotonic()
        self.lines = shown and not sys.stderr.isatty()
        self.bar = tqdm(
            desc=doing,
            total=self.total,
            unit=" evaluations",
            leave=False,
            dynamic_ncols=True,
            postfix=self.images_done,
            disable=not shown or self.lines,
        )

    @property
    def images_done(self):
        """The number of finished images, in words."""
        return f"{self.done} of {self.images} images"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def evaluated(self, *_):
        """Count an evaluation of a batch; takes the arguments of a forward hook."""
        self.evaluations += 1
        self.bar.update()
        if self.lines and (now := time.monotonic()) - self.last_line >= SECONDS:
            self.last_line = now
            spent = now - self.began
            left = tqdm.format_interval(
                spent / self.evaluations * max(self.total - self.evaluations, 0)
            )
            print(
                f"{self.doing}: {self.evaluations} of {self.total} network evaluations, "
                f"{self.images_done}, {tqdm.format_interval(spent)} so far, {left} left",
                file=sys.stderr,
                flush=True,
            )

    def finished(self, count):
        """Count a batch of images; the rest is expected in batches of the same size."""
        self.done += count
        self.bar.total = self.total = (
            self.evaluations + -(-(self.images - self.done) // count) * self.times
        )
        self.bar.set_postfix_str(self.images_done)
