"""Images that are broken, made to do harm, or changed while they are read: a training learns
from the others as if alone.
"""

import io
import os
import threading
import time

import numpy as np
from faults import Found, differences, forked, small, training
from PIL import Image

from ddpm import data
from ddpm.data import folder as data_folder
from support.pictures import attacks

KINDS = (
    ("JPEG", "RGB", {}),
    ("JPEG", "L", {"progressive": True}),
    ("PNG", "RGB", {}),
    ("PNG", "P", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("BMP", "RGB", {}),
    ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    ("TIFF", "CMYK", {}),
    ("GIF", "P", {}),
)
GOOD = 12


def photo(rng, form="PNG", mode="RGB", options=None):
    """The content of an image file of noise."""
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (24, 28, 3), dtype=np.uint8)).convert(mode).save(
        file, form, **(options or {})
    )
    return file.getvalue()


def damaged(rng):
    """(suffix, content): a file of a format drawn from KINDS, cut off, or with some of its bytes
    changed.
    """
    form, mode, options = KINDS[rng.integers(len(KINDS))]
    content = bytearray(photo(rng, form, mode, options))
    if rng.random() < 0.3:
        del content[rng.integers(len(content)) :]
    for _ in range(rng.integers(1, 9)):
        if content:
            content[rng.integers(min(len(content), 10 ** rng.integers(1, 5)))] = rng.choice(
                (0, 1, 127, 128, 255)
            )
    return form.lower(), bytes(content)


def among_good_ones(folder, times, seed):
    """Half of the bad files are made to do harm, the others are damaged; of these some can be
    read still, and are learned.
    """
    rng = np.random.default_rng(seed)
    photos = folder / "photos"
    photos.mkdir()
    for number in range(GOOD):
        (photos / f"{number:04} good.png").write_bytes(photo(rng))
    hostile = list(attacks().items())
    for number in range(times):
        name = hostile[number // 2 % len(hostile)][0]
        content = hostile[number // 2 % len(hostile)][1][0]
        if number % 2:
            suffix, content = damaged(rng)
            name = f"damaged.{suffix}"
        (photos / f"{number * GOOD // times:04} {number:05} {name}").write_bytes(content)
    given = small(
        data__source=f"folder(path={str(photos)!r})",
        data__channels=3,
        data__cache="none",
        evaluate__extractor="none",
    )
    begun = time.monotonic()
    found = data_folder.scan_folder(photos)
    spent = time.monotonic() - begun
    faults = found.faults(16)
    lost = [
        f"{name} is left out: {fault}"
        for name, fault in zip(found.names, faults, strict=True)
        if fault and "good" in name
    ]
    codes = [forked(training(given, folder / "run"), folder / "log", limit=1200)]
    for name, fault in zip(found.names, faults, strict=True):
        if fault:
            (photos / name).unlink()
    codes.append(forked(training(given, folder / "whole"), folder / "log", limit=1200))
    lost += [f"exit codes {codes}"] if any(codes) else differences(folder / "whole", folder / "run")
    left = sum(map(bool, faults))
    return Found(
        times,
        lost,
        f"{left:,} left out for what is wrong with them, {times - left:,} can be read; "
        f"{spent:.0f} s",
    )


def while_read(folder, times, seed):
    """The folder is read so many times while its files are written, cut off, replaced by a pipe
    and removed.
    """
    rng = np.random.default_rng(seed)
    done = threading.Event()
    lost = []
    first = photo(rng)
    content = photo(rng)
    for number in range(GOOD):
        (folder / f"{number}.png").write_bytes(content if number else first)

    def meddle():
        while not done.is_set():
            path = folder / f"{rng.integers(1, GOOD)}.png"  # the first is left alone
            path.unlink(missing_ok=True)
            match rng.integers(4):
                case 0:
                    path.write_bytes(content)
                case 1:
                    path.write_bytes(content[: rng.integers(len(content))])
                case 2:
                    os.mkfifo(path)

    thread = threading.Thread(target=meddle)
    thread.start()
    try:
        for _ in range(times):
            source = data.open_source(f"folder(path={str(folder)!r})", 16, 3)
            lost += [] if source[0].shape == (3, 16, 16) else ["the first image is another"]
    finally:
        done.set()
        thread.join()
    found = data_folder.scan_folder(folder)
    for name, fault in zip(found.names, found.faults(16), strict=True):
        whole = (folder / name).is_file() and (
            name == "0.png" or (folder / name).read_bytes() == content
        )
        lost += (
            []
            if whole == (not fault)
            else [f"{name} is {'' if whole else 'not '}whole, and said to be {fault or 'whole'}"]
        )
    return Found(times, lost)
