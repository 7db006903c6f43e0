"""Pictures look as in a viewer: profiles and colour chunks against numpy, rare depths and
formats, and what is said of them.
"""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from sklearn.datasets import load_sample_image

from ddpm import data, doctor
from ddpm.data import colour, decode, inspect, limits
from ddpm.data import folder as data_folder
from ddpm.data import source as data_source

SIDE = 64
# Red, green and blue as XYZ under D50, as the makers' profiles have them, and the curve of each.
SPACES = {
    "Adobe RGB (1998)": (
        [[0.60974, 0.20528, 0.14919], [0.31111, 0.62567, 0.06322], [0.01947, 0.06087, 0.74457]],
        563 / 256,
    ),
    "Display P3": (
        [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]],
        None,
    ),
    "ProPhoto RGB": (
        [[0.79767, 0.13519, 0.03134], [0.28804, 0.71188, 0.00009], [0.0, 0.0, 0.82491]],
        1.8,
    ),
    "linear": (
        [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]],
        1.0,
    ),
}
SRGB = np.array(SPACES["linear"][0])


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def png(pixels, *chunks, depth=8, kind=None, after=()):
    """A PNG of rows of bytes, or of a uint8 array [h, w] or [h, w, 3]."""
    rows = list(pixels)
    kind = kind if kind is not None else 2 if np.ndim(pixels) == 3 else 0
    width = (
        np.shape(pixels)[1]
        if np.ndim(pixels) > 1
        else len(rows[0]) * 8 // depth // {0: 1, 2: 3, 3: 1}[kind]
    )
    stream = zlib.compress(b"".join(b"\0" + bytes(np.ascontiguousarray(row)) for row in rows))
    head = struct.pack(">IIBBBBB", width, len(rows), depth, kind, 0, 0, 0)
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", head),
            *chunks,
            chunk(b"IDAT", stream),
            *after,
            chunk(b"IEND", b""),
        ]
    )


def tiff(values, order="<", bits=16, **tags):
    """A TIFF of one strip of grey values, written by hand: `tags` are numbers by t262 and the
    like.
    """
    height, width = values.shape
    content = values.astype(order + {8: "u1", 16: "u2"}[bits]).tobytes()
    usual = {
        "t256": width,
        "t257": height,
        "t258": bits,
        "t259": 1,
        "t262": 1,
        "t273": 0,
        "t277": 1,
        "t278": height,
        "t279": len(content),
    } | tags
    usual["t273"] = 10 + 12 * len(usual) + 4
    entries = b"".join(
        struct.pack(order + "HHII", int(name[1:]), 4, 1, value)
        for name, value in sorted(usual.items())
    )
    return (
        {"<": b"II*\0", ">": b"MM\0*"}[order]
        + struct.pack(order + "IH", 8, len(usual))
        + entries
        + bytes(4)
        + content
    )


