"""Images to sRGB by littleCMS, from ICC profiles and from the numbers in PNG and AVIF files.

The intent is relative colorimetric with black point compensation, Photoshop's default: white stays
white, black becomes black, and colours outside sRGB are clipped in each channel. Values are rounded
to the nearest of 256 levels. An image in sRGB, or without a profile, keeps its bytes. Conversion
comes before transparency and resizing, so an image gives the same pixels as its copy that another
program converted to sRGB.
"""

import io
import struct
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

# levels by which a profile may change a colour and still count as sRGB, whose tables are rounded
SRGB_TOLERANCE = 2
MAX_PROFILE_BYTES = 2**23  # bytes; printers' profiles have 0.5 to 4 MiB
# intent and flags: relative colorimetric, with littleCMS's black point compensation
INTENT = (ImageCms.Intent.RELATIVE_COLORIMETRIC, 0x2000)
SRGB = ImageCms.createProfile("sRGB")
# colour space of a profile -> the mode of the pictures that it describes
MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}


class UnsupportedColour(ValueError):
    """The colours are well defined, but this module cannot convert them to sRGB."""


class Profile:
    """An ICC profile: `name`, colour `space`, `is_srgb`; raises ValueError for other bytes."""

    def __init__(self, content):
        try:
            self.icc = ImageCms.ImageCmsProfile(io.BytesIO(content))
            self.space = self.icc.profile.xcolor_space.strip()
            self.name = " ".join((self.icc.profile.profile_description or "unnamed").split())
            self.transforms = {}
            self.to_rgb = self.transform(MODES[self.space], "RGB")
        except (OSError, KeyError, UnicodeError, ImageCms.PyCMSError) as error:
            # a corrupt one, or one of another colour space
            raise ValueError(f"unusable profile: {error}") from None
        levels = np.arange(0, 256, 17 if self.space == "RGB" else 1, dtype=np.uint8)
        if self.space == "RGB":
            colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(1, -1, 3)
        else:
            colours = levels[None]
        self.is_srgb = self.space != "CMYK" and self.largest_change(colours) <= SRGB_TOLERANCE

    def transform(self, mode, into):
        """littleCMS's transform from images of a mode to sRGB in mode `into`, made once."""
        if (mode, into) not in self.transforms:
            transform = ImageCms.buildTransform(self.icc, SRGB, mode, into, *INTENT)
            self.transforms[mode, into] = transform
        return self.transforms[mode, into]

    def largest_change(self, colours):
        """The most levels by which the conversion changes colours, uint8 [1, n] or [1, n, 3]."""
        converted = np.asarray(self.to_rgb.apply(Image.fromarray(colours)), np.int16)
        return int(np.abs(converted - (colours if colours.ndim == 3 else colours[..., None])).max())

    def tone(self):
        """The level in sRGB of each of 256 grey levels, float64 [256]."""
        ramp = Image.fromarray(np.arange(256, dtype=np.uint8)[None]).convert(MODES[self.space])
        return np.asarray(self.to_rgb.apply(ramp).convert("L"), np.float64)[0]

    def describes(self, mode):
        """Whether it can belong to an image of a mode; RGB profiles also to grey, as in viewers."""
        return {
            "CMYK": mode == "CMYK",
            "GRAY": is_grey(mode),
            "RGB": is_grey(mode) or mode[:3] == "RGB" or mode[:1] == "P",
        }[self.space]


@lru_cache(maxsize=16)
def read_profile(content):
    """The Profile in some bytes, or None if they are not one."""
    try:
        return Profile(content)
    except ValueError:
        return None


def is_grey(mode):
    return mode[:1] in ("1", "L", "I") and mode != "LAB"


def profile_of(image):
    """(the Profile from which to convert a PIL image, or None; whether it has an unusable one)."""
    content = image.info.get("icc_profile")
    if not content:
        return None, False
    profile = read_profile(bytes(content)) if len(content) <= MAX_PROFILE_BYTES else None
    if not (profile and profile.describes(image.mode)):
        return None, True
    return None if profile.is_srgb else profile, False


def to_srgb(image, profile):
    """Convert a PIL image of 8 bits from a Profile to sRGB, in mode L, LA, RGB or RGBA."""
    if is_grey(image.mode):
        values = image.convert("LA" if image.has_transparency_data else "L")
        tone = profile.tone().round().astype(np.uint8)
        levels = Image.fromarray(tone[np.asarray(values.getchannel(0))])
        if values.mode == "LA":
            levels.putalpha(values.getchannel(1))
        return levels
    into = "RGBA" if image.has_transparency_data and image.mode != "CMYK" else "RGB"
    mode = "CMYK" if image.mode == "CMYK" else into
    result = profile.transform(mode, into).apply(image.convert(mode))
    result.info.clear()
    return result


