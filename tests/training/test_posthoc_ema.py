"""Power-function averages against sums in closed form, and profiles made of others against the
same profiles averaged.
"""

import json
import math

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from ddpm.config import files
from ddpm.evaluate import evaluate
from ddpm.experiment import load as experiment_load
from ddpm.experiment import trainer
from ddpm.generate import generate_images
from ddpm.runtime import device
from ddpm.studies import archive, statistics, study
from ddpm.training import checkpoint
from ddpm.training import weights as training_weights
from ddpm.training.ema import EMA
from ddpm.training.posthoc_ema import (
    MISFIT,
    coefficients,
    gamma_of,
    inner,
    power_function,
    reconstruct,
    sigma_rel_of,
)
from support.runs import rows, run, tiny


def averaged(trajectory, *widths):
    """Yield (step, {width: average}) after each step of a trajectory [n, d], in float32."""
    model = nn.Linear(trajectory.shape[1], 1, bias=False)
    averages = {width: EMA(model, power_function(width)) for width in widths}
    for step, weights in enumerate(trajectory, 1):
        model.weight.data.copy_(weights)
        for average in averages.values():
            average.update()
        yield (
            step,
            {width: average.shadow["weight"][0].clone() for width, average in averages.items()},
        )


def test_a_width_is_the_standard_deviation_of_its_profile():
    for gamma in (0, 1, 2, 5, 16):
        first = (gamma + 1) / (gamma + 2)
        second = (gamma + 1) / (gamma + 3)  # moments of (gamma + 1) t^gamma on [0, 1]
        assert sigma_rel_of(gamma) == pytest.approx(math.sqrt(second - first**2), rel=1e-12)
        assert gamma_of(sigma_rel_of(gamma)) == pytest.approx(gamma, abs=1e-12)
    # as Karras et al. 2024 print them
    assert [round(gamma_of(width), 2) for width in (0.05, 0.1)] == [16.97, 6.94]
    assert gamma_of(1e-3) == pytest.approx(997, abs=0.01)  # narrow ones tend to 1 / (gamma + 3)


@pytest.mark.parametrize("width", [0, -0.1, 0.3, float("nan")])
def test_widths_that_no_profile_has(width):
    with pytest.raises(ValueError, match="must be in .0, 0.288."):
        gamma_of(width)


@pytest.mark.parametrize(
    "gamma, mean",
    [
        (0, lambda n: (n + 1) / 2),
        (1, lambda n: n - (n - 1) * (2 * n - 1) / (6 * n)),
        (2, lambda n: n - (n - 1) ** 2 / (4 * n)),
    ],
)
def test_the_average_of_a_line_is_its_closed_form(gamma, mean):
    """Step k weighs (k^(gamma + 1) - (k - 1)^(gamma + 1)) / n^(gamma + 1); the sum over weights
    k telescopes.
    """
    line = torch.arange(1.0, 201).reshape(-1, 1)
    for n, average in averaged(line, sigma_rel_of(gamma)):
        # float32 rounds each of n updates by 6e-8, and later updates shrink it
        assert average[sigma_rel_of(gamma)].item() == pytest.approx(mean(n), rel=1e-6)


def test_products_of_profiles_are_integrals():
    one, two, a, b = (torch.tensor(number, dtype=torch.float64) for number in (1, 2, 3, 7))
    # of 2 t / a^2 and 3 t^2 / b^3 from 0 to a, and of 3 t^2 / a^3 and 2 t / b^2
    assert inner(a, one, b, two).item() == pytest.approx(6 / 4 * 3**2 / 7**3, rel=1e-12)
    assert inner(b, two, a, one).item() == inner(a, one, b, two).item()
    assert inner(a, two, b, one).item() == pytest.approx(6 / 4 * 3 / 7**2, rel=1e-12)


