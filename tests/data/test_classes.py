"""Class labels from the data to the drawn image: what is learned, drawn, measured and refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.common import rng
from ddpm.config import files
from ddpm.data import augment, order
from ddpm.data import source as data_source
from ddpm.evaluate import evaluate
from ddpm.experiment import build, cost, load, trainer
from ddpm.experiment import drawing as experiment_drawing
from ddpm.generate import generate_images
from ddpm.runtime import device
from ddpm.sampling import draw
from ddpm.studies import compatibility
from ddpm.tracking.tracker import Tracker
from ddpm.training import checkpoint
from support.commands import run_ddpm
from support.runs import run, tiny

DIGITS = tuple(map(str, range(10)))


def learning(**options):
    """A tiny training that learns classes; in a norm of one channel a group, labels and times
    would have no effect.
    """
    return tiny(
        **{"data__class_labels": True, "model__conventions": "ho(norm_num_groups=4)"} | options
    )


def pictures(folder, classes=("white", "black"), copies=4):
    """A folder of grey pictures in sub-folders, one picture a class, white to black in the order
    of the classes.
    """
    for value, name in zip(np.linspace(255, 0, len(classes)), classes, strict=True):
        (folder / name).mkdir(parents=True)
        for k in range(copies):
            Image.fromarray(np.full((8, 8), value, dtype=np.uint8)).save(folder / name / f"{k}.png")
    return f"folder(path={str(folder)!r})"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(learning(), folder)
    return folder


@pytest.fixture(scope="module")
def unlabelled(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unlabelled")
    run(tiny(), folder)
    return folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A network that has learned one picture for each of two classes by heart."""
    folder = tmp_path_factory.mktemp("two")
    run(
        learning(
            data__source=pictures(folder / "pictures"),
            data__image_size=8,
            data__validation_fraction=0.0,
            model__attention_resolutions=(),
            model__conventions="ho(norm_num_groups=2)",
            diffusion__predict="x0",
            train__length="60 steps",
            train__learning_rate=1e-2,
            train__label_dropout=0.2,
            every__log="60 steps",
            every__save="0 steps",
            every__sample="0 steps",
            sample__steps=5,
        ),
        folder / "run",
    )
    return folder / "run"


def brightness(folder, **options):
    """The mean of each drawn picture, 0 to 1."""
    paths = generate_images(folder, 4, folder / "drawn", "cpu", format="png", **options)
    return [np.asarray(Image.open(path)).mean() / 255 for path in paths]


def test_labels_are_dropped_at_their_address():
    labels = torch.arange(4096) % 10
    places = range(4096)

    def drop(labels, probability, step, places):
        numbers = rng.uniform(0, "label drop", step, places)
        return augment.drop_labels(labels, numbers, probability)

    kept = drop(labels, 0.1, 7, places)
    dropped = kept == -1
    assert torch.equal(kept[~dropped], labels[~dropped])
    # four standard errors of the share
    assert abs(dropped.double().mean() - 0.1) < 4 * (0.1 * 0.9 / 4096) ** 0.5
    parts = [
        drop(labels[part.start : part.stop], 0.1, 7, part)
        for part in (range(1000), range(1000, 4096))
    ]
    assert torch.equal(torch.cat(parts), kept)
    assert not torch.equal(drop(labels, 0.1, 8, places), kept)
    assert torch.equal(drop(labels, 0.0, 7, places), labels)


def test_micro_batches_see_the_same_labels(tmp_path):
    seen = {}
    for parts in (1, 4):
        given = learning(train__gradient_accumulation_steps=parts, train__label_dropout=0.5)
        made = trainer.build_trainer(given, tmp_path, device.start(), tracker=Tracker())
        told = seen.setdefault(parts, [])
        made.step.net.register_forward_pre_hook(lambda _, inputs, told=told: told.append(inputs[2]))
        made.step(3, next(made.batches(3)))
    assert len(seen[1]) == 1 and len(seen[4]) == 4
    assert torch.equal(torch.cat(seen[4]), seen[1][0])
    source = build.dataset(given)
    learned, _ = build.split(given, source)
    true = torch.tensor(source.labels)[learned[order.batch_indices(0, len(learned), 3, 8)]]
    dropped = seen[1][0] == -1
    assert 0 < dropped.sum() < 8 and torch.equal(seen[1][0][~dropped], true[~dropped])


