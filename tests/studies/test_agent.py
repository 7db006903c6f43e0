"""W&B's client and sweep agent, unmodified and in processes of their own, drive a study against
a stand-in for the server.
"""

import io
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
import yaml
from PIL import Image

from ddpm.config import files as config_files
from ddpm.studies import runs as studies_runs
from support import commands, wandb_server
from support.runs import run, tiny

CONFIG_FILE = """
import os
from pathlib import Path
from ddpm.config import base, with_variant

Path("pid").write_text(str(os.getpid()))  # whom the tests interrupt

def get_config(variant=None):
    return with_variant(base(), "tiny", {"tiny": {
        "model.model_channels": 8, "model.num_res_blocks": 1, "diffusion.timesteps": 20, "train.batch_size": 8,
        "sample.steps": 2, "sample.num_images": 4, "evaluate.steps": 2, "evaluate.num_samples": 16, "every.log": "2 steps",
        "every.sample": "4 steps", "every.validate": "4 steps", "every.evaluate": "100000 steps", "every.save": "4 steps",
        "train.length": "LENGTH steps"}})
"""

STUDY = {
    "project": "study",
    "name": "schedules",
    "method": "grid",
    "metric": {"name": "val/loss_ema", "goal": "minimize"},
    "parameters": {
        "config.diffusion.beta_schedule": {"values": ["linear", "cosine", "sigmoid(tau=0.5)"]},
        "config.seed": {"values": [7]},
        "config.model.channel_mult": {"value": [1, 2]},
    },
    "command": ["${env}", "${interpreter}", "-m", "ddpm.main", "--config=tiny.py", "${args}"],
}


class Desk:
    """A researcher's folder with a study in it, logged in at the stand-in."""

    def __init__(self, folder):
        self.folder = folder
        self.server = wandb_server.Server()
        python = Path(commands.python()).parent  # W&B's agent runs the bare word `python`
        mine = ("WANDB_", "XDG_", "NETRC", "RANK", "WORLD_SIZE")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(mine)}
        self.environment = (
            clean
            | self.server.login
            | {
                "HOME": str(folder / "home"),
                "DDPM_CACHE": str(folder / "cache"),
                "PYTHONPATH": str(commands.ROOT),
                "OMP_NUM_THREADS": "1",
                "PATH": f"{python}{os.pathsep}{os.environ['PATH']}",
            }
        )
        (folder / "home").mkdir()
        (folder / "schedules.yaml").write_text(yaml.safe_dump(STUDY))
        self.set_length(8)

    def set_length(self, steps):
        """How long runs that begin or go on from now train: an option that may change while a run
        goes on.
        """
        (self.folder / "tiny.py").write_text(CONFIG_FILE.replace("LENGTH", str(steps)))

    def wandb(self, *words):
        """Run the client to its end; returns what it printed."""
        command = [commands.python(), "-m", "wandb", *words]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    def create_sweep(self, file="schedules.yaml"):
        """`wandb sweep` of a study; returns the sweep as the server has it, found by the command
        that the client prints.
        """
        path = re.search(r"wandb agent (\S+)", self.wandb("sweep", file))[1]
        return self.server.sweeps[path.split("/")[-1]]

    def start_agent(self, sweep):
        """`wandb agent` of a sweep; returns its process."""
        with open(self.folder / "agent.log", "w") as log:
            return subprocess.Popen(
                [commands.python(), "-m", "wandb", "agent", f"me/study/{sweep.id}"],
                cwd=self.folder,
                stdout=log,
                stderr=log,
                env=self.environment,
            )

    def runs_of(self, sweep):
        return [one for one in self.server.runs.values() if one.sweep == sweep.id]

    def folder_of(self, one):
        (folder,) = self.folder.glob(f"runs/*-{one.id}")
        return folder

    def caught(self, sweep, number):
        """Wait until a run of a sweep is in the middle of its training; returns the run, its
        folder and process.
        """
        until(lambda: len(self.runs_of(sweep)) > number, "the run begins")
        one = self.runs_of(sweep)[number]
        until(
            lambda: list(self.folder.glob(f"runs/*-{one.id}/checkpoints/*.pt")),
            "the run has saved a checkpoint",
        )
        return one, self.folder_of(one), int((self.folder / "pid").read_text())

    def content(self, sweep):
        """All that a sweep's runs leave: files here, rows on the server."""
        files = [
            path
            for one in self.runs_of(sweep)
            for path in self.folder_of(one).rglob("*")
            if path.is_file()
        ]
        return {path: path.read_bytes() for path in files} | {
            one.id: list(one.lines) for one in self.runs_of(sweep)
        }


