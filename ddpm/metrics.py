"""Images become features, and features become distances to the real images: torch-fidelity behind one function.

    images    uint8 [b, c, h, w]; c = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA, transparency laid over white
    features  float32 [n, d] on the CPU, in the order of the images (the kernel distance draws its subsets by row)

Only what lies below torch-fidelity's `calculate_metrics` is used: that one caches by name, draws from the global
generators and starts workers. Version 0.4 takes the trace of the matrix root from eigenvalues, without scipy.
"""

import hashlib
import io
import logging
import os
import socket
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from einops import reduce, repeat
from safetensors import SafetensorError
from tqdm import tqdm

from ddpm import cache, checkpoint, rng
from ddpm.images import encode

FEWEST = 4  # precision and recall look at the third neighbour
MOST = 50_000  # reference images whose features are kept: 400 MB of Inception's
NEAREST = 0.05  # a copy lies nearer to a training image than all but this share of the held-out images do
ROWS = 2000  # of the distances between neighbours at once: 400 MB against that many
CHUNK = 64  # images in the extractor at once; Inception needs about 10 MB of activations for each
SUBSET = 1000  # images in each of the kernel distance's 100 subsets, where there are more

INCEPTION_HASH = "6726825d"
INCEPTION = f"weights-inception-2015-12-05-{INCEPTION_HASH}.pth"
INCEPTION_METRICS = ("fid", "kid", "precision", "recall")
DIGITS = Path(__file__).parent / "assets" / "digits-e5b6c631.safetensors"  # made by experiments/digits_extractor
OPERATIONS = {"inception": 11_422_336_192, "digits": 3_014_656}  # floating-point ones of an extractor on one image, of any size
DIGITS_METRICS = ("fd_digits", "kd_digits", "precision_digits", "recall_digits")

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extractor:
    """`extractor(images)`: uint8 images [b, c, h, w] on any device -> float32 features [b, width] on the CPU.

    Nothing is random in it. `name` tells the weights apart, `metric_names` are the Frechet distance, kernel distance,
    precision and recall under which its numbers are known.
    """

    name: str
    metric_names: tuple
    width: int
    device: torch.device
    embed: Callable

    @torch.no_grad()
    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.ndim == 4, f"images are uint8 [b, c, h, w], got {images.dtype}"
        with torch.autocast(self.device.type, enabled=False):
            chunks = [self.embed(opaque(chunk.to(self.device))).float().cpu() for chunk in images.split(CHUNK)]
        return torch.cat(chunks)


def inception(device, weights_path=""):
    """Inception v3 as FID knows it (Heusel et al. 2017), converted from TensorFlow by torch-fidelity: 2048 features.

    Its weights are the file at `weights_path`, else torch-fidelity's own below `$TORCH_HOME`, else its download. Raises
    ValueError where there are none, or where they cannot be trusted to be what their name says.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # 1.6 s of start-up

    path = Path(weights_path).expanduser() if weights_path else published_inception()
    digest = digest_of(path, f"leave it empty, or give the path of {INCEPTION}")
    published = digest.startswith(INCEPTION_HASH)
    if path.name == INCEPTION and not published:
        raise ValueError(f"{path} is damaged (its sha256 starts with {digest[:8]}); delete it to download it again")
    try:
        state = checkpoint.read(path)
        if not (isinstance(state, dict) and all(isinstance(value, torch.Tensor) for value in state.values())):
            raise ValueError("no dict of tensors")
        torch.save(state, kept := io.BytesIO())  # torch-fidelity unpickles anything, so only what has been read here
        kept.seek(0)
        with torch.random.fork_rng(devices=[]):  # a fresh network draws its first weights
            net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], kept)
    except Exception as error:
        raise ValueError(f"{path} holds no Inception weights ({one_line(error)}); give the path of others") from None
    net = net.to(device)

    def embed(images):
        return net(images if images.shape[1] == 3 else repeat(images, "b 1 h w -> b c h w", c=3))[0]

    name = "inception-v3-compat" if published else f"inception-{digest[:8]}"
    return Extractor(name, INCEPTION_METRICS, 2048, torch.device(device), embed)


def published_inception():
    """The path of torch-fidelity's weights in torch's own cache, downloaded if they are not there yet."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if path.is_file():
        return path
    patience = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        socket.setdefaulttimeout(20)  # seconds; without it a silent network is waited for without end
        torch.hub.download_url_to_file(URL_INCEPTION_V3, path, INCEPTION_HASH, progress=sys.stderr.isatty())
    except Exception as error:
        raise ValueError(
            f"no Inception weights: {path} is not there and cannot be downloaded ({one_line(error)}); "
            f"put {INCEPTION} there, or give its path: --config.evaluate.inception_weights=PATH to ddpm.main, "
            "--inception_weights=PATH to ddpm.evaluate"
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
    return path


def digits(device, inception_weights=""):
    """The small network that is shipped for scikit-learn's digits: 64 features, and no use for `inception_weights`."""
    return digits_extractor(DIGITS, device)


def digits_extractor(path, device):
    """The digits' extractor from a file that carries its hash in its name. Raises ValueError for a damaged one."""
    digest = digest_of(path, "install ddpm again")
    if not path.stem.endswith(digest[:8]):
        raise ValueError(f"{path} is damaged (its sha256 starts with {digest[:8]}); install ddpm again")
    weights = {key: value.float().to(device) for key, value in safetensors.torch.load_file(path).items()}

    def embed(images):
        return digits_features(weights, digits_input(images))

    return Extractor(f"digits-{digest[:8]}", DIGITS_METRICS, 64, torch.device(device), embed)


def digits_input(images):
    """Grey or colour images uint8 [b, c, h, w] as the digits' network takes them: [b, 1, 32, 32] in [-1, 1]."""
    grey = reduce(encode(images), "b c h w -> b 1 h w", "mean")
    return F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False, antialias=True)


