"""Files rot, disks fill up, and two commands want one folder: what is whole is kept, and a line
says what was found.
"""

import contextlib
import io
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
from crashes import alone
from faults import Found, before_call, differences, forked, last_line, small, training

from ddpm.common import pixels, safe_load
from ddpm.training import checkpoint, weights
from support.runs import equal

DAMAGE = "is damaged"


def flipped(content, rng):
    """The bytes with one bit changed."""
    changed = bytearray(content)
    changed[rng.integers(len(changed))] ^= 1 << rng.integers(8)
    return bytes(changed)


def cut(content, rng):
    """The first of the bytes."""
    return content[: rng.integers(len(content))]


def unseen(folder, times, seed):
    """Flips of one bit anywhere in a checkpoint or in exported weights, and cuts; what is read
    is the same or is refused.
    """
    rng = np.random.default_rng(seed)
    whole = alone().folder
    found = 0
    lost = []
    places = [
        (checkpoint.checkpoints(whole)[-1][1], checkpoint.load, lambda read: read),
        (
            whole / "final.safetensors",
            weights.exported,
            lambda read: (read[0]["step"], read[0]["config"], read[1]),
        ),
    ]
    for number in range(times):
        path, read, told = places[number % 2]
        content = path.read_bytes()
        other = folder / f"other{path.suffix}"
        other.write_bytes((cut if number % 8 > 5 else flipped)(content, rng))
        try:
            same = equal(told(read(other)), told(read(path)))
        except ValueError as error:
            same = "damaged" in str(error)
            found = found + 1
        if not same:
            lost.append(f"a change of {path.name} that was not seen")
    return Found(
        times, lost, f"{found:,} refused, {times - found:,} where nothing that is read was changed"
    )


def rotten(folder, times, seed):
    """The newest checkpoint of a run is damaged, or the newest two; it is drawn from the one
    before, and trained on from it.
    """
    rng = np.random.default_rng(seed)
    whole = alone().folder
    lost = []
    for number in range(times):
        run = shutil.copytree(whole, folder / f"run {number}")
        (step, _), *newer = checkpoint.checkpoints(run)[-2 - number % 2 :]
        contents = {}
        for _, path in newer:
            while True:
                contents[path] = (cut, flipped)[number // 2 % 2](path.read_bytes(), rng)
                path.write_bytes(contents[path])
                with contextlib.suppress(safe_load.CorruptFile):
                    checkpoint.load(path)
                    continue
                break
        (run / "final.safetensors").unlink()
        with contextlib.redirect_stderr(io.StringIO()) as told:
            drawn = weights.load_weights(run)[1]
        if drawn != step or told.getvalue().count(DAMAGE) != len(newer):
            lost.append(f"{run.name}: drawn from step {drawn}, said {told.getvalue()!r}")
        code = forked(training(small(), run), log := folder / f"log {number}")
        said = [line for line in log.read_text().splitlines() if DAMAGE in line]
        if (
            code
            or len(said) != len(newer)
            or not all(f"goes on from step {step}" in line for line in said)
        ):
            lost.append(f"{run.name}: exit code {code}, said {said}")
        kept = [path.with_name(path.name + ".damaged") for path in contents]
        if [path.read_bytes() for path in kept] != list(contents.values()):
            lost.append(f"{run.name}: the damaged file itself")
        lost += differences(whole, run)
        shutil.rmtree(run)
    return Found(times, lost)


def all_rotten(folder, times, seed):
    """All checkpoints of a run are damaged: one line, exit code 2, and not a byte of the folder
    is touched.
    """
    rng = np.random.default_rng(seed)
    whole = alone().folder
    lost = []
    for number in range(times):
        run = shutil.copytree(whole, folder / f"run {number}")
        for _, path in checkpoint.checkpoints(run):
            path.write_bytes(cut(path.read_bytes(), rng))
        before = contents_of(run)
        code = forked(training(small(), run), log := folder / f"log {number}")
        if (
            code != 2
            or "all checkpoints in " not in last_line(log)
            or len(log.read_text().splitlines()) > 1
        ):
            lost.append(f"{run.name}: exit code {code}, said {last_line(log)!r}")
        if contents_of(run) != before:
            lost.append(f"{run.name}: its files were changed")
    return Found(times, lost)


def contents_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def disk(folder, size):
    """A small disk of so many bytes at a folder, if this process may mount one: yields
    `f(bytes)` that resizes it.
    """

    def mount(option):
        command = ["mount", "-t", "tmpfs", "-o", option, "tmpfs", str(folder)]
        return (
            sys.platform == "linux" and subprocess.run(command, capture_output=True).returncode == 0
        )

    folder.mkdir()
    mounted = mount(f"size={size // 1024}k")
    try:
        yield (lambda size: mount(f"remount,size={size // 1024}k")) if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", str(folder)], check=True)


def full(folder, times, seed):
    """A disk is full, or a file is too long for it, somewhere in a training; with room the same
    command goes on.
    """
    rng = np.random.default_rng(seed)
    whole = alone().folder
    lost = []
    ways = set()
    sizes = [path.stat().st_size for path in whole.rglob("*.pt")]
    for number in range(times):
        place = folder / f"disk {number}"
        log = folder / f"log {number}"
        with disk(place, int(rng.uniform(0.1, 1) * sum(sizes))) as resize:
            run = place / "run"
            limit = int(rng.uniform(0.1, 1) * max(sizes))
            full_disk = resize is not None and number % 4 < 3
            ways.add("a full tmpfs" if full_disk else "RLIMIT_FSIZE")

            def limited():
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: B023
                return training(small(), run)()  # noqa: B023

            if not full_disk and resize:
                resize(4 * sum(sizes))
            code = forked(training(small(), run) if full_disk else limited, log)
            said = [
                line
                for line in log.read_text().splitlines()
                if line.startswith(("failed: ", "error: "))
            ]
            if (
                code not in (1, 2)
                or len(said) != 1
                or ("free some space" if full_disk else "File too large") not in said[0]
            ):
                lost.append(f"disk {number}: exit code {code}, said {said}")
            for _, path in checkpoint.checkpoints(run):
                checkpoint.load(path)  # none is torn
            if full_disk:
                resize(4 * sum(sizes))
            code = forked(training(small(), run), folder / "log")
            lost += (
                [f"disk {number}: exit code {code} with room"] if code else differences(whole, run)
            )
    return Found(times, lost, f"by {' and '.join(sorted(ways))}")


def shared(folder, times, seed):
    """A second training of a run folder is begun while a first is at it: it is refused, and the
    first does not notice.
    """
    rng = np.random.default_rng(seed)
    whole = alone().folder
    lost = []
    for number in range(times):
        run = folder / f"run {number}"
        second = folder / f"log {number}"
        at = int(rng.integers(1, 6))

        def first():
            def begin():
                (folder / f"code {number}").write_text(str(forked(training(small(), run), second)))  # noqa: B023

            before_call(pixels, "save_image_grid", at, begin)  # noqa: B023
            return training(small(), run)()  # noqa: B023

        if code := forked(first, folder / "log"):
            lost.append(f"{run.name}: exit code {code} of the first")
        code = (folder / f"code {number}").read_text()
        if (
            code != "2"
            or "is in use by another process" not in second.read_text()
            or len(second.read_text().splitlines()) > 1
        ):
            lost.append(
                f"{run.name}: exit code {code} of the second, which said {last_line(second)!r}"
            )
        lost += differences(whole, run)
    return Found(times, lost)
