"""The magnitude-preserving U-Net: its property through depth and training, and the published
sizes.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from einops import rearrange
from torch import nn

from ddpm.config import files
from ddpm.experiment import build, drawing, load
from ddpm.generate import generate_images
from ddpm.models import MODELS, UNet
from ddpm.models.unet_edm2 import (
    MPBlock,
    MPConv,
    MPFourier,
    MPSines,
    UNetEDM2,
    mp_cat,
    mp_silu,
    mp_sum,
    unit,
)
from ddpm.sampling.draw import concatenate
from ddpm.training import checkpoint
from support.networks import TINY
from support.runs import run, tiny


def network(**changes):
    torch.manual_seed(0)
    return UNetEDM2(**TINY | changes)


def inputs(batch=4, size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, size, size, generator=generator), 1000 * torch.rand(
        batch, generator=generator
    )


def mean_square(x):
    return x.double().square().mean().item()


def lengths(net):
    """The root mean squares of all weight vectors."""
    return torch.cat(
        [
            layer.weight.flatten(1).square().mean(1).sqrt()
            for layer in net.modules()
            if isinstance(layer, MPConv)
        ]
    )


@pytest.mark.parametrize(
    "width, millions", [(128, 125), (192, 280), (256, 498), (320, 777), (384, 1119), (448, 1523)]
)
def test_the_sizes_xs_to_xxl_are_the_published_ones(width, millions):
    """Karras et al. 2024, table 2: latents of 64 pixels, 1,000 classes, 64 channels a head."""
    with torch.device("meta"):
        net = UNetEDM2(
            64, 4, 4, width, (1, 2, 3, 4), 3, (16, 8), num_head_channels=64, num_classes=1000
        )
    assert round(sum(weight.numel() for weight in net.parameters()) / 1e6) == millions


def test_every_piece_keeps_the_mean_square():
    torch.manual_seed(0)
    a = torch.randn(50, 30, 20, 20)
    b = torch.randn(50, 10, 20, 20)
    # 0.596 is the paper's rounding, by 1e-3 in the square; the error of a mean of 600,000 is
    # another 2e-3
    assert mean_square(mp_silu(a)) == pytest.approx(1, abs=5e-3)
    for t in (0.3, 0.5):
        # five errors of a mean
        assert mean_square(mp_sum(a, torch.randn_like(a), t)) == pytest.approx(1, abs=1e-2)
        joined = mp_cat(a, b, t)
        assert mean_square(joined) == pytest.approx(1, abs=1e-2)
        # what the layer after it sums up of each is as t wants, although one has three times the
        # channels
        shares = [part.double().square().sum().item() for part in joined.split([30, 10], dim=1)]
        assert math.sqrt(shares[1] / shares[0]) == pytest.approx(t / (1 - t), rel=1e-2)
    for dim in (8, 9, 64):  # sin^2 + cos^2 = 1, up to float32
        square = MPSines(dim)(torch.tensor([0, 0.5, 17, 999, 3999.0])).square().mean(1)
        torch.testing.assert_close(square, torch.ones(5), rtol=0, atol=1e-5)
    x = unit(7 * a, (1,))
    # eps of 1e-4, in places of 1 / 7
    torch.testing.assert_close(x.square().mean(1), torch.ones(50, 20, 20), rtol=0, atol=1e-3)
    inside = MPConv(30, 100, 3)(a)[..., 1:-1, 1:-1]  # away from the zeros around an image
    for out in (inside, MPConv(30, 100)(rearrange(a, "b c h w -> (b h w) c"))):
        # 600,000 inputs are of mean square 1 to 2e-3
        assert mean_square(out) == pytest.approx(1, abs=1e-2)


def directions(x):
    """The singular values of x [n, d], less its mean, over the largest."""
    values = torch.linalg.svdvals((x - x.mean(0)).double())
    return values / values[0]


C_NOISE = torch.linspace(math.log(0.002), math.log(80), 400) / 4  # the levels of Karras et al. 2022


def test_fourier_features_tell_levels_of_noise_apart_as_published():
    """Eq. 75, cos(2 pi (f c + phi)) with normal f: in the mean over f, products of features are a
    Gaussian kernel.

    The kernel's eigenvalues say in how many directions an embedding of many channels moves; 20,000
    random ones come as near as their root, 0.7 %, several times. Sines made for timesteps move in
    one direction and a quarter of another.
    """
    features = MPFourier(20_000)(C_NOISE)
    assert features.square().mean() == pytest.approx(1, abs=0.01)
    kernel = torch.exp(-0.5 * (2 * math.pi * (C_NOISE[:, None] - C_NOISE)).double() ** 2)
    centred = kernel - kernel.mean(0) - kernel.mean(1, keepdim=True) + kernel.mean()
    values = torch.linalg.eigvalsh(centred).flip(0)[:5].sqrt()
    torch.testing.assert_close(directions(features)[:5], values / values[0], rtol=0.03, atol=0)
    assert (
        directions(MPSines(192)(C_NOISE))[2] < 0.05 < 0.5 < directions(MPFourier(192)(C_NOISE))[4]
    )
    assert torch.equal(features, MPFourier(20_000)(C_NOISE))


@pytest.mark.parametrize(
    "predict, chosen, kind",
    [
        ("edm", "auto", MPFourier),
        ("edm(sigma_data=0.4)", "auto", MPFourier),
        ("edm", "sines", MPSines),
        ("v", "auto", MPSines),
    ],
)
def test_the_target_chooses_the_embedding(predict, chosen, kind):
    given = tiny(
        model__name="unet_edm2",
        diffusion__predict=predict,
        model__conventions=f"ho(noise_embedding='{chosen}')",
    )
    net = build.network(given)
    assert type(net.noise_features) is kind
    other = build.network(files.changed(given, {"diffusion.predict": "eps"}))
    assert all(
        torch.equal(weight, same)
        for weight, same in zip(net.parameters(), other.parameters(), strict=True)
    )


OLD = Path(__file__).parents[1] / "golden" / "unet_mp_sines.safetensors"


def test_checkpoints_of_before_fourier_features_draw_the_same():
    """Trained with predict=edm and drawn at commit 0494cba; another processor may round a pixel to
    the next value.

    The network was called unet_mp then.
    """
    made = load.load(OLD, "cpu")
    assert made.config.model.name == "unet_edm2"
    assert made.config.model.conventions == "ho(noise_embedding='sines')"
    assert made.config.diffusion.predict == "edm"
    pixels = concatenate(
        drawing.drawer(made.config, made.net, made.machine)(
            range(2), build.grid_recipe(made.config)
        )
    )
    before = torch.tensor(json.loads(OLD.with_suffix(".json").read_text()))
    assert abs(pixels.int() - before).max() <= 1


def test_only_old_configs_of_unet_edm2_with_edm_mean_sines():
    for changes, meant in (
        ({}, "auto"),
        ({"model.name": "unet_edm2"}, "auto"),
        ({"diffusion.predict": "edm"}, "auto"),
        ({"model.name": "unet_edm2", "diffusion.predict": "edm(sigma_data=0.4)"}, "sines"),
    ):
        saved = json.loads(files.to_json(files.changed(tiny(), changes)))
        del saved["model"]["conventions"]
        back = files.from_json(json.dumps(saved))
        assert build.conventions(back)["noise_embedding"] == meant
        saved["model"]["noise_embedding"] = "auto"
        back = files.from_json(json.dumps(saved))
        assert build.conventions(back)["noise_embedding"] == "auto"


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_res_blocks=6),
        dict(num_res_blocks=6, attention_resolutions=(32,)),
        dict(channel_mult=(1,), model_channels=64, num_res_blocks=3, num_classes=10),
    ],
)
def test_activations_keep_their_mean_square_through_depth(changes):
    net = network(
        **dict(image_size=64, model_channels=32) | dict(attention_resolutions=()) | changes
    ).eval()
    found = []
    for block in net.modules():
        if isinstance(block, MPBlock):
            block.register_forward_hook(lambda module, given, out: found.append(mean_square(out)))
    with torch.no_grad():
        net(*inputs(2, 64), torch.tensor([3, -1]) if "num_classes" in changes else None)
    # sums are of nearly uncorrelated parts and few channels; plain sums would grow by 1 a block
    assert len(found) >= 9 and all(0.6 < square < 1.5 for square in found)


def test_the_optimiser_cannot_change_the_length_of_a_weight():
    net = network().train()
    nn.init.ones_(net.gain)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    for _ in range(3):
        (net(*inputs()) - 1).square().mean().backward()
        for layer in net.modules():
            if isinstance(layer, MPConv) and layer.weight.grad is not None:
                along = (layer.weight * layer.weight.grad).flatten(1).sum(1)
                whole = layer.weight.flatten(1).norm(dim=1) * layer.weight.grad.flatten(1).norm(
                    dim=1
                )
                # eps of 1e-4 leaves that much of it
                assert (along.abs() <= 1e-3 * whole + 1e-7).all()
        optimizer.step()
        optimizer.zero_grad()
        assert (lengths(net) - 1).abs().max() > 1e-2
        net(*inputs())
        # eps of 1e-4
        torch.testing.assert_close(lengths(net), torch.ones_like(lengths(net)), rtol=0, atol=2e-4)
    moved = {name: value.clone() for name, value in net.state_dict().items()}
    net.eval()(*inputs())
    assert all(torch.equal(value, moved[name]) for name, value in net.state_dict().items())


def test_the_length_of_a_weight_means_nothing():
    net = network(num_classes=4).eval()
    nn.init.ones_(net.gain)
    for block in net.modules():
        if isinstance(block, MPBlock):
            nn.init.constant_(block.gain, 0.5)
    given = (*inputs(), torch.tensor([0, 1, 3, -1]))
    with torch.no_grad():
        before = net(*given)
        for layer in net.modules():
            if isinstance(layer, MPConv):
                layer.weight *= (
                    10 * torch.rand(len(layer.weight), *[1] * (layer.weight.dim() - 1)) + 1
                )
        # eps of 1e-4, in some twenty layers
        torch.testing.assert_close(net(*given), before, rtol=0, atol=0.02)
    assert mean_square(before) > 0.1


def test_a_fresh_network_returns_zeros_and_labels_matter():
    net = network(num_classes=4).eval()
    (x, t), y = inputs(), torch.tensor([0, 1, 2, 3])
    assert torch.equal(net(x, t, y), torch.zeros_like(x))
    for parameter in (
        net.gain,
        *(block.gain for block in net.modules() if isinstance(block, MPBlock)),
    ):
        nn.init.ones_(parameter)
    assert torch.equal(net(x, t), net(x, t, torch.full((4,), -1)))
    assert (net(x, t, y) - net(x, t)).abs().max() > 0.01 and (
        net(x, t + 100) - net(x, t)
    ).abs().max() > 0.01
    with pytest.raises(ValueError, match="labels were given to a network without classes"):
        network()(x, t, y)


@pytest.mark.parametrize(
    "changes, said",
    [
        (dict(channel_mult=()), "channel_mult is ()"),
        (dict(image_size=7), "image_size 7 cannot be halved"),
        (dict(num_heads=3), "num_heads 3 does not divide"),
        (dict(attention_resolutions=(3,)), "attention resolution 3 does not occur"),
    ],
)
def test_what_it_cannot_be(changes, said):
    with pytest.raises(ValueError) as error:
        network(**changes)
    assert said in str(error.value) and "\n" not in str(error.value)


MP = dict(
    model__name="unet_edm2",
    every__sample="0 steps",
    every__validate="0 steps",
    train__length="4 steps",
    train__warmup="0 steps",
    train__learning_rate=1e-2,
)


def test_it_trains_resumes_and_samples(tmp_path):
    assert MODELS.keys() >= {"unet", "unet_edm2"} and MODELS["unet"] is UNet
    run(tiny(**MP, model__dropout=0.1), tmp_path / "whole")
    run(tiny(**MP | dict(train__length="2 steps"), model__dropout=0.1), tmp_path / "parts")
    run(tiny(**MP, model__dropout=0.1), tmp_path / "parts")
    run(
        tiny(**MP | dict(train__amp="bf16"), train__gradient_accumulation_steps=2),
        tmp_path / "half",
    )
    one, other = (checkpoint.newest(tmp_path / name)[0]["parts"] for name in ("whole", "parts"))
    for part, states in (
        ("net", (one["net"], other["net"])),
        ("ema", (one["ema"]["shadow"], other["ema"]["shadow"])),
    ):
        assert all(torch.equal(value, states[1][name]) for name, value in states[0].items()), part
    assert one["net"]["gain"] != 0
    for name in ("whole", "half"):
        assert all(
            path.exists()
            for path in generate_images(tmp_path / name, 2, tmp_path / f"{name} drawn")
        )
