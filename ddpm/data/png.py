"""A PNG prepared for PIL: without texts and broken optional chunks, its colours as an ICC profile.

PIL rejects an image for a long text or a wrong checksum, which viewers ignore. It does not read
cICP, does not apply gAMA and cHRM, and leaves the transparent colour in the levels of the file.
"""

import contextlib
import io
import struct
import zlib

from ddpm.data import colour

SIGNATURE = b"\x89PNG\r\n\x1a\n"
MAX_TEXT_BYTES = 2**20  # bytes, as many as PIL unpacks
TEXT_CHUNKS = {b"tEXt", b"zTXt", b"iTXt"}
MIN_TRNS_BYTES = {b"\0": 2, b"\2": 6}  # by IHDR's kind of image
COLOUR_CHUNKS = {b"cICP", b"iCCP", b"sRGB", b"gAMA", b"cHRM"}
# optional chunks that are read, up to so many bytes; those of frames after the first are not
MAX_OPTIONAL_BYTES = (
    dict.fromkeys(TEXT_CHUNKS, MAX_TEXT_BYTES)
    | dict.fromkeys(COLOUR_CHUNKS, colour.MAX_PROFILE_BYTES)
    | dict.fromkeys((b"tRNS", b"eXIf", b"acTL"), 2**20)
)


def chunks(file, size):
    """Yield (kind, place, length) of the image's chunks; struct.error at an early end."""
    place = len(SIGNATURE)
    kind = b""
    while place < size and kind != b"IEND":
        file.seek(place)
        length, kind = struct.unpack(">I4s", file.read(8))
        yield kind, place, length
        place += 12 + length


def prepare_for_pil(file, size):
    """(a file for PIL, entries for image.info) of a PNG; may raise UnsupportedColour."""
    pieces = [SIGNATURE]
    contents = {}
    with contextlib.suppress(struct.error):  # PIL says that the end is too early
        for kind, place, length in chunks(file, size):
            optional = kind.isalpha() and kind[:1].islower()
            if optional and length > MAX_OPTIONAL_BYTES.get(kind, -1):
                continue
            file.seek(place)
            chunk = file.read(12 + length)
            content = chunk[8 : 8 + length]
            checksum = chunk[8 + length :]
            if optional and zlib.crc32(kind + content).to_bytes(4, "big") != checksum:
                continue
            if kind == b"CgBI":
                raise colour.UnsupportedColour("a PNG of Apple's own kind")
            contents.setdefault(kind, content if kind != b"IDAT" else b"")
            if kind == b"tRNS":
                is_read = len(content) >= MIN_TRNS_BYTES.get(contents.get(b"IHDR", b"")[9:10], 0)
            elif kind in TEXT_CHUNKS:
                is_read = tells_orientation(kind, content)
            else:
                is_read = kind not in COLOUR_CHUNKS | {b"acTL"}
            if is_read:
                pieces.append(chunk)
    frames = int.from_bytes(contents.get(b"acTL", b"")[:4], "big")
    return io.BytesIO(b"".join(pieces)), transparent_colour(contents) | {
        "icc_profile": profile_of(contents),
        "frames": frames,
    }


def tells_orientation(kind, content):
    """Whether a text is one in which PIL looks for the orientation, within PIL's limit."""
    key, _, text = content.partition(b"\0")
    if key not in (b"Raw profile type exif", b"XML:com.adobe.xmp", b"exif"):
        return False
    if kind == b"iTXt":
        packed = text[:1] == b"\1"
        text = text[2:].split(b"\0", 2)[-1]
    else:
        packed = kind == b"zTXt"
        text = text[1:]
    return not packed or inflate(text, MAX_TEXT_BYTES) is not None


def inflate(content, most):
    """The bytes that zlib compressed; None if corrupt, or longer than `most` bytes."""
    unpacking = zlib.decompressobj()
    with contextlib.suppress(zlib.error):
        inflated = unpacking.decompress(content, most)
        return inflated if unpacking.eof else None


def transparent_colour(contents):
    """tRNS of grey and colour images in the levels of PIL's image, as an entry of its info.

    `mended` is set where PIL leaves it in other levels. PIL reads that of palettes correctly.
    """
    depth, kind = contents.get(b"IHDR", b"").ljust(13, b"\0")[8:10]
    numbers = {0: 1, 2: 3}.get(kind, 0)
    content = contents.get(b"tRNS", b"")
    if not numbers or not depth or len(content) < 2 * numbers:
        return {}
    key = [value & 2**depth - 1 for value in struct.unpack(f">{numbers}H", content[: 2 * numbers])]
    mended = {"mended": "a transparent level"} if depth != 8 else {}
    if kind == 0:
        return mended | {"transparency": key[0] if depth == 16 else key[0] * 255 // (2**depth - 1)}
    # of 16 bits PIL keeps the upper 8
    return mended | {"transparency": tuple(value >> max(depth - 8, 0) for value in key)}


def profile_of(contents):
    """The ICC profile of a PNG's colours, None for sRGB: of cICP, iCCP, sRGB, gAMA with cHRM.

    The first one counts (PNG, third edition, 4.3). An unusable iCCP counts if no sRGB follows.
    """
    if len(contents.get(b"cICP", b"")) == 4:
        primaries, transfer, matrix, full = contents[b"cICP"]
        if not matrix and (profile := colour.from_cicp(primaries, transfer, full)):
            return profile
    profile = None
    if b"iCCP" in contents:
        packed = contents[b"iCCP"].partition(b"\0")[2]
        # b"?" is not a profile
        profile = (packed[:1] == b"\0" and inflate(packed[1:], colour.MAX_PROFILE_BYTES)) or b"?"
    if b"sRGB" in contents and not (profile and colour.read_profile(profile)):
        return None
    if profile:
        return profile
    gamma = None
    points = []
    if len(contents.get(b"gAMA", b"")) == 4:
        gamma = struct.unpack(">I", contents[b"gAMA"])[0] / 100000
    if len(contents.get(b"cHRM", b"")) == 32:
        points = [value / 100000 for value in struct.unpack(">8I", contents[b"cHRM"])]
    return colour.from_png(gamma, points) if gamma or points else None
