"""A full run: what it leaves in its folder, and that stopping it anywhere changes nothing."""

import os
import re
import signal
import weakref

import pytest
import torch
from PIL import Image

from ddpm.common import pixels as common_pixels
from ddpm.common import rng
from ddpm.config import files
from ddpm.experiment import build, drawing, load, trainer
from ddpm.main import train_and_close
from ddpm.runtime import device
from ddpm.tracking import files as tracking_files
from ddpm.tracking.tracker import Tracker
from ddpm.training import checkpoint
from ddpm.training import trainer as training_trainer
from ddpm.training import weights as training_weights
from ddpm.training.trainer import Diverged, train
from support.runs import assert_same_run, equal, final_state, rows, run, tiny

HARD = dict(
    train__amp="bf16",
    train__gradient_accumulation_steps=2,
    model__dropout=0.2,
    data__flip=True,
    every__save="0 steps",
    every__log="10 steps",
    every__validate="20 steps",
    every__sample="20 steps",
)


def test_forty_steps_are_seventeen_and_twenty_three(tmp_path):
    """With bf16, dropout, flips, accumulation, other worker counts and a log window that the
    break cuts in two.
    """
    run(tiny(**HARD | dict(train__length="40 steps", every__save="40 steps")), tmp_path / "whole")
    run(
        tiny(**HARD | dict(train__length="17 steps", every__save="17 steps", data__num_workers=2)),
        tmp_path / "parts",
    )
    run(tiny(**HARD | dict(train__length="40 steps", every__save="40 steps")), tmp_path / "parts")
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "step_00000040.png")
    whole = rows(tmp_path / "whole")
    parts = rows(tmp_path / "parts")
    assert [row["step"] for row in whole] == [10, 20, 30, 40]
    # the first part also logged its own end
    assert [row for row in parts if row["step"] != 17] == whole


def crowded(made, fits):
    """Let the network of a run have memory for a batch where `fits(images, calls before)`."""
    calls = []

    def check(_, inputs):
        calls.append(len(inputs[0]))
        if made.step.net.training and not fits(calls[-1], len(calls) - 1):
            raise torch.OutOfMemoryError("CUDA out of memory")

    made.step.net.register_forward_pre_hook(check)


