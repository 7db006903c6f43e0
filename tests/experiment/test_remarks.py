"""What a person should hear about a run: which weights are the best, copies, costs, lengths and
folders that do not fit.
"""

import json
import re
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import data, doctor, plan
from ddpm.common import durations
from ddpm.config import defaults
from ddpm.evaluation import distances, extractors, scorer
from ddpm.experiment import build, cost, drawing, remarks, trainer
from ddpm.main import train_experiment
from ddpm.runtime import compile, device
from ddpm.training import checkpoint, meters, weights
from ddpm.training.trainer import train
from support.configs import FILES, module_of
from support.runs import equal, rows, run, tiny

ALL = dict(
    data__validation_fraction=0.0,
    model__channel_mult=(1,),
    model__attention_resolutions=(),
    every__sample="0 steps",
)


def raw_rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_of(folder):
    return (folder / "training.log").read_text()


# the best weights where no image is held out


@pytest.fixture(scope="module")
def without_held_out(tmp_path_factory):
    """Stopped in the middle of an interval, at which the rate is so high that the loss rises
    again.
    """
    folder = tmp_path_factory.mktemp("remarks") / "run"
    given = ALL | dict(
        every__validate="3 steps",
        every__log="1 steps",
        train__learning_rate=3e-3,
        train__warmup="0 steps",
        train__learning_rate_decay="linear(length='14 steps', floor=0.2)",
        seed=5,
    )
    assert run(tiny(**given, train__length="7 steps"), folder) and run(
        tiny(**given, train__length="14 steps"), folder
    )
    return folder, given


def test_the_lowest_training_loss_of_an_interval_is_the_best_and_says_so(
    without_held_out, tmp_path
):
    folder, given = without_held_out
    losses = {row["step"]: row["train/loss"] for row in rows(folder)}
    means = {end: statistics.fmean(losses[end - k] for k in range(3)) for end in (3, 6, 9, 12)}
    step, lowest = min(means.items(), key=lambda item: item[1])
    about = checkpoint.header(folder / "best_train_loss.safetensors")
    assert about["step"] == step and about["best"] == {
        "by": "train/loss",
        "loss": pytest.approx(lowest, rel=1e-5),
    }
    assert not (folder / "best.safetensors").exists()
    assert run(tiny(**given, train__length=f"{step} steps"), tmp_path / "there")
    ours = folder / "best_train_loss.safetensors"
    theirs = tmp_path / "there/final.safetensors"
    assert equal(weights.load_weights(ours)[3], weights.load_weights(theirs)[3])
    said = (
        "best_train_loss.safetensors keeps the averaged weights at the lowest train/loss of 3 "
        "steps, as no image is held out"
    )
    assert said in log_of(folder)
    parts = checkpoint.newest(folder)[0]["parts"]
    assert parts["best"] == {"by": "train/loss", "loss": about["best"]["loss"]}
    assert parts["tracker"]["summary"] == {"best/train_loss": about["best"]["loss"]}


def test_held_out_images_choose_the_best_as_before(tmp_path):
    """A checkpoint of before goes on: it lacks the sum that is needed without them."""
    given = dict(
        every__validate="2 steps",
        train__warmup="0 steps",
        model__channel_mult=(1,),
        model__attention_resolutions=(),
    )
    assert run(tiny(**given, train__length="4 steps"), tmp_path)
    path = checkpoint.checkpoints(tmp_path)[-1][1]
    content = checkpoint.load(path)
    del content["parts"]["meters"]["since"], content["parts"]["best"]["by"]
    checkpoint.save(tmp_path, 4, content["config"], content["parts"])
    assert run(tiny(**given, train__length="8 steps"), tmp_path)
    losses = {row["step"]: row["val/loss_ema"] for row in rows(tmp_path) if "val/loss_ema" in row}
    step, lowest = min(losses.items(), key=lambda item: item[1])
    about = checkpoint.header(tmp_path / "best.safetensors")
    assert about["step"] == step and about["best"] == {"by": "val/loss_ema", "loss": lowest}
    assert "best.safetensors keeps the averaged weights at the lowest val/loss_ema\n" in log_of(
        tmp_path
    )


# copies


def learned_images(given, count):
    """Images that a training learns from, once over and over: what a network that copies would
    draw.
    """
    source = build.dataset(given)
    learned, _ = build.split(given, source)
    return torch.stack([source[int(learned[k % 20])] for k in range(count)])


