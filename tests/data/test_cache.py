"""Decoded images are those of the source, decoded once whatever happens, and change nothing that
is learned.
"""

import _multiprocessing
import errno
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm import data
from ddpm.common import files
from ddpm.data import cache, loader
from ddpm.data import source as data_source
from ddpm.experiment import build
from support.runs import rows, run, tiny


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def opened(photos, size=16):
    return data.open_source(f"folder(path={str(photos)!r})", size, 3)


def test_photos_are_read_where_there_are_no_semaphores(photos, tmp_path, monkeypatch):
    """As with a read-only or missing /dev/shm, where multiprocessing has none: to train,
    validate and measure.
    """

    def refused(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    multiprocessing.Lock()  # where there are any: what is read of them once is read
    monkeypatch.setattr(_multiprocessing, "SemLock", refused)
    with pytest.raises(OSError):
        multiprocessing.Lock()
    given = tiny(
        data__source=f"folder(path={str(photos)!r})",
        data__channels=3,
        train__length="1 steps",
        every__evaluate="1 steps",
        evaluate__extractor="digits",
    )
    assert run(given, tmp_path / "run")
    assert any("eval/fd_digits" in row for row in rows(tmp_path / "run"))
    assert list((files.cache_dir() / "decoded").glob("*.u8")) and list(
        (files.cache_dir() / "files").glob("*.json")
    )


def test_work_in_threads_keeps_its_order_and_ends_at_a_fault():
    """What has not begun is dropped: thousands of items would take minutes."""
    begun = time.monotonic()
    assert cache.map_in_threads(lambda k: k * k, range(1001), "squares") == [
        k * k for k in range(1001)
    ]
    assert cache.map_in_threads(str, [], "nothing") == []

    def work(k):
        time.sleep(0.01)
        if k == 3:
            raise ValueError("three")

    with pytest.raises(ValueError, match="three"):
        cache.map_in_threads(work, range(20_000), "work")
    with pytest.raises(KeyboardInterrupt), cache.thread_pool(2) as pool:
        for _ in range(20_000):
            pool.submit(time.sleep, 0.01)
        raise KeyboardInterrupt
    assert time.monotonic() - begun < 30


def slow(fetch, log, seconds, index):
    with open(log, "a") as file:
        file.write(f"{index}\n")
    time.sleep(seconds)
    return fetch(index)


def watched(source, log, seconds=0.0):
    """The source, with a line in a log for each image that it decodes."""
    return replace(source, fetch=partial(slow, source.fetch, log, seconds))


def test_rows_are_the_images_and_are_decoded_once(photos, tmp_path):
    source = opened(photos)
    log = tmp_path / "log"
    for _ in range(2):
        found = cache.cache_decoded(watched(source, log), tmp_path / "cache")
        for copy in (found, pickle.loads(pickle.dumps(found))):
            assert all(torch.equal(copy[index], source[index]) for index in range(len(source)))
        assert sorted(map(int, log.read_text().split())) == list(range(12))
    assert (found.fingerprint, found.labels, len(found)) == (source.fingerprint, source.labels, 12)
    found[0].zero_()  # a copy: the file is nobody's to change
    assert torch.equal(found[0], source[0]) and found.notes[-1].startswith("decoded images: ")
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == [".lock", ".u8"]
    cache.cache_decoded(watched(opened(photos, 8), log), tmp_path / "cache")
    assert len(log.read_text().split()) == 24  # of another size: another file


BUILDER = """
import sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + '/..']
from ddpm.data import cache
from test_cache import opened, watched
found = cache.cache_decoded(watched(opened({photos!r}), {log!r}, {seconds}), {folder!r})
print(found[11].sum().item())
"""


def builder(photos, tmp_path, seconds):
    """Another process that wants the same rows."""
    code = BUILDER.format(
        tests=os.path.dirname(__file__),
        photos=str(photos),
        log=str(tmp_path / "log"),
        seconds=seconds,
        folder=str(tmp_path / "cache"),
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_builds_and_the_other_waits(photos, tmp_path):
    expected = opened(photos)[11].sum().item()
    both = [builder(photos, tmp_path, 0.1) for _ in range(2)]
    assert [int(process.communicate(timeout=120)[0]) for process in both] == [expected] * 2
    assert len((tmp_path / "log").read_text().split()) == 12


def test_a_build_that_is_killed_leaves_nothing_that_counts(photos, tmp_path):
    process = builder(photos, tmp_path, 5)
    end = time.monotonic() + 120
    while not (tmp_path / "log").exists() and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "cache").glob("*.u8"))
    source = opened(photos)
    found = cache.cache_decoded(source, tmp_path / "cache")
    assert all(torch.equal(found[index], source[index]) for index in range(12))
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_disk_without_room_is_told_and_done_without(photos, tmp_path, monkeypatch):
    source = opened(photos)
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "cache"):
        found = cache.cache_decoded(source, folder)
        assert ("images are decoded at each use" in found.notes[-1]) is (folder.name == "file")
        assert torch.equal(found[3], source[3])
    size = 12 * 3 * 16 * 16
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "home"))
    for folder, free, fits in (
        (None, 3 * size, False),
        (tmp_path / "full", size, False),
        (tmp_path / "full", 2 * size, True),
        (None, 5 * size, True),
    ):  # the one that was asked for may take more
        monkeypatch.setattr(
            cache.shutil, "disk_usage", lambda folder, free=free: SimpleNamespace(free=free)
        )
        found = cache.cache_decoded(source, folder)
        assert (
            "free; name another folder as data.cache" in found.notes[-1]
        ) is not fits and torch.equal(found[3], source[3])
    assert len(list((tmp_path / "home" / "decoded").glob("*.u8"))) == 1