def digits_features(weights, x):
    """The digits' network as it is shipped, batch norms folded into the convolutions: [b, 1, 32, 32] -> [b, 64]."""
    for layer in ("conv1", "conv2", "conv3"):
        x = F.relu(F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], padding=1))
        x = F.avg_pool2d(x, 2)
    return F.relu(F.linear(x.flatten(1), weights["features.weight"], weights["features.bias"]))


def opaque(images):
    """Images [b, c, h, w] without alpha: transparency is laid over white."""
    if images.shape[1] in (1, 3):
        return images
    colour, alpha = images[:, :-1].float(), images[:, -1:].float() / 255
    return (colour * alpha + 255 * (1 - alpha)).round().to(torch.uint8)


def digest_of(path, remedy):
    """The sha256 of a file in hex. Raises ValueError with the remedy where it cannot be read."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while piece := file.read(2**20):
                found.update(piece)
    except OSError as error:
        raise ValueError(f"cannot read the extractor's weights {str(path)!r} ({error.strerror}); {remedy}") from None
    return found.hexdigest()


def one_line(error):
    """What an exception says, short and on one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:120]


def extract(extractor, batches):
    """The features [n, d] of an iterable of image batches; of no batch, [0, d]."""
    return torch.cat([torch.empty(0, extractor.width), *map(extractor, batches)])


def reference(extractor, dataset, cache_dir=None, batch_size=256):
    """The features [n, d] of a dataset's images as they are, un-augmented, computed once and kept in a file.

    `dataset[i]` is uint8 [c, h, w] and `dataset.fingerprint` says what it holds; the file is named by that and the
    extractor. Beyond 50,000 images, 50,000 are taken at even distances. `cache_dir` defaults to `$DDPM_CACHE`, else
    `~/.cache/ddpm`; a cache that cannot be read is computed again and one that cannot be written is done without.
    """
    folder = Path(cache_dir or cache.home())
    path = folder / f"{dataset.fingerprint}-{extractor.name}.safetensors"
    try:
        if path.exists():
            return kept_in(path, extractor)
    except (SafetensorError, OSError, ValueError) as error:
        LOG.warning("features in %s cannot be read (%s); computing them again", path, error)
    indices = reference_indices(len(dataset))
    count = len(indices)
    if count < len(dataset):
        LOG.warning("%d of %d images stand for the reference, taken at even distances", count, len(dataset))
    parts = [indices[first:first + batch_size] for first in range(0, count, batch_size)]
    shown = {"desc": "features of the real images", "unit": "batch", "leave": False, "delay": 2, "disable": None}
    with ThreadPool(8) as pool:  # decoding photographs lets go of Python's lock
        batches = (torch.stack(pool.map(dataset.__getitem__, part)) for part in parts)
        features = extract(extractor, tqdm(batches, total=len(parts), **shown))
    try:
        keep(features, path)
    except OSError as error:
        LOG.warning("features cannot be kept in %s (%s); the next run computes them again", path, error)
    return features


