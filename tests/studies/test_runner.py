"""Sweeps without a server, with real runs as processes of their own."""

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml
from PIL import Image

from ddpm.common import errors as common_errors
from ddpm.config import files
from ddpm.studies import runs as studies_runs
from ddpm.studies.runner import (
    Record,
    RunPool,
    Trial,
    check_comparable,
    result_of,
    sweep,
    trial_of,
)
from ddpm.studies.search import bayes_points, choose_points
from ddpm.studies.study import read_study
from support.commands import ROOT, python

TRAIN = [
    "${env}",
    "${interpreter}",
    "-m",
    "ddpm.main",
    f"--config={ROOT}/configs/digits.py",
    "${args}",
]
TINY = {
    "config.model.model_channels": 8,
    "config.model.channel_mult": [1, 2],
    "config.train.batch_size": 4,
    "config.train.length": "2 steps",
    "config.every.log": "1 steps",
    "config.every.sample": "0 steps",
    "config.every.evaluate": "0 steps",
    "config.wandb.mode": "disabled",
}


@pytest.fixture(autouse=True)
def forked(monkeypatch):
    """The runs of a sweep start at once."""
    monkeypatch.setattr(sys, "executable", python())


def study(folder, parameters, **said):
    """A study of tiny runs, in a file of that folder."""
    path = folder / "asked.yaml"
    constants = {name: {"value": value} for name, value in TINY.items()}
    said = {"method": "grid", "command": TRAIN, "metric": {"name": "val/loss_ema"}} | said
    path.write_text(yaml.safe_dump(said | {"parameters": constants | parameters}))
    return read_study(path)


