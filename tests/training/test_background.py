"""Files that a thread writes: they hold the state of their moment, and no failure is lost.

Kills, full disks and stop requests during a save are faults of experiments/reliability
(tests/test_reliability.py).
"""

import errno
import math
import os
import signal
import threading
import time

import pytest
import torch

from ddpm.common.errors import INTERRUPTED
from ddpm.experiment import trainer
from ddpm.main import train_and_close
from ddpm.runtime import device
from ddpm.training import background, checkpoint
from ddpm.training.background import BackgroundWriter
from support.runs import assert_same_run, equal, rows, run, tiny


def state():
    return {
        "net": {"w": torch.randn(3, 4), "b": torch.randn(4), "n": torch.tensor(7)},
        "optimizer": {"state": {0: {"exp_avg": torch.randn(3, 4)}}, "lr": (0.1, [None, "word"])},
        "image": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }


def copy_of(value):
    if isinstance(value, dict):
        return {key: copy_of(item) for key, item in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def overwrite(value):
    for tensor in background.tensors_in(value):
        tensor.zero_()


class Slow:
    """A function that writes once it may, and remembers what, where and in which memory."""

    def __init__(self):
        self.may = threading.Event()
        self.written = []
        self.places = []
        self.threads = []

    def __call__(self, values):
        assert self.may.wait(60)
        self.written.append(copy_of(values))
        self.places.append({tensor.data_ptr() for tensor in background.tensors_in(values)})
        self.threads.append(threading.current_thread())


def test_a_file_has_the_state_of_its_moment_and_the_next_one_waits_for_it():
    slow = Slow()
    write = BackgroundWriter(device.start())
    values = state()
    first = copy_of(values)
    write(slow, values)
    overwrite(values)  # as the training does, which goes on
    second = copy_of(values)
    assert not slow.written
    threading.Timer(0.2, slow.may.set).start()
    write(slow, values)
    assert equal(slow.written[:1], [first])  # the second may be there already
    write(slow, values["net"])  # in some of the same memory
    write.wait()
    assert equal(slow.written, [first, second, second["net"]])
    assert slow.places[0] == slow.places[1] and slow.places[2] < slow.places[0]
    own = {tensor.data_ptr() for tensor in background.tensors_in(values)}
    assert not own & slow.places[0]
    assert threading.main_thread() not in slow.threads
    (image,) = write.buffers[(2, 3, 4, 4), torch.float32, values["image"].stride()]
    assert image.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("short", ["no memory", "no pinned memory"])
def test_without_memory_for_a_copy_the_training_waits(short, monkeypatch):
    def refuse(*_, **options):
        raise RuntimeError("CUDA error: out of memory")

    if short == "no memory":
        values = state()
        size = sum(tensor.nbytes for tensor in background.tensors_in(values))
        monkeypatch.setattr(background, "free_memory", lambda: 2 * size - 1)
    else:
        monkeypatch.setattr(torch, "empty_like", refuse)
    slow = Slow()
    slow.may.set()
    write = BackgroundWriter(device.start())
    values = state()
    write(slow, values)
    assert slow.threads == [threading.main_thread()] and equal(slow.written, [values])
    assert slow.places == [{tensor.data_ptr() for tensor in background.tensors_in(values)}]
    assert not write.buffers


def test_free_memory_is_that_of_the_machine_or_its_container():
    assert 2**20 < background.free_memory() < math.inf or not os.path.exists("/proc/meminfo")


def test_a_failure_is_raised_once_by_what_comes_next():
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device", "step_00000001.pt")

    write = BackgroundWriter(device.start())
    for comes_next in (lambda: write(print), write.wait, write.check, write.__enter__().__exit__):
        write(fail)
        write.thread.join()
        with pytest.raises(OSError, match="No space left on device: 'step_00000001.pt'"):
            comes_next()
        write.check()
        write.wait()


def slow_fsync(monkeypatch):
    """Let each fsync of the thread take 0.3 s, after the event that is returned."""
    fsync = os.fsync
    may = threading.Event()

    def slowly(handle):
        if threading.current_thread() is not threading.main_thread():
            assert may.wait(60)
            time.sleep(0.3)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", slowly)
    return may


def test_a_stop_waits_for_the_save_before_and_for_its_own(tmp_path, monkeypatch):
    given = tiny(every__save="3 steps", every__validate="0 steps", every__sample="0 steps")
    run(given, tmp_path / "whole")
    may = slow_fsync(monkeypatch)
    made = trainer.build_trainer(given, tmp_path / "parts", device.start())
    tick = made.tracker.tick
    seen = []

    def interrupt(done):
        tick(done)
        if done == 4:
            seen.append([step for step, _ in checkpoint.checkpoints(made.folder)])
            os.kill(os.getpid(), signal.SIGTERM)
            may.set()

    made.tracker.tick = interrupt
    assert train_and_close(made) == INTERRUPTED
    assert seen == [[]]  # the training went on while the checkpoint of step 3 was written
    assert [step for step, _ in checkpoint.checkpoints(made.folder)] == [3, 4]
    assert made.machine.stop.longest >= 0.6  # what the time limit leaves for a save
    monkeypatch.undo()
    assert run(given, tmp_path / "parts")
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")
    first, second = (checkpoint.newest(tmp_path / name)[0] for name in ("whole", "parts"))
    assert equal(first["parts"] | {"tracker": 0}, second["parts"] | {"tracker": 0})


def test_a_fault_elsewhere_leaves_the_save_that_is_under_way(tmp_path, monkeypatch):
    may = slow_fsync(monkeypatch)
    made = trainer.build_trainer(tiny(every__save="3 steps"), tmp_path, device.start())

    def broken(done):
        if done == 4:
            may.set()
            raise RuntimeError("no step today")

    made.tracker.tick = broken
    assert train_and_close(made) == 1
    assert [step for step, _ in checkpoint.checkpoints(tmp_path)] == [3]
    assert not list(tmp_path.rglob("*.part"))
    assert "no step today; the same command goes on" in (tmp_path / "training.log").read_text()


def test_a_full_disk_ends_the_training_at_the_next_step(tmp_path, monkeypatch):
    given = tiny(every__save="5 steps")
    run(given, tmp_path / "whole")
    torch_save = torch.save

    def full(content, file):
        if content["step"] == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        torch_save(content, file)

    monkeypatch.setattr(torch, "save", full)
    made = trainer.build_trainer(given, tmp_path / "parts", device.start())
    seen = []

    def after_the_write(net, *_):
        if made.write.thread:
            made.write.thread.join()
        seen.append(net.training)

    made.step.net.register_forward_hook(after_the_write)
    assert train_and_close(made) == 1
    assert sum(seen) == 11  # the step after that of the save
    line = (tmp_path / "parts" / "training.log").read_text().splitlines()[-1]
    assert "failed: " in line and "No space left on device" in line
    assert "step_00000010.pt" in line and "free some space" in line
    assert [step for step, _ in checkpoint.checkpoints(tmp_path / "parts")] == [5]
    monkeypatch.undo()
    assert run(given, tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "step_00000012.png")
