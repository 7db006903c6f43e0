"""SIGKILL between and during saves: the same command goes on to the same weights, rows and pictures."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import rows, run, tiny
from test_train import assert_same_run

POINTS = {
    "fsync of file or folder": ["fsync:1", "fsync:2", "fsync:5", "fsync:8"],
    "rename": ["replace:1", "replace:3", "replace:4", "replace:6"],
    "deleting the old checkpoint": ["unlink:3", "unlink:6", "unlink:9"],
    "half a checkpoint written": ["save:1", "save:2", "save:3", "save:1"],
    "at any time": ["0.05", "0.3", "0.6", "0.9", "1.2", "0.7"],
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    run(tiny(train__length="30 steps", every__milestone="20 steps"), folder)
    return folder


@pytest.mark.parametrize("where", POINTS)
def test_killed_and_run_again(where, whole, tmp_path):
    command = [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path), *POINTS[where]]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    killed = int(done.stdout.split()[-1])
    assert killed >= len(POINTS[where]) // 2  # a child may end before its point, when the others left it little to do
    assert_same_run(whole, tmp_path, "step_00000030.png")
    assert rows(whole) == rows(tmp_path)
    assert not list(tmp_path.rglob("*.pt.part"))
