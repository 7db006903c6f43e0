"""Memory that runs out: which errors say so, and how work on many images goes on in smaller
batches.

What an image becomes must not depend on the batch that it is in; then a cut changes no number.
"""

from functools import partial

import torch

# share of a GPU's memory; with less than that free, an error that may have another cause is held to
# be this one
FULL = 0.1
SAID = (  # in errors of other types than torch.OutOfMemoryError, in lower case
    "out of memory",  # of the CUDA runtime, NCCL, MPS; and where a compiler wraps the error
    "can't allocate memory",  # of the host
    "not enough memory",  # of the host, on Windows
    "status_alloc_failed",  # of cuBLAS, cuSOLVER and cuDNN up to version 8
    "_allocation_failed",  # of cuDNN 9
    # of cuDNN, whose engines ask for workspace (pytorch issue 108645)
    "unable to find an engine to execute this computation",
)
MAYBE_SAID = ("cudnn_status_not_supported", "cublas_status_not_initialized")  # pytorch issue 44473


class BatchDoesNotFit(MemoryError):
    """Memory runs out with a single image."""


def ran_out(error):
    """True where an exception says that a GPU or the host has no memory left, in whatever words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error).lower() if isinstance(error, RuntimeError) else ""
    return (
        any(words in said for words in SAID)
        or any(words in said for words in MAYBE_SAID)
        and nearly_full()
    )


def nearly_full():
    """True where this process uses a GPU and hardly any of its memory is free."""
    if not torch.cuda.is_initialized():
        return False
    free, total = torch.cuda.mem_get_info()
    return free < FULL * total


class Room:
    """Tries work that may run out of memory. `say(text)` is told of each cut, and a kind of work
    that was cut stays so.

    `check()` is called before each batch and may raise, to stop.
    """

    def __init__(self, say=print):
        self.say = say
        self.check = lambda: None
        self.most = {}

    def fits(self, work):
        """(True, what `work()` returns) or, where memory ran out, (False, the error in words):
        then all it took is free.
        """
        try:
            return True, work()
        except Exception as error:
            if isinstance(error, BatchDoesNotFit) or not ran_out(error):
                raise
            why = " ".join(str(error).split())[:200]
        # only here: the error held the frames whose tensors this frees. It does nothing without a
        # GPU
        torch.cuda.empty_cache()
        return False, why

    def in_batches(self, doing, items, size, work):
        """Yield (batch, work(batch)) for all of a sequence, `size` items at a time or, where memory
        runs out, fewer.

        `doing` names the kind of work in the log. Raises BatchDoesNotFit where a single item does
        not fit.
        """
        start = 0
        while start < len(items):
            self.check()
            batch = items[start : start + min(size, self.most.get(doing, size))]
            fitted, found = self.fits(partial(work, batch))
            if fitted:
                yield batch, found
                start += len(batch)
            elif len(batch) == 1:
                raise BatchDoesNotFit(f"out of memory {doing} a single image ({found})")
            else:
                self.most[doing] = half = len(batch) // 2
                self.say(
                    f"out of memory {doing} {len(batch)} images at a time; continuing with {half} "
                    "at a time, with the same results"
                )
