"""What machines and people bring: users who share a cache, no home folder, photos that move, odd
names and environments.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import wandb
from PIL import Image
from scipy.sparse.csgraph import connected_components

from ddpm import data
from ddpm.common import files, registry
from ddpm.config import files as config_files
from ddpm.data import cache, duplicates
from ddpm.data import folder as data_folder
from ddpm.data import source as data_source
from ddpm.evaluate import evaluate
from ddpm.evaluation import extractors
from ddpm.evaluation import reference as evaluation_reference
from ddpm.experiment import build, trainer
from ddpm.generate import edit_images
from ddpm.runtime import device
from support.commands import ROOT, outcome_of
from support.runs import rows, run, tiny

REAL_USERS = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


def photos(folder, count=8, seed=0, side=24):
    """A folder of different pictures, PNGs of coloured noise."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.kron(
            generator.integers(0, 256, (6, 6, 3)), np.ones((side // 6, side // 6, 1))
        ).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def public():
    """A folder that every user may enter; pytest closes its own."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def source_of(folder):
    return f"folder(path={str(folder)!r})"


# near-duplicates


def traces(directions):
    """Directions [n, 2, 64] of any length as traces of length one, as they are stored."""
    return np.round(127 * directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(
        np.int8
    )


def compared_each_with_each(given):
    """The groups by their definition, through scipy: n * n comparisons of traces, mirrored ones,
    and inner parts.
    """
    units = given / 127
    signs = np.where(np.arange(8) % 2, -1, 1)
    mirrored = (units.reshape(-1, 2, 8, 8) * signs).reshape(units.shape)
    alike = sum(
        (units[:, 0] @ view.T >= duplicates.SIMILARITY).astype(int)
        for view in (units[:, 0], units[:, 1], mirrored[:, 0], mirrored[:, 1])
    )
    count, labels = connected_components(alike, directed=False)
    groups = [np.flatnonzero(labels == label).tolist() for label in range(count)]
    return sorted(group for group in groups if len(group) > 1)


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_those_of_comparing_each_with_each(seed):
    """Clusters of every density, down to pairs at the threshold; plain pictures too, whose
    traces are short.
    """
    generator = np.random.default_rng(seed)
    count = (50, 700, 1500, 2500)[seed]
    centres = generator.standard_normal((1 + 12 * seed, 2, 64))
    spread = generator.uniform(0.1, 0.7, (count, 1, 1))
    given = traces(
        centres[generator.integers(len(centres), size=count)]
        + spread * generator.standard_normal((count, 2, 64))
    )
    given[::7] = given[::7] * 0.93
    assert duplicates.group_similar(given) == compared_each_with_each(given)
    if seed:
        assert 20 < sum(map(len, duplicates.group_similar(given))) < count  # neither all nor none


def test_thousands_of_a_kind_cost_no_more_than_different_ones():
    generator = np.random.default_rng(0)
    different = traces(generator.standard_normal((3000, 2, 64)))
    frames = traces(
        generator.standard_normal((1, 2, 64)) + 0.2 * generator.standard_normal((3000, 2, 64))
    )
    seconds = []
    for given, groups in ((different, []), (frames, [list(range(3000))])):
        begun = time.process_time()
        assert duplicates.group_similar(given) == groups
        seconds.append(time.process_time() - begun)
    assert seconds[1] < 2 * seconds[0] + 0.5, seconds  # was 81 s for the frames


def test_nobody_waits_for_the_comparing(tmp_path, monkeypatch):
    """While one process compares the pictures of a folder, another takes the lock of what is
    kept about it.
    """
    folder = photos(tmp_path / "photos", 4)
    begun = []
    found = data_folder.scan_folder(folder)
    plain = duplicates.group_similar

    def groups(given):
        names = (
            [path.name for path in (files.cache_dir() / "alike").glob("*.lock")]
            if (files.cache_dir() / "alike").exists()
            else []
        )
        name = f"alike/{data_source.fingerprint(os.path.realpath(folder))}"
        code = f"from ddpm.common import files\nwith files.cached_json({name!r}): print('in')"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT
        )
        begun.append((names, done))
        return plain(given)

    monkeypatch.setattr(duplicates, "group_similar", groups)
    assert (
        duplicates.near_duplicates(folder, found.infos)
        == duplicates.near_duplicates(folder, found.infos)
        == ()
    )
    assert len(begun) == 1 and begun[0][1].stdout == "in\n" and not begun[0][1].stderr


# a cache that users share


def as_user(uid, group, mask, act, *arguments):
    """What `act` returns, as JSON would hold it, in a forked process of a user and a group, with
    a umask.
    """
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.umask(mask)
            os.setgroups([group])
            os.setgid(group)
            os.setuid(uid)
            found = act(*arguments)
        except BaseException as error:
            found = f"{type(error).__name__}: {error}"
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


@REAL_USERS
def test_users_of_a_group_share_a_cache(public, monkeypatch):
    """The second reads what the first has made, without a word, and each may add to it; nobody
    makes anything again.
    """
    shared = public / "cache"
    shared.mkdir()
    os.chown(shared, 0, 4242)
    shared.chmod(0o2770)
    monkeypatch.setenv("DDPM_CACHE", str(shared))
    one = photos(public / "one")
    two = photos(public / "two", seed=1)
    extractor = extractors.digits("cpu")
    # Pillow and numpy load what they need before the user changes
    data.open_source(source_of(one), 16, 3)

    def use(folder):
        source = data.open_source(source_of(folder), 16, 3)
        found = cache.cache_decoded(source)
        reference = evaluation_reference.reference(extractor, found)
        return [
            found.notes[-1],
            reference.name,
            sum(int(found[k].sum()) for k in range(len(found))),
        ]

    for path in shared.rglob("*"):
        path.chmod(0o2770) if path.is_dir() else path.unlink()
    first = as_user(70001, 4242, 0o022, use, one)
    assert first[0].startswith("decoded images: ")
    made = {path: path.stat() for path in shared.rglob("*") if path.is_file()}
    modes = {path.suffix: stat.S_IMODE(status.st_mode) for path, status in made.items()}
    assert modes == {".u8": 0o644, ".json": 0o644, ".safetensors": 0o644, ".lock": 0o666}
    assert as_user(70002, 4242, 0o022, use, one) == first
    kept = {path: path.stat() for path in shared.rglob("*") if path.is_file()}
    assert {path: (at.st_ino, at.st_mtime_ns) for path, at in kept.items()} == {
        path: (at.st_ino, at.st_mtime_ns) for path, at in made.items()
    }
    # into folders that the first made
    assert as_user(70002, 4242, 0o022, use, two)[0].startswith("decoded images: ")
    shared.chmod(0o2750)
    for path in shared.iterdir():
        path.chmod(0o2750) if path.is_dir() else None
    for lock in shared.rglob("*.lock"):
        lock.unlink()
    assert as_user(70003, 4242, 0o077, use, one) == first  # who may only read


# no home folder


TINY = [
    f"--config={ROOT}/configs/digits.py",
    "--config.model.model_channels=8",
    "--config.model.channel_mult=(1,2)",
    "--config.model.num_res_blocks=1",
    "--config.diffusion.timesteps=20",
    "--config.train.batch_size=4",
    "--config.sample.steps=2",
    "--config.evaluate.steps=2",
    "--config.sample.num_images=4",
    "--config.every.evaluate=0 steps",
    "--config.train.length=2 steps",
    "--config.wandb.mode=offline",
]
RGB = ["--config.data.channels=3", "--config.evaluate.extractor=none"]


@REAL_USERS
def test_a_user_without_a_home_folder_and_a_name(public):
    """As `docker run --user 54321`: nothing is cached, a line says so, and the rest goes on, W&B
    too.
    """
    folder = photos(public / "photos")
    cwd = public / "cwd"
    cwd.mkdir()
    cwd.chmod(0o777)
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("HOME", "DDPM_CACHE", "XDG_CACHE_HOME") and not key.startswith("WANDB")
    } | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}

    # who may read Python, wherever it is, and no more
    other = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
    other += [f"--{kind}-caps=+dac_read_search" for kind in ("inh", "ambient")]

    def stranger(name, *words):
        command = [*other, sys.executable, "-m", f"ddpm.{name}", *words]
        done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    kept = "facts about files cannot be cached ([Errno 13] Permission denied: '/.cache')"
    code, out, err = stranger("doctor", str(folder), "--image_size=16")
    assert (
        code == 1
        and "8 of 8 images can be used" in out
        and err.startswith(kept)
        and err.count("\n") == 1
    )
    code, out, err = stranger(
        "main", *TINY, *RGB, f"--config.data.source={source_of(folder)}", "--workdir=run"
    )
    assert (
        code == 0
        and "images are decoded at each use, as /.cache/ddpm/decoded cannot keep them" in out
    ), err
    assert kept in (cwd / "run" / "training.log").read_text() and kept in err
    assert "INFO" not in err and "upload it: wandb sync run/wandb/offline-run-*" in out
    assert len(list(cwd.glob("run/wandb/offline-run-*/*.wandb"))) == 1 and sorted(
        os.listdir(cwd)
    ) == ["run"]


def test_the_home_of_a_user_who_does_not_exist(tmp_path):
    for words in (
        ["doctor", "~nobody-here/x"],
        ["main", *TINY, "--workdir=~nobody-here/x"],
        ["main", *TINY, "--config.data.source=folder(path='~nobody-here/x')"],
        ["generate", "--checkpoint=~nobody-here/x"],
        ["main", *TINY, "--config.train.init_from=~nobody-here/x"],
    ):
        code, out, err = outcome_of(*words, cwd=tmp_path)
        assert (
            code == 2
            and "'~nobody-here/x' starts with a home folder" in err
            and err.count("\n") == 1
        ), words
    code, out, err = outcome_of(
        "doctor",
        photos(tmp_path / "p"),
        "--image_size=16",
        cwd=tmp_path,
        DDPM_CACHE="~nobody-here/c",
    )
    assert (
        code == 1
        and "8 of 8" in out
        and "cannot be cached ('~nobody-here/c' starts with a home folder" in err
    )
    code, out, err = outcome_of(
        "doctor", "~/p", "--image_size=16", "--out=~/report", cwd=tmp_path, HOME=str(tmp_path)
    )
    assert (tmp_path / "report" / "report.json").is_file() and not (tmp_path / "~").exists()


# W&B


@pytest.mark.parametrize("name", ["team/cats", "a:b", "50%", "x" * 129])
def test_a_project_that_wandb_refuses_is_a_mistake(name, tmp_path, monkeypatch):
    with pytest.raises(wandb.errors.UsageError):
        wandb.Settings(project=name)
    with pytest.raises(
        ValueError, match=r"config.wandb.project is '.*', which W&B refuses \(Invalid project name"
    ):
        build.check(tiny(wandb__mode="offline", wandb__project=name))
    build.check(tiny(wandb__project=name))  # nothing is tracked
    monkeypatch.setenv("WANDB_PROJECT", name)
    with pytest.raises(ValueError, match="WANDB_PROJECT is '"):
        build.check(tiny(wandb__mode="offline"))
    build.check(tiny(wandb__mode="offline", wandb__project="cats of the team"))


def test_what_wandb_refuses_ends_every_command_before_the_first_step(tmp_path):
    bad = ["--config.wandb.mode=offline", "--config.wandb.project=a?b"]
    run(tiny(train__length="2 steps", every__save="2 steps"), tmp_path / "run")
    study = tmp_path / "asked.yaml"
    words = [
        "${env}",
        "${interpreter}",
        "-m",
        "ddpm.main",
        f"--config={ROOT}/configs/digits.py",
        *bad,
        "${args}",
    ]
    study.write_text(
        json.dumps(
            {
                "method": "grid",
                "metric": {"name": "val/loss_ema"},
                "command": words,
                "parameters": {"config.seed": {"values": [0, 1]}},
            }
        )
    )
    for asked in (
        ["main", *TINY, *bad, "--workdir=new"],
        ["sweep", study, "--runs=new"],
        ["evaluate", "--checkpoint=run", "--workdir=new", *bad],
        ["main", *TINY, f"--config.wandb.tags=('{'t' * 65}',)", "--workdir=new"],
    ):
        code, out, err = outcome_of(*asked, cwd=tmp_path)
        assert code == 2 and err.count("\n") == 1 and not out and not (tmp_path / "new").exists(), (
            asked
        )
        assert "which W&B refuses" in err or "takes" in err
    code, out, err = outcome_of("main", *TINY, "--workdir=new", cwd=tmp_path, WANDB_RUN_ID="a/b")
    assert code == 2 and err.startswith("error: WANDB_RUN_ID is 'a/b', which W&B refuses")


def test_the_runs_of_a_sweep_are_wandb_runs_of_their_own(tmp_path):
    study = tmp_path / "asked.yaml"
    study.write_text(
        json.dumps(
            {
                "method": "grid",
                "metric": {"name": "val/loss_ema"},
                "command": ["${env}", "${interpreter}", "-m", "ddpm.main", *TINY, "${args}"],
                "parameters": {"config.seed": {"values": [0, 1]}},
            }
        )
    )
    code, out, err = outcome_of(
        "sweep",
        study,
        "--runs=runs",
        cwd=tmp_path,
        WANDB_RUN_ID="mine",
        WANDB_RESUME="must",
        WANDB_NAME="the one",
        WANDB_SWEEP_ID="theirs",
    )
    assert code == 0, out + err
    logs = {log.stem for log in tmp_path.glob("runs/asked/*/wandb/offline-run-*/*.wandb")}
    assert len(logs) == 2 and "run-mine" not in logs
    # as by an agent
    code, out, err = outcome_of(
        "main", *TINY, cwd=tmp_path, WANDB_RUN_ID="agents", WANDB_SWEEP_ID="theirs"
    )
    assert (
        code == 0
        and len(list(tmp_path.glob("runs/*-agents/wandb/offline-run-*-agents/run-agents.wandb")))
        == 1
    )


# where the photos are, and what is in them


@pytest.fixture(scope="module")
def moved(tmp_path_factory):
    """A folder with a run of two steps that learned two classes from `pets`, and those photos,
    which are in `animals` now.
    """
    folder = tmp_path_factory.mktemp("moved")
    for seed, name in enumerate(("cat", "dog")):
        photos(folder / "pets" / name, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("DDPM_CACHE", str(folder / "cache"))
        assert run(labelled("pets"), folder / "run")
        (folder / "pets").rename(folder / "animals")
    return folder


def labelled(path, **options):
    """A tiny config that learns the classes of a folder."""
    return tiny(
        **{
            "data__channels": 3,
            "data__source": source_of(path),
            "data__class_labels": True,
            "train__length": "2 steps",
            "evaluate__extractor": "none",
            "evaluate__likelihood": "bound(nfe=4)",
            "every__save": "2 steps",
        }
        | options
    )


def test_a_run_whose_photos_moved_goes_on(moved, tmp_path, monkeypatch):
    """By a relative, an absolute and a linked path, as if nothing had happened: the same numbers
    as without a stop.
    """
    monkeypatch.chdir(moved)
    shutil.copytree(moved / "run", tmp_path / "run")
    (tmp_path / "link").symlink_to(moved / "animals")
    for steps, path in ((4, "animals"), (6, moved / "animals"), (8, tmp_path / "link")):
        assert run(labelled(path, train__length=f"{steps} steps"), tmp_path / "run")
    assert run(labelled("animals", train__length="8 steps"), tmp_path / "whole")
    folders = tmp_path / "run", tmp_path / "whole"
    steps = [[row["train/loss"] for row in rows(folder) if row["step"] == 8] for folder in folders]
    assert steps[0] == steps[1] and len(steps[0]) == 1
    assert (
        f"folder(path={str(tmp_path / 'link')!r})"
        in json.loads((tmp_path / "run" / "config.json").read_text())["data"]["source"]
    )
    # two data sets are two runs
    assert config_files.run_name("x.py", {"data.source": "digits"}) == "x-source=digits"
    with pytest.raises(ValueError, match="train.batch_size: 8 there, 4 here"):
        config_files.check_continues(labelled("animals", train__batch_size=4), tmp_path / "run")


def test_a_path_that_is_not_found_is_whole_and_with_what_to_change(
    moved, tmp_path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    gone = rf"image folder '{tmp_path}/pets' does not exist; put images there, or give the path .*: --config.data.source="
    with pytest.raises(ValueError, match=gone):
        evaluate(moved / "run", "cpu")
    with pytest.raises(ValueError, match=gone):
        trainer.build_trainer(
            labelled("pets", train__length="4 steps"), moved / "run", device.start()
        )
    with pytest.raises(ValueError, match=f"there is no file '{tmp_path}/cat.png'"):
        edit_images(moved / "run", "sdedit", "cat.png", tmp_path / "out", device="cpu")
    with pytest.raises(ValueError, match=f"image folder '{tmp_path}/pets' does not exist"):
        data_folder.scan_folder("pets")
    shutil.copytree(moved / "animals", tmp_path / "pets")
    assert (
        evaluate(moved / "run", "cpu")["eval/bits_per_dim"] > 0
        and "other images" not in capfd.readouterr().out
    )
    (tmp_path / "pets" / "cat" / "0.png").unlink()
    evaluate(moved / "run", "cpu")
    assert (
        "measured against other images than it learned from: in folder(path='pets'); images were "
        "16, are 15" in capfd.readouterr().out
    )


def test_other_classes_are_told_by_their_names(moved, tmp_path):
    more = tmp_path / "more"
    fewer = tmp_path / "fewer"
    shutil.copytree(moved / "animals", more)
    photos(more / "ant", seed=3)
    photos(fewer / "dog", seed=1)
    for folder, names in ((more, "(ant, cat, dog)"), (fewer, "(dog)")):
        given = labelled(folder, train__length="4 steps")
        with pytest.raises(ValueError) as told:
            trainer.build_trainer(given, moved / "run", device.start())
        assert f"classes were (cat, dog), are {names}); bring them back" in str(told.value)
        with pytest.raises(ValueError, match="trained with other classes: they were ") as told:
            trainer.build_trainer(
                labelled(folder, train__init_from=str(moved / "run")),
                tmp_path / "new",
                device.start(),
            )
        assert f"(cat, dog), are {names} in folder(" in str(told.value)
    same = data_source.DatasetCheck(
        "streaming(path='x')", images=3, fingerprint="a", classes=("0", "1", "2")
    )
    with pytest.raises(
        ValueError,
        match=r"in streaming\(path='x'\); classes were \(0, 1\), are \(0, 1, 2\)\); bring",
    ):
        same.load_state_dict({"images": 3, "fingerprint": "b", "classes": ["0", "1"]})


# words that reach people


def test_warnings_reach_the_console_and_the_log_of_a_training(tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    words = [
        *TINY,
        "--config.every.evaluate=2 steps",
        "--config.evaluate.num_samples=8",
        "--config.wandb.mode=disabled",
    ]
    code, out, err = outcome_of("main", *words, "--workdir=run", cwd=tmp_path)
    assert code == 0 and "cannot be read" not in out + err
    for asked in (["evaluate", "--checkpoint=run"], ["main", *words, "--workdir=again"]):
        (kept,) = (tmp_path / "cache").glob("*-digits-*.safetensors")
        kept.write_bytes(b"garbage")
        code, out, err = outcome_of(*asked, cwd=tmp_path)
        assert code == 0 and (out + err).count("cannot be read (") == 1, err
    assert (tmp_path / "again" / "training.log").read_text().count("; computing them again") == 1


def test_names_in_another_encoding(tmp_path):
    """Latin-1 bytes in a path, and in the name of a class: learned from as they are looked at,
    whatever may be printed.
    """
    name = os.fsdecode(b"f\xe9t\xe9")
    photos(tmp_path / name / "sub")
    photos(tmp_path / name / name, seed=1)
    assert (
        registry.parse(f"folder(path={name!r})")
        == registry.parse(f"folder(path='{name}')")
        == ("folder", {"path": name})
    )
    words = [
        *TINY,
        *RGB,
        f"--config.data.source=folder(path='{name}')",
        "--config.data.class_labels=True",
        "--workdir=run",
    ]
    code, out, err = outcome_of("main", *words, cwd=tmp_path, PYTHONIOENCODING="ascii:strict")
    assert code == 0 and "2 classes: f?t? (8), sub (8)" in out and "upload it: wandb sync" in out, (
        err
    )
    assert "f\\udce9t\\udce9" in (tmp_path / "run" / "training.log").read_text()
    assert config_files.read(tmp_path / "run" / "config.json").data.classes == (name, "sub")


def test_closed_streams(tmp_path):
    """As some schedulers start a process; what it opens first must not take the place of a
    stream.
    """
    words = [
        sys.executable,
        "-m",
        "ddpm.main",
        *TINY,
        "--config.wandb.mode=disabled",
        "--workdir=run",
    ]
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert (
        done.returncode == 0
        and "done; draw images with" in (tmp_path / "run" / "training.log").read_text()
    )