def run_ddpm(folder, *flags, **options):
    """`python -m ddpm.sweep` on that study as a process."""
    words = [
        python(),
        "-m",
        "ddpm.sweep",
        str(folder / "asked.yaml"),
        f"--runs={folder / 'runs'}",
        *flags,
    ]
    return subprocess.Popen(
        words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_grid_with_broken_runs(tmp_path, capsys):
    """Broken runs are reported and the rest goes on; the same again runs only what is not done, and
    at last nothing.
    """
    photos = tmp_path / "photos"
    asked = study(
        tmp_path,
        {"config.data.source": {"values": ["digits", f"folder(path='{photos}')"]}},
        early_terminate={"type": "hyperband", "min_iter": 3},
    )
    folder = asked.folder(tmp_path / "runs")
    names = [asked.run_name(point) for point in asked.grid()]
    assert sweep(asked, folder, parallel=2) == common_errors.FAILED
    said = capsys.readouterr().out
    assert (
        "1 of 2 runs are done" in said and "refused (exit code 2)" in said and str(photos) in said
    )
    assert [f"not done: {name}" in said for name in names] == [False, True]
    assert [(folder / f"{name}.log").exists() for name in names] == [False, True]
    loss = json.loads((folder / names[0] / "metrics.jsonl").read_text().splitlines()[-1])[
        "val/loss_ema"
    ]
    assert f"val/loss_ema {loss:.4g}" in said and Record(folder).runs[names[0]]["result"] == loss

    photos.mkdir()
    for k in range(8):
        Image.new("L", (20, 20), 30 * k).save(photos / f"{k}.png")
    assert sweep(asked, folder, parallel=2) == common_errors.DONE
    said = capsys.readouterr().out
    assert (
        "2 of 2 runs are done, 1 of them before" in said
        and names[0] not in said
        and not list(folder.glob("*.log"))
    )

    assert sweep(asked, folder) == common_errors.DONE
    said = capsys.readouterr().out
    assert "started" not in said and "early_terminate is for W&B's server" in said


# left to the budget
OPEN = {
    "config.every.evaluate": {"value": "2 steps"},
    "config.evaluate.num_samples": {"value": 0},
    "config.evaluate.steps": {"value": 0},
    "config.evaluate.sampler": {"value": "auto"},
    "config.sample.sampler": {"value": "ddpm"},
    "config.sample.steps": {"value": 50},
}


@pytest.mark.parametrize(
    "parameters, part",
    [
        (
            {"config.evaluate.sampler": {"values": ["auto", "heun"]}},
            "steps is 20 in .* the same config.evaluate.steps",
        ),
        (
            {
                "config.train.length": {"values": ["90 epochs", "4000 epochs"]},
                "config.every.evaluate": {"value": "auto"},
            },
            "",
        ),
        ({"config.data.image_size": {"values": [8, 16]}}, "data is .* leave runs out"),
        (
            {"config.evaluate.extractor": {"values": ["digits", "inception"]}},
            "extractor is digits in ",
        ),
        (
            {
                "config.data.class_labels": {"value": True},
                "config.sample.guidance": {"values": [1.0, 3.0]},
                "config.evaluate.sampler": {"value": "ddim"},
                "config.evaluate.steps": {"values": [4, 9]},
            },
            "",
        ),
        (
            {
                "config.evaluate.num_samples": {"values": [500, 600]},
                "config.seed": {"values": [1, 2]},
            },
            "",
        ),
        (
            {
                "config.evaluate.sampler": {"values": ["ddpm", "heun"]},
                "config.every.evaluate": {"value": "0 steps"},
            },
            "",
        ),
    ],
)
def test_runs_that_would_not_compare_are_refused_before_the_first(tmp_path, parameters, part):
    asked = study(tmp_path, OPEN | parameters)
    if not part:
        return check_comparable(asked, asked.grid())
    with pytest.raises(
        ValueError, match=f"asked.yaml: numbers made in different ways do not compare: {part}"
    ) as error:
        check_comparable(asked, asked.grid())
    assert str(error.value).endswith(
        "checkpoints in a study of ddpm.evaluate, as experiments/samplers.yaml does"
    )
    assert "\n" not in str(error.value)


def test_such_a_study_starts_no_run(tmp_path, capsys):
    asked = study(tmp_path, OPEN | {"config.evaluate.sampler": {"values": ["auto", "heun"]}})
    with pytest.raises(ValueError, match="do not compare: steps is"):
        sweep(asked, tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("*/*")) and "started" not in capsys.readouterr().out


def test_the_closing_line_and_damage_to_what_is_done(tmp_path, capsys):
    """A done run is read before it counts as done; the report's command has the folder that was
    given; the whole is timed.
    """
    asked = study(tmp_path, {"config.seed": {"values": [0, 1]}})
    folder = asked.folder(tmp_path / "my runs")
    trials = [trial_of(asked, point) for point in asked.grid()]
    rows = '{"step": 1, "val/loss_ema": 0.5}\n{"step": 2, "val/loss_ema": 0.25}\n'
    for trial in trials:
        files.write(asked.config(trial.point), folder / trial.name)
        (folder / trial.name / "metrics.jsonl").write_text(rows)
        Record(folder).put(trial, common_errors.DONE, 0.25)
    assert sweep(asked, folder) == common_errors.DONE
    *_, counted, report = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"asked: 2 of 2 runs are done, 2 of them before, in \d\d:\d\d", counted)
    assert shlex.split(report.removeprefix("report: ")) == [
        "python",
        "-m",
        "ddpm.compare",
        str(tmp_path / "asked.yaml"),
        f"--runs={tmp_path / 'my runs'}",
    ]

    torn = "metrics.jsonl is torn after"
    for damaged, fault in {
        rows[:-5]: f"{torn} 1 rows",
        rows + "5\n": f"{torn} 2 rows",
        "": "no rows",
    }.items():
        (folder / "seed=1" / "metrics.jsonl").write_text(damaged)
        assert sweep(asked, folder) == common_errors.FAILED
        _, told, counted, *rest = capsys.readouterr().out.splitlines()
        remedy = f"delete {folder / 'seed=1'}, and the same command makes it again"
        assert told == f"[2/2] seed=1: came to its end, but {fault}; {remedy}"
        assert counted.startswith("asked: 1 of 2 runs are done, 1 of them before")
        assert rest == ["not done: seed=1", "the same command tries again"]
    (folder / "seed=1" / "config.json").unlink()
    assert sweep(asked, folder) == common_errors.FAILED
    assert "there is no config.json in it; delete" in capsys.readouterr().out
    shutil.rmtree(folder / "seed=1")
    assert [Record(folder).finished(trial) for trial in trials] == [True, False]