def test_a_training_with_classes_resumes_bitwise(tmp_path):
    run(learning(train__length="12 steps", every__save="12 steps"), tmp_path / "whole")
    run(learning(train__length="7 steps", every__save="7 steps"), tmp_path / "parts")
    run(learning(train__length="12 steps", every__save="12 steps"), tmp_path / "parts")
    whole, parts = (
        checkpoint.load(checkpoint.checkpoints(tmp_path / name)[-1][1])["parts"]
        for name in ("whole", "parts")
    )
    for part in ("net", "ema"):
        ours, theirs = (state[part].get("shadow", state[part]) for state in (whole, parts))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    grids = [tmp_path / name / "samples" / "step_00000012.png" for name in ("whole", "parts")]
    assert grids[0].read_bytes() == grids[1].read_bytes()


def test_a_checkpoint_knows_its_classes_without_the_data(trained):
    saved = files.from_json((trained / "config.json").read_text())
    assert saved.data.classes == DIGITS
    loaded = load.load(trained / "final.safetensors", "cpu")
    assert loaded.config.data.classes == DIGITS and loaded.net.class_embedding.weight.shape[0] == 10
    files.check_continues(learning(), trained)
    with pytest.raises(ValueError, match="class_labels: True there, False here"):
        files.check_continues(tiny(), trained)


def test_grids_show_the_classes_in_turn_and_measurements_those_of_the_data(trained):
    loaded = load.load(trained, "cpu")
    assert list(build.grid_recipe(loaded.config).labels) == list(range(10))
    source = build.dataset(loaded.config)
    measured = build.evaluation_recipe(loaded.config, source)
    assert np.array_equal(np.bincount(measured.labels), np.bincount(source.labels))
    few = np.bincount(measured.labels[:500], minlength=10)
    assert few.min() > 20  # 500 draws of one in ten: 50, with a standard deviation of 7
    row = evaluate(trained, "cpu")
    assert row["eval/protocol"].split(";")[2].endswith("classes as in the data")


def test_each_label_draws_its_picture(two):
    assert brightness(two, **{"sample.classes": ("white", "black")}) == pytest.approx(
        [1, 0, 1, 0], abs=0.1
    )
    # in the order of the names: black, white
    assert brightness(two) == pytest.approx([0, 1, 0, 1], abs=0.1)
    assert brightness(two, **{"sample.classes": ("0",), "sample.guidance": 2.0}) == pytest.approx(
        [0, 0, 0, 0], abs=0.1
    )
    without = {"sample.guidance": 0.0}  # the network without its label
    assert brightness(two, **without) == brightness(
        two, **without | {"sample.classes": ("white", "black")}
    )


def test_another_training_guides(trained, unlabelled, tmp_path):
    """A network that guides itself moves nothing; a weaker one does, and so does one without
    classes.
    """

    def drawn(folder, **options):
        given = {f"sample.{option}": value for option, value in options.items()}
        paths = generate_images(folder, 4, tmp_path / "out", "cpu", **given)
        return [np.asarray(Image.open(path)).astype(int) for path in paths]

    plain = drawn(trained)
    # worse + scale (out - worse) rounds where out and worse are the same: less than a grey level
    assert (
        np.abs(
            np.subtract(drawn(trained, guide_checkpoint=str(trained), guidance=2.0), plain)
        ).max()
        <= 1
    )
    weak = tmp_path / "weak"
    run(learning(model__model_channels=4, train__length="3 steps", seed=1), weak)
    for guide in (weak, unlabelled):
        assert not np.array_equal(drawn(trained, guide_checkpoint=str(guide), guidance=3.0), plain)
    with pytest.raises(ValueError, match="cannot guide: its config.data.classes is"):
        drawn(unlabelled, guide_checkpoint=str(weak), guidance=3.0)
    other = tmp_path / "other"
    run(tiny(train__length="1 steps", diffusion__predict="v"), other)
    with pytest.raises(
        ValueError, match="cannot guide: its config.diffusion.predict is 'v', not 'eps'"
    ):
        drawn(trained, guide_checkpoint=str(other), guidance=2.0)
    with pytest.raises(
        ValueError, match="is not asked where guidance is 1; give such as --guidance=2"
    ):
        drawn(trained, guide_checkpoint=str(weak))


def test_classes_and_guidance_at_the_commands(trained, tmp_path):
    code, out, err = run_ddpm(
        "generate",
        f"--checkpoint={trained}",
        "--classes=3,5",
        "--guidance=2",
        "--guidance_interval=0.2,5",
        "--num_images=2",
        f"--out={tmp_path}/a",
        cwd=tmp_path,
    )
    assert code == 0, err
    assert (
        "3 steps, linear spacing, seed 0, guidance 2.0 in sigma/alpha 0.2 to 5.0, classes 3, 5; "
        in out[0]
    )
    levels = build.diffusion(load.load(trained, "cpu").config, None).process.levels(3)[:-1]
    assert out[0].endswith(
        f"; {3 + sum(0.2 < level.ratio <= 5 for level in levels)} network evaluations an image"
    )
    code, out, err = run_ddpm(
        "generate", f"--checkpoint={trained}", "--guidance_interval=5,x", cwd=tmp_path
    )
    assert code == 2 and len(err) == 1 and "takes two noise levels" in err[0], err
    for options, said in [
        (
            {"sample.classes": ("3", "11")},
            r"unknown class '11' .*; choose one of 0, 1, 2, 3, 4 and 5 more, or a number from 0",
        ),
        (
            {"sample.guidance": 2.0, "sample.guide_checkpoint": "/no/such/run"},
            "neither a file nor a run folder",
        ),
    ]:
        with pytest.raises(ValueError, match=said):
            generate_images(trained, 1, tmp_path / "b", "cpu", **options)


