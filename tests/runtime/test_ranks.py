"""Several ranks are one training: on two and four of them over gloo, shared out, stopped and gone
on with on others, killed.

tests/support/groups.py does it all once, in ranks forked from one process; here is what they saw.
"""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm.training import checkpoint, weights
from support.commands import PYTHONPATH, python
from support.runs import equal, final_state, rows, tiny

TRAINED = (
    "two",
    "four",
    "sharded",
    "compiled",
    "two, then one",
    "two, then four",
    "two, then four sharded",
    "sharded, then one",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    command = [python(), Path(__file__).parents[1] / "support" / "groups.py", folder]
    environment = os.environ | {"PYTHONPATH": PYTHONPATH}
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def seen(folder):
    """What each rank of each group returned."""
    return {
        name: [rank["answer"] for rank in ranks]
        for name, ranks in json.loads((folder / "seen.json").read_text()).items()
    }


@pytest.fixture(scope="module")
def said(folder):
    """What each rank of each group printed."""
    return {
        name: [rank["said"] for rank in ranks]
        for name, ranks in json.loads((folder / "seen.json").read_text()).items()
    }


def close(a, b):
    """Equality of nested states up to float32 rounding of sums in another order, through six
    steps of Adam.
    """
    if isinstance(a, torch.Tensor):
        return (
            a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-3, atol=2e-5)
        )
    if isinstance(a, dict):
        return list(a) == list(b) and all(close(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(close, a, b))
    return a == (pytest.approx(b, rel=1e-5) if isinstance(b, float) else b)


@pytest.mark.parametrize("name", TRAINED)
def test_all_ranks_have_the_same_weights_and_average(name, seen):
    for rank in seen[name]:
        assert (rank["weights"], rank["average"]) == (
            seen[name][0]["weights"],
            seen[name][0]["average"],
        )
    assert seen[name][0]["weights"] != seen[name][0]["average"]


@pytest.mark.parametrize("name", TRAINED)
def test_as_one_process_with_the_joined_batch(name, folder):
    """The rows, whose windows the stop at step 3 cuts in two, every part of the checkpoint and
    the files to draw from.
    """
    ours = rows(folder / "one")
    theirs = rows(folder / name)
    assert [row.keys() for row in ours] == [row.keys() for row in theirs] and [
        row["step"] for row in ours
    ] == [4, 6]
    assert all(
        row[key] == pytest.approx(other[key], rel=1e-5)
        for row, other in zip(ours, theirs, strict=True)
        for key in row
    )
    assert close(final_state(folder / "one"), final_state(folder / name))
    for file in ("final.safetensors", "best.safetensors"):
        assert close(*(weights.load_weights(folder / run / file)[1::2] for run in ("one", name)))
    snapshots = [checkpoint.snapshots(folder / run) for run in ("one", name)]
    assert [[step for step, _ in found] for found in snapshots] == [[6], [6]]
    half = [weights.load_snapshot(found[0][1], "ema 0.1") for found in snapshots]
    assert all(
        torch.allclose(half[0][key].float(), half[1][key].float(), rtol=2e-3, atol=1e-4)
        for key in half[0]
    )


def test_a_new_folder_continues_the_run_of_as_many_ranks_to_the_bit(folder, seen):
    assert seen["elsewhere"] == seen["two"] and rows(folder / "elsewhere") == rows(folder / "two")
    assert equal(final_state(folder / "elsewhere"), final_state(folder / "two"))


def test_gradients_are_exchanged_in_place_and_buffers_not_at_all(seen):
    assert seen["buckets"] == [[True, False, False]] * 2


def test_gradients_are_exchanged_in_bfloat16_where_the_config_says_so(folder, seen):
    """Rounded to 8 bits, and so are the sums of shards, in which all ranks agree."""
    assert seen["compressed"] == [[True, False, True]] * 2
    (first, second) = seen["compressed shards"]
    assert first["weights"] == second["weights"] != seen["sharded"][0]["weights"]
    for row, other in zip(rows(folder / "compressed"), rows(folder / "sharded"), strict=True):
        assert row["train/loss"] == pytest.approx(other["train/loss"], rel=1e-3)


def test_where_one_rank_has_no_room_all_cut_alike(folder, seen, said):
    """Before the first step; to the bits of a training that begins with such micro-batches."""
    assert (
        seen["crowded"] == seen["halves"]
        and seen["crowded"][0]["weights"] != seen["two"][0]["weights"]
    )
    log = (folder / "crowded" / "training.log").read_text()
    assert (
        log.count(
            "out of memory with 4 images at a time; continuing with 2 at a time, with the same "
            "results"
        )
        == 1
    )
    for row, other in zip(rows(folder / "crowded"), rows(folder / "halves"), strict=True):
        same = {
            key: pytest.approx(value, rel=1e-6) if key.startswith("val/") else value
            for key, value in other.items()
        }
        assert row == same  # validated four at a time and not two, which rounds otherwise
    assert seen["no room"] == [["BatchDoesNotFit", "out of memory with one image at a time"]] * 2


@pytest.mark.parametrize("name", ["sharded", "two, then four sharded"])
def test_shared_out_each_rank_has_its_part(name, seen):
    whole = seen["one"][0]["numbers here"]
    ranks = [rank["numbers here"] for rank in seen[name]]
    # rows do not always divide
    assert sum(ranks) == whole and max(ranks) < 1.05 * whole / len(ranks) + 100


@pytest.mark.parametrize(
    "name, plain",
    [
        ("shards that fail to compile", "sharded"),
        ("half by autocast", "half"),  # which gathers twice the bytes
        ("compiled half", "half"),
    ],
)
def test_shards_learn_the_same_to_the_bit(name, plain, seen):
    """Compiled by stage, traced as for any compiler; and gathered in the type of autocast."""
    assert seen[name] == seen[plain]


def test_ranks_compile_by_stage_or_say_why_not(folder):
    names = ("compiled", "compiled half", "bad")
    logs = {name: (folder / name / "training.log").read_text() for name in names}
    assert "the network was compiled in " in logs["compiled"]
    for name in names[1:]:
        assert "each stage of the network is compiled at the first step" in logs[name]
    why = "the network is not compiled, as torch.compile failed: "
    assert [log.count(why) for log in logs.values()] == [0, 0, 1]


def test_ranks_draw_and_measure_what_one_does(seen):
    """To the bit, as batches have one shape."""
    (one,) = seen["drawn-1"]
    for name in ("drawn-2", "drawn-4"):
        for rank in seen[name]:
            assert rank["images"] == one["images"] and rank["numbers"] == one["numbers"]
        assert (
            [seed for rank in seen[name] for seed in rank["mine"]] == one["mine"] == list(range(8))
        )


def test_files_have_the_images_of_all_ranks(folder, seen):
    """Grids, archives, animations and edits as of one process, and all paths on each rank."""
    (one,) = seen["files-1"]
    assert seen["files-2"] == [one, one]
    assert [len(paths) for paths in one] == [1, 1, 1, 1, 1, 5, 4]
    for path in sum(one, []):
        ours, theirs = ((folder / name / path).read_bytes() for name in ("files-1", "files-2"))
        assert ours == theirs, path
    with np.load(folder / "files-2" / "npz" / "images.npz") as archive:
        assert archive["arr_0"].shape == (5, 16, 16, 1)


def test_only_rank_0_writes_and_tracks(folder, said):
    assert len(list((folder / "four" / "wandb").glob("offline-run-*"))) == 1
    assert "step 6/6" in said["four"][0] and said["four"][1:] == ["", "", ""]
    assert (folder / "four" / "training.log").read_text().count("(from the start") == 1


def test_a_mistake_is_one_line_on_one_rank(folder, seen, said):
    for name, words in (
        ("no such cut", "batch_size 6 cannot be cut into 4 ranks"),
        ("no such option", "no option config.train"),
    ):
        assert seen[name] == [2, 2, 2, 2]
        assert (
            said[name][0].count("\n") == 1
            and words in said[name][0]
            and said[name][1:] == ["", "", ""]
        )
    assert not (folder / "cut" / "run").exists()


def test_what_one_rank_alone_cannot_do_ends_all_with_its_words(folder, seen, said):
    assert seen["no data"] == [2, 2]
    (line,) = (line for line in said["no data"][0].splitlines() if not line.endswith(" ..."))
    assert line.startswith("error: rank 1: image folder '/") and said["no data"][1] == ""
    assert "/photos' does not exist; put images there, or give the path of a folder" in line
    assert seen["data go"] == [1, 1]
    log = (folder / "data go" / "run" / "training.log").read_text()
    line = said["data go"][1].splitlines()[0]
    assert (
        line in log
        and line.startswith("failed: rank 1: photos/")
        and "goes on from the last checkpoint" in line
    )
    assert "Traceback" not in said["data go"][0]


def test_torchrun_starts_again_after_sigkill_and_nothing_differs(folder, seen):
    assert seen["killed"][0] == {"0": seen["two"][0], "1": seen["two"][1]}
    assert "resumed from step 3" in (folder / "killed" / "training.log").read_text()
    assert rows(folder / "killed") == rows(folder / "two")
    assert equal(final_state(folder / "killed"), final_state(folder / "two"))


@pytest.mark.parametrize(
    "option, value",
    [("train.channels_last", True), ("model.name", "unet_edm2")],
)
def test_what_cannot_be_shared_out_is_refused(option, value):
    with pytest.raises(ValueError, match=f"config.train.fully_shard .* config.{option} ") as caught:
        tiny(**{"train__fully_shard": True, option.replace(".", "__"): value})
    assert "\n" not in str(caught.value) and "choose" in str(caught.value)


FAKES = {  # of Slurm, on one node of two tasks; and of the training, which saves when it is told to
    "scontrol": 'echo "$@" >> asked; [ "$1" = show ] && echo node7; true',
    "srun": 'shift; for k in 0 1; do SLURM_PROCID=$k SLURM_LOCALID=$k "$@" & pids="$pids $!"; '
    "done; "
    "trap 'kill -USR1 $pids' USR1; code=0; for pid in $pids; do wait $pid; c=$?; "
    "while kill -0 $pid 2>/dev/null; do wait $pid; c=$?; done; [ $c -gt $code ] && code=$c; done; "
    "exit $code",
    "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT $*" >> started; '
    'trap "echo saved >> saved; exit 75" USR1; for k in $(seq 100); do sleep 0.1; done; exit 0',
}


def test_the_slurm_script_saves_when_told_and_queues_itself_again(tmp_path):
    document = Path(__file__).parents[2] / "docs" / "many_gpus.md"
    (script,) = re.findall(
        r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", document.read_text(), re.DOTALL
    )
    for name, lines in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_NTASKS": "2",
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "node[7-8]",
    }
    job = subprocess.Popen(["bash", "-c", script], cwd=tmp_path, env=environment)
    begun = time.monotonic()
    while not (tmp_path / "started").exists() or (tmp_path / "started").read_text().count("\n") < 2:
        assert time.monotonic() - begun < 60
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)  # to the shell alone, as --signal=B: does
    assert job.wait(timeout=60) == 75
    assert sorted((tmp_path / "started").read_text().splitlines()) == [
        f"{k} {k} 2 node7:29500 -m ddpm.main --config=configs/cats128.py "
        "--config.train.batch_size=256"
        for k in (0, 1)
    ]
    assert (tmp_path / "saved").read_text() == "saved\nsaved\n"
    assert (tmp_path / "asked").read_text().splitlines() == [
        "show hostnames node[7-8]",
        "requeue 42",
    ]
