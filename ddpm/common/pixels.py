"""Conversion between floats and pixels, grids, and pictures on disk.

Images are uint8 [b, c, h, w] in 0..255 (files, metrics, grids) or float [b, c, h, w] in [-1, 1]
(networks); c is 1 grey, 2 grey + alpha, 3 RGB or 4 RGBA. Files are written atomically.
"""

import contextlib
import hashlib
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image

from ddpm.common.files import atomic_write

WHITE = 255
NUMBERED = re.compile(r"\d{6,}\.(png|jpg|webp)")  # the names that `numbered` gives
# next to them: a JSON line with the name and digest of each written picture
RECORD = ".drawing.jsonl"


def encode(pixels):
    """Map uint8 pixels of any shape to float32 in [-1, 1]."""
    assert pixels.dtype == torch.uint8, f"pixels are uint8, got {pixels.dtype}"
    return pixels.to(torch.float32) / 127.5 - 1


def denormalize(images):
    """Map a network's float images in [-1, 1] to float32 in [0, 1], clamped; NaN becomes 0."""
    if not images.is_floating_point():
        raise ValueError(
            f"images are {images.dtype}; denormalize takes the floats of a network, in [-1, 1]"
        )
    return (torch.nan_to_num(images.to(torch.float32).clamp(-1, 1), nan=-1.0) + 1) / 2


def decode(images):
    """Clamp and round a network's images to uint8, the inverse of `encode`; NaN becomes 0."""
    return as_pixels(denormalize(images))


def as_pixels(images, value_range=(0, 1)):
    """Map float images in `value_range` (black, white) to uint8; uint8 images are returned as is.

    Raises ValueError for floats outside the range by over half a pixel value, and other types.
    """
    if images.dtype == torch.uint8:
        return images
    low, high = value_range
    if not images.is_floating_point() or not low < high:
        raise ValueError(
            f"images are {images.dtype} with value_range={value_range}; give uint8 pixels, or "
            "floats and their range (low, high)"
        )
    images = images.to(torch.float32)
    step = (high - low) / WHITE
    if images.numel():
        least, most = (value.item() for value in images.aminmax())
        if not (low - step / 2 <= least and most <= high + step / 2):
            raise ValueError(
                f"images reach from {least:.4g} to {most:.4g} and cannot be in "
                f"value_range={value_range}; give their own, such as value_range=(-1, 1), or "
                "denormalize(images), which clamps those of a network"
            )
    return ((images.clamp(low, high) - low) / (high - low) * WHITE).round().to(torch.uint8)


def make_grid(images, nrow=None, padding=2):
    """Arrange uint8 images [b, c, h, w] on white as numpy [h, w, c]; ValueError for no images."""
    count = len(images)
    if count == 0 or (nrow is not None and nrow < 1):
        raise ValueError(
            f"a grid of {count} images with nrow={nrow} is empty; give at least one image and "
            "nrow >= 1"
        )
    columns = min(nrow or math.ceil(math.sqrt(count)), count)
    missing = -count % columns
    cells = F.pad(images.cpu(), (padding, 0, padding, 0, 0, 0, 0, missing), value=WHITE)
    grid = rearrange(cells, "(rows columns) c h w -> c (rows h) (columns w)", columns=columns)
    return rearrange(F.pad(grid, (0, padding, 0, padding), value=WHITE), "c h w -> h w c").numpy()


def save_image_grid(images, path, nrow=None, value_range=(0, 1)):
    """Save images [b, c, h, w], uint8 or floats in `value_range`, as one picture at `path`.

    `nrow` images per row, by default as square as possible. Raises ValueError for another shape,
    values outside the range, or a suffix that is not in `PICTURES`.
    """
    suffix = check_picture(path)
    if images.ndim != 4:
        raise ValueError(
            f"images have shape {tuple(images.shape)}; a grid takes [b, c, h, w], such as "
            "image.unsqueeze(0)"
        )
    pixels = make_grid(as_pixels(images.detach(), value_range), nrow)
    with atomic_write(path) as part:
        save_picture(pixels, part, suffix)