def test_out_of_memory_halves_the_micro_batch_and_changes_no_number(tmp_path):
    """It runs out with all 8 images, and then in the second half: what the first half has added
    is taken back.
    """
    given = tiny(train__length="4 steps", every__log="1 step", model__dropout=0.2)
    assert run(
        files.changed(given, {"train.gradient_accumulation_steps": 4}), tmp_path / "quarters"
    )
    made = trainer.build_trainer(given, tmp_path / "crowded", device.start())
    crowded(made, lambda images, before: images <= 2 or (images == 4 and before == 1))
    assert train(made)
    made.tracker.close()
    log = (tmp_path / "crowded" / "training.log").read_text()
    for size in (8, 4):
        line = (
            f"out of memory with {size} images at a time; continuing with {size // 2} at a time, "
            "with the same results except for dropout; to start with this size, set "
            f"train.gradient_accumulation_steps={16 // size}"
        )
        assert log.count(line) == 1
    first, second = (
        load.load(tmp_path / name, "cpu").net.state_dict() for name in ("quarters", "crowded")
    )
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    losses = [
        [row["train/loss"] for row in rows(tmp_path / name)] for name in ("quarters", "crowded")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 4


@pytest.mark.parametrize("wanted", ["auto", "all"])
def test_without_room_for_one_image_it_stops_and_says_what_helps(tmp_path, wanted):
    given = tiny(model__model_channels=32, train__activation_checkpointing=wanted)
    made = trainer.build_trainer(given, tmp_path, device.start())
    crowded(made, lambda images, before: False)
    assert train_and_close(made) == 1
    last = (tmp_path / "training.log").read_text().splitlines()[-1]
    assert (
        "failed: out of memory with one image at a time; what helps, by what it saves: --config."
        in last
    )
    saved = [float(size) for size in re.findall(r"saves ([\d.]+) MiB", last)]
    assert saved == sorted(saved, reverse=True) and len(saved) >= 2
    assert "--config.model.model_channels=16" in last and "--config.data.image_size=8" in last
    # what is done already saves nothing more
    assert wanted == "auto" or "activation_checkpointing" not in last


def test_out_of_memory_elsewhere_is_one_line_too(tmp_path, monkeypatch, capsys):
    made = trainer.build_trainer(tiny(), tmp_path, device.start())

    def crowded(done):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(made, "draw_grid", crowded)
    assert train_and_close(made) == 1
    (line,) = [
        line for line in (tmp_path / "training.log").read_text().splitlines() if "failed: " in line
    ]
    assert (
        "failed: out of memory (CUDA out of memory); what helps, by what it saves: --config."
        in line
    )
    assert "Traceback" not in capsys.readouterr().err


def test_a_signal_saves_and_the_run_goes_on_to_the_same_weights(tmp_path):
    given = tiny(train__length="30 steps")
    run(given, tmp_path / "whole")
    made = trainer.build_trainer(given, tmp_path / "parts", device.start())
    tick = made.tracker.tick

    def interrupt(done):
        tick(done)
        if done == 13:
            os.kill(os.getpid(), signal.SIGTERM)

    made.tracker.tick = interrupt
    assert train(made) is False
    made.tracker.close()
    assert checkpoint.checkpoints(tmp_path / "parts")[-1][0] == 13
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert run(given, tmp_path / "parts") is True
    assert_same_run(tmp_path / "whole", tmp_path / "parts", "step_00000030.png")
    assert rows(tmp_path / "whole") == rows(tmp_path / "parts")


def test_what_a_run_leaves_in_its_folder(tmp_path):
    given = tiny(every__milestone="4 steps", every__evaluate="12 steps", data__source="digits")
    assert run(given, tmp_path)
    names = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert names == {
        "config.json",
        "training.log",
        "metrics.jsonl",
        "best.safetensors",
        "final.safetensors",
        "samples/step_00000006.png",
        "samples/step_00000012.png",
        "samples/nearest_00000012.png",
        "checkpoints/step_00000004.keep.pt",
        "checkpoints/step_00000008.keep.pt",
        "checkpoints/step_00000012.keep.pt",
        "checkpoints/step_00000005.pt",
        "checkpoints/step_00000010.pt",
    }
    keys = set().union(*rows(tmp_path))
    assert keys >= {
        "train/loss",
        *(f"train/loss_q{q}" for q in range(4)),
        "train/grad_norm",
        "train/learning_rate",
        "val/loss",
        "train/loss_scale",
        "val/loss_ema",
        "progress/epoch",
        "progress/images",
        "progress/petaflop",
        "eval/fd_digits",
        "eval/protocol",
        "eval/copying",
        "eval/copies",
    }
    assert files.from_json((tmp_path / "config.json").read_text()) == given
    picture = Image.open(tmp_path / "samples" / "step_00000012.png")
    assert min(picture.size) >= 32  # four images of 16 pixels


def test_the_same_latents_every_time_and_at_any_batch_size(tmp_path):
    given = tiny()
    machine = device.start()
    net = build.network(given)
    # the last layer begins at zero, and would hide what the network does
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))
    draw = drawing.drawer(given, net, machine)
    recipe = build.grid_recipe(given)
    whole = torch.cat(
        [pixels for _, pixels in draw(range(6), recipe._replace(batch_size=6, sampler="ddpm"))]
    )
    again = torch.cat(
        [pixels for _, pixels in draw(range(6), recipe._replace(batch_size=6, sampler="ddpm"))]
    )
    single = torch.cat(
        [pixels for _, pixels in draw(range(6), recipe._replace(batch_size=1, sampler="ddpm"))]
    )
    assert torch.equal(whole, again)
    assert (whole.int() - single.int()).abs().max() <= 1  # other batch shapes sum in another order
    assert whole.float().std() > 10
    assert torch.equal(
        rng.normal(0, "sample", 0, [5], (1, 4, 4))[0],
        rng.normal(0, "sample", 0, range(6), (1, 4, 4))[5],
    )


