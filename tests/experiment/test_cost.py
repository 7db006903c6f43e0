"""Evaluations within a budget: how often they are due, and their costs against what a run really
computes.
"""

import json
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm.common import durations
from ddpm.config import files
from ddpm.evaluate import evaluate
from ddpm.evaluation import distances, extractors, reference
from ddpm.experiment import build, drawing, trainer
from ddpm.experiment import cost as experiment_cost
from ddpm.runtime import device
from ddpm.studies import study
from ddpm.tracking.tracker import Tracker
from support.runs import rows, run, tiny

OPEN = {
    "every__evaluate": "auto",
    "evaluate__num_samples": 0,
    "evaluate__sampler": "auto",
    "evaluate__steps": 0,
}


# --- the arithmetic ---


@pytest.mark.parametrize(
    "text",
    [
        "7 steps",
        "1 steps",
        "3 epochs",
        "20 images",
        "0.3 epochs, 10 steps",
        "100 steps",
        "0 steps",
        "6 images",
    ],
)
@pytest.mark.parametrize("total", [1, 30, 31])
def test_how_often_an_interval_is_due(text, total):
    every = durations.Every(text, 8, 50)
    due = sum(
        every.due(step) or (step == total and not every.never) for step in range(1, total + 1)
    )
    assert every.times(total) == due
    assert durations.Every("10 steps, 1 minutes", 8, 50).times(total) is None


# --- of a config ---


@lru_cache
def operations():
    return experiment_cost.count_flops(tiny())


def chosen(**options):
    """A config, the operations of its network, and how it is evaluated where it learns from
    1,000 images.
    """
    given = tiny(**OPEN | {"diffusion__timesteps": 1000} | options)
    return given, operations(), experiment_cost.plan_evaluation(given, 1000, operations())


@pytest.mark.parametrize("share", [0.001, 0.05, 0.3, 1.0])
@pytest.mark.parametrize(
    "length", ["40 steps", "300 steps", "3000 steps", "17 epochs", "500 epochs"]
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sample__sampler": "ddpm", "sample__steps": 40},
        {"evaluate__num_samples": 300},
        {"evaluate__likelihood": "both(images=20)"},
    ],
    ids=str,
)
def test_all_evaluations_of_a_training_stay_within_the_budget(share, length, options):
    given, flops, found = chosen(evaluate__budget=share, train__length=length, **options)
    steps = durations.steps_of(length, given.train.batch_size, 1000)
    every = durations.Every(found.interval, given.train.batch_size, 1000)
    times = sum(
        every.due(step) or (step == steps and not every.never) for step in range(1, steps + 1)
    )
    section = found.config.evaluate
    looks = extractors.OPERATIONS["digits"]
    bits = (
        20
        * 100
        * (flops.forward + flops.training)
        * (given.evaluate.likelihood == "both(images=20)")
    )
    compared = experiment_cost.comparison_operations(found.config, 1000)
    one = section.num_samples * (section.steps * flops.forward + looks) + compared + bits
    whole = steps * given.train.batch_size * flops.training
    assert found.operations == one and found.share == pytest.approx(times * one / whole)
    assert Fraction(times * one, whole) <= Fraction(share) and times <= experiment_cost.MOST
    # not one more would fit, as the interval is whole steps
    most = min(int(Fraction(share) * whole / one), experiment_cost.MOST)
    assert every.never == (most == 0)
    assert most == 0 or found.interval == f"{-(-steps // most)} steps"
    assert section.num_samples == (given.evaluate.num_samples or 1000)
    if times:
        assert (
            f"{section.num_samples:,} images by {section.sampler} in {section.steps} steps"
            in found.words
        )
        assert f"{found.share:.1%}" in found.words
    else:
        assert (
            found.words.startswith("no evaluation: one (")
            and f"--config.every.evaluate={length!r}" in found.words
        )