# Code points instead of a profile: x and y of white, red, green and blue, and a transfer curve.
D50 = np.array([0.9642, 1.0, 0.8249])  # of ICC's connection space
BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
D65 = (0.3127, 0.3290)
DCI = (0.314, 0.351)
BT709 = (*D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
PRIMARIES = {  # H.273, table 2
    1: BT709,
    4: (0.310, 0.316, 0.67, 0.33, 0.21, 0.71, 0.14, 0.08),
    5: (*D65, 0.64, 0.33, 0.29, 0.60, 0.15, 0.06),
    6: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    7: (*D65, 0.630, 0.340, 0.310, 0.595, 0.155, 0.070),
    9: (*D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    11: (*DCI, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    12: (*D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
    22: (*D65, 0.630, 0.340, 0.295, 0.605, 0.155, 0.077),
}
SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # ICC's parametric curve of type 3
# H.273, table 3. Cameras' curves (1, 6, 14, 15) are not those of displays; as in browsers, sRGB's
# replaces them.
CURVES = dict.fromkeys((1, 6, 13, 14, 15), SRGB_CURVE) | {4: (2.2,), 5: (2.8,), 8: (1.0,)}
# brighter than white, which other displays show in no agreed way
HDR = {16: "PQ", 18: "HLG"}


def matrix_profile(chromaticities, curve, name):
    """The ICC profile of white, red, green, blue (x, y) and a curve; None if impossible."""
    points = np.array(chromaticities, np.float64).reshape(4, 2)
    if (points[:, 1] <= 0).any() or not all(0 < value < 100 for value in curve):
        return None
    white, *primaries = (
        np.stack([points[:, 0], points[:, 1], 1 - points.sum(1)], axis=1) / points[:, 1:]
    )
    matrix = np.stack(primaries, axis=1)
    if abs(np.linalg.det(matrix)) < 1e-6:
        return None
    with np.errstate(all="ignore"):  # the result is not below 100
        scale = BRADFORD @ D50 / (BRADFORD @ white)
    to_d50 = np.linalg.inv(BRADFORD) @ np.diag(scale) @ BRADFORD
    columns = (to_d50 @ matrix * np.linalg.solve(matrix, white)).T
    if not np.abs(columns).max() < 100:
        return None

    def numbers(*values):
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    text = name.encode("utf-16-be")
    shape = b"para\0\0\0\0" + struct.pack(">HH", 3 if len(curve) > 1 else 0, 0) + numbers(*curve)
    tags = [
        (b"desc", b"mluc\0\0\0\0" + struct.pack(">II4sII", 1, 12, b"enUS", len(text), 28) + text),
        (b"wtpt", b"XYZ \0\0\0\0" + numbers(*D50)),
    ]
    for letter, column in zip(b"rgb", columns, strict=True):
        tags += [
            (bytes([letter]) + b"XYZ", b"XYZ \0\0\0\0" + numbers(*column)),
            (bytes([letter]) + b"TRC", shape),
        ]
    table = struct.pack(">I", len(tags))
    content = b""
    for tag, value in tags:
        table += tag + struct.pack(">II", 132 + 12 * len(tags) + len(content), len(value))
        content += value + bytes(-len(value) % 4)
    head = struct.pack(">I4x", 128 + len(table) + len(content))
    head += b"\4\x30\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28) + numbers(*D50)
    return head.ljust(128, b"\0") + table + content


def from_cicp(primaries, transfer, full):
    """The profile of code points of H.273, or None if unknown; raises UnsupportedColour for HDR."""
    if transfer in HDR:
        raise UnsupportedColour(f"{HDR[transfer]}, whose white is not sRGB's")
    if not full:
        raise UnsupportedColour("levels of 16 to 235")
    if primaries not in PRIMARIES or transfer not in CURVES:
        return None
    return matrix_profile(PRIMARIES[primaries], CURVES[transfer], f"CICP {primaries}/{transfer}")


def from_png(gamma, chromaticities):
    """The profile of PNG's gAMA (encoding exponent, or None) and cHRM (eight numbers, or empty).

    1/2.2 and no gAMA mean sRGB's curve, as in libpng and ImageMagick. None for exponents beyond 10.
    """
    curve = SRGB_CURVE
    name = []
    if gamma is not None:
        name.append(f"gAMA {gamma:.5f}")
        if not 0.45 <= round(gamma, 2) <= 0.46:
            if not 0.1 <= gamma <= 10:
                return None
            curve = (1 / gamma,)
    if chromaticities:
        name.append("cHRM")
    return matrix_profile(chromaticities or BT709, curve, " ".join(name))