def test_micro_batches_change_nothing_but_rounding(tmp_path):
    run(tiny(), tmp_path / "one")
    run(tiny(train__gradient_accumulation_steps=4), tmp_path / "four")
    for one, four in zip(rows(tmp_path / "one"), rows(tmp_path / "four"), strict=True):
        # sums in another order: float32 rounding, amplified by 12 steps of Adam
        assert (
            four["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
            if "train/loss" in one
            else True
        )


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path):
    given = tiny(train__length="1 steps")
    made = trainer.build_trainer(given, tmp_path, device.start(), tracker=Tracker())
    before = {name: value.clone() for name, value in made.step.net.state_dict().items()}
    with torch.no_grad():
        next(made.step.net.parameters()).view(-1)[0] = float("nan")
    poisoned = {name: value.clone() for name, value in made.step.net.state_dict().items()}
    made.step(0, next(made.batches(0)))
    after = made.step.net.state_dict()
    assert all(
        torch.equal(after[name].nan_to_num(7), poisoned[name].nan_to_num(7)) for name in before
    )
    assert made.meters.read()["train/skipped_steps"] == 1


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_learns_on_the_cpu_too(tmp_path, amp):
    run(tiny(train__amp=amp, train__length="40 steps"), tmp_path)
    losses = [row["train/loss"] for row in rows(tmp_path) if "train/loss" in row]
    assert losses[-1] < losses[0]
    weights = training_weights.load_weights(tmp_path)[3]
    assert all(
        value.dtype == torch.float32 and value.isfinite().all() for value in weights.values()
    )


def test_init_from_starts_with_the_averaged_weights_of_another_run(tmp_path):
    run(tiny(), tmp_path / "a")
    given = tiny(train__init_from=str(tmp_path / "a"), seed=3)
    made = trainer.build_trainer(given, tmp_path / "b", device.start(), tracker=Tracker())
    assert made.start == 0
    assert equal(dict(made.step.net.state_dict()), training_weights.load_weights(tmp_path / "a")[3])
    # which has the same shapes
    cases = [
        ("model__model_channels", 16, "8"),
        ("model__conventions", "ho(norm_num_groups=4)", "ho"),
        ("diffusion__rescale_timesteps", True, "False"),
    ]
    for option, value, theirs in cases:
        key = option.replace("__", ".")
        said = (
            f"was trained with {key} {theirs}, not {value}; to begin from it add "
            f"--config.{key}={theirs}"
        )
        if option == "model__conventions":
            said = (
                r"was trained with model.conventions\(norm_num_groups\) 0, not 4; to begin from it "
                "add --config.model.conventions=ho"
            )
        with pytest.raises(ValueError, match=said):
            trainer.build_trainer(
                tiny(train__init_from=str(tmp_path / "a"), **{option: value}),
                tmp_path / "c",
                device.start(),
            )
    trainer.build_trainer(
        tiny(train__init_from=str(tmp_path / "a"), model__dropout=0.3),
        tmp_path / "d",
        device.start(),
        tracker=Tracker(),
    )


def test_another_config_in_the_same_folder_is_refused_with_the_options_named(tmp_path):
    run(tiny(), tmp_path)
    with pytest.raises(ValueError, match=r"train\.learning_rate: 0\.001 there, 0\.002 here"):
        files.check_continues(tiny(train__learning_rate=2e-3), tmp_path)
    files.check_continues(
        tiny(train__length="99 steps", every__log="1 steps", data__num_workers=3), tmp_path
    )


def test_validation_shows_the_weights_and_their_average_apart(tmp_path):
    run(tiny(), tmp_path)
    row = next(row for row in rows(tmp_path) if "val/loss" in row)
    assert row["val/loss"] != row["val/loss_ema"]
    assert common_pixels.PICTURES and row["val/loss"] > 0


def test_a_row_is_written_when_its_step_is_over_and_not_with_the_next_one(tmp_path):
    made = trainer.build_trainer(tiny(), tmp_path, device.start())
    seen = []
    (tmp_path / "metrics.jsonl").touch()
    made.step.net.register_forward_pre_hook(
        lambda net, _: seen.append(len(rows(tmp_path))) if net.training else None
    )
    train(made)
    made.tracker.close()
    assert seen == [0] * 4 + [1] * 2 + [2] * 2 + [3] * 4


def test_two_threads_resume_bitwise_too(tmp_path):
    torch.set_num_threads(2)
    try:
        run(tiny(train__length="20 steps", every__save="20 steps"), tmp_path / "whole")
        run(tiny(train__length="7 steps", every__save="7 steps"), tmp_path / "parts")
        run(tiny(train__length="20 steps", every__save="20 steps"), tmp_path / "parts")
    finally:
        torch.set_num_threads(1)
    assert equal(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))


