"""What a person should hear about a run: which weights are the best, copies, costs, lengths and folders that do not fit."""

import statistics

import pytest
from conftest import rows, run, tiny
from test_train import equal

from ddpm import checkpoint

ALL = dict(data__validation_fraction=0.0, model__channel_mult=(1,), model__attention_resolutions=(), every__sample="0 steps")


def log_of(folder):
    return (folder / "training.log").read_text()


# the best weights where no image is held out


@pytest.fixture(scope="module")
def without_held_out(tmp_path_factory):
    """Stopped in the middle of an interval, at which the rate is so high that the loss rises again."""
    folder = tmp_path_factory.mktemp("remarks") / "run"
    given = ALL | dict(every__validate="3 steps", every__log="1 steps", train__learning_rate=3e-3, train__warmup="0 steps",
                       train__learning_rate_decay="linear(length='14 steps', floor=0.2)", seed=5)
    assert run(tiny(**given, train__length="7 steps"), folder) and run(tiny(**given, train__length="14 steps"), folder)
    return folder, given


def test_the_lowest_training_loss_of_an_interval_is_the_best_and_says_so(without_held_out, tmp_path):
    folder, given = without_held_out
    losses = {row["step"]: row["train/loss"] for row in rows(folder)}
    means = {end: statistics.fmean(losses[end - k] for k in range(3)) for end in (3, 6, 9, 12)}
    step, lowest = min(means.items(), key=lambda item: item[1])
    about = checkpoint.header(folder / "best_train_loss.safetensors")
    assert about["step"] == step and about["best"] == {"by": "train/loss", "loss": pytest.approx(lowest, rel=1e-5)}
    assert not (folder / "best.safetensors").exists()
    assert run(tiny(**given, train__length=f"{step} steps"), tmp_path / "there")
    ours, theirs = folder / "best_train_loss.safetensors", tmp_path / "there/final.safetensors"
    assert equal(checkpoint.load_weights(ours)[3], checkpoint.load_weights(theirs)[3])
    said = "best_train_loss.safetensors keeps the averaged weights at the lowest train/loss of 3 steps, as no image is held out"
    assert said in log_of(folder)
    parts = checkpoint.newest(folder)[0]["parts"]
    assert parts["best"] == {"by": "train/loss", "loss": about["best"]["loss"]}
    assert parts["tracker"]["summary"] == {"best/train_loss": about["best"]["loss"]}


def test_held_out_images_choose_the_best_as_before(tmp_path):
    """A checkpoint of before goes on: it lacks the sum that is needed without them."""
    given = dict(every__validate="2 steps", train__warmup="0 steps", model__channel_mult=(1,), model__attention_resolutions=())
    assert run(tiny(**given, train__length="4 steps"), tmp_path)
    path = checkpoint.checkpoints(tmp_path)[-1][1]
    content = checkpoint.load(path)
    del content["parts"]["meters"]["since"], content["parts"]["best"]["by"]

    class State:
        def __init__(self, state):
            self.state_dict = lambda: state

    checkpoint.save(tmp_path, 4, content["config"], {name: State(state) for name, state in content["parts"].items()})
    assert run(tiny(**given, train__length="8 steps"), tmp_path)
    losses = {row["step"]: row["val/loss_ema"] for row in rows(tmp_path) if "val/loss_ema" in row}
    step, lowest = min(losses.items(), key=lambda item: item[1])
    about = checkpoint.header(tmp_path / "best.safetensors")
    assert about["step"] == step and about["best"] == {"by": "val/loss_ema", "loss": lowest}
    assert "best.safetensors keeps the averaged weights at the lowest val/loss_ema\n" in log_of(tmp_path)
