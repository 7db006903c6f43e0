"""Files that try to make a decoder work or hold too much."""

import io
import struct
import zlib
from functools import cache

from PIL import Image

from ddpm.data import limits


def saved(form, size=(64, 64), mode="RGB", **options):
    file = io.BytesIO()
    Image.new(mode, size).save(file, form, **options)
    return file.getvalue()


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(width, height, stream, more=b""):
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + more + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


def inflating(size):
    """A zlib stream of that many MiB of zeros, a thousandth as long."""
    packer = zlib.compressobj(1)
    found = b""
    for _ in range(size):
        found += packer.compress(bytes(2**20))
    return found + packer.flush()


def tiff(tags, content=b"", order="<"):
    """A TIFF of 64x64 grey levels; `tags` are (number, kind, count, value), whose value is None
    for what `content` holds.
    """
    usual = {
        256: (3, 1, 64),
        257: (3, 1, 64),
        258: (3, 1, 8),
        259: (3, 1, 1),
        262: (3, 1, 1),
        273: (4, 1, 8),
        277: (3, 1, 1),
        278: (3, 1, 64),
        279: (4, 1, 4096),
    } | {number: rest for number, *rest in tags}
    place = 10 + 12 * len(usual) + 4
    entries = b"".join(
        struct.pack(
            order + "HHII",
            number,
            kind,
            count,
            place if value is None else value << 16 if order == ">" and kind == 3 else value,
        )
        for number, (kind, count, value) in sorted(usual.items())
    )
    start = b"II*\0" if order == "<" else b"MM\0*"
    return (
        start
        + struct.pack(order + "IH", 8, len(usual))
        + entries
        + bytes(4)
        + content
        + bytes(4096)
    )


@cache
def attacks():
    """name -> (content, the fault that it has, or "" for an undamaged picture)."""
    plain = zlib.compress(bytes(64 * (3 * 64 + 1)))
    stream = inflating(256)
    jpeg = saved("JPEG")
    gif = saved("GIF", (8, 8), "P")
    bmp = saved("BMP")
    progressive = saved("JPEG", (2000, 2000), "L", progressive=True)
    scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    picture = gif.index(b",\0\0\0\0")
    tables = jpeg.index(b"\xff\xdb")
    rationals = struct.pack("<II", 3, 7) * 300_000
    exif = b"II*\0" + struct.pack("<IHHHIII", 8, 1, 282, 5, 300_000, 26, 0) + rationals
    parts = [exif[k : k + 65000] for k in range(0, len(exif), 65000)]
    exif = b"".join(
        b"\xff\xe1" + struct.pack(">H", len(part) + 8) + b"Exif\0\0" + part for part in parts
    )
    large = limits.MAX_TAG_VALUES + 1
    return {
        "size.png": (png(100_000, 100_000, stream), "too large"),
        "stream.png": (png(64, 64, stream), ""),  # which is not read beyond the picture
        # which is not unpacked
        "profile.png": (png(64, 64, plain, chunk(b"iCCP", b"x\0\0" + stream)), ""),
        "text.png": (png(64, 64, plain, chunk(b"zTXt", b"Raw profile type exif\0\0" + stream)), ""),
        "texts.png": (
            png(64, 64, plain, chunk(b"iTXt", b"x\0\1\0\0\0" + zlib.compress(bytes(10**6))) * 100),
            "",
        ),
        "chunks.png": (png(64, 64, plain, chunk(b"abCd", b"") * 200_000), "too large"),
        "size.tif": (tiff([(256, 4, 1, 100_000), (257, 4, 1, 100_000)]), "too large"),
        "tile.tif": (
            tiff(
                [
                    (259, 3, 1, 5),
                    (322, 4, 1, 65520),
                    (323, 4, 1, 32752),
                    (324, 4, 1, 8),
                    (325, 4, 1, 99),
                ]
            ),
            "too large",
        ),
        "tile-mm.tif": (tiff([(322, 3, 1, 65520), (323, 3, 1, 32752)], order=">"), "too large"),
        "claims.tif": (tiff([(273, 4, 0xFFFFFFFF, None)]), "broken"),
        "rationals.tif": (
            tiff([(282, 5, large, None)], struct.pack("<II", 3, 7) * large),
            "too large",
        ),
        "offsets.tif": (tiff([(273, 4, large, None)], struct.pack("<I", 300) * large), "too large"),
        "strip.tif": (
            tiff([(256, 4, 1, 11000), (257, 4, 1, 11000), (259, 3, 1, 8), (278, 4, 1, 11000)]),
            "broken",
        ),
        "size.jpg": (
            jpeg.replace(struct.pack(">HH", 64, 64), struct.pack(">HH", 65500, 65500)),
            "too large",
        ),
        "scans.jpg": (progressive[:-2] + scan * 1000 + b"\xff\xd9", "too large"),
        "exif.jpg": (jpeg[:2] + exif + jpeg[tables:], "too large"),
        "size.gif": (gif[:6] + struct.pack("<HH", 65535, 65535) + gif[10:], "too large"),
        "frame.gif": (
            gif[: picture + 5] + struct.pack("<HH", 65535, 65535) + gif[picture + 9 :],
            "too large",
        ),
        "comments.gif": (gif[:picture] + b"!\xfe\1x\0" * 200_000 + gif[picture:], "too large"),
        # 13000x13000 black pixels, which take longer to encode than to refuse
        "size.webp": (
            bytes.fromhex("524946461a000000574542505650384c0e0000002fc7f2b10c071011fd0f4444ff03"),
            "too large",
        ),
        "size.bmp": (bmp[:18] + struct.pack("<ii", 100_000, 100_000) + bmp[26:], "too large"),
        "script.png": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) = quit\n",
            "not an image",
        ),
        "layers.jpg": (
            b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 9, 9, 8, 3) + bytes(300),
            "not an image",
        ),
        # behind the picture, as phones put it
        "film.jpg": (jpeg + b"\xff\xda\xff\xe1\0\x08Exif\0\0" * 500, ""),
        "short.webp": (saved("WEBP")[:-8], "truncated"),
        # found by changing bytes of real files: PIL loads a PNG where its EXIF is asked for, and
        # says what is wrong only then
        "check.png": (png(64, 64, plain[:-4] + b"\0\0\0\0"), "broken"),
    }