def profile(space, tags):
    """An ICC profile of version 2 with those tags."""
    tags = [
        (b"desc", b"desc" + struct.pack(">II", 0, 5) + b"test\0" + bytes(78)),
        (b"cprt", b"text\0\0\0\0none\0"),
        *tags,
    ]
    table = struct.pack(">I", len(tags))
    content = b""
    for name, value in tags:
        table += name + struct.pack(">II", 132 + 12 * len(tags) + len(content), len(value))
        content += value.ljust(-(-len(value) // 4) * 4, b"\0")
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    head = (
        struct.pack(
            ">I4s4s4s4s4s",
            128 + len(table) + len(content),
            b"\0\0\0\0",
            b"\x02\x10\0\0",
            kind,
            space,
            b"Lab " if space == b"CMYK" else b"XYZ ",
        )
        + bytes(12)
        + b"acsp"
    )
    return head.ljust(68, b"\0") + xyz(0.9642, 1, 0.8249)[8:].ljust(60, b"\0") + table + content


def xyz(*values):
    return b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def curve(gamma):
    """A curve of ICC: a power, or 1,024 points of sRGB's."""
    if gamma:
        return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
    points = (linear(np.linspace(0, 1, 1024)) * 65535).round().astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", 1024) + points.tobytes()


def rgb_profile(matrix, gamma):
    tags = [(b"wtpt", xyz(0.9642, 1, 0.8249))]
    for letter, column in zip(b"rgb", np.transpose(matrix), strict=True):
        tags += [(bytes([letter]) + b"XYZ", xyz(*column)), (bytes([letter]) + b"TRC", curve(gamma))]
    return profile(b"RGB ", tags)


def linear(x):
    """IEC 61966-2-1: from sRGB's values in [0, 1] to light, and back."""
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def encoded(light):
    light = np.clip(light, 0, 1)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def to_srgb(values, matrix, gamma):
    """What uint8 values of a space are in sRGB, float64 in [0, 255], by the definition."""
    light = (values / 255) ** gamma if gamma else linear(values / 255)
    return 255 * encoded(light @ (np.linalg.inv(SRGB) @ np.array(matrix)).T)


def from_srgb(values, matrix, gamma):
    """The uint8 values of a space that show sRGB's best."""
    light = np.clip(linear(values / 255) @ (np.linalg.inv(matrix) @ SRGB).T, 0, 1)
    return (255 * (light ** (1 / gamma) if gamma else encoded(light))).round().astype(np.uint8)


def photo():
    return load_sample_image("flower.jpg")[100 : 100 + SIDE, 200 : 200 + SIDE]


def decoded(content, channels=3, size=SIDE):
    """uint8 [h, w, c] or [h, w] of a file's content."""
    pixels = decode.decode_file(io.BytesIO(content), size, channels).numpy().transpose(1, 2, 0)
    return pixels[..., 0] if channels == 1 else pixels


def saved(image, form, **options):
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def close(found, expected, mean=0.6):
    """Rounding costs 0.25 of a level in the mean, and littleCMS's tables of 8 bits as much
    again.
    """
    return np.abs(found - expected).mean() < mean


LOSSLESS = {
    "JPEG": {"quality": 95},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 95},
}


@pytest.mark.parametrize("form", LOSSLESS)
@pytest.mark.parametrize("name", SPACES)
def test_profiles_are_converted_as_they_are_defined(name, form):
    if form not in decode.FORMATS:
        pytest.skip(f"this Pillow does not read {form}")
    space = SPACES[name]
    content = saved(
        Image.fromarray(from_srgb(photo(), *space)),
        form,
        icc_profile=rgb_profile(*space),
        **LOSSLESS[form],
    )
    with Image.open(io.BytesIO(content)) as image:
        stored = np.asarray(image)
    found = decoded(content)
    expected = to_srgb(stored, *space)
    assert close(found, expected)
    assert np.abs(stored - expected).mean() > 3  # what one learns from without the profile
    if form == "PNG":
        # 8 bits of linear light are coarse in the shadows
        assert np.abs(found.astype(int) - photo()).mean() < 2


def test_transparency_and_palettes_are_kept_and_only_their_colours_are_converted():
    space = SPACES["Display P3"]
    values = from_srgb(photo(), *space)
    alpha = np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % 256
    image = Image.fromarray(np.dstack([values, alpha]).astype(np.uint8))
    found = decoded(saved(image, "PNG", icc_profile=rgb_profile(*space)), 4)
    assert np.array_equal(found[..., 3], alpha) and close(found[..., :3], to_srgb(values, *space))
    palette = Image.fromarray(values).quantize(16)
    shown = np.asarray(palette.convert("RGB"))
    assert close(
        decoded(saved(palette, "PNG", icc_profile=rgb_profile(*space))), to_srgb(shown, *space)
    )


@pytest.mark.parametrize("kind", ["grey", "colour"])
def test_grey_pictures_take_grey_profiles_and_those_of_colours(kind):
    space = SPACES["linear"]
    values = photo()[..., 1]
    if kind == "grey":
        content = profile(b"GRAY", [(b"wtpt", xyz(0.9642, 1, 0.8249)), (b"kTRC", curve(1.8))])
        light = lambda x: x**1.8
    else:
        content = rgb_profile(*space)
        light = lambda x: x
    expected = 255 * encoded(light(values / 255))
    assert close(
        decoded(saved(Image.fromarray(values), "JPEG", quality=100, icc_profile=content), 1),
        expected,
        1,
    )
    transparent = np.dstack([values, values[::-1]])
    found = decoded(saved(Image.fromarray(transparent), "PNG", icc_profile=content), 2)
    assert close(found[..., 0], expected) and np.array_equal(found[..., 1], values[::-1])
    deep = values.astype(np.uint16) * 200 + 7
    found = decoded(saved(Image.fromarray(deep), "PNG", icc_profile=content), 1)
    assert close(found, 255 * encoded(light(deep / 65535)))


def test_printers_inks_go_through_their_profile():
    """A table of 16 corners, each ink on or off, with colours of Lab of our choice."""
    corners = np.array(
        [[c, m, y, k] for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    )
    lab = np.stack(
        [
            95 - 95 * np.minimum(1, corners @ [0.3, 0.25, 0.1, 0.8]),
            corners @ [-30, 40, -5, 0],
            corners @ [-35, -5, 50, 0],
        ],
        axis=1,
    )
    lab[corners[:, 3] == 1] = [0, 0, 0]  # so black needs no compensation
    lab[0] = [100, 0, 0]
    table = (
        np.stack([lab[:, 0] * 2.55, lab[:, 1] + 128, lab[:, 2] + 128], axis=1)
        .round()
        .astype(np.uint8)
    )
    lab = np.stack([table[:, 0] / 2.55, table[:, 1] - 128.0, table[:, 2] - 128.0], axis=1)
    identity = bytes(range(256))
    lut = (
        b"mft1\0\0\0\0"
        + bytes([4, 3, 2, 0])
        + struct.pack(">9i", *(np.eye(3) * 65536).astype(int).ravel())
        + identity * 4
        + table.tobytes()
        + identity * 3
    )
    content = profile(b"CMYK", [(b"wtpt", xyz(0.9642, 1, 0.8249)), (b"A2B0", lut), (b"A2B1", lut)])
    f = (
        np.stack([lab[:, 1] / 500, 0 * lab[:, 0], lab[:, 2] / -200], axis=1)
        + (lab[:, :1] + 16) / 116
    )
    light = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    expected = 255 * encoded(light @ np.linalg.inv(SRGB).T)
    inks = np.tile((corners * 255).astype(np.uint8), (16, 1)).reshape(16, 16, 4)
    found = decoded(saved(Image.fromarray(inks, "CMYK"), "TIFF", icc_profile=content), size=16)
    assert close(found, np.tile(expected, (16, 1)).reshape(16, 16, 3), 1)
    assert (
        np.abs(found - np.asarray(Image.fromarray(inks, "CMYK").convert("RGB"), float)).mean() > 10
    )


def test_what_is_srgb_or_says_nothing_keeps_its_bytes(tmp_path):
    pixels = photo()
    of_littlecms = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    by_hand = rgb_profile(SRGB, None)
    contents = [
        saved(Image.fromarray(pixels), "PNG", icc_profile=one)
        for one in (None, of_littlecms, by_hand)
    ]
    contents += [
        png(
            pixels,
            chunk(b"gAMA", struct.pack(">I", 45455)),
            chunk(
                b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
            ),
        ),
        png(pixels, chunk(b"cICP", b"\1\x0d\0\1")),
    ]
    for number, content in enumerate(contents):
        assert np.array_equal(decoded(content), pixels)
        (tmp_path / f"{number}.png").write_bytes(content)
        facts = inspect.inspect_image(tmp_path / f"{number}.png")
        assert not (facts.profile or facts.unread_profile or facts.conversions)
    before = data_source.fingerprint(
        "folder",
        decode.PREPROCESSING,
        16,
        3,
        decode.WHITE,
        sorted(f"{n}.png" for n in range(5)),
        [inspect.inspect_image(tmp_path / f"{n}.png").digest for n in range(5)],
    )
    # so runs of before go on
    assert data.open_source(f"folder(path={str(tmp_path)!r})", 16).fingerprint == before


GAMMA = chunk(b"gAMA", struct.pack(">I", 100000))
# P3
WIDE = chunk(b"cHRM", struct.pack(">8I", 31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000))
SAYS_SRGB = chunk(b"sRGB", b"\0")
P3 = chunk(b"cICP", bytes([12, 13, 0, 1]))
LINEAR = SPACES["linear"]
DISPLAY_P3 = SPACES["Display P3"]


def profiled(*space):
    return chunk(b"iCCP", b"x\0\0" + zlib.compress(rgb_profile(*space)))


BAD = {
    "bytes": chunk(b"iCCP", b"x\0\0" + zlib.compress(b"no profile" * 30)),
    "stream": chunk(b"iCCP", b"x\0\0\1\2\3"),
    "checksum": profiled(*LINEAR)[:-1] + b"?",
    "method": chunk(b"iCCP", b"x\0\1" + zlib.compress(rgb_profile(*LINEAR))),
}


@pytest.mark.parametrize(
    "chunks, space",
    [
        ([GAMMA], LINEAR),
        ([WIDE], DISPLAY_P3),
        ([chunk(b"gAMA", struct.pack(">I", 45455)), WIDE], DISPLAY_P3),
        ([P3], DISPLAY_P3),
        ([chunk(b"cICP", bytes([1, 8, 0, 1]))], LINEAR),
        ([SAYS_SRGB, GAMMA], None),
        ([profiled(*DISPLAY_P3), GAMMA], DISPLAY_P3),
        ([P3, profiled(*LINEAR)], DISPLAY_P3),
        ([P3, SAYS_SRGB, GAMMA], DISPLAY_P3),
        ([profiled(*DISPLAY_P3), SAYS_SRGB], DISPLAY_P3),
        ([chunk(b"cICP", bytes([99, 99, 0, 1])), GAMMA], LINEAR),
        ([BAD["checksum"], GAMMA], LINEAR),
        ([BAD["bytes"], SAYS_SRGB], None),
        ([chunk(b"gAMA", bytes(4))], None),
        ([chunk(b"gAMA", b"\0"), chunk(b"cHRM", bytes(32))], None),
        ([chunk(b"gAMA", b"\x7f\xff\xff\xff")], None),
        ([BAD["method"], SAYS_SRGB], None),
    ],
)
def test_chunks_of_png_count_in_the_order_of_the_standard(chunks, space):
    """PNG, third edition, 4.3: cICP, then iCCP, then sRGB, then gAMA with cHRM; what makes no
    sense is passed over.
    """
    pixels = photo()
    assert close(
        decoded(png(pixels, *chunks)),
        to_srgb(pixels, *space) if space else pixels,
        0.6 if space else 1e-9,
    )


def test_profiles_that_pil_does_not_pass_on_are_found():
    """In JPEG 2000, as numbers in AVIF, and in bitmaps."""
    pixels = photo()
    space = SPACES["Display P3"]
    content = rgb_profile(*space)
    if "JPEG2000" in decode.FORMATS:
        file = saved(Image.fromarray(pixels), "JPEG2000")
        start = file.index(b"jp2h") - 4
        old = struct.pack(">I4s", 15, b"colr") + b"\1\0\0\0\0\0\x10"
        length = struct.unpack(">I", file[start : start + 4])[0]
        new = struct.pack(">I4s", 11 + len(content), b"colr") + b"\2\0\0" + content
        assert file.count(old) == 1
        file = (
            file[:start]
            + struct.pack(">I", length + len(new) - len(old))
            + file[start + 4 :].replace(old, new)
        )
        assert close(decoded(file), to_srgb(pixels, *space))
    if "AVIF" in decode.FORMATS:
        file = saved(Image.fromarray(pixels), "AVIF", quality=95)
        plain = decoded(file)
        wide = file.replace(b"colrnclx\0\1", b"colrnclx\0\x0c")
        assert wide != file and close(decoded(wide), to_srgb(plain, *space))
        with pytest.raises(decode.UnreadableImage, match="unsupported: PQ"):
            decoded(file.replace(b"colrnclx\0\1\0\x0d", b"colrnclx\0\x09\0\x10"))
    head = (
        struct.pack("<IiiHHIIiiII", 124, SIDE, -SIDE, 1, 24, 0, 0, 0, 0, 0, 0)
        + bytes(16)
        + b"DEBM"
        + bytes(52)
    )
    head += struct.pack("<II", 124 + pixels.size, len(content)) + bytes(4)
    bitmap = (
        b"BM" + struct.pack("<IHHI", 0, 0, 0, 138) + head + pixels[..., ::-1].tobytes() + content
    )
    assert close(decoded(bitmap), to_srgb(pixels, *space))
    assert np.array_equal(decoded(bitmap.replace(b"DEBM", b"BGRs")), pixels)


@pytest.mark.parametrize(
    "white, red, green, blue, gamma",
    [
        ((0.3127, 0.3290), (0.64, 0.33), (0.30, 0.60), (0.15, 0.06), 1.8),
        ((0.3457, 0.3585), (0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), 1.8),
    ],
)
def test_profiles_of_numbers_are_right(white, red, green, blue, gamma):
    """The second is ProPhoto, whose white is D50 already: its colours are its maker's. The first
    is checked through XYZ.
    """
    found = ImageCms.ImageCmsProfile(
        io.BytesIO(colour.matrix_profile((*white, *red, *green, *blue), (gamma,), "x"))
    ).profile
    columns = np.array([found.red_colorant[0], found.green_colorant[0], found.blue_colorant[0]]).T
    assert np.allclose(columns.sum(1), [0.9642, 1, 0.8249], atol=2e-4)
    assert np.allclose(
        columns, SRGB if gamma and red[0] == 0.64 else SPACES["ProPhoto RGB"][0], atol=1e-3
    )


@pytest.mark.parametrize("transfer, word", [(16, "PQ"), (18, "HLG")])
def test_hdr_is_left_out_by_name(transfer, word):
    with pytest.raises(decode.UnreadableImage, match=f"unsupported: {word}"):
        decoded(png(photo(), chunk(b"cICP", bytes([9, transfer, 0, 1]))))


def test_texts_of_png_neither_cost_nor_break_a_picture():
    pixels = photo()
    long = zlib.compress(b"prompt " * 300_000)
    torn = chunk(b"tEXt", b"Title\0cat")[:-1] + b"?"
    texts = [
        chunk(b"zTXt", b"parameters\0\0" + long),
        chunk(b"iTXt", b"workflow\0\1\0\0\0" + long),
        chunk(b"tEXt", b"note\0" + b"x" * 3_000_000),
        chunk(b"tEXt", b"y\0" + b"x" * 70_000_000),
        chunk(b"iCCP", b"x\0\0" + long),
        torn,
        chunk(b"zTXt", b"a\0\7"),
        chunk(b"tIME", b""),
        torn.replace(b"tEXt", b"vpAg"),
    ]
    for text in texts:
        assert np.array_equal(decoded(png(pixels, text)), pixels) and np.array_equal(
            decoded(png(pixels, after=[text])), pixels
        )
    exif = Image.Exif()
    exif[decode.ORIENTATION] = 3
    hexed = exif.tobytes().hex()
    for kind, packed in ((b"zTXt", True), (b"tEXt", False)):  # as ImageMagick writes it
        text = f"\nexif\n{len(hexed) // 2:8}\n{hexed}\n".encode()
        turned = png(
            pixels,
            torn,
            chunk(
                kind, b"Raw profile type exif\0" + (b"\0" + zlib.compress(text) if packed else text)
            ),
        )
        assert np.array_equal(decoded(turned), pixels[::-1, ::-1])
    film = chunk(b"acTL", struct.pack(">II", 9, 0))
    for rare in (
        chunk(b"pHYs", b"\0"),
        chunk(b"tRNS", b"\0\1"),
        chunk(b"acTL", b"\0"),
        film + film,
        film + chunk(b"fcTL", struct.pack(">IIIIIHHBB", 7, SIDE, SIDE, 0, 0, 1, 1, 0, 0)),
    ):
        assert np.array_equal(decoded(png(pixels, rare)), pixels)
    with decode.open_image(io.BytesIO(png(pixels, film))) as image:
        assert inspect.is_animated(image)
    header = png(pixels)
    broken = header.replace(b"IHDR\0\0\0\x40", b"IHDR\0\0\1\x40")
    with pytest.raises(
        decode.UnreadableImage, match="broken"
    ):  # what the picture needs must be right
        decoded(broken)


@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_the_transparent_colour_of_every_depth(depth, tmp_path):
    """A quarter of the levels is one that tRNS names, in the levels of the file."""
    most = 2**depth - 1
    width = 16
    values = (
        np.arange(width * width).reshape(width, width) % (most + 1)
        if depth < 16
        else np.arange(width * width).reshape(width, width) * 256 + 3
    )
    key = int(values[0, min(5, most)])
    if depth == 16:
        rows = [row.astype(">u2").tobytes() for row in values]
    else:
        bits = ((values[..., None] >> np.arange(depth)[::-1]) & 1).reshape(width, -1)
        rows = [np.packbits(row).tobytes() for row in bits]
    content = png(rows, chunk(b"tRNS", struct.pack(">H", key)), depth=depth, kind=0)
    found = decoded(content, 2, width)
    assert np.array_equal(found[..., 1], np.where(values == key, 0, 255))
    (tmp_path / "a.png").write_bytes(content)
    assert bool(inspect.inspect_image(tmp_path / "a.png").conversions) == (depth != 8)
    assert np.abs(found[..., 0] - values * (255 / most)).max() <= 0.5
    if depth >= 8:
        rgb = np.stack([values, values[::-1], values.T], axis=2)
        rows = [row.astype(">u2" if depth == 16 else "u1").tobytes() for row in rgb]
        content = png(
            rows, chunk(b"tRNS", struct.pack(">HHH", *map(int, rgb[3, 4]))), depth=depth, kind=2
        )
        assert np.array_equal(
            decoded(content, 4, width)[..., 3], np.where((rgb == rgb[3, 4]).all(2), 0, 255)
        )


@pytest.mark.parametrize("order", "<>")
def test_grey_tiffs_where_0_is_white_are_inverted_in_both_byte_orders(order):
    values = photo()[..., 0].astype(np.uint16) * 257
    assert np.array_equal(decoded(tiff(65535 - values, order, t262=0), 1), photo()[..., 0])
    assert np.array_equal(decoded(tiff(values, order), 1), photo()[..., 0])
    assert np.array_equal(
        decoded(tiff(255 - photo()[..., 0], order, 8, t262=0), 1), photo()[..., 0]
    )


def test_twelve_bits_are_scaled_and_what_is_unsupported_is_called_so():
    values = photo()[..., 0].astype(int) * 16
    bits = ((values.reshape(-1, 1) >> np.arange(12)[::-1]) & 1).astype(np.uint8)
    packed = np.packbits(bits).reshape(SIDE, -1)
    content = tiff(packed, "<", 8, t256=SIDE, t258=12)
    found = decoded(content, 1)
    assert np.abs(found - values * (255 / 4095)).max() <= 0.5
    for content in (tiff(packed, ">", 8, t256=SIDE, t258=12), tiff(packed, "<", 8, t262=32844)):
        with pytest.raises(decode.UnreadableImage) as refused:
            decoded(content, 1)
        assert (
            refused.value.fault == "unsupported" and "JPEG or PNG" in limits.FAULTS["unsupported"]
        )
    with pytest.raises(decode.UnreadableImage, match="signed"):
        decoded(tiff((photo()[..., 0].astype(int) - 128).astype(np.uint8), "<", 8, t339=2), 1)


def test_a_bitmap_whose_alpha_is_all_zero_is_opaque():
    """As browsers hold: many programs write a fourth byte of 0 and mean nothing by it."""
    pixels = photo()
    for alpha, expected in ((np.zeros((SIDE, SIDE)), pixels), (np.eye(SIDE) * 255, None)):
        bgra = np.dstack([pixels[..., ::-1], alpha])[::-1].astype(np.uint8)
        head = struct.pack("<IiiHHIIiiII", 108, SIDE, SIDE, 1, 32, 3, bgra.size, 0, 0, 0, 0)
        head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
        content = (
            b"BM"
            + struct.pack("<IHHI", 14 + len(head) + bgra.size, 0, 0, 14 + len(head))
            + head
            + bgra.tobytes()
        )
        found = decoded(content, 4)
        assert np.array_equal(
            found[..., 3], alpha if expected is None else np.full((SIDE, SIDE), 255)
        )
        assert expected is None or np.array_equal(decoded(content), pixels)


HEIC = b"\0\0\0\x18ftypheix\0\0\0\0mif1heix" + bytes(500)
JXL = b"\xff\x0a\xfa\x1f" + bytes(500)


def test_formats_of_phones_are_read_or_named_in_the_doctor_and_in_the_log(tmp_path):
    pixels = photo()
    folder = f"folder(path={str(tmp_path)!r})"
    for name, form in (("leaf.avif", "AVIF"), ("leaf.jp2", "JPEG2000")):
        if form in decode.FORMATS:
            Image.fromarray(pixels).save(
                tmp_path / name, form, **({"quality": 100} if form == "AVIF" else {})
            )
    read = len(list(tmp_path.iterdir()))
    for name, content in (
        ("a.jpg", HEIC),
        ("b.png", JXL),
        ("c.heic", HEIC),
        ("d.JXL", JXL),
        ("e.nef", tiff(pixels[..., 0], "<", 8)),
        ("f.jpg", HEIC.replace(b"heix", b"mif1")),
    ):
        (tmp_path / name).write_bytes(content)
    Image.fromarray(pixels).save(tmp_path / "g.png")
    source = data.open_source(folder, 32)
    report = doctor.diagnose(tmp_path, 32, 0)
    line = "6 images are in a format that is not read (3 HEIC, 2 JPEG XL, 1 camera raw): "
    line += "convert to JPEG or PNG"
    assert len(source) == read + 1 and line in source.notes and line in report["warnings"]
    assert report["left_out"] == {"HEIC": ["a.jpg", "f.jpg"], "JPEG XL": ["b.png"]}
    assert not any("cannot be read" in text for text in report["not_fit"] + report["warnings"])
    for index in range(len(source)):
        assert (
            source[index].float()
            - torch.from_numpy(
                decoded(saved(Image.fromarray(pixels), "PNG"), size=32).transpose(2, 0, 1)
            )
        ).abs().mean() < 3  # which AVIF loses


def test_what_fills_little_of_its_range_is_said_by_the_doctor_and_in_the_log(tmp_path):
    grey = photo()[..., 1].astype(np.uint16)
    grey[0, 0] = 255
    (tmp_path / "ct.tif").write_bytes(tiff(grey * 128, t339=2))  # signed
    Image.fromarray(grey * 16).save(tmp_path / "scan.png")
    Image.fromarray(grey * 257).save(tmp_path / "full.png")
    (tmp_path / "white.tif").write_bytes(tiff(1023 - grey * 4, ">", t262=0))
    rows = [(np.dstack([row] * 3) * 16).astype(">u2").tobytes() for row in grey]
    (tmp_path / "colour.png").write_bytes(png(rows, depth=16, kind=2))
    Image.fromarray(photo()).save(tmp_path / "eight.png")
    report = doctor.diagnose(tmp_path, 32, 0)
    source = data.open_source(f"folder(path={str(tmp_path)!r})", 32)
    assert report["dark"] == {
        "colour.png": 4095,
        "ct.tif": 32640,
        "scan.png": 4080,
        "white.tif": 1023 - 4 * int(grey.min()),
    }
    (line,) = [one for one in report["warnings"] if "32640 of 65535" in one]
    assert (
        "(4) have values up to 32640" in line
        and "(15 bits)" in line
        and line.endswith("multiply their values by 2")
        and line in source.notes
    )
    assert any(
        row.startswith("dark 16 bits") and "scan.png (up to 4080)" in row
        for row in doctor.report_lines(report | {"dark": {"scan.png": 4080}})
    )


def test_the_doctor_has_rows_for_profiles(tmp_path):
    pixels = Image.fromarray(photo())
    pixels.save(tmp_path / "wide.jpg", icc_profile=rgb_profile(*DISPLAY_P3))
    pixels.save(tmp_path / "plain.jpg")
    pixels.convert("L").save(tmp_path / "ink.jpg", icc_profile=profile(b"CMYK", []))
    (tmp_path / "torn.png").write_bytes(png(photo(), BAD["bytes"]))
    report = doctor.diagnose(tmp_path, 32, 0)
    assert report["other_colours"] == {"wide.jpg": "test"} and report["unread_profile"] == [
        "ink.jpg",
        "torn.png",
    ]
    rows = {row.split("  ")[0]: row for row in doctor.report_lines(report)}
    assert (
        "wide.jpg (test); converted to sRGB" in rows["colour profile"]
        and "treated as sRGB" in rows["unread profile"]
    )
    assert np.array_equal(decoded((tmp_path / "torn.png").read_bytes()), photo())
    kept = data_folder.scan_folder(tmp_path)
    marked = [one.conversions for one in kept.infos]
    assert marked == ["", "", "", "test"] and [
        data_folder.content_id(one) == one.digest for one in kept.infos
    ] == [True] * 3 + [False]


def test_a_fault_of_ours_is_raised_and_no_damage_of_files(tmp_path, monkeypatch):
    """As with a library that is too old: an attribute is missing."""
    Image.fromarray(photo()).save(tmp_path / "a.png")
    monkeypatch.delattr(Image.Image, "has_transparency_data")
    for read in (
        lambda: decode.decode_file(tmp_path / "a.png", 16, 3),
        lambda: inspect.inspect_image(tmp_path / "a.png"),
        lambda: doctor.diagnose(tmp_path, 16, 0),
    ):
        with pytest.raises(AttributeError, match="has_transparency_data"):
            read()