def test_an_interrupted_sweep_goes_on(tmp_path):
    """SIGTERM reaches the run, which saves; meanwhile nobody else sweeps there; the same command
    then completes it.
    """
    asked = study(
        tmp_path,
        {"config.seed": {"values": [7]}, "config.train.length": {"value": "1000000 steps"}},
    )
    folder = asked.folder(tmp_path / "runs")
    rows = asked.folder(tmp_path / "runs") / "seed=7" / "metrics.jsonl"
    process = run_ddpm(tmp_path)
    deadline = time.monotonic() + 120  # seconds, on a busy machine
    while not (rows.exists() and rows.read_text().count("\n") > 2):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.1)
    with pytest.raises(ValueError, match="in use by another process"):
        sweep(asked, folder)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=120)
    assert process.returncode == common_errors.INTERRUPTED, errors
    assert "seed=7: interrupted" in said and "run the same command to continue" in said

    stopped = json.loads(rows.read_text().splitlines()[-1])["step"]
    shorter = study(
        tmp_path,
        {"config.seed": {"values": [7]}, "config.train.length": {"value": f"{stopped + 2} steps"}},
    )
    assert sweep(shorter, folder) == common_errors.DONE
    assert f"resumed from step {stopped}" in (folder / "seed=7" / "training.log").read_text()
    assert [json.loads(line)["step"] for line in rows.read_text().splitlines()] == list(
        range(1, stopped + 3)
    )


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path):
    study(tmp_path, {"config.seed": {"values": [0]}})
    path = tmp_path / "asked.yaml"
    path.write_text(path.read_text().replace("config.seed", "config.sede"))
    process = run_ddpm(tmp_path)
    said, errors = process.communicate(timeout=120)
    assert (process.returncode, said) == (common_errors.USAGE_ERROR, "")
    assert errors.startswith(
        f"error: {path}: unknown parameter 'config.sede' (did you mean 'config.seed'?)"
    )
    assert errors.count("\n") == 1 and not (tmp_path / "runs").exists()
    said, _ = run_ddpm(tmp_path, "--help").communicate(timeout=120)
    assert "Exit codes: 0 all done, 1 some are not, 2 usage error, 75 interrupted" in " ".join(
        said.split()
    )


def test_networks_are_checked_before_anything_runs(tmp_path):
    asked = study(tmp_path, {"config.model.channel_mult": {"values": [[1, 1], [1]]}})
    with pytest.raises(ValueError, match="channel_mult=1 cannot run: attention resolution 8"):
        sweep(asked, asked.folder(tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


def test_a_checkpoint_to_measure_has_to_be_there(tmp_path):
    path = tmp_path / "asked.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "method": "grid",
                "parameters": {"checkpoint": {"values": ["runs/nowhere"]}},
                "command": ["${env}", "${interpreter}", "-m", "ddpm.evaluate", "${args}"],
            }
        )
    )
    with pytest.raises(ValueError, match="runs/nowhere is neither a file nor a run folder"):
        sweep(read_study(path), tmp_path / "runs")


RATE = {"distribution": "log_uniform_values", "min": 1.0e-5, "max": 1.0e-1}


def test_random_draws_repeat(tmp_path):
    asked = study(tmp_path, {"config.train.learning_rate": RATE}, method="random")
    points = choose_points(asked, 5, 0, None)
    assert (
        choose_points(asked, 3, 0, None) == points[:3]
        and choose_points(asked, 5, 1, None)[0] != points[0]
    )
    assert all(1e-5 <= point["config.train.learning_rate"] <= 1e-1 for point in points)
    few = study(tmp_path, {"config.seed": {"values": [0, 1]}}, method="random")
    assert len(choose_points(few, 20, 0, None)) == 2  # each point once


def played(asked, folder, count, seed=0):
    """Let bayes choose, with the distance of the rate from 1e-3 in decades, plus 2 for the
    linear schedule, as results.
    """
    folder.mkdir(exist_ok=True)
    record = Record(folder)
    results = []
    for point in bayes_points(asked, count, seed, record):
        results.append(
            abs(math.log10(point["config.train.learning_rate"]) + 3)
            + 2 * (point["config.diffusion.beta_schedule"] == "linear")
        )
        record.put(Trial(asked.run_name(point), point, [], 0), common_errors.DONE, results[-1])
    return [entry["point"] for entry in record.runs.values()], results


@pytest.fixture
def searched(tmp_path):
    parameters = {
        "config.train.learning_rate": RATE,
        "config.diffusion.beta_schedule": {"values": ["linear", "cosine"]},
    }
    return study(tmp_path, parameters, method="bayes", run_cap=30)


def test_bayes_learns(searched, tmp_path):
    points, results = played(searched, tmp_path / "a", 30)
    assert all(1e-5 <= point["config.train.learning_rate"] <= 1e-1 for point in points)
    # what does not vary is there too
    assert all(searched.config(point).model.model_channels == 8 for point in points)
    # by chance it is 2, standard error 0.26; six seeds gave 0.8 to 1.2
    assert sum(results[10:]) / 20 < 1.3


