"""The keys of every network's state dict, and the order in which initial weights are drawn."""

import hashlib

import pytest
import torch

from ddpm.models import MODELS

UNET = dict(
    image_size=16,
    in_channels=3,
    out_channels=3,
    model_channels=16,
    channel_mult=(1, 2, 2),
    num_res_blocks=2,
    attention_resolutions=(8, 4),
)
CASES = {
    "unet": ("unet", UNET),
    "unet with everything": (
        "unet",
        UNET
        | dict(
            num_head_channels=8,
            use_scale_shift_norm=True,
            resblock_updown=True,
            num_classes=3,
            qk_norm=True,
            res_blocks_per_level=(1, 2, 1),
            augmentation=9,
            initialization="torch",
        ),
    ),
    "unet, augmentation after": (
        "unet",
        UNET | dict(num_classes=3, augmentation=9, augmentation_place="after"),
    ),
    "unet_edm2": ("unet_edm2", UNET | dict(num_head_channels=8)),
    "unet_edm2 with everything": (
        "unet_edm2",
        UNET | dict(num_heads=2, num_classes=3, noise_embedding="fourier"),
    ),
    "dit": ("dit", dict(image_size=16, in_channels=3, out_channels=6, depth=2, width=96, heads=4)),
    "dit with everything": (
        "dit",
        dict(
            image_size=(16, 8),
            in_channels=3,
            out_channels=3,
            num_classes=3,
            qk_norm=True,
            augmentation=9,
            augmentation_place="after",
            depth=2,
            width=96,
            heads=4,
        ),
    ),
}


def layout(net):
    """The first 12 digits of the SHA-256 of a state dict's keys and shapes, in order."""
    lines = [f"{key} {tuple(value.shape)}" for key, value in net.state_dict().items()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:12]


def fingerprint(net):
    """A number that changes with the order of the draws: a weighted sum of first elements."""
    firsts = [value.flatten()[0].double() for value in net.parameters()]
    return sum((k + 1) * first for k, first in enumerate(firsts)).item()


# recorded at commit a7a5211: old checkpoints and the results of recorded runs depend on them
RECORDED = {
    "unet": ("29e897ece91a", 6106.806459511688),
    "unet with everything": ("0efb6e6f7adf", 8314.129281954723),
    "unet, augmentation after": ("78ef95f87712", 6338.780665031634),
    "unet_edm2": ("7cc2939c8abb", -21.163216535001993),
    "unet_edm2 with everything": ("5b34d740f6ad", -308.0118181332946),
    "dit": ("e121f846ed27", 1.8188546933233738),
    "dit with everything": ("8b9f0ce66e41", 73.62151092448039),
}


@pytest.mark.parametrize("case", CASES)
def test_initial_weights_are_those_of_recorded_runs(case):
    name, options = CASES[case]
    torch.manual_seed(0)
    net = MODELS[name](**options)
    expected_layout, expected = RECORDED[case]
    assert layout(net) == expected_layout
    # float32 draws: other CPUs round them differently by a few units in the last place
    assert fingerprint(net) == pytest.approx(expected, rel=1e-5)
