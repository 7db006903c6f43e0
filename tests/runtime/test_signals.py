"""Stopped anywhere, within seconds, and continued to the same bits."""

import multiprocessing
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch

from ddpm.common.errors import FAILED, INTERRUPTED
from ddpm.config import defaults
from ddpm.data import loader
from ddpm.experiment import trainer
from ddpm.main import train_and_close, train_experiment
from ddpm.runtime import device
from ddpm.runtime.signals import BEGAN, SLACK, StopRequest, StopTraining
from ddpm.training import checkpoint
from support.commands import python
from support.runs import assert_same_run, rows, run, tiny

EVENTFUL = dict(
    train__length="8 steps",
    every__log="2 steps",
    every__validate="4 steps",
    every__sample="4 steps",
    every__evaluate="4 steps",
    evaluate__likelihood="both(images=8, nfe=8)",
    sample__steps=5,
    data__cache="none",
)
LONG = dict(  # minutes of drawing
    diffusion__timesteps=10_000, sample__steps=10_000, every__sample="2 steps", every__log="1 step"
)


def asked_at(made, question, number=signal.SIGUSR1):
    """Send a run a stop signal at the call of its network with this number, not counting those of
    training steps.
    """
    left = [question]

    def count(*_):
        left[0] -= not made.step.net.training
        if left[0] == 0:
            os.kill(os.getpid(), number)

    made.step.net.register_forward_pre_hook(count)


def test_stopped_in_every_event_and_continued_to_the_same_bits(tmp_path):
    """By step 4 the network is called 6 times by validation, 5 by the grid, 4 by the distance,
    and then by both likelihoods.
    """
    given = tiny(**EVENTFUL)
    run(given, tmp_path / "whole")
    for question, number in (
        (5, signal.SIGTERM),
        (8, signal.SIGINT),
        (13, signal.SIGUSR1),
        (80, signal.SIGHUP),
    ):
        made = trainer.build_trainer(given, tmp_path / "parts", device.start())
        before = {name: value.clone() for name, value in made.step.net.state_dict().items()}
        asked_at(made, question, number)
        assert train_and_close(made) == INTERRUPTED
        step, path = checkpoint.checkpoints(tmp_path / "parts")[-1]
        assert checkpoint.load(path)["parts"]["due"]["names"] == [
            "evaluate",
            "log",
            "sample",
            "validate",
        ], question
        assert (
            made.start == 0
            or step > made.start
            or all(
                # and not the average
                value.equal(before[name])
                for name, value in made.step.net.state_dict().items()
            )
        )
    assert step == 8 and not (tmp_path / "parts" / "final.safetensors").exists()
    assert run(given, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "step_00000004.png")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "nearest_00000008.png")
    seconds = "speed/evaluation_seconds"
    assert [row | {seconds: 0} for row in rows(tmp_path / "whole")] == [
        row | {seconds: 0} for row in rows(tmp_path / "parts")
    ]


def command(folder, **options):
    given = dict(tiny(**options).items())
    flags = [
        f"--config.{key}={value}"
        for key, value in defaults.flatten(given).items()
        if value != defaults.flatten(defaults.base())[key] and value != ""
    ]
    config = Path(__file__).parents[2] / "configs" / "digits.py"
    return [python(), "-m", "ddpm.main", f"--config={config}", *flags, f"--workdir={folder}"]


def wait_for(there, process, seconds=120):
    end = time.monotonic() + seconds
    while not there():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)


def test_a_scheduler_waits_for_seconds_in_the_middle_of_a_long_drawing(tmp_path):
    process = subprocess.Popen(command(tmp_path, **LONG), stderr=subprocess.PIPE, text=True)
    try:
        wait_for(
            lambda: (
                (tmp_path / "metrics.jsonl").is_file() and (tmp_path / "metrics.jsonl").read_text()
            ),
            process,
        )
        time.sleep(0.5)  # step 1 is over, and step 2 draws
        asked = time.monotonic()
        process.send_signal(signal.SIGUSR1)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == INTERRUPTED and "stopping, by SIGUSR1" in said
    assert time.monotonic() - asked < 20  # 2 on an idle machine; the drawing takes minutes
    assert (
        "stopped, by SIGUSR1, and saved at step 2; run the same"
        in (tmp_path / "training.log").read_text()
    )
    assert not list(tmp_path.glob("samples/*"))


