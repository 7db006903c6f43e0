"""A new folder continues a run at a chosen checkpoint, to the bit; what cannot be continued is
refused in one line.
"""

import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from ddpm.config import files
from ddpm.experiment import trainer
from ddpm.main import train_experiment
from ddpm.runtime import device
from ddpm.tracking.tracker import Tracker
from ddpm.training import checkpoint
from ddpm.training import weights as training_weights
from ddpm.training.trainer import train
from support.runs import equal, rows, run, tiny

GIVEN = dict(
    train__length="24 steps",
    every__milestone="10 steps",
    every__log="7 steps",
    every__validate="3 steps",
    model__dropout=0.2,
    diffusion__times="importance",
    data__class_labels=True,
    ema__extra_decays=(0.5,),
    ema__sigma_rels=(0.1,),
    every__snapshot="8 steps",
    model__channel_mult=(1,),
    model__attention_resolutions=(),
    train__learning_rate_decay="cosine(length='24 steps')",
    train__gradient_accumulation_steps=2,
)
MILESTONE = "checkpoints/step_00000010.keep.pt"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with milestones at steps 10 and 20."""
    folder = tmp_path_factory.mktemp("resume_from") / "whole"
    assert run(tiny(**GIVEN), folder)
    return folder


def parts(folder, name):
    return {
        key: part
        for key, part in checkpoint.load(folder / "checkpoints" / name)["parts"].items()
        if key != "tracker"
    }


def refused(given, folder, source=None):
    """The one line with which a config is refused, before anything is written."""
    with pytest.raises(ValueError) as caught:
        trainer.build_trainer(tiny(**given), folder, device.start())
    assert not folder.exists() and "\n" not in str(caught.value)
    return str(caught.value)


def test_a_new_folder_goes_on_from_a_milestone_to_the_bit(trained, tmp_path):
    """Every part of every later checkpoint, all rows from the first on, and every file; and
    again after the source is gone.
    """
    source = tmp_path / "source"
    new = tmp_path / "new"
    shutil.copytree(trained, source)
    before = {path: path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()}
    given = GIVEN | {"train__resume_from": str(source / MILESTONE)}
    assert run(tiny(**given | {"train__length": "17 steps"}), new)
    # a milestone of the other folder's
    assert [path.name for _, path in checkpoint.checkpoints(new)][0] != MILESTONE
    assert {
        path: path.read_bytes() for path in sorted(source.rglob("*")) if path.is_file()
    } == before
    log = (new / "training.log").read_text()
    assert (
        f"continues {source / MILESTONE} from step 10 (train.resume_from)" in log
        and "resumed from step 10" in log
    )
    shutil.rmtree(source)
    assert run(tiny(**given), new)
    assert equal(parts(new, "step_00000024.pt"), parts(trained, "step_00000024.pt"))
    ours, theirs = ({row["step"]: row for row in rows(folder)} for folder in (new, trained))
    assert equal(
        {step: row for step, row in ours.items() if step in theirs}, theirs
    ) and ours.keys() - theirs.keys() == {17}
    for name in ("final.safetensors", "best.safetensors"):
        (_, step, _, weights), (_, other, _, expected) = (
            training_weights.load_weights(folder / name) for folder in (new, trained)
        )
        assert step == other and equal(weights, expected)
    steps, expected = (
        [step for step, _ in checkpoint.snapshots(folder)] for folder in (new, trained)
    )
    assert sorted({*steps} - {17}) == expected == [8, 16, 24]
    first = [
        training_weights.load_snapshot(folder / "snapshots/step_00000008.safetensors", "ema 0.1")
        for folder in (new, trained)
    ]
    assert equal(*first)


def test_the_folder_owns_its_start(trained, tmp_path):
    """From before the first step on: the source may go at once, and the option need not be given
    again.
    """
    new = tmp_path / "new"
    source = shutil.copytree(trained, tmp_path / "source") / MILESTONE
    given = tiny(**GIVEN | {"train__resume_from": str(source)})
    made = trainer.build_trainer(given, new, device.start())
    made.machine.stop.signal = signal.SIGTERM  # before the first step
    assert not train(made)
    made.tracker.close()
    assert [step for step, _ in checkpoint.checkpoints(new)] == [10]
    shutil.rmtree(source.parent)
    files.check_continues(tiny(**GIVEN), new)
    made = trainer.build_trainer(tiny(**GIVEN), new, device.start(), tracker=Tracker())
    assert made.start == 10
    assert files.from_json(made.config_json).train.resume_from == str(source)
    with pytest.raises(
        ValueError,
        match=r"holds a run with another config \(train.resume_from: .* there, 'other' here\)",
    ):
        files.check_continues(tiny(**GIVEN | {"train__resume_from": "other"}), new)
    # never silently the run that stands there already
    with pytest.raises(ValueError, match="train.resume_from: '' there"):
        files.check_continues(tiny(**GIVEN | {"train__resume_from": str(source)}), trained)


def test_a_folder_means_its_newest_checkpoint_and_a_new_run_of_wandb(trained, tmp_path):
    """A damaged one is passed over, and left as it is: the folder is another run's."""
    source = shutil.copytree(trained, tmp_path / "source")
    newest = checkpoint.checkpoints(source)[-1][1]
    newest.write_bytes(newest.read_bytes()[:-100])
    longer = GIVEN | {"train__length": "30 steps", "train__resume_from": str(source)}
    made = trainer.build_trainer(tiny(**longer), tmp_path / "new", device.start())
    made.tracker.close()
    assert made.start == 20 and newest.exists() and not list(newest.parent.glob("*.damaged*"))
    state = {"tracker": {"wandb_id": "abc", "summary": {"best/val_loss_ema": 0.5}}}
    assert trainer.tracker_state({"parts": state}, newest) == {
        "summary": {"best/val_loss_ema": 0.5}
    }
    assert trainer.tracker_state({"parts": state}, None)["wandb_id"] == "abc"