def test_bayes_goes_on_where_it_stopped(searched, tmp_path):
    whole, _ = played(searched, tmp_path / "whole", 14)
    assert played(searched, tmp_path / "parts", 11)[0] == whole[:11]
    assert played(searched, tmp_path / "parts", 14)[0] == whole


def test_bayes_runs_what_it_chose_and_goes_on_with_more(tmp_path, capsys):
    """With real runs: each result is the run's own, and asked for more the same command makes
    the next point only.
    """
    asked = study(tmp_path, {"config.train.learning_rate": RATE}, method="bayes")
    folder = asked.folder(tmp_path / "runs")
    assert sweep(asked, folder, count=1) == common_errors.DONE
    first = Record(folder).runs
    expected = list(bayes_points(asked, 2, 0, Record(folder)))
    assert sweep(asked, folder, count=2) == common_errors.DONE
    assert "2 of 2 runs are done, 1 of them before" in capsys.readouterr().out
    runs = Record(folder).runs
    assert first.items() < runs.items() and [kept["point"] for kept in runs.values()] == expected
    for name, kept in runs.items():
        run = studies_runs.read_run(folder / name)
        assert kept["result"] == run.final("val/loss_ema") is not None
        assert run.options["train.learning_rate"] == kept["point"]["config.train.learning_rate"]


def test_bayes_takes_failed_runs_as_the_worst(searched, tmp_path):
    (tmp_path / "a").mkdir()
    record = Record(tmp_path / "a")
    for k in range(24):  # all above 1e-3 fail
        rate = 10 ** (-5 + k / 6)
        point = {
            name: searched.values(name)[0] for name in searched.parameters if searched.values(name)
        }
        trial = Trial(str(k), point | {"config.train.learning_rate": rate}, [], 0)
        record.put(
            trial, *((common_errors.DONE, -rate) if rate < 1e-3 else (common_errors.DIVERGED, None))
        )
    chosen_next = list(bayes_points(searched, 25, 0, record))[-1]
    assert chosen_next["config.train.learning_rate"] < 1e-2


def test_bayes_refuses_what_optuna_cannot_draw(tmp_path):
    asked = study(
        tmp_path,
        {"config.ema.decay": {"distribution": "normal", "mu": 0.5, "sigma": 0.001}},
        method="bayes",
    )
    with pytest.raises(ValueError, match="bayes cannot choose config.ema.decay by normal"):
        sweep(asked, tmp_path / "runs", count=3)


def test_results_are_the_last_or_the_best(tmp_path):
    rows = [
        {"step": 1, "val/loss_ema": 0.5},
        {"step": 2, "val/loss_ema": 0.3},
        {"step": 3, "val/loss_ema": 0.4},
        {"step": 4},
    ]
    run = studies_runs.Run("one", tmp_path, {}, rows)
    assert result_of(run, ("val/loss_ema", "minimize")) == 0.4
    assert result_of(run, ("best/val_loss_ema", "minimize")) == 0.3
    assert result_of(run, ("best/val_loss_ema", "maximize")) == 0.5
    assert [result_of(run, metric) for metric in (("eval/fid", "minimize"), None)] == [None, None]


def test_runs_share_cores_and_a_group(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    asked = study(tmp_path, {"config.seed": {"values": [0]}})
    cores = len(os.sched_getaffinity(0))
    assert RunPool(asked, tmp_path, 1).environment["OMP_NUM_THREADS"] == str(cores)
    assert RunPool(asked, tmp_path, 2 * cores).environment["OMP_NUM_THREADS"] == "1"
    assert RunPool(asked, tmp_path, 1).environment["WANDB_RUN_GROUP"] == "asked"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("WANDB_RUN_GROUP", "mine")
    assert {"OMP_NUM_THREADS": "3", "WANDB_RUN_GROUP": "mine"}.items() <= RunPool(
        asked, tmp_path, 1
    ).environment.items()


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"runs": 5}', '{"runs": {"a": 5}}', '{"runs": ["a"]}', "[" * 100_000]
)
def test_a_damaged_record_is_one_line(content, tmp_path):
    (tmp_path / "sweep.json").write_text(content)
    with pytest.raises(
        ValueError, match="sweep.json is damaged; delete it, and every run is looked at again$"
    ):
        Record(tmp_path)
