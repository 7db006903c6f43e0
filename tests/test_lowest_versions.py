"""The committed report on the lowest versions is about those that setup.py names today."""

import re
from pathlib import Path

from packaging.version import Version

ROOT = Path(__file__).parents[1]


def test_the_floors_of_setup_py_were_installed_and_tested():
    floors = dict(re.findall(r'"([\w-]+)>=([\d.]+)', (ROOT / "setup.py").read_text()))
    report = (ROOT / "experiments" / "lowest_versions" / "README.md").read_text()
    tested = dict(re.findall(r"\| `([\w-]+)` \| ([\d.]+) \|", report))
    # not among the requirements of the tests, as setup.py says, and tools that run no code of ours
    del floors["mosaicml-streaming"], floors["import-linter"], floors["mypy"]
    for name, floor in floors.items():
        # a floor may be the release that mends a fault, such as 1.11.1
        lowest = Version(floor).release
        assert Version(tested[name]).release[: len(lowest)] == lowest, (
            f"run experiments/lowest_versions/run.py again for {name}"
        )
    assert " 0 failed" in report
