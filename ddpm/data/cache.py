"""Decoded images of a source in a file, once for all runs and ranks of a machine.

The file has the images as uint8 rows, its name is the fingerprint of the source, and processes map
it, so all share what the system holds of it in free memory. Reading a copy of one's own is hardly
faster (experiments/throughput).
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

ITEMS_PER_TASK = 8  # of `map_in_threads`


class Undecodable(ValueError):
    """An image of a source cannot be decoded; the folder of the cache is not at fault."""


def cache_decoded(source, folder=None):
    """The same source with its images decoded into a file in `folder`, by default in the cache.

    Where the disk is full or read-only, the source itself with a note. The default folder may take
    a quarter of the free space, a named one 90 %. A file of up to half the memory is read at once,
    so the first steps find it in memory. Raises Undecodable.
    """
    size = len(source) * int(np.prod(source.image_shape))
    max_share = 0.9 if folder else 0.25
    place = Path(folder or "decoded")
    try:
        place = files.expand_user(folder) if folder else files.cache_dir() / place
        path = place / f"{source.fingerprint}.u8"
        # a complete file needs no lock, which in another user's cache may be refused
        if not is_complete(path, size):
            files.make_folder(place) if folder else files.cache_folder(place.name)
            with files.file_lock(path.with_suffix(".lock"), "it decodes the same images"):
                if not is_complete(path, size):
                    check_space(place, size, max_share)
                    decode_all(source, path, size)
        if fits := size <= memory_bytes() / 2:
            warm_page_cache(path)
    except Undecodable:
        raise
    except (OSError, ValueError) as error:
        note = f"images are decoded at each use, as {place} cannot keep them: {error}"
        return replace(source, notes=(*source.notes, note))
    where = "in memory" if fits else "more than half of the memory"
    note = f"decoded images: {path}, {size / 2**20:,.1f} MiB, {where}"
    rows = MappedRows(path, (len(source), *source.image_shape))
    return replace(source, fetch=rows, in_memory=fits, notes=(*source.notes, note))


def is_complete(path, size):
    """Whether a file of decoded images is complete and may be read."""
    return os.access(path, os.R_OK) and path.stat().st_size == size


def check_space(folder, size, max_share):
    """Raise OSError if `size` bytes are more than a share of the free space of a folder's disk."""
    free = shutil.disk_usage(folder).free
    if size > max_share * free:
        raise OSError(
            f"{size / 2**30:.1f} GiB are more than {max_share:.0%} of the {free / 2**30:.1f} free; "
            "name another folder as data.cache"
        )


def memory_bytes():
    """The memory of this machine, or the limit of the container, in bytes."""
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        size = min(size, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return size


def warm_page_cache(path):
    """Read a file once, so the system holds it in memory."""
    with open(path, "rb", buffering=0) as file:
        block = bytearray(2**24)
        while file.readinto(block):
            pass


def decode_all(source, path, size):
    """Decode all images of a source, `size` bytes, in threads into a file; raises Undecodable."""
    with files.atomic_write(path) as part:
        with open(part, "wb") as file:
            # writing to a map of a file that the disk has no room for would kill the process
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


@contextlib.contextmanager
def thread_pool(count=None):
    """An executor of threads, by default one a core; an error drops what has not started.

    multiprocessing's needs semaphores, which need a writable /dev/shm.
    """
    pool = ThreadPoolExecutor(count or os.cpu_count())
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def map_in_threads(work, items, title):
    """`[work(item) for item in items]`, in threads, with a progress bar on a terminal."""
    results = []
    tasks = [items[k : k + ITEMS_PER_TASK] for k in range(0, len(items), ITEMS_PER_TASK)]
    bar = tqdm(desc=title, total=len(items), leave=False, disable=None, unit=" images")
    with thread_pool() as pool, bar:
        for part in pool.map(lambda task: [work(item) for item in task], tasks):
            results += part
            bar.update(len(part))
    return results


class MappedRows:
    """Images or batches by index from a file [n, c, h, w], which each process maps itself."""

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
