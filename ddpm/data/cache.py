"""What was worked out once for all runs and ranks of a machine: decoded images, and what was found
in files.

A source decodes a photo each time it is asked for it. Here its images are uint8 rows of a file
under the fingerprint of the source, and the file is mapped: what is read of it lies in memory that
the system has to spare, once for all processes. A copy of one's own would be hardly faster
(experiments/throughput). What is kept is made under a lock and renamed into place whole.
"""

import contextlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ddpm.common import files
from ddpm.common.files import expand_user, fsync, make_folder


def cache_decoded(source, folder=None):
    """The same source, its images read from a file in `folder`, by default below `home()`; the file
    is made if it is not there.

    Where the disk has no room for it or cannot be written, the source itself, with a note. Unasked,
    without a `folder`, at most a quarter of what is free is taken. A file of up to half of the
    memory is read through, to be there from the first step on. Raises Undecodable for an image that
    cannot be had.
    """
    size = len(source) * int(np.prod(source.image_shape))
    most = 0.9 if folder else 0.25
    given = folder
    folder = Path(folder or "decoded")
    try:
        folder = expand_user(folder) if given else files.cache_dir() / folder
        path = folder / f"{source.fingerprint}.u8"
        # a file that is there needs no lock, which another user's cache may refuse
        if not is_complete(path, size):
            make_folder(folder) if given else files.cache_folder(folder.name)
            with files.file_lock(path.with_suffix(".lock"), "it decodes the same images"):
                if not is_complete(path, size):
                    if size > most * (free := shutil.disk_usage(folder).free):
                        raise OSError(
                            f"{size / 2**30:.1f} GiB are more than {most:.0%} of the "
                            f"{free / 2**30:.1f} free; name another folder as data.cache"
                        )
                    decode_all(source, path, size)
        if fits := size <= memory_bytes() / 2:
            warm_page_cache(path)
    except Undecodable:
        raise
    except (OSError, ValueError) as error:
        return replace(
            source,
            notes=(
                *source.notes,
                f"images are decoded at each use, as {folder} cannot keep them: {error}",
            ),
        )
    note = (
        f"decoded images: {path}, {size / 2**20:,.1f} MiB, "
        f"{'in memory' if fits else 'more than half of the memory'}"
    )
    rows = MappedRows(path, (len(source), *source.image_shape))
    return replace(source, fetch=rows, in_memory=fits, notes=(*source.notes, note))


def is_complete(path, size):
    """Whether a file of decoded images is there, complete, and may be read."""
    return os.access(path, os.R_OK) and path.stat().st_size == size


class Undecodable(ValueError):
    """An image of a source cannot be had: no fault of the folder that was to keep it."""


def memory_bytes():
    """How many bytes of memory this machine has, or the container that it is."""
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def warm_page_cache(path):
    with open(path, "rb", buffering=0) as file:
        piece = bytearray(2**24)
        while file.readinto(piece):
            pass


def decode_all(source, path, size):
    """Decode all images of a source, `size` bytes, in threads into a file, whole or not at all."""
    part = path.with_suffix(".part")  # of a build that was killed too: the lock is ours
    try:
        with open(part, "wb") as file:
            # a disk that turns out full later kills the process that writes to the map
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            file.truncate(size)
        rows = np.memmap(part, np.uint8, "r+", shape=(len(source), *source.image_shape))

        def decode(index):
            try:
                rows[index] = source[index].numpy()
            except Exception as error:
                raise Undecodable(" ".join(str(error).split())) from error

        map_in_threads(decode, range(len(source)), "decoding images")
        rows.flush()
        fsync(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def thread_pool(count=None):
    """An executor of threads, one for each core by default; where the block ends early, what they
    have not begun is dropped.

    For work that lets go of Python's lock, as decoding photographs does. multiprocessing's
    ThreadPool takes semaphores, which there are none of where /dev/shm is missing or read-only.
    """
    pool = ThreadPoolExecutor(count or os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def map_in_threads(work, items, title):
    """`[work(item) for item in items]`, in threads, with a progress bar on a terminal."""
    done = []
    parts = [items[k : k + ITEMS_PER_TASK] for k in range(0, len(items), ITEMS_PER_TASK)]
    with (
        thread_pool() as pool,
        tqdm(desc=title, total=len(items), leave=False, disable=None, unit=" images") as bar,
    ):
        for part in pool.map(lambda part: [work(item) for item in part], parts):
            done += part
            bar.update(len(part))
    return done


ITEMS_PER_TASK = 8  # items that a thread takes at a time


class MappedRows:
    """`rows(index)` is the image at an index from a file of shape [n, c, h, w], `rows(indices)` a
    batch at an array of them.

    The file is mapped once in each process that asks.
    """

    def __init__(self, path, shape):
        self.path = path
        self.shape = shape
        self.rows = None

    def __call__(self, index):
        if self.rows is None:
            self.rows = np.asarray(np.memmap(self.path, np.uint8, "r", shape=self.shape))
        return torch.from_numpy(self.rows.take(index, axis=0))

    def __getstate__(self):
        return {"path": self.path, "shape": self.shape, "rows": None}