def test_what_cannot_be_continued_is_refused_in_one_line(trained, tmp_path):
    new = tmp_path / "new"
    given = GIVEN | {"train__resume_from": str(trained / MILESTONE)}
    said = refused(
        given
        | {"train__batch_size": 16, "seed": 2, "train__warmup": "1 steps", "model__dropout": 0.0},
        new,
    )
    for words in (
        "seed: 0 there, 2 here",
        "train.batch_size: 8 there, 16 here",
        "--config.train.batch_size=8",
        "init_from",
    ):
        assert words in said
    assert "train.resume_from:" not in said and "train.init_from:" not in said
    weights_only = refused(GIVEN | {"train__resume_from": str(trained / "best.safetensors")}, new)
    assert "has weights only" in weights_only and "train.init_from" in weights_only
    drawn_from = tmp_path / "converted"
    drawn_from.mkdir()
    shutil.copy(trained / "final.safetensors", drawn_from)
    assert "has weights only" in refused(GIVEN | {"train__resume_from": str(drawn_from)}, new)
    nothing = refused(GIVEN | {"train__resume_from": "no/such"}, new)
    assert nothing == (
        f"train.resume_from: {os.path.abspath('no/such')} is not found; give a run folder, or a "
        ".pt file of its checkpoints/"
    )
    names = ", ".join(path.name for _, path in checkpoint.checkpoints(trained)[::-1])
    assert names.startswith("step_00000024.pt, step_00000020.keep.pt, ")
    for wrong in (
        "checkpoints/step_00000011.pt",
        "step_00000010.keep.pt",
        "checkpoints/best.safetensors",
    ):
        said = refused(GIVEN | {"train__resume_from": str(trained / wrong)}, new)
        assert said == (
            f"train.resume_from: {trained / wrong} is not found; {trained / 'checkpoints'} has "
            f"{names}"
        )
    for wrong in ("hole", "hole/checkpoints/step_00000010.pt"):
        said = refused(GIVEN | {"train__resume_from": str(trained.parent / wrong)}, new)
        assert said == (
            f"train.resume_from: {trained.parent / wrong} is not found; runs in {trained.parent} "
            "that can be continued: whole"
        )
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state_dict.pt")
    assert "is not a checkpoint" in refused(
        GIVEN | {"train__resume_from": str(tmp_path / "state_dict.pt")}, new
    )
    too_short = refused(given | {"train__length": "9 steps"}, new)
    assert "is of step 10, and config.train.length '9 steps' ends at step 9" in too_short
    with pytest.raises(
        ValueError, match="choose init_from to start from weights alone, or resume_from"
    ):
        tiny(train__init_from="runs/a", train__resume_from="runs/b")


