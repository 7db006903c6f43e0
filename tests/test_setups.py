"""What machines and people bring: users who share a cache, no home folder, photos that move, odd names and environments."""

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import rows, run, tiny
from PIL import Image
from scipy.sparse.csgraph import connected_components

from ddpm import cache, data, likeness, metrics

ROOT = Path(__file__).parents[1]
REAL_USERS = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


def photos(folder, count=8, seed=0, side=24):
    """A folder of different pictures, PNGs of coloured noise."""
    generator = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = np.kron(generator.integers(0, 256, (6, 6, 3)), np.ones((side // 6, side // 6, 1))).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def source_of(folder):
    return f"folder(path={str(folder)!r})"


# near-duplicates


def traces(directions):
    """Directions [n, 2, 64] of any length as traces of length one, as they are stored."""
    return np.round(127 * directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(np.int8)


def compared_each_with_each(given):
    """The groups by their definition, through scipy: n * n comparisons of traces, mirrored ones, and inner parts."""
    units, signs = given / 127, np.where(np.arange(8) % 2, -1, 1)
    mirrored = (units.reshape(-1, 2, 8, 8) * signs).reshape(units.shape)
    alike = sum((units[:, 0] @ view.T >= likeness.ALIKE).astype(int) for view in (
        units[:, 0], units[:, 1], mirrored[:, 0], mirrored[:, 1]))
    count, labels = connected_components(alike, directed=False)
    groups = [np.flatnonzero(labels == label).tolist() for label in range(count)]
    return sorted(group for group in groups if len(group) > 1)


@pytest.mark.parametrize("seed", range(4))
def test_near_duplicates_are_those_of_comparing_each_with_each(seed):
    """Clusters of every density, down to pairs at the threshold; plain pictures too, whose traces are short."""
    generator = np.random.default_rng(seed)
    count, centres = (50, 700, 1500, 2500)[seed], generator.standard_normal((1 + 12 * seed, 2, 64))
    spread = generator.uniform(0.1, 0.7, (count, 1, 1))
    given = traces(centres[generator.integers(len(centres), size=count)] + spread * generator.standard_normal((count, 2, 64)))
    given[::7] = given[::7] * 0.93
    assert likeness.groups(given) == compared_each_with_each(given)
    if seed:
        assert 20 < sum(map(len, likeness.groups(given))) < count  # neither all nor none


def test_thousands_of_a_kind_cost_no_more_than_different_ones():
    generator = np.random.default_rng(0)
    different = traces(generator.standard_normal((3000, 2, 64)))
    frames = traces(generator.standard_normal((1, 2, 64)) + 0.2 * generator.standard_normal((3000, 2, 64)))
    seconds = []
    for given, groups in ((different, []), (frames, [list(range(3000))])):
        begun = time.process_time()
        assert likeness.groups(given) == groups
        seconds.append(time.process_time() - begun)
    assert seconds[1] < 2 * seconds[0] + 0.5, seconds  # was 81 s for the frames


def test_nobody_waits_for_the_comparing(tmp_path, monkeypatch):
    """While one process compares the pictures of a folder, another takes the lock of what is kept about it."""
    folder, begun = photos(tmp_path / "photos", 4), []
    found, plain = data.survey(folder), likeness.groups

    def groups(given):
        names = [path.name for path in (cache.home() / "alike").glob("*.lock")] if (cache.home() / "alike").exists() else []
        name = f"alike/{data.fingerprint(os.path.realpath(folder))}"
        code = f"from ddpm import cache\nwith cache.remembered({name!r}): print('in')"
        begun.append((names, subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)))
        return plain(given)

    monkeypatch.setattr(likeness, "groups", groups)
    assert data.near_duplicates(folder, found.facts) == data.near_duplicates(folder, found.facts) == ()
    assert len(begun) == 1 and begun[0][1].stdout == "in\n" and not begun[0][1].stderr


# a cache that users share


def as_user(uid, group, mask, act, *arguments):
    """What `act` returns, as JSON would hold it, in a forked process of a user and a group, with a umask."""
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
def test_users_of_a_group_share_a_cache(tmp_path, monkeypatch):
    """The second reads what the first has made, without a word, and each may add to it; nobody makes anything again."""
    for above in (tmp_path, *tmp_path.parents[:3]):
        above.chmod(above.stat().st_mode | 0o055) if above.owner() == "root" else None
    shared = tmp_path / "cache"
    shared.mkdir()
    os.chown(shared, 0, 4242)
    shared.chmod(0o2770)
    monkeypatch.setenv("DDPM_CACHE", str(shared))
    one, two = photos(tmp_path / "one"), photos(tmp_path / "two", seed=1)
    extractor = metrics.digits("cpu")
    data.open_source(source_of(one), 16, 3)  # Pillow and numpy load what they need before the user changes

    def use(folder):
        source = data.open_source(source_of(folder), 16, 3)
        found = cache.decoded(source)
        reference = metrics.reference(extractor, found)
        return [found.notes[-1], reference.name, sum(int(found[k].sum()) for k in range(len(found)))]

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
        path: (at.st_ino, at.st_mtime_ns) for path, at in made.items()}
    assert as_user(70002, 4242, 0o022, use, two)[0].startswith("decoded images: ")  # into folders that the first made
    shared.chmod(0o2750)
    for path in shared.iterdir():
        path.chmod(0o2750) if path.is_dir() else None
    for lock in shared.rglob("*.lock"):
        lock.unlink()
    assert as_user(70003, 4242, 0o077, use, one) == first  # who may only read