def test_a_file_is_read_once_until_someone_touches_it(photos, tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "home"))
    first = opened(photos)
    (kept,) = (tmp_path / "home" / "files").glob("*.json")
    known = json.loads(kept.read_text())
    assert set(known) == {f"{number}.png" for number in range(12)}
    known["3.png"][2] = "another digest"
    known["5.png"][1] = "broken"
    known["6.png"][3] = 15
    kept.write_text(json.dumps(known))
    second = opened(photos)  # says what it was told, and has not looked itself
    assert second.fingerprint != first.fingerprint and len(second) == 10
    assert (
        "left out 1 too small: 6.png" in second.notes and "left out 1 broken: 5.png" in second.notes
    )
    for number in (3, 5, 6):
        os.utime(photos / f"{number}.png")
    third = opened(photos)
    assert (third.fingerprint, third.notes) == (first.fingerprint, first.notes)
    (photos / "7.png").write_bytes((photos / "8.png").read_bytes())
    (photos / "9.png").unlink()
    assert len(opened(photos)) == 11 and "9.png" not in json.loads(kept.read_text())
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "elsewhere"))
    assert opened(photos).fingerprint not in (first.fingerprint, second.fingerprint)
    for broken in ("[1, 2]", "{", ""):
        kept.write_text(broken)
        monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "home"))
        assert len(opened(photos)) == 11 and len(json.loads(kept.read_text())) == 11
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "file"))
    assert len(opened(photos)) == 11


def test_what_fits_is_in_memory_and_read_in_whole_batches(photos, tmp_path, monkeypatch):
    source = opened(photos)
    size = 12 * 3 * 16 * 16
    for memory, fits in ((2 * size, True), (2 * size - 1, False)):
        monkeypatch.setattr(cache, "memory_bytes", lambda memory=memory: memory)
        found = cache.cache_decoded(source, tmp_path / "cache")
        assert found.in_memory is fits and ("in memory" in found.notes[-1]) is fits
        indices = np.array([5, 0, 11, 5])
        assert torch.equal(found.batch(indices), torch.stack([source[index] for index in indices]))
        running = loader.loader(found, [indices, [1, 2]], num_workers=1)
        pixels, labels = next(running)
        # workers would only carry it about
        assert len(multiprocessing.active_children()) == (not fits)
        assert torch.equal(pixels, source.batch(indices)) and labels.tolist() == [-1] * 4
        assert torch.equal(next(running)[0], source.batch([1, 2])) and next(running, None) is None
    part = data_source.subset(found, [3, 4])
    assert torch.equal(part.batch([1, 0]), source.batch([4, 3]))


def test_a_disk_that_turns_out_full_is_told_too(photos, tmp_path, monkeypatch):
    """Another process may fill it; a write to a map would end in SIGBUS."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", small], capture_output=True
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**9))
        found = cache.cache_decoded(opened(photos), small / "cache")  # 9,216 bytes
        assert "decoded at each use" in found.notes[-1] and "No space left" in found.notes[-1]
        assert not list(small.glob("cache/*.part"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_an_image_that_cannot_be_had_is_no_fault_of_the_cache(photos, tmp_path):
    source = opened(photos)
    (photos / "7.png").write_bytes((photos / "7.png").read_bytes()[:200])
    with pytest.raises(cache.Undecodable, match="7.png could be read before, and now is truncated"):
        cache.cache_decoded(source, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.[up]*"))


def test_a_training_learns_the_same_from_rows(photos, tmp_path):
    options = dict(
        data__source=f"folder(path={str(photos)!r})",
        data__channels=3,
        train__batch_size=4,
        data__image_size=16,
        evaluate__extractor="none",
        data__num_workers=1,
    )
    for where in ("none", str(tmp_path / "cache")):
        assert run(tiny(**options, data__cache=where), tmp_path / f"run-{where == 'none'}")
    losses = [
        [row["train/loss"] for row in rows(tmp_path / f"run-{plain}") if "train/loss" in row]
        for plain in (True, False)
    ]
    assert (
        losses[0] == losses[1]
        and "decoded images: " in (tmp_path / "run-False" / "training.log").read_text()
    )
    assert len(list((tmp_path / "cache").glob("*.u8"))) == 1
    # the digits are in memory
    assert not isinstance(build.dataset(tiny(data__cache="auto")).fetch, cache.MappedRows)
