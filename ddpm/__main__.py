"""The program `ddpm`, also `python -m ddpm`: `ddpm train --config=...` runs `ddpm.main` with these
flags, and `ddpm` alone lists the commands.
"""

import ast
import runpy
import signal
import sys
from pathlib import Path

from ddpm import __version__
from ddpm.common import errors
from ddpm.common.registry import check_choice
from ddpm.runtime import signals

COMMANDS = {  # the module of each
    "train": "main",
    "generate": "generate",
    "sample": "sample",
    "evaluate": "evaluate",
    "plan": "plan",
    "doctor": "doctor",
    "sweep": "sweep",
    "compare": "compare",
    "dashboard": "dashboard",
    "convert": "convert",
}


def path_of(name):
    """The file of a command's module."""
    return Path(__file__).with_name(f"{COMMANDS[name]}.py")


def listing():
    """Yield one line per command, from the docstring of its module alone."""
    for name in COMMANDS:
        described = ast.get_docstring(ast.parse(path_of(name).read_text())).splitlines()[0]
        yield f"  ddpm {name:10} {described.split('`')[0].rstrip(' :')}"


def main():
    """Run the command that the command line names; it ends the process with its exit code."""
    signals.handle(signals.end_before_start)
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h", "help"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as `head` may go away
        print("Commands, each with --help:", *listing(), sep="\n")
        print("Each is also a module: python -m ddpm.main trains, python -m ddpm.generate draws.")
        return errors.DONE
    if name == "--version":
        print(f"ddpm {__version__}")
        return errors.DONE
    try:
        check_choice("command", name, COMMANDS)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return errors.USAGE_ERROR
    # as if it were started by `python -m`, which decides the exit code of an interruption
    sys.orig_argv[1:] = ["-m", f"ddpm.{COMMANDS[name]}", *arguments]
    sys.argv = [str(path_of(name)), *arguments]
    runpy.run_module(f"ddpm.{COMMANDS[name]}", run_name="__main__", alter_sys=True)
    return errors.DONE


if __name__ == "__main__":
    sys.exit(main())
