"""Trains and draws on several ranks over gloo, forked from one process that has torch already.

tests/runtime/test_ranks.py looks at what they leave.

`PYTHONPATH=.:tests python tests/support/groups.py FOLDER` leaves there the run folders below, and
seen.json: what each rank of each group answered, and what it said.
"""

import contextlib
import hashlib
import json
import os
import runpy
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.modules.module import register_module_forward_pre_hook

from ddpm import evaluate
from ddpm.config import defaults
from ddpm.experiment import build, drawing, load, trainer
from ddpm.generate import edit_images, generate_images
from ddpm.models.unet import UNet
from ddpm.runtime import compile, device
from ddpm.runtime import ranks as runtime_ranks
from ddpm.sample import sample_from_checkpoint
from ddpm.sampling import draw, formats
from ddpm.training import fsdp
from ddpm.training.network import TrainNetwork
from ddpm.training.trainer import train
from support.runs import tiny

ROOT = Path(__file__).parents[2]
WAIT = 300  # seconds after which a group is held to hang
RUN = tiny(
    train__length="6 steps",
    every__log="4 steps",
    every__save="3 steps",
    every__validate="6 steps",
    every__sample="6 steps",
    data__class_labels=True,
    data__validation_fraction=0.02,
    diffusion__self_condition=True,
    diffusion__weighting="uncertainty",
    model__channel_mult=(1,),
    model__attention_resolutions=(),
    model__conventions="ho(norm_num_groups=4)",
    ema__sigma_rels=(0.1,),
    every__snapshot="6 steps",
)


def forked(world, work, folder, **environment):
    """What `work(rank)` returned on each rank of a group, or the type and words of what it
    raised, and what it said.
    """
    folder.mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            address = {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": world,
            }
            os.environ |= {key: str(value) for key, value in (address | environment).items()}
            with (
                open(folder / f"{rank}.txt", "w") as said,
                contextlib.redirect_stdout(said),
                contextlib.redirect_stderr(said),
            ):
                try:
                    answer = work(rank)
                except SystemExit as left:
                    answer = left.code
                except BaseException as error:
                    traceback.print_exc()
                    answer = [type(error).__name__, str(error)]
            (folder / f"{rank}.json").write_text(json.dumps(answer))
            os._exit(0)
        ranks.append(child)
    begun = time.monotonic()
    while left := [rank for rank in ranks if os.waitpid(rank, os.WNOHANG) == (0, 0)]:
        ranks = left
        if time.monotonic() - begun > WAIT:
            for rank in left:
                os.kill(rank, signal.SIGKILL)
            sys.exit(
                f"{folder.name} hangs: "
                + "\n".join(path.read_text() for path in sorted(folder.glob("*.txt")))
            )
        time.sleep(0.02)
    return [
        {
            "answer": json.loads((folder / f"{rank}.json").read_text()),
            "said": (folder / f"{rank}.txt").read_text(),
        }
        for rank in range(world)
    ]


