"""Every entry of every table, and every pair of entries across tables, trains two steps, draws,
edits and is measured, or is refused in one line.

Rows that hold one entry of each table are chosen so that together they hold every pair that can be:
a covering array.
"""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.common import registry
from ddpm.diffusion.editing import EDITS, get_edit
from ddpm.diffusion.likelihood import LIKELIHOODS
from ddpm.diffusion.losses import LOSSES
from ddpm.diffusion.process import VARIANCES
from ddpm.diffusion.samplers import SAMPLERS
from ddpm.diffusion.schedules import SCHEDULES
from ddpm.diffusion.spacings import SPACINGS
from ddpm.diffusion.targets import TARGETS
from ddpm.diffusion.timesteps import TIMES
from ddpm.diffusion.weightings import WEIGHTINGS
from ddpm.experiment import build, cost
from ddpm.generate import edit_images
from ddpm.models import MODELS
from ddpm.training.optim import DECAYS, OPTIMIZERS
from support.runs import rows, run, tiny

DECAY = {
    "cosine": "cosine(length='2 steps')",
    "linear": "linear(length='2 steps')",
    "inverse_sqrt": "inverse_sqrt(length='1 step')",
}
AXES = {
    "model.name": ["dit(depth=2, width=16, heads=2)" if name == "dit" else name for name in MODELS],
    "model.qk_norm": [False, True],
    "model.use_scale_shift_norm": [False, True],
    "model.resblock_updown": [False, True],
    "data.class_labels": [False, True],
    "data.augment": [0.0, 0.5],
    "diffusion.beta_schedule": list(SCHEDULES),
    "diffusion.zero_terminal_snr": [False, True],
    "diffusion.predict": list(TARGETS),
    "diffusion.variance": list(VARIANCES),
    "diffusion.loss": list(LOSSES),
    "diffusion.weighting": list(WEIGHTINGS),
    "diffusion.times": list(TIMES),
    "diffusion.self_condition": [False, True],
    "diffusion.clip": [True, False],
    "sample.guidance": [1.0, 2.0],
    "sample.sampler": list(SAMPLERS),
    "sample.spacing": [
        "sections(counts=(2, 1))" if name == "sections" else name for name in SPACINGS
    ],
    "edit": [
        "inpaint(jump_length=1, resamplings=2)" if name == "inpaint" else name for name in EDITS
    ],
    "evaluate.likelihood": [
        name if name == "none" else f"{name}(images=2, nfe=4)" for name in LIKELIHOODS
    ],
    "train.optimizer": list(OPTIMIZERS),
    "train.learning_rate_decay": [DECAY.get(name, name) for name in DECAYS],
}
INPAINT = AXES["edit"][0]
CONTRADICTIONS = (
    {  # pairs that contradict each other whatever the rest is, and words of their error
        (
            ("data.augment", 0.5),
            ("model.name", "unet_edm2"),
        ): "cannot be conditioned on augmentation",
        (("data.class_labels", False), ("sample.guidance", 2.0)): "knows no classes",
        (("diffusion.beta_schedule", "flow"), ("diffusion.predict", "eps")): "ends in pure noise",
        (("diffusion.beta_schedule", "flow"), ("diffusion.predict", "edm")): "ends in pure noise",
        (("diffusion.zero_terminal_snr", True), ("diffusion.predict", "eps")): "ends in pure noise",
        (("diffusion.zero_terminal_snr", True), ("diffusion.predict", "edm")): "ends in pure noise",
        (
            ("diffusion.variance", "learned"),
            ("diffusion.loss", "mse"),
        ): "does not train a learned variance",
        (("diffusion.variance", "small"), ("diffusion.loss", "hybrid")): "needs a learned variance",
        (("diffusion.variance", "large"), ("diffusion.loss", "hybrid")): "needs a learned variance",
    }
    | {
        (("diffusion.loss", "vlb"), ("diffusion.weighting", name)): "has its own weights"
        for name in WEIGHTINGS
        if name != "simple"
    }
    | {
        (("edit", INPAINT), ("sample.sampler", name)): "its steps depend on earlier ones"
        for name in ("heun", "dpm2", "dpmpp", "dpmpp_3m", "dpmpp_sde", "dpmpp_3m_sde", "unipc")
    }
    | {
        (("edit", edit), ("sample.sampler", name)): "adds noise, so it cannot reproduce"
        for edit in ("invert", "interpolate")
        for name in ("ddpm", "euler_ancestral", "dpmpp_sde", "dpmpp_3m_sde")
    }
)


