"""Files that were made to do harm are refused in little time and memory, and what broke once
stays mended.
"""

import hashlib
import io
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm import data
from ddpm.data import decode, limits, streaming
from ddpm.experiment import drawing
from support.pictures import attacks, saved
from support.runs import tiny

ROOT = Path(__file__).parents[2]
GIB = 2**30


CHILD = """
import resource, sys
from pathlib import Path
from ddpm import doctor
from ddpm.data import decode, folder
resource.setrlimit(resource.RLIMIT_AS, (6 * 2**30,) * 2)  # beyond which memory is refused
before = resource.getrusage(resource.RUSAGE_SELF)
found = folder.scan_folder(sys.argv[1])
for name, one in zip(found.names, found.infos):
    try:
        decode.decode_file(found.root / name, 32, 3)
        said = ""
    except decode.UnreadableImage as refused:
        said = refused.fault
    assert said == one.fault, (name, said, one.fault)
    try:
        decode.open_picture(found.root / name, 32, 3)
    except ValueError as error:
        assert said in str(error) and "\\n" not in str(error), error
    print(name, one.fault, sep=":")
doctor.contact_sheet(doctor.diagnose(sys.argv[1], 32, 0.1), decode.WHITE)
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_maxrss - before.ru_maxrss, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
"""


