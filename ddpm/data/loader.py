"""Batches from a source, by worker processes where asked for."""

import atexit
import signal
import weakref

import torch

POLL_SECONDS = 1  # of waiting for a batch, after which a request to stop is looked at


class Batches(torch.utils.data.Dataset):
    """A source by lists of indices: uint8 [b, c, h, w] and labels int64 [b], -1 where there are
    none.
    """

    def __init__(self, source):
        self.source = source

    def __getitem__(self, indices):
        labels = self.source.labels
        return self.source.batch(indices), torch.tensor(
            [labels[index] if labels else -1 for index in indices]
        )


def loader(source, batches, num_workers=0, pin_memory=False, check=lambda: None):
    """Iterate once over an iterable of index lists: (uint8 [b, c, h, w], int64 labels [b], -1 where
    there are none).

    The batches are the same for any number of workers, and torch's global generator is left alone.
    What is in memory needs no workers: they would only carry it from process to process. `check()`
    is called before each batch and while workers prepare it; it may raise to end the waiting.
    """
    num_workers = 0 if source.in_memory else num_workers
    running = iterate(source, batches, num_workers, pin_memory, check)
    # workers that ignore SIGTERM would hold up the end of a process that left a loader standing
    if num_workers:
        atexit.register(close_if_alive, weakref.ref(running))
    return running


def iterate(source, batches, num_workers, pin_memory, check):
    running = iter(
        torch.utils.data.DataLoader(
            Batches(source),
            sampler=batches,
            batch_size=None,
            num_workers=num_workers,
            pin_memory=pin_memory,
            timeout=POLL_SECONDS if num_workers else 0,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),
        )
    )
    while True:
        check()
        try:
            batch = next(running)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader timed out" not in str(error):
                raise
        else:
            yield batch


def close_if_alive(reference):
    running = reference()
    if running is not None:
        running.close()


def ignore_stop_signals(worker):
    """Let a worker outlive Ctrl-C and a scheduler's SIGTERM or SIGUSR1, which reach the whole
    group: the trainer saves first.

    The second SIGTERM counts: it comes from the trainer, which has asked before by the usual way.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
