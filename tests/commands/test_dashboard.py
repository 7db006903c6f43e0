"""The dashboard command: what it sends to a loopback server, and what it says where it cannot send
anything.
"""

import json
import os
import subprocess
import time
from pathlib import Path

import pytest
import wandb

from ddpm import dashboard
from ddpm.config import files
from support.commands import python
from support.runs import tiny
from support.wandb_server import Run, Sweep
from support.wandb_server import server as server

ROOT = Path(dashboard.__file__).parents[1]
COMMAND = ["-m", "ddpm.dashboard"]
WITHOUT = [
    "-c",
    """
import runpy, sys
sys.modules["wandb_workspaces"] = None  # what Python has for a package that is not there
runpy.run_module("ddpm.dashboard", run_name="__main__", alter_sys=True)
""",
]
STUDY = """
name: schedules
method: grid
metric: {name: eval/fd_digits, goal: minimize}
parameters:
  config.diffusion.beta_schedule: {values: [linear, cosine]}
  config.model.model_channels: {value: 8}
  config.seed: {values: [0, 1]}
"""


def run_ddpm(*words, command=COMMAND, **environment):
    done = subprocess.run(
        [python(), *command, *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        text=True,
        capture_output=True,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def project(server):
    """A server with a project of three runs, two of them of a study."""
    server.sweeps["s1"] = Sweep("s1", "digits", STUDY)
    for name, schedule, options in (
        ("a", "linear", {}),
        ("b", "cosine", {}),
        ("c", "linear", {"model.dropout": 0.5}),
    ):
        given = tiny(**{"diffusion.beta_schedule": schedule, "seed": ord(name)} | options)
        run = server.runs[name] = Run(
            name, "digits", "s1" if name != "c" else None, state="finished"
        )
        run.columns = {key: {"value": value} for key, value in files.tracked(given).items()}
        run.summary = {
            "eval/fd_digits": 2.0,
            "eval/fd_digits_perfect": 1.0,
            "eval/fd_digits_perfect_sd": 0.1,
            # the floor of an older run
            "eval/fd_digits_floor": 0.5,
            "eval/copying": 0.5,
            "eval/protocol": "so",
        }
    return server


def sent(server):
    """The workspace that was saved: (view, its run set, {section: its panels as (kind,
    config)}).
    """
    (view,) = server.views.values()
    section = json.loads(view["spec"])["section"]
    panels = {
        each["name"]: [(panel["viewType"], panel["config"]) for panel in each["panels"]]
        for each in section["panelBankConfig"]["sections"]
    }
    return view, section["runSets"][0], panels


def lines(panels):
    assert {kind for kind, _ in panels} == {"Run History Line Plot"}
    return [(panel["xAxis"], panel["metrics"]) for _, panel in panels]


def test_a_study_has_its_workspace(project):
    code, out, err = run_ddpm("--project=me/digits", "--sweep=s1", **project.login)
    assert (code, err) == (0, "")
    view, runs, panels = sent(project)
    assert (view["entityName"], view["projectName"], view["type"]) == (
        "me",
        "digits",
        "project-view",
    )
    assert view["displayName"] == "ddpm: schedules"
    assert (
        out == f"{project.url}/me/digits?nw={view['name'].removeprefix('nw-').removesuffix('-v')}\n"
    )

    assert [(each["key"], each["op"], each["value"]) for each in runs["filters"]["filters"]] == [
        ({"section": "run", "name": "sweep"}, "=", "s1")
    ]
    assert runs["grouping"] == [
        {"section": "config", "name": "config.diffusion.beta_schedule.value"}
    ]

    matters, loss, steps, compute, samples, speed, memory = panels.values()
    importance, parallel, bars = matters
    assert (importance[0], importance[1]["targetKey"]) == ("Parameter Importance", "eval/fd_digits")
    assert [column["accessor"] for column in parallel[1]["columns"]] == [
        "config:config.diffusion.beta_schedule.value",
        "config:config.seed.value",
        "summary:eval/fd_digits",
    ]
    assert (bars[0], bars[1]["metrics"]) == ("Bar Chart", ["eval/fd_digits"])
    assert lines(loss) == [
        ("train/step", [key]) for key in ("train/loss", "val/loss", "val/loss_ema")
    ]
    distances = [["eval/copying"], ["eval/fd_digits", "eval/fd_digits_perfect"]]
    assert lines(steps) == [("train/step", keys) for keys in distances]
    assert lines(compute) == [("progress/petaflop", keys) for keys in distances]
    assert [(kind, panel["mediaKeys"]) for kind, panel in samples] == [
        ("Media Browser", ["samples"]),
        ("Media Browser", ["eval/nearest"]),
    ]
    assert {
        "speed/images_per_second",
        "speed/step_ms",
        "speed/loader_wait",
        "speed/noise_wait",
    } <= {keys[0] for _, keys in lines(speed)}
    assert {"memory/vram_peak_gib", "memory/rss_gib"} <= {keys[0] for _, keys in lines(memory)}
    assert project.unknown == []


def test_a_project_is_grouped_by_what_differs(project):
    api = wandb.Api(overrides={"base_url": project.url}, api_key=project.login["WANDB_API_KEY"])
    runs = list(api.runs("me/digits", lazy=False))
    assert dashboard.varied(None, runs) == [
        "config.diffusion.beta_schedule",
        "config.model.dropout",
    ]
    made = dashboard.workspace("me", "digits", None, runs)
    assert (made.name, made.runset_settings.filters) == ("ddpm: digits", "")
    assert [key.name for key in made.runset_settings.groupby] == [
        "config.diffusion.beta_schedule.value",
        "config.model.dropout.value",
    ]
    assert made.sections[0].name == "What matters for eval/copying"


def test_a_project_without_evaluations_shows_where_they_will_be():
    assert dashboard.measured([]) == [
        ["eval/fd_digits"],
        ["eval/fid"],
        ["eval/kd_digits"],
        ["eval/kid"],
    ]


@pytest.mark.parametrize(
    "words, command, login, said",
    [
        (["--project=digits"], COMMAND, False, "not logged in to W&B; use `wandb login`"),
        (
            ["--project=digits"],
            WITHOUT,
            True,
            "wandb-workspaces is missing; pip install -e '.[study]'",
        ),
        (
            ["--project=me/digits", "--sweep=s2"],
            COMMAND,
            True,
            "Could not find sweep <Sweep me/digits/s2",
        ),
    ],
)
def test_a_mistake_is_one_line(project, words, command, login, said):
    code, out, err = run_ddpm(*words, command=command, **project.login if login else {})
    assert (code, out, err.count("\n")) == (2, "", 1) and said in err
    assert not project.views


def test_an_unreachable_server_is_one_line():
    before = time.monotonic()
    code, out, err = run_ddpm(
        "--project=me/digits", WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="k" * 40
    )
    # W&B gives up after 20 s; the rest is for a loaded machine
    assert time.monotonic() - before < 60
    assert (code, out, err.count("\n")) == (2, "", 1) and "http://127.0.0.1:9" in err
