"""Joining and leaving a process group under torchrun."""

import os
import sys
from datetime import timedelta

import torch.distributed as distributed
from torch.distributed.rendezvous import rendezvous

# that ranks wait for one which works alone, as on the features of the real images
PATIENCE = timedelta(minutes=30)


def number_in_environment(name, default):
    """The number that torchrun or a scheduler's script gives; raises ValueError for what is
    none.
    """
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(
            f"{name} is {text!r} in the environment and must be a number, as torchrun sets it; "
            "unset it"
        )
    return int(text)


def join(backend):
    """Meet the other ranks where the environment says, each time anew.

    torchrun's store outlives the ranks, and would tell those that it starts again where the dead
    ones were (pytorch issue 135712). On one node its count of restarts tells them apart; nodes may
    count differently, and do without the store (README).
    """
    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = distributed.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=PATIENCE
    )


def restarted():
    """True under torchrun, which starts the ranks again, or reports an error, where they exit
    with another code than 0.
    """
    return distributed.is_torchelastic_launched()


def abandon(code):
    """End this process at once, where others are gone: leaving in order would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stop():
    """Leave the other ranks in order."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
