"""Images from MosaicML shards, local or remote."""

import io
from functools import partial

import numpy as np
from PIL import Image

from ddpm.common import files, registry
from ddpm.data import cache, folder, source
from ddpm.data import decode as data_decode
from ddpm.data.decode import UnreadableImage, decode, decode_file


def streaming(
    image_size, channels, matte, *, path, remote="", cache_limit="", image="image", label=""
):
    """Shards that MosaicML Streaming wrote, in the folder `path`: for images beyond one disk or
    machine.

    What is not there is brought from `remote` (a folder, s3://, gs://, ...) when it is first asked
    for; with a `cache_limit` ("200gb") what came first goes again. The column `image` holds
    contents of image files, pictures or uint8 arrays [h, w] and [h, w, c]; `label`, if given, class
    numbers or names, all read once. Images are not looked at beforehand: smaller ones are enlarged.
    Raises ValueError where that is not so, and at an image that cannot be read.
    """
    from ddpm.data.shards import Shards  # its library is optional, and seconds of start-up

    shards = Shards(str(path), remote if source.DOWNLOADS.get() else "", cache_limit)
    for name in (image, label) if label else (image,):
        if name not in shards.columns:
            raise ValueError(
                f"the shards in {str(path)!r} have no column "
                f"{name!r}{registry.suggest(name, shards.columns)}; choose image= and label= of "
                f"{', '.join(shards.columns) or 'none'}"
            )
    shape = (channels, image_size, image_size)
    fetch = partial(fetch_sample, shards, image, image_size, channels, matte)
    fetch(0)
    labels, classes = labels_of(shards, label) if label else (None, None)
    return source.Source(
        fetch=fetch,
        length=len(shards),
        image_shape=shape,
        fingerprint=source.fingerprint(
            "streaming",
            data_decode.PREPROCESSING,
            folder.CONVERSION_VERSION,
            shape,
            matte,
            image,
            label,
            shards.digest,
        ),
        labels=labels,
        classes=classes,
        notes=(
            f"streaming {path}: {registry.quantity(len(shards), 'image')} in "
            f"{registry.quantity(len(shards.sizes), 'shard')}{f' of {remote}' if remote else ''}",
            *folder.verdict(*folder.fitness(len(shards))),
        ),
    )


def labels_of(shards, column):
    """Class numbers of all samples by a column of numbers or names, and the classes' names;
    remembered once they are read.
    """
    with files.cached_json(f"labels/{source.fingerprint(shards.digest, column)}") as known:
        if "labels" not in known:
            found = cache.map_in_threads(
                lambda index: shards[index][column], range(len(shards)), f"reading {column!r}"
            )
            known["labels"] = [
                one
                if isinstance(one, str)
                else int(one)
                if isinstance(one, (int, np.integer))
                else None
                for one in found
            ]
        given = known["labels"]
    kinds = {type(one) for one in given}
    if kinds == {str}:
        classes = sorted(set(given))
        numbers = {name: number for number, name in enumerate(classes)}
        return [numbers[name] for name in given], classes
    if kinds != {int} or min(given) < 0:
        raise ValueError(
            f"the column {column!r} holds no labels; give one of numbers from 0 on, or of names"
        )
    return given, [str(number) for number in range(max(given) + 1)]


def fetch_sample(shards, column, image_size, channels, matte, index):
    """Image `index` of shards; raises ValueError where their column holds none."""
    sample = shards[index]
    try:
        value = sample[column]
        if isinstance(value, bytes):
            return decode_file(io.BytesIO(value), image_size, channels, matte)
        if not isinstance(value, (np.ndarray, Image.Image)):
            raise UnreadableImage("not an image", type(value).__name__)
        return decode(
            Image.fromarray(value) if isinstance(value, np.ndarray) else value,
            image_size,
            channels,
            matte,
        )
    except Exception as error:
        if data_decode.is_our_fault(error):
            raise
        raise ValueError(
            f"column {column!r} of sample {index} in {shards.folder} is no image that can be read "
            f"({type(error).__name__}); name another column by image=, or write the shards anew"
        ) from None
