"""Evaluations within a budget: the choice against its rule by brute force, and its costs against
what a run really computes.
"""

import itertools
import json
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import pytest
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpm.common import durations
from ddpm.config import files
from ddpm.evaluate import evaluate
from ddpm.evaluation import extractors
from ddpm.experiment import build, drawing, trainer
from ddpm.experiment import cost as experiment_cost
from ddpm.experiment.cost import Way, choose
from ddpm.runtime import device
from ddpm.studies import study
from support.runs import rows, run, tiny

OPEN = {
    "every__evaluate": "auto",
    "evaluate__num_samples": 0,
    "evaluate__sampler": "auto",
    "evaluate__steps": 0,
}
SLOW = Way("ddpm", 100, 300.0)
QUICK = Way("dpmpp", 20, 60.0)


# --- the arithmetic ---


@pytest.mark.parametrize("room", [0, 1e3, 59_999, 60_000, 3e5, 599_999, 6e5, 3e6, 1.5e7, 1e8, 1e12])
@pytest.mark.parametrize("each", [0.0, 5000.0])
def test_never_above_the_budget_and_never_less_than_it_allows(room, each):
    way, count, times = choose(room, [SLOW, QUICK], each)
    cost = each + count * way.cost
    assert times * cost <= room
    leisurely = 5 * (each + 10_000 * SLOW.cost) <= room
    assert way == (SLOW if leisurely else QUICK)
    curves = [some for some in experiment_cost.COUNTS if 5 * (each + some * way.cost) <= room]
    assert count == (curves[-1] if curves else 1000)
    assert times == experiment_cost.MOST or (times + 1) * cost > room


def test_what_is_given_stays():
    for count, times in itertools.product((7, 3000), (1, 40)):
        # whatever it costs
        assert choose(1.0, [SLOW, QUICK], 0.0, count, times) == (QUICK, count, times)
        assert choose(1e12, [SLOW, QUICK], 0.0, count, times) == (SLOW, count, times)
    # the most images so often
    assert choose(40 * 2000 * 60.0, [QUICK], times=40) == (QUICK, 2000, 40)
    assert choose(40 * 2000 * 60.0 - 1, [QUICK], times=40) == (QUICK, 1000, 40)
    # so many images as often as they fit
    assert choose(7 * 3000 * 60.0, [QUICK], count=3000) == (QUICK, 3000, 7)


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
    return experiment_cost.operations(tiny())


