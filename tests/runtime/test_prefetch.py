"""Random numbers drawn ahead by threads: the same bits, and no thread outlives what it draws for."""

import signal
import threading
from functools import partial

import pytest
import torch

from ddpm.common import rng
from ddpm.experiment import trainer
from ddpm.runtime import device, prefetch
from ddpm.runtime.prefetch import RandomNumbers
from ddpm.runtime.signals import StopTraining
from ddpm.sampling import draw
from ddpm.training import step as training_step
from ddpm.training.trainer import train
from support.runs import equal, final_state, rows, run, tiny


def threads():
    return [one for one in threading.enumerate() if one.name.startswith("random-numbers")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not threads()


@pytest.fixture
def ahead(monkeypatch):
    """Machines of the CPU draw ahead in two threads, as on a GPU; parts are small enough to split."""
    monkeypatch.setattr(prefetch, "PART", 64)
    monkeypatch.setattr(
        device.Machine, "random_numbers", lambda self, seed, depth=1: RandomNumbers(seed, depth, 2)
    )


@pytest.mark.parametrize("places", [range(8), range(3, 8), [1, 1, 4], range(0)])
def test_numbers_are_those_of_their_address(ahead, places):
    """Steps in order, a step again, one left out and one from before."""
    with RandomNumbers(5, 2, 3) as numbers:
        for step in (0, 1, 2, 2, 4, 5, 1):
            for shape in ((3, 4, 4), (2,)):
                expected = rng.normal(5, "noise", step, places, shape)
                assert torch.equal(numbers.normal("noise", step, places, shape), expected)
            expected = rng.uniform(5, "time", step, places)
            assert torch.equal(numbers.uniform("time", step, places), expected)
            assert all(step <= later <= step + 2 for later, _ in numbers.jobs)
    assert not numbers.jobs and numbers.waited > 0
    assert torch.equal(numbers.uniform("time", 9, places), rng.uniform(5, "time", 9, places))


def test_the_next_steps_are_drawn_before_they_are_requested(monkeypatch):
    drawn = []
    enough = threading.Semaphore(0)

    def normal(seed, purpose, step, *rest, **out):
        drawn.append(step)
        enough.release()

    monkeypatch.setattr(rng, "normal", normal)
    with RandomNumbers(0, 2, 1) as numbers:
        numbers.normal("noise", 7, range(4), (2,))
        assert all(enough.acquire(timeout=60) for _ in range(3)) and drawn == [7, 8, 9]
        numbers.normal("noise", 8, range(4), (2,))
        assert enough.acquire(timeout=60) and drawn == [7, 8, 9, 10]


def test_an_exception_of_a_thread_is_raised_by_the_request(monkeypatch):
    def normal(seed, purpose, step, *rest, **out):
        if step == 1:
            raise ArithmeticError("no noise")

    monkeypatch.setattr(rng, "normal", normal)
    numbers = RandomNumbers(0, 1, 2)
    with pytest.raises(ArithmeticError, match="no noise"), numbers:
        numbers.normal("noise", 0, range(4), (2,))
        numbers.normal("noise", 1, range(4), (2,))
    assert not numbers.jobs


def test_a_training_with_threads_is_the_same(tmp_path, monkeypatch, ahead):
    """In two micro-batches, with everything that is random, stopped at a step and continued."""
    config = tiny(
        train__gradient_accumulation_steps=2,
        diffusion__times="antithetic",
        diffusion__self_condition=True,
        data__flip=True,
        data__augment=0.5,
        data__class_labels=True,
        model__dropout=0.1,
    )
    learn = training_step.TrainStep.__call__

    def stopping(self, step, batch):
        assert threads() or step == 0
        learn(self, step, batch)
        if step == 6:
            self.machine.stop.signal = signal.SIGTERM

    monkeypatch.setattr(training_step.TrainStep, "__call__", stopping)
    assert not run(config, tmp_path / "ahead") and not threads()
    monkeypatch.setattr(training_step.TrainStep, "__call__", learn)
    assert run(config, tmp_path / "ahead") and not threads()
    monkeypatch.undo()
    assert run(config, tmp_path / "plain")
    assert equal(final_state(tmp_path / "ahead"), final_state(tmp_path / "plain"))


def test_a_batch_that_is_divided_keeps_its_numbers(tmp_path, monkeypatch, ahead):
    """Memory runs out in the fifth step, and the training continues with half as much at a time."""
    learn = training_step.TrainStep._learn

    def no_room(self, step, micro, places, *batch):
        if step >= 4 and len(places) > 4:
            raise torch.OutOfMemoryError
        return learn(self, step, micro, places, *batch)

    monkeypatch.setattr(training_step.TrainStep, "_learn", no_room)
    assert run(tiny(), tmp_path / "ahead")
    monkeypatch.undo()
    monkeypatch.setattr(training_step.TrainStep, "_learn", no_room)
    assert run(tiny(), tmp_path / "plain")
    assert equal(rows(tmp_path / "ahead"), rows(tmp_path / "plain"))


def test_a_training_ends_with_the_exception_of_a_thread(tmp_path, monkeypatch, ahead):
    normal = rng.normal

    def broken(seed, purpose, step, *rest, **out):
        if purpose == "train noise" and step == 3:
            raise ArithmeticError("no noise")
        return normal(seed, purpose, step, *rest, **out)

    monkeypatch.setattr(rng, "normal", broken)
    with pytest.raises(ArithmeticError, match="no noise"):
        run(tiny(), tmp_path)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "heun(churn=2.0)"])
def test_images_are_the_same_drawn_with_threads(tmp_path, ahead, monkeypatch, sampler):
    made = trainer.build_trainer(tiny(), tmp_path, device.start(device="cpu"))
    numbers, recipe = made.evaluation.grid
    recipe = recipe._replace(sampler=sampler, steps=5)
    drawing = partial(made.evaluation.draw, numbers, recipe)
    images = draw.concatenate(drawing())
    assert not threads()
    monkeypatch.undo()
    assert torch.equal(images, draw.concatenate(drawing()))


def test_a_stop_request_ends_a_drawing_and_its_threads(tmp_path, ahead):
    made = trainer.build_trainer(tiny(), tmp_path, device.start(device="cpu"))
    numbers, recipe = made.evaluation.grid
    machine = made.machine
    walk = draw.trajectory(
        made.step.diffusion.around(made.step.net),
        recipe._replace(sampler="ddpm"),
        list(numbers),
        (1, 8, 8),
        machine,
    )
    next(walk), next(walk)
    assert threads()
    machine.stop.signal = signal.SIGTERM
    with pytest.raises(StopTraining):
        next(walk)


def test_a_training_of_another_machine_draws_when_requested(tmp_path):
    """A CPU computes the network on all cores."""
    made = trainer.build_trainer(tiny(), tmp_path, device.start(device="cpu"))
    made.every = dict.fromkeys(made.every, made.every["evaluate"])
    assert train(made) and made.step.numbers.pool is None and made.step.numbers.waited > 0
