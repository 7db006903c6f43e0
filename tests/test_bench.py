"""The benchmarks run, at a size that says nothing, and their reports follow from the numbers
alone.
"""

import csv
import importlib
import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from support.configs import module_of

EXPERIMENTS = Path(__file__).parents[1] / "experiments"
PEERS = ("accelerate", "denoising_diffusion_pytorch", "diffusers")
among_peers = pytest.mark.skipif(
    not all(map(find_spec, PEERS)), reason="needs pip install -e '.[bench]'"
)


@pytest.fixture(params=["throughput", "time_to_quality"])
def alone(request, monkeypatch):
    """A benchmark where none of the peers is installed, and a copy of what was committed of it."""
    for peer in PEERS:
        monkeypatch.setitem(sys.modules, peer, None)
    monkeypatch.syspath_prepend(EXPERIMENTS / request.param)
    for name in ("contenders", "words"):  # as another test left them
        monkeypatch.delitem(sys.modules, name, raising=False)
    folder = shutil.copytree(
        EXPERIMENTS / request.param, request.getfixturevalue("tmp_path") / "copy"
    )
    return module_of(EXPERIMENTS / request.param / "run.py"), folder


def refused(bench, capsys, *arguments):
    """The line in which a benchmark refuses arguments."""
    with pytest.raises(SystemExit, match="2"):
        bench.main(arguments)
    usage, _, line = capsys.readouterr().err.rpartition("error: ")
    assert usage.startswith("usage: ") and line.count("\n") == 1
    return line


def test_without_the_peers_there_are_reports_and_a_line_that_says_what_to_install(alone, capsys):
    bench, folder = alone
    before = (folder / "README.md").read_text()
    (folder / "README.md").unlink()
    bench.main(["--report", f"--out={folder}"])
    assert (folder / "README.md").read_text() == before
    with pytest.raises(SystemExit, match="0"):
        bench.main(["--help"])
    line = refused(bench, capsys, f"--out={folder}")
    assert "denoising_diffusion_pytorch" in line and "pip install -e '.[bench]'" in line
    for path in (*folder.glob("results.json"), *folder.glob("made.json")):
        path.write_text(path.read_text()[:300])
    assert "no report can be made of " in refused(bench, capsys, "--report", f"--out={folder}")


def test_threads_that_cannot_be_are_refused(capsys, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS / "throughput")
    assert "--threads is 1 to " in refused(
        module_of(EXPERIMENTS / "throughput" / "run.py"), capsys, "--threads=0"
    )


def test_host_time(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS / "throughput")
    host = module_of(EXPERIMENTS / "throughput" / "host.py")
    host.main(["--rounds=1", "--steps=2", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "host.json").read_text())
    assert [row["structure"] for row in found["rows"]] == sorted(host.STRUCTURES)
    for row in found["rows"]:
        assert 0 < row["ms"]["forward"] < row["ms"]["step"] > row["ms"]["backward"] > 0
    small, large = sorted(found["rows"], key=lambda row: row["modules"])
    assert (small["structure"], large["structure"]) == ("digits", "ddpm_cifar10")
    assert small["tensors"] > 100 and large["tensors"] > 200
    monkeypatch.delitem(sys.modules, "words", raising=False)
    monkeypatch.delitem(sys.modules, "contenders", raising=False)
    text = importlib.import_module("words").host_part(tmp_path)
    assert all(f"| {row['ms']['step']:.2f} |" in text for row in found["rows"])


