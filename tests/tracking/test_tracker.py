"""The tracker against what W&B itself keeps on disk, read by its own reader, and what it sends
to a loopback server.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb as wandb_client
from PIL import Image

from ddpm.tracking import tracker as tracking_tracker
from ddpm.tracking import wandb
from support.commands import python
from support.wandb_logs import lines, rows_of, segments, synced
from support.wandb_server import server as server

OFFLINE = {
    "mode": "offline",
    "project": "p",
    "entity": "",
    "name": "",
    "group": "",
    "tags": (),
}
ROOT = str(Path(__file__).parents[2])
CONFIG = {
    "config.train.batch_size": 64,
    "config.model.channel_mult": [1, 2],
    "config.data.source": "digits",
}


@pytest.fixture(autouse=True)
def without_settings(isolated, tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NETRC", raising=False)
    for name in ("DIR", "CACHE_DIR", "CONFIG_DIR", "DATA_DIR", "ARTIFACT_DIR"):
        monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "home" / name))


def begin(folder, start_step=0, state=None, **options):
    return tracking_tracker.open_tracker(
        folder,
        config=CONFIG,
        wandb=OFFLINE | options,
        start_step=start_step,
        total_steps=100,
        state=state,
    )


def test_both_sinks_hold_the_same_rows(tmp_path):
    tracker = begin(tmp_path)
    tracker.log(10, {"train/loss": torch.tensor(0.5), "speed/images_per_second": np.float32(2.0)})
    tracker.log(10, {"val/loss": 0.25})
    tracker.log(20, {"train/loss": 0.1 + 0.2, "progress/images": 1280})
    tracker.flush()
    tracker.flush()
    tracker.log(30, {"train/loss": 1e-30})
    tracker.close()
    expected = [
        {"step": 10, "train/loss": 0.5, "speed/images_per_second": 2.0, "val/loss": 0.25},
        {"step": 20, "train/loss": 0.1 + 0.2, "progress/images": 1280},
        {"step": 30, "train/loss": 1e-30},
    ]
    assert lines(tmp_path) == expected
    assert rows_of(synced(tmp_path)) == expected


def test_a_written_row_is_closed(tmp_path):
    tracker = begin(tmp_path, mode="disabled")
    tracker.log(10, {"train/loss": 1.0})
    tracker.flush()
    with pytest.raises(AssertionError, match="step 10 is logged after the row of step 10"):
        tracker.log(10, {"val/loss": 1.0})


def test_what_wandb_is_told_of_the_run(tmp_path, monkeypatch):
    wandb_client.teardown()  # the client reads its environment once a process
    monkeypatch.setenv("WANDB_NOTES", "a sentence")
    tracker = begin(tmp_path / "digits-a", tags=("one", "two"), group="g")
    tracker.summary("best/val_loss", 0.5)
    tracker.log(1, {"train/loss": 1.0})
    tracker.close(exit_code=3)
    segment = segments(tmp_path / "digits-a")[0]
    run = next(record["run"] for record in segment if "run" in record)
    assert {
        key: value for key, value in run["config"]["update"].items() if key != "_wandb"
    } == CONFIG
    assert (run["display_name"], run["run_group"], run["tags"]) == ("digits-a", "g", ["one", "two"])
    assert (run["notes"], run["project"]) == ("a sentence", "p")
    metrics = [record["metric"] for record in segment if "metric" in record]
    assert [(m.get("name"), m.get("glob_name"), m.get("step_metric")) for m in metrics] == [
        ("train/step", None, None),
        (None, "*", "train/step"),
    ]
    assert {"best/val_loss": 0.5} in [
        record["summary"].get("update") for record in segment if "summary" in record
    ]
    assert segment[-1]["exit"]["exit_code"] == 3


@pytest.mark.parametrize(
    "shape, kind", [((8, 6, 3), "png"), ((8, 6, 1), "png"), ((520, 40, 4), "jpg")]
)
def test_images_arrive_once(tmp_path, shape, kind):
    tracker = begin(tmp_path)
    tracker.log(5, {"train/loss": 1.0})
    tracker.log(5, {}, {"samples": np.full(shape, 200, np.uint8)})
    tracker.close()
    (row,) = synced(tmp_path)
    assert (row["samples.height"], row["samples.width"], row["samples.format"]) == (
        *shape[:2],
        kind,
    )
    assert row["samples.caption"] == "samples at step 5"
    (file,) = tmp_path.glob(f"wandb/offline-run-*/files/{row['samples.path']}")
    assert len(list(file.parent.iterdir())) == 1
    # a transparent picture lies on white
    shown = 200 if shape[-1] != 4 else round((200 * 200 + 255 * 55) / 255)
    assert abs(int(np.asarray(Image.open(file)).max()) - shown) <= 2  # JPEG rounds twice
    assert lines(tmp_path) == [{"step": 5, "train/loss": 1.0}]


def test_resume_after_a_clean_close(tmp_path):
    tracker = begin(tmp_path)
    tracker.summary("best/val_loss", 0.5)
    for step in (10, 20):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.flush()
    state = tracker.state_dict()
    tracker.summary("best/val_loss", 0.25)
    tracker.log(30, {"train/loss": -1.0})
    tracker.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 20, "torn')
    tracker = begin(tmp_path, 25, json.loads(json.dumps(state)))
    for step in (30, 40):
        tracker.log(step, {"train/loss": 1 / step})
    tracker.close()
    assert lines(tmp_path) == [{"step": step, "train/loss": 1 / step} for step in (10, 20, 30, 40)]
    assert rows_of(synced(tmp_path)) == lines(tmp_path)
    second = segments(tmp_path)[1]
    assert {"best/val_loss": 0.5} in [
        record["summary"].get("update") for record in second if "summary" in record
    ]
    assert "resumed from step 25" in (tmp_path / "training.log").read_text()


def test_what_wandb_missed_is_written_again(tmp_path):
    tracker = begin(tmp_path, mode="disabled")
    tracker.log(10, {"train/loss": 1.0})
    tracker.close()
    assert not (tmp_path / "wandb").exists() and tracker.state_dict() == {}
    tracker = begin(tmp_path, 10, tracker.state_dict())
    tracker.log(20, {"train/loss": 2.0})
    tracker.close()
    assert [row["step"] for row in lines(tmp_path)] == [10, 20]
    assert rows_of(synced(tmp_path)) == lines(tmp_path)


@pytest.mark.parametrize(
    "end",
    [
        "",
        '{"st',
        '{"step": 20, "train/loss": 2.0}',
        "\0\0\0",
        "20\n",
        "[]\n",
        '{"step": null}\n',
        '{"step": true}\n',
        '{"step": -1}\n',
        f'{{"step": {10**400}}}\n',
        '{"step": 12, "a": NaN}\n',
        f'{{"step": 12, "a": {-(10**400)}}}\n',
        '{"step": 12, "a": [1]}\n',
        '{"step": 12, "a": false}\n',
    ],
)
def test_a_torn_last_line_is_cut(tmp_path, end):
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "train/loss": 1.0}\n' + end)
    tracker = begin(tmp_path, 20, {}, mode="disabled")
    tracker.log(30, {"train/loss": 3.0})
    tracker.close()
    assert lines(tmp_path) == [{"step": 10, "train/loss": 1.0}, {"step": 30, "train/loss": 3.0}]


def test_a_run_from_the_start_keeps_no_row(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val/loss": 1.0}\n')
    begin(tmp_path, mode="disabled").close()
    assert lines(tmp_path) == []


TRAINING = """
import json, os, sys, time
from pathlib import Path
from ddpm.tracking import rows as tracking_rows
from ddpm.tracking import tracker as tracking
from ddpm.tracking.wandb import held_in_folder
folder, wandb, kill_at, cores = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
saved = json.loads((folder / "saved").read_text()) if (folder / "saved").exists() else {"step": 0, "state": None}
tracker = tracking.open_tracker(
    folder, config={}, wandb=wandb, start_step=saved["step"], total_steps=60, state=saved["state"])
