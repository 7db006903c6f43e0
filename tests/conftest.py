"""What every test stands on: no trace outside its own folder, one thread, and a run small enough to train in a second."""

import json
import os
import signal

os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}  # of children too: tests run side by side

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ddpm import assemble, build, config, dist
from ddpm.train import train

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts jobs in the background; children would not hear it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as by nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # sums depend on it bit for bit


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    """No login, no cache and no settings of the person who runs the tests."""
    home = tmp_path_factory.mktemp("home")
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TORCH_HOME", "DDPM_CACHE", "WANDB_DIR", "WANDB_CACHE_DIR",
                 "WANDB_CONFIG_DIR", "WANDB_DATA_DIR", "WANDB_ARTIFACT_DIR"):
        monkeypatch.setenv(name, str(home))
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_PROJECT", "WANDB_SERVICE", "RANK",
                 "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


TINY = {
    "model.model_channels": 8, "model.channel_mult": (1, 2), "model.num_res_blocks": 1, "diffusion.timesteps": 20,
    "train.length": "12 steps", "train.batch_size": 8, "train.warmup": "4 steps", "train.learning_rate": 1e-3, "ema.decay": 0.9,
    "sample.steps": 3, "sample.num_images": 4, "sample.batch_size": 4,
    "evaluate.num_samples": 16, "evaluate.sampler": "ddim", "evaluate.steps": 2, "evaluate.batch_size": 8,
    "every.log": "4 steps", "every.sample": "6 steps", "every.validate": "6 steps", "every.save": "5 steps",
    "every.evaluate": "0 steps",
    "wandb.mode": "disabled",
}


def tiny(**knobs):
    """A config that trains in a second; knobs are given with two underscores for the dot: `train__length="3 steps"`."""
    given = {key.replace("__", "."): value for key, value in knobs.items()}
    return config.changed(config.freeze(config.base()), TINY | given)


def run(given, folder):
    """Train a config in a folder, or go on with it, as the door does; returns True if it came to its end."""
    build.check(given)
    config.check_continues(given, folder)
    made = assemble.run(given, folder, dist.start(given.train.amp, given.train.deterministic))
    assemble.track(given, made)
    finished = train(made)
    made.tracker.close()
    return finished


def rows(folder):
    """The rows of metrics.jsonl, without what depends on the machine's speed."""
    measured = ("speed/", "memory/", "progress/epoch_seconds")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(measured)} for row in lines]


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random Inception weights in a file, as anyone would save them."""

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state_dict):
            """Keep the first weights: the constructor insists on a file, and there is none yet."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = Untrained("untrained", ["2048"], folder / "empty.pth").state_dict()
    torch.save(state, folder / "mine.pth")
    return folder / "mine.pth"
