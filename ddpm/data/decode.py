"""Image files -> pixels: opened within limits, converted to sRGB, cropped to squares and resized.

    pixels uint8 [c, image_size, image_size]; c is 1 grey, 2 grey + alpha, 3 RGB or 4 RGBA

Every image file is read here: by training and its scan of a folder, from shards, by commands that
take images, by `ddpm.doctor` and by `ddpm.compare`. So all agree on which files are unreadable.
"""

import contextlib
import errno
import logging
import os
import re
import struct
import traceback
import warnings

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError

from ddpm.data import colour, limits, png
from ddpm.data.limits import FORMATS, MAX_PIXELS, SUFFIXES, UnreadableImage

# Both are in fingerprints, under which decoded images are cached. Increase PREPROCESSING if the
# same file gives other pixels (tests/data/test_decode.py has the pixels of this version), and
# CONVERSION_VERSION if only images with `conversions` do.
PREPROCESSING = "square crop, bicubic, 1"
CONVERSION_VERSION = 2

WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
PIXEL_BUDGET = limits.PixelBudget(MAX_PIXELS)

Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # PIL warns above this number and raises above twice it
ImageFile.LOAD_TRUNCATED_IMAGES = False
# PIL warns on stderr of oddities in files that it reads nevertheless; the notes of a source list
# what is left out.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
# Grey of 16 bits where 0 is white: PIL reads one byte order only and inverts neither, which
# `to_8bit_grey` does.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))


def decode_file(file, image_size, channels, matte=WHITE):
    """The pixels of the first frame of a file, path or open; raises UnreadableImage."""
    with open_image(file) as image:
        return decode(image, image_size, channels, matte)[0]


def decode(image, image_size, channels, matte):
    """A PIL image -> (uint8 [channels, image_size, image_size] upright, conversions in words).

    A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that is at least twice `image_size`, which
    takes a photo a fifth of the time and hardly changes pixels. Raises UnreadableImage.
    """
    if image.format not in (None, "MPO", *FORMATS):  # opened by another library
        raise UnreadableImage("not an image", f"{image.format} is not read")
    with loaded(image, image_size) as extent:
        orientation = orientation_of(image)
        image, conversions = to_srgb_8bit(image)
        return to_pixels(image, image_size, channels, matte, extent, orientation), conversions


def open_thumbnail(path, side):
    """The upright image of a file in RGB, at most `side` wide and high; raises UnreadableImage."""
    with open_image(path) as image:
        with loaded(image, side):
            orientation = orientation_of(image)
            image = to_mode(image, 3, WHITE)
            image.thumbnail((side, side))
    return upright(image, orientation)


def open_picture(path, image_size, channels, matte=WHITE):
    """(pixels, (width, height) upright) of an image file that a user names; raises ValueError."""
    if not os.path.lexists(path):
        raise ValueError(
            f"there is no file {os.path.abspath(path)!r}; give the path of an image file"
        )
    try:
        with open_image(path) as image:
            size = image.size
            pixels, _ = decode(image, image_size, channels, matte)
            return pixels, upright_size(size, orientation_of(image))
    except UnreadableImage as error:
        raise ValueError(
            f"cannot read {os.path.abspath(path)!r} as an image ({error}); give another file, "
            f"one of {', '.join(SUFFIXES)}"
        ) from None


@contextlib.contextmanager
def loaded(image, size):
    """Decode a PIL image, a JPEG at no more than needed for `size`, within the budget of pixels.

    Gives the (width, height) of its content: a reduced JPEG ends within its last pixel.
    """
    full_size = image.size
    reduced = image.draft(None, (2 * size, 2 * size))
    # a progressive JPEG holds its coefficients at full size
    width, height = full_size if image.info.get("progressive") else image.size
    with PIXEL_BUDGET.take(width * height):
        image.load()
        yield reduced[1][2:] if reduced else image.size


@contextlib.contextmanager
def open_image(file):
    """The PIL image of a file (path or open), not decoded; PIL's errors are UnreadableImage."""
    is_open = hasattr(file, "read")
    with contextlib.nullcontext(file) if is_open else limits.open_regular_file(file) as file:
        try:
            limits.check_limits(file)
            source, info = prepare_for_pil(file)
            with Image.open(source, formats=FORMATS) as image:
                image.info |= info
                yield image
        except UnreadableImage:
            raise
        except Exception as error:
            # PIL raises OSError, SyntaxError, struct.error, ValueError, DecompressionBombError ...
            if is_our_fault(error):
                raise
            raise to_unreadable(error, file) from error


