"""Which images are held out, and the order of the others: pure functions of seed and position."""

from functools import lru_cache

import numpy as np

from ddpm.common import rng


def split(n, fraction, seed):
    """Hold out a fraction of n images: `(train, validation)`, sorted int64 arrays of indices.

    Each has an image if fraction > 0 and n >= 2. ValueError for a fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(
            f"held-out fraction {fraction} is outside [0, 1); use 0 for none, or for example 0.1"
        )
    num_held_out = min(max(round(n * fraction), 1), n - 1) if fraction > 0 else 0
    shuffled = rng.permutation(seed, "split", 0, n)
    return np.sort(shuffled[num_held_out:]), np.sort(shuffled[:num_held_out])


def evenly_spaced(items, limit):
    """At most `limit` of the items, evenly from first to last: all classes of a sorted folder."""
    items = items.tolist() if isinstance(items, np.ndarray) else items
    count = min(len(items), limit)
    return [items[k * len(items) // count] for k in range(count)]


@lru_cache(maxsize=4)  # a batch lies in one epoch, or in a few neighbours
def epoch_order(seed, n, epoch):
    """The permutation of n images in an epoch."""
    return rng.permutation(seed, "order", epoch, n)


def order(seed, n, position):
    """The image at a position of the endless sequence of epochs, each a new permutation of n."""
    return int(epoch_order(seed, n, position // n)[position % n])


def batch_indices(seed, n, step, batch_size):
    """The images of a step, int64 [batch_size]: the next ones of `order`, across epochs."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return np.array([order(seed, n, position) for position in positions], dtype=np.int64)
