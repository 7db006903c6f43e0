"""Feature extractors: images to features, by Inception from torch-fidelity or the digits' network.

    images    uint8 [b, c, h, w]; c = 1 grey, 2 grey + alpha, 3 RGB, 4 RGBA on white
    features  float32 [n, d] on the CPU, in the order of the images (the kernel distance draws its
              subsets by row)

torch-fidelity's `calculate_metrics` is not used: it caches by name, draws from the global
generators and starts workers.
"""

import io
import logging
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
import torch.nn.functional as F
from einops import reduce, repeat

from ddpm.common import safe_load
from ddpm.common.errors import one_line_with_type
from ddpm.common.files import expand_user, sha256
from ddpm.common.pixels import encode
from ddpm.runtime.device import exact
from ddpm.runtime.out_of_memory import Room

MIN_IMAGES = 4  # precision and recall look at the third neighbour
CHUNK = 64  # images in the extractor at once; Inception needs about 10 MB of activations for each
KID_SUBSET = 1000  # images in each of the kernel distance's 100 subsets, where there are more

INCEPTION_HASH = "6726825d"
INCEPTION = f"weights-inception-2015-12-05-{INCEPTION_HASH}.pth"
INCEPTION_METRICS = ("fid", "kid", "precision", "recall")
# made by experiments/digits_extractor
DIGITS = Path(__file__).parent / "assets" / "digits-e5b6c631.safetensors"
# floating-point operations of an extractor on one image, of any size
OPERATIONS = {"inception": 11_422_336_192, "digits": 3_014_656}
WIDTHS = {"inception": 2048, "digits": 64}  # features
DIGITS_METRICS = ("fd_digits", "kd_digits", "precision_digits", "recall_digits")

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extractor:
    """`extractor(images)`: uint8 images [b, c, h, w] on any device -> float32 features [b, width]
    on the CPU.

    It is deterministic. `name` identifies the weights; `metric_names` names its Frechet distance,
    kernel distance, precision and recall.
    """

    name: str
    metric_names: tuple
    width: int
    device: torch.device
    embed: Callable
    room: Room = field(default_factory=Room, compare=False)

    @torch.no_grad()
    @exact()
    def __call__(self, images):
        assert images.dtype == torch.uint8 and images.ndim == 4, (
            f"images are uint8 [b, c, h, w], got {images.dtype}"
        )
        with torch.autocast(self.device.type, enabled=False):
            chunks = [
                features
                for _, features in self.room.in_batches(
                    "extracting features of", images, CHUNK, self.features
                )
            ]
        return torch.cat([torch.empty(0, self.width), *chunks])

    def features(self, images):
        """The features of a chunk of images."""
        return self.embed(opaque(images.to(self.device))).float().cpu()

    def on_device(self, work):
        """The result of `work(device)` on the extractor's GPU; on the CPU where there is none, or
        where it has too little free memory.
        """
        if self.device.type == "cuda":
            fits, result = self.room.fits(lambda: work(self.device))
            if fits:
                return result
            self.room.say(f"out of memory comparing features ({result}); using the CPU")
        return work(torch.device("cpu"))

    @property
    def computed(self):
        """What features depend on besides images and weights: device type and precision."""
        return f"{self.device.type}-float32"


def inception(device, *, weights=""):
    """The Inception v3 of FID (Heusel et al. 2017), converted from TensorFlow by torch-fidelity:
    2048 features.

    The weights are the file at the path `weights`, else torch-fidelity's own below `$TORCH_HOME`,
    else a download. Raises ValueError where they are missing, damaged or of another format.
    """
    # 1.6 s of start-up
    from torch_fidelity.feature_extractor_inceptionv3 import (
        URL_INCEPTION_V3,
        FeatureExtractorInceptionV3,
    )

    path = expand_user(weights) if weights else published_inception()
    digest = digest_of(
        path, f"leave it empty, or give the path of {INCEPTION} from {URL_INCEPTION_V3}"
    )
    published = digest.startswith(INCEPTION_HASH)
    if path.name == INCEPTION and not published:
        raise ValueError(
            f"{path} is damaged (its sha256 starts with {digest[:8]}); delete it to download it "
            "again"
        )
    try:
        state = safe_load.read(path)
        if not (
            isinstance(state, dict)
            and all(isinstance(value, torch.Tensor) for value in state.values())
        ):
            raise ValueError("no dict of tensors")
        # torch-fidelity unpickles anything, so only what has been read here
        torch.save(state, content := io.BytesIO())
        content.seek(0)
        with torch.random.fork_rng(devices=[]):  # a fresh network draws its first weights
            net = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], content)
    except Exception as error:
        raise ValueError(
            f"{path} holds no Inception weights ({one_line_with_type(error)}); give the path of "
            "others"
        ) from None
    net = net.to(device)

    def embed(images):
        return net(images if images.shape[1] == 3 else repeat(images, "b 1 h w -> b c h w", c=3))[0]

    name = "inception-v3-compat" if published else f"inception-{digest[:8]}"
    return Extractor(name, INCEPTION_METRICS, WIDTHS["inception"], torch.device(device), embed)


