"""Which image files are read: formats, limits of size and structure, and the faults of the others.

The bytes of a file are checked before PIL opens it, so a file that was made to exhaust memory or
time costs one line of the log.
"""

import contextlib
import os
import re
import stat
import struct
import threading

from PIL import features

from ddpm.data import png

SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP"}
SUFFIXES |= {".tif": "TIFF", ".tiff": "TIFF", ".gif": "GIF", ".avif": "AVIF"}
SUFFIXES |= dict.fromkeys((".jp2", ".j2k", ".jpf", ".jpx"), "JPEG2000")
CAMERA_RAW = "camera raw"
UNREADABLE_SUFFIXES = dict.fromkeys((".heic", ".heif", ".hif"), "HEIC") | {".jxl": "JPEG XL"}
UNREADABLE_SUFFIXES |= dict.fromkeys(
    (".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"), CAMERA_RAW
)


def is_readable_format(form):
    """Whether the installed PIL reads a format: AVIF since 11.3, JPEG 2000 if built with it."""
    if form == "AVIF":
        return "avif" in features.modules and features.check_module("avif")
    return form != "JPEG2000" or features.check("jpg_2000")


# PIL tries no other format: its readers of EPS, PSD, FITS ... never see a file.
FORMATS = tuple(filter(is_readable_format, dict.fromkeys(SUFFIXES.values())))

# More than nearly all cameras have. PIL takes 4 bytes a pixel, with transparency briefly 16.
MAX_PIXELS = 2**27
MAX_BYTES = 2**29  # of a file: MAX_PIXELS in RGB, uncompressed, and a quarter more
MAX_PARTS = 2**16  # chunks or blocks of microseconds each: MAX_BYTES in pieces of 8 KiB
MAX_TAG_VALUES = 2**18  # numbers in one tag of a TIFF, each of which becomes a Python object
MAX_SCANS = 100  # of a JPEG, each a pass over the image; encoders write about ten
MAX_EXIF_SEGMENTS = 16  # of 64 KiB each, which PIL joins and reads as the tags of a TIFF

CONVERT = "convert to JPEG or PNG"
TOO_SMALL = "too small"
FAULTS = {  # why an image is left out -> what to do
    TOO_SMALL: "use a smaller image_size or larger images",
    "empty": "copy or download again",
    "not an image": f"its content is not {', '.join(FORMATS[:-1])} or {FORMATS[-1]}; remove it",
    "truncated": "the end is missing; copy or download again",
    "broken": "its content contradicts itself; copy or download again",
    "too large": f"resize to at most {MAX_PIXELS // 10**6} megapixels; such files may be "
    "decompression bombs",
    "unknown value range": "save in sRGB with 8 or 16 bits a channel, unsigned",
    "unsupported": f"PIL does not read this variant of the format; {CONVERT}",
    "HEIC": CONVERT,
    "JPEG XL": CONVERT,
    "AVIF": f"{CONVERT}, or pip install -U pillow",
    "JPEG2000": CONVERT,
    "broken link": "the file that it points to is missing; restore that file or remove the link",
    "not readable": "check that you may read it, and that the disk and the memory are in order",
    "not a file": "a pipe, socket or device; remove it",
}
# faults of images that other programs can show
CONVERTIBLE_FAULTS = ("unsupported", "HEIC", "JPEG XL", "AVIF", "JPEG2000", CAMERA_RAW)


class UnreadableImage(ValueError):
    """An image that is left out: `fault` is a key of FAULTS, the message adds details."""

    def __init__(self, fault, detail=""):
        super().__init__(f"{fault}: {detail}" if detail else fault)
        self.fault = fault


class PixelBudget:
    """Lets threads decode while they hold at most `limit` pixels together, or one larger image."""

    def __init__(self, limit):
        self.limit = limit
        self.taken = 0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels):
        """Wait until so many pixels are free, and hold them inside the block."""
        with self.changed:
            self.changed.wait_for(lambda: not self.taken or self.taken + pixels <= self.limit)
            self.taken += pixels
        try:
            yield
        finally:
            with self.changed:
                self.taken -= pixels
                self.changed.notify_all()


