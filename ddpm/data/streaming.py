"""Images from MosaicML shards, local or remote."""

import io
from functools import partial

import numpy as np
from PIL import Image

from ddpm.common import files, registry
from ddpm.data import cache, decode, folder, source
from ddpm.data.limits import UnreadableImage


def streaming(
    image_size, channels, matte, *, path, remote="", cache_limit="", image="image", label=""
):
    """Shards that MosaicML Streaming wrote, in the folder `path`, for more than one disk holds.

    Missing shards are downloaded on demand from `remote` (a folder, s3://, gs://, ...); beyond
    `cache_limit` ("200gb") the oldest are removed. The column `image` holds contents of image
    files, PIL images or uint8 arrays [h, w] or [h, w, c]; `label`, if given, numbers or names.
    Images are not scanned beforehand, and small ones are enlarged. Raises ValueError where shards
    or columns do not fit, and at an image that cannot be read.
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
    versions = decode.PREPROCESSING, decode.CONVERSION_VERSION
    return source.Source(
        fetch=fetch,
        length=len(shards),
        image_shape=shape,
        fingerprint=source.fingerprint(
            "streaming", *versions, shape, matte, image, label, shards.digest
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
    """(class numbers of all samples, names of the classes) from a column of numbers or names.

    Cached by the shards' index. Raises ValueError for a column of anything else.
    """
    with files.cached_json(f"labels/{source.fingerprint(shards.digest, column)}") as cached:
        if "labels" not in cached:
            values = cache.map_in_threads(
                lambda index: shards[index][column], range(len(shards)), f"reading {column!r}"
            )
            cached["labels"] = list(map(as_label, values))
        labels = cached["labels"]
    kinds = set(map(type, labels))
    if kinds == {str}:
        classes = sorted(set(labels))
        numbers = {name: number for number, name in enumerate(classes)}
        return [numbers[name] for name in labels], classes
    if kinds != {int} or min(labels) < 0:
        raise ValueError(
            f"the column {column!r} holds no labels; give one of numbers from 0, or of names"
        )
    return labels, [str(number) for number in range(max(labels) + 1)]


def as_label(value):
    """A name or a number as JSON can write it, or None for anything else."""
    if isinstance(value, str):
        return value
    return int(value) if isinstance(value, (int, np.integer)) else None


def fetch_sample(shards, column, image_size, channels, matte, index):
    """Image `index` of shards; raises ValueError where the column has no readable image."""
    sample = shards[index]
    try:
        value = sample[column]
        if isinstance(value, bytes):
            return decode.decode_file(io.BytesIO(value), image_size, channels, matte)
        if isinstance(value, np.ndarray):
            value = Image.fromarray(value)
        if not isinstance(value, Image.Image):
            raise UnreadableImage("not an image", type(value).__name__)
        return decode.decode(value, image_size, channels, matte)[0]
    except Exception as error:
        if decode.is_our_fault(error):
            raise
        raise ValueError(
            f"column {column!r} of sample {index} in {shards.folder} is not a readable image "
            f"({type(error).__name__}); name another column as image=, or write the shards again"
        ) from None
