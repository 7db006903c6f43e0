"""The features of the real images that distances compare with, in a cache."""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from tqdm import tqdm

from ddpm.common import files, safe_load
from ddpm.common.files import atomic_write
from ddpm.data import cache, order
from ddpm.evaluation import distances, extractors

MAX_FEATURES = 50_000  # reference images whose features are kept: 400 MB of Inception's


@dataclass(frozen=True)
class Reference:
    """Real images: features [m, d] of at most 50,000, the moments of all, and a unique name.

    `root` is that of the Gaussian of the moments; `radii` [m] are the squared distances of the
    features to their third neighbours. Both are None where a file lacks them.
    """

    features: torch.Tensor
    moments: distances.Moments
    name: str
    root: torch.Tensor | None = None
    radii: torch.Tensor | None = None

    @classmethod
    def of(cls, features, name="", moments=None, device=None):
        """The Reference of features [n, d] and, where there are more images, of their moments."""
        moments = moments or distances.Moments.of(features)
        if moments.count == len(features) < features.shape[1]:
            root = distances.Gaussian.of(features).root
        else:
            root = distances.Gaussian.of_moments(moments).root.contiguous()
        nobody = torch.empty(len(features), 0, device=device)
        _, radii = distances.within(features.to(device), nobody)
        return cls(features, moments, name, root, radii.cpu())

    def gaussian(self, device=None):
        """The Gaussian of all images on a device."""
        return distances.Gaussian(self.moments.mean.to(device), self.root.to(device))


def reference(extractor, dataset, cache_dir=None, batch_size=256):
    """The Reference of a dataset's images without augmentation, computed once and cached in a file.

    `dataset[i]` is uint8 [c, h, w]; the file is named by `dataset.fingerprint`, the extractor and
    its precision. Of more than 50,000 images, all enter the moments, and 50,000 at even distances
    keep their features. `cache_dir` defaults to `$DDPM_CACHE`, else `~/.cache/ddpm`. An unreadable
    cache is computed again; an unwritable one is skipped with a warning.
    """
    name = f"{dataset.fingerprint}-{extractor.name}-{extractor.computed}"
    stored = None
    try:
        path = Path(cache_dir or files.cache_dir()) / f"{name}.safetensors"
        if path.exists():
            stored = load_features(path, extractor, name)
    except (SafetensorError, OSError, ValueError) as error:
        extractors.LOG.warning("features %s cannot be read (%s); computing them again", name, error)
    if stored and stored.root is not None:
        return stored
    if stored:
        features, moments = stored.features, stored.moments
    else:
        features, moments = extract(extractor, dataset, batch_size)
    result = extractor.on_device(lambda device: Reference.of(features, name, moments, device))
    try:
        save_features(result, Path(cache_dir or files.cache_dir()) / f"{name}.safetensors")
    except (OSError, ValueError) as error:
        extractors.LOG.warning(
            "features cannot be kept (%s); the next run computes them again", error
        )
    return result


def extract(extractor, dataset, batch_size):
    """(Features of at most 50,000 images of a dataset, Moments of all)."""
    count = len(dataset)
    chosen = set(reference_indices(count))
    if len(chosen) < count:
        extractors.LOG.warning(
            "the Frechet distance is to all %d images, the other numbers to %d of them, taken at "
            "even distances",
            count,
            len(chosen),
        )
    moments = distances.Moments.none(extractor.width)
    chosen_features = [torch.empty(0, extractor.width)]
    shown = {
        "desc": "features of the real images",
        "unit": "batch",
        "leave": False,
        "delay": 2,
        "disable": None,
    }
    with cache.thread_pool(8) as pool:
        for first in tqdm(range(0, count, batch_size), **shown):
            part = range(first, min(first + batch_size, count))
            features = extractor(torch.stack(list(pool.map(dataset.__getitem__, part))))
            moments.add(features, torch.ones(len(part)))
            chosen_features.append(features[[index in chosen for index in part]])
    return torch.cat(chosen_features), moments


def reference_indices(n):
    """The indices of the n images whose features are kept: all, or 50,000 at even distances."""
    return order.evenly_spaced(range(n), MAX_FEATURES)


def load_features(path, extractor, name):
    """The Reference in a file; raises ValueError where it is damaged or of another extractor."""
    with safetensors.safe_open(path, "pt") as file:
        written = (file.metadata() or {}).get("crc32")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    if tensors.keys() - {"root", "radii"} != {"features", "count", "mean", "scatter"}:
        raise ValueError(
            f"it holds {', '.join(sorted(tensors)) or 'nothing'} and not features with the "
            "moments of all images"
        )
    if tensors["features"].shape[1:] != tensors["mean"].shape or tensors["mean"].shape != (
        extractor.width,
    ):
        raise ValueError("it holds features of another width")
    if written != str(safe_load.checksum({}, tensors)):
        raise ValueError("it does not fit its checksum")
    return Reference(
        tensors["features"],
        distances.Moments(int(tensors["count"]), tensors["mean"], tensors["scatter"]),
        name,
        tensors.get("root"),
        tensors.get("radii"),
    )


def save_features(reference, path):
    """Write a Reference to a file, renamed into place: the runs of a sweep share one cache."""
    moments = reference.moments
    tensors = {
        "features": reference.features.contiguous(),
        "count": torch.tensor(moments.count),
        "mean": moments.mean,
        "scatter": moments.scatter,
        "root": reference.root,
        "radii": reference.radii,
    }
    own = path.with_suffix(f".{secrets.token_hex(4)}")
    with atomic_write(own) as part:
        part.write_bytes(
            safetensors.torch.save(tensors, {"crc32": str(safe_load.checksum({}, tensors))})
        )
    os.replace(own, path)