def test_a_run_without_a_finite_gradient_stops_and_says_so(tmp_path):
    made = trainer.build_trainer(tiny(), tmp_path, device.start())
    with torch.no_grad():
        next(made.step.net.parameters()).fill_(float("nan"))
    with pytest.raises(
        Diverged, match="12 more steps were skipped than learned from, up to step 12"
    ):
        train(made)
    made.tracker.close(3)
    assert not (tmp_path / "final.safetensors").exists()


def test_other_images_in_the_same_run_are_refused(tmp_path):
    run(tiny(train__length="5 steps"), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="the data of this run have changed.*fingerprint was"):
        trainer.build_trainer(
            tiny(data__image_size=32, model__attention_resolutions=(16,)), tmp_path, device.start()
        )


def test_a_prolonged_run_is_drawn_from_its_newest_weights(tmp_path):
    run(tiny(train__length="6 steps", every__save="6 steps"), tmp_path)
    made = trainer.build_trainer(tiny(train__length="12 steps"), tmp_path, device.start())
    made.save(9)
    made.write.wait()
    made.tracker.close()
    assert checkpoint.find(tmp_path).name == "step_00000009.pt"


def test_a_torn_checkpoint_of_another_step_does_not_stay(tmp_path):
    torn = tmp_path / "checkpoints" / "step_00000003.pt.part"
    torn.parent.mkdir()
    torn.write_bytes(b"half")
    run(tiny(train__length="5 steps"), tmp_path)
    assert not torn.exists()


def test_drawing_keeps_one_image_a_step(tmp_path):
    given = tiny()
    machine = device.start()
    alive = []
    most = 0
    net = build.network(given)
    net.register_forward_pre_hook(lambda _, inputs: alive.append(weakref.ref(inputs[0])))

    def count(*_):
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))

    net.register_forward_hook(count)
    list(drawing.drawer(given, net, machine)(range(2), build.grid_recipe(given)._replace(steps=20)))
    assert len(alive) == 20 and most <= 3


def test_the_time_left_follows_the_recent_speed(tmp_path, monkeypatch):
    """Steps of one second, then of four, and a pause of ten seconds at every tenth step."""
    clock = [0.0]
    monkeypatch.setattr(tracking_files.time, "monotonic", lambda: clock[0])
    log = tracking_files.Text(tmp_path / "training.log", 0, 2400)

    def left_after(steps, seconds, pause=0.0):
        log_step = left_after.step = left_after.step + steps
        clock[0] += steps * seconds + pause
        return log.seconds_left(log_step, {"speed/step_ms": 1000 * seconds})

    left_after.step = 0
    clock[0] = 500.0  # compilation
    assert left_after(10, 1.0) == 2390 * 1.0
    for _ in range(100):
        left_after(10, 1.0)
    assert left_after(10, 4.0) == pytest.approx(1380 * 4.0)
    for _ in range(100):
        left = left_after(10, 4.0, pause=10.0)
    pauses = 100 * 10.0 / 2010
    assert left == pytest.approx(380 * (4.0 + pauses))
    assert log.seconds_left(2020, {"val/loss": 1.0}) == pytest.approx(left)


def test_slow_steps_are_shown_between_two_rows(tmp_path, monkeypatch, capsys):
    """Each step counts as a minute; rows and weights stay as they are."""
    given = tiny(train__length="6 steps", every__log="3 steps", every__sample="0 steps")
    run(given, tmp_path / "fast")
    assert "step 2/6" not in capsys.readouterr().out
    monkeypatch.setattr(training_trainer, "QUIET_SECONDS", 0)
    run(given, tmp_path / "slow")
    lines = [line.split()[1] for line in capsys.readouterr().out.splitlines() if " eta " in line]
    assert lines == [f"{step}/6" for step in range(1, 7)]
    log = (tmp_path / "slow" / "training.log").read_text()
    assert re.search(r"step 2/6 \(33\.3%\)  loss \d+\.\d{4}  eta ", log)
    assert rows(tmp_path / "slow") == rows(tmp_path / "fast")
    assert equal(final_state(tmp_path / "slow"), final_state(tmp_path / "fast"))
