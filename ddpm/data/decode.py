"""Image files of strangers: opened within limits, decoded to squares, and examined.

    pixels uint8 [c, image_size, image_size] in sRGB; c is 1 grey, 2 grey + alpha, 3 RGB or 4 RGBA

Whoever reads an image file reads it here: training and its scan of a folder, shards, the pictures
that a person names, `ddpm.doctor`, and `ddpm.compare` the samples of runs. So they agree on what is
broken, and a file that was made to do harm costs one line, not the memory of the machine or an
hour.
"""

import base64
import contextlib
import errno
import logging
import os
import re
import stat
import struct
import threading
import traceback
import warnings
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageFile, TiffImagePlugin, UnidentifiedImageError, features

from ddpm.data import colour, png

# in every fingerprint: count it up when the same file gives other pixels
PREPROCESSING = "square crop, bicubic, 1"


WHITE = (255, 255, 255)
BLACK = (0, 0, 0)
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
SUFFIXES = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".gif": "GIF",
    ".avif": "AVIF",
    ".jp2": "JPEG2000",
    ".j2k": "JPEG2000",
    ".jpf": "JPEG2000",
    ".jpx": "JPEG2000",
}
CAMERA_RAW = "camera raw"
UNREADABLE_SUFFIXES = {
    ".heic": "HEIC",
    ".heif": "HEIC",
    ".hif": "HEIC",
    ".jxl": "JPEG XL",
} | dict.fromkeys(
    # suffixes of pictures that PIL lacks
    (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
    CAMERA_RAW,
)


def is_readable_format(form):
    """Whether this PIL reads a format: AVIF it has only learned of late, and JPEG 2000 it may be
    built without.
    """
    if form == "AVIF":
        try:
            from PIL import AvifImagePlugin
        except ImportError:  # before 11.3
            return False
        return AvifImagePlugin.SUPPORTED
    return form != "JPEG2000" or features.check("jpg_2000")


# No other is tried: PIL's readers of EPS, PSD, FITS ... never see a file.
FORMATS = tuple(filter(is_readable_format, dict.fromkeys(SUFFIXES.values())))

# More than nearly any camera makes. PIL takes 4 bytes a pixel, and four times that for a moment
# where there is transparency.
MAX_PIXELS = 2**27
MAX_BYTES = 2**29  # of a file: MAX_PIXELS of RGB and a quarter more, uncompressed
# chunks and blocks, each of which costs microseconds: what it takes for MOST_BYTES in pieces of 8
# KiB
MAX_PARTS = 2**16
MAX_TAG_VALUES = 2**18  # numbers in one tag of a TIFF: each becomes an object of Python's
MAX_SCANS = 100  # of a JPEG, each a pass over the whole image: encoders make about ten
MAX_EXIF_SEGMENTS = (
    16  # segments of 64 KiB of a JPEG that PIL joins and reads as the tags of a TIFF
)

CONVERT = "convert to JPEG or PNG"
FAULTS = {  # why an image is left out -> what may be done about it
    "too small": "take a smaller image_size, or larger images",
    "empty": "copy or download again",
    "not an image": f"its content is not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; remove it",
    "truncated": "the end is missing; copy or download again",
    "broken": "it contradicts itself; copy or download again",
    "too large": f"shrink to {MAX_PIXELS // 10**6} million pixels at most, or beware: files are "
    "made so to do harm",
    "unknown value range": "save in sRGB with 8 or 16 bits a channel, and no signs",
    "unsupported": "PIL does not read this kind of its format; convert to JPEG or PNG",
    "HEIC": CONVERT,
    "JPEG XL": CONVERT,
    "AVIF": f"{CONVERT}, or pip install -U pillow",
    "JPEG2000": CONVERT,
    "broken link": "the file that it points to is missing; restore that file or remove the link",
    "not readable": "check that you may read it, and that the disk and the memory are in order",
    "not a file": "a pipe, socket or device; remove it",
}
TOO_SMALL = "too small"
# faults of pictures that other programs show
CONVERTIBLE_FAULTS = ("unsupported", "HEIC", "JPEG XL", "AVIF", "JPEG2000", CAMERA_RAW)

Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # PIL warns at this number, and raises at twice as many
ImageFile.LOAD_TRUNCATED_IMAGES = False
# PIL warns on stderr of oddities in files that it reads all the same; what is left out stands in a
# source's notes.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").setLevel(logging.CRITICAL)
# Grey of 16 bits where 0 is white: PIL reads it of one byte order, and inverts neither; `levels_of`
# does.
TiffImagePlugin.OPEN_INFO.setdefault((b"MM", 0, (1,), 1, (16,), ()), ("I;16B", "I;16B"))


class UnreadableImage(ValueError):
    """An image that is not read: `fault` is a key of FAULTS, and the text says more where there
    is more.
    """

    def __init__(self, fault, detail=""):
        super().__init__(f"{fault}: {detail}" if detail else fault)
        self.fault = fault


class ImageInfo(NamedTuple):
    """What a scan says of one image file; of one that is left out only its `fault`."""

    fault: str = ""
    digest: str = ""  # sha256 of the content, in hex
    width: int = 0  # upright
    height: int = 0
    format: str = ""
    mode: str = ""  # PIL's: RGB, CMYK ...
    orientation: int = 1  # EXIF's: 1 is upright
    transparent: bool = False
    animated: bool = False
    one_colour: bool = False
    signature: str = ""  # of `duplicates.signature`, in base 85
    profile: str = ""  # the name of what was converted to sRGB; empty for sRGB
    unread_profile: bool = False  # there is one, and it cannot be used
    max_value: int = 0  # the largest value of one with more than 8 bits a channel, of 65535
    # what was done that PIL alone would not, such as a conversion to sRGB: pixels that once were
    # others
    conversions: str = ""

    @property
    def signature_vectors(self):
        """The signature as `duplicates` compares it, int8 [2, 64]."""
        return np.frombuffer(base64.b85decode(self.signature), np.int8).reshape(2, -1)


class PixelBudget:
    """Lets threads decode side by side as long as they hold no more than so many pixels
    together, or one of them alone.
    """

    def __init__(self, most):
        self.most = most
        self.taken = 0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels):
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + pixels <= self.most)
            self.taken += pixels
        try:
            yield
        finally:
            with self.changed:
                self.taken -= pixels
                self.changed.notify_all()


PIXEL_BUDGET = PixelBudget(MAX_PIXELS)


@contextlib.contextmanager
def open_image(file):
    """The PIL image in a file (path or open file), pixels not decoded yet.

    Raises UnreadableImage, also for errors of PIL inside the block.
    """
    with contextlib.nullcontext(file) if hasattr(file, "read") else open_regular_file(file) as file:
        try:
            check_limits(file)
            source, said = prepare_for_pil(file)
            with Image.open(source, formats=FORMATS) as image:
                image.info |= said
                yield image
        except UnreadableImage:
            raise
        except Exception as error:
            # PIL raises OSError, SyntaxError, struct.error, ValueError, DecompressionBombError ...
            if is_our_fault(error):
                raise
            raise to_unreadable(error, file) from error


def is_our_fault(error):
    """Whether what was raised while a file was read is a fault of this program, not of the file:
    PIL had no part in it.
    """
    if isinstance(
        error, (UnreadableImage, OSError, EOFError, MemoryError, colour.UnsupportedColour)
    ):
        return False
    modules = [
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    return not any(name.split(".")[0] == "PIL" for name in modules)


def open_regular_file(path):
    """A file opened to be read, without waiting for the other end of a pipe; raises UnreadableImage
    where it is no regular file.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:  # no such file, no permission, links in a circle, a socket
        raise UnreadableImage(missing_or_special(path), error.strerror) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnreadableImage("not a file")
    return open(handle, "rb")


def missing_or_special(path):
    """The fault, a key of FAULTS, of a path that cannot be opened."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "broken link" if os.path.islink(path) else "not readable"
    return "not readable" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "not a file"


def to_unreadable(error, file):
    """The UnreadableImage for what was raised while an open file was read."""
    said = " ".join(str(error).split())[:200]
    if isinstance(error, colour.UnsupportedColour):
        return UnreadableImage("unsupported", said)
    if isinstance(error, MemoryError):
        return UnreadableImage("not readable", "memory is full")
    if (
        isinstance(error, Image.DecompressionBombError)
        or "too large" in said
        or "Too much memory" in said
    ):
        return UnreadableImage("too large", said)
    if isinstance(error, EOFError) or "truncated" in said.lower():
        return UnreadableImage("truncated", said)
    # that of a place that is none
    if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
        return UnreadableImage("not readable", error.strerror)
    if isinstance(error, UnidentifiedImageError):
        file.seek(0)
        head = file.read(16)
        # a HEIF of some kind; AVIF is one, and PIL has tried that
        if head[4:12] in (b"ftypmif1", b"ftypmsf1"):
            return UnreadableImage("HEIC")
        known = [name for name in FORMATS if Image.OPEN[name][1](head) is True]
        if not known:
            return UnreadableImage("not an image")
        file.seek(0)
        try:
            Image.OPEN[known[0]][0](file)
        except Exception as more:  # what PIL found, which it does not pass on
            said = " ".join(str(more).split())[:200]
        return UnreadableImage(
            "unsupported" if UNSUPPORTED.search(said) else "broken", f"its header: {said}"
        )
    return UnreadableImage(
        "unsupported" if UNSUPPORTED.search(said) else "broken", f"{type(error).__name__} {said}"
    )


def check_limits(file):
    """Raise UnreadableImage for an open file whose size or structure may exhaust memory or time."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    if not size:
        raise UnreadableImage("empty")
    if size > MAX_BYTES:
        raise UnreadableImage("too large", f"{size:,} bytes")
    head = file.read(16)
    if (form := format_by_magic(head)) and form not in FORMATS:
        raise UnreadableImage(form)
    for starts, walk in WALKS:
        if head.startswith(starts) or head[4:8] in starts:
            # the end: PIL tells whether that is too early
            with contextlib.suppress(struct.error, IndexError):
                for count, _ in enumerate(walk(file, size)):
                    if count > MAX_PARTS:
                        raise UnreadableImage("too large", f"more than {MAX_PARTS:,} parts")
    if head.startswith(b"RIFF") and size < struct.unpack("<I", head[4:8])[0] + 8:
        raise UnreadableImage("truncated")
    file.seek(0)


def format_by_magic(head):
    """The format of the first 16 bytes of a file, if it is one that PIL lacks or may lack."""
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], "")
    return next((form for starts, form in SIGNATURES if head.startswith(starts)), "")


def boxes(file, size):
    """(kind, place, length) of the boxes of an AVIF or a JPEG 2000, those within others too, and
    of the latter's segments.
    """
    place = 0
    file.seek(0)
    if file.read(4) == b"\xff\x4f\xff\x51":
        yield from codestream(file, 2)
        return
    while place < size:
        file.seek(place)
        length, kind, large = struct.unpack(">I4sQ", file.read(16).ljust(16, b"\0"))
        head, length = (16, large) if length == 1 else (8, length or size - place)
        yield kind, place + head, max(length - head, 0)
        if kind == b"jp2c":
            yield from codestream(file, place + head + 2)
        place += NESTED.get(kind) or max(length, 8)


def codestream(file, place):
    """The segments before the first tile of a JPEG 2000."""
    while True:
        file.seek(place)
        marker, length = struct.unpack(">HH", file.read(4))
        if marker in (0xFF90, 0xFF93, 0xFFD9):
            return
        yield marker, place, length
        place += 2 + max(length, 2)


def gif_blocks(file, size):
    """The blocks of a GIF before its first picture."""
    file.seek(10)
    flags = file.read(3)[0]
    file.seek((3 << (flags & 7) + 1) if flags & 128 else 0, os.SEEK_CUR)
    while file.read(1) == b"!":
        file.seek(1, os.SEEK_CUR)
        while length := file.read(1)[0]:
            yield
            file.seek(length, os.SEEK_CUR)
        yield


def tiff_tags(file, size):
    """Yield at each tag of a TIFF's first image.

    Raises UnreadableImage for a tag with too many values and for tiles that are too large.
    """
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:1] == b"I" else ">"
    big = 43 in head[2:4]
    (place,) = (
        struct.unpack(order + "Q", head[8:16]) if big else struct.unpack(order + "I", head[4:8])
    )
    file.seek(min(place, size))
    (tags,) = (
        struct.unpack(order + "Q", file.read(8))
        if big
        else struct.unpack(order + "H", file.read(2))
    )
    sides = {322: 1, 323: 1}  # width and height of a tile
    for _ in range(tags):
        yield
        tag, kind, count, *value = struct.unpack(
            order + ("HHQQ" if big else "HHII"), file.read(20 if big else 12)
        )
        # bytes stay bytes; PIL passes over the rest
        if kind not in (1, 2, 7) and count > MAX_TAG_VALUES and count <= size:
            raise UnreadableImage("too large", f"{count:,} values in tag {tag}")
        if tag in sides:
            short = kind == 3 and order == ">"
            sides[tag] = (
                value[0] >> (48 if big else 16)
                if short
                else value[0] & (0xFFFF if kind == 3 else -1)
            )
    if sides[322] * sides[323] > MAX_PIXELS:
        raise UnreadableImage("too large", f"tiles of {sides[322]}x{sides[323]} pixels")


def jpeg_segments(file, size):
    """Yield at each segment of a JPEG's first image; phones append videos after it.

    Raises UnreadableImage for too many scans or EXIF segments.
    """
    file.seek(0)
    content = file.read()
    place = 2
    scans = 0
    exif = 0
    while content[place] == 0xFF and content[place + 1] != 0xD9:
        yield
        kind = content[place + 1]
        if kind == 0xFF:  # padding
            place += 1
            continue
        scans += kind == 0xDA
        exif += kind == 0xE1 and content[place + 4 : place + 10] == b"Exif\0\0"
        if scans > MAX_SCANS or exif > MAX_EXIF_SEGMENTS:
            raise UnreadableImage(
                "too large", f"more than {MAX_SCANS} scans, or {MAX_EXIF_SEGMENTS} blocks of EXIF"
            )
        place += 2 + struct.unpack(">H", content[place + 2 : place + 4])[0]
        if kind == 0xDA:  # behind it stand pixels, in which no marker can be but that of a restart
            found = MARKER.search(content, place)
            place = found.start() if found else len(content)


WALKS = (
    ((b"\x89PNG",), png.chunks),
    ((b"GIF8",), gif_blocks),
    ((b"II", b"MM"), tiff_tags),
    ((b"\xff\xd8",), jpeg_segments),
    ((b"ftyp", b"jP  ", b"\xff\x4f\xff\x51"), boxes),
)
# boxes of boxes: the bytes before the first
NESTED = {b"jp2h": 8, b"meta": 12, b"iprp": 8, b"ipco": 8}


def prepare_for_pil(file):
    """(the open file as PIL is to see it, entries for the info of PIL's image), which PIL does
    not give.
    """
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
    """The ICC profile that a bitmap of Windows' fifth version contains, or None."""
    file.seek(14)
    head = file.read(124).ljust(124, b"\0")
    length, kind, place, size = (struct.unpack_from("<I", head, at)[0] for at in (0, 56, 112, 116))
    if length != 124 or kind != 0x4D424544 or size > colour.MAX_PROFILE_BYTES:
        return None
    file.seek(14 + place)
    return file.read(size)


def profile_in_boxes(file, size):
    """The ICC profile that an AVIF or a JPEG 2000 contains or says by numbers; None where it
    does not say.
    """
    found = None
    with contextlib.suppress(struct.error):
        for kind, place, length in boxes(file, size):
            if kind == b"colr":
                file.seek(place)
                content = file.read(min(length, colour.MAX_PROFILE_BYTES))
                if content[:4] in (b"prof", b"rICC"):
                    return content[4:]
                if content[:1] == b"\2":  # JPEG 2000's
                    return content[3:]
                if content[:4] == b"nclx":
                    found = colour.from_cicp(*struct.unpack(">HH", content[4:8]), True)
    return found


def decode_file(file, image_size, channels, matte=WHITE):
    """Read an image file (path or open file) upright, its first frame, as uint8 [channels,
    image_size, image_size].

    Raises UnreadableImage, a ValueError.
    """
    with open_image(file) as image:
        return decode(image, image_size, channels, matte)


def decode(image, image_size, channels, matte):
    """A PIL image, whose pixels may not have been loaded yet -> uint8 [channels, image_size,
    image_size], upright.

    JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves twice what is needed: a photo
    of 11 megapixels costs a fifth, and pixels hardly change.
    """
    return decoded(image, image_size, channels, matte)[0]


def decoded(image, image_size, channels, matte):
    """`decode`, and what was done beside PIL's own reading, as `plain` says it."""
    if image.format not in (None, "MPO", *FORMATS):  # opened by another library
        raise UnreadableImage("not an image", f"{image.format} is not read")
    whole = image.size
    reduced = image.draft(None, (2 * image_size, 2 * image_size))
    # whose coefficients are held at full size
    width, height = whole if image.info.get("progressive") else image.size
    with PIXEL_BUDGET.take(width * height):
        image.load()
        extent = reduced[1][2:] if reduced else image.size
        orientation = orientation_of(image)
        image, done = to_srgb_8bit(image)
        return to_pixels(image, image_size, channels, matte, extent, orientation), done


def open_thumbnail(path, side):
    """The picture in a file, upright, RGB and no larger than a square of that side; raises
    UnreadableImage.
    """
    with open_image(path) as image:
        image.draft(None, (2 * side, 2 * side))
        with PIXEL_BUDGET.take(image.width * image.height):
            image.load()
            orientation = orientation_of(image)
            image = to_mode(image, 3, WHITE)
            image.thumbnail((side, side))
    return image.transpose(TURNS[orientation]) if TURNS[orientation] is not None else image


def orientation_of(image):
    """The EXIF orientation, 1 to 8, of a PIL image that is loaded: else PIL would, and what is
    wrong be passed over.
    """
    try:
        if len(image.info.get("exif") or b"") > MAX_EXIF_SEGMENTS * 2**16:
            return 1
        found = image.getexif().get(ORIENTATION, 1)
        return found if found in TURNS else 1
    except Exception as error:  # a broken EXIF block does not make a picture unreadable
        if is_our_fault(error):
            raise
        return 1


def upright_size(size, orientation):
    """(width, height) of a picture when it is turned upright."""
    return size[::-1] if orientation >= 5 else size


def open_picture(path, image_size, channels, matte=WHITE):
    """Read a picture that a person names as `decode_file` does: (uint8 [channels, image_size,
    image_size], (width, height)).

    Width and height are those of the upright picture. Raises ValueError where it is missing or
    cannot be read.
    """
    if not os.path.lexists(path):
        raise ValueError(
            f"there is no picture {os.path.abspath(path)!r}; give the path of an image file"
        )
    try:
        with open_image(path) as image:
            size = image.size
            return decode(image, image_size, channels, matte), upright_size(
                size, orientation_of(image)
            )
    except UnreadableImage as error:
        raise ValueError(
            f"cannot read {os.path.abspath(path)!r} as a picture ({error}); give another file, "
            f"one of {', '.join(SUFFIXES)}"
        ) from None


def to_pixels(image, image_size, channels, matte, extent, orientation=1):
    """A PIL image of any mode -> uint8 [channels, image_size, image_size]: converted, cropped,
    resized and turned.

    `extent` is its width and height: a reduced JPEG ends within its last pixel, and half of one is
    a visible shift. The filter is bicubic with antialiasing, as clean-fid's (Parmar et al. 2022):
    Lanczos rings more at hard edges.
    """
    side = min(extent)
    left, top = ((length - side) / 2 for length in extent)
    if side == image_size:  # a crop alone must not blur: whole pixels
        left = int(left)
        top = int(top)
    box = (left, top, left + side, top + side)
    image = to_mode(image, channels, matte).resize(
        (image_size, image_size), Image.Resampling.BICUBIC, box=box
    )
    image = image.transpose(TURNS[orientation]) if TURNS.get(orientation) is not None else image
    pixels = torch.from_numpy(np.array(image))
    return rearrange(pixels, "h w -> 1 h w" if channels == 1 else "h w c -> c h w").contiguous()


def to_mode(image, channels, matte):
    """The PIL image in the mode of that many channels, in sRGB; transparency laid over `matte`
    or kept.
    """
    image, _ = to_srgb_8bit(image)
    if channels in (1, 3) and image.has_transparency_data:
        ground = Image.new("RGBA", image.size, (*matte, 255))
        ground.alpha_composite(image.convert("RGBA"))
        image = ground
    return image.convert(MODES[channels])


def to_srgb_8bit(image):
    """(the PIL image in sRGB with 8 bits a channel, what was done for it that PIL alone does not
    do, in words).

    An image that is so already comes back as it is, with "". Raises UnreadableImage for values of
    an unknown range.
    """
    tags = getattr(image, "tag_v2", {})
    key = image.info.get("transparency")
    profile, _ = colour.profile_of(image)
    done = [image.info["mended"]] if "mended" in image.info else []
    if image.mode == "F":
        raise UnreadableImage("unknown value range", "floating-point pixels")
    if 2 in tags.get(SAMPLES, ()) and tags.get(BITS) == (8,) and np.asarray(image).max() > 127:
        raise UnreadableImage("unknown value range", "signed pixels")
    if image.mode.startswith("I"):
        image, more = to_8bit_grey(image, tags, key, profile)
        done += more
    elif image.mode == "1" and key is not None:
        image = image.convert("L")
        image.info["transparency"] = key
    elif image.format == "BMP" and image.mode == "RGBA" and not image.getextrema()[3][1]:
        # nobody meant it to be invisible
        image = image.convert("RGB")
        done.append("transparency everywhere")
    if profile:
        image = colour.to_srgb(image, profile) if "icc_profile" in image.info else image
        done.append(profile.name)
    return image, ", ".join(done)


def to_8bit_grey(image, tags, key, profile):
    """(the image of mode L or LA of a deeper grey one, what was done beside dividing by 257); `key`
    is a transparent level.

    The curve of a profile is applied here, where there are more levels to round.
    """
    values = np.asarray(image).astype(np.int32)
    bits = tags.get(BITS, (16,))[0]
    done = []
    if values.min() < 0 or values.max() > 65535:
        raise UnreadableImage("unknown value range", "32-bit or signed pixels")
    alpha = (
        None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    )
    full = 65535
    if bits < 16:
        full = 2**bits - 1
        done.append(f"{bits} bits")
    if tags.get(PHOTOMETRIC) == 0:
        values = full - values
        done.append("0 is white")
    levels = np.rint(values * (255 / full)) if full < 65535 else (values + 128) // 257
    if profile:
        levels = np.rint(np.interp(values * (255 / full), np.arange(256), profile.tone()))
    grey = Image.fromarray(levels.astype(np.uint8))
    if alpha:
        grey.putalpha(alpha)
    return grey, done


def exceeds_8_bits(image):
    """Whether a PIL image that is not loaded yet has more than 8 bits a channel, or signs."""
    form = [
        str(part)
        for tile in image.tile
        for part in (tile[3] if isinstance(tile[3], tuple) else tile[3:4])
    ]
    return (
        image.mode.startswith("I")
        or image.format in ("PNG", "TIFF")
        and any(";16" in part for part in form)
        or 2 in getattr(image, "tag_v2", {}).get(SAMPLES, ())
    )


def largest_value(image):
    """The largest value in a PIL image of more than 8 bits a channel, of 65535; of colours PIL
    has kept the upper 8 bits.
    """
    # of a transparent one alpha counts too, and so nothing is said of it
    if not image.mode.startswith("I"):
        return int(np.max(image.getextrema())) * 256 + 255
    most = np.asarray(image).max()
    bits = getattr(image, "tag_v2", {}).get(BITS, (16,))[0]
    return int(most) * 65535 // (2**bits - 1 if bits < 16 else 65535)


ORIENTATION = 0x0112  # EXIF
BITS = 258
PHOTOMETRIC = 262
SAMPLES = 339  # of a TIFF; of the last 2 is signed
UNSUPPORTED = re.compile(r"(?i)unsupported|not (yet )?supported|unknown pixel mode|cannot handle")
BRANDS = dict.fromkeys((b"avif", b"avis"), "AVIF") | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"
)
SIGNATURES = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
)
MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")  # JPEG's
ONE_COLOUR_RANGE = (
    2  # levels by which a picture of one colour may differ from itself: what JPEG makes of it
)

TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
