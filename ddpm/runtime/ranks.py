"""Joining and leaving a process group under torchrun."""

import os
import sys
from datetime import timedelta

import torch.distributed as distributed
from torch.distributed.rendezvous import rendezvous

# how long ranks wait for one that works alone, as on the features of the real images
PATIENCE = timedelta(minutes=30)


def number_in_environment(name, default):
    """An environment variable as a non-negative integer; raises ValueError for other text."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(
            f"{name} is {text!r} in the environment and must be a number, as torchrun sets it; "
            "unset it"
        )
    return int(text)


def join(backend):
    """Create the process group, at the address in the environment.

    torchrun's store survives a restart and would send new ranks to the addresses of dead ones
    (pytorch issue 135712), so on one node each restart uses a prefix of its own. Nodes may count
    restarts differently; several nodes do without torchrun's store.
    """
    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = distributed.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    distributed.init_process_group(
        backend, store=store, rank=rank, world_size=world, timeout=PATIENCE
    )


def restarted():
    """True under torchrun, which restarts ranks that exit with a code other than 0."""
    return distributed.is_torchelastic_launched()


def abandon(code):
    """Exit immediately: a clean shutdown would wait for ranks that have died."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stop():
    """Destroy the process group, if there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
