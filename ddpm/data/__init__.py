"""Images by name: digits, folder, torchvision or streaming; `SOURCES` is the table."""

import torch

from ddpm.common import pixels, registry
from ddpm.data import digits, folder, streaming, torchvision_sets
from ddpm.data.decode import MODES, WHITE


def open_source(text, image_size, channels=3, matte=WHITE):
    """Build the Source that `"digits"`, `"folder(path='data/cats')"` or another text names.

    Images are uint8 [channels, image_size, image_size]; 1 and 3 channels lay transparency over the
    colour `matte` (r, g, b), 2 and 4 keep it as alpha. Raises ValueError for an unknown source, a
    wrong option, or missing data.
    """
    registry.check_choice("number of channels", channels, list(MODES))
    is_colour = all(isinstance(value, int) and 0 <= value <= 255 for value in matte)
    if not (len(matte) == 3 and is_colour):
        raise ValueError(
            f"matte {matte!r} is not a colour; give three integers from 0 to 255, such as {WHITE}"
        )
    if image_size < 1:
        raise ValueError(f"image_size {image_size} is not a number of pixels; use 1 or more")
    return registry.resolve("data source", SOURCES, text)(image_size, channels, tuple(matte))


class ImageDataset(torch.utils.data.Dataset):
    """Float images [3, image_size, image_size] in [-1, 1] for your own loop: a folder or "digits".

    `augment` mirrors at random by torch's generator. Raises ValueError as `open_source` does.
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
