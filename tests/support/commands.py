"""A command in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PYTHONPATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])  # of a script in tests/support


def run_ddpm(name, *flags, cwd):
    """Run a command as a command; its output lines and exit code."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", f"ddpm.{name}", *flags]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout.splitlines(), done.stderr.splitlines()
