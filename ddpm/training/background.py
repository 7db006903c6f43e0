"""Files that a thread writes while the training goes on, from copies of tensors on the host."""

import contextlib
import math
import re
import threading
from collections import defaultdict
from pathlib import Path

import torch

from ddpm.common.safe_load import tensors_in


class BackgroundWriter:
    """Writes one file at a time in a thread: `writer(write, *values)` calls `write(*copies)` there.

    Tensors in nested dicts, lists and tuples of `values` are copied to host memory that the next
    file uses again; it is pinned for tensors on a GPU. Where the host is short of memory, `write`
    is called at once, without copies. An exception of `write` is raised by the next call, `check`
    or `wait`. As a context manager, the writer waits at its end.
    """

    def __init__(self, machine):
        self.machine = machine
        self.buffers = defaultdict(list)  # (shape, type, strides) -> tensors on the host
        self.thread = None
        self.error = None

    def __call__(self, write, *values):
        """Wait for the file before, copy the values, and write them in the background."""
        self.wait()
        copies = self.stage(values)
        if copies is None:
            write(*values)
            return
        self.thread = threading.Thread(target=self.run, args=(write, copies), name="writer")
        self.thread.start()

    def run(self, write, values):
        """What the thread does; the time limit leaves as much time as a write takes."""
        try:
            with self.machine.stop.reserve_time():
                write(*values)
        except BaseException as error:
            self.error = error

    def check(self):
        """Raise the exception of a write that failed."""
        if self.error:
            error, self.error = self.error, None
            raise error

    def wait(self):
        """Wait until the file is on the disk; raises the exception of a write that failed."""
        if self.thread:
            self.thread.join()
        self.check()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.wait()

    def stage(self, values):
        """Copies of nested values, tensors in the buffers; None where the host is short of memory.

        It is short if the new buffers need more than half of the free memory.
        """
        needed = sum(tensor.nbytes for tensor in tensors_in(values))
        present = sum(tensor.nbytes for kind in self.buffers.values() for tensor in kind)
        if 2 * (needed - present) > free_memory():
            return None
        unused = defaultdict(list, {kind: [*group] for kind, group in self.buffers.items()})
        try:
            copies = self.copied(values, unused)
        except (RuntimeError, MemoryError):  # the system allows less, of pinned memory above all
            self.buffers.clear()
            return None
        self.machine.wait()
        return copies

    def copied(self, value, unused):
        """A nested value with each tensor in a buffer, an unused one or a new one."""
        if isinstance(value, dict):
            return {key: self.copied(item, unused) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.copied(item, unused) for item in value)
        if not isinstance(value, torch.Tensor):
            return value
        kind = value.shape, value.dtype, value.stride()
        if not unused[kind]:
            unused[kind].append(torch.empty_like(value, device="cpu", pin_memory=value.is_cuda))
            self.buffers[kind] += unused[kind]
        return unused[kind].pop().copy_(value.detach(), non_blocking=value.is_cuda)


def free_memory():
    """Free bytes of the host or, if that is less, of the container; infinite if unknown."""
    free = math.inf
    with contextlib.suppress(OSError, TypeError):  # not Linux
        known = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
        free = 1024 * int(known[1])
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limits = Path("/sys/fs/cgroup")
        used = limits.joinpath("memory.stat").read_text().split()[1]  # without cached files
        free = min(free, int(limits.joinpath("memory.max").read_text()) - int(used))
    return free
