"""What `auto` of train.compile and train.channels_last means: the measurements run on a CPU here,
with clocks that the tests set and networks that are traced, not compiled.
"""

import pytest
import torch

from ddpm.config import defaults, files
from ddpm.experiment import autotune
from ddpm.runtime import compile, device
from ddpm.runtime.signals import StopTraining
from ddpm.training import network as training_network
from ddpm.training.step import TrainStep
from support.runs import equal, final_state, rows, run, tiny

OPEN = {"train__compile": "auto", "train__channels_last": "auto"}
SMALL = dict(model__attention_resolutions=(), model__channel_mult=(1,))


def layout(step):
    """Whether a step's convolutions have their channels last."""
    weight = max(step.net.parameters(), key=lambda weight: (weight.ndim, weight.numel()))
    return not weight.is_contiguous()


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Seconds of a step by (compiled, channels last, micro-batches), 1.0 for all others."""
    seconds = {}

    def seconds_of(step, batch, numbers):
        step(numbers[0], batch)
        network = step.diffusion.net
        how = "stages" if network.plain_stages else network.compiled is not None
        return seconds.get((how, layout(step), len(step.parts)), 1.0)

    monkeypatch.setattr(autotune, "measures", lambda machine: True)
    monkeypatch.setattr(autotune, "SHARE", 1e9)  # trainings are short here
    monkeypatch.setattr(autotune, "seconds_of", seconds_of)
    monkeypatch.setattr(compile, "COMPILER", "aot_eager")
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    return seconds


@pytest.fixture
def plain_ways(monkeypatch):
    """Only ways without a compiler."""
    monkeypatch.setattr(autotune, "COMBINATIONS", ((False, False), (False, True)))


def resolve(config, saved=None, steps=10**6, say=lambda text: None):
    """The resolved config's values of KEYS, and the notes."""
    config, notes = autotune.resolve(config, saved, device.start("off"), steps, say)
    options = defaults.flatten(config)
    return tuple(options[key] for key in autotune.KEYS), notes


def refuse_to_measure(*_):
    raise AssertionError("it measures")


def test_auto_is_false_on_a_cpu(tmp_path):
    assert resolve(tiny(**OPEN)) == ((False, False, 1), [])
    run(tiny(**OPEN, train__length="1 step"), tmp_path)
    saved = files.read(tmp_path / "config.json")
    assert saved.train.compile is saved.train.channels_last is False


def test_the_fastest_way_is_chosen_and_cached(clock, monkeypatch):
    clock |= {(False, True, 4): 0.9, ("stages", True, 4): 0.5, ("stages", True, 2): 0.4}
    said = []
    config = tiny(**OPEN, **SMALL, train__gradient_accumulation_steps=4)
    chosen, notes = resolve(config, say=said.append)
    assert chosen == ("stages", True, 2)
    # six combinations, then 2 and 1 micro-batches
    assert len(said) == 9 and len(notes) == 9
    assert notes[1].startswith("train.compile=False, train.channels_last=True, ")
    assert notes[1].endswith("=4: 900 ms a step, 8.889 images/s")
    assert notes[-1].startswith("this training takes train.compile=stages, ")
    assert notes[-1].endswith("2.50 times as fast")
    monkeypatch.setattr(autotune, "measure", refuse_to_measure)
    assert resolve(config)[0] == chosen
    assert "earlier measurements" in resolve(config)[1][0]
    others = {"seed": 5, "train.length": "7 steps", "every.log": "1 steps", "sample.steps": 2}
    assert resolve(files.changed(config, others))[0] == chosen
    with pytest.raises(AssertionError):
        resolve(files.changed(config, {"model.model_channels": 16}))


@pytest.mark.parametrize("content", ["", "[]", '{"compile": 3}'])
def test_a_damaged_cache_is_measured_again(clock, plain_ways, tmp_path, content):
    clock[(False, True, 1)] = 0.5
    resolve(tiny(**OPEN, **SMALL))
    (file,) = (tmp_path / "cache" / "autotune").glob("*.json")
    file.write_text(content)
    chosen, notes = resolve(tiny(**OPEN, **SMALL))
    assert chosen == (False, True, 1) and "this training takes" in notes[-1]


def test_a_way_that_is_hardly_faster_is_not_chosen(clock, plain_ways):
    clock[(False, True, 1)] = 0.98
    assert resolve(tiny(**OPEN, **SMALL))[0] == (False, False, 1)


def test_a_named_value_is_not_measured(clock, monkeypatch):
    config = tiny(train__compile=False, **SMALL, train__channels_last="auto")
    said = []
    assert resolve(config, say=said.append)[0] == (False, False, 1) and len(said) == 3
    monkeypatch.setattr(autotune, "measure", refuse_to_measure)
    named = tiny(train__compile=False, train__channels_last=True)
    assert resolve(named) == ((False, True, 1), [])
    sharded = tiny(**OPEN, train__fully_shard=True)
    assert resolve(sharded) == ((False, False, 1), [])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_training_is_as_if_nothing_had_been_measured(clock, plain_ways, tmp_path, dropout):
    clock |= {(False, True, 2): 0.5, (False, True, 1): 0.2}
    options = dict(model__dropout=dropout, train__gradient_accumulation_steps=2)
    run(tiny(**OPEN, **options), tmp_path / "auto")
    options["train__gradient_accumulation_steps"] = 1
    run(tiny(train__channels_last=True, **options), tmp_path / "named")
    assert rows(tmp_path / "auto") == rows(tmp_path / "named")
    assert equal(final_state(tmp_path / "auto"), final_state(tmp_path / "named"))
    log = (tmp_path / "auto" / "training.log").read_text()
    assert "channels_last=True, train.gradient_accumulation_steps=1, 5.00 times as fast" in log


