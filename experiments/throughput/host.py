"""Host time of a training step, until the call returns: `python experiments/throughput/host.py`.

The step of a shipped config's network with next to no arithmetic: one image of 8 x 8 pixels, 8
channels. What is left is what Python and torch's dispatcher cost, which a GPU's host pays as well,
so that it can be followed without a GPU. With `--before COMMIT` that commit and this tree take
turns, each in processes of its own. Writes host.json; `run.py --report` shows it. Two minutes.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from importlib.util import module_from_spec, spec_from_file_location
from io import BytesIO
from pathlib import Path
from unittest import mock

import torch

from ddpm.config import defaults, files
from ddpm.experiment import trainer
from ddpm.runtime import device
from ddpm.tracking.tracker import Tracker

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
STRUCTURES = "digits", "ddpm_cifar10"
WARM = 10  # steps that are not measured
SMALL = {
    "data.source": "digits",
    "data.image_size": 8,
    "data.channels": 1,
    "model.model_channels": 8,
    "train.batch_size": 1,
    "train.length": "1000000 steps",
    "evaluate.extractor": "none",
    "wandb.mode": "disabled",
    **{f"every.{name}": "0 steps" for name in defaults.base().every},
}


def built(name, folder):
    """The training step of a config, small: attention stays at its levels."""
    spec = spec_from_file_location(name, Path.cwd() / "configs" / f"{name}.py")
    spec.loader.exec_module(module := module_from_spec(spec))
    config = module.get_config()
    scale = config.data.image_size // SMALL["data.image_size"]
    sizes = tuple(size // scale for size in config.model.attention_resolutions)
    config = files.changed(defaults.freeze(config), SMALL | {"model.attention_resolutions": sizes})
    return trainer.build_trainer(config, Path(folder), device.start("off"), tracker=Tracker()).step


def stage_times(step, count):
    """The least CPU milliseconds of so many steps, by stage: each stage's own least."""
    marks = {}
    least = {}

    def timed(stage, work):
        def inside(*arguments, **named):
            start = time.process_time()
            try:
                return work(*arguments, **named)
            finally:
                marks[stage] = 1000 * (time.process_time() - start)

        return inside

    shape = (1, SMALL["data.channels"], *(SMALL["data.image_size"],) * 2)
    batch = torch.zeros(shape, dtype=torch.uint8), torch.full((1,), -1)
    network = mock.patch.object(step.net, "forward", timed("forward", step.net.forward))
    backward = mock.patch.object(torch.Tensor, "backward", timed("backward", torch.Tensor.backward))
    with network, backward:
        for number in range(WARM + count):
            timed("step", step)(number, batch)
            marks["the rest"] = marks["step"] - marks["forward"] - marks["backward"]
            if number >= WARM:
                least = {stage: min(ms, least.get(stage, ms)) for stage, ms in marks.items()}
    return least


def measured(count):
    """Structure -> modules, tensors that are learned, and stage_times, of the tree in the path."""
    torch.set_num_threads(1)
    found = {}
    for name in STRUCTURES:
        with tempfile.TemporaryDirectory() as folder:
            step = built(name, folder)
            found[name] = {
                "modules": len(list(step.net.modules())),
                "tensors": len(step.parameters),
                "ms": stage_times(step, count),
            }
    return found


def measured_in(tree, count):
    """`measured` in a process of its own, of the package in the folder `tree`."""
    command = [sys.executable, str(HERE / "host.py"), "--alone", f"--steps={count}"]
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def git(*arguments):
    return subprocess.run(["git", *arguments], cwd=ROOT, stdout=subprocess.PIPE, check=True).stdout


def compared(before, rounds, count):
    """What goes into host.json: of each tree and structure, the least of all rounds by stage."""
    with tempfile.TemporaryDirectory() as folder:
        trees = {"now": ROOT}
        if before:
            with tarfile.open(fileobj=BytesIO(git("archive", before))) as tree:
                tree.extractall(folder, filter="data")
            trees = {"before": Path(folder)} | trees
        turns = [(name, measured_in(trees[name], count)) for _ in range(rounds) for name in trees]
    rows = {}
    for tree, found in turns:
        for structure, row in found.items():
            known = rows.setdefault((structure, tree), row)["ms"]
            known |= {stage: min(ms, known[stage]) for stage, ms in row["ms"].items()}
    return {
        "rows": [{"structure": key[0], "tree": key[1]} | row for key, row in sorted(rows.items())],
        "commits": {
            "before": git("rev-parse", "--short", before).decode().strip() if before else None,
            "now": git("rev-parse", "--short", "HEAD").decode().strip(),
        },
        "steps": rounds * count,
        "torch": torch.__version__,
        "cores": os.cpu_count(),
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", metavar="COMMIT", help="a commit that takes turns with this")
    parser.add_argument("--rounds", type=int, default=4, help="processes of each tree")
    parser.add_argument("--steps", type=int, default=200, help="measured steps of each process")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for host.json")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.rounds < 1 or given.steps < 1:
        parser.error("--rounds and --steps are at least 1")
    if given.alone:
        print(json.dumps(measured(given.steps)))
        return
    found = compared(given.before, given.rounds, given.steps)
    (given.out / "host.json").write_text(json.dumps(found, indent=1) + "\n")
    for row in found["rows"]:
        stages = ", ".join(f"{stage} {ms:.2f}" for stage, ms in row["ms"].items())
        print(f"{row['structure']} {row['tree']}, ms: {stages}")


if __name__ == "__main__":
    main()