def is_our_fault(error):
    """Whether an exception comes from a fault of this program, not of the file: PIL had no part."""
    if isinstance(
        error, (UnreadableImage, OSError, EOFError, MemoryError, colour.UnsupportedColour)
    ):
        return False
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not any(frame.f_globals.get("__name__", "").split(".")[0] == "PIL" for frame in frames)


def to_unreadable(error, file):
    """The UnreadableImage for an exception raised while an open file was read."""
    text = " ".join(str(error).split())[:200]
    if isinstance(error, colour.UnsupportedColour):
        return UnreadableImage("unsupported", text)
    if isinstance(error, MemoryError):
        return UnreadableImage("not readable", "memory is full")
    is_bomb = isinstance(error, Image.DecompressionBombError)
    if is_bomb or "too large" in text or "Too much memory" in text:
        return UnreadableImage("too large", text)
    if isinstance(error, EOFError) or "truncated" in text.lower():
        return UnreadableImage("truncated", text)
    # EINVAL comes from seeking to an invalid place
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return UnreadableImage("not readable", error.strerror)
    if isinstance(error, UnidentifiedImageError):
        return unidentified(file)
    fault = "unsupported" if UNSUPPORTED.search(text) else "broken"
    return UnreadableImage(fault, f"{type(error).__name__} {text}")


def unidentified(file):
    """The UnreadableImage for an open file that PIL cannot identify, with PIL's hidden reason."""
    file.seek(0)
    head = file.read(16)
    # a HEIF; an AVIF is one too, which PIL has tried
    if head[4:12] in (b"ftypmif1", b"ftypmsf1"):
        return UnreadableImage("HEIC")
    form = next((name for name in FORMATS if Image.OPEN[name][1](head) is True), None)
    if form is None:
        return UnreadableImage("not an image")
    file.seek(0)
    text = ""
    try:
        Image.OPEN[form][0](file)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
    fault = "unsupported" if UNSUPPORTED.search(text) else "broken"
    return UnreadableImage(fault, f"its header: {text}")


