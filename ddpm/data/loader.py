"""Batches from a source, by worker processes if asked for."""

import atexit
import signal
import weakref

import torch

POLL_SECONDS = 1  # of waiting for a batch, after which a request to stop is looked at


class Batches(torch.utils.data.Dataset):
    """A source by lists of indices: (uint8 [b, c, h, w], int64 labels [b], -1 without labels)."""

    def __init__(self, source):
        self.source = source

    def __getitem__(self, indices):
        labels = self.source.labels
        labels = [labels[index] if labels else -1 for index in indices]
        return self.source.batch(indices), torch.tensor(labels)


def loader(source, batches, num_workers=0, pin_memory=False, check=lambda: None):
    """Iterate once over an iterable of index lists, giving what `Batches` does for each.

    Batches do not depend on the number of workers or change torch's generator. A source in memory
    needs no workers. `check()` is called before and while a batch is prepared, and may raise.
    """
    num_workers = 0 if source.in_memory else num_workers
    iterator = iterate(source, batches, num_workers, pin_memory, check)
    # workers ignore SIGTERM, so a loader that is left open would delay the end of the process
    if num_workers:
        atexit.register(close_if_alive, weakref.ref(iterator))
    return iterator


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
    iterator = reference()
    if iterator is not None:
        iterator.close()


def ignore_stop_signals(worker):
    """Let a worker survive Ctrl-C and a scheduler's SIGTERM or SIGUSR1 while the trainer saves.

    The second SIGTERM ends it: it comes from the trainer, after an orderly request.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