def reference_indices(n):
    """Which of n images stand for them in the reference: all, or 50,000 at even distances."""
    count = min(n, MOST)
    return [i * n // count for i in range(count)]


def kept_in(path, extractor):
    """The features that `keep` wrote; raises ValueError where they are none of the extractor's, or others than were written."""
    with safetensors.safe_open(path, "pt") as file:
        written, tensors = (file.metadata() or {}).get("crc32"), {name: file.get_tensor(name) for name in file.keys()}
    if list(tensors) != ["features"] or tensors["features"].shape[1:] != (extractor.width,):
        raise ValueError("it holds something else")
    if written not in (None, str(checkpoint.checksum({}, tensors))):
        raise ValueError("it does not fit its checksum")
    return tensors["features"]


def keep(features, path):
    """Write features to a safetensors file, renamed into place: the runs of a sweep fill one cache at one time."""
    tensors = {"features": features.contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False)
    try:
        with part:
            part.write(safetensors.torch.save(tensors, {"crc32": str(checkpoint.checksum({}, tensors))}))
        os.replace(part.name, path)
    finally:
        Path(part.name).unlink(missing_ok=True)


def compare(generated, reference, extractor, seed=0):
    """The extractor's four numbers of generated features [n, d] against reference features [m, d].

    Frechet distance (Heusel et al. 2017, eq. 6), kernel distance (Binkowski et al. 2018), precision and recall
    (Kynkaanniemi et al. 2019), the latter two with three neighbours. Raises ValueError for fewer than four images.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    few = min(len(generated), len(reference))
    if few < FEWEST:
        raise ValueError(f"{few} images are too few to compare; measure at least {FEWEST}, better 1000 or more")
    size = min(SUBSET, few - 1)  # below the count, or its 100 subsets are all the same
    kernel = kid_features_to_metric(generated, reference, kid_subset_size=size, rng_seed=seed, verbose=False)
    cover = prc_features_to_metric(generated, reference, save_cpu_ram=True, prc_batch_size=ROWS, verbose=False)
    numbers = (
        frechet(generated, reference),
        kernel["kernel_inception_distance_mean"],
        cover["precision"],
        cover["recall"],
    )
    return dict(zip(extractor.metric_names, numbers, strict=True))


def nearest(features, others):
    """The distance [n] of each of the features [n, d] to its nearest among `others` [m, d], and which one [n] that is."""
    found = [torch.cdist(rows, others).min(dim=1) for rows in features.split(ROWS)]
    return torch.cat([each.values for each in found]), torch.cat([each.indices for each in found])


def copying(drawn, held_out):
    """How much nearer drawn images lie to the training images than unseen ones do, from both distances [n] and [m].

    `copying` is the probability that a drawn image lies nearer than a held-out one (Meehan et al. 2020, section 3.1: the
    Mann-Whitney statistic), 0.5 for a perfect generator; `copies` is the share of drawn images that lie nearer than all but
    5 % of the held-out ones, 0.05 for a perfect generator.
    """
    held_out = held_out.sort().values
    farther = len(held_out) - torch.searchsorted(held_out, drawn, right=True)
    as_far = len(held_out) - torch.searchsorted(held_out, drawn) - farther
    return {"copying": ((farther + as_far / 2) / len(held_out)).mean().item(),
            "copies": (drawn < held_out.quantile(NEAREST)).float().mean().item()}


def floor(reference, n, extractor, seed=0):
    """The Frechet distance that a perfect generator would get at `n` samples, as `{"fid_floor": ...}`.

    The generator draws `n` of the reference images [m, d] with replacement, so what is left is the bias of the count.
    """
    if min(n, len(reference)) < FEWEST:
        raise ValueError(f"{min(n, len(reference))} images are too few to compare; measure at least {FEWEST}")
    drawn = rng.generator(seed, "floor").integers(len(reference), size=n)
    return {f"{extractor.metric_names[0]}_floor": frechet(reference[drawn], reference)}


def frechet(first, second):
    """The Frechet distance between Gaussians with the moments of two sets of features [n, d] and [m, d]."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    moments = fid_features_to_statistics(first), fid_features_to_statistics(second)
    return fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]


# name -> f(device, inception_weights) -> Extractor; everything it needs is checked here, at start-up.
EXTRACTORS = {
    "inception": inception,
    "digits": digits,
}
