"""What a picture file holds, found without keeping its pixels: size, faults, digest, signature."""

import base64
import hashlib

from einops import reduce

from ddpm.data import colour, decode, duplicates


def examine(path):
    """The Facts of an image file, which is read and decoded once."""
    try:
        with decode.regular(path) as file:
            with decode.opened(file) as image:
                form = image.format
                mode = image.mode
                size = image.size
                animated = is_animated(image)
                deep = decode.is_deep(image)
                transparent = image.has_transparency_data
                pixels, done = decode.decoded(
                    image, duplicates.SIDE, 4 if transparent else 3, decode.WHITE
                )
                orientation, (profile, unread) = decode.orientation_of(image), colour.of(image)
                reach = decode.reach_of(image) if deep else 0
            digest = digest_of(file)
    except decode.Refused as refused:
        return decode.Facts(refused.fault)
    except OSError:  # of a disk, or of a file that went away meanwhile
        return decode.Facts("not readable")
    if transparent:
        alpha = pixels[3:].float() / 255
        transparent = bool((alpha < 1).any())
        pixels = (pixels[:3] * alpha + 255 * (1 - alpha)).round()
    low = reduce(pixels.float(), "c h w -> c", "min")
    high = reduce(pixels.float(), "c h w -> c", "max")
    blank = bool((high - low <= decode.BLANK).all())
    trace = (
        ""
        if blank
        else base64.b85encode(duplicates.trace(pixels.float().mean(0).numpy()).tobytes()).decode()
    )
    form = "JPEG" if form == "MPO" else form
    return decode.Facts(
        "",
        digest,
        *decode.upright(size, orientation),
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
        if decode.is_ours(error):
            raise
        return False


def digest_of(file):
    """Sha256 in hex of an open file's content."""
    file.seek(0)
    digest = hashlib.sha256()
    while piece := file.read(2**20):
        digest.update(piece)
    return digest.hexdigest()


def format_in(path):
    """The format of the picture in a file, by its header; empty where there is none."""
    try:
        with decode.opened(path) as image:
            return image.format
    except decode.Refused:
        return ""
