"""A command in a process of its own."""

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # of a script in tests/support


@functools.cache
def python():
    """The path of an interpreter, named `python`, that has the libraries when it starts, as a fork
    of a process that has them; there is one for each process of the tests.
    """
    folder = Path(tempfile.mkdtemp())
    source = Path(__file__).with_name("standin.py").read_text()
    standin = folder / "python"
    standin.write_text(f"#!{sys.executable} -IS\n{source}")
    standin.chmod(0o755)
    launcher = subprocess.Popen(
        [sys.executable, Path(__file__).with_name("launcher.py"), folder / "socket", standin],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    atexit.register(shutil.rmtree, folder)
    atexit.register(launcher.communicate)  # it ends with its stdin
    assert launcher.stdout.readline(), "the launcher has not started"
    return str(standin)


def run_ddpm(name, *flags, cwd):
    """Run a command of the package; returns its exit code and the lines of stdout and stderr."""
    code, out, err = outcome_of(name, *flags, cwd=cwd)
    return code, out.splitlines(), err.splitlines()


def outcome_of(name, *flags, cwd, **environment):
    """The same with stdout and stderr as text."""
    done = subprocess.run(
        [python(), "-m", f"ddpm.{name}", *map(str, flags)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr
