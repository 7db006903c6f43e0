"""What an image file contains: size, format, faults, digest, signature; its pixels are not kept."""

import base64
from typing import NamedTuple

import numpy as np
from einops import reduce

from ddpm.common.files import sha256
from ddpm.data import colour, decode, duplicates, limits

SCAN_VERSION = 3  # increase it if `inspect_image` gives another ImageInfo of the same file
ONE_COLOUR_RANGE = 2  # levels by which JPEG lets an image of one colour vary


class ImageInfo(NamedTuple):
    """What a scan finds in one image file; of one that is left out only its `fault`."""

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
    profile: str = ""  # the name of the profile from which it is converted; empty for sRGB
    unread_profile: bool = False  # it has one that cannot be used
    max_value: int = 0  # largest value, of 65535, of one with more than 8 bits a channel
    conversions: str = ""  # those that PIL alone would not do, in words

    @property
    def signature_vectors(self):
        """The signature as `duplicates` compares it, int8 [2, 64]."""
        return np.frombuffer(base64.b85decode(self.signature), np.int8).reshape(2, -1)


def inspect_image(path):
    """The ImageInfo of an image file, which is read and decoded once."""
    try:
        with limits.open_regular_file(path) as file:
            with decode.open_image(file) as image:
                size = image.size
                mode = image.mode
                animated = is_animated(image)
                exceeds_8_bits = decode.exceeds_8_bits(image)
                transparent = image.has_transparency_data
                channels = 4 if transparent else 3
                pixels, conversions = decode.decode(image, duplicates.SIDE, channels, decode.WHITE)
                orientation = decode.orientation_of(image)
                profile, unread_profile = colour.profile_of(image)
                max_value = decode.largest_value(image) if exceeds_8_bits else 0
            digest = sha256(file)
    except limits.UnreadableImage as error:
        return ImageInfo(error.fault)
    except OSError:  # the disk fails, or the file is gone
        return ImageInfo("not readable")
    if transparent:
        alpha = pixels[3:].float() / 255
        transparent = bool((alpha < 1).any())
        pixels = (pixels[:3] * alpha + 255 * (1 - alpha)).round()
    pixels = pixels.float()
    spread = reduce(pixels, "c h w -> c", "max") - reduce(pixels, "c h w -> c", "min")
    one_colour = bool((spread <= ONE_COLOUR_RANGE).all())
    signature = b"" if one_colour else duplicates.signature(pixels.mean(0).numpy()).tobytes()
    width, height = decode.upright_size(size, orientation)
    return ImageInfo(
        digest=digest,
        width=width,
        height=height,
        format="JPEG" if image.format == "MPO" else image.format,
        mode=mode,
        orientation=orientation,
        transparent=transparent,
        animated=animated,
        one_colour=one_colour,
        signature=base64.b85encode(signature).decode(),
        profile=profile.name if profile else "",
        unread_profile=unread_profile,
        max_value=max_value,
        conversions=conversions,
    )


def is_animated(image):
    """Whether a PIL image shows further frames after the first; a photo's depth map is not one."""
    try:
        is_sequence = bool(getattr(image, "is_animated", False))
        return image.format != "MPO" and (image.info.get("frames", 0) > 1 or is_sequence)
    except Exception as error:  # frames after the first are not read
        if decode.is_our_fault(error):
            raise
        return False


def format_of(path):
    """The format of the image in a file by its header, "" if it has none."""
    try:
        with decode.open_image(path) as image:
            return image.format
    except limits.UnreadableImage:
        return ""