def test_a_checkpoint_that_lies_alone_brings_no_history(trained, tmp_path):
    """What else lies in its folder is another's."""
    alone = tmp_path / "downloads"
    alone.mkdir()
    shutil.copy(trained / MILESTONE, alone / "theirs.pt")
    for name in ("metrics.jsonl", "best.safetensors", "config.json"):
        shutil.copy(trained / name, alone)
    given = tiny(
        **GIVEN | {"train__resume_from": str(alone / "theirs.pt"), "train__length": "11 steps"}
    )
    assert run(given, tmp_path / "new") and [row["step"] for row in rows(tmp_path / "new")] == [11]
    assert training_weights.load_weights(tmp_path / "new" / "final.safetensors")[1] == 11


def test_a_run_that_began_from_weights_is_continued_without_naming_them(trained, tmp_path):
    """Where a run began is past; one that continues a continued run is of the same kind."""
    begun = GIVEN | {
        "train__init_from": str(trained),
        "train__length": "3 steps",
        "every__milestone": "2 steps",
    }
    assert run(tiny(**begun), tmp_path / "a")
    second = GIVEN | {"train__resume_from": str(tmp_path / "a"), "train__length": "4 steps"}
    assert train_experiment(tiny(**second), tmp_path / "b") == 0
    third = GIVEN | {
        "train__resume_from": str(tmp_path / "b/checkpoints/step_00000003.pt"),
        "train__length": "5 steps",
    }
    assert run(tiny(**third), tmp_path / "c")
    assert [step for step, _ in checkpoint.checkpoints(tmp_path / "c")][-1] == 5


def test_the_folder_s_name_tells_two_starts_apart():
    one, other = (
        files.run_name("configs/digits.py", {"train.resume_from": path})
        for path in ("runs/a", "runs/b")
    )
    assert one != other and one != "digits"


def test_a_run_that_an_earlier_version_began_goes_on_to_the_bit(tmp_path):
    """Its config.json and its checkpoint name options that are arguments or gone now."""
    text = (Path(__file__).parents[1] / "golden/options_before_moving.json").read_text()
    given = files.from_json(text)
    assert run(given, tmp_path / "whole")
    old = tmp_path / "old"
    assert run(files.changed(given, {"train.length": "2 steps"}), old)
    path = old / "checkpoints/step_00000002.pt"
    content = checkpoint.load(path) | {"config": text}
    torch.save(content, old / "checkpoint")  # not over the file, whose tensors are mapped
    os.replace(old / "checkpoint", path)
    (old / "config.json").write_text(text)
    assert run(given, old)
    name = "step_00000004.pt"
    assert equal(parts(old, name), parts(tmp_path / "whole", name))
    assert rows(old) == rows(tmp_path / "whole")
    written = files.read(old / "config.json")
    assert (written.model, written.ema, written.data) == (given.model, given.ema, given.data)
    other = files.changed(given, {"model.conventions": "ho"})
    with pytest.raises(ValueError, match=r"model.conventions: .openai\(norm.* there, .ho. here"):
        files.check_continues(other, old)
