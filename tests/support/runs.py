"""A training small enough for a second, its rows and its state, and run folders with known rows."""

import json
from pathlib import Path

import torch

from ddpm.config import defaults, files
from ddpm.experiment import build, trainer
from ddpm.runtime import device
from ddpm.studies import runs as studies_runs
from ddpm.training import checkpoint
from ddpm.training import weights as training_weights
from ddpm.training.trainer import train

TINY = {
    "model.model_channels": 8,
    "model.channel_mult": (1, 2),
    "model.num_res_blocks": 1,
    "diffusion.timesteps": 20,
    "train.length": "12 steps",
    "train.batch_size": 8,
    "train.warmup": "4 steps",
    "train.learning_rate": 1e-3,
    "train.compile": False,  # auto would measure on a GPU
    "train.channels_last": False,
    "ema.decay": 0.9,
    "sample.steps": 3,
    "sample.num_images": 4,
    "sample.batch_size": 4,
    "evaluate.num_samples": 16,
    "evaluate.sampler": "ddim",
    "evaluate.steps": 2,
    "evaluate.batch_size": 8,
    "every.log": "4 steps",
    "every.sample": "6 steps",
    "every.validate": "6 steps",
    "every.save": "5 steps",
    "every.evaluate": "0 steps",
    "wandb.mode": "disabled",
}


def tiny(**options):
    """A config that trains in a second; options are given with two underscores for the dot:
    `train__length="3 steps"`.
    """
    given = {key.replace("__", "."): value for key, value in options.items()}
    return files.changed(defaults.freeze(defaults.base()), TINY | given)


def run(given, folder):
    """Train a config in a folder, or go on with it, as the command does; returns True if it came to
    its end.
    """
    build.check(given)
    files.check_continues(given, folder)
    made = trainer.build_trainer(
        given, folder, device.start(given.train.amp, given.train.deterministic)
    )
    finished = train(made)
    made.tracker.close()
    return finished


def rows(folder):
    """The rows of metrics.jsonl, without what depends on the machine's speed."""
    measured = ("speed/", "memory/", "progress/epoch_seconds")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in row.items() if not key.startswith(measured)} for row in lines
    ]


def equal(a, b):
    """Bitwise equality of nested states."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def final_state(folder):
    step, path = checkpoint.checkpoints(folder)[-1]
    parts = checkpoint.load(path)["parts"]
    return step, {
        name: parts[name] for name in ("net", "ema", "optimizer", "scaler", "meters", "best")
    }


def assert_same_run(a, b, grid):
    assert equal(final_state(a), final_state(b))
    assert (a / "samples" / grid).read_bytes() == (b / "samples" / grid).read_bytes()
    assert training_weights.load_weights(a)[1] == training_weights.load_weights(b)[1]
    assert equal(training_weights.load_weights(a)[3], training_weights.load_weights(b)[3])


# the last row of a training of 12 steps
DONE = {"step": 12, "train/loss": 1.0, "progress/images": 96, "progress/epoch": 1.0}


def written(folder, name, options, rows):
    """A run folder with these rows of metrics."""
    folder = Path(folder, name)
    folder.mkdir(parents=True)
    files.write(tiny(**options), folder)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return studies_runs.read_run(folder)
