"""What is prepared ahead of its use: batches copied to the GPU, random numbers drawn by threads."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import torch

from ddpm.common import rng

PART = 2**17  # random numbers that one thread draws at once: 1.4 ms of work


def fetched_ahead(batches, device):
    """Yield (images on the GPU, labels on the host), copied one batch ahead in another stream."""
    stream = torch.cuda.Stream(device)
    here = torch.cuda.current_stream(device)
    batches = iter(batches)

    def fetch():
        with torch.cuda.stream(stream):
            return [
                (images.to(device, non_blocking=True), labels)
                for images, labels in itertools.islice(batches, 1)
            ]

    coming = fetch()
    while coming:
        here.wait_stream(stream)
        images, labels = coming.pop()
        images.record_stream(here)  # or their memory would be reused too early
        coming = fetch()
        yield images, labels


class RandomNumbers:
    """Random numbers by address, bit for bit those of `rng`, drawn ahead by threads.

    As a context, it draws each request again for the next `depth` steps, in `threads` threads, into
    pinned memory if `pin`. Outside of it, or with 0 threads, numbers are drawn when requested.
    A request raises the exception of the thread that drew for it. `waited` sums up the seconds
    of all requests.
    """

    def __init__(self, seed, depth=1, threads=0, pin=False):
        self.seed = seed
        self.depth = depth
        self.threads = threads
        self.pin = pin
        self.pool = None
        self.step = 0
        self.jobs = {}  # (step, request) -> function that waits for the numbers
        self.waited = 0.0

    def __enter__(self):
        if self.threads:
            self.pool = ThreadPoolExecutor(self.threads, "random-numbers")
        return self

    def __exit__(self, *_):
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        self.pool = None
        self.jobs.clear()

    def normal(self, purpose, step, indices, shape):
        """As `rng.normal`."""
        return self._request(rng.normal, torch.float32, purpose, step, indices, tuple(shape))

    def uniform(self, purpose, step, indices):
        """As `rng.uniform`."""
        return self._request(rng.uniform, torch.float64, purpose, step, indices)

    def _request(self, draw, dtype, purpose, step, indices, *shape):
        began = time.monotonic()
        if not self.pool:
            numbers = draw(self.seed, purpose, step, indices, *shape)
        else:
            if step != self.step:
                self.step = step
                near = range(step, step + self.depth + 1)
                self.jobs = {key: job for key, job in self.jobs.items() if key[0] in near}
            indices = indices if isinstance(indices, range) else tuple(indices)
            request = draw, dtype, purpose, indices, *shape
            job = self.jobs.pop((step, request), None) or self._start(step, *request)
            for later in range(step + 1, step + 1 + self.depth):
                if (later, request) not in self.jobs:
                    self.jobs[later, request] = self._start(later, *request)
            numbers = job()
        self.waited += time.monotonic() - began
        return numbers

    def _start(self, step, draw, dtype, purpose, indices, *shape):
        """Let threads draw; returns a function that waits for the numbers."""
        count = len(indices)
        out = torch.empty((count, *itertools.chain(*shape)), dtype=dtype, pin_memory=self.pin)
        size = -(-count // max(1, min(self.threads, out.numel() // PART)))
        parts = [
            self.pool.submit(
                draw,
                self.seed,
                purpose,
                step,
                indices[first : first + size],
                *shape,
                out=out[first : first + size].numpy(),
            )
            for first in range(0, count, max(size, 1))
        ]

        def numbers():
            for part in parts:
                part.result()
            return out

        return numbers