def test_explicit_options_win_over_the_budget():
    given, _, found = chosen(
        every__evaluate="3 steps", evaluate__budget=0.001, train__length="12 steps"
    )
    assert (found.interval, found.config.evaluate.num_samples) == (
        "3 steps",
        1000,
    ) and found.share > 0.001
    assert "evaluation every 3 steps and at the end" in found.words and "for all 4" in found.words
    given, _, found = chosen(
        evaluate__num_samples=17,
        evaluate__sampler="ddpm",
        evaluate__steps=7,
        every__evaluate="12 steps",
        train__length="12 steps",
    )
    assert (
        found.config == given
        and found.interval == "12 steps"
        and "evaluation at the end: 17 images by ddpm" in found.words
    )
    for steps in (3, 30):  # as many as sample.steps
        _, _, found = chosen(
            evaluate__sampler="heun", sample__steps=steps, train__length="100000 steps"
        )
        assert found.share and (found.config.evaluate.sampler, found.config.evaluate.steps) == (
            "heun",
            steps,
        )
    _, _, found = chosen(
        evaluate__num_samples=16,
        evaluate__sampler="ddim",
        every__evaluate="10 minutes",
        train__length="12 steps",
    )
    assert found.interval == "10 minutes" and found.share is None and found.words.count("%") == 2


def test_nothing_is_measured_where_nothing_is_wanted():
    for options in (
        {"evaluate__budget": 0.0},
        {"every__evaluate": "0 steps"},
        {"evaluate__extractor": "none"},
    ):
        _, _, found = chosen(train__length="100000 steps", **options)
        assert (found.interval, found.share) == ("0 steps", 0) and found.words.startswith(
            "no evaluation, as "
        )
        # what ddpm.evaluate does afterwards
        section = found.config.evaluate
        assert (section.num_samples, section.sampler, section.steps) == (1000, "dpmpp", 20)


@pytest.mark.parametrize("images, count", [(0, 10_000), (1000, 1000), (60_000, 10_000), (2, 4)])
def test_open_values_are_the_same_for_every_length(images, count):
    """So that distances of different runs compare."""
    for length in ("12 steps", "60000 steps"):
        given = tiny(**OPEN | {"diffusion__timesteps": 1000, "train__length": length})
        section = experiment_cost.plan_evaluation(given, images, operations()).config.evaluate
        assert (section.sampler, section.steps, section.spacing) == ("dpmpp", 20, "karras")
        assert section.num_samples == count


def test_a_run_that_goes_on_is_measured_as_before():
    before = tiny(evaluate__sampler="heun", evaluate__steps=9, evaluate__num_samples=2000)
    given = tiny(**OPEN)
    resumed = experiment_cost.plan_evaluation(given, 1000, operations(), before).config
    assert resumed.evaluate == before.evaluate
    named = tiny(**OPEN | {"evaluate__sampler": "ddpm", "evaluate__num_samples": 50})
    section = experiment_cost.plan_evaluation(named, 1000, operations(), before).config.evaluate
    assert (section.sampler, section.steps, section.num_samples) == ("ddpm", 3, 50)


def test_a_spacing_that_knows_one_number_of_steps_keeps_it():
    sections = "sections(counts=(30, 2))"
    for options, way in (
        ({}, ("dpmpp", 20, "karras")),
        ({"evaluate__spacing": sections}, ("ddim", 32, sections)),
        ({"evaluate__sampler": "heun"}, ("heun", 32, "auto")),
    ):
        _, _, found = chosen(
            sample__spacing=sections, sample__steps=32, train__length="150000 steps", **options
        )
        section = found.config.evaluate
        assert found.share and (section.sampler, section.steps, section.spacing) == way


def test_the_default_sampler_brings_a_spacing_and_a_named_one_does_not():
    quick = {"sample__sampler": "ddpm", "sample__steps": 40, "train__length": "60000 steps"}
    for options, spacing in (
        (quick, "karras"),
        (quick | {"sample__spacing": "trailing"}, "karras"),
        (quick | {"evaluate__spacing": "quadratic"}, "quadratic"),
        (quick | {"evaluate__sampler": "dpmpp"}, "auto"),
        (quick | {"evaluate__budget": 0.0}, "karras"),
        (quick | {"train__length": "9000000 steps"}, "karras"),
    ):
        given, _, found = chosen(**options)
        assert found.config.evaluate.spacing == spacing and found.config.sample == given.sample
        # what ddpm.evaluate draws by afterwards
        assert experiment_cost.resolve_evaluation(found.config) == found.config
        used = build.recipe(found.config, found.config.evaluate, (), "").spacing
        assert used == (given.sample.spacing if spacing == "auto" else spacing)