def published_inception():
    """The path of torch-fidelity's weights in torch's cache; downloads them if necessary."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = expand_user(torch.hub.get_dir()) / "checkpoints" / INCEPTION
    if path.is_file():
        return path
    patience = socket.getdefaulttimeout()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # seconds; the default waits forever for a silent network
        socket.setdefaulttimeout(20)
        torch.hub.download_url_to_file(
            URL_INCEPTION_V3, path, INCEPTION_HASH, progress=sys.stderr.isatty()
        )
    except Exception as error:
        raise ValueError(
            f"no Inception weights: {path} is not there and cannot be downloaded "
            f"({one_line_with_type(error)}); download {URL_INCEPTION_V3} elsewhere and put it "
            "there, or give its path: evaluate.extractor=\"inception(weights='PATH')\""
        ) from None
    finally:
        socket.setdefaulttimeout(patience)
    return path


def digits(device):
    """The small network shipped for scikit-learn's digits, 64 features."""
    return digits_extractor(DIGITS, device)


def digits_extractor(path, device):
    """The digits' extractor in a file with its hash in its name; raises ValueError where they
    differ.
    """
    digest = digest_of(path, "install ddpm again")
    if not path.stem.endswith(digest[:8]):
        raise ValueError(
            f"{path} is damaged (its sha256 starts with {digest[:8]}); install ddpm again"
        )
    weights = {
        key: value.float().to(device) for key, value in safetensors.torch.load_file(path).items()
    }

    def embed(images):
        return digits_features(weights, digits_input(images))

    return Extractor(
        f"digits-{digest[:8]}", DIGITS_METRICS, WIDTHS["digits"], torch.device(device), embed
    )


def digits_input(images):
    """Images uint8 [b, c, h, w] -> input of the digits' network [b, 1, 32, 32] in [-1, 1]."""
    grey = reduce(encode(images), "b c h w -> b 1 h w", "mean")
    return F.interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False, antialias=True)


def digits_features(weights, x):
    """The digits' network, batch norms folded into the convolutions: [b, 1, 32, 32] -> [b, 64]."""
    for layer in ("conv1", "conv2", "conv3"):
        x = F.relu(F.conv2d(x, weights[f"{layer}.weight"], weights[f"{layer}.bias"], padding=1))
        x = F.avg_pool2d(x, 2)
    return F.relu(F.linear(x.flatten(1), weights["features.weight"], weights["features.bias"]))


def opaque(images):
    """Images [b, c, h, w] without alpha, on white."""
    if images.shape[1] in (1, 3):
        return images
    colour = images[:, :-1].float()
    alpha = images[:, -1:].float() / 255
    return (colour * alpha + 255 * (1 - alpha)).round().to(torch.uint8)


def digest_of(path, remedy):
    """The sha256 of a file in hex. Raises ValueError with the remedy where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return sha256(file)
    except OSError as error:
        raise ValueError(
            f"cannot read the extractor's weights {str(path)!r} ({error.strerror}); {remedy}"
        ) from None


def extract(extractor, batches):
    """The features [n, d] of an iterable of image batches; [0, d] without a batch."""
    return torch.cat([torch.empty(0, extractor.width), *map(extractor, batches)])


# name -> f(device, *, arguments) -> Extractor, which checks its files at start-up
EXTRACTORS = {
    "inception": inception,
    "digits": digits,
}