def config_of(row):
    given = {key.replace(".", "__"): value for key, value in row.items() if key != "edit"}
    return tiny(
        train__length="2 steps",
        train__warmup="1 steps",
        data__validation_fraction=0.02,
        evaluate__steps=3,
        every__evaluate="2 steps",
        evaluate__extractor="none",
        **given,
    )


def refusal(row):
    """The error of a row that is refused; an empty string where it is accepted."""
    try:
        given = config_of(row)
        build.check(given)
        if "edit" in row:
            cost.count_nfe(given, build.edit_recipe(given), get_edit(row["edit"]))
    except ValueError as error:
        return str(error)
    return ""


def edited(row, run_folder, folder):
    """The results of a row's edit, drawn by the run that it has trained: one or two images, and
    the grid.
    """
    picture = folder / "picture.png"
    mask = folder / "mask.png"
    for seed, path in enumerate((picture, mask)):
        Image.fromarray(
            np.random.default_rng(seed).integers(0, 256, (16, 16), dtype=np.uint8)
        ).save(path)
    made = get_edit(row["edit"])
    return edit_images(
        run_folder,
        row["edit"],
        [picture] * made.images,
        folder / "edits",
        mask if made.mask else None,
        None if made.single else 2,
        "cpu",
        **{"sample.classes": ("3",)} if row["data.class_labels"] else {},
    )


def pairs_of(row):
    return set(map(frozenset, itertools.combinations(row.items(), 2)))


def covering():
    """Rows that together hold every pair that is no contradiction: each is built around a pair
    that is wanted still.
    """
    choose = random.Random(0)
    never = set(map(frozenset, CONTRADICTIONS))
    left = {
        frozenset(pair)
        for a, b in itertools.combinations(AXES, 2)
        for pair in itertools.product(((a, x) for x in AXES[a]), ((b, y) for y in AXES[b]))
    } - never
    while left:
        row = dict(min(left, key=lambda pair: sorted(map(repr, pair))))
        for axis in choose.sample(sorted(AXES.keys() - row.keys()), len(AXES) - len(row)):
            fits = [
                value
                for value in AXES[axis]
                if not never & {frozenset([(axis, value), other]) for other in row.items()}
            ]
            row[axis] = max(
                fits,
                key=lambda value, axis=axis, row=row: (
                    len(left & {frozenset([(axis, value), other]) for other in row.items()}),
                    choose.random(),
                ),
            )
        left -= pairs_of(row)
        yield {axis: row[axis] for axis in AXES}


ROWS = list(covering())


@pytest.mark.parametrize("part", range(8))
def test_every_pair_that_can_be_trains_draws_edits_and_is_measured(part, tmp_path):
    for number, row in enumerate(ROWS[part::8]):
        folder = tmp_path / str(number)
        try:
            run(config_of(row), folder)
            pictures = edited(row, folder, tmp_path)
        except Exception as error:
            error.add_note(f"in {row}")
            raise
        last = rows(folder)[-1]
        bits = [
            last[key]
            for key in last
            if key.startswith("eval/bits") and not key.endswith("protocol")
        ]
        assert (
            len(bits)
            == {"none": 0, "bound": 4, "flow": 1, "both": 5}[
                registry.parse(row["evaluate.likelihood"])[0]
            ]
        ), row
        assert torch.tensor([last["train/loss"], *bits]).isfinite().all(), row
        assert len(pictures) == (2 if get_edit(row["edit"]).single else 3), row
        assert (folder / "samples" / "step_00000002.png").stat().st_size > 0, row


@pytest.mark.parametrize("pair, said", CONTRADICTIONS.items(), ids=lambda value: str(value)[:80])
def test_contradictions_are_refused_in_one_line(pair, said):
    told = refusal({"diffusion.predict": "v"} | dict(pair))
    assert (
        said in told
        and "\n" not in told
        and any(word in told for word in ("predict ", "set ", "use "))
    )
