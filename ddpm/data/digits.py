"""The 1,797 handwritten digits that scikit-learn carries."""

import hashlib
from functools import partial

import torch
import torch.nn.functional as F
from einops import repeat

from ddpm.data import source


def digits(image_size, channels, matte):
    """scikit-learn's 8x8 digits at 8, 16 or 32 pixels; ValueError for another size."""
    from sklearn.datasets import load_digits  # a second of start-up that other sources need not pay

    if image_size not in (8, 16, 32):
        raise ValueError(
            f"digits are 8x8 and come as 8, 16 or 32 pixels, not {image_size}; set image_size to "
            "16 or 32"
        )
    data = load_digits()
    grey = torch.from_numpy(data.images).unsqueeze(1)
    grey = F.interpolate(grey, size=(image_size, image_size), mode="bilinear", align_corners=False)
    grey = (grey * (255 / 16)).round().clamp(0, 255).to(torch.uint8)
    colours = 1 if channels < 3 else 3
    pixels = repeat(grey, "n 1 h w -> n c h w", c=colours)
    if channels != colours:
        pixels = torch.cat([pixels, torch.full_like(grey, 255)], dim=1)
    pixels = pixels.numpy()
    digest = hashlib.sha256(pixels.tobytes()).hexdigest()
    return source.Source(
        fetch=partial(source.row, pixels),
        length=len(pixels),
        image_shape=pixels.shape[1:],
        fingerprint=source.fingerprint("digits", pixels.shape, digest),
        labels=data.target.tolist(),
        classes=[str(name) for name in data.target_names],
        notes=(f"digits: {len(pixels)} images of 8x8 pixels as {image_size}x{image_size}",),
        in_memory=True,
    )
