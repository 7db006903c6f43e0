"""Settings of every test: no trace outside its own folder, one thread; which files are quick, and
which start first.
"""

import os
import signal
from pathlib import Path

# of children too: tests run side by side
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

# as a shell starts jobs in the background; children would not hear it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as by nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
torch.set_num_threads(1)  # sums depend on it bit for bit


# files of the quick tier, `python -m pytest -m quick`: what a change breaks first, in about a
# minute
QUICK = {
    "commands/test_program.py",
    "common/test_durations.py",
    "common/test_files.py",
    "common/test_pixels.py",
    "common/test_registry.py",
    "common/test_rng.py",
    "config/test_config.py",
    "data/test_augment.py",
    "data/test_colour.py",
    "data/test_decode.py",
    "diffusion/test_ddpm.py",
    "diffusion/test_editing.py",
    "diffusion/test_guidance.py",
    "diffusion/test_losses.py",
    "diffusion/test_process.py",
    "diffusion/test_samplers.py",
    "diffusion/test_schedules.py",
    "models/test_conditioning.py",
    "models/test_dit.py",
    "runtime/test_gpus.py",
    "studies/test_study.py",
    "test_documents.py",
    "test_structure.py",
    "training/test_ema.py",
    "training/test_golden.py",
    "training/test_optim.py",
}


# files that take longest, the longest first: pytest-xdist hands out files in this order, so that
# none of them is left to one process at the end
LONGEST = [
    "studies/test_agent.py",
    "commands/test_commands.py",
    "test_reliability.py",
    "studies/test_compare.py",
    "training/test_trainer.py",
    "config/test_pairs.py",
    "tracking/test_tracker.py",
    "commands/test_setups.py",
    "tracking/test_wandb.py",
    "runtime/test_signals.py",
    "runtime/test_compile.py",
    "commands/test_plan.py",
    "runtime/test_memory.py",
    "runtime/test_fake_gpu.py",
    "runtime/test_ranks.py",
    "config/test_configs.py",
    "training/test_stability.py",
    "interop/test_convert.py",
    "test_structure.py",
]


def name_of(path):
    """The name of a file of tests, from this folder."""
    return path.relative_to(Path(__file__).parent).as_posix()


def is_quick(path):
    """Whether a file of tests belongs to the quick tier."""
    return name_of(path) in QUICK


def pytest_ignore_collect(collection_path, config):
    """Do not even import the other files for `-m quick`."""
    if config.option.markexpr == "quick" and collection_path.suffix == ".py":
        return not is_quick(collection_path) or None


def pytest_collection_modifyitems(items):
    """Mark the tests of QUICK, and put the files of LONGEST first."""
    ranks = {name: rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(name_of(item.path), len(ranks)))
    for item in items:
        if is_quick(item.path):
            item.add_marker(pytest.mark.quick)


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    """No login, no cache and no settings of the person who runs the tests."""
    home = tmp_path_factory.mktemp("home")
    for name in (
        "HOME",
        "XDG_CACHE_HOME",
        "XDG_CONFIG_HOME",
        "TORCH_HOME",
        "DDPM_CACHE",
        "WANDB_DIR",
        "WANDB_CACHE_DIR",
        "WANDB_CONFIG_DIR",
        "WANDB_DATA_DIR",
        "WANDB_ARTIFACT_DIR",
    ):
        monkeypatch.setenv(name, str(home))
    for name in (
        "WANDB_API_KEY",
        "WANDB_MODE",
        "WANDB_RUN_ID",
        "WANDB_SWEEP_ID",
        "WANDB_PROJECT",
        "WANDB_SERVICE",
        "RANK",
        "WORLD_SIZE",
    ):
        monkeypatch.delenv(name, raising=False)
    yield
    # of the client in this process, which a later module's processes would use
    os.environ.pop("WANDB_SERVICE", None)


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