@among_peers
def test_throughput(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS / "throughput")
    bench, data = (module_of(EXPERIMENTS / "throughput" / f"{name}.py") for name in ("run", "data"))
    bench.main(["--toy", f"--out={tmp_path}"])
    found = json.loads((tmp_path / "results.json").read_text())
    text = (tmp_path / "README.md").read_text()
    ours, theirs, other = found["steps"][:3]
    assert [ours["contender"], theirs["contender"], other["contender"]] == list(bench.CONTENDERS)
    assert (ours["parameters"], ours["flops"]) == (theirs["parameters"], theirs["flops"])
    for row in found["steps"]:
        # weights, their average and Adam's two
        assert row["peak_bytes"] > 4 * 4 * row["parameters"]
        assert min(row["seconds"]) > 0
    spent = found["stages"][0]["seconds"]
    assert (
        min(spent.values()) > 0
        and spent["noise, network, loss"] + spent["backward"] > sum(spent.values()) / 2
    )
    assert all(row["evaluations"] == 5 for row in found["draws"]) and len(found["draws"]) == 5
    assert all(
        0 < inside < whole
        for row in found["draws"]
        for inside, whole in zip(row["network_seconds"], row["seconds"], strict=True)
    )
    assert "MFU" not in text or found["made"]["peaks"]

    bench.main(["--report", f"--out={tmp_path}"])
    assert (tmp_path / "README.md").read_text() == text
    row = next(row for row in found["steps"] if row["contender"] == "diffusers")
    ratio = row["seconds"][0] / found["steps"][0]["seconds"][0]
    assert f"diffusers takes {ratio:.2f} (" in " ".join(text.split())

    found["made"]["peaks"] = {"float32": 1e12}  # as on a GPU that is known
    (tmp_path / "results.json").write_text(json.dumps(found))
    data.main(["--toy", f"--out={tmp_path}"])
    found_data = json.loads((tmp_path / "data.json").read_text())
    (row,) = found_data["rows"]
    assert min(row["seconds"].values()) > 0
    rates = row["images a second"]
    assert row["times as many"]["median"] == rates["map"] / rates["ImageFolder, 0 workers"] > 1
    row["times as many"] = row["times as many, as numbers"] = {
        "median": 31.04,
        "least": 30,
        "most": 33,
    }
    rates["map"] = 12345.6
    (tmp_path / "data.json").write_text(json.dumps(found_data))
    bench.main(["--report", f"--out={tmp_path}"])
    text = (tmp_path / "README.md").read_text()
    assert f"data.py` at commit {found_data['commit']}, cores " in text
    assert (
        f"{found['steps'][0]['batch'] / found['steps'][0]['seconds'][0] * found['steps'][0]['flops'] / 1e12:.1%}"
        in text
    )
    assert (
        f"| 12,346 | {rates['ImageFolder, 0 workers']:,.0f} (0 workers) | 31.0 (30.0 to 33.0) |"
        in text
    )
    assert "31 to 31 times as many" in " ".join(text.split())


@among_peers
@pytest.mark.filterwarnings("ignore:'pin_memory'")  # of the peer's loader, without a GPU
def test_time_to_quality(tmp_path):
    bench = module_of(EXPERIMENTS / "time_to_quality" / "run.py")
    bench.main(["--toy", f"--out={tmp_path}"])
    text = (tmp_path / "README.md").read_text()
    with (tmp_path / "results.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["steps"]) for row in rows if row["recipe"] == bench.OURS] == [2, 2, 4, 4, 6]
    assert len([row for row in rows if row["recipe"] == bench.PEER]) == len(
        bench.TOY.points
    ) - 1 + len(bench.TOY.samplers)
    assert all(float(row["fd_digits"]) > 1 and float(row["cpu_seconds"]) > 0 for row in rows)

    for row in rows:  # ours is nearer from 4 steps on, in half of the time
        steps = int(row["steps"])
        peer = row["recipe"] == bench.PEER
        row["fd_digits"], row["cpu_seconds"] = (
            (9, 480) if peer else (5 if steps > 2 else 12, 60 * steps)
        )
    with (tmp_path / "results.csv").open("w") as lines:
        writer = csv.DictWriter(lines, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    bench.main(["--report", f"--out={tmp_path}"])
    assert (tmp_path / "README.md").read_text() != text
    assert (
        "in each of 2 seeds after 240 CPU seconds, 4 steps (5.00): 1 / 2.0 of the time"
        in " ".join((tmp_path / "README.md").read_text().split())
    )