def check_picture(path):
    """The suffix of a path in lower case; raises ValueError if it is not in `PICTURES`."""
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURES:
        raise ValueError(
            f"cannot save a picture as {str(path)!r}; use one of the suffixes {', '.join(PICTURES)}"
        )
    return suffix


def picture(pixels):
    """The PIL image of uint8 numpy pixels [h, w, c]: modes L, LA, RGB, RGBA for c = 1, 2, 3, 4."""
    return Image.fromarray(rearrange(pixels, "h w 1 -> h w") if pixels.shape[-1] == 1 else pixels)


def flattened(image):
    """The PIL image on white, for formats without alpha; opaque images are returned as is."""
    if image.mode not in ("LA", "RGBA"):
        return image
    ground = Image.new("RGBA", image.size, "white")
    ground.alpha_composite(image.convert("RGBA"))
    return ground.convert("L" if image.mode == "LA" else "RGB")


def save_picture(pixels, file, suffix):
    """Write uint8 numpy pixels [h, w, c] to a path or open file; `suffix` is a key of PICTURES."""
    options = PICTURES[suffix]
    image = picture(pixels)
    (flattened(image) if options["format"] == "JPEG" else image).save(file, **options)


def digest(path):
    """A checksum of a file's bytes."""
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=16).hexdigest()


def recorded(folder):
    """The (name, digest) pairs of the numbered pictures of the present drawing in a folder."""
    record = Path(folder, RECORD)
    known = set()
    for line in record.read_bytes().splitlines() if record.is_file() else ():
        # the last line may be incomplete
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            known.add(tuple(map(str, json.loads(line))))
    return known


def remove_drawing(folder, others_stay=False):
    """Remove the recorded pictures of an earlier drawing from a folder; returns their number.

    Raises ValueError for pictures that differ from the record; with `others_stay` they stay.
    """
    known = recorded(folder)
    numbered = sorted(path for path in Path(folder).iterdir() if NUMBERED.fullmatch(path.name))
    drawn = [path for path in numbered if path.is_file() and (path.name, digest(path)) in known]
    others = [path.name for path in numbered if path not in drawn]
    if others and not others_stay:
        raise ValueError(
            f"{folder} holds numbered pictures that no drawing is known to have written as they "
            f"are ({len(others)}, such as {others[0]}); move them away, or give another --out"
        )
    # of a process killed while it wrote a picture
    killed = [Path(folder, f"{name}.part") for name, *_ in known if NUMBERED.fullmatch(name)]
    for path in [*drawn, *killed, Path(folder, RECORD)]:
        path.unlink(missing_ok=True)
    return len(drawn)


def file_or_in(out, format):
    """The file for a format of SINGLE: `out` if its suffix fits, else the default name in it."""
    name, suffixes = SINGLE[format]
    is_file = Path(out).suffix.lower() in suffixes and not Path(out).is_dir()
    return Path(out) if is_file else Path(out, name)


def folder_of(out, format, only=False):
    """The folder that a format writes to; `out` is it or, unless `only`, the format's one file.

    Raises ValueError if `out` is named like a file that the format does not write.
    """
    suffix = Path(out).suffix.lower()
    kind = next((kind for kind, (_, suffixes) in SINGLE.items() if suffix in suffixes), None)
    if kind is None or Path(out).is_dir():
        return Path(out)
    if only or kind != format:
        if format in SINGLE and not only:
            raise ValueError(
                f"--out={out} is not named like a file of --format={format}; end it with "
                f"{SINGLE[format][1][0]}"
            )
        raise ValueError(
            f"--out={out} is named like a file, and --format={format} writes a folder; write "
            f"--format={kind}, or --out={Path(out).with_suffix('')}"
        )
    return Path(out).parent


PICTURES = {
    ".png": {"format": "PNG"},
    ".jpg": {"format": "JPEG", "quality": 95},
    ".jpeg": {"format": "JPEG", "quality": 95},
    ".webp": {"format": "WEBP", "lossless": True, "exact": True},
}

# formats of one file: its default name in a folder, and the suffixes that `out` may have
SINGLE = {
    "grid": ("grid.png", tuple(PICTURES)),
    "npz": ("images.npz", (".npz",)),
    "zip": ("images.zip", (".zip",)),
    "gif": ("trajectory.gif", (".gif",)),
}
