"""Writes drawn images: numbered PNGs, one grid, an npz array, a zip or a GIF."""

import io
import json
import shutil
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from ddpm.common import pixels as common_pixels
from ddpm.common.files import atomic_write, make_folder


def numbered(suffix):
    """A writer of one file per image, `000017.png` for image 17; fsync would take too long."""

    def write(out, batches):
        make_folder(out)  # also where no image comes
        paths = []
        for seeds, images in batches:
            for seed, pixels in zip(seeds, channels_last(images), strict=True):
                path = Path(out) / f"{seed:06d}{suffix}"
                part = path.with_name(path.name + ".part")
                try:
                    common_pixels.save_picture(pixels, part, suffix)
                    with open(Path(out, common_pixels.RECORD), "a") as record:
                        record.write(json.dumps([path.name, common_pixels.digest(part)]) + "\n")
                    paths.append(part.replace(path))
                finally:
                    part.unlink(missing_ok=True)
        return paths

    return write


def channels_last(images):
    """Uint8 [b, c, h, w] on any device -> contiguous numpy [b, h, w, c]."""
    return np.ascontiguousarray(rearrange(images.cpu(), "b c h w -> b h w c").numpy())


def grid(out, batches):
    """Write all images as one picture, `grid.png`."""
    path = common_pixels.file_or_in(out, "grid")
    common_pixels.save_image_grid(torch.cat([images.cpu() for _, images in batches]), path)
    return [path]


def npz(out, batches):
    """Write `images.npz`, uint8 [n, h, w, c] as `arr_0`, for guided-diffusion's evaluator.

    Its header holds the number of images, known only at the end: pixels wait in a temporary file.
    """
    path = common_pixels.file_or_in(out, "npz")
    count = 0
    shape = ()
    with atomic_write(path) as part, tempfile.TemporaryFile(dir=path.parent) as waiting:
        for _, images in batches:
            pixels = channels_last(images)
            count += len(pixels)
            shape = pixels.shape[1:]
            waiting.write(pixels)
        waiting.seek(0)
        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
        with (
            zipfile.ZipFile(part, "w") as archive,
            archive.open("arr_0.npy", "w", force_zip64=True) as member,
        ):
            np.lib.format.write_array_header_1_0(member, header)
            shutil.copyfileobj(waiting, member, 2**20)
    return [path]


def zipped(out, batches):
    """Write `images.zip`, uncompressed PNG files; the same images give the same bytes."""
    path = common_pixels.file_or_in(out, "zip")
    with atomic_write(path) as part, zipfile.ZipFile(part, "w") as archive:
        for seeds, images in batches:
            for seed, pixels in zip(seeds, channels_last(images), strict=True):
                file = io.BytesIO()
                common_pixels.save_picture(pixels, file, ".png")
                member = zipfile.ZipInfo(f"{seed:06d}.png")  # dated 1980, not now
                member.external_attr = 0o644 << 16  # or Unix unpacks files that nobody may read
                archive.writestr(member, file.getvalue())
    return [path]


def gif(out, batches):
    """Write `trajectory.gif`, a grid for each batch: the same images at successive steps."""
    path = common_pixels.file_or_in(out, "gif")
    grids = [common_pixels.make_grid(images) for _, images in batches]
    frames = [common_pixels.flattened(common_pixels.picture(pixels)) for pixels in grids]
    if not frames:
        raise ValueError(
            "an animation needs at least one frame; give a sampler that takes at least one step"
        )
    # milliseconds, in GIF's ticks of 10: about 4 s in all, and longer for more than 200 frames
    pace = min(max(4000 // len(frames) // 10 * 10, 20), 200)
    with atomic_write(path) as part:
        durations = [pace] * (len(frames) - 1) + [2000]
        frames[0].save(
            part, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0
        )
    return [path]


# name -> f(out, batches) -> paths written; `out` is a folder, or the file of a format in SINGLE,
# `batches` an iterator of (seeds, uint8 [b, c, h, w]).
FORMATS = {
    "png": numbered(".png"),
    "jpg": numbered(".jpg"),
    "webp": numbered(".webp"),
    "grid": grid,
    "npz": npz,
    "zip": zipped,
    "gif": gif,
}
