"""Images to learn from, by name: digits, folder, torchvision or streaming.

A source is a pure function from an index to a uint8 image [c, h, w]; flips and noise belong to the
training step.
"""

import torch

from ddpm.common import pixels, registry
from ddpm.data import digits, folder, streaming, torchvision_sets
from ddpm.data.decode import MODES, WHITE


def open_source(text, image_size, channels=3, matte=WHITE):
    """Build the source that a spec such as `"digits"` or `"folder(path='data/cats')"` names.

    Images come as [channels, image_size, image_size]; transparency is laid over the colour `matte`
    (r, g, b), or kept as alpha by 2 and 4 channels. Raises ValueError for an unknown source, a
    wrong option, or data that is not there.
    """
    registry.check_choice("number of channels", channels, list(MODES))
    if not (
        len(matte) == 3 and all(isinstance(value, int) and 0 <= value <= 255 for value in matte)
    ):
        raise ValueError(
            f"matte {matte!r} is no colour; give three whole numbers from 0 to 255, such as {WHITE}"
        )
    if image_size < 1:
        raise ValueError(f"image_size {image_size} is not a number of pixels; use 1 or more")
    return registry.resolve("data source", SOURCES, text)(image_size, channels, tuple(matte))


class ImageDataset(torch.utils.data.Dataset):
    """Float images [3, image_size, image_size] in [-1, 1] from a folder, or "digits", for a
    training loop of one's own.

    With `augment` images are mirrored at random by torch's generator. Raises ValueError as `folder`
    and `digits` do.
    """

    def __init__(self, data_dir, image_size, augment=False):
        text = "digits" if str(data_dir) == "digits" else f"folder(path={str(data_dir)!r})"
        self.source = open_source(text, image_size, 3)
        self.augment = augment

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        image = pixels.encode(self.source[index])
        return image.flip(-1) if self.augment and torch.rand(()) < 0.5 else image


# name -> f(image_size, channels, matte, **options) -> Source
SOURCES = {
    "digits": digits.digits,
    "folder": folder.folder,
    "torchvision": torchvision_sets.torchvision_set,
    "streaming": streaming.streaming,
}
