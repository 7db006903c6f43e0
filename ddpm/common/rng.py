"""Randomness is an address, not a history.

Every random number of a run is read at a place named by (seed, purpose, step, index), from numpy's
counter-based generator Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"):
key = (seed, purpose), counter = (0, index, step, 0). Nothing is advanced, so nothing has to be
saved: resuming, splitting a batch over ranks or micro-batches, or drawing image 17 alone gives the
same bits. Numbers are drawn on the host, so a GPU draws what the CPU draws.
"""

import zlib

import numpy as np
import torch


def generator(seed, purpose, step=0, index=0):
    """The numpy Generator at an address: `seed`, `step` and `index` are integers >= 0, `purpose`
    is a word.
    """
    key = np.array([seed, zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.array([0, index, step, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def generators(seed, purpose, step, indices):
    """The generator at each index in turn: one object that is put to its next place, which is
    quicker than a new one.
    """
    moving = generator(seed, purpose, step)
    state = moving.bit_generator.state
    for index in indices:
        state["state"]["counter"][1] = index
        moving.bit_generator.state = state
        yield moving


def normal(seed, purpose, step, indices, shape):
    """Standard normal noise float32 [b, *shape], one address for each of the b `indices`."""
    out = np.empty((len(indices), *shape), dtype=np.float32)
    for row, drawn in zip(out, generators(seed, purpose, step, indices), strict=True):
        drawn.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


def uniform(seed, purpose, step, indices):
    """Uniform numbers in [0, 1), float64 [b], one address for each of the b `indices`."""
    return torch.tensor(
        [drawn.random() for drawn in generators(seed, purpose, step, indices)], dtype=torch.float64
    )


def permutation(seed, purpose, step, n):
    """A permutation of range(n) as an int64 array."""
    return generator(seed, purpose, step).permutation(n)


def reseed_torch(seed, *address):
    """Put torch's global generators (dropout's source, all devices) at the address, an integer
    tuple.
    """
    # as entropy, (5,) and (5, 0) would be one address
    sequence = np.random.SeedSequence(seed, spawn_key=address)
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1)))


def another(seed, count):
    """The seed of a run that has begun anew so often: its own the first time, then one that
    shares nothing with it.
    """
    return int(generator(seed, "another", count).integers(2**63)) if count else seed