def test_a_resumed_run_keeps_its_choice(clock, plain_ways, tmp_path, monkeypatch):
    clock |= {(False, True, 2): 0.5, (False, True, 1): 0.2}
    config = tiny(**OPEN, train__gradient_accumulation_steps=2)
    folder = tmp_path / "run"
    run(files.changed(config, {"train.length": "6 steps"}), folder)
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(autotune, "measure", refuse_to_measure)
    assert run(config, folder)
    saved = files.read(folder / "config.json").train
    assert (saved.compile, saved.channels_last, saved.gradient_accumulation_steps) == (
        False,
        True,
        1,
    )
    run(tiny(train__channels_last=True), tmp_path / "named")
    assert rows(folder)[-1] == rows(tmp_path / "named")[-1]
    # also where another folder continues it, and on a CPU
    monkeypatch.setattr(autotune, "measures", lambda machine: False)
    longer = {"train.length": "14 steps", "train.resume_from": str(folder)}
    run(files.changed(config, longer), tmp_path / "longer")
    assert files.read(tmp_path / "longer" / "config.json").train.channels_last is True


def test_memory_that_runs_out_is_an_answer(clock, plain_ways, monkeypatch):
    learn = TrainStep._learn

    def out_of_memory(self, step, micro, places, *batch):
        if len(places) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return learn(self, step, micro, places, *batch)

    monkeypatch.setattr(TrainStep, "_learn", out_of_memory)
    clock |= {(False, True, 4): 0.9, (False, True, 2): 0.5, (False, True, 1): 0.1}
    chosen, notes = resolve(tiny(**OPEN, **SMALL, train__gradient_accumulation_steps=4))
    assert chosen == (False, True, 2)
    assert notes[-2].startswith("train.compile=False, train.channels_last=True, ")
    assert notes[-2].endswith("=1: out of memory with 8 images at a time")
    # without room for the plain network nothing else is tried
    chosen, notes = resolve(tiny(**OPEN, **SMALL))
    assert chosen == (False, False, 1) and len(notes) == 2


def test_a_compiler_that_fails_is_an_answer_that_is_not_cached(clock, tmp_path, monkeypatch):
    def failing(graph, inputs):
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(compile, "COMPILER", failing)
    chosen, notes = resolve(tiny(**OPEN, **SMALL))
    assert chosen == (False, False, 1)
    assert sum("torch.compile failed" in note for note in notes) == 4
    assert not [*tmp_path.rglob("*.json")]


def test_a_way_with_other_numbers_is_not_chosen(clock, monkeypatch):
    clock |= {(False, True, 1): 0.9, (True, True, 1): 0.1, (True, False, 1): 0.1}
    forward = training_network.TrainNetwork.forward_train

    def wrong(self, *inputs, **conditions):
        return forward(self, *inputs, **conditions) * (1 if self.compiled is None else 1.01)

    monkeypatch.setattr(training_network.TrainNetwork, "forward_train", wrong)
    chosen, notes = resolve(tiny(**OPEN, **SMALL))
    assert chosen == (False, True, 1)
    differing = [note for note in notes if "by more than 0.1%" in note]
    assert len(differing) == 4 and "=1: its loss " in differing[0]


def test_a_short_training_tries_little_and_caches_nothing(clock, tmp_path, monkeypatch):
    monkeypatch.setattr(autotune, "SHARE", 0.05)
    clock |= {(False, True, 1): 0.5, (True, True, 1): 0.1}
    # a twentieth of it is half a minute, in which nothing is compiled
    chosen, notes = resolve(tiny(**OPEN, **SMALL), steps=600)
    assert chosen == (False, True, 1)
    assert notes[-2].startswith("not tried, for lack of time: train.compile=True, ")
    assert notes[-2].count("train.compile=") == 4 and not [*tmp_path.rglob("*.json")]


def test_a_stop_request_ends_the_measurements(clock):
    machine = device.start("off")
    machine.stop.signal = 15
    with pytest.raises(StopTraining):
        autotune.resolve(tiny(**OPEN), None, machine, 10**6, lambda text: None)


def test_a_fault_that_is_not_the_compilers_is_raised(clock, monkeypatch):
    def faulty(self, *_):
        raise RuntimeError("a kernel failed")

    monkeypatch.setattr(TrainStep, "_learn", faulty)
    with pytest.raises(RuntimeError, match="a kernel failed"):
        resolve(tiny(**OPEN))


def test_the_real_clock_measures(monkeypatch, tmp_path):
    machine = device.start("off")
    step, batch = autotune.throw_away_step(tiny(**SMALL), machine)
    assert autotune.seconds_of(step, batch, range(2)) > 0
    assert all(weight.any() for weight in step.net.parameters())
