"""Files that are never half-written: written beside, synced to the disk, then renamed into place."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def written_beside(path):
    """Give a name beside `path` to write to, put in the place of `path` when the block ends well and removed when it does not.

    A reader sees the old file or the new one, whole, whenever the process or the machine stops. Raises ValueError where a file
    stands in the place of a folder.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(f"cannot write to {path.parent}: a file is in the way; choose another place") from None
    part = path.with_name(path.name + ".part")
    try:
        yield part
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