def test_a_run_keeps_the_spacing_that_it_is_measured_in(tmp_path):
    """Also one whose checkpoints are from before there was a choice, and say nothing of
    evaluate.spacing.
    """
    options = OPEN | {
        "sample__sampler": "heun",
        "sample__steps": 20,
        "every__sample": "0 steps",
        "evaluate__num_samples": 16,
    }
    before = tmp_path / "before"
    new = tmp_path / "new"
    old = {"evaluate__sampler": "dpmpp", "evaluate__steps": 20, "every__evaluate": "0 steps"}
    for folder, first in ((before, old), (new, {})):
        for length in ("24 steps", "30 steps"):
            given = options | {"train__length": length, "evaluate__budget": 1.0}
            assert run(tiny(**given | (first if length == "24 steps" else {})), folder)
    made = [
        [row["eval/protocol"] for row in rows(folder) if "eval/protocol" in row]
        for folder in (before, new)
    ]
    assert len(made[0]) == 1 and "dpmpp, 20 steps, linear spacing" in made[0][0]
    assert len(made[1]) > 1 and all("dpmpp, 20 steps, karras spacing" in text for text in made[1])
    assert [files.read(folder / "config.json").evaluate.spacing for folder in (before, new)] == [
        "auto",
        "karras",
    ]

    assert "karras spacing" in evaluate(new)["eval/protocol"]
    assert "trailing spacing" in evaluate(new, **{"evaluate.spacing": "trailing"})["eval/protocol"]
    assert "trailing spacing" in evaluate(before, **{"sample.spacing": "trailing"})["eval/protocol"]
    with pytest.raises(
        ValueError,
        match="^sample.spacing is given, .* evaluate.spacing 'karras'; give evaluate.spacing='tr",
    ):
        evaluate(new, **{"sample.spacing": "trailing"})


def test_few_timesteps_are_all_taken():
    _, _, found = chosen(
        diffusion__timesteps=15,
        sample__steps=15,
        sample__sampler="heun",
        train__length="50000 steps",
    )
    assert found.share and (found.config.evaluate.sampler, found.config.evaluate.steps) == (
        "dpmpp",
        15,
    )


@pytest.mark.parametrize(
    "options, line",
    [
        ({"evaluate__budget": 1.5}, "config.evaluate.budget is 1.5; it must lie between 0 and 1"),
        (
            {"evaluate__num_samples": 3},
            "config.evaluate.num_samples is 3; it takes 4 or more, or 0 for 10,000, or for as many "
            "as the data have",
        ),
        ({"every__sample": "auto"}, "config.every.sample: cannot read the duration 'auto'"),
        ({"sample__sampler": "auto"}, "unknown config.sample.sampler 'auto'"),
    ],
)
def test_contradictions_are_one_line(options, line):
    with pytest.raises(ValueError) as error:
        tiny(**OPEN | options)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_configs_of_before_the_budget_mean_what_they_meant():
    """A saved config names its interval, count, sampler and steps, and knows no budget."""
    saved = json.loads(files.to_json(tiny(every__evaluate="6 steps")))
    del saved["evaluate"]["budget"], saved["evaluate"]["spacing"]
    saved["sample"]["spacing"] = "quadratic"
    loaded = files.from_json(json.dumps(saved))
    assert (
        build.recipe(experiment_cost.resolve_evaluation(loaded), loaded.evaluate, (), "").spacing
        == "quadratic"
    )
    found = experiment_cost.plan_evaluation(loaded, 1617, experiment_cost.count_flops(loaded))
    assert found.config == loaded and found.interval == "6 steps" and loaded.evaluate.budget == 0.05


# --- the truth ---


