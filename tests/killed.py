"""Trains a tiny run in children that are killed with SIGKILL at chosen points, until one comes to its end.

`python tests/killed.py FOLDER POINT...`; a point is FUNCTION:N (die at the N-th call of it, for `torch.save` with half a file
written) or a number of seconds. Prints how many children were killed.
"""

import io
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from conftest import run, tiny


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point):
    """Make this process die at the point."""
    name, _, count = point.partition(":")
    if not count:
        threading.Thread(target=lambda: (time.sleep(float(name)), die()), daemon=True).start()
        return
    home, attribute = {"fsync": (os, "fsync"), "replace": (os, "replace"), "unlink": (Path, "unlink"),
                       "save": (torch, "save")}[name]
    original, left = getattr(home, attribute), [int(count)]

    def counted(*arguments, **options):
        left[0] -= 1
        if left[0] > 0:
            return original(*arguments, **options)
        if name == "save":
            whole = io.BytesIO()
            original(arguments[0], whole)
            Path(arguments[1].name).write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
        die()

    setattr(home, attribute, counted)


def main(folder, *points):
    killed = 0
    for point in (*points, None):
        child = os.fork()
        if child == 0:
            if point:
                arm(point)
            run(tiny(train__length="30 steps", every__milestone="20 steps"), Path(folder))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            killed += 1
        elif os.WEXITSTATUS(status):
            sys.exit(f"the child of {point} failed")
    print(killed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