def test_a_stored_average_is_its_own_reconstruction():
    found, misfit = coefficients([10, 10, 20, 20], [1.0, 3.0, 1.0, 3.0], 20, 3.0)
    # solved in float64; the root of the misfit's rounding of 1e-16 is 1e-8
    torch.testing.assert_close(
        found, torch.tensor([0, 0, 0, 1.0], dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert misfit < 1e-7


@pytest.mark.parametrize("width", [0.04, 0.07, 0.1, 0.15, 0.2, 0.25])
def test_reconstruction_is_the_average_that_was_followed(width):
    n = 512
    every = 16
    torch.manual_seed(0)
    trajectory = torch.randn(n, 64).cumsum(0)
    trajectory = trajectory / trajectory.square().mean(0).sqrt()  # mean square 1 over time
    stored = []
    followed = None
    for step, averages in averaged(trajectory, 0.05, 0.1, width):
        followed = averages[width]
        if step % every == 0:
            stored += [
                (step, kept, lambda kept=averages[kept]: {"w": kept}) for kept in (0.05, 0.1)
            ]
    made = reconstruct(stored, width)["w"]
    gamma = gamma_of(width)
    _, misfit = coefficients(
        [step for step, *_ in stored], [gamma_of(kept) for _, kept, _ in stored], n, gamma
    )
    assert misfit < MISFIT
    # Cauchy-Schwarz: the misfit times the profile's norm times the trajectory's; another such for
    # the sum made 1; rounding
    bound = 2 * misfit * (gamma + 1) / math.sqrt(2 * gamma + 1) + 1e-5
    assert (made - followed).abs().max() < bound < 0.2
    nearest = min((kept for kept in (0.05, 0.1)), key=lambda kept: abs(kept - width))
    plain = stored[-2 + (nearest == 0.1)][2]()["w"]
    # much nearer than the nearest stored
    assert width == 0.1 or (made - followed).norm() < 0.1 * (plain - followed).norm()


def test_what_snapshots_cannot_make_is_refused():
    stored = [(step, 0.1, dict) for step in (100, 200)]
    with pytest.raises(ValueError) as error:
        reconstruct(stored, 0.02)
    assert "sigma_rel 0.02 cannot be made from 2 snapshots of 0.1: they miss it by" in str(
        error.value
    )


def test_integers_are_the_last_ones():
    stored = [(step, 0.1, lambda step=step: {"count": torch.tensor(step)}) for step in (1, 2)]
    assert reconstruct(stored, 0.1)["count"] == 2


# in a run

ONE = dict(every__sample="0 steps")
SEVERAL = ONE | dict(
    ema__extra_decays=(0.5, 0.99), ema__sigma_rels=(0.05, 0.1), every__snapshot="3 steps"
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(tiny(**SEVERAL), folder)
    return folder


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def parts(folder):
    return checkpoint.newest(folder)[0]["parts"]


def stored(folder):
    return {path.name: load_file(path) for _, path in checkpoint.snapshots(folder)}


def test_several_decays_are_as_many_single_runs(trained, tmp_path):
    run(tiny(**ONE, ema__decay=0.5), tmp_path / "half")
    run(tiny(**ONE), tmp_path / "one")
    assert equal(parts(trained)["ema 0.5"]["shadow"], parts(tmp_path / "half")["ema"]["shadow"])
    assert equal(parts(trained)["ema"]["shadow"], parts(tmp_path / "one")["ema"]["shadow"])
    assert rows(trained) == rows(tmp_path / "one")
    assert (
        "ema 0.5" not in parts(tmp_path / "one") and not (tmp_path / "one" / "snapshots").exists()
    )


def test_twelve_steps_are_six_and_six(trained, tmp_path):
    run(tiny(**SEVERAL, train__length="6 steps"), tmp_path)
    run(tiny(**SEVERAL), tmp_path)
    assert list(stored(tmp_path)) == [f"step_{step:08d}.safetensors" for step in (3, 6, 9, 12)]
    assert all(equal(one, stored(tmp_path)[name]) for name, one in stored(trained).items())
    for name in ("ema", "ema 0.5", "ema 0.99", "ema 0.05", "ema 0.1"):
        assert equal(parts(tmp_path)[name]["shadow"], parts(trained)[name]["shadow"])
        assert parts(tmp_path)[name]["updates"] == 12


def test_snapshots_past_the_checkpoint_are_of_a_run_that_was_lost(trained, tmp_path):
    given = tiny(
        **SEVERAL | dict(every__snapshot="2 steps", every__save="5 steps"), train__length="6 steps"
    )
    run(given, tmp_path)
    # as if it had been killed after its snapshot at step 6
    checkpoint.checkpoints(tmp_path)[-1][1].unlink()
    assert [step for step, _ in checkpoint.snapshots(tmp_path)] == [2, 4, 6]
    made = trainer.build_trainer(tiny(**SEVERAL), tmp_path, device.start())
    made.tracker.close()
    assert made.start == 5
    assert [step for step, _ in checkpoint.snapshots(tmp_path)] == [2, 4]


def test_snapshots_are_the_averages_in_half_precision(trained):
    (_, path), kept = checkpoint.snapshots(trained)[-1], parts(trained)
    for word in ("ema 0.05", "ema 0.1"):
        snapshot = training_weights.load_snapshot(path, word)
        assert {value.dtype for value in snapshot.values()} == {torch.float16}
        assert equal(snapshot, {name: value.half() for name, value in kept[word]["shadow"].items()})


def test_any_average_can_be_loaded(trained):
    def load(ema, path=trained):
        return experiment_load.load(path, "cpu", **{"sample.ema": ema})

    kept = parts(trained)
    for number, part in ((0.0, "ema"), (0.9, "ema"), (0.5, "ema 0.5"), (0.99, "ema 0.99")):
        assert equal(dict(load(number).net.state_dict()), kept[part]["shadow"])
    for name, value in load(0.1).net.state_dict().items():
        # what was averaged itself, rounded to half precision: by 2^-11 of each weight, or 2^-25
        # near zero
        torch.testing.assert_close(value, kept["ema 0.1"]["shadow"][name], rtol=2**-11, atol=2**-25)
    assert not equal(dict(load(0.12).net.state_dict()), dict(load(0.1).net.state_dict()))
    assert (
        "(EMA sigma_rel 0.12 weights, step 12)" in load(0.12).name
        and "(EMA decay 0.5 weights, step 12)" in load(0.5).name
    )
    middle = checkpoint.checkpoints(trained)[-2][1]
    assert (load(0.5, middle).step, load(0.1, middle).step) == (10, 9)
    assert not equal(dict(load(0.1, middle).net.state_dict()), dict(load(0.1).net.state_dict()))


@pytest.mark.parametrize(
    "number, said",
    [
        (
            0.7,
            "has no weights averaged with EMA decay 0.7. It has EMA decay 0.9, 0.5, 0.99, and 4 "
            "snapshots for any sigma_rel up to 0.288; choose one, or train with",
        ),
        (0.01, "sigma_rel 0.01 cannot be made from 4 snapshots of 0.05, 0.1"),
        (1.5, "config.sample.ema is 1.5; it must lie between"),
        (-0.1, "must lie between"),
    ],
)
def test_averages_that_cannot_be_had(trained, tmp_path, number, said):
    with pytest.raises(ValueError) as error:
        generate_images(trained, 1, tmp_path / "out", **{"sample.ema": number})
    assert (
        said in str(error.value)
        and "\n" not in str(error.value)
        and not (tmp_path / "out").exists()
    )


def test_runs_without_them_say_what_to_do(trained, tmp_path):
    run(tiny(train__length="1 steps"), tmp_path / "plain")
    with pytest.raises(
        ValueError,
        match=r"averaged with EMA sigma_rel 0.1\. It has EMA decay 0.9; train .*config.ema.sigma_rels",
    ):
        experiment_load.load(tmp_path / "plain", **{"sample.ema": 0.1})
    (tmp_path / "alone.safetensors").write_bytes((trained / "final.safetensors").read_bytes())
    with pytest.raises(
        ValueError,
        match="decay 0.5 is kept in checkpoints, and .* has none of step 12; give one of its .pt",
    ):
        experiment_load.load(tmp_path / "alone.safetensors", **{"sample.ema": 0.5})
    with pytest.raises(ValueError, match="leave it at 0, and give --ema to generate"):
        run(tiny(sample__ema=0.1), tmp_path / "trained")
    for options, said in [
        ({"ema__sigma_rels": (0.1,)}, "never stored; set config.every.snapshot"),
        (
            {"ema__extra_decays": (0.1,)},
            r"takes numbers between 0.3 and .*, such as \(0.999, 0.9995\)",
        ),
        (
            {"ema__sigma_rels": (0.3,), "every__snapshot": "1 step"},
            "takes numbers between 0.001 and 0.288",
        ),
        ({"ema__extra_decays": (0.5, 0.5)}, "give each number once"),
        ({"ema__extra_decays": (0.9,)}, "beside ema.decay 0.9"),
        ({"ema__extra_decays": (1,)}, "takes numbers"),
    ]:
        with pytest.raises(ValueError, match=said):
            tiny(**options)


def test_one_training_serves_a_study_of_averages(trained, tmp_path):
    path = tmp_path / "widths.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "method": "grid",
                "parameters": {
                    "checkpoint": {"value": str(trained)},
                    "ema": {"values": [0.07, 0.1, 0.5]},
                    "config.sample.seed": {"values": [0, 1]},
                },
                "command": ["${env}", "${interpreter}", "-m", "ddpm.evaluate", "${args}"],
            }
        )
    )
    asked = study.read_study(path)
    assert (
        asked.axes == ["sample.ema"] and asked.run_name(asked.grid()[0]) == "ema=0.07-sample.seed=0"
    )
    assert "--config.sample.ema=0.07" in asked.command_of(asked.grid()[0])
    for point in asked.grid():
        options = {
            name.removeprefix("config."): value
            for name, value in point.items()
            if name != "checkpoint"
        }
        evaluate(trained, "cpu", tmp_path / "runs" / asked.run_name(point), **options)
    found = archive.study_source(path, runs=tmp_path / "runs")
    made = [row["eval/protocol"] for run in found.runs for row in run.rows]
    assert sum("of the EMA sigma_rel 0.07 weights" in text for text in made) == 2
    assert sum("of the EMA decay 0.5 weights" in text for text in made) == 2
    groups = statistics.compare(found.runs, found.axes).groups
    assert [group.setting for group in groups] == [
        {"sample.ema": number} for number in (0.07, 0.1, 0.5)
    ]
    options = json.loads((tmp_path / "runs" / "ema=0.1-sample.seed=1" / "config.json").read_text())
    assert options["sample"]["ema"] == 0.1
    with pytest.raises(ValueError, match="of another study: config.sample.ema is"):
        statistics.compare(found.runs, [])


def test_a_config_from_before_has_none(trained):
    text = json.loads(files.to_json(tiny()))
    for section, option in (
        ("ema", "extra_decays"),
        ("ema", "sigma_rels"),
        ("sample", "ema"),
        ("every", "snapshot"),
    ):
        del text[section][option]
    assert files.from_json(json.dumps(text)) == tiny()