def test_files_made_to_do_harm_are_refused_in_little_time_and_memory(tmp_path):
    """By training's scan, the doctor with its sheet, and the commands that take pictures: all of
    them, one after the other.
    """
    made = attacks()
    for name, (content, _) in made.items():
        (tmp_path / name).write_bytes(content)
    with open(tmp_path / "sparse.png", "wb") as file:
        file.write(made["size.png"][0][:100])
        file.truncate(100 * GIB)
    os.mkfifo(tmp_path / "pipe.gif")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    expected = {name: fault for name, (_, fault) in made.items()}
    expected |= {"sparse.png": "too large", "pipe.gif": "not a file", "zero.jpg": "not a file"}
    child = subprocess.run(
        [sys.executable, "-c", CHILD, tmp_path],
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert child.returncode == 0, child.stderr[-2000:]
    *lines, used = child.stdout.splitlines()
    assert dict(line.split(":") for line in lines) == expected
    memory, seconds = used.split()
    # Measured: 0.2 GiB and 5 s. Without limits one of them took 2 GiB, others a minute and more.
    assert int(memory) < 2**20 and float(seconds) < 60


def test_pictures_in_shards_and_at_the_commands_are_refused_too(tmp_path):
    bomb = attacks()["size.png"][0]
    with pytest.raises(ValueError, match="is not a readable image"):
        streaming.fetch_sample(Samples({"image": bomb}), "image", 16, 3, decode.WHITE, 0)
    script = Image.new("RGB", (9, 9))
    script.format = "EPS"  # as another library would open it
    with pytest.raises(ValueError, match="is not a readable image"):
        streaming.fetch_sample(Samples({"image": script}), "image", 16, 3, decode.WHITE, 0)
    (tmp_path / "bomb.png").write_bytes(bomb)
    os.mkfifo(tmp_path / "pipe.png")
    for name, fault in (
        ("bomb.png", "too large"),
        ("pipe.png", "not a file"),
        ("", "not a file|not readable"),
    ):
        with pytest.raises(ValueError, match=rf"cannot read .* as an image \(({fault})"):
            drawing.pictures(tiny(), [tmp_path / name])
    with pytest.raises(ValueError, match="there is no file"):
        drawing.pictures(tiny(), [tmp_path / "none.png"])


class Samples(list):
    """Samples as shards give them."""

    folder = "shards"

    def __init__(self, *samples):
        super().__init__(samples)


def test_a_file_that_changes_or_goes_after_the_scan_is_one_line(tmp_path):
    for k in range(3):
        (tmp_path / f"{k}.png").write_bytes(saved("PNG", (20, 20), "RGB"))
    source = data.open_source(f"folder(path={str(tmp_path)!r})", 8, 3)
    (tmp_path / "1.png").write_bytes(saved("PNG")[:60])
    (tmp_path / "2.png").unlink()
    for index, fault in (
        (1, "1.png could be read before, and now is "),
        (2, "2.png .* now is not readable: No such file"),
    ):
        with pytest.raises(ValueError, match=fault) as error:
            source[index]
        assert "\n" not in str(error.value)


def test_large_pictures_wait_for_each_other():
    room = limits.PixelBudget(10)
    most = 10
    inside = [0]
    peak = [0]

    def work(pixels):
        with room.take(pixels):
            inside[0] += pixels
            peak[0] = max(peak[0], inside[0])
            time.sleep(0.01)
            inside[0] -= pixels

    threads = [
        threading.Thread(target=work, args=(pixels,)) for pixels in (4, 5, 6, 4, 3, 9, 1, 1) * 4
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert inside == [0] and 6 < peak[0] <= most
    with room.take(50):  # alone, and larger than the room
        pass
    assert room.taken == 0


def test_limits_are_where_they_say():
    assert (
        Image.MAX_IMAGE_PIXELS * 2 == limits.MAX_PIXELS
        and not decode.ImageFile.LOAD_TRUNCATED_IMAGES
    )
    # 134 million pixels
    assert decode.decode_file(io.BytesIO(saved("PNG", (11585, 11585), "1")), 8, 1).shape == (
        1,
        8,
        8,
    )
    with pytest.raises(decode.UnreadableImage, match="too large"):
        decode.decode_file(io.BytesIO(saved("PNG", (11586, 11586), "1")), 8, 1)


def sample_files():
    """Lossless files of the kinds that decoding treats differently: name -> content."""
    y, x = np.mgrid[:30, :40]
    levels = (x * 7 + y * 13 + x * y) % 256
    grey = Image.fromarray(levels.astype(np.uint8))
    colours = Image.fromarray(np.dstack([levels, 255 - levels, y * 8]).astype(np.uint8))
    palette = Image.frombytes("P", (40, 30), (levels // 16).astype(np.uint8).tobytes())
    palette.putpalette([value * 37 % 256 for value in range(48)])
    alpha = colours.copy()
    alpha.putalpha(grey)
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 6
    deep = Image.fromarray((levels * 256 + x).astype(np.uint16))
    kinds = {
        "rgb": (colours, "PNG", {}),
        "alpha": (alpha, "PNG", {}),
        "palette": (palette, "PNG", {"transparency": 3}),
        "16 bits": (deep, "PNG", {}),
        "bits": (grey.point(lambda level: 255 * (level > 99), "1"), "BMP", {}),
        "CMYK": (colours.convert("CMYK"), "TIFF", {}),
        "rotated": (colours, "PNG", {"exif": exif}),
        "square": (colours.crop((0, 0, 30, 30)), "PNG", {}),
    }
    contents = {}
    for name, (image, form, options) in kinds.items():
        file = io.BytesIO()
        image.save(file, form, **options)
        contents[name] = file.getvalue()
    return contents


# what PREPROCESSING and CONVERSION_VERSION stand for: the pixels of `sample_files`
PIXELS = {
    (
        "square crop, bicubic, 1",
        2,
    ): "9eb2e3da57b56c1e4ffc77f3619eb36dcfa8946ff17dcc480ada1058cc3dfd2d"
}


def test_other_pixels_need_another_version_of_the_preprocessing():
    """Or caches and runs would silently mix images of two versions."""
    digest = hashlib.sha256()
    for content in sample_files().values():
        for channels, size in ((3, 16), (1, 30), (4, 8)):
            pixels = decode.decode_file(io.BytesIO(content), size, channels, (9, 90, 200))
            digest.update(pixels.numpy().tobytes())
    version = decode.PREPROCESSING, decode.CONVERSION_VERSION
    assert PIXELS.get(version) == digest.hexdigest(), (
        "files give other pixels than before: increase PREPROCESSING or CONVERSION_VERSION in "
        "ddpm/data/decode.py and enter the new digest here, or restore the old pixels"
    )
