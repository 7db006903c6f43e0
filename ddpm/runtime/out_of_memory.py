"""Out-of-memory errors, and work on many images that continues in smaller batches after one.

The result for an image must not depend on its batch; then a smaller batch changes no number.
"""

from functools import partial

import torch

# with less than this share of a GPU's memory free, an ambiguous error counts as out of memory
FULL = 0.1
MESSAGES = (  # in lower case, of errors other than torch.OutOfMemoryError
    "out of memory",  # of the CUDA runtime, NCCL, MPS; and where a compiler wraps the error
    "can't allocate memory",  # of the host
    "not enough memory",  # of the host, on Windows
    "status_alloc_failed",  # of cuBLAS, cuSOLVER and cuDNN up to version 8
    "_allocation_failed",  # of cuDNN 9
    # of cuDNN, whose engines ask for workspace (pytorch issue 108645)
    "unable to find an engine to execute this computation",
)
AMBIGUOUS = ("cudnn_status_not_supported", "cublas_status_not_initialized")  # pytorch issue 44473


class BatchDoesNotFit(MemoryError):
    """Memory runs out with a single image."""


def ran_out(error):
    """Whether an exception means that a GPU or the host is out of memory."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    message = str(error).lower() if isinstance(error, RuntimeError) else ""
    if any(words in message for words in MESSAGES):
        return True
    return any(words in message for words in AMBIGUOUS) and nearly_full()


def nearly_full():
    """Whether this process uses a GPU with less than the share FULL of its memory free."""
    if not torch.cuda.is_initialized():
        return False
    free, total = torch.cuda.mem_get_info()
    return free < FULL * total


class Room:
    """Runs work that may run out of memory in smaller batches, and keeps the size of each kind.

    `say(text)` reports each new size. `check()` is called before each batch and may raise, to stop.
    """

    def __init__(self, say=print):
        self.say = say
        self.check = lambda: None
        self.most = {}

    def fits(self, work):
        """(True, result of `work()`); (False, message) if out of memory, freed again."""
        try:
            return True, work()
        except Exception as error:
            if isinstance(error, BatchDoesNotFit) or not ran_out(error):
                raise
            why = " ".join(str(error).split())[:200]
        # after the except block: the error held frames with tensors. Without a GPU a no-op
        torch.cuda.empty_cache()
        return False, why

    def in_batches(self, doing, items, size, work):
        """Yield (batch, work(batch)) for `size` items at a time, or fewer after out of memory.

        `doing` names the kind of work in the log. Raises BatchDoesNotFit if one item does not fit.
        """
        start = 0
        while start < len(items):
            self.check()
            batch = items[start : start + min(size, self.most.get(doing, size))]
            fitted, result = self.fits(partial(work, batch))
            if fitted:
                yield batch, result
                start += len(batch)
            elif len(batch) == 1:
                raise BatchDoesNotFit(f"out of memory {doing} a single image ({result})")
            else:
                self.most[doing] = half = len(batch) // 2
                self.say(
                    f"out of memory {doing} {len(batch)} images at a time; continuing with {half} "
                    "at a time, with the same results"
                )
