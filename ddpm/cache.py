"""What was worked out once for all runs and ranks of a machine: decoded images, and what was found in files.

A source decodes a photo each time it is asked for it. Here its images are uint8 rows of a file under the fingerprint of the
source, and the file is mapped: what is read of it lies in memory that the system has to spare, once for all processes. A copy
of one's own would be hardly faster (experiments/throughput). What is kept is made under a lock and renamed into place whole.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import sys
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ddpm.files import expanded, make_folder, sync, written_beside

LOG = logging.getLogger(__name__)
WARNED = set()  # values of $DDPM_CACHE that a warning has named


def home():
    """Where caches lie: `$DDPM_CACHE`, else `~/.cache/ddpm`; raises ValueError where no such folder is known."""
    return expanded(os.environ.get("DDPM_CACHE") or "~/.cache/ddpm")


def place(name):
    """A folder below `home()`, made if it is not there: who may write to the one may write to the other, whatever the umask."""
    folder = home() / name
    if not folder.is_dir():
        make_folder(folder)
        with contextlib.suppress(PermissionError):  # another user was faster
            folder.chmod(stat.S_IMODE(folder.parent.stat().st_mode))
    return folder


def decoded(source, folder=None):
    """The same source, its images read from a file in `folder`, by default below `home()`; the file is made if it is not there.

    Where the disk has no room for it or cannot be written, the source itself, with a note. Unasked, without a `folder`, at most
    a quarter of what is free is taken. A file of up to half of the memory is read through, to be there from the first step on.
    Raises Undecodable for an image that cannot be had.
    """
    size, most = len(source) * int(np.prod(source.image_shape)), 0.9 if folder else 0.25
    given, folder = folder, Path(folder or "decoded")
    try:
        folder = expanded(folder) if given else home() / folder
        path = folder / f"{source.fingerprint}.u8"
        if not is_whole(path, size):  # a file that is there needs no lock, which another user's cache may refuse
            make_folder(folder) if given else place(folder.name)
            with alone(path.with_suffix(".lock"), "it decodes the same images"):
                if not is_whole(path, size):
                    if size > most * (free := shutil.disk_usage(folder).free):
                        raise OSError(f"{size / 2**30:.1f} GiB are more than {most:.0%} of the {free / 2**30:.1f} free; name "
                                      "another folder as data.cache")
                    build(source, path, size)
        if fits := size <= memory() / 2:
            read_through(path)
    except Undecodable:
        raise
    except (OSError, ValueError) as error:
        return replace(source, notes=(*source.notes, f"images are decoded at each use, as {folder} cannot keep them: {error}"))
    note = f"decoded images: {path}, {size / 2**20:,.1f} MiB, {'in memory' if fits else 'more than half of the memory'}"
    rows = Rows(path, (len(source), *source.image_shape))
    return replace(source, fetch=rows, in_memory=fits, notes=(*source.notes, note))


def is_whole(path, size):
    """Whether a file of decoded images is there, complete, and may be read."""
    return os.access(path, os.R_OK) and path.stat().st_size == size


class Undecodable(ValueError):
    """An image of a source cannot be had: no fault of the folder that was to keep it."""


def memory():
    """How many bytes of memory this machine has, or the container that it is."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def read_through(path):
    with open(path, "rb", buffering=0) as file:
        piece = bytearray(2**24)
        while file.readinto(piece):
            pass


def build(source, path, size):
    """Decode all images of a source, `size` bytes, in threads into a file, whole or not at all."""
    part = path.with_suffix(".part")  # of a build that was killed too: the lock is ours
    try:
        with open(part, "wb") as file:
            if hasattr(os, "posix_fallocate"):  # a disk that turns out full later kills the process that writes to the map
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        rows = np.memmap(part, np.uint8, "r+", shape=(len(source), *source.image_shape))

        def decode(index):
            try:
                rows[index] = source[index].numpy()
            except Exception as error:
                raise Undecodable(" ".join(str(error).split())) from error

        with ThreadPool() as pool:  # decoding photographs lets go of Python's lock
            work = pool.imap_unordered(decode, range(len(source)), chunksize=16)
            for _ in tqdm(work, "decoding images", len(source), leave=False, disable=None, unit=" images"):
                pass
        rows.flush()
        sync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def remembered(name, reason="it reads the same files"):
    """A dict that lasts under a name below `home()`: one process has it at a time, and what is in it afterwards is kept.

    Empty where there is none yet or it cannot be read, and lost again, with a warning, where it cannot be written.
    """
    with contextlib.ExitStack() as lock:
        with contextlib.suppress(OSError, ValueError):
            kind, _, file = name.rpartition("/")
            lock.enter_context(alone(place(kind) / f"{file}.json.lock", reason))
        found = recalled(name)
        before = dict(found)
        yield found
        if found != before:
            remember(name, found)


def recalled(name):
    """The dict that is kept under a name below `home()`; empty where there is none, or it cannot be read."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads((home() / f"{name}.json").read_text()))
    return {}


def remember(name, content):
    """Keep a dict under a name below `home()`; where that cannot be done, a warning says so."""
    kind, _, file = name.rpartition("/")
    try:
        with written_beside(place(kind) / f"{file}.json") as part:
            part.write_text(json.dumps(content))
    except (OSError, ValueError) as error:
        if (given := os.environ.get("DDPM_CACHE")) not in WARNED:
            WARNED.add(given)
            LOG.warning("what is found out about files cannot be kept (%s), and is found out again each time; name a folder "
                        "that you may write to as DDPM_CACHE", error)


@contextlib.contextmanager
def alone(path, reason=""):
    """Wait until no one else is inside, for a reason that is said if given, and keep them out; a lock dies with its process."""
    handle = lock_file(path)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if reason:
                    print(f"waiting for another process: {reason}", file=sys.stderr, flush=True)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def lock_file(path):
    """A handle of a file to lock, which is made so that other users can lock it too."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    except PermissionError:  # to write; a file that can be read can be locked
        return os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # of another user
        os.fchmod(handle, 0o666)
    return handle


class Rows:
    """`rows(index)` is the image at an index from a file of shape [n, c, h, w], `rows(indices)` a batch at an array of them.

    The file is mapped once in each process that asks.
    """

    def __init__(self, path, shape):
        self.path, self.shape, self.rows = path, shape, None

    def __call__(self, index):
        if self.rows is None:
            self.rows = np.asarray(np.memmap(self.path, np.uint8, "r", shape=self.shape))
        return torch.from_numpy(self.rows.take(index, axis=0))

    def __getstate__(self):
        return {"path": self.path, "shape": self.shape, "rows": None}
