"""A command in a process of its own."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # of a script in tests/support


@functools.cache
def launcher():
    """The process that forks commands, one for each process of the tests; it ends with them."""
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("launcher.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def run_ddpm(name, *flags, cwd):
    """Run a command of the package; returns its exit code and the lines of stdout and stderr."""
    code, out, err = outcome_of(name, *flags, cwd=cwd)
    return code, out.splitlines(), err.splitlines()


def outcome_of(name, *flags, cwd):
    """The same with stdout and stderr as text."""
    with tempfile.TemporaryDirectory() as folder:
        files = {key: Path(folder, key) for key in ("out", "err")}
        request = {
            "module": f"ddpm.{name}",
            "flags": list(map(str, flags)),
            "cwd": str(cwd),
            "env": os.environ | {"PYTHONPATH": str(ROOT)},
            **{key: str(path) for key, path in files.items()},
        }
        process = launcher()
        print(json.dumps(request), file=process.stdin, flush=True)
        code = int(process.stdout.readline())
        return code, *(path.read_text() for path in files.values())