def counted(work):
    """The operations of some work under torch's counter, which does not know the CPU's own
    attention: by plain products.
    """
    with FlopCounterMode(display=False) as count, sdpa_kernel(SDPBackend.MATH):
        work()
    return count.get_total_flops()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"diffusion__self_condition": True},
        {"evaluate__sampler": "heun"},
        {"model__name": "dit(depth=2, width=16, heads=2)"},
        {"diffusion__variance": "learned", "diffusion__loss": "hybrid"},
    ],
    ids=str,
)
def test_what_is_counted_is_what_is_computed(options, tmp_path):
    """A real step, a real drawing through the extractor, and real bits a dimension."""
    given = tiny(
        evaluate__likelihood="both(images=3, nfe=8)",
        **options,
    )
    made = trainer.build_trainer(given, tmp_path, device.start(), tracker=Tracker())
    flops = experiment_cost.count_flops(given)
    batch = next(made.batches(0))
    assert counted(lambda: made.step(0, batch)) == given.train.batch_size * flops.training

    scorer = drawing.scorer(given, build.dataset(given), made.machine)
    drawn = (images for _, images in made.evaluation.draw(scorer.seeds, scorer.recipe))
    assert counted(
        lambda: extractors.extract(scorer.extractor, drawn)
    ) == 16 * experiment_cost.drawing_operations(given, flops)
    assert (
        0.5
        < counted(made.evaluation.likelihood) / experiment_cost.likelihood_operations(given, flops)
        <= 1
    )


@pytest.mark.parametrize(("n", "m"), [(16, 24), (40, 500), (300, 500), (300, 20)])
def test_the_comparison_that_is_counted_is_computed(n, m):
    given = tiny(evaluate__extractor="digits", evaluate__num_samples=n)
    extractor = extractors.digits("cpu")
    real = reference.Reference.of(torch.randn(m, extractor.width))
    # which is cached where the reference has a name
    alone = counted(lambda: distances.within(real.features, torch.ones(m, distances.SUBSETS)))
    compared = counted(lambda: distances.compare(torch.randn(n, extractor.width), real, extractor))
    expected = experiment_cost.comparison_operations(given, m)
    # torch counts neither a Cholesky factor nor eigenvalues
    assert 0.9 < (compared - alone) / expected <= 1
    # 50,000 against 50,000 in Inception's features: less than looking at the images takes
    large = tiny(evaluate__extractor="inception", evaluate__num_samples=50_000)
    compared = experiment_cost.comparison_operations(large, 10**6)
    assert compared == pytest.approx(22e12, rel=0.03)
    assert compared < 0.05 * 50_000 * extractors.OPERATIONS["inception"]


def test_a_training_says_what_it_picked_does_it_and_logs_it(tmp_path):
    """Twelve steps of eight images allow four evaluations of sixteen."""
    given = tiny(
        **OPEN | {"evaluate__num_samples": 16, "evaluate__budget": 0.9, "evaluate__sampler": "ddim"}
    )
    flops = experiment_cost.count_flops(given)
    drawn = 16 * (3 * flops.forward + extractors.OPERATIONS["digits"])
    share = 4 * (drawn + experiment_cost.comparison_operations(given, 1617)) / (96 * flops.training)
    assert share <= 0.9 < 5 / 4 * share
    assert run(given, tmp_path)
    measured = [row for row in rows(tmp_path) if "eval/fd_digits" in row]
    assert [row["step"] for row in measured] == [3, 6, 9, 12]
    assert all(row["eval/share"] == pytest.approx(share) for row in measured)
    assert all(
        "; 16 samples of the EMA weights in float32; ddim, 3 steps" in row["eval/protocol"]
        for row in measured
    )
    log = (tmp_path / "training.log").read_text()
    assert (
        "evaluation every 3 steps and at the end: 16 images by ddim in 3 steps" in log
        and f"{share:.1%} for all 4" in log
    )
    saved = files.from_json((tmp_path / "config.json").read_text())
    assert (saved.evaluate.sampler, saved.evaluate.steps, saved.every.evaluate) == (
        "ddim",
        3,
        "auto",
    )
    again = evaluate(tmp_path)  # which needs no budget
    assert again["eval/protocol"] == measured[-1]["eval/protocol"]
    # of weights that went to a file
    assert again["eval/fd_digits"] == pytest.approx(measured[-1]["eval/fd_digits"], rel=1e-4)


@pytest.mark.parametrize("name", ["schedules", "architectures", "ema", "targets", "unet_vs_dit"])
def test_committed_studies_are_measured_as_their_files_say(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[2])
    read = study.read_study(f"experiments/{name}.yaml")
    given = read.config(read.grid()[0])
    found = experiment_cost.plan_evaluation(given, 1617, experiment_cost.count_flops(given))
    assert found.config == given and found.interval == given.every.evaluate
    assert (
        f"1,000 images by {given.evaluate.sampler} in {given.evaluate.steps} steps" in found.words
    )
    assert given.evaluate.sampler != "auto" and given.evaluate.steps > 0