def test_samples_that_are_copies_are_called_so_and_shown(tmp_path):
    """By a training whose drawing copies twenty of its images over and over."""
    given = tiny(
        **ALL
        | dict(
            data__validation_fraction=0.1,
            every__evaluate="6 steps",
            train__length="6 steps",
            evaluate__num_samples=64,
            evaluate__extractor="digits",
        )
    )
    made = trainer.build_trainer(given, tmp_path / "run", device.start())
    pixels = learned_images(given, 64)
    made.evaluation.draw = lambda seeds, recipe: iter([(seeds, pixels[: len(seeds)])])
    assert train(made)
    made.tracker.close()
    (line,) = (
        line
        for line in log_of(tmp_path / "run").splitlines()
        if "samples are copies of training images" in line
    )
    assert (
        "eval/copies is 1.00, and 0.05 ± 0.0" in line
        and "eval/copying is 1.00, and 0.50 ± 0.0" in line
    )
    picture = Path(line.rpartition("look at ")[2])
    assert picture == tmp_path / "run/samples/nearest_00000006.png"
    shown = np.array(Image.open(picture))[2:18, 2:38]
    assert np.array_equal(shown[:, :16], shown[:, 18:34]) and np.array_equal(
        shown[:, :16], pixels[0, 0].numpy()
    )


def test_samples_that_are_no_copies_are_not_called_so():
    """Thirty sets of held-out images in place of samples; and a line where one number alone is
    beyond.
    """
    drawn, unseen = (
        torch.rand(30, n, generator=torch.Generator().manual_seed(n)) for n in (200, 100)
    )
    for one, other in zip(drawn, unseen, strict=True):
        numbers = {f"eval/{name}": value for name, value in distances.copying(one, other).items()}
        assert scorer.copying_warning(numbers, "") == []
    nearer = {
        f"eval/{name}": value
        for name, value in distances.copying(drawn[0] * 0.7, unseen[0]).items()
    }
    assert (
        len(scorer.copying_warning(nearer, "here")) == 1
        and scorer.copying_warning({}, "here") == []
    )
    few = {
        f"eval/{name}": value
        for name, value in distances.copying(torch.zeros(64), torch.ones(1)).items()
    }
    assert scorer.copying_warning(few, "here") == []  # one held-out image proves nothing


def test_without_held_out_images_it_is_said_what_is_not_known():
    given = tiny(data__validation_fraction=0.0, evaluate__extractor="digits")
    (note,) = drawing.scorer(given, build.dataset(given), device.start()).notes
    assert note == (
        "eval/copies and eval/copying are not measured: that takes 19 held-out images, and there "
        "are 0; raise data.validation_fraction in a new run"
    )


# costs


def test_an_evaluation_that_costs_more_than_its_training_is_said_before_it_begins(tmp_path):
    """The ratio is that of counted operations, and the time follows from the speed that the log
    has.
    """
    given = tiny(
        **ALL
        | dict(
            every__evaluate="6 steps",
            train__length="12 steps",
            evaluate__num_samples=64,
            evaluate__steps=20,
            evaluate__extractor="digits",
            every__log="6 steps",
        )
    )
    assert run(given, tmp_path)
    lines = log_of(tmp_path).splitlines()
    (at,) = (k for k, line in enumerate(lines) if "the evaluation that begins costs" in line)
    assert "eval/fd_digits" not in "".join(lines[:at]) and "eval/fd_digits" in "".join(lines[at:])
    flops = cost.count_flops(given)
    drawing = 64 * (20 * flops.forward + extractors.OPERATIONS["digits"])
    ratio = (drawing + cost.comparison_operations(given, 1797)) / (6 * 8 * flops.training)
    said = (
        r"costs ([\d.]+) times what the training up to step 6 did, about (\S+ \S+) against "
        r"(\S+ \S+) at the speed measured"
    )
    times, theirs, ours = re.search(said, lines[at]).groups()
    assert float(times) == pytest.approx(ratio, rel=0.05) and ratio > 5
    speed = next(row["speed/images_per_second"] for row in raw_rows(tmp_path) if row["step"] == 6)
    assert ours == durations.in_words(48 / speed) and theirs == durations.in_words(
        48 * ratio / speed
    )
    start = next(line for line in lines if "evaluation every 6 steps and at the end" in line)
    assert re.search(
        r"in 20 steps, [\d.]+ times the training's operations each, [\d.]+ times for all 2", start
    )


