"""What a picture file holds, found without keeping its pixels: size, faults, digest, signature."""

import base64

from einops import reduce

from ddpm.common.files import sha256
from ddpm.data import colour, decode, duplicates


def inspect_image(path):
    """The ImageInfo of an image file, which is read and decoded once."""
    try:
        with decode.open_regular_file(path) as file:
            with decode.open_image(file) as image:
                form = image.format
                mode = image.mode
                size = image.size
                animated = is_animated(image)
                deep = decode.exceeds_8_bits(image)
                transparent = image.has_transparency_data
                pixels, done = decode.decoded(
                    image, duplicates.SIDE, 4 if transparent else 3, decode.WHITE
                )
                orientation, (profile, unread) = (
                    decode.orientation_of(image),
                    colour.profile_of(image),
                )
                reach = decode.largest_value(image) if deep else 0
            digest = sha256(file)
    except decode.UnreadableImage as refused:
        return decode.ImageInfo(refused.fault)
    except OSError:  # of a disk, or of a file that went away meanwhile
        return decode.ImageInfo("not readable")
    if transparent:
        alpha = pixels[3:].float() / 255
        transparent = bool((alpha < 1).any())
        pixels = (pixels[:3] * alpha + 255 * (1 - alpha)).round()
    low = reduce(pixels.float(), "c h w -> c", "min")
    high = reduce(pixels.float(), "c h w -> c", "max")
    blank = bool((high - low <= decode.ONE_COLOUR_RANGE).all())
    trace = (
        ""
        if blank
        else base64.b85encode(
            duplicates.signature(pixels.float().mean(0).numpy()).tobytes()
        ).decode()
    )
    form = "JPEG" if form == "MPO" else form
    return decode.ImageInfo(
        "",
        digest,
        *decode.upright_size(size, orientation),
        form,
        mode,
        orientation,
        transparent,
        animated,
        blank,
        trace,
        profile.name if profile else "",
        unread,
        reach,
        done,
    )


def is_animated(image):
    """Whether a PIL image has further frames that are shown after the first; a photo's depth map
    is none.
    """
    try:
        return image.format != "MPO" and (
            image.info.get("frames", 0) > 1 or bool(getattr(image, "is_animated", False))
        )
    except Exception as error:  # whatever is behind the first frame is not read
        if decode.is_our_fault(error):
            raise
        return False


def format_of(path):
    """The format of the picture in a file, by its header; empty where there is none."""
    try:
        with decode.open_image(path) as image:
            return image.format
    except decode.UnreadableImage:
        return ""