def digest(tensors):
    """A fingerprint of named tensors."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return hashed.hexdigest()


def trained(folder, **options):
    """Train RUN with other options in a folder, or go on with it; the fingerprints of the weights
    and of their average.
    """
    given = tiny(
        **{key.replace(".", "__"): value for key, value in defaults.flatten(RUN).items()} | options
    )
    made = trainer.build_trainer(given, folder, device.start(given.train.amp))
    assert train(made)
    made.tracker.close()
    network = made.step.diffusion.net
    with network.summon_full_params():
        weights = digest(network.net.state_dict())
    with made.averaged():
        average = digest(network.net.state_dict())
    rows = sum(map(torch.numel, network.weights.state_dict().values()))
    runtime_ranks.stop()
    return {"weights": weights, "average": average, "numbers here": rows}


def buckets(compressed):
    """Whether gradients are views of the buckets that ranks exchange, buffers are exchanged, and
    gradients are numbers of bfloat16.
    """
    network = TrainNetwork(build.network(RUN), device.start(), compressed)
    network.train()
    out = network(torch.randn(2, 2, 16, 16), torch.ones(2))
    (out - 1).square().mean().backward()
    grads = [param.grad for param in network.params if param.grad is not None]
    rounded = all(torch.equal(grad, grad.bfloat16().float()) for grad in grads)
    answer = [all(grad._is_view() for grad in grads), network.wrapped.broadcast_buffers, rounded]
    runtime_ranks.stop()
    return answer


def compiled(folder, compiler, **options):
    """Train through torch.compile with another backend, whose code takes seconds."""
    compile.COMPILER = compiler
    return trained(folder, train__compile=True, **options)


def failing(graph, inputs):
    raise RuntimeError("no C++ compiler here")


def gathered_in_float32(folder, **options):
    """Train with shards that are gathered in the type in which they are kept."""
    fsdp.mixed_precision = lambda *how: MixedPrecisionPolicy()
    return trained(folder, **options)


def crowded(rank, folder, most):
    """Train where rank 1 alone runs out of memory with more than `most` images, once the ranks
    have met.
    """

    def check(module, inputs):
        images = inputs[0]
        if (
            rank == 1
            and isinstance(module, UNet)
            and module.training
            and not images.is_meta
            and len(images) > most
        ):
            raise torch.OutOfMemoryError("CUDA out of memory")

    register_module_forward_pre_hook(check)
    return trained(folder)


def drawn(folder):
    """What is drawn and measured by a checkpoint, and which of the images are this rank's."""
    made = load.load(folder, **{"sample.batch_size": 2, "evaluate.batch_size": 2})
    batches = list(
        drawing.drawer(made.config, made.net, made.machine)(
            range(8), build.grid_recipe(made.config)
        )
    )
    images = made.machine.gather(draw.concatenate(batches))
    numbers, _, _ = evaluate.measure(made, folder)
    runtime_ranks.stop()
    return {
        "images": digest({"": images}),
        "mine": [seed for seeds, _ in batches for seed in seeds],
        "numbers": numbers,
    }


def files(checkpoint, folder):
    """Draw into files of every format that is one file, a folder of pictures and an edit; what
    the functions returned.
    """
    how = dict(batch_size=2, device="cpu")
    folder.mkdir(exist_ok=True)
    found = [sample_from_checkpoint(checkpoint, folder / "sample.png", 5, **how)]
    for kind in ("grid", "npz", "zip", "gif", "png"):
        found.append(generate_images(checkpoint, 5, folder / kind, format=kind, **how))
    picture = folder / "png" / "000000.png"
    found.append(
        edit_images(
            checkpoint, "sdedit", picture, folder / "edited", num_images=3, classes="3", **how
        )
    )
    runtime_ranks.stop()
    return [[str(Path(path).relative_to(folder)) for path in paths] for paths in found]


def run_ddpm(*options):
    """Train as the command does; ends with its exit code."""
    flags = [
        f"--config={ROOT}/configs/digits.py",
        "--workdir=run",
        "--config.wandb.mode=disabled",
        *options,
    ]
    sys.argv[:] = [
        "ddpm.main",
        *(
            f"--config.{option}" if "=" in option and not option.startswith("--") else option
            for option in flags
        ),
    ]
    runpy.run_module("ddpm.main", run_name="__main__", alter_sys=True)


def photos():
    """A folder of pictures here."""
    Path("photos").mkdir()
    for k in range(9):
        formats.FORMATS["png"](
            Path("photos"), [([k], torch.full((1, 3, 16, 16), 20 * k, dtype=torch.uint8))]
        )


def with_data_on_rank_0_alone(rank, folder):
    Path(folder, str(rank)).mkdir(parents=True)
    os.chdir(folder / str(rank))
    if rank == 0:
        photos()
    run_ddpm("data.source=folder(path='photos')", "data.channels=3")


def until_data_go(rank, folder):
    """Train on pictures that rank 1 loses on the way; the exit code."""
    from ddpm.main import train_and_close

    Path(folder, str(rank)).mkdir(parents=True)
    os.chdir(folder / str(rank))
    photos()
    given = tiny(
        data__source="folder(path='photos')",
        data__channels=3,
        data__cache="none",
        data__validation_fraction=0.0,
    )
    made = trainer.build_trainer(given, folder / "run", device.start())
    if rank == 1:
        shutil.rmtree("photos")
    return train_and_close(made)


