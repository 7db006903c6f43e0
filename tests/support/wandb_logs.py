"""What the W&B client wrote into a run folder, read as `wandb sync` does."""

import json
import re
import subprocess

import pytest
from wandb.util import get_core_path


def lines(folder):
    """The rows of metrics.jsonl, by a parser that refuses NaN as strict JSON does."""
    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=pytest.fail) for line in text.splitlines()]


def records(log):
    # as `wandb leet`, without Python
    command = [get_core_path(), "leet", "inspect", "--json", "--run-file", str(log)]
    return [
        json.loads(line)
        for line in subprocess.run(command, check=True, capture_output=True).stdout.splitlines()
    ]


def segments(folder):
    logs = folder.glob("wandb/offline-run-*/run-*.wandb")
    return [records(log) for log in sorted(logs, key=lambda log: log.stat().st_ctime)]


def synced(folder):
    """The history that `wandb sync` makes of the segments: each drops the rows after its branch
    point and appends its own.
    """
    history = []
    ids = set()
    for segment in segments(folder):
        for record in segment:
            if "run" in record:
                ids.add(record["run"]["run_id"])
                if "branch_point" in record["run"]:
                    until = record["run"]["branch_point"].get("value", 0)
                    history = [row for row in history if row["_step"] <= until]
            history += [record["history"]["item"]] if "history" in record else []
    assert len(ids) == 1, f"one run, one id; got {ids}"
    return history


def rows_of(history):
    """W&B's rows as metrics.jsonl writes them, checked to lie at the training step."""
    kept = []
    for row in history:
        assert row["_step"] == row["train/step"]
        inner = {
            key: value
            for key, value in row.items()
            if not re.match(r"_|train/step$|samples\.", key)
        }
        kept.append({"step": row["train/step"], **inner})
    return kept
