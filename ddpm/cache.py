"""Decoded images in a file: uint8 rows under the fingerprint of their source, which all runs and ranks of a machine share.

A source decodes a photo each time it is asked for it; a row of the file is there at once, and what is read often stays in the
memory that the system has to spare. The file is built under a lock and renamed into place whole.
"""

import contextlib
import fcntl
import os
import shutil
from dataclasses import replace
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ddpm.files import make_folder, sync


def home():
    """Where caches lie: `$DDPM_CACHE`, else `~/.cache/ddpm`."""
    return Path(os.environ.get("DDPM_CACHE") or "~/.cache/ddpm").expanduser()


def decoded(source, folder=None):
    """The same source, its images read from a file in `folder`, by default below `home()`; the file is made if it is not there.

    Where the disk has no room for it or cannot be written, the source itself, with a note. Unasked, without a `folder`, at most
    a quarter of what is free is taken.
    """
    size, most = len(source) * int(np.prod(source.image_shape)), 0.9 if folder else 0.25
    folder = Path(folder or home() / "decoded")
    path = folder / f"{source.fingerprint}.u8"
    try:
        with alone(make_folder(folder) / f"{source.fingerprint}.lock"):
            if not path.exists() or path.stat().st_size != size:
                if size > most * (free := shutil.disk_usage(folder).free):
                    raise OSError(f"{size / 2**30:.1f} GiB are more than {most:.0%} of the {free / 2**30:.1f} free; name "
                                  "another folder as data.cache")
                build(source, path)
    except (OSError, ValueError) as error:
        return replace(source, notes=(*source.notes, f"images are decoded at each use, as {folder} cannot keep them: {error}"))
    note = f"decoded images: {path}, {size / 2**20:,.1f} MiB"
    return replace(source, fetch=Rows(path, (len(source), *source.image_shape)), notes=(*source.notes, note))


def build(source, path):
    """Decode all images of a source in threads into a file, whole or not at all."""
    part = path.with_suffix(".part")  # of a build that was killed too: the lock is ours
    try:
        rows = np.memmap(part, np.uint8, "w+", shape=(len(source), *source.image_shape))

        def decode(index):
            rows[index] = source[index].numpy()

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
def alone(path):
    """Wait until no other process is inside, and keep them outside; the system opens the lock when a process ends."""
    handle = os.open(path, os.O_CREAT | os.O_RDWR)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class Rows:
    """`rows(index)` is the image at an index from a file of shape [n, c, h, w], mapped once in each process that asks."""

    def __init__(self, path, shape):
        self.path, self.shape, self.rows = path, shape, None

    def __call__(self, index):
        if self.rows is None:
            self.rows = np.memmap(self.path, np.uint8, "r", shape=self.shape)
        return torch.from_numpy(self.rows[index].copy())

    def __getstate__(self):
        return {"path": self.path, "shape": self.shape, "rows": None}
