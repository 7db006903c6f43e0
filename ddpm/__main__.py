"""`python -m ddpm` lists the commands, each with the first sentence of its module."""

import ast
import signal
from pathlib import Path

COMMANDS = (
    "main",
    "generate",
    "sample",
    "evaluate",
    "plan",
    "doctor",
    "sweep",
    "compare",
    "dashboard",
    "convert",
)


def listing():
    """A line for each command, from its docstring alone: nothing is imported."""
    for name in COMMANDS:
        described = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text()))
        yield f"  python -m ddpm.{name:10} {described.splitlines()[0].split('`')[0].rstrip(' :')}"


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as `head` may go away
    print("Commands, each with --help:", *listing(), sep="\n")
