"""Which images are held out, and in which order the others come: pure functions of seed and
position.
"""

from functools import lru_cache

import numpy as np

from ddpm.common import rng


def split(n, fraction, seed):
    """Hold out a fraction of n images: `(train, validation)` as sorted int64 arrays, the same for
    the same arguments.

    At least one image on either side where fraction > 0 and n >= 2. Raises ValueError for a
    fraction outside [0, 1).
    """
    if not 0 <= fraction < 1:
        raise ValueError(
            f"held-out fraction {fraction} is outside [0, 1); use 0 for none, or such as 0.1"
        )
    held = min(max(round(n * fraction), 1), n - 1) if fraction > 0 else 0
    shuffled = rng.permutation(seed, "split", 0, n)
    return np.sort(shuffled[held:]), np.sort(shuffled[:held])


def evenly_spaced(indices, most):
    """At most so many of the indices, evenly from first to last: of a folder sorted by class,
    all classes.
    """
    kept = min(len(indices), most)
    return [int(indices[k * len(indices) // kept]) for k in range(kept)]


@lru_cache(maxsize=4)  # a batch lies in one epoch, or in a few neighbours
def epoch_order(seed, n, epoch):
    return rng.permutation(seed, "order", epoch, n)


def order(seed, n, position):
    """Which of n images stands at a position of the endless sequence of epochs, each a fresh
    permutation of all n.
    """
    return int(epoch_order(seed, n, position // n)[position % n])


def batch_indices(seed, n, step, batch_size):
    """The images of a step, int64 [batch_size]: the step's share of `order`, across epochs, none
    dropped.
    """
    first = step * batch_size
    return np.array(
        [order(seed, n, position) for position in range(first, first + batch_size)], dtype=np.int64
    )
