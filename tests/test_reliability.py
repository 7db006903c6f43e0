"""Each fault of experiments/reliability, done once or twice, loses nothing; and its report
follows from the numbers alone.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from support.configs import module_of

RELIABILITY = Path(__file__).parents[1] / "experiments" / "reliability"
sys.path.append(str(RELIABILITY))
reliability = module_of(RELIABILITY / "run.py")


@pytest.mark.parametrize(
    "name", [name for name, fault in reliability.FAULTS.items() if fault.short]
)
def test_nothing_is_lost(name, tmp_path):
    if torch.cuda.is_initialized():
        pytest.skip(
            "a process that uses a GPU cannot be forked; python experiments/reliability/run.py can"
        )
    fault = reliability.FAULTS[name]
    found = fault.do(tmp_path, fault.short, 0)
    assert not found.lost and found.done >= fault.short


def test_the_report_follows_from_the_rows(tmp_path, monkeypatch, capsys):
    def do(folder, times, seed):
        assert folder.is_dir() and not list(folder.iterdir())
        return reliability.Found(times, lost, "9 figures")

    lost = []
    fault = reliability.Fault(do, "it was dropped", "it is whole", 20, 2)
    monkeypatch.setattr(reliability, "FAULTS", {"drop": fault, "throw": fault})
    monkeypatch.setattr(reliability, "isolated", lambda home: None)  # the tests are
    monkeypatch.setattr(reliability, "commit", lambda: "1234567")
    assert reliability.main([f"--out={tmp_path}", "--short", "--only=throw"]) == 0
    assert reliability.main([f"--out={tmp_path}", "--short"]) == 0
    # the second time it was there already
    assert capsys.readouterr().out.count("throw: 2 of 2 times") == 1
    text = (tmp_path / "README.md").read_text()
    kept = json.loads((tmp_path / "results.json").read_text())
    assert (
        list(kept) == ["drop", "throw"]
        and "| drop | it was dropped | 2 | it is whole | nothing | 9 figures |" in text
    )
    assert "2 kinds of fault were done 4 times in all, and nothing was lost." in " ".join(
        text.split()
    )

    lost.append("a handle")
    assert reliability.main([f"--out={tmp_path}", "--only=drop"]) == 1
    text = (tmp_path / "README.md").read_text()
    assert "| drop | it was dropped | 20 | it is whole | lost: a handle | 9 figures |" in text
    assert "lost in 1 of them: drop." in " ".join(text.split())
    monkeypatch.setattr(reliability, "FAULTS", {"broken": fault._replace(do=lambda *_: 1 // 0)})
    assert (
        reliability.main([f"--out={tmp_path}"]) == 1
        and "ZeroDivisionError" in (tmp_path / "README.md").read_text()
    )
    with pytest.raises(SystemExit):
        reliability.main(["--only=nothing of that name"])
    assert (
        "there is no fault 'nothing of that name'; choose one of broken" in capsys.readouterr().err
    )
