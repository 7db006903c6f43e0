"""The commands as a person uses them: train, draw, look, measure."""

import json
import os
import shutil
import signal
import subprocess
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm.common.files import lock_folder
from ddpm.evaluate import evaluate, four_digits
from ddpm.generate import generate_images
from ddpm.main import train_experiment
from ddpm.sample import sample_from_checkpoint
from ddpm.sampling import formats
from ddpm.training import checkpoint
from support.commands import ROOT, python, run_ddpm
from support.runs import rows, run, tiny


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run(tiny(), folder)
    return folder


def test_the_main_job_at_a_few_steps_then_again(tmp_path):
    few = [
        "--config.model.model_channels=16",
        "--config.train.length=12 steps",
        "--config.sample.steps=2",
        "--config.evaluate.num_samples=16",
        "--config.evaluate.steps=2",
    ]
    code, out, err = run_ddpm("main", f"--config={ROOT}/configs/digits.py", *few, cwd=tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name == "digits-model_channels=16-sample.steps=2"
    assert (folder / "final.safetensors").exists() and list(
        folder.glob("wandb/offline-run-*/*.wandb")
    )
    assert rows(folder)[-1]["step"] == 12 and "eval/fd_digits" in rows(folder)[-1]
    assert json.loads((folder / "config.json").read_text())["model"]["model_channels"] == 16
    (left := folder / "checkpoints" / "step_00000001.pt").touch()  # as by a kill in its deletion
    (folder / "checkpoints" / "step_00000002.pt").touch()
    code, out, err = run_ddpm("main", f"--config={ROOT}/configs/digits.py", *few, cwd=tmp_path)
    assert code == 0 and "is finished: 12 steps" in out[-1] and not left.exists()


def test_sigterm_saves_leaves_with_75_and_the_same_command_goes_on(tmp_path):
    """W&B's offline log and metrics.jsonl then hold the same rows, without a gap or a double; a
    console may be full.
    """
    command = [
        python(),
        "-m",
        "ddpm.main",
        f"--config={ROOT}/configs/digits.py",
        f"--workdir={tmp_path}/run",
        "--config.model.model_channels=8",
        "--config.train.batch_size=8",
        "--config.train.length=60 steps",
        "--config.every.log=1 steps",
        "--config.every.validate=0 steps",
        "--config.every.sample=0 steps",
        "--config.every.evaluate=0 steps",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)
    for line in process.stdout:
        if line.startswith("step 10/60"):
            process.send_signal(signal.SIGTERM)
            break
    process.communicate()
    assert process.returncode == 75
    stopped = checkpoint.checkpoints(tmp_path / "run")[-1][0]
    # the next start logs the rest
    assert 10 <= stopped < 60 and rows(tmp_path / "run")[-1]["step"] in (stopped - 1, stopped)
    environment |= {"PYTHONUNBUFFERED": ""}  # so that the last write fails as well
    with open("/dev/full", "w") as console:
        assert (
            subprocess.run(command, cwd=tmp_path, env=environment, stdout=console).returncode == 0
        )
    log = (tmp_path / "run" / "training.log").read_text()
    assert log.count("the console takes no more lines") == 1 and "incomplete" not in log
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, 61))
    history = {}
    for log in sorted(
        (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"),
        key=lambda log: log.stat().st_mtime,
    ):
        inspect = [python(), "-m", "wandb", "leet", "inspect", "--json", str(log)]
        for line in subprocess.run(inspect, capture_output=True, check=True).stdout.splitlines():
            record = json.loads(line)
            if record["type"] == "history":
                step = int(record["history"]["step"]["num"])
                assert step not in history
                history[step] = record
    assert sorted(history) == list(range(1, 61))


def test_fid_while_training_and_after(tmp_path, inception_file):
    """Through torch-fidelity's own network, with random weights from a file."""
    given = tiny(
        evaluate__extractor=f"inception(weights='{inception_file}')",
        every__evaluate="2 steps",
        train__length="2 steps",
        data__source=f"folder(path='{photos(tmp_path)}')",
        data__channels=3,
    )
    run(given, tmp_path / "run")
    logged = rows(tmp_path / "run")[-1]
    assert {
        "eval/fid",
        "eval/kid",
        "eval/precision",
        "eval/recall",
        "eval/fid_perfect",
        "eval/fid_perfect_sd",
    } <= set(logged)
    assert (
        logged["eval/protocol"].startswith("inception-") and "16 samples" in logged["eval/protocol"]
    )
    assert evaluate(tmp_path / "run")["eval/fid"] == pytest.approx(logged["eval/fid"], rel=1e-6)


def photos(folder):
    """A folder of twelve pictures."""
    (folder / "photos").mkdir()
    for k in range(12):
        pixels = np.random.default_rng(k).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / f"{k}.png")
    return folder / "photos"


