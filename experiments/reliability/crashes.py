"""SIGKILL at any moment and at chosen points, and the same command again: the run goes on as if
nothing had been.
"""

import atexit
import functools
import io
import itertools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL.Image
import torch
from faults import Found, before_call, die, differences, forked, small, training

from ddpm.common import pixels as common_pixels
from ddpm.generate import generate_images
from ddpm.tracking import wandb
from ddpm.training.background import BackgroundWriter
from support.wandb_logs import lines, rows_of, synced


class Alone(NamedTuple):
    """A run that nothing has happened to."""

    folder: Path
    seconds: float
    calls: dict[str, int]  # of what the POINTS wait for


@functools.cache
def alone(**options):
    """The Alone of `small(**options)`, trained once in this process for all faults."""
    folder = Path(tempfile.mkdtemp(prefix="ddpm-alone-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    def counting():
        calls = {name: arm(None) for name, arm in POINTS.items()}
        code = training(small(**options), folder / "run")()
        (folder / "calls").write_text(json.dumps({name: count() for name, count in calls.items()}))
        return code

    begun = time.monotonic()
    assert forked(counting, folder / "log") == 0, (folder / "log").read_text()
    return Alone(
        folder / "run", time.monotonic() - begun, json.loads((folder / "calls").read_text())
    )


def at_any_time(folder, times, seed):
    """Kills at moments that are drawn from the seconds that a training has left."""
    rng = np.random.default_rng(seed)
    done = 0
    lost = []
    whole = alone()
    for number in itertools.count():
        run = folder / f"run {number}"
        left = whole.seconds
        while left > whole.seconds / 20 and done < times:
            moment = rng.uniform(0, left)
            left -= moment
            code = forked(training(small(), run), folder / "log", kill_after=moment)
            if code == 0:
                break
            if code != -9:
                return Found(
                    done,
                    [*lost, f"{run.name}: exit code {code} instead of a kill after {moment:.3f} s"],
                )
            done += 1
        lost += finished(run, whole, small())
        if done == times or lost:
            return Found(done, lost, f"a run takes {whole.seconds:.1f} s")


def inside(point, also=lambda run: [], **options):
    """A fault: kills at one of the POINTS of a training of `small(**options)`; `also(run)` says
    what else has been lost.

    A run is killed at a call that is drawn among those that it has left, goes on, is killed again
    ... and comes to its end.
    """

    def do(folder, times, seed):
        rng = np.random.default_rng(seed)
        done = 0
        lost = []
        given = small(**options)
        whole = alone(**options)
        for number in itertools.count():
            run = folder / f"run {number}"
            left = whole.calls[point]
            while left and done < times:
                at = int(rng.integers(1, left + 1))
                left -= at
                code = forked(
                    lambda at=at, run=run: (POINTS[point](at), training(given, run)())[1],
                    folder / "log",
                )
                if code == 0:
                    break  # what it has done before need not be done again
                if code != -9:
                    return Found(
                        done,
                        [*lost, f"{run.name}: exit code {code} instead of a kill at call {at}"],
                    )
                done += 1
            lost += finished(run, whole, given) + also(run)
            if done == times or lost:
                return Found(done, lost)

    return do


def finished(run, whole, given):
    """What a killed run has lost when the same command has brought it to its end."""
    code = forked(training(given, run), run.parent / "log")
    return (
        [f"{run.name}: exit code {code} when it should go on"]
        if code
        else differences(whole.folder, run)
    )


def before(home, attribute):
    """A point: before a call of a function."""
    return lambda at: before_call(home, attribute, at)


def half(home, attribute, file):
    """A point: in a function, when half is written of what it writes to its argument number
    `file`.
    """

    def arm(at):
        original = getattr(home, attribute)
        calls = itertools.count(1)

        def counted(*arguments, **options):
            if next(calls) != at:
                return original(*arguments, **options)
            place = arguments[file]
            whole = io.BytesIO()
            original(*arguments[:file], whole, *arguments[file + 1 :], **options)
            Path(getattr(place, "name", place)).write_bytes(
                whole.getvalue()[: len(whole.getvalue()) // 2]
            )
            die()

        setattr(home, attribute, counted)
        return lambda: next(calls) - 1

    return arm


def photos(folder):
    """Options of a training on photos, which are decoded into a cache of this folder's."""
    place = folder / "photos"
    if not place.exists():
        place.mkdir()
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels).save(place / f"{number}.png")
    return dict(
        data__source=f"folder(path={str(place)!r})",
        data__channels=3,
        train__batch_size=4,
        evaluate__extractor="none",
        data__cache=str(folder / "cache"),
    )


def cache_build(folder, times, seed):
    """Kills while photos are looked at and decoded into the cache, which each time is not there
    yet.
    """
    rng = np.random.default_rng(seed)
    done = 0
    lost = []
    given = small(**photos(folder))
    os.environ["DDPM_CACHE"], usual = str(folder / "home"), os.environ.get("DDPM_CACHE", "")
    try:
        assert forked(training(given, whole := folder / "whole"), folder / "log") == 0
        for number in range(times):
            for path in (folder / "cache").iterdir():
                path.unlink()
            os.environ["DDPM_CACHE"] = str(folder / f"home {number}")
            run = folder / f"run {number}"
            point, most = (("decoding", 24), ("rename", 2), ("fsync", 2))[number % 3]
            at = int(rng.integers(1, most + 1))
            code = forked(lambda: (POINTS[point](at), training(given, run)())[1], folder / "log")  # noqa: B023
            if code != -9:
                return Found(done, [*lost, f"{run.name}: exit code {code} instead of a kill"])
            done += 1
            lost += finished(run, Alone(whole, 0, {}), given)
            lost += [f"{path.name} is left behind" for path in (folder / "cache").glob("*.part")]
    finally:
        os.environ["DDPM_CACHE"] = usual
    return Found(done, lost)


def drawing(folder, times, seed):
    """Kills while the pictures of `generate` are written, in every of its formats."""
    rng = np.random.default_rng(seed)
    done = 0
    lost = []
    for number in range(times):
        format = ("png", "zip", "jpg", "grid", "npz", "webp", "gif")[number % 7]

        def draw(out):
            generate_images(alone().folder, 6, folder / out, format=format)  # noqa: B023

        alone()
        arm = POINTS["rename" if format in ("npz", "gif", "zip") else "picture"]
        at = int(rng.integers(1, 7)) if format in ("png", "jpg", "webp") else 1
        whole = f"{format} whole"
        out = f"{format} {number}"
        if not (folder / whole).exists():
            assert forked(lambda: draw(whole), folder / "log") == 0  # noqa: B023
        code = forked(lambda: (arm(at), draw(out)), folder / "log")  # noqa: B023
        if code != -9 or forked(lambda: draw(out), folder / "log"):  # noqa: B023
            return Found(
                done, [*lost, f"{out}: exit code {code} instead of a kill, or it does not go on"]
            )
        done += 1
        one, two = (
            {path.name: path.read_bytes() for path in (folder / name).iterdir()}
            for name in (whole, out)
        )
        lost += [
            f"{name} in {out}" for name in one.keys() | two.keys() if one.get(name) != two.get(name)
        ]
    return Found(done, lost)


def row_flush(at):
    """A point: before or after a row goes to W&B, with or without W&B's own process."""
    original = wandb.Wandb.write
    calls = itertools.count(1)

    def write(sink, *arguments):
        number = next(calls)
        if number == at and at % 2:
            original(sink, *arguments)
        if number == at:
            for entry in Path("/proc").glob("[0-9]*/stat") if at % 4 < 2 else ():
                name, _, rest = entry.read_text().partition(") ")
                if "wandb-core" in name and rest.split()[1] == str(os.getpid()):
                    os.kill(int(entry.parent.name), 9)
            die()
        original(sink, *arguments)

    wandb.Wandb.write = write
    return lambda: next(calls) - 1


def unsynced(run):
    """What `wandb sync` of a run's offline logs would lack or add."""
    return [] if rows_of(synced(run)) == lines(run) else [f"{run.name}: rows of W&B's logs"]


# name -> f(at): let this process die at its `at`-th coming there; returns a function that says how
# often it came
POINTS = {
    "staging": before(BackgroundWriter, "copied"),
    "serialising": half(torch, "save", 1),
    "fsync": before(os, "fsync"),
    "rename": before(os, "replace"),
    "deletion": before(Path, "unlink"),
    "picture": half(common_pixels, "save_picture", 1),
    "decoding": before(PIL.Image, "open"),
    "row": row_flush,
}