def chosen(**options):
    """A config, the operations of its network, and how it is evaluated where it learns from
    1,000 images.
    """
    given = tiny(**OPEN | {"diffusion__timesteps": 1000} | options)
    return given, operations(), experiment_cost.evaluated(given, 1000, operations())


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
        {"evaluate__likelihood": "both", "evaluate__likelihood_images": 20},
    ],
    ids=str,
)
def test_all_evaluations_of_a_training_stay_within_the_budget(share, length, options):
    given, asked, found = chosen(evaluate__budget=share, train__length=length, **options)
    steps = durations.steps_of(length, given.train.batch_size, 1000)
    every = durations.Every(found.interval, given.train.batch_size, 1000)
    times = sum(
        every.due(step) or (step == steps and not every.never) for step in range(1, steps + 1)
    )
    section = found.config.evaluate
    looks = extractors.OPERATIONS["digits"]
    bits = (
        given.evaluate.likelihood_images
        * 100
        * (asked.forward + asked.training)
        * (given.evaluate.likelihood == "both")
    )
    one = section.num_samples * (section.steps * asked.forward + looks) + bits
    whole = steps * given.train.batch_size * asked.training
    assert found.operations == one and found.share == pytest.approx(times * one / whole)
    assert Fraction(times * one, whole) <= Fraction(share) and times <= experiment_cost.MOST
    if times:
        assert (
            f"{section.num_samples:,} images by {section.sampler} in {section.steps} steps"
            in found.words
        )
        assert f"{found.share:.1%}" in found.words
    else:
        assert (
            found.words.startswith("no evaluation: one of ")
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
    for steps, taken in ((3, 3), (30, 20)):  # as many as sample.steps, or fewer
        _, _, found = chosen(
            evaluate__sampler="heun", sample__steps=steps, train__length="100000 steps"
        )
        assert found.share and (found.config.evaluate.sampler, found.config.evaluate.steps) == (
            "heun",
            taken,
        )
    _, _, found = chosen(
        evaluate__num_samples=16, every__evaluate="10 minutes", train__length="12 steps"
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
        # what ddpm.evaluate does afterwards: as the samples of the training are drawn
        assert (
            found.config.evaluate.num_samples == 10_000 and found.config.evaluate.sampler == "ddim"
        )
        assert found.config.evaluate.steps == 3


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


def test_the_fast_sampler_brings_a_spacing_and_the_usual_one_does_not():
    quick = {"sample__sampler": "ddpm", "sample__steps": 40, "train__length": "60000 steps"}
    for options, spacing in (
        (quick, "karras"),
        (quick | {"sample__spacing": "trailing"}, "karras"),
        (quick | {"evaluate__spacing": "quadratic"}, "quadratic"),
        (quick | {"evaluate__sampler": "dpmpp"}, "auto"),
        (quick | {"evaluate__budget": 0.0}, "auto"),
        (quick | {"train__length": "9000000 steps"}, "auto"),
    ):
        given, _, found = chosen(**options)
        assert found.config.evaluate.spacing == spacing and found.config.sample == given.sample
        # what ddpm.evaluate draws by afterwards
        assert experiment_cost.settled(found.config) == found.config
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
    # without an evaluation there is nothing to choose
    for folder, often in ((before, "0 steps"), (new, "auto")):
        for length in ("24 steps", "30 steps"):
            given = tiny(
                **options
                | {
                    "train__length": length,
                    "evaluate__budget": 1.0,
                    "every__evaluate": often if length == "24 steps" else "auto",
                }
            )
            assert run(given, folder)
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
            {"evaluate__budget": 0.0, "every__evaluate": "5 steps"},
            "config.every.evaluate is '5 steps', and evaluate.budget 0 "
            "allows no image; give evaluate.num_samples, such as 10000, or a budget, such as 0.05",
        ),
        (
            {"every__evaluate": "10 minutes"},
            "config.every.evaluate is '10 minutes', and no budget can tell how often that will be; "
            "give evaluate.num_samples too, such as 10000",
        ),
        (
            {"evaluate__num_samples": 3},
            "config.evaluate.num_samples is 3; it takes 4 or more, or 0 for as many as "
            "evaluate.budget allows",
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
        build.recipe(experiment_cost.settled(loaded), loaded.evaluate, (), "").spacing
        == "quadratic"
    )
    found = experiment_cost.evaluated(loaded, 1617, experiment_cost.operations(loaded))
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
        evaluate__likelihood="both",
        evaluate__likelihood_images=3,
        evaluate__likelihood_evaluations=8,
        **options,
    )
    made = trainer.run(given, tmp_path, device.start())
    asked = experiment_cost.operations(given)
    batch = next(made.batches(0))
    assert counted(lambda: made.step(0, batch)) == given.train.batch_size * asked.training

    scorer = drawing.scorer(given, build.dataset(given), made.machine)
    drawn = (images for _, images in made.draw(scorer.seeds, scorer.recipe))
    assert counted(
        lambda: extractors.extract(scorer.extractor, drawn)
    ) == 16 * experiment_cost.drawing_operations(given, asked)
    assert 0.5 < counted(made.likelihood) / experiment_cost.likelihood_operations(given, asked) <= 1


def test_a_training_says_what_it_picked_does_it_and_logs_it(tmp_path):
    """Twelve steps of eight images allow four evaluations of sixteen, drawn as the samples are."""
    given = tiny(**OPEN | {"evaluate__num_samples": 16, "evaluate__budget": 0.9})
    asked = experiment_cost.operations(given)
    share = 4 * 16 * (3 * asked.forward + extractors.OPERATIONS["digits"]) / (96 * asked.training)
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
    asked = study.read_study(f"experiments/{name}.yaml")
    given = asked.config(asked.grid()[0])
    found = experiment_cost.evaluated(given, 1617, experiment_cost.operations(given))
    assert found.config == given and found.interval == given.every.evaluate
    assert (
        f"1,000 images by {given.evaluate.sampler} in {given.evaluate.steps} steps" in found.words
    )
    assert given.evaluate.sampler != "auto" and given.evaluate.steps > 0
