"""Rows of metrics.jsonl: what one may hold, and reading them back."""

import contextlib
import json
import math
import sys

MOST_STEPS = 2**53  # up to where JSON's numbers are exact


def plain(value):
    """A word as it is, or the number in a Python, numpy or torch scalar; None where it is not
    finite, which JSON cannot say.
    """
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, str) or math.isfinite(value) else None


def rows_of(path, last):
    """The rows of metrics.jsonl up to step `last`."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [row for row in map(whole_row, lines) if row and row["step"] <= last]


def whole_row(line):
    """The row in a line of metrics.jsonl: a step, and by name finite numbers, words and nulls.
    None for any other line.
    """
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line) if line.endswith(b"\n") else None
        is_row = (
            isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < MOST_STEPS
        )
        return row if is_row and all(map(is_plain, row.values())) else None


def is_plain(value):
    """True for what a row may hold. A comparison takes whole numbers of any length; a conversion
    would not.
    """
    return (
        value is None
        or type(value) is str
        or type(value) in (int, float)
        and abs(value) <= sys.float_info.max
    )