while not tracker.sinks[-1].run:  # a kill before it is open would meet metrics.jsonl alone
    time.sleep(0.01)
for step in range(saved["step"] + 1, 61):
    if step % 2 == 0:
        tracker.log(step, {"train/loss": 1 / step, "speed/session": os.getpid()})
    if step % 10 == 0:
        tracker.log(step, {"val/loss": 2 / step})
        tracker.flush()
        (folder / "part").write_text(json.dumps({"step": step, "state": tracker.state_dict()}))
        os.replace(folder / "part", folder / "saved")
    if step == kill_at:
        rows = tracking_rows.rows_of(folder / "metrics.jsonl", step)
        while cores == "later" and held_in_folder(folder, tracker.state["wandb_id"], rows) == saved["step"]:
            time.sleep(0.1)  # until W&B's log has a row of this session
        for entry in Path("/proc").glob("[0-9]*/stat") if cores == "both" else ():
            name, _, rest = entry.read_text().partition(") ")
            if "wandb-core" in name and rest.split()[1] == str(os.getpid()):
                os.kill(int(entry.parent.name), 9)
        os.kill(os.getpid(), 9)
    if step % 7 == 0:
        time.sleep(0.05)
tracker.close()
"""


EXPECTED = [
    {"step": step, "train/loss": 1 / step} | ({} if step % 10 else {"val/loss": 2 / step})
    for step in range(2, 61, 2)
]


def run_training(folder, kill_at=0, cores="one", mode="offline", **environment):
    folder.mkdir(exist_ok=True)
    command = [
        python(),
        "-c",
        TRAINING,
        str(folder),
        json.dumps(OFFLINE | {"mode": mode}),
        str(kill_at),
        cores,
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": ROOT} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == (-9 if kill_at else 0), done.stderr
    return done


def numbers(folder):
    """The rows of metrics.jsonl without what differs between sessions."""
    return [
        {key: value for key, value in row.items() if key != "speed/session"}
        for row in lines(folder)
    ]


def test_resume_after_sigkill(tmp_path):
    """Killed between checkpoints, and at one with W&B's own process, whose log then lacks rows
    up to the checkpoint.
    """
    folder = tmp_path / "run"
    for kill_at, cores in ((17, "one"), (20, "both"), (43, "later"), (0, "one")):
        run_training(folder, kill_at, cores)
    assert numbers(folder) == EXPECTED
    assert rows_of(synced(folder)) == lines(folder)
    assert any("history" in record for record in segments(folder)[2]), (
        "W&B's log is written while the training runs"
    )


def test_unreachable_server_falls_back_to_offline(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run_training(tmp_path / "run", kill_at=25)
    before = time.monotonic()
    done = run_training(
        tmp_path / "run",
        mode="auto",
        WANDB_API_KEY="k" * 40,
        WANDB_INIT_TIMEOUT="3",
        WANDB_BASE_URL=f"http://127.0.0.1:{port}",
    )
    assert time.monotonic() - before < 30  # 3 s for the server, the rest for a loaded machine
    assert done.stdout.count("W&B is not online: CommError") == 1 and done.stderr == ""
    assert numbers(tmp_path / "run") == EXPECTED
    assert rows_of(synced(tmp_path / "run")) == lines(tmp_path / "run")


def test_online_curve_has_no_gap_and_no_double_row(tmp_path, server):
    """Offline, then online and killed before its rows are sent, then to the end, and again from
    an old checkpoint.
    """
    folder = tmp_path / "run"
    run_training(folder, kill_at=25)
    run_training(folder, kill_at=43, mode="auto", **server.login)
    early = (folder / "saved").read_text()
    for _ in range(2):
        run_training(folder, mode="auto", **server.login)
        (online,) = server.runs.values()
        assert rows_of(online.history) == lines(folder)
        assert numbers(folder) == EXPECTED
        (folder / "saved").write_text(early)


@pytest.mark.parametrize(
    "asked, variable, expected",
    [
        ("auto", None, "auto"),
        ("auto", "offline", "offline"),
        ("auto", "dryrun", "offline"),
        ("auto", "nonsense", "auto"),
        ("auto", "disabled", "disabled"),
        ("offline", "disabled", "offline"),
        ("disabled", "online", "disabled"),
    ],
)
def test_a_mode_asked_for_goes_before_the_environment(monkeypatch, asked, variable, expected):
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    assert wandb.wandb_mode(asked) == expected


def test_online_without_login_says_so_and_asks_nothing(tmp_path):
    done = run_training(tmp_path / "run", mode="online")
    assert "not logged in" in done.stdout and "this run is logged offline" in done.stdout
    assert "wandb sync" in done.stdout.splitlines()[-1]


def test_other_ranks_are_silent(tmp_path, capsys):
    tracker = tracking_tracker.open_tracker(
        tmp_path / "run", config={}, wandb=OFFLINE, start_step=0, total_steps=9, main=False
    )
    tracker.log(1, {"train/loss": 1.0}, {"samples": np.zeros((2, 2, 3), np.uint8)})
    tracker.say("unheard")
    tracker.tick(1)
    tracker.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_a_sweep_agent_names_the_run(tmp_path):
    folder = tmp_path / "run"
    run_training(folder, WANDB_SWEEP_ID="sweep123", WANDB_RUN_ID="agentrun")
    assert json.loads((folder / "saved").read_text())["state"]["wandb_id"] == "agentrun"
    run = next(record["run"] for record in segments(folder)[0] if "run" in record)
    assert (run["run_id"], run["sweep_id"]) == ("agentrun", "sweep123")


def test_a_broken_wandb_is_said_once_and_mended(tmp_path, capsys):
    tracker = begin(tmp_path)
    tracker.log(10, {"train/loss": 1.0})
    tracker.flush()
    while not tracker.sinks[-1].run:
        time.sleep(0.01)
    tracker.sinks[-1].run.finish()  # from here on W&B raises at every row
    for step in (20, 30):
        tracker.log(step, {"train/loss": 1.0})
    tracker.close()
    assert capsys.readouterr().out.count("W&B is interrupted") == 1
    assert [row["step"] for row in lines(tmp_path)] == [10, 20, 30]
    assert rows_of(synced(tmp_path)) == lines(tmp_path)


def test_a_wandb_that_cannot_be_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "wandb", None)
    tracker = begin(tmp_path)
    tracker.log(10, {"train/loss": 1.0})
    tracker.close()
    assert capsys.readouterr().out.count("W&B is off in this run: ModuleNotFoundError") == 1
    assert lines(tmp_path) == [{"step": 10, "train/loss": 1.0}]


FULL_DISK = """
import resource, sys
from pathlib import Path
from ddpm.tracking import tracker as tracking
wandb = {"mode": "disabled"}
tracker = tracking.open_tracker(Path(sys.argv[1]), config={}, wandb=wandb, start_step=0, total_steps=60)
resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))  # no file grows beyond 500 bytes, as on a full disk
for step in range(1, 61):
    tracker.log(step, {"train/loss": 1 / 3})
