"""Runs become an answer: statistics against scipy, words against known numbers, and reports of
real runs.
"""

import csv
import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from ddpm.config import files as config_files
from ddpm.evaluate import evaluate
from ddpm.experiment import build
from ddpm.studies import archive, compatibility, figures, report, statistics, tables
from ddpm.studies import runs as studies_runs
from ddpm.studies import study as studies_study
from ddpm.studies.archive import compare
from ddpm.studies.wandb_io import write_run_folder
from support.commands import python
from support.runs import DONE, TINY, run, written
from support.wandb_server import Run, Sweep
from support.wandb_server import server as server

ROOT = Path(__file__).parents[2]
CONFIG = f"""from ddpm.config import base, with_variant


def get_config(variant=None):
    config = base()
    config.update_from_flattened_dict({TINY | {"every.evaluate": "6 steps"}!r})
    return with_variant(config, variant, {{"wide": {{"model.model_channels": 16}}}})
"""
STUDY = """method: grid
description: Which schedule?
metric: {{name: eval/fd_digits, goal: minimize}}
parameters:
  config.diffusion.beta_schedule: {{values: [linear, cosine]}}
  config.seed: {{values: [0, 1, 2]}}
command: ["${{env}}", "${{interpreter}}", "-m", "ddpm.main", "--config={config}", "${{args}}"]
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder as a user's, with a study and its six runs, of 12 steps each."""
    home = tmp_path_factory.mktemp("home")
    (home / "experiments").mkdir()
    (home / "tiny.py").write_text(CONFIG)
    (home / "experiments" / "schedules.yaml").write_text(STUDY.format(config=home / "tiny.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDPM_CACHE", str(home / "cache"))
        wanted = studies_study.read_study(home / "experiments" / "schedules.yaml")
        for point in wanted.grid():
            assert run(wanted.config(point), home / wanted.folder() / wanted.run_name(point))
    return home


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of it to spoil, and the working directory."""
    light = shutil.ignore_patterns("checkpoints", "*.safetensors", "training.log", "cache")
    shutil.copytree(trained, tmp_path / "home", ignore=light)
    monkeypatch.chdir(tmp_path / "home")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # of tiny.py
    return tmp_path / "home"


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def arms(folder, levels, seeds, axis="diffusion__beta_schedule"):
    """Runs whose one measurement is known: `levels[value]` and then the seed's own noise."""
    made = (
        "digits-1; 16 samples of the EMA weights in float32; ddim, 2 steps, linear spacing, "
        "seed 0; against 9 images 1"
    )
    runs = []
    for number, (value, level) in enumerate(levels.items()):
        noise = np.random.default_rng(number).normal(0, 0.1, seeds)
        for seed in range(seeds):
            row = DONE | {"eval/protocol": made, "eval/fd_digits": level + seed + noise[seed]}
            runs.append(written(folder, f"{value}-{seed}", {axis: value, "seed": seed}, [row]))
    return runs


# statistics


def test_intervals_and_p_values_are_those_of_scipy():
    random = np.random.default_rng(0)
    for n in (2, 3, 5, 20):
        first, second = random.normal(size=(2, n))
        mean, half = statistics.interval(first)
        low, high = scipy.stats.t.interval(0.95, n - 1, first.mean(), scipy.stats.sem(first))
        # the same formula in another order of sums
        assert (mean - half, mean + half) == pytest.approx((low, high))
        assert statistics.paired_p(list(second - first)) == pytest.approx(
            scipy.stats.ttest_rel(second, first).pvalue
        )
    assert statistics.interval([3.0]) == (3.0, None)
    assert statistics.paired_p([0.0, 0.0, 0.0]) == 1 and statistics.paired_p([1.0, 1.0, 1.0]) == 0


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, and never below the one before."""
    assert statistics.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.holm([0.5, 0.9]) == [1, 1] and statistics.holm([]) == []


def test_the_smallest_visible_difference_is_seen_half_of_the_time_after_the_correction():
    """600 studies of 30 comparisons over three seeds, one of them with a difference of the size
    that is told; scipy's test.
    """
    count = 30
    seeds = 3
    noise = np.random.default_rng(0).normal(size=(600, count, seeds))
    halves = scipy.stats.t.ppf(0.975, seeds - 1) * scipy.stats.sem(noise, axis=2)
    gaps = [
        [statistics.Difference(None, None, 0, half, 0, seeds, 1) for half in study]
        for study in halves
    ]
    visible = [statistics.Comparison([], [], [], "eval/fid", study).visible for study in gaps]
    first, alone, counted = np.median(visible, axis=0)

    def seen(size):
        ps = scipy.stats.ttest_1samp(noise + size * np.eye(count)[0][:, None], 0, axis=2).pvalue
        return np.mean([statistics.holm(list(study))[0] < 0.05 for study in ps])

    # t(2) of a table
    assert counted == count and first / alone == pytest.approx(24.5 / 4.303, rel=2e-3)
    assert seen(first) == pytest.approx(0.5, abs=0.06)  # three standard errors of 600 studies
    assert seen(alone) < 0.1


def test_limits_count_the_correction(tmp_path):
    found = statistics.compare(
        arms(tmp_path / "three", {"cosine": 5.0, "linear": 6.0, "sigmoid": 5.1}, 5)
    )
    half = np.median([gap.half for gap in found.gaps])
    more = half * scipy.stats.t.ppf(1 - 0.025 / 3, 4) / scipy.stats.t.ppf(0.975, 4)
    assert next(report.limits(found)).endswith(
        f"below about {more:.2g} (for the clearest of 3 comparisons; {half:.2g} for a single one)."
    )
    found = statistics.compare(arms(tmp_path / "two", {"cosine": 5.0, "linear": 6.0}, 5))
    assert next(report.limits(found)).endswith(
        f"a difference in FD (digits) below about {found.gaps[0].half:.2g}."
    )


def test_a_perfect_generator_stands_in_the_protocol_and_the_old_floor_nowhere(tmp_path):
    new = {
        "eval/fd_digits_perfect": 0.1784,
        "eval/fd_digits_perfect_sd": 0.054,
        "eval/copying": 0.3,
        "eval/copying_perfect": 0.5,
        "eval/copying_perfect_sd": 0.023,
    }
    for name, more in (
        ("old", {"eval/fd_digits_floor": 0.114, "eval/copying": 0.3, "eval/copies": 0.04}),
        ("new", new),
    ):
        runs = arms(tmp_path / name, {"cosine": 5.0, "linear": 6.0}, 3)
        found = statistics.compare(
            [dataclasses.replace(run, rows=[run.rows[0] | more]) for run in runs]
        )
        columns = tables.columns(found.groups, lambda run: 1)
        source = archive.Source(name, "?", [], [], [])
        record = {"commit": "", "torch": "2", "machine": "m"}
        text = report.readme(source, found, columns, [], record, [])
        assert found.metric == "eval/fd_digits" and "0.114" not in text + tables.csv(
            found.groups, columns
        )
        perfect = (
            "would get copying 0.500 ± 0.023 and FD (digits) 0.178 ± 0.054 (± standard "
            "deviation of one evaluation)"
        )
        assert (perfect in text, "copies: not measured, because fewer than 19" in text) == (
            name == "new",
        ) * 2
        heads = tables.csv(found.groups, columns).partition("\n")[0].split(",")
        assert ("eval/fd_digits_perfect" in heads) == (
            name == "new"
        ) and "eval/fd_digits_floor" not in heads
        assert "eval/fd_digits_perfect low" not in heads and "eval/fd_digits low" in heads


def test_distances_of_which_some_rest_on_fewer_images_do_not_mix_with_those_that_rest_on_all(
    tmp_path,
):
    """Until 2026-11 all numbers of a large data set rested on 50,000 of its images."""
    runs = arms(tmp_path, {"cosine": 5.0, "linear": 6.0}, 3)
    assert compatibility.parse_protocol(runs[0].rows[0]["eval/protocol"])["images"] == "9"
    other = runs[0].rows[0]["eval/protocol"] + ", by 5 of them except for the Frechet distance"
    with pytest.raises(ValueError, match="kept is 5 in .*; something else in "):
        statistics.compare(
            [
                dataclasses.replace(runs[0], rows=[runs[0].rows[0] | {"eval/protocol": other}]),
                *runs[1:],
            ]
        )


def test_a_difference_larger_than_the_noise_is_said_and_one_within_it_is_not(tmp_path):
    """Seeds shift all schedules alike, by ten times the noise between pairs: only the pairing
    can see what is there.
    """
    found = statistics.compare(arms(tmp_path, {"cosine": 5.0, "linear": 6.0, "sigmoid": 5.1}, 5))
    heads, *rows = report.verdicts(found)
    assert [(row[0], row[1], row[-1]) for row in rows] == [
        ("cosine", "linear", "better"),
        ("cosine", "sigmoid", "cannot tell"),
        ("sigmoid", "linear", "better"),
    ]
    assert heads[2:6] == ["FD (digits) lower by", "95 % interval", "lower in", "p (Holm)"]
    ps = []
    for gap in found.gaps:
        ones, others = (
            [run.final("eval/fd_digits") for run in group.runs] for group in (gap.worse, gap.better)
        )
        expected = scipy.stats.ttest_rel(ones, others)
        assert (gap.by - gap.half, gap.by + gap.half) == pytest.approx(
            tuple(expected.confidence_interval())
        )
        ps.append(expected.pvalue)
    assert [gap.p for gap in found.gaps] == pytest.approx(statistics.holm(ps))
    assert rows[0][4] == "5 of 5 seeds" and rows[1][4].endswith(" of 5 seeds")
    for gap, row in zip(found.gaps, rows, strict=True):
        low, high = map(float, row[3].split(" to "))
        # two digits of the half-width are written
        assert (low, high) == pytest.approx(
            (gap.by - gap.half, gap.by + gap.half), abs=gap.half / 10
        )
    answer = report.answer(found)
    assert (
        answer.startswith("cosine has the lowest mean, FD (digits) 7.0")
        and "better than linear" in answer
    )
    assert "cannot be told apart from sigmoid" in answer


@pytest.mark.parametrize("seeds", [1, 2])
def test_with_few_seeds_it_cannot_tell(tmp_path, seeds):
    found = statistics.compare(arms(tmp_path, {"cosine": 5.0, "linear": 60.0}, seeds))
    assert not any(gap.clear for gap in found.gaps)
    assert report.answer(found).startswith(f"Cannot tell: {seeds} seed")
    (_, row) = report.verdicts(found)
    assert row[3] == row[5] == "-" and row[6] == "cannot tell: fewer than 3 seeds"


def test_a_name_too_long_for_a_figure_is_its_row_of_the_table(tmp_path):
    long = "adamw(weight_decay=0.0123456789, betas=(0.9, 0.99), eps=1e-08)"
    levels = {"adam": 1.0, long: 2.0}
    assert len(long) > statistics.LONGEST_NAME
    groups = statistics.compare(arms(tmp_path, levels, 3, "train__optimizer")).groups
    assert {group.short for group in groups} == {
        "adam",
        f"row {1 + [group.name for group in groups].index(long)}",
    }
    rows = tables.table(groups, [])
    assert rows[0][:2] == ["row", "optimizer"] and [row[:2] for row in rows[1:]] == [
        [str(group.row), group.name] for group in groups
    ]
    few = statistics.compare(
        arms(tmp_path / "few", {"adam": 1.0, "adamw": 2.0}, 3, "train__optimizer")
    ).groups
    assert tables.table(few, [])[0] == ["optimizer", "seeds"]


def test_which_settings_are_compared(tmp_path):
    """On a numeric axis neighbours; of many words each with the reference; one that differs in
    more, with all others.

    And a setting with one seed is not called the lowest where others have three.
    """

    def compared(runs, **how):
        return {
            tuple(sorted((gap.better.name, gap.worse.name)))
            for gap in statistics.compare(runs, **how).gaps
        }

    decays = arms(tmp_path / "decays", {0.9: 1, 0.99: 2, 0.999: 3}, 3, "ema__decay")
    assert compared(decays) == {("decay 0.9", "decay 0.99"), ("decay 0.99", "decay 0.999")}
    words = {"linear": 1, "cosine": 2, "quadratic": 3, "sigmoid": 4, "sigmoid(tau=0.5)": 5}
    schedules = arms(tmp_path / "schedules", words, 3)
    assert len(compared(schedules)) == 10
    assert compared(schedules, reference={"diffusion.beta_schedule": "quadratic"}) == {
        tuple(sorted(("quadratic", word))) for word in words if word != "quadratic"
    }
    far = written(tmp_path, "far", {"ema__decay": 0.5, "diffusion__predict": "v"}, decays[0].rows)
    assert report.answer(statistics.compare([*decays, far])).startswith(
        "eps, decay 0.9 has the lowest mean, FD (digits) "
    )
    assert compared([*decays, far]) >= {
        tuple(sorted(("v, decay 0.5", f"eps, decay {decay}"))) for decay in (0.9, 0.99, 0.999)
    }


def test_the_best_setting_and_its_weakest_comparison_are_in_the_report(tmp_path):
    three = statistics.compare(
        arms(tmp_path / "three", {"cosine": 5.0, "linear": 9.0, "sigmoid": 6.0}, 5)
    )
    weakest = max(gap.p for gap in three.gaps if gap.better.name == "cosine")
    assert weakest == max(gap.p for gap in three.gaps if gap.worse.name == "sigmoid")
    ps = {(row[0], row[1]): row[5] for row in report.verdicts(three)}
    assert ps["cosine", "sigmoid"] == report.p_of(weakest)
    assert report.answer(three).startswith("cosine is best: FD (digits) ")
    assert report.answer(three).endswith(", better than linear and sigmoid (5 seeds per setting).")
    decays = statistics.compare(
        arms(tmp_path / "decays", {0.99: 1, 0.9: 2, 0.999: 30}, 3, "ema__decay")
    )
    columns = [column for column in tables.columns(decays.groups, lambda run: 1) if column.table]
    rows = tables.table(decays.groups, columns[:1])
    assert [row[0] for row in rows] == ["decay", "0.9", "0.99", "0.999"]
    for row, group in zip(rows[1:], decays.groups, strict=True):
        assert row[2] == tables.amount(*group.final("eval/fd_digits"))


def test_a_run_that_repeats_another_and_a_measurement_among_trainings_are_left_out(tmp_path):
    runs = arms(tmp_path, {"cosine": 5.0, "linear": 9.0}, 3)
    runs.append(
        written(tmp_path, "twin", {"seed": 1, "diffusion__beta_schedule": "cosine"}, runs[1].rows)
    )
    runs.append(
        written(
            tmp_path,
            "measured",
            {"seed": 3, "diffusion__beta_schedule": "cosine"},
            [
                {
                    key: value
                    for key, value in runs[0].rows[0].items()
                    if key == "step" or key.startswith("eval/")
                }
            ],
        )
    )
    found = statistics.compare(runs)
    assert {run.name: run.fault for run in found.runs if run.fault} == {
        "twin": "repeats cosine-1, with the same options and seeds",
        "measured": "measures a checkpoint, and others are trainings: compare those by themselves",
    }
    assert [len(group.runs) for group in found.groups] == [3, 3]


@pytest.mark.parametrize("first, shown", [(9.0, False), (1.0, True)])
def test_best_values_are_shown_where_they_are_not_the_last(tmp_path, first, shown):
    runs = [
        written(
            tmp_path,
            str(seed),
            {"seed": seed},
            [{"step": 6, "eval/fd_digits": first}, DONE | {"eval/fd_digits": 5.0}],
        )
        for seed in range(3)
    ]
    found = statistics.compare(runs)
    columns = tables.columns(found.groups, lambda run: 1)
    assert "best eval/fd_digits" in tables.csv(found.groups, columns).splitlines()[0]
    source = archive.Source("best", "?", [], [], [])
    record = {"commit": "", "torch": "2", "machine": "the test's"}
    text = report.readme(source, found, columns, [], record, [])
    assert ("best FD (digits)" in text) is shown and (
        "a run's best is its last" in text
    ) is not shown
    assert ("so they flatter" in text) is shown


@pytest.mark.parametrize("seeds", [2, 3])
def test_curves_have_bands_where_seeds_show_the_noise(tmp_path, seeds):
    """Of two seeds the interval, 12.7 standard errors, would leave the axes: no band, and the
    caption says so.
    """
    runs = [
        written(
            tmp_path,
            f"{lr}-{seed}",
            {"seed": seed, "train__learning_rate": lr},
            [
                DONE
                | {"step": step, "eval/fid": 1.0 + lr + 0.1 * seed, "progress/epoch": step / 12}
                for step in (6, 12)
            ],
        )
        for lr in (0.1, 0.2)
        for seed in range(seeds)
    ]
    found = statistics.compare(runs)
    bands = [len(axis.collections) for axis in figures.curves(found.groups, ["eval/fid"]).axes]
    assert set(bands) == {2 if seeds >= studies_runs.MIN_SEEDS else 0}
    (caption,) = (words for name, words, _ in figures.draw(found) if name == "curves.pdf")
    assert ("from 3 seeds on" in caption) is (seeds < studies_runs.MIN_SEEDS)


def test_titles_of_samples_keep_off_the_edge(tmp_path):
    run = written(tmp_path, "a", {}, [DONE | {"eval/fid": 1.0}])
    Image.new("L", (40, 40)).save(tmp_path / "step_00000012.png")
    group = statistics.group_runs(
        [dataclasses.replace(run, grid=tmp_path / "step_00000012.png")], ["seed"]
    )
    figure = figures.samples(group, 0)
    figure.draw_without_rendering()
    title = figure.axes[0].title.get_window_extent()
    assert title.y1 < figure.bbox.y1 - 0.05 * figure.dpi  # inches


def test_losses_of_different_schedules_decide_nothing(tmp_path):
    runs = []
    for schedule in ("cosine", "linear"):
        runs += [
            written(
                tmp_path,
                f"{schedule}-{seed}",
                {"diffusion__beta_schedule": schedule, "seed": seed},
                [DONE | {"val/loss_ema": 0.1 + len(schedule)}],
            )
            for seed in range(3)
        ]
    found = statistics.compare(runs)
    assert (
        found.metric == "val/loss_ema"
        and "is a different quantity for each `diffusion.beta_schedule`" in report.answer(found)
    )


# real runs


def test_the_report_of_a_study(here, capsys):
    found = compare("experiments/schedules.yaml", machine="the test's")
    out = capsys.readouterr().out
    home = here / "experiments" / "schedules"
    readme = (home / "README.md").read_text()
    answer = report.answer(found)
    assert (
        f"**Answer.** {answer}" in readme and f"Answer: {answer}" in out and "the test's" in readme
    )
    assert (
        "6 runs: 2 settings of `diffusion.beta_schedule`, 3 seeds" in readme
        and "## Left out" not in readme
    )
    rows = table(home / "results.csv")
    assert [row["diffusion.beta_schedule"] for row in rows] == ["linear", "cosine"] and rows[0][
        "seeds"
    ] == "3"
    last = [
        json.loads(
            (here / "runs" / "schedules" / f"beta_schedule=cosine-seed={seed}" / "metrics.jsonl")
            .read_text()
            .splitlines()[-1]
        )
        for seed in range(3)
    ]
    for key in (
        "eval/fd_digits",
        "eval/kd_digits",
        "eval/copying",
        "val/loss",
        "val/loss_ema",
        "progress/petaflop",
    ):
        # six digits are written
        assert float(rows[1][key]) == pytest.approx(np.mean([row[key] for row in last]), rel=1e-5)
    low, high = scipy.stats.t.interval(
        0.95,
        2,
        np.mean([row["val/loss"] for row in last]),
        scipy.stats.sem([row["val/loss"] for row in last]),
    )
    assert (float(rows[1]["val/loss low"]), float(rows[1]["val/loss high"])) == pytest.approx(
        (low, high), rel=1e-5
    )
    assert float(rows[1]["best eval/fd_digits"]) <= float(rows[1]["eval/fd_digits"])
    net = build.network(
        config_files.from_json(
            (here / "runs/schedules/beta_schedule=cosine-seed=0/config.json").read_text()
        )
    )
    assert int(rows[1]["parameters"]) == sum(parameter.numel() for parameter in net.parameters())
    for name in ("settings.png", "curves.png", "samples.png"):
        assert f"]({name})" in readme
        with Image.open(home / name) as picture:
            assert min(picture.size) > 200
    assert sorted(
        path.name for path in (home / "runs" / "beta_schedule=cosine-seed=2").rglob("*.*")
    ) == ["config.json", "metrics.jsonl", "step_00000012.png"]


def test_the_report_is_made_again_from_what_it_keeps_byte_for_byte(here, tmp_path):
    compare("experiments/schedules.yaml")
    before = {
        path: path.read_bytes() for path in (here / "experiments").rglob("*.*") if path.is_file()
    }
    shutil.rmtree(here / "runs")
    compare("experiments/schedules.yaml")
    assert {path: path.read_bytes() for path in before} == before
    compare("experiments/schedules/runs", out="again")
    assert Path("again/made.json").read_bytes() == before[here / "experiments/schedules/made.json"]
    again = Path("again/README.md").read_bytes(), Path("again/results.csv").read_bytes()
    compare("again/runs", out="again")
    assert (Path("again/README.md").read_bytes(), Path("again/results.csv").read_bytes()) == again


def test_runs_elsewhere(here, capsys):
    """--runs is the same folder for ddpm.sweep and ddpm.compare, and the report's commands have
    it; the study's own will do.
    """
    (here / "runs").rename("elsewhere")
    compare("experiments/schedules.yaml", runs="elsewhere")
    readme = (here / "experiments/schedules/README.md").read_text()
    for run_ddpm in ("sweep", "compare"):
        assert (
            f"    python -m ddpm.{run_ddpm} experiments/schedules.yaml --runs=elsewhere\n" in readme
        )
    assert "makes the runs in `elsewhere/schedules`" in readme
    compare("experiments/schedules.yaml", runs="elsewhere/schedules")
    assert "--runs" not in (here / "experiments/schedules/README.md").read_text()


def test_what_is_missing_or_broken_is_named_and_left_out(here, capsys):
    runs = here / "runs" / "schedules"

    def spoil(name, change):
        path = runs / name / "metrics.jsonl"
        path.write_text(change(path.read_text()))

    shutil.rmtree(runs / "beta_schedule=linear-seed=0")
    (runs / "beta_schedule=linear-seed=1" / "config.json").unlink()
    spoil("beta_schedule=linear-seed=2", lambda text: "".join(text.splitlines(keepends=True)[:-1]))
    spoil("beta_schedule=cosine-seed=0", lambda text: text[:-20])
    spoil(
        "beta_schedule=cosine-seed=1",
        lambda text: text.replace('"eval/fd_digits": 2', '"eval/fd_digits": null, "was": 2'),
    )
    found = compare("experiments/schedules.yaml")
    out = capsys.readouterr().out.splitlines()
    readme = (here / "experiments" / "schedules" / "README.md").read_text()
    for line in (
        "beta_schedule=linear-seed=0: no run",
        "beta_schedule=linear-seed=1: holds no run: there is no config.json in it",
        "beta_schedule=linear-seed=2: ends at step 8 of 12",
        "beta_schedule=cosine-seed=0: metrics.jsonl is torn after 3 rows",
        "beta_schedule=cosine-seed=1: eval/fd_digits is not finite at the end",
    ):
        assert f"left out: {line}" in out and f"- {line}\n" in readme
    assert [run.name for run in found.counted] == ["beta_schedule=cosine-seed=2"]
    before = (here / "experiments" / "schedules" / "README.md").read_bytes()
    shutil.rmtree(here / "runs")
    compare("experiments/schedules.yaml")
    assert (here / "experiments" / "schedules" / "README.md").read_bytes() == before


@pytest.mark.parametrize(
    "said, fault",
    [
        ({"progress/epoch": "x", "progress/images": {}}, "metrics.jsonl is torn after 1 rows"),
        ({"step": 10**400}, "metrics.jsonl is torn after 1 rows"),
        ({"progress/epoch": "x", "progress/images": "y"}, ""),
        ({"progress/epoch": 1e-320, "progress/images": 1e308}, ""),
        ({"step": 12, "progress/petaflop": 1e308}, ""),
        ({"eval/fid": 1e308}, "eval/fid is not finite at the end"),
        ({"eval/fid": "low"}, "eval/fid is not finite at the end"),
    ],
)
def test_rows_of_strangers_are_left_out_or_read(said, fault, tmp_path):
    row = DONE | {"eval/fid": 1.0, "eval/protocol": "a"}
    for seed in range(3):
        written(tmp_path, f"mine-{seed}", {"seed": seed}, [row])
    theirs = written(
        tmp_path, "theirs", {"seed": 3}, [DONE | {"step": 0, "progress/petaflop": 1.0}, row | said]
    )
    found = compare(*map(str, tmp_path.iterdir()))
    assert [run.fault for run in found.runs if run.name == theirs.name] == [fault]


def png(width, height):
    """A PNG that claims a size and has no pixels."""
    chunks = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0), b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def test_samples_of_strangers_are_left_out_of_the_figure(tmp_path):
    contents = {
        "too large": png(200_000, 200_000),
        "truncated": png(8, 8),
        "not an image": b"words",
        "thin": b"words",
    }
    for steps, (name, content) in enumerate(contents.items(), 1):
        written(tmp_path, name, {"sample__steps": steps}, [DONE | {"eval/fid": 1.0}])
        (tmp_path / name / "samples").mkdir()
        (tmp_path / name / "samples" / "step_00000012.png").write_bytes(content)
        (tmp_path / name / "samples" / "step_last.png").write_bytes(content)
    Image.new("1", (1, 5000)).save(tmp_path / "thin" / "samples" / "step_00000013.png")
    found = compare(str(tmp_path), out=tmp_path / "report")
    *unread, thin = figures.samples(found.groups, 0).axes
    said = [text.get_text() for axis in unread for text in axis.texts]
    assert said == [f"step_00000012.png is left out:\n{fault}" for fault in list(contents)[:3]]
    assert thin.images[0].get_array().shape == (2400, 1, 3)


def test_rows_of_older_runs_are_read_under_the_keys_of_today(tmp_path):
    old = {
        "eval/made": "a",
        "eval/bits_per_dim_made": "b",
        "eval/evaluations": 7.0,
        "eval/fid": 1.0,
    }
    run = written(tmp_path, "old", {}, [DONE | old])
    new = {
        "eval/protocol": "a",
        "eval/bits_per_dim_protocol": "b",
        "eval/nfe": 7.0,
        "eval/fid": 1.0,
    }
    assert run.rows == [DONE | new]
    assert run.protocols("eval/protocol") == ["a"] and run.final("eval/nfe") == 7


class Foreign:
    """A run of a W&B server that means harm, as its public API gives it."""

    def __init__(self, path, step=12):
        self.config = {"config.seed": 1}
        self.path = path
        self.step = step

    def scan_history(self):
        return [{"train/step": self.step, "eval/fid": 1.0, "samples": {"path": self.path}}]

    def files(self, names):
        raise AssertionError(names)


@pytest.mark.parametrize(
    "path, step",
    [
        ("../../harm.png", 12),
        ("/etc/harm", 12),
        ("media/images/../x", 12),
        (["media/images/a.png"], 12),
        ("media/images/a.png", "12"),
    ],
)
def test_a_server_names_no_file_outside_its_folder(path, step, tmp_path, capsys):
    write_run_folder(Foreign(path, step), tmp_path / "run")
    assert capsys.readouterr().out.startswith(
        "left out: the samples of run, which W&B does not keep at "
    )


def test_how_a_number_was_made_is_told_by_words(tmp_path):
    for number, made in enumerate(("a", 5)):
        written(
            tmp_path,
            str(number),
            {"seed": number},
            [DONE | {"eval/fid": 1.0, "eval/protocol": made}],
        )
    with pytest.raises(ValueError, match="do not compare: eval/protocol is a in 0; 5 in 1"):
        compare(str(tmp_path))
    nearly = "a; 1 samples of the b weights in c; " + "d, 1 steps, " * 9000
    assert compatibility.parse_protocol(nearly) == {"eval/protocol": nearly}


def test_numbers_made_in_different_ways_are_refused(here):
    path = here / "runs" / "schedules" / "beta_schedule=linear-seed=2" / "metrics.jsonl"
    text = path.read_text()
    for part, there, other in (
        ("extractor", "digits-e5", "digits-00"),
        ("samples", "16 samples", "17 samples"),
        ("sampler", "ddim,", "ddpm,"),
        ("steps", "2 steps", "3 steps"),
        ("data", "images 1b", "images 2b"),
    ):
        assert there in text
        path.write_text(text.replace(there, other))
        with pytest.raises(
            ValueError, match=f"do not compare: {part} is .* in beta_schedule=.*linear-seed=2"
        ) as caught:
            compare("experiments/schedules.yaml")
        assert "\n" not in str(caught.value) and not (here / "experiments" / "schedules").exists()


def test_a_study_over_how_trainings_are_measured(tmp_path, monkeypatch):
    """Every run counts: what the study varies is the setting, and repeats nothing; the same runs
    alone do not compare.
    """
    monkeypatch.chdir(tmp_path)
    Path("tiny.py").write_text(CONFIG)
    text = STUDY.replace(
        "config.diffusion.beta_schedule: {{values: [linear, cosine]}}",
        "config.evaluate.steps: {{values: [2, 5]}}",
    ).replace("[0, 1, 2]", "[3]")
    Path("steps.yaml").write_text(text.format(config="tiny.py"))
    wanted = studies_study.read_study("steps.yaml")
    for point in wanted.grid():
        assert run(wanted.config(point), wanted.folder() / wanted.run_name(point))
    found = compare("steps.yaml", out="report")
    assert [group.setting for group in found.groups] == [
        {"evaluate.steps": 2},
        {"evaluate.steps": 5},
    ]
    assert (
        not any(run.fault for run in found.runs)
        and "## Left out" not in Path("report/README.md").read_text()
    )
    ways = [run.protocols("eval/protocol")[-1] for run in found.counted]
    assert (
        "2 steps" in ways[0]
        and "5 steps" in ways[1]
        and len({run.final("eval/fd_digits") for run in found.counted}) == 2
    )
    with pytest.raises(
        ValueError,
        match="steps is 2 in .*; give all runs the same config.evaluate.steps, or measure their",
    ):
        compare("runs/steps")


@pytest.mark.parametrize(
    "option, values",
    [
        ("data.num_workers", (0, 2)),
        ("evaluate.budget", (0.1, 0.2)),
        ("every.log", ("1 steps", "2 steps")),
    ],
)
def test_what_a_study_varies_is_never_ignored(tmp_path, option, values):
    rows = [DONE | {"eval/fid": 1.0}]
    runs = [
        written(tmp_path, f"{value}-{seed}", {option.replace(".", "__"): value, "seed": seed}, rows)
        for value in values
        for seed in range(3)
    ]
    found = statistics.compare(runs, axes=[option])
    assert [(group.setting, len(group.runs)) for group in found.groups] == [
        ({option: value}, 3) for value in values
    ]


def test_a_run_of_another_study_is_refused(here):
    folder = here / "runs" / "schedules" / "beta_schedule=cosine-seed=1"
    saved = (folder / "config.json").read_text()
    (folder / "config.json").write_text(saved.replace('"cosine"', '"sigmoid"'))
    with pytest.raises(
        ValueError,
        match="cosine-seed=1 is of another study: config.diffusion.beta_schedule is 'sigmoid'",
    ):
        compare("experiments/schedules.yaml")
    (folder / "config.json").write_text(
        saved.replace('"learning_rate": 0.001', '"learning_rate": 0.002')
    )
    with pytest.raises(
        ValueError,
        match="cosine-seed=1 is of another study: config.train.learning_rate is 0.002 there",
    ):
        compare("experiments/schedules.yaml")
    (folder / "config.json").write_text("{")
    compare("experiments/schedules.yaml")  # damaged: named like any other broken run


def test_folders_without_a_study(here, capsys):
    """The report finds what varies; without --out nothing is written."""
    (here / "runs" / "schedules" / "sweep.json").write_text("{}")
    found = compare(*map(str, sorted((here / "runs" / "schedules").iterdir())))
    assert (
        found.axes == ["diffusion.beta_schedule"]
        and "nothing is written" in capsys.readouterr().out
    )
    assert sorted(path.name for path in here.iterdir()) == ["experiments", "runs", "tiny.py"]
    with pytest.raises(ValueError, match="runs that no report keeps"):
        compare("runs/schedules", out=".")
    assert len(list((here / "runs" / "schedules").glob("*/config.json"))) == 6
    with pytest.raises(ValueError, match="there is no run folder"):
        compare("runs/schedules", "runs/other")


def test_a_study_that_varies_the_config_file(here):
    """Its settings have the variants' names, though the runs differ in other options."""
    text = STUDY.replace(
        "config.diffusion.beta_schedule: {{values: [linear, cosine]}}",
        "config: {{values: [{config}, '{config}:wide']}}",
    ).replace('"--config={config}", ', "")
    (here / "experiments" / "widths.yaml").write_text(text.format(config=here / "tiny.py"))
    wanted = studies_study.read_study("experiments/widths.yaml")
    for name, channels in (("tiny", 8), ("tiny-wide", 16)):
        for seed in range(3):
            # one has not the sweep's name
            folder = here / "runs" / "widths" / f"{name}-seed={seed or '0-agent'}"
            shutil.copytree(
                here / "runs" / "schedules" / f"beta_schedule=cosine-seed={seed}", folder
            )
            path = folder / "config.json"
            path.write_text(
                path.read_text().replace('"model_channels": 8', f'"model_channels": {channels}')
            )
    assert {path.name for path in (here / "runs" / "widths").iterdir()} >= {
        wanted.run_name(point) for point in wanted.grid() if point["config.seed"]
    }
    found = compare("experiments/widths.yaml")
    assert [group.name for group in found.groups] == ["tiny", "wide"] and len(found.counted) == 6
    (_, row) = report.verdicts(found)
    assert {row[0], row[1]} == {"tiny", "wide"} and row[6] == "cannot tell: equal in every seed"


def test_measurements_against_the_number_of_steps(here, trained, capsys):
    """Runs of ddpm.evaluate: what they measure with may vary, and is drawn as a curve."""
    for steps in (1, 2, 4):
        evaluate(
            trained / "runs" / "schedules" / "beta_schedule=cosine-seed=0",
            workdir=here / "measured" / str(steps),
            **{"evaluate.steps": steps},
        )
    found = compare("measured", out="report")
    assert found.axes == ["evaluate.steps"] and [
        group.setting["evaluate.steps"] for group in found.groups
    ] == [1, 2, 4]
    assert report.answer(found).startswith("Cannot tell: 1 seed per setting")
    assert Path("report", "along_steps.png").is_file() and not Path("report", "curves.png").exists()
    text = Path("report", "README.md").read_text()
    assert "FD (digits) against network evaluations per image" in text
    assert "steps varied" in text and "Samples, seed 0, after " in text
    grids = {
        Path("report", "runs", steps, "samples").glob("step_*.png").__next__().read_bytes()
        for steps in "124"
    }
    assert len(grids) == 3  # each drawn as it was measured


def test_checkpoints_of_one_training_are_settings(here, trained):
    """Trainings differ in options or in the seed, which shows the noise; checkpoints of one in
    the step, else in the file.
    """
    parts = "runs/schedules/beta_schedule={}-seed={}/{}".format
    early = "checkpoints/step_00000010.pt"
    late = "checkpoints/step_00000012.pt"
    final = "final.safetensors"

    def compared(name, *checkpoints):
        Path(name).write_text(
            json.dumps(
                {
                    "method": "grid",
                    "command": ["${env}", "${interpreter}", "-m", "ddpm.evaluate", "${args}"],
                    "parameters": {
                        "checkpoint": {"values": list(checkpoints)},
                        "config.evaluate.steps": {"values": [2]},
                    },
                }
            )
        )
        wanted = studies_study.read_study(name)
        for point in wanted.grid():
            folder = wanted.folder() / wanted.run_name(point)
            evaluate(trained / point["checkpoint"], workdir=folder)
        folder.rename(f"{folder}-1a2b3c4d")  # as a run of a W&B sweep is named
        found = compare(name, out=Path(name).stem)
        assert not any(run.fault for run in found.runs) and len(found.counted) == len(checkpoints)
        return [(group.setting, len(group.runs)) for group in found.groups], found

    seeds = [parts("cosine", seed, file) for seed in (0, 1) for file in (early, late)]
    assert compared("steps.yaml", *seeds)[0] == [({"step": 10}, 2), ({"step": 12}, 2)]
    assert "| 10 | 2 |" in Path("steps/README.md").read_text()
    settings, found = compared("files.yaml", parts("cosine", 0, late), parts("cosine", 0, final))
    assert settings == [
        ({"checkpoint": "step_00000012.pt"}, 1),
        ({"checkpoint": "final.safetensors"}, 1),
    ]
    # the same weights
    assert found.groups[0].final("eval/fd_digits") == found.groups[1].final("eval/fd_digits")
    settings, _ = compared(
        "trainings.yaml",
        *(parts(name, seed, "") for name in ("linear", "cosine") for seed in (0, 1)),
    )
    assert settings == [
        ({"diffusion.beta_schedule": "linear"}, 2),
        ({"diffusion.beta_schedule": "cosine"}, 2),
    ]


def test_the_command(here):
    def run_ddpm(*arguments):
        done = subprocess.run(
            [python(), "-m", "ddpm.compare", *arguments],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        return done.returncode, done.stdout, done.stderr.strip().splitlines()

    code, out, _ = run_ddpm("experiments/schedules.yaml")
    assert code == 0 and "Answer: " in out and "results.csv" in out
    code, out, _ = run_ddpm("--help")
    said = " ".join(out.split())
    assert (
        code == 0 and "Exit codes: 0 done" in said and "2 usage error or nothing to compare" in said
    )
    shutil.rmtree(here / "runs")
    shutil.rmtree(here / "experiments" / "schedules")
    code, _, err = run_ddpm("experiments/schedules.yaml")
    assert code == 2 and err == [
        "error: runs/schedules has no runs yet; python -m ddpm.sweep experiments/schedules.yaml "
        "makes them, and --runs=ENTITY/PROJECT/SWEEP takes those of a W&B sweep"
    ]


def test_runs_on_a_server(here, server):
    """Runs of a W&B project come back as they are in their folders, and are compared by one
    command.
    """
    environment = os.environ | server.login | {"PYTHONPATH": str(ROOT)}

    def run_ddpm(name, *arguments):
        command = [python(), "-m", f"ddpm.{name}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run_ddpm("main", "--config=tiny.py", "--config.wandb.mode=online", "--workdir=runs/mine")
    assert "Answer: There is only one setting" in run_ddpm("compare", "me/ddpm", "--out=report")
    (kept,) = map(studies_runs.read_run, Path("report", "runs").iterdir())
    mine = studies_runs.read_run("runs/mine")
    assert kept.options == mine.options and kept.rows == mine.rows and kept.name.startswith("mine-")
    assert np.array_equal(*(np.asarray(Image.open(run.grid)) for run in (kept, mine)))


def test_no_runs_at_all_is_one_line(here, server, monkeypatch):
    """A sweep that nobody has begun, a project of other people's runs, and folders that are all
    damaged.
    """
    for name, value in server.login.items():
        monkeypatch.setenv(name, value)
    server.sweeps["s1"] = Sweep("s1", "ddpm", (here / "experiments" / "schedules.yaml").read_text())
    for words, runs in ((["me/ddpm/s1"], None), (["experiments/schedules.yaml"], "me/ddpm/s1")):
        with pytest.raises(ValueError, match="^me/ddpm/s1 has no runs of ddpm yet$"):
            compare(*words, runs=runs)
    server.runs["a"] = Run("a", "ddpm", columns={"lr": {"value": 0.1}}, state="finished")
    with pytest.raises(ValueError, match="^me/ddpm has no runs of ddpm yet$"):
        compare("me/ddpm")
    server.runs["b"] = Run("b", "ddpm", columns={"config.sede": {"value": 1}}, state="finished")
    with pytest.raises(
        ValueError,
        match="^me/ddpm has no run that can be read .*b: config.json: .*'sede' that this version",
    ):
        compare("me/ddpm")
    for path in here.glob("runs/schedules/*/config.json"):
        path.write_text("{")
    with pytest.raises(
        ValueError, match="^runs/schedules has no run that can be read .*the file is damaged"
    ) as caught:
        compare("runs/schedules")
    assert "\n" not in str(caught.value)


REPORTS = [
    path for path in sorted((ROOT / "experiments").glob("*.yaml")) if path.with_suffix("").is_dir()
]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_committed_report_is_made_again_from_what_it_keeps(path, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    home = path.with_suffix("")
    found = compare(str(path.relative_to(ROOT)), runs=home / "runs", out=tmp_path)
    for name in ("results.csv", "README.md"):
        assert (tmp_path / name).read_bytes() == (home / name).read_bytes(), name
    assert (
        f"[{path.stem}]({path.stem}/README.md)" in (ROOT / "experiments" / "README.md").read_text()
    )
    assert not [run for run in found.runs if run.fault]