def prepare_for_pil(file):
    """(the open file that PIL is to read, entries that PIL's image.info lacks)."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    head = file.read(12)
    try:
        if head.startswith(png.SIGNATURE):
            return png.prepare_for_pil(file, size)
        if head[4:8] in (b"ftyp", b"jP  "):
            return file, {"icc_profile": profile_in_boxes(file, size)}
        return file, {"icc_profile": profile_in_bmp(file)} if head.startswith(b"BM") else {}
    finally:
        file.seek(0)


def profile_in_bmp(file):
    """The ICC profile in a Windows bitmap of version 5, or None."""
    file.seek(14)
    head = file.read(124).ljust(124, b"\0")
    length, kind, place, size = (struct.unpack_from("<I", head, at)[0] for at in (0, 56, 112, 116))
    if length != 124 or kind != 0x4D424544 or size > colour.MAX_PROFILE_BYTES:
        return None
    file.seek(14 + place)
    return file.read(size)


def profile_in_boxes(file, size):
    """The ICC profile in an AVIF or a JPEG 2000, or one made from its code points, or None."""
    profile = None
    with contextlib.suppress(struct.error):
        for kind, place, length in limits.boxes(file, size):
            if kind == b"colr":
                file.seek(place)
                content = file.read(min(length, colour.MAX_PROFILE_BYTES))
                if content[:4] in (b"prof", b"rICC"):
                    return content[4:]
                if content[:1] == b"\2":  # JPEG 2000's
                    return content[3:]
                if content[:4] == b"nclx":
                    profile = colour.from_cicp(*struct.unpack(">HH", content[4:8]), True)
    return profile


def orientation_of(image):
    """The EXIF orientation, 1 to 8, of a loaded PIL image; reading it would load the image."""
    try:
        if len(image.info.get("exif") or b"") > limits.MAX_EXIF_SEGMENTS * 2**16:
            return 1
        orientation = image.getexif().get(ORIENTATION, 1)
        return orientation if orientation in TURNS else 1
    except Exception as error:  # an image with a broken EXIF block is still readable
        if is_our_fault(error):
            raise
        return 1


def upright(image, orientation):
    """The PIL image turned upright."""
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def upright_size(size, orientation):
    """(width, height) of an image after it is turned upright."""
    return size[::-1] if orientation >= 5 else size


def to_pixels(image, image_size, channels, matte, extent, orientation=1):
    """A PIL image of any mode -> uint8 [channels, image_size, image_size], cropped and upright.

    `extent` is the width and height of its content, which may end within the last pixel. The filter
    is bicubic with antialiasing, as in clean-fid (Parmar et al. 2022); Lanczos rings more at edges.
    """
    side = min(extent)
    left, top = ((length - side) / 2 for length in extent)
    if side == image_size:  # only cropped: at integer pixels, which does not blur
        left = int(left)
        top = int(top)
    box = (left, top, left + side, top + side)
    size = image_size, image_size
    image = to_mode(image, channels, matte).resize(size, Image.Resampling.BICUBIC, box=box)
    pixels = torch.from_numpy(np.array(upright(image, orientation)))
    return rearrange(pixels, "h w -> 1 h w" if channels == 1 else "h w c -> c h w").contiguous()


def to_mode(image, channels, matte):
    """The PIL image in sRGB in the mode of so many channels; 1 and 3 lay it over `matte`."""
    image, _ = to_srgb_8bit(image)
    if channels in (1, 3) and image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*matte, 255))
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert(MODES[channels])


def to_srgb_8bit(image):
    """(the PIL image in sRGB with 8 bits a channel, the conversions beyond PIL's own in words).

    Leaves an image in that form unchanged. Raises UnreadableImage for values of unknown range.
    """
    tags = getattr(image, "tag_v2", {})
    transparent_level = image.info.get("transparency")
    profile, _ = colour.profile_of(image)
    conversions = [image.info["mended"]] if "mended" in image.info else []
    if image.mode == "F":
        raise UnreadableImage("unknown value range", "floating-point pixels")
    if 2 in tags.get(SAMPLES, ()) and tags.get(BITS) == (8,) and np.asarray(image).max() > 127:
        raise UnreadableImage("unknown value range", "signed pixels")
    if image.mode.startswith("I"):
        image, more = to_8bit_grey(image, tags, transparent_level, profile)
        conversions += more
    elif image.mode == "1" and transparent_level is not None:
        image = image.convert("L")
        image.info["transparency"] = transparent_level
    elif image.format == "BMP" and image.mode == "RGBA" and not image.getextrema()[3][1]:
        # an invisible image is never meant: many programs leave the fourth byte 0
        image = image.convert("RGB")
        conversions.append("transparency everywhere")
    if profile:
        image = colour.to_srgb(image, profile) if "icc_profile" in image.info else image
        conversions.append(profile.name)
    return image, ", ".join(conversions)


def to_8bit_grey(image, tags, transparent_level, profile):
    """(a grey PIL image of more bits in mode L or LA, conversions other than dividing by 257)."""
    values = np.asarray(image).astype(np.int32)
    bits = tags.get(BITS, (16,))[0]
    conversions = []
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage("unknown value range", "32-bit or signed pixels")
    alpha = None
    if transparent_level is not None:
        alpha = Image.fromarray(np.where(values == transparent_level, 0, 255).astype(np.uint8))
    full = 65535
    if bits < 16:
        full = 2**bits - 1
        conversions.append(f"{bits} bits")
    if tags.get(PHOTOMETRIC) == 0:
        values = full - values
        conversions.append("0 is white")
    levels = np.rint(values * (255 / full)) if full < 65535 else (values + 128) // 257
    if profile:
        levels = np.rint(np.interp(values * (255 / full), np.arange(256), profile.tone()))
    grey = Image.fromarray(levels.astype(np.uint8))
    if alpha:
        grey.putalpha(alpha)
    return grey, conversions


def exceeds_8_bits(image):
    """Whether a PIL image, not loaded yet, has signed values or more than 8 bits a channel."""
    forms = []
    for tile in image.tile:
        forms += tile[3] if isinstance(tile[3], tuple) else tile[3:4]
    if image.mode.startswith("I") or 2 in getattr(image, "tag_v2", {}).get(SAMPLES, ()):
        return True
    return image.format in ("PNG", "TIFF") and any(";16" in str(form) for form in forms)


def largest_value(image):
    """The largest value, of 65535, in a PIL image of more than 8 bits a channel.

    PIL keeps the upper 8 bits of colours; of a transparent image alpha counts too.
    """
    if not image.mode.startswith("I"):
        return int(np.max(image.getextrema())) * 256 + 255
    largest = int(np.asarray(image).max())
    bits = getattr(image, "tag_v2", {}).get(BITS, (16,))[0]
    return largest * 65535 // (2**bits - 1 if bits < 16 else 65535)


UNSUPPORTED = re.compile(r"(?i)unsupported|not (yet )?supported|unknown pixel mode|cannot handle")
ORIENTATION = 0x0112  # of EXIF; the others are tags of TIFF
BITS = 258
PHOTOMETRIC = 262
SAMPLES = 339  # 2 is signed
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
