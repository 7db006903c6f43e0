"""Rows of metrics.jsonl: which values a row may hold, and reading rows back."""

import contextlib
import json
import math
import sys

MOST_STEPS = 2**53  # JSON's numbers are exact up to here


def plain(value):
    """A string as it is, else a Python, numpy or torch scalar as a number, None if not finite."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, str) or math.isfinite(value) else None


def rows_of(path, last):
    """The valid rows of metrics.jsonl up to step `last`, in the order of the file."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    return [row for row in map(parse_row, lines) if row and row["step"] <= last]


def parse_row(line):
    """The row in a line (bytes) of metrics.jsonl; None unless it has a step and plain values."""
    with contextlib.suppress(ValueError, RecursionError):
        row = json.loads(line) if line.endswith(b"\n") else None
        is_row = (
            isinstance(row, dict) and type(row.get("step")) is int and 0 <= row["step"] < MOST_STEPS
        )
        return row if is_row and all(map(is_plain, row.values())) else None


def is_plain(value):
    """Whether a row may hold a value. Comparing takes integers of any size; float() would not."""
    return (
        value is None
        or type(value) is str
        or type(value) in (int, float)
        and abs(value) <= sys.float_info.max
    )
