"""Nonsense is used or refused in one line: what hypothesis found once, and a little more each
time.
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "experiments" / "reliability"))
import fuzz

CORPUS = [  # what was not, once
    ("studies", [[("flip", 0.5, 0)]]),  # said what was wrong, and not what to do
    ("studies", [[("insert", 0.0, 0)]]),
    ("studies", [[("flip", 0.5078125, 0)]]),
    ("studies", [[("flip", 0.96875, 0)]]),  # in ml_collections' words
    ("studies", [[("flip", 0.953125, 2)]]),  # a config that is not given once
    # a flag that does not exist, in absl's words
    ("studies", [[("repeat", 0.0, 36), ("repeat", 0.9375, 17)]]),
    # in a line of 24,000 characters
    ("compared rows", [[], {2: {"eval/protocol": "d, 1 steps, " * 2000}}]),
]
TIMES = {
    "configs": 8,
    "images": 60,
    "rows": 60,
    "compared rows": 20,
    "studies": 40,
    "saved configs": 60,
    "weights": 60,
}


@pytest.mark.parametrize("kind, arguments", CORPUS)
def test_what_was_found(kind, arguments, tmp_path):
    fuzz.KINDS[kind][1](*arguments, tmp_path)


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_a_little_more(kind, tmp_path):
    found = fuzz.fuzz(kind)(tmp_path, TIMES[kind], 0)
    assert not found.lost and found.done >= TIMES[kind]