def test_torchrun_on_two_ranks_trains_as_one_process_does(tmp_path):
    flags = [
        f"--config={ROOT}/configs/digits.py",
        "--config.model.model_channels=8",
        "--config.train.batch_size=8",
        "--config.train.length=6 steps",
        "--config.every.log=1 steps",
        "--config.every.evaluate=6 steps",
        "--config.evaluate.num_samples=10",
        "--config.evaluate.steps=2",
        "--config.sample.steps=2",
        "--config.sample.num_images=4",
        "--config.wandb.mode=disabled",
        "--config.evaluate.likelihood=both(images=5, nfe=8)",
    ]
    assert run_ddpm("main", *flags, f"--workdir={tmp_path}/one", cwd=tmp_path)[0] == 0
    launch = [
        python(),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "-m",
        "ddpm.main",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launch, *flags, f"--workdir={tmp_path}/two"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr.decode()
    for one, two in zip(rows(tmp_path / "one"), rows(tmp_path / "two"), strict=True):
        for key in {"train/loss", "train/grad_norm", "val/loss"} & one.keys() | {
            key for key in one if key.startswith("eval/")
        }:
            # gradients are summed in another order: float32 rounding, through six steps of Adam and
            # a drawing
            assert two[key] == (
                one[key] if isinstance(one[key], str) else pytest.approx(one[key], rel=1e-3)
            ), key
    assert {
        f"eval/{name}"
        for name in ("fd_digits", "kd_digits", "copying", "protocol", "bits_per_dim", "share")
    } <= one.keys()


def test_without_inception_weights_the_training_goes_on_and_says_so(tmp_path, monkeypatch):
    # the download fails at once, wherever the tests run
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    assert run(tiny(evaluate__extractor="inception", every__evaluate="12 steps"), tmp_path)
    log = (tmp_path / "training.log").read_text()
    assert (
        "going on without evaluation: no Inception weights" in log
        and "evaluate.extractor=\"inception(weights='PATH')\"" in log
    )
    address = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
    assert f"; download {address} elsewhere and put it there" in log
    with pytest.raises(ValueError, match="no Inception weights"):
        evaluate(tmp_path)
    with pytest.raises(ValueError, match=f"/no/such/file.* from {address}"):
        run(
            tiny(
                evaluate__extractor="inception(weights='/no/such/file')",
                every__evaluate="12 steps",
            ),
            tmp_path / "named",
        )
    assert not (tmp_path / "named").exists()


@pytest.mark.parametrize("format", formats.FORMATS)
def test_generate_in_every_format(format, trained, tmp_path):
    paths = generate_images(trained, 5, tmp_path, "cpu", format=format)
    assert all(path.exists() for path in paths)
    if format == "npz":
        assert np.load(paths[0])["arr_0"].shape == (5, 16, 16, 1)
    elif format == "zip":
        assert len(zipfile.ZipFile(paths[0]).namelist()) == 5
    elif format == "gif":
        assert Image.open(paths[0]).n_frames >= 2
    else:
        assert len(paths) == (1 if format == "grid" else 5)


def test_image_k_is_the_same_however_many_are_drawn(trained, tmp_path):
    few = generate_images(trained, 3, tmp_path / "few", **{"sample.batch_size": 3})
    many = generate_images(trained, 6, tmp_path / "many", **{"sample.batch_size": 3})
    for a, b in zip(few, many, strict=False):
        assert a.name == b.name and a.read_bytes() == b.read_bytes()
    other = generate_images(
        trained, 3, tmp_path / "other", **{"sample.seed": 9, "sample.batch_size": 3}
    )
    assert few[0].read_bytes() != other[0].read_bytes()


def test_every_kind_of_checkpoint_can_be_drawn_from(trained, tmp_path):
    assert checkpoint.find(trained).name == "final.safetensors"
    final = generate_images(trained, 1, tmp_path / "final")[0].read_bytes()
    newest = checkpoint.checkpoints(trained)[-1][1]
    assert generate_images(newest, 1, tmp_path / "pt")[0].read_bytes() == final
    assert generate_images(trained / "best.safetensors", 1, tmp_path / "best")


def test_sample_draws_the_grid_that_generate_draws(trained, tmp_path):
    sample_from_checkpoint(trained, tmp_path / "grid.png", num_samples=5)
    drawn = generate_images(trained, 5, tmp_path, format="grid")[0]
    assert np.array_equal(
        np.asarray(Image.open(tmp_path / "grid.png")), np.asarray(Image.open(drawn))
    )


@pytest.mark.parametrize(
    "words, codes",
    [
        (["ddpm.plan", f"--config={ROOT}/configs/digits.py"], {141}),
        (["ddpm.doctor", "--helpfull"], {0, 141}),
        (["ddpm"], {0, -signal.SIGPIPE}),
    ],
    ids=["plan", "help", "list"],
)
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_ends_a_command_without_a_word(words, codes, unbuffered):
    """As `python -m ddpm.plan ... | head -1` does."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [python(), "-m", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.returncode in codes and not done.stderr, done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_result_that_cannot_be_written_is_one_line_and_no_success(unbuffered):
    """As `python -m ddpm.plan ... > file` does on a full disk."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered}
    command = [python(), "-m", "ddpm.plan", f"--config={ROOT}/configs/digits.py"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert "No space left on device" in line


@pytest.mark.parametrize(
    "value, words",
    [
        (6e-10, "6.000e-10"),
        (0.26171, "0.2617"),
        (1.68834, "1.688"),
        (88.703, "88.70"),
        (0.0, "0.0000"),
        (1797.0, "1797"),
        (0.01234, "0.01234"),
    ],
)
def test_numbers_are_printed_with_four_digits(value, words):
    assert four_digits(value) == words and float(words) == pytest.approx(value, rel=1e-3)


def test_evaluate_repeats_the_number_of_the_training(tmp_path, capsys):
    run(tiny(every__evaluate="12 steps"), tmp_path)
    logged = rows(tmp_path)[-1]
    capsys.readouterr()
    again = evaluate(tmp_path, **{"evaluate.likelihood": "flow(images=2)"})
    said = capsys.readouterr().out
    # recorded by a hash
    assert "against 1797 images of digits; bits/dim of 2 held-out images of digits under" in said
    assert again["eval/protocol"] == logged["eval/protocol"]
    assert again["eval/fd_digits"] == pytest.approx(logged["eval/fd_digits"], rel=1e-6)


def test_mistakes_are_one_line_and_exit_code_2(trained, tmp_path):
    for name, flags, remedy in [
        ("generate", ["--checkpoint=/no/such/run"], "neither a file nor a run folder"),
        ("generate", [f"--checkpoint={trained}", "--format=bmp"], "choose one of "),
        ("generate", [f"--checkpoint={trained}", "--sampler=dim"], "did you mean 'ddim'?"),
        ("generate", [f"--checkpoint={trained}", "--spacing=trail"], "did you mean 'trailing'?"),
        (
            "sample",
            [f"--checkpoint={trained}", "--spacing=sections", "--steps=5"],
            "have 25 steps, not 5; use 25",
        ),
        ("sample", [f"--checkpoint={trained}", "--out=grid.xyz"], "xyz"),
        (
            "sample",
            [f"--checkpoint={trained}", "--ema=0.7"],
            "has no weights averaged with EMA decay 0.7. It has EMA decay 0.9; train",
        ),
        ("evaluate", [f"--checkpoint={trained}", "--steps=1000"], "with only 20 timesteps"),
    ]:
        code, out, err = run_ddpm(name, *flags, cwd=tmp_path)
        assert code == 2 and len(err) == 1 and remedy in err[0], (name, err)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_one_line(trained, tmp_path):
    whole = checkpoint.find(trained).read_bytes()
    torn = checkpoint.checkpoints(trained)[-1][1].read_bytes()[:5000]
    for name, content in {
        "torn.safetensors": whole[:1000],
        "torn.pt": torn,
        "text.pt": b"not a checkpoint",
        "empty.safetensors": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged or not"):
            generate_images(tmp_path / name, 1, tmp_path / "out")
    torch.save(
        {"format": 1, "step": 3, "config": "[1, 2]", "parts": {"ema": {"shadow": {}}}},
        tmp_path / "foreign.pt",
    )
    with pytest.raises(ValueError, match="config"):
        generate_images(tmp_path / "foreign.pt", 1, tmp_path / "out")


def test_final_weights_that_are_gone_or_damaged_are_made_anew(trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    final = folder / "final.safetensors"
    for spoil in (final.unlink, lambda: final.write_bytes(before[final][:-1]), lambda: None):
        spoil()
        assert (
            train_experiment(tiny(), folder) == 0
            and "is finished: 12 steps" in capsys.readouterr().out
        )
        assert before == {
            path: path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"
        }


def test_a_measurement_can_be_a_run_of_its_own(trained, tmp_path):
    code, out, err = run_ddpm(
        "evaluate",
        f"--checkpoint={trained}",
        f"--workdir={tmp_path}/run",
        "--config.evaluate.steps=3",
        "--config.evaluate.num_samples=20",
        "--spacing=trailing",
        cwd=tmp_path,
    )
    assert code == 0, err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "training.log",
        "samples",
    }
    assert json.loads((tmp_path / "run" / "config.json").read_text())["evaluate"]["steps"] == 3
    (row,) = rows(tmp_path / "run")
    assert (
        row["step"] == 12
        and "20 samples" in row["eval/protocol"]
        and ", 3 steps, trailing spacing" in row["eval/protocol"]
    )
    assert ["eval/fd_digits", f"{row['eval/fd_digits']:.4g}"] in [line.split() for line in out]
    grid = (tmp_path / "run" / "samples" / "step_00000012.png").read_bytes()
    sample_from_checkpoint(
        trained, tmp_path / "grid.png", 4, **{"sample.steps": 3, "sample.spacing": "trailing"}
    )
    # what is measured, from the latents that every drawing begins at
    assert grid == (tmp_path / "grid.png").read_bytes()
    assert evaluate(
        trained,
        workdir=tmp_path / "run",
        **{"evaluate.steps": 3, "evaluate.num_samples": 20, "evaluate.spacing": "trailing"},
    ) == {key: value for key, value in row.items() if key != "step"}
    before = (trained / "metrics.jsonl").read_bytes()
    for folder in (trained, tmp_path / "run"):
        with pytest.raises(ValueError, match="holds another run; give another --workdir"):
            evaluate(trained, workdir=folder)
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_two_trainings_do_not_share_a_folder(tmp_path):
    with lock_folder(tmp_path / "run"):
        code, out, err = run_ddpm(
            "main", f"--config={ROOT}/configs/digits.py", f"--workdir={tmp_path}/run", cwd=tmp_path
        )
    assert code == 2 and len(err) == 1 and "is in use by another process" in err[0]
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_line(trained, tmp_path):
    for name, flags in [
        ("main", [f"--config={ROOT}/configs/digits.py", "--workdir=/proc/run"]),
        ("generate", [f"--checkpoint={trained}", "--out=/proc/images"]),
        ("sample", [f"--checkpoint={trained}", "--out=/proc/images/grid.png"]),
    ]:
        code, out, err = run_ddpm(name, *flags, cwd=tmp_path)
        assert (
            code == 2
            and len(err) == 1
            and "cannot use /proc/" in err[0]
            and "give another place" in err[0]
        ), (name, err)


FULL_DISK = """
import resource, runpy, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # no file grows beyond, as on a full disk
sys.argv[:] = sys.argv[1:]
runpy.run_module("ddpm.main", run_name="__main__", alter_sys=True)
"""


def test_a_full_disk_is_said_in_a_line_and_keeps_the_checkpoint_before(tmp_path):
    flags = [
        f"--config={ROOT}/configs/digits.py",
        f"--workdir={tmp_path}/run",
        "--config.model.model_channels=16",
        "--config.train.batch_size=8",
        "--config.every.sample=0 steps",
        "--config.every.evaluate=0 steps",
        "--config.every.validate=0 steps",
        "--config.wandb.mode=disabled",
    ]
    assert run_ddpm("main", *flags, "--config.train.length=2 steps", cwd=tmp_path)[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.pt")}
    longer = ["--config.train.length=4 steps", "--config.every.save=3 steps"]
    command = [python(), "-c", FULL_DISK, "ddpm.main", *flags, *longer]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert (
        f"failed: cannot use {tmp_path}/run/checkpoints/step_00000003.pt: File too large"
        in done.stdout
    )
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.pt*")}
    assert run_ddpm("main", *flags, *longer, cwd=tmp_path)[0] == 0