def until(condition, what, seconds=120):
    """Wait for what takes seconds, and minutes on a loaded machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.02)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def numbers(history):
    """W&B's rows as metrics.jsonl writes them, without pictures; checked to lie at the training
    step.
    """
    assert all(row["_step"] == row["train/step"] for row in history)
    kept = [
        {key: value for key, value in row.items() if key[0] != "_" and not isinstance(value, dict)}
        for row in history
    ]
    return [{"step": row.pop("train/step"), **row} for row in kept]


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    made = Desk(tmp_path_factory.mktemp("desk"))
    yield made
    made.server.vanish()


@pytest.fixture(scope="module")
def study(desk):
    """The study after `wandb sweep` and `wandb agent`: the sweep as the server has it."""
    sweep = desk.create_sweep()
    assert desk.start_agent(sweep).wait(timeout=300) == 0
    return sweep


def test_a_study_runs_through(desk, study):
    assert (study.project, study.config) == ("study", STUDY)
    runs = desk.runs_of(study)
    schedules = [one.config["config.diffusion.beta_schedule"] for one in runs]
    assert sorted(schedules) == ["cosine", "linear", "sigmoid(tau=0.5)"]
    assert [(one.state, one.exit_code) for one in runs] == [("finished", 0)] * 3
    assert study.state == "FINISHED"
    assert desk.server.unknown == []


def test_rows_on_the_server_are_those_on_disk(desk, study):
    for one in desk.runs_of(study):
        rows = lines(desk.folder_of(one))
        assert [row["step"] for row in rows] == [2, 4, 6, 8]
        assert numbers(one.history) == rows


def test_a_config_has_one_column_for_each_option(desk, study):
    for one in desk.runs_of(study):
        saved = config_files.from_json((desk.folder_of(one) / "config.json").read_text())
        assert one.config == config_files.tracked(saved) | {
            "code": list(config_files.code_in(desk.folder_of(one)))
        }
        assert (saved.seed, saved.model.channel_mult) == (7, (1, 2))
        assert one.name == desk.folder_of(one).name


def test_a_summary_has_the_last_of_every_number(desk, study):
    for one in desk.runs_of(study):
        rows = lines(desk.folder_of(one))
        last = {key: value for row in rows for key, value in row.items() if key != "step"}
        assert last.items() <= one.summary.items()
        assert one.summary["best/val_loss_ema"] == min(
            row["val/loss_ema"] for row in rows if "val/loss_ema" in row
        )
        assert last.keys() >= {
            "train/loss",
            "train/grad_norm",
            "train/learning_rate",
            "val/loss",
            "val/loss_ema",
            "eval/protocol",
            "eval/fd_digits",
            "speed/images_per_second",
            "memory/rss_gib",
            "progress/images",
        }
        assert one.summary["samples"]["_type"] == "image-file"


def test_the_public_api_reads_the_study_back(desk, study):
    """As `ddpm.compare` reads a sweep or a project."""
    api = wandb.Api(
        overrides={"base_url": desk.server.url}, api_key=desk.server.login["WANDB_API_KEY"]
    )
    sweep = api.sweep(f"me/study/{study.id}")
    assert (sweep.state, sweep.config, sweep.expected_run_count) == ("FINISHED", STUDY, 3)
    found = api.runs("me/study", filters={"sweep": study.id})
    assert (
        sorted(one.id for one in found)
        == sorted(one.id for one in sweep.runs)
        == sorted(one.id for one in desk.runs_of(study))
    )
    for one in found:
        kept = desk.server.runs[one.id]
        assert (
            numbers(list(one.scan_history()))
            == numbers(one.history(pandas=False))
            == lines(desk.folder_of(kept))
        )
        some = [row["val/loss"] for row in one.scan_history(keys=["train/step", "val/loss"])]
        assert some == [row["val/loss"] for row in lines(desk.folder_of(kept)) if "val/loss" in row]
        assert (one.state, one.name, one.config) == ("finished", kept.name, kept.config)
        assert one.summary["val/loss"] == kept.summary["val/loss"]


def test_one_command_reports_a_study_that_agents_ran(desk, study):
    """The runs come from the server with their last grids; the file has the question and what is
    missing.
    """

    def compare(*words):
        done = subprocess.run(
            [commands.python(), "-m", "ddpm.compare", *words],
            cwd=desk.folder,
            env=desk.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert f"me/study/{study.id}: 3 runs in 3 settings" in compare(f"me/study/{study.id}")
    more = STUDY | {
        "description": "Which?",
        "parameters": STUDY["parameters"] | {"config.seed": {"values": [7, 8]}},
    }
    (desk.folder / "asked.yaml").write_text(yaml.safe_dump(more))
    said = compare("asked.yaml", f"--runs=me/study/{study.id}")
    assert "left out: beta_schedule=cosine-seed=8: no run" in said and said.count("left out: ") == 3
    assert "**Question.** Which?" in (desk.folder / "asked" / "README.md").read_text()
    assert (desk.folder / "asked" / "samples.png").is_file()
    for one in desk.runs_of(study):
        mine, kept = (
            studies_runs.read_run(folder)
            for folder in (desk.folder_of(one), *desk.folder.glob(f"asked/runs/*-{one.id}"))
        )
        assert (kept.name, kept.options, kept.rows, kept.grid.name) == (
            mine.name,
            mine.options,
            mine.rows,
            mine.grid.name,
        )
        assert np.array_equal(
            *(np.asarray(Image.open(run.grid).convert("RGB")) for run in (mine, kept))
        )
    assert desk.server.unknown == []


@pytest.fixture(scope="module")
def bad_day(desk, study):
    """The same file again, as a new sweep: the agent is stopped by Ctrl-C in the first run and
    started again, the second run's process is killed, and the third loses its disk.
    """
    before = desk.content(study)
    desk.set_length(100_000)
    sweep = desk.create_sweep()

    agent = desk.start_agent(sweep)
    first, folder, _ = desk.caught(sweep, 0)
    agent.send_signal(signal.SIGINT)
    until(
        lambda: "again to terminate" in (desk.folder / "agent.log").read_text(),
        "the agent has received Ctrl-C",
    )
    agent.send_signal(signal.SIGINT)
    assert agent.wait(timeout=120) == 0
    interrupted = first.state, first.exit_code
    desk.set_length(lines(folder)[-1]["step"] + 8)

    agent = desk.start_agent(sweep)
    until(lambda: "resumed from step" in (folder / "training.log").read_text(), "the run goes on")
    desk.set_length(100_000)
    _, _, process = desk.caught(sweep, 1)
    os.kill(process, signal.SIGKILL)
    _, folder, _ = desk.caught(sweep, 2)
    (folder / "checkpoints").rename(folder / "elsewhere")
    (folder / "checkpoints").write_text("in the way of the next one")
    assert agent.wait(timeout=300) == 0
    untouched = desk.content(study) == before
    return SimpleNamespace(
        sweep=sweep, runs=desk.runs_of(sweep), interrupted=interrupted, untouched=untouched
    )


def test_the_same_file_again_is_a_new_study(desk, study, bad_day):
    assert bad_day.untouched
    assert bad_day.sweep.expected == study.expected
    names = [
        [desk.folder_of(one).name.removesuffix(one.id) for one in runs]
        for runs in (desk.runs_of(study), bad_day.runs)
    ]
    assert names[0] == names[1] and len(set(names[0])) == 3
    assert len(list((desk.folder / "runs").iterdir())) == 6


def test_an_interrupted_run_is_resumed_by_the_next_agent(desk, bad_day):
    one = bad_day.runs[0]
    assert bad_day.interrupted == ("preempted", 75)
    assert (one.state, one.exit_code) == ("finished", 0)
    log = (desk.folder_of(one) / "training.log").read_text()
    assert "and saved at step" in log and "done; draw images with" in log
    steps = [row["step"] for row in lines(desk.folder_of(one))]
    assert steps == list(range(2, steps[-1] + 1, 2))
    assert numbers(one.history) == lines(desk.folder_of(one))


def test_a_killed_run_is_visible_as_crashed(bad_day):
    assert (bad_day.runs[1].state, bad_day.runs[1].exit_code) == ("crashed", None)


def test_a_failing_run_is_visible_as_failed(desk, bad_day):
    one = bad_day.runs[2]
    assert (one.state, one.exit_code) == ("failed", 1)
    assert "failed: " in (desk.folder_of(one) / "training.log").read_text()
    assert bad_day.sweep.state == "FINISHED"


def test_a_bayes_study_whose_first_run_is_stopped_early(desk, bad_day):
    """The server chooses the points, and has the agent stop a run that looks bad: it saves and
    ends, and the next one runs.
    """
    study = {
        **STUDY,
        "method": "bayes",
        "run_cap": 2,
        "early_terminate": {"type": "hyperband", "min_iter": 1},
        "parameters": {
            "config.train.learning_rate": {
                "distribution": "log_uniform_values",
                "min": 1e-4,
                "max": 1e-3,
            }
        },
    }
    (desk.folder / "rates.yaml").write_text(yaml.safe_dump(study))
    desk.set_length(100_000)
    sweep = desk.create_sweep("rates.yaml")
    agent = desk.start_agent(sweep)
    first, folder, _ = desk.caught(sweep, 0)
    desk.set_length(8)
    first.stopped = True
    assert agent.wait(timeout=300) == 0
    _, second = desk.runs_of(sweep)
    assert (first.exit_code, first.state, second.state, sweep.state) == (
        75,
        "killed",
        "finished",
        "FINISHED",
    )
    assert "and saved at step" in (folder / "training.log").read_text() and list(
        (folder / "checkpoints").glob("*.pt")
    )
    assert numbers(first.history) == lines(folder)
    rates = [one.config["config.train.learning_rate"] for one in (first, second)]
    assert rates == [1e-4, 1e-3] and desk.server.unknown == []


def test_a_run_that_is_stopped_on_its_page_saves_and_is_not_handed_out_again(desk, tmp_path):
    """The client asks every 15 seconds whether it was stopped."""
    desk.set_length(100_000)
    command = [
        commands.python(),
        "-m",
        "ddpm.main",
        "--config=tiny.py",
        f"--workdir={tmp_path / 'run'}",
        "--config.wandb.project=stopped",
    ]
    process = subprocess.Popen(
        command,
        cwd=desk.folder,
        env=desk.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until(lambda: list(tmp_path.glob("run/checkpoints/*.pt")), "the run has saved a checkpoint")
    (one,) = [one for one in desk.server.runs.values() if one.project == "stopped"]
    one.stopped = True
    assert process.wait(timeout=120) == 75
    assert (one.exit_code, one.preempting) == (75, False) and numbers(one.history) == lines(
        tmp_path / "run"
    )


def test_a_run_is_complete_after_an_offline_training_and_wandb_sync(desk, tmp_path):
    given = tiny(wandb__mode="offline", wandb__project="later", wandb__name="on the train")
    assert run(given, tmp_path / "run")
    desk.wandb("sync", *map(str, tmp_path.glob("run/wandb/offline-run-*")))
    (one,) = [one for one in desk.server.runs.values() if one.project == "later"]
    rows = lines(tmp_path / "run")
    assert (one.state, one.exit_code, one.name) == ("finished", 0, "on the train")
    assert numbers(one.history) == rows and len(rows) == 4
    assert one.config == config_files.tracked(given) | {
        "code": list(config_files.code_in(tmp_path / "run"))
    }
    assert {
        key: value for key, value in rows[-1].items() if key != "step"
    }.items() <= one.summary.items()
    drawn = [row["samples"]["path"] for row in one.history if "samples" in row]
    pictures = [
        np.asarray(Image.open(io.BytesIO(one.files[path])).convert("RGB")) for path in drawn
    ]
    grids = sorted((tmp_path / "run" / "samples").glob("step_*.png"))
    expected = [np.asarray(Image.open(path).convert("RGB")) for path in grids]
    assert len(pictures) == 2 and all(map(np.array_equal, pictures, expected))