def test_the_measure_of_some_classes_is_against_those(trained):
    numbers = evaluate(trained, "cpu", **{"evaluate.classes": ("3", 5), "sample.guidance": 2.0})
    made = compatibility.parse_protocol(numbers["eval/protocol"])
    labels = build.dataset(tiny()).labels
    assert made["images"] == str(sum(label in (3, 5) for label in labels))
    assert made["guidance"] == "2.0" and made["classes"] == "3, 5" and made["seed"] == "0"


@pytest.mark.parametrize(
    "options, said",
    [
        (
            dict(sample__guidance=2.0),
            "knows no classes to be guided by; train with data.class_labels=True",
        ),
        (
            dict(sample__guidance=2.0, data__class_labels=True, train__label_dropout=0.0),
            "set sample.guidance=1",
        ),
        (dict(sample__classes=("3",)), "the network knows no classes; leave it out"),
        (dict(sample__guidance_interval=(5.0, 0.2)), "the lower first, such as"),
        (
            dict(data__class_labels=True, data__classes=("a", "b")),
            "classes 0, 1, 2, 3, 4 and 5 more, and the config has a, b",
        ),
        (
            dict(data__class_labels=True, sample__classes=("ten",)),
            "config.sample.classes: unknown class 'ten'",
        ),
        (dict(data__class_labels=True, data__classes=(1, 2)), "takes the names of classes"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(options, said, tmp_path):
    with pytest.raises(ValueError, match=said) as caught:
        run(tiny(**options), tmp_path / "run")
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_folder_without_sub_folders_has_no_labels(tmp_path):
    pictures(tmp_path, classes=("plain",))
    with pytest.raises(
        ValueError,
        match="has no labels; put the images of a folder into a sub-folder for each class",
    ):
        run(
            learning(data__source=f"folder(path='{tmp_path}/plain')", data__image_size=8),
            tmp_path / "run",
        )


def test_classes_are_given_by_name_or_else_by_number():
    assert data_source.class_numbers(("dog", "0", 1), ("cat", "dog")) == [1, 0, 1]
    # a name comes before a number
    assert data_source.class_numbers(("10", "0"), ("1", "10", "2")) == [1, 0]
    with pytest.raises(
        ValueError,
        match=r"unknown class 'dgo' \(did you mean 'dog'\?\); choose one of cat, dog, or a number",
    ):
        data_source.class_numbers(("dgo",), ("cat", "dog"))


def test_the_network_that_draws_without_guidance_is_asked_once_a_step(trained):
    loaded = load.load(trained, "cpu")
    asked = []
    loaded.net.register_forward_hook(lambda *_: asked.append(1))
    recipe = build.grid_recipe(loaded.config)
    drawing = experiment_drawing.drawer(loaded.config, loaded.net, loaded.machine)
    for guidance, times in ((1.0, 3), (2.0, 6)):
        asked.clear()
        draw.concatenate(drawing(range(2), recipe._replace(guidance=guidance)))
        assert (
            len(asked) == times == cost.count_nfe(loaded.config, recipe._replace(guidance=guidance))
        )


def test_validation_and_likelihood_are_told_the_labels(tmp_path):
    made = trainer.build_trainer(
        learning(
            evaluate__likelihood="bound(images=4, nfe=4)",
        ),
        tmp_path,
        device.start(),
        tracker=Tracker(),
    )
    net = made.step.net
    # the last layer begins at zero, and would hide what the network does
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(1))

    def measured():
        return made.evaluation.validation.loss(), made.evaluation.likelihood()[0][
            "eval/bits_per_dim_kl"
        ]

    before = measured()
    torch.nn.init.zeros_(net.class_embedding.weight)
    assert all(now != then for now, then in zip(measured(), before, strict=True))
    bits = made.evaluation.likelihood()[0]
    assert "given their labels" in bits["eval/bits_per_dim_protocol"]
    assert json.loads(made.config_json)["data"]["classes"] == list(DIGITS)
