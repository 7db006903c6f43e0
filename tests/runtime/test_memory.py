"""What is counted on fake tensors is what a training step takes, and levels that are computed
twice give the same numbers.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch

from ddpm.config import files
from ddpm.experiment import build, load, memory
from ddpm.models import layers
from ddpm.runtime import device
from ddpm.runtime import memory as runtime_memory
from support.configs import module_of
from support.runs import TINY, rows, run, tiny

HERE = Path(__file__).parents[2] / "experiments" / "memory"
MEASURE = module_of(HERE / "measure.py")
WIDE = dict(model__model_channels=32, train__batch_size=16, diffusion__timesteps=20)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model__name": "dit(depth=3, width=64, heads=2)"},
        {"train__gradient_accumulation_steps": 2},
        {"model__name": "unet_edm2"},
        {
            "diffusion__weighting": "uncertainty",
            "model__dropout": 0.1,
            "diffusion__self_condition": True,
        },
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("levels", [0, 99])
def test_the_account_of_a_step_is_what_the_profiler_sees(options, dtype, levels):
    able = dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if not able and not options.get("model__name", "").startswith("dit"):
        pytest.skip(
            "this CPU unfolds images for its convolutions in bfloat16, nine times as large, as no "
            "GPU does"
        )
    given = tiny(**WIDE | options)
    images = given.train.batch_size // given.train.gradient_accumulation_steps
    found = memory.estimate(given, dtype, images, levels)
    machine = device.Machine(torch.device("cpu"), dtype)
    assert found.total == pytest.approx(MEASURE.measured(given, machine, levels), rel=0.1)
    weights = sum(map(runtime_memory.size_of, build.network(given).state_dict().values()))
    assert (
        found.weights >= weights
        and found.averages == weights
        and found.optimizer >= 2 * weights * 0.99
    )


@pytest.mark.parametrize("parts, bytes_more", [(1, 600), (2, 1000)])
def test_ranks_keep_buckets_of_which_gradients_are_views(parts, bytes_more):
    """The gradients of a batch in several parts are apart from the buckets until the last part."""
    found = runtime_memory.Account(1000, 1000, 2000, 400, 3000, 100, [], None)
    given = tiny(train__gradient_accumulation_steps=parts)
    assert memory.bytes_per_gpu(given, found, ranks=1) == found.total
    assert memory.bytes_per_gpu(given, found, ranks=2) == found.total + bytes_more


def test_the_report_of_memory_follows_from_its_rows_alone(tmp_path, capsys):
    """As committed; a damaged file is one line."""
    for name in ("results.json", "README.md"):
        shutil.copy(HERE / name, tmp_path)
    MEASURE.main(["--report", f"--out={tmp_path}"])
    assert (tmp_path / "README.md").read_text() == (HERE / "README.md").read_text()
    (tmp_path / "results.json").write_text('[{"network": "digits"')
    for wrong in ("--report", "--only=nothing"):
        with pytest.raises(SystemExit, match="2"):
            MEASURE.main([wrong, f"--out={tmp_path}"])
    said = [line for line in capsys.readouterr().err.splitlines() if ": error: " in line]
    assert "results.json is damaged" in said[0] and "'nothing'" in said[1]


def test_a_measured_case_takes_the_place_of_its_row_alone(tmp_path, monkeypatch):
    toy = TINY | {"model.name": "dit(depth=3, width=64, heads=2)", "train.batch_size": 32}
    monkeypatch.setattr(MEASURE, "CASES", {"digits": {}, "toy": toy})
    shutil.copy(HERE / "results.json", tmp_path)
    before = json.loads((tmp_path / "results.json").read_text())
    MEASURE.main(["--only=toy", f"--out={tmp_path}"])
    after = json.loads((tmp_path / "results.json").read_text())
    assert after[: len(before)] == before and {row["network"] for row in after[len(before) :]} == {
        "toy"
    }
    none, every = (row for row in after[len(before) :] if row["type"] == "float32")
    for row in (none, every):
        assert row["planned"]["mib"] == pytest.approx(row["measured"]["mib"], rel=0.1)
    assert every["measured"]["mib"] < none["measured"]["mib"]
    assert (
        f"| toy | float32 | none | {none['planned']['mib']:,.1f} |"
        in (tmp_path / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "name, tolerance", [("unet", 0), ("dit(depth=3, width=64, heads=2)", 0), ("unet_edm2", 1e-4)]
)
def test_levels_that_are_computed_twice_change_no_number(name, tolerance, tmp_path):
    """Dropout too: the same masks are drawn again. unet_edm2 norms its weights at each pass,
    once more up to rounding.
    """
    options = dict(model__name=name, model__dropout=0.3)
    for wanted in ("none", "all"):
        assert run(tiny(**options, train__activation_checkpointing=wanted), tmp_path / wanted)
    losses = [
        [row["train/loss"] for row in rows(tmp_path / wanted) if "train/loss" in row]
        for wanted in ("none", "all")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=tolerance, abs=0)
    once, twice = (
        load.load(tmp_path / wanted, "cpu").net.state_dict() for wanted in ("none", "all")
    )
    for key, value in once.items():
        torch.testing.assert_close(twice[key], value, rtol=0, atol=tolerance)
    assert "computed again in the backward pass" in (tmp_path / "all" / "training.log").read_text()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_state_of_the_generators_is_read_for_dropout_alone(dropout, monkeypatch):
    net = build.network(tiny(model__dropout=dropout))
    layers.recompute(module for level in net.levels for module in level)
    read = []
    get_rng_state = torch.get_rng_state
    monkeypatch.setattr(torch, "get_rng_state", lambda: read.append(1) or get_rng_state())
    net(torch.ones(1, 1, 16, 16), torch.ones(1)).sum().backward()
    assert bool(read) == bool(dropout)


@pytest.mark.parametrize("share, levels", [(1.01, 0), (0.995, 1), (0.0, 2)])
def test_auto_recomputes_as_few_levels_as_the_gpu_needs(share, levels, monkeypatch):
    """A GPU of just the size that a step needs, one a little smaller, and one in which nothing
    fits: then all it can.
    """
    given = tiny(**WIDE)
    net = build.network(given)
    assert len(net.levels) == 2
    machine = device.Machine(torch.device("cpu"), torch.float32)
    told = []
    room = (
        runtime_memory.with_margin(
            memory.estimate(given, torch.float32, given.train.batch_size).total
        )
        * share
    )
    monkeypatch.setattr(device.Machine, "free", lambda self: room)
    assert memory.choose_recomputed_levels(given, net, machine, told.append) == levels
    (line,) = told
    assert "activation_checkpointing is auto" in line and ("all activations are kept" in line) == (
        levels == 0
    )
    monkeypatch.setattr(device.Machine, "free", lambda self: None)
    assert memory.choose_recomputed_levels(given, net, machine, told.append) == 0


def test_every_module_of_the_levels_is_one_that_recomputes(tmp_path):
    for name in ("unet", "unet_edm2", "dit(depth=3, width=64, heads=2)"):
        net = build.network(files.changed(tiny(), {"model.name": name}))
        inside = [module for level in net.levels for module in level]
        assert len(inside) == len({id(module) for module in inside})
        covered = {id(weight) for module in inside for weight in module.parameters()}
        assert len(covered) > 0.7 * len(list(net.parameters()))