def test_cheap_evaluations_are_measured_without_a_word_and_in_percent():
    assert [
        meters.portion(share, " of")
        for share in (0.049, 1, 1.04, 1.0501, 1.36, 2, 3.25, 9.96, 12.4, 250_000)
    ] == [
        "4.9% of",
        "100.0% of",
        "104.0% of",
        "1.1 times",
        "1.4 times",
        "twice",
        "3.2 times",
        "10 times",
        "12 times",
        "250,000 times",
    ]
    assert [durations.in_words(seconds) for seconds in (0.25, 8, 119, 600, 8000, 3.6e5, 1e7)] == [
        "0.25 seconds",
        "8 seconds",
        "119 seconds",
        "10 minutes",
        "2.2 hours",
        "4.2 days",
        "116 days",
    ]


# lengths


def lines_about(images=1000, **options):
    given = dict(
        train__length="200 steps",
        train__warmup="10 steps",
        every__sample="20 steps",
        every__validate="9 steps",
        every__save="9 steps",
        every__log="9 steps",
        every__milestone="0 steps",
        train__batch_size=8,
    )
    return remarks.length_remarks(tiny(**given | options), images)


@pytest.mark.parametrize(
    "options, said",
    [
        (
            {"train__warmup": "5000 steps", "train__learning_rate": 2e-4},
            "train.warmup is '5000 steps', longer than the training of 200 steps, which ends at "
            "the rate 8e-06 of 0.0002; set train.warmup='10 steps'",
        ),
        (
            {
                "train__warmup": "9 steps",
                "train__length": "1 steps",
                "every__sample": "1 steps",
                "every__validate": "1 steps",
                "every__save": "1 steps",
                "every__log": "1 steps",
            },
            "train.warmup is '9 steps', longer than the training of 1 step, which ends at the "
            "rate 0.00011 of 0.001; set train.warmup='1 step'",
        ),
        (
            {"train__warmup": "20000 steps", "train__length": "30000 steps"},
            "more than half of the training of 30,000 steps; set train.warmup='1500 steps'",
        ),
        (
            {"train__warmup": "1 epochs"},
            "train.warmup is '1 epochs', more than half of the training of 200 steps; set train.",
        ),
        (
            {"train__learning_rate_decay": "cosine(length='1 epochs')"},
            "which is over before the end of the training of 200 steps",
        ),
        (
            {"train__learning_rate_decay": "linear(length='4000 images')"},
            "give it the length '200 steps'",
        ),
        (
            {"train__learning_rate_decay": "inverse_sqrt(length='300 steps')"},
            "which begins after the end of the training of 200",
        ),
        (
            {"ema__decay": 0.999, "ema__warmup": False},
            "82% of an average of decay 0.999 without ema.warmup are untrained weights",
        ),
        (
            {"ema__extra_decays": (0.5, 0.99), "ema__warmup": False},
            "13% of an average of decay 0.99 without",
        ),
        (
            {"every__sample": "2 epochs", "every__evaluate": "1e4 images"},
            "every.evaluate, every.sample: longer than the training of 200 steps, so only once, "
            "at its end",
        ),
        (
            {"every__milestone": "50 epochs"},
            "every.milestone is longer than the training of 200 steps, which keeps no milestone",
        ),
        (
            {"train__batch_size": 2000},
            "train.batch_size is 2000, more than the 1,000 images to learn from, so each step "
            "learns from an image 2 times on average; set train.batch_size=1000 or less",
        ),
    ],
)
def test_what_does_not_fit_the_length_of_the_training_is_said(options, said):
    lines = lines_about(**options)
    assert len(lines) == 1 and said in lines[0], lines


