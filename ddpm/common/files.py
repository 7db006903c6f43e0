"""Atomic writes, locks, the cache folder, and facts cached there as JSON."""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
import sys
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path next to `path`, synced and renamed to `path` if the block succeeds.

    A reader, or a crash at any moment, finds the old file or the new one. If the block raises, the
    temporary file is removed. Raises ValueError where a file stands in the place of a folder.
    """
    path = Path(path)
    make_folder(path.parent)
    part = path.with_name(path.name + ".part")
    try:
        # a killed process left it; a file of another user cannot be written to
        part.unlink(missing_ok=True)
        yield part
        fsync(part)
        os.replace(part, path)
        fsync(path.parent)
    except OSError as error:
        if error.errno and not error.filename:  # a full disk does not say where
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(folder):
    """Yield a temporary folder that takes the place of `folder` if the block succeeds."""
    folder = Path(folder)
    make_folder(folder.parent)
    part, former = (folder.with_name(f"{folder.name}{suffix}.part") for suffix in ("", ".former"))
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield make_folder(part)
        if folder.exists():
            folder.rename(former)
        part.rename(folder)
        fsync(folder.parent)
    finally:
        if former.exists() and not folder.exists():
            former.rename(folder)
        for left in (part, former):
            shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def lock_folder(folder):
    """Hold an exclusive lock on a folder, creating it, and removing it if it stays empty.

    Raises ValueError if another process holds the lock, or a file is in the way. On NFS, which does
    not lock folders, a file `.lock` is locked. Lustre needs the mount option flock. A file system
    without locks excludes nobody.
    """
    new = [path for path in (Path(folder), *Path(folder).parents) if not path.exists()]
    folder = make_folder(folder)
    lock = folder / ".lock"
    with contextlib.ExitStack() as handles:
        for path, mode in ((folder, os.O_RDONLY), (lock, os.O_RDWR | os.O_CREAT)):
            handle = os.open(path, mode)
            handles.callback(os.close, handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                raise ValueError(
                    f"{folder} is in use by another process; wait for it, stop it, or use another "
                    "folder"
                ) from None
            except OSError:
                pass
        try:
            yield
        finally:
            if new and [*folder.iterdir()] == [lock]:
                lock.unlink()
            with contextlib.suppress(OSError):  # not empty
                for path in new:
                    path.rmdir()


def expand_user(path):
    """A path with `~` expanded; raises ValueError where the system knows no such home folder."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{str(path)!r} starts with a home folder that this system does not know; write the "
            "full path, or set HOME"
        ) from None


def make_folder(folder):
    """Create a folder and its parents and return its path; raises ValueError for a file there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"cannot write to {folder}: a file is in the way; choose another place"
        ) from None
    return Path(folder)


def fsync(path):
    """Wait until the content of a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256(file):
    """The SHA-256, in hex, of the content of an open binary file."""
    file.seek(0)
    digest = hashlib.sha256()
    while chunk := file.read(2**20):
        digest.update(chunk)
    return digest.hexdigest()


LOG = logging.getLogger(__name__)
WARNED = set()  # values of $DDPM_CACHE that a warning has named


def cache_dir():
    """The cache folder: `$DDPM_CACHE`, else `~/.cache/ddpm`; raises ValueError without a home."""
    return expand_user(os.environ.get("DDPM_CACHE") or "~/.cache/ddpm")


def cache_folder(name):
    """The folder `name` in `cache_dir()`, created with the permissions of its parent."""
    folder = cache_dir() / name
    if not folder.is_dir():
        make_folder(folder)
        with contextlib.suppress(PermissionError):  # another user created it first
            folder.chmod(stat.S_IMODE(folder.parent.stat().st_mode))
    return folder


@contextlib.contextmanager
def cached_json(name, reason="it reads the same files"):
    """Yield the dict cached under `name` in `cache_dir()`, and save it afterwards if it changed.

    One process at a time holds it; a process that waits prints `reason`. The dict is empty where
    none is cached or readable; where it cannot be saved, a warning says so.
    """
    with contextlib.ExitStack() as lock:
        with contextlib.suppress(OSError, ValueError):
            kind, _, file = name.rpartition("/")
            lock.enter_context(file_lock(cache_folder(kind) / f"{file}.json.lock", reason))
        content = read_cached_json(name)
        before = dict(content)
        yield content
        if content != before:
            write_cached_json(name, content)


def read_cached_json(name):
    """The dict cached under `name` in `cache_dir()`; empty where none is there or readable."""
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads((cache_dir() / f"{name}.json").read_text()))
    return {}


def write_cached_json(name, content):
    """Cache a dict under `name` in `cache_dir()`; where that fails, warn once per cache folder."""
    kind, _, file = name.rpartition("/")
    try:
        with atomic_write(cache_folder(kind) / f"{file}.json") as part:
            part.write_text(json.dumps(content))
    except (OSError, ValueError) as error:
        variable = os.environ.get("DDPM_CACHE")
        if variable not in WARNED:
            WARNED.add(variable)
            LOG.warning(
                "facts about files cannot be cached (%s) and are computed again each time; set "
                "DDPM_CACHE to a folder that you may write to",
                error,
            )


@contextlib.contextmanager
def file_lock(path, reason=""):
    """Hold an exclusive lock on a file; prints `reason`, if there is one, before it waits."""
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
    """Open a file to lock, created so that other users can lock it too; returns the handle."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    except PermissionError:  # a file that can only be read can be locked
        return os.open(path, os.O_RDONLY)
    with contextlib.suppress(OSError):  # the file of another user
        os.fchmod(handle, 0o666)
    return handle


def is_writable(folder):
    """Whether a folder can be written to, or created."""
    try:
        folder = expand_user(folder)
    except ValueError:
        return False
    return os.access(
        next(path for path in (folder, *folder.absolute().parents) if path.exists()), os.W_OK
    )