def open_regular_file(path):
    """A file opened for reading, without waiting on a pipe; raises UnreadableImage for others."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise UnreadableImage(fault_of_path(path), error.strerror) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise UnreadableImage("not a file")
    return open(handle, "rb")


def fault_of_path(path):
    """The fault, a key of FAULTS, of a path that cannot be opened."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return "broken link" if os.path.islink(path) else "not readable"
    return "not readable" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else "not a file"


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
            # at the end of the file: PIL tells whether it comes too early
            with contextlib.suppress(struct.error, IndexError):
                for count, _ in enumerate(walk(file, size)):
                    if count > MAX_PARTS:
                        raise UnreadableImage("too large", f"more than {MAX_PARTS:,} parts")
    if head.startswith(b"RIFF") and size < struct.unpack("<I", head[4:8])[0] + 8:
        raise UnreadableImage("truncated")
    file.seek(0)


def format_by_magic(head):
    """The format of the first 16 bytes of a file if PIL may not read it, else ""."""
    if head[4:8] == b"ftyp":
        return BRANDS.get(head[8:12], "")
    return next((form for starts, form in SIGNATURES if head.startswith(starts)), "")


def boxes(file, size):
    """Yield (kind, place, length) of boxes, nested too, or segments of an AVIF or JPEG 2000."""
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
    """Yield the segments before the first tile of a JPEG 2000."""
    while True:
        file.seek(place)
        marker, length = struct.unpack(">HH", file.read(4))
        if marker in (0xFF90, 0xFF93, 0xFFD9):
            return
        yield marker, place, length
        place += 2 + max(length, 2)


def gif_blocks(file, size):
    """Yield at each block of a GIF before its first image."""
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
    """Yield at each tag of a TIFF; UnreadableImage for a tag with many values or large tiles."""
    file.seek(0)
    head = file.read(16)
    order = "<" if head[:1] == b"I" else ">"
    big = 43 in head[2:4]
    offset, number, entry = ("Q", "Q", "HHQQ") if big else ("I", "H", "HHII")
    (place,) = struct.unpack_from(order + offset, head, 8 if big else 4)
    file.seek(min(place, size))
    (tags,) = struct.unpack(order + number, file.read(struct.calcsize(order + number)))
    tile = {322: 1, 323: 1}  # width and height
    for _ in range(tags):
        yield
        tag, kind, count, value = struct.unpack(
            order + entry, file.read(struct.calcsize(order + entry))
        )
        # PIL leaves bytes as bytes, and skips what exceeds the file
        if kind not in (1, 2, 7) and MAX_TAG_VALUES < count <= size:
            raise UnreadableImage("too large", f"{count:,} values in tag {tag}")
        if tag in tile:
            if kind == 3 and order == ">":  # 16 bits at the start of the field
                value >>= 48 if big else 16
            tile[tag] = value & 0xFFFF if kind == 3 else value
    if tile[322] * tile[323] > MAX_PIXELS:
        raise UnreadableImage("too large", f"tiles of {tile[322]}x{tile[323]} pixels")


def jpeg_segments(file, size):
    """Yield at each segment of a JPEG's first image; UnreadableImage for many scans or EXIFs."""
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
            limits = f"more than {MAX_SCANS} scans, or {MAX_EXIF_SEGMENTS} segments of EXIF"
            raise UnreadableImage("too large", limits)
        place += 2 + struct.unpack(">H", content[place + 2 : place + 4])[0]
        if kind == 0xDA:  # pixels follow, which contain no marker except restarts
            marker = JPEG_MARKER.search(content, place)
            place = marker.start() if marker else len(content)


JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
BRANDS = dict.fromkeys((b"avif", b"avis"), "AVIF") | dict.fromkeys(
    (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"
)
SIGNATURES = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\0\0\0\x0cJXL ", "JPEG XL"),
    (b"\0\0\0\x0cjP  ", "JPEG2000"),
    (b"\xff\x4f\xff\x51", "JPEG2000"),
)
WALKS = (
    ((b"\x89PNG",), png.chunks),
    ((b"GIF8",), gif_blocks),
    ((b"II", b"MM"), tiff_tags),
    ((b"\xff\xd8",), jpeg_segments),
    ((b"ftyp", b"jP  ", b"\xff\x4f\xff\x51"), boxes),
)
NESTED = {b"jp2h": 8, b"meta": 12, b"iprp": 8, b"ipco": 8}  # bytes before the first inner box
