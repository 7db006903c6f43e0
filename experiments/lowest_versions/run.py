"""Do the lowest versions that setup.py names work together? `python
experiments/lowest_versions/run.py --python=python3.10`.

A virtual environment with just these is made in a temporary folder (or --folder, where it stays and
is used again), the quick tests run in it, and README.md says what came of it. Needs `pip install
uv`, a network, and 8 GB of disk. Exit code 1 where a test fails.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
QUICK = [
    "training/golden",
    "training/exact",
    "training/checkpoint",
    "data/colour",
    "data/decode",
    "data/sources",
    "commands/doctor",
    "common/files",
    "common/registry",
    "common/rng",
    "diffusion/schedules",
    "diffusion/samplers",
    "common/pixels",
    "models/networks",
    "models/dit",
    "training/ema",
    "training/optim",
    "runtime/compile",
    "runtime/out_of_memory",
    "evaluation/distances",
    "tracking/tracker",
    "studies/study",
    "studies/runner",
    "commands/plan",
    "commands/dashboard",
]


def uv(*words):
    """Run uv; returns what it says."""
    command = [sys.executable, "-m", "uv", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def environment(folder, python):
    """(its Python, the text that pins every package) of an environment where direct requirements
    have their lowest versions.
    """
    made = folder / "bin" / "python"
    if not made.exists():
        uv("venv", "--quiet", "--python", python, folder)
    pinned = uv(
        "pip",
        "compile",
        "--quiet",
        "--resolution",
        "lowest-direct",
        "--python",
        made,
        "setup.py",
        "--extra",
        "test",
    )
    (folder / "pinned.txt").write_text(pinned)
    uv("pip", "sync", "--quiet", "--python", made, folder / "pinned.txt")
    return made, pinned


def tested(python, folder):
    """The cases of the quick tests: (file, name, "passed", "failed" or "skipped", message)."""
    files = ["tests/{}/test_{}.py".format(*name.split("/")) for name in QUICK]
    command = [
        python,
        "-m",
        "pytest",
        "-n",
        "0",
        "-q",
        "--tb=short",
        f"--junitxml={folder / 'tests.xml'}",
        *files,
    ]
    subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    )
    for case in xml.parse(folder / "tests.xml").iter("testcase"):
        said = {child.tag: child.get("message", "") for child in case}
        outcome = (
            "failed"
            if said.keys() & {"failure", "error"}
            else "skipped"
            if "skipped" in said
            else "passed"
        )
        yield (
            case.get("classname").split(".")[-1],
            case.get("name"),
            outcome,
            " ".join("".join(said.values()).split())[:200],
        )


def report(python, pinned, cases):
    """The text of README.md."""
    direct = re.findall(r'"([\w-]+)>=', (ROOT / "setup.py").read_text())
    versions = dict(re.findall(r"^([\w-]+)==(\S+)", pinned, re.M))
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    said = subprocess.run([python, "--version"], capture_output=True, text=True).stdout.strip()
    count = Counter(outcome for _, _, outcome, _ in cases)
    rows = [
        f"| `{name}` | {versions[name]} |" for name in dict.fromkeys(direct) if name in versions
    ]
    failed = [
        f"- `{file}::{name}`: {message}"
        for file, name, outcome, message in cases
        if outcome == "failed"
    ]
    return "\n".join(
        [
            "# The lowest versions that setup.py names",
            "",
            f"`python experiments/lowest_versions/run.py` at commit {commit}: {said}, "
            f"{os.cpu_count()} CPU cores.",
            "",
            f"**{count['passed']} tests passed, {count['failed']} failed, {count['skipped']} were "
            f"skipped**, of {len(QUICK)} quick files of tests ({', '.join(QUICK)}).",
            "",
            *failed,
            *[""] * bool(failed),
            "Installed by `uv pip compile --resolution lowest-direct`: direct requirements as low "
            "as they are allowed, those of others as new as they fit.",
            "",
            "| package | version |",
            "|---|---|",
            *rows,
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--python",
        default="python3.10",
        help="the interpreter, the lowest of setup.py's python_requires",
    )
    parser.add_argument("--folder", type=Path, help="where the environment lies and stays")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary) / "environment"
        python, pinned = environment(folder.absolute(), given.python)
        cases = list(tested(python, folder.absolute()))
        (HERE / "README.md").write_text(report(python, pinned, cases))
    return int(any(outcome == "failed" for _, _, outcome, _ in cases))


if __name__ == "__main__":
    sys.exit(main())
