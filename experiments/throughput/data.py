"""Images a second from our cache and from torchvision's ImageFolder: `python
experiments/throughput/data.py`.

Prints a table and writes data.json beside it. Photos are made of scikit-learn's two sample photos
(640 x 427): crops at random, brought to their size, with grain, as JPEG of quality 90; all of them
are in the system's memory. Both sides give batches of 64 square images in random order to one
process, as they take turns. ImageFolder does so by Resize, CenterCrop and ToTensor in a DataLoader
with each number of workers, of which the best counts: numbers in float32. Ours are uint8, which the
step makes into numbers on the device; "as numbers" does that in the same process. "own array" reads
from a copy instead of the map, "one by one" image by image. What happens once is in seconds:
looking through the folder, decoding into the cache; and opening it again. `run.py --report` shows
the figures. `--toy` does all in seconds, at a size that says nothing, in a folder of its own.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import transforms
from torchvision.datasets import ImageFolder

from ddpm import data
from ddpm.common import pixels as common_pixels
from ddpm.data import cache, loader
from ddpm.data import source as data_source
from ddpm.studies.archive import commit

HERE = Path(__file__).parent
# how many, and sizes by turns
PHOTOS = {"500 px": (512, (500, 375)), "1 to 2 megapixels": (512, (1280, 960), (1600, 1200))}
TOY = {"64 px": (64, (64, 48))}
SIZES = (64, 128)
BATCH = 64
WORKERS = (0, 2)
ROUNDS = 3
SECONDS = 2.0


def make_photos(folder, count, *sizes):
    """Write photos; returns how many bytes they take."""
    rng = np.random.default_rng(0)
    originals = [Image.fromarray(one) for one in load_sample_images().images]
    folder.mkdir(parents=True)
    for number in range(count):
        original = originals[number % 2]
        size = sizes[number // 2 % len(sizes)]
        share = rng.uniform(0.5, 1.0)
        width, height = (round(length * share) for length in original.size)
        left = rng.integers(0, original.width - width + 1)
        top = rng.integers(0, original.height - height + 1)
        photo = original.resize(
            size, Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
        )
        grain = rng.normal(0, 4, (size[1], size[0], 1))
        pixels = (np.asarray(photo) + grain).round().clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.jpg", quality=90)
    return sum(path.stat().st_size for path in folder.iterdir())


def batches(n, seed):
    """Endless lists of indices, each epoch in another order."""
    rng = np.random.default_rng(seed)
    while True:
        yield from rng.permutation(n)[: n // BATCH * BATCH].reshape(-1, BATCH).tolist()


def rate(running, seconds=SECONDS):
    """Images a second of an iterator over batches, the first two not counted: workers start with
    them.
    """
    for _ in range(2):
        next(running)
    start = time.perf_counter()
    count = 0
    while time.perf_counter() - start < seconds:
        count += len(next(running)[0])
    return count / (time.perf_counter() - start)


def our_loader(source, seed):
    return loader.loader(source, batches(len(source), seed))


def folder_loader(folder, size, workers, seed):
    """torchvision's way."""
    look = transforms.Compose(
        [transforms.Resize(size), transforms.CenterCrop(size), transforms.ToTensor()]
    )
    found = ImageFolder(folder, look)
    return iter(
        torch.utils.data.DataLoader(
            found, batch_sampler=batches(len(found), seed), num_workers=workers
        )
    )


def own(source):
    """The source with its images copied into an array of this process."""
    return replace(source, fetch=partial(data_source.row, source.batch(range(len(source))).numpy()))


def measure(photos=PHOTOS, sizes=SIZES, workers=WORKERS, rounds=ROUNDS, seconds=SECONDS):
    """Rows of figures, each a dict: for each kind of photos and size, medians over rounds in
    which all take turns.
    """
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for kind, (count, *shapes) in photos.items():
            folder = Path(work, kind, "photos")
            made = make_photos(folder / "one", count, *shapes)
            for size in sizes:
                rows.append(
                    {"photos": kind, "count": count, "bytes": made, "size": size}
                    | compare(folder, size, Path(work, kind), workers, rounds, seconds)
                )
                print(line(rows[-1]), flush=True)
    return rows


def compare(folder, size, work, workers, rounds, seconds):
    """One row of figures: of the photos in a folder at a size."""
    os.environ["DDPM_CACHE"] = str(work / f"cache {size}")
    spent = {}

    def timed(name, do):
        start = time.perf_counter()
        found = do()
        spent[name] = time.perf_counter() - start
        return found

    plain = timed("look through", lambda: data.open_source(f"folder(path={str(folder)!r})", size))
    timed("decode", lambda: cache.cache_decoded(plain))
    ours = timed(
        "open again",
        lambda: cache.cache_decoded(data.open_source(f"folder(path={str(folder)!r})", size)),
    )
    assert ours.in_memory
    ways = {
        "map": partial(our_loader, ours),
        "map, as numbers": lambda seed: (
            (common_pixels.encode(pixels), labels) for pixels, labels in our_loader(ours, seed)
        ),
        "own array": partial(our_loader, own(ours)),
        "one by one": partial(our_loader, replace(ours, in_memory=False)),
        **{f"ImageFolder, {n} workers": partial(folder_loader, folder, size, n) for n in workers},
    }
    rates = {name: [] for name in ways}
    for turn in range(rounds):
        for name, begin in ways.items():
            running = begin(turn)
            rates[name].append(rate(running, seconds))
            del running
    medians = {name: statistics.median(found) for name, found in rates.items()}
    theirs = max((name for name in ways if name.startswith("ImageFolder")), key=medians.get)

    def times(ours):
        found = [a / b for a, b in zip(rates[ours], rates[theirs], strict=True)]
        return {"median": statistics.median(found), "least": min(found), "most": max(found)}

    return {
        "images a second": medians,
        "best of theirs": theirs,
        "times as many": times("map"),
        "times as many, as numbers": times("map, as numbers"),
        "seconds": spent,
    }


def line(row):
    found = row["images a second"]
    spent = row["seconds"]
    times = row["times as many"]
    return (
        f"{row['photos']} as {row['size']} px: "
        + ", ".join(f"{name} {value:,.0f}" for name, value in found.items())
        + f" images/s; {times['median']:.1f} times {row['best of theirs']} ({times['least']:.1f} "
        f"to {times['most']:.1f}), as numbers {row['times as many, as numbers']['median']:.1f} "
        "times; " + ", ".join(f"{name} {value:.2f} s" for name, value in spent.items())
    )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--toy",
        action="store_true",
        help="seconds instead of minutes, and figures that say nothing",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for data.json, else this one; of --toy a new one"
    )
    given = parser.parse_args(arguments)
    out = given.out or (Path(tempfile.mkdtemp(prefix="ddpm-toy-")) if given.toy else HERE)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = measure(TOY, (16,), (0,), 1, 0.05) if given.toy else measure()
    machine = {
        "cores": os.cpu_count(),
        **{name: version(name) for name in ("torch", "torchvision", "pillow", "numpy")},
    }
    found = {"commit": commit(), "machine": machine, "rows": rows}
    (out / "data.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"the figures are in {out / 'data.json'}")


if __name__ == "__main__":
    main()