def restarted(folder):
    """What torchrun starts: a training whose rank 1 is killed with SIGKILL after step 4, the
    first time.
    """
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        threading.Thread(
            target=killed_after, args=(folder / "metrics.jsonl", 4), daemon=True
        ).start()
    return trained(folder)


def killed_after(rows, step):
    while not rows.is_file() or f'"step": {step},' not in rows.read_text():
        time.sleep(0.005)
    os.kill(os.getpid(), signal.SIGKILL)


def torchrun(folder):
    """What torchrun does with two ranks and a restart; what they returned in the end."""
    how = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="killed",
        max_restarts=1,
        monitor_interval=0.05,
        start_method="fork",
    )
    return elastic_launch(how, restarted)(folder)


def main_of(folder):
    groups = {}

    def group(name, world, work, **environment):
        groups[name] = forked(world, work, folder / "said" / name, **environment)

    def resumed(name, world, start, **options):
        """Go on from the checkpoint in the middle of a run."""
        shutil.copytree(folder / start, folder / name)
        (folder / name / "checkpoints" / "step_00000006.pt").unlink()
        group(name, world, lambda rank: trained(folder / name, **options))

    # here: what is imported on the way, all others have
    groups["one"] = [{"answer": trained(folder / "one"), "said": ""}]
    group("two", 2, lambda rank: trained(folder / "two"))
    group("four", 4, lambda rank: trained(folder / "four", wandb__mode="offline"))
    group(
        "elsewhere",
        2,
        lambda rank: trained(
            folder / "elsewhere",
            train__resume_from=str(folder / "two" / "checkpoints" / "step_00000003.pt"),
        ),
    )

    group(
        "halves", 2, lambda rank: trained(folder / "halves", train__gradient_accumulation_steps=2)
    )
    group("buckets", 2, lambda rank: buckets(False))
    group("compressed", 2, lambda rank: buckets(True))
    group("crowded", 2, lambda rank: crowded(rank, folder / "crowded", 2))
    group("no room", 2, lambda rank: crowded(rank, folder / "no room", 0))
    group("sharded", 2, lambda rank: trained(folder / "sharded", train__fully_shard=True))
    group("compiled", 2, lambda rank: compiled(folder / "compiled", "aot_eager"))
    shards = {"train__fully_shard": True}
    half = shards | {"train__amp": "bf16"}
    group(
        "shards that fail to compile", 2, lambda rank: compiled(folder / "bad", failing, **shards)
    )
    group("half", 2, lambda rank: trained(folder / "half", **half))
    group("half by autocast", 2, lambda rank: gathered_in_float32(folder / "autocast", **half))
    group("compiled half", 2, lambda rank: compiled(folder / "compiled half", "aot_eager", **half))
    small = shards | {"train__gradient_compression": "bf16"}
    group("compressed shards", 2, lambda rank: trained(folder / "compressed", **small))
    resumed("two, then one", 1, "two")
    resumed("two, then four", 4, "two")
    resumed("two, then four sharded", 4, "two", train__fully_shard=True)
    resumed("sharded, then one", 1, "sharded")
    for world in (1, 2, 4):
        group(f"drawn-{world}", world, lambda rank: drawn(folder / "one"))
    for world in (1, 2):
        group(
            f"files-{world}",
            world,
            lambda rank, world=world: files(folder / "one", folder / f"files-{world}"),
        )
    cut = folder / "cut"
    cut.mkdir()
    os.chdir(cut)
    group("no such cut", 4, lambda rank: run_ddpm("train.batch_size=6"))
    group("no such option", 4, lambda rank: run_ddpm("train.batchsize=8"))
    group("no data", 2, lambda rank: with_data_on_rank_0_alone(rank, folder / "no data"))
    group("data go", 2, lambda rank: until_data_go(rank, folder / "data go"))
    group("killed", 1, lambda rank: torchrun(folder / "killed"))
    (folder / "seen.json").write_text(json.dumps(groups))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main_of(Path(sys.argv[1]))
