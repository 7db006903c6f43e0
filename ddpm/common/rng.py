"""Random numbers by address: seed, purpose, step, index.

numpy's counter-based generator Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1,
2, 3") is keyed with (seed, purpose) and starts at counter (0, index, step, 0). There is no state to
save: a resumed run, a batch split over ranks or micro-batches, or image 17 alone get the same bits.
Numbers are drawn on the host, so a GPU gets the same as the CPU.
"""

import zlib

import numpy as np
import torch


def generator(seed, purpose, step=0, index=0):
    """The numpy Generator at an address: integers >= 0 and a string `purpose`."""
    key = np.array([seed, zlib.crc32(purpose.encode())], dtype=np.uint64)
    counter = np.array([0, index, step, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def generators(seed, purpose, step, indices):
    """Yield the generator at each index: the same object, which is faster than a new one."""
    moving = generator(seed, purpose, step)
    state = moving.bit_generator.state
    for index in indices:
        state["state"]["counter"][1] = index
        moving.bit_generator.state = state
        yield moving


def normal(seed, purpose, step, indices, shape, out=None):
    """Standard normal noise, float32 [b, *shape], from one address per index; b = len(indices).

    `out` is a numpy array for the noise. The GIL is released while an index is drawn.
    """
    out = np.empty((len(indices), *shape), dtype=np.float32) if out is None else out
    for row, drawn in zip(out, generators(seed, purpose, step, indices), strict=True):
        drawn.standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(out)


def uniform(seed, purpose, step, indices, out=None):
    """Uniform numbers in [0, 1), float64 [b] (or into `out`), from one address per index."""
    out = np.empty(len(indices)) if out is None else out
    out[:] = [drawn.random() for drawn in generators(seed, purpose, step, indices)]
    return torch.from_numpy(out)


def permutation(seed, purpose, step, n):
    """A permutation of range(n) as an int64 array."""
    return generator(seed, purpose, step).permutation(n)


def reseed_torch(seed, *address):
    """Seed the generators of the CPU and this GPU, for dropout, by `seed` and integers."""
    # passed as entropy, (5,) and (5, 0) would be the same address
    sequence = np.random.SeedSequence(seed, spawn_key=address)
    number = int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():  # torch.manual_seed visits all kinds of devices each time
        torch.cuda.manual_seed(number)


def another(seed, count):
    """The seed of a run after `count` restarts: `seed` itself for 0, else an unrelated one."""
    return int(generator(seed, "another", count).integers(2**63)) if count else seed