def test_a_rate_that_never_arrives_is_told_as_the_optimizer_gets_it(tmp_path):
    """In the log before the first step, and the number is the one that the last row has."""
    given = tiny(
        train__warmup="400 steps",
        train__learning_rate=1e-3,
        train__length="6 steps",
        every__log="6 steps",
    )
    assert run(given, tmp_path)
    told = float(
        re.search(
            r"which ends at the rate (\S+) of 0.001;", log_of(tmp_path).partition("step 6/6")[0]
        )[1]
    )
    assert told == pytest.approx(rows(tmp_path)[-1]["train/learning_rate"], rel=0.05)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"train__warmup": "100 steps"},
        {"train__learning_rate_decay": "cosine(length='200 steps')"},
        {"train__learning_rate_decay": "inverse_sqrt(length='50 steps')"},
        {"ema__decay": 0.9999},
        {"every__sample": "0 steps"},
        {"every__save": "9 epochs, 1 hour"},
        {"ema__decay": 0.9999, "ema__warmup": False, "ema__rampup": 0.05},
        {"every__evaluate": "auto"},
    ],
)
def test_what_fits_is_not_remarked_on(options):
    assert lines_about(**options) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_shipped_config_is_remarked_on(path):
    assert remarks.length_remarks(defaults.freeze(module_of(path).get_config()), 10_000) == []


def test_the_plan_has_the_same_words():
    given = tiny(
        train__warmup="4000 images",
        every__milestone="500 epochs",
        data__source="folder(path='no/such')",
        model__channel_mult=(1,),
        model__attention_resolutions=(),
    )
    lines = "\n".join(plan.plan(given, 8, 0.4, 2)).splitlines()
    expected = remarks.length_remarks(given, plan.ASSUMED)
    assert len(expected) == 2 and set(expected) <= set(lines)


# folders


@pytest.mark.parametrize(
    "count, said",
    [
        (1, "not fit: 1 image is too few: below 300 a network draws copies"),
        (299, "not fit: 299 images are too few"),
        (300, "look at: 300 images are few, and some will be copied"),
        (3000, None),
    ],
)
def test_what_the_doctor_says_of_a_folder_s_size_reaches_the_log(tmp_path, count, said):
    """The doctor's own lines among the training's notes."""
    rng = np.random.default_rng(count)
    folder = tmp_path / "photos"
    folder.mkdir()
    for k in range(count):
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / f"{k:04}.bmp")
    (folder / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    notes = data.open_source(f"folder(path={str(folder)!r})", 8, 1).notes
    report = doctor.diagnose(folder, 8, 0.0)
    lines = [
        line for line in doctor.report_lines(report) if line.startswith(("not fit: ", "look at: "))
    ]
    found = [note for note in notes if note.startswith(("not fit: ", "look at: "))]
    damaged = (
        "not fit: 1 of 2 files cannot be read as images (1 broken): copy the folder here again"
        if count == 1
        else "look at: 1 file cannot be read as an image (1 broken) and is left out"
    )
    assert damaged in found and set(found) <= set(lines)
    assert [note for note in found if said and note.startswith(said)] == [
        note for note in found if note != damaged
    ]


# the first lines


def test_the_first_lines_come_before_what_takes_long(tmp_path, capsys, monkeypatch):
    """What is read is said before the log begins, and a loss comes with the first step of each
    process.
    """
    given = ALL | dict(every__log="1000 steps")
    losses = []
    for steps in (2, 4):
        assert (
            train_experiment(tiny(**given, train__length=f"{steps} steps"), tmp_path / "run") == 0
        )
        out = capsys.readouterr().out.splitlines()
        assert out[0] == "reading the images of digits ..."
        (at,) = (
            k for k, line in enumerate(out) if line.startswith("the first step is done: train/loss")
        )
        assert out[at].endswith(f" at step {steps - 1} of {steps}") and not any(
            line.startswith("step ") for line in out[:at]
        )
        losses.append(float(re.search(r"train/loss (\S+) at", out[at])[1]))
    assert run(
        tiny(**given | dict(every__log="1 steps"), train__length="1 steps"), tmp_path / "one"
    )
    assert rows(tmp_path / "one")[0]["train/loss"] == pytest.approx(losses[0], abs=5e-5)
    monkeypatch.setattr(compile, "COMPILER", "eager")
    evaluated = given | dict(
        every__evaluate="1 steps", train__length="1 steps", train__compile=True
    )
    assert train_experiment(tiny(**evaluated), tmp_path / "compiled") == 0
    out = capsys.readouterr().out.splitlines()
    assert [line for line in out if line.endswith(" ...")] == [
        "reading the images of digits ...",
        "compiling the network, which takes a minute or more (train.compile) ...",
        "loading the feature extractor digits ...",
    ]