def test_the_hours_end_in_time_and_hours_that_cannot_suffice_are_a_failure(tmp_path):
    given = tiny(**LONG | dict(every__sample="1 step"))

    def within(seconds):
        hours = (time.monotonic() + seconds - BEGAN) / (1 - SLACK) / 3600
        made = trainer.build_trainer(given, tmp_path, device.start(stop=StopRequest(hours)))
        return train_and_close(made)

    with StopRequest().install_handlers():  # the tests' own process keeps its handlers
        assert within(8) == INTERRUPTED
        assert checkpoint.checkpoints(tmp_path)[-1][0] == 1
        assert within(2) == FAILED  # or a scheduler would repeat it for ever
    log = (tmp_path / "training.log").read_text()
    assert "stopped, as train.max_hours=" in log
    assert "is nearly over, and saved at step 1; run the same command to continue" in log
    assert (
        "and that is too little for the rest of step 1 (log, sample); give more hours, or smaller "
        "evaluations" in log
    )


def test_hours_that_are_over_before_the_first_step(tmp_path, capsys):
    assert train_experiment(tiny(train__max_hours=1e-9), tmp_path / "run") == FAILED
    assert (
        "stopped before the first step, as train.max_hours=1e-09 is nearly over; give more hours"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


def test_stopped_while_wandb_waits_for_its_server(tmp_path):
    """A server that takes the connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        place = {
            "WANDB_BASE_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "WANDB_API_KEY": "a" * 40,
        }
        process = subprocess.Popen(
            command(tmp_path / "run", wandb__mode="online", **LONG),
            env=os.environ | place,
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        try:
            # step 2 draws for minutes
            wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").is_file(), process)
            asked = time.monotonic()
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == INTERRUPTED and "stopping, by SIGTERM: saving first" in said
    # LEAVE_SECONDS and a few; W&B alone would wait for minutes
    assert time.monotonic() - asked < 45
    assert (
        "saved at step 2; run the same command to continue"
        in (tmp_path / "run" / "training.log").read_text()
    )


def test_two_ranks_leave_together(tmp_path):
    """Of which one alone is asked: the other draws its share and hears of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    place = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            command(tmp_path, **LONG | dict(sample__steps=200)), env=place | {"RANK": str(rank)}
        )
        for rank in (0, 1)
    ]
    try:
        wait_for(
            lambda: (
                (tmp_path / "metrics.jsonl").is_file() and (tmp_path / "metrics.jsonl").read_text()
            ),
            ranks[0],
        )
        ranks[1].send_signal(signal.SIGTERM)
        assert [rank.wait(timeout=60) for rank in ranks] == [INTERRUPTED, INTERRUPTED]
    finally:
        for rank in ranks:
            rank.kill()
    step, path = checkpoint.checkpoints(tmp_path)[-1]
    assert step == 2 and checkpoint.load(path)["parts"]["due"]["names"] == ["log", "sample"]
    log = (tmp_path / "training.log").read_text()
    assert "stopped, as another rank does, and saved at step 2" in log and "failed" not in log


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest().install_handlers() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_request_is_noted_until_it_is_looked_at():
    stop = StopRequest()
    seen = []
    with stop.install_handlers():
        stop.check()
        os.kill(os.getpid(), signal.SIGTERM)
        seen.append("uninterrupted")
        with pytest.raises(StopTraining):
            stop.check()
        with pytest.raises(StopTraining), stop.interruptible():  # nothing is begun any more
            seen.append("never")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert seen == ["uninterrupted"] and str(stop) == "by SIGTERM" and not stop.time_limit_reached


def test_a_request_ends_what_is_interruptible_at_once():
    stop = StopRequest()
    seen = []
    with stop.install_handlers():
        with pytest.raises(StopTraining), stop.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            seen.append("never")
        os.kill(os.getpid(), signal.SIGHUP)  # what follows is no longer interruptible
        seen.append("after")
    assert seen == ["after"] and str(stop) == "by SIGTERM"


class Stuck:
    """A source whose second image takes minutes."""

    in_memory = False
    labels = None

    def batch(self, indices):
        if 1 in indices:
            time.sleep(300)
        return torch.zeros(len(indices), 1, 2, 2, dtype=torch.uint8)


def test_the_wait_for_workers_ends_within_seconds():
    stop = StopRequest()
    batches = loader.loader(Stuck(), [[0], [1]], num_workers=1, check=stop.check)
    next(batches)
    with stop.install_handlers():
        timer = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM))
        timer.start()
        began = time.monotonic()
        with pytest.raises(StopTraining):
            next(batches)
    assert time.monotonic() - began < 20  # 1.5 on an idle machine
    for worker in multiprocessing.active_children():  # it would sleep on beside the next tests
        worker.kill()
        worker.join()


def test_a_slow_batch_arrives_after_several_polls(monkeypatch):
    monkeypatch.setattr(loader, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.5)))
    checks = []
    batches = loader.loader(Stuck(), [[0], [1], [2]], 1, check=lambda: checks.append(1))
    assert [len(images) for images, _ in batches] == [1, 1, 1]
    assert len(checks) > 4
