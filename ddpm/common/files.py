"""Files that are never half-written: written beside, synced to the disk, then renamed into
place.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import stat
import sys
from pathlib import Path


@contextlib.contextmanager
def atomic_write(path):
    """Give a name beside `path` to write to, put in the place of `path` when the block ends well
    and removed when it does not.

    A reader sees the old file or the new one, whole, whenever the process or the machine stops.
    Raises ValueError where a file stands in the place of a folder.
    """
    path = Path(path)
    make_folder(path.parent)
    part = path.with_name(path.name + ".part")
    try:
        # of a process that was killed: another user's may not be written to
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
    """The same for a new folder: give one beside `folder` to write into, which takes its place
    when the block ends well.
    """
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
    """Keep a folder for this process while the block runs; it is made, and goes again if nothing
    came into it.

    Raises ValueError where another process holds it, or where a file is in the way. The system lets
    go of it when a process ends, however it ends. Between machines that share a folder this relies
    on flock being passed on: NFS does it (Linux, unless mounted with local_lock or nolock) for
    files that are open for writing, not for folders, so there a file `.lock` is locked; Lustre
    needs the option flock. Where a file system has no locks at all nobody is kept out.
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
    """A path with the home folder in place of its `~`; raises ValueError where the system knows
    no such folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{str(path)!r} begins at a home folder that is not known here; write the whole path, "
            "or set HOME"
        ) from None


def make_folder(folder):
    """Make a folder, with those above it, and return its path; raises ValueError where a file is
    in the way.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ValueError(
            f"cannot write to {folder}: a file is in the way; choose another place"
        ) from None
    return Path(folder)


def fsync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


LOG = logging.getLogger(__name__)
WARNED = set()  # values of $DDPM_CACHE that a warning has named


def cache_dir():
    """Where caches lie: `$DDPM_CACHE`, else `~/.cache/ddpm`; raises ValueError where no such
    folder is known.
    """
    return expand_user(os.environ.get("DDPM_CACHE") or "~/.cache/ddpm")


def cache_folder(name):
    """A folder below `home()`, made if it is not there: who may write to the one may write to
    the other, whatever the umask.
    """
    folder = cache_dir() / name
    if not folder.is_dir():
        make_folder(folder)
        with contextlib.suppress(PermissionError):  # another user was faster
            folder.chmod(stat.S_IMODE(folder.parent.stat().st_mode))
    return folder


@contextlib.contextmanager
def cached_json(name, reason="it reads the same files"):
    """A dict that lasts under a name below `home()`: one process has it at a time, and what is in
    it afterwards is kept.

    Empty where there is none yet or it cannot be read, and lost again, with a warning, where it
    cannot be written.
    """
    with contextlib.ExitStack() as lock:
        with contextlib.suppress(OSError, ValueError):
            kind, _, file = name.rpartition("/")
            lock.enter_context(file_lock(cache_folder(kind) / f"{file}.json.lock", reason))
        found = read_cached_json(name)
        before = dict(found)
        yield found
        if found != before:
            write_cached_json(name, found)


def read_cached_json(name):
    """The dict that is kept under a name below `home()`; empty where there is none, or it cannot
    be read.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, RecursionError):
        return dict(json.loads((cache_dir() / f"{name}.json").read_text()))
    return {}


def write_cached_json(name, content):
    """Keep a dict under a name below `home()`; where that cannot be done, a warning says so."""
    kind, _, file = name.rpartition("/")
    try:
        with atomic_write(cache_folder(kind) / f"{file}.json") as part:
            part.write_text(json.dumps(content))
    except (OSError, ValueError) as error:
        if (given := os.environ.get("DDPM_CACHE")) not in WARNED:
            WARNED.add(given)
            LOG.warning(
                "what is found out about files cannot be kept (%s), and is found out again each "
                "time; name a folder that you may write to as DDPM_CACHE",
                error,
            )


@contextlib.contextmanager
def file_lock(path, reason=""):
    """Wait until no one else is inside, for a reason that is said if given, and keep them out; a
    lock dies with its process.
    """
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


def is_writable(folder):
    """Whether a folder can be written to, or made."""
    try:
        folder = expand_user(folder)
    except ValueError:
        return False
    return os.access(
        next(path for path in (folder, *folder.absolute().parents) if path.exists()), os.W_OK
    )
