"""Files that are never half-written."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddpm.common.files import atomic_write, fsync, lock_folder

ROOT = str(Path(__file__).parents[2])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_file_and_its_folders_appear_when_the_block_ends(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    with atomic_write(path) as part:
        assert part.parent == path.parent and part != path
        part.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new" and names(path.parent) == ["file.txt"]


def test_a_reader_sees_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old, whole")
    with open(path) as reader:
        with atomic_write(str(path)) as part:
            for piece in ("new, ", "also ", "whole"):
                with open(part, "a") as file:
                    file.write(piece)
                assert path.read_text() == "old, whole"
        assert path.read_text() == "new, also whole" and reader.read() == "old, whole"
    assert names(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("problem", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_the_old_file_stays_when_the_block_raises(tmp_path, problem):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(problem), atomic_write(path) as part:
        part.write_text("half")
        raise problem
    assert path.read_text() == "old" and names(tmp_path) == ["file.txt"]


def test_nothing_is_left_of_a_new_file_when_the_block_raises(tmp_path):
    with pytest.raises(RuntimeError), atomic_write(tmp_path / "file.txt") as part:
        part.write_text("half")
        raise RuntimeError
    assert names(tmp_path) == []


def test_what_a_killed_process_left_behind_does_no_harm(tmp_path):
    (tmp_path / "file.txt.part").write_text("torn, and longer than what is written now")
    with atomic_write(tmp_path / "file.txt") as part:
        part.write_text("new")
    assert (tmp_path / "file.txt").read_text() == "new" and names(tmp_path) == ["file.txt"]


@pytest.mark.skipif(
    not os.path.exists("/proc/self/fd"), reason="names of open files are read from /proc"
)
def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """File synced, then renamed, then the folder synced: the order in which a power cut loses
    nothing.
    """
    events = []
    fsync = os.fsync
    replace = os.replace

    def noting_fsync(handle):
        events.append(os.path.basename(os.readlink(f"/proc/self/fd/{handle}")))
        fsync(handle)

    def noting_replace(part, path):
        events.append("renamed")
        replace(part, path)

    monkeypatch.setattr(os, "fsync", noting_fsync)
    monkeypatch.setattr(os, "replace", noting_replace)
    with atomic_write(tmp_path / "run" / "file.txt") as part:
        part.write_text("new")
    assert events == ["file.txt.part", "renamed", "run"]


@pytest.mark.parametrize("below", ["file.txt", "deeper/file.txt"])
def test_a_file_in_the_place_of_a_folder_is_one_line(tmp_path, below):
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(ValueError) as caught, atomic_write(tmp_path / "runs" / below):
        raise AssertionError("the block must not run")
    line = str(caught.value)
    assert "a file is in the way" in line and str(tmp_path / "runs") in line and "\n" not in line


def test_sync_takes_files_and_folders(tmp_path):
    (tmp_path / "file").write_text("x")
    fsync(tmp_path / "file")
    fsync(tmp_path)


def test_a_folder_is_held_by_one_process_at_a_time(tmp_path):
    folder = tmp_path / "runs" / "a"
    with lock_folder(folder):
        command = [
            sys.executable,
            "-c",
            "import sys; from ddpm.common.files import lock_folder\nwith "
            "lock_folder(sys.argv[1]): pass",
            str(folder),
        ]
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True
        )
        assert done.returncode == 1 and "is in use by another process; wait for it" in done.stderr
    assert not (tmp_path / "runs").exists()  # nothing came into it
    with lock_folder(folder):
        (folder / "file").touch()
    with lock_folder(folder):
        pass
    assert (folder / "file").exists()


def test_where_folders_cannot_be_locked_a_file_in_them_is(tmp_path, monkeypatch):
    """As on NFS, which locks what is open for writing."""
    flock = fcntl.flock

    def of_nfs(handle, how):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(handle, how)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    with lock_folder(tmp_path / "a"):
        with (
            pytest.raises(ValueError, match="is in use by another process"),
            lock_folder(tmp_path / "a"),
        ):
            raise AssertionError("the block must not run")
    assert names(tmp_path) == []
    with lock_folder(tmp_path / "a"):
        (tmp_path / "a" / "file").touch()
    assert names(tmp_path / "a") == [".lock", "file"]