tracker.close()
"""


def test_a_full_disk_does_not_end_the_training(tmp_path):
    command = [python(), "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": ROOT}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("metrics.jsonl is incomplete from here") == 1
    assert done.stdout.count("training.log is incomplete from here") == 1
    assert done.stdout.count("metrics.jsonl is missing its last") == 1
    kept = lines(tmp_path)  # every line is whole
    assert (
        kept == [{"step": step, "train/loss": 1 / 3} for step in range(1, len(kept) + 1)]
        and 5 < len(kept) < 20
    )


def test_rows_wait_while_their_file_cannot_be_written(tmp_path, capsys):
    tracker = begin(tmp_path, mode="disabled")
    file = tmp_path / "metrics.jsonl"
    for step in range(1, 9):
        if step in (3, 6):  # away, as on a disk that is not mounted for a while
            file.rename(tmp_path / "away")
            file.mkdir()
        if step in (5, 8):
            file.rmdir()
            (tmp_path / "away").rename(file)
        tracker.log(step, {"train/loss": 1 / step})
        tracker.flush()
    tracker.close()
    assert lines(tmp_path) == [{"step": step, "train/loss": 1 / step} for step in range(1, 9)]
    said = capsys.readouterr().out
    assert [
        said.count(f"metrics.jsonl is {what}")
        for what in ("incomplete from here", "complete again")
    ] == [2, 2]


def test_what_a_person_reads(tmp_path, capsys):
    tracker = begin(tmp_path, mode="disabled")
    tracker.say("1797 images")
    tracker.log(
        50, {"train/loss": 0.12345, "speed/images_per_second": 210.0, "memory/rss_gib": 0.5}
    )
    tracker.log(50, {"train/grad_norm": 1.0, "val/loss": 0.0625, "eval/fd_digits": float("nan")})
    tracker.log(50, {}, {"samples": np.zeros((4, 4, 3), np.uint8)})
    tracker.close()
    out, err = capsys.readouterr()
    assert err == ""
    head, said, warning, row = out.splitlines()
    assert "from the start; torch" in head
    assert said == "1797 images"
    assert warning == "eval/fd_digits is not finite at step 50; it is stored as null"
    assert re.fullmatch(
        r"step 50/100 \(50.0%\)  loss 0.1235  210.0 images/s  rss 0.50 GiB  "
        r"val/loss 0.0625  eval/fd_digits nan  samples drawn  eta \d\d:\d\d",
        row,
    )
    log = (tmp_path / "training.log").read_text()
    stamped = [
        re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  (.*)", line) for line in log.splitlines()
    ]
    assert [match[1] for match in stamped] == out.splitlines()
    assert lines(tmp_path)[0]["eval/fd_digits"] is None
    assert lines(tmp_path)[0]["train/grad_norm"] == 1.0


def test_a_bar_on_a_terminal(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    tracker = begin(tmp_path, mode="disabled")
    tracker.tick(3)
    tracker.log(50, {"train/loss": 0.5, "val/loss": 0.25})
    tracker.say("a note")
    tracker.close()
    out, err = capsys.readouterr()
    assert "50/100" in err and "loss 0.5000, val/loss 0.25" in err
    assert "step 50/100" not in out and "a note\n" in out
    assert "step 50/100" in (tmp_path / "training.log").read_text()
