"""Augmentation: each transformation against its closed form, and what the network is conditioned on."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ddpm.common import rng
from ddpm.config import files
from ddpm.data.augment import NUM_CONDITIONS, NUM_RANDOM, augment
from ddpm.experiment import build, load
from ddpm.models.dit import Block, DiT
from ddpm.models.layers import ResidualBlock
from ddpm.models.unet import UNet
from support.runs import rows, run, tiny

NEVER, MIRROR, FLIP, SIZE, TURN, STRETCH, MOVE = range(-1, 6)


def images(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def numbers(coin, **how):
    """Numbers that toss a single coin; the quantiles that say how stand at 6 to 13."""
    given = torch.full((2, NUM_RANDOM), 9.0)
    if coin != NEVER:
        given[:, coin] = -9.0
    for place, value in how.items():
        given[:, int(place[1:])] = value
    return given.double()


def changed(x, coin, **how):
    return augment(x, numbers(coin, **how), 0.5)


X = images(2, 3, 8, 8)
SAME = dict(rtol=0, atol=1e-5)  # float32 coordinates of an 8-pixel grid


def test_nothing_is_nothing_bit_for_bit():
    x, told = changed(X, NEVER)
    assert torch.equal(x, X) and (told == 0).all() and told.shape == (2, NUM_CONDITIONS)
    for probability in (0.0, 0.5):
        # the coin fell, and the mirror stayed
        assert torch.equal(augment(X, numbers(MIRROR, n6=1.0), probability)[0], X)


def test_mirrors_are_flips():
    x, told = changed(X, MIRROR, n6=-1.0)
    torch.testing.assert_close(x, X.flip(-1), **SAME)
    assert told[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0]
    x, told = changed(X, FLIP, n7=-1.0)
    torch.testing.assert_close(x, X.flip(-2), **SAME)
    assert told[0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0, 0]


def test_a_quarter_turn_is_exact():
    quarter = torch.special.ndtri(torch.tensor(0.25, dtype=torch.float64)).item()
    x, told = changed(X, TURN, n9=quarter)
    # a float32 cosine of 90 degrees
    torch.testing.assert_close(x, X.rot90(-1, (-2, -1)), rtol=0, atol=1e-4)
    assert told[0, 3].item() == pytest.approx(-1) and told[0, 4].item() == pytest.approx(1)


def test_a_move_by_an_eighth_is_a_pixel_of_eight():
    x, told = changed(X, MOVE, n12=1.0, n13=0.0)
    torch.testing.assert_close(x[..., 1:], X[..., :-1], **SAME)
    torch.testing.assert_close(x[..., 0], X[..., 0], **SAME)  # mirrored at the border
    assert told[0].tolist() == [0, 0, 0, 0, 0, 0, 0, 0.125, 0]
    wide, _ = changed(images(2, 1, 8, 16), MOVE, n12=0.0, n13=-2.0)
    torch.testing.assert_close(wide[:, :, :-2], images(2, 1, 8, 16)[:, :, 2:], **SAME)


def test_size_and_stretch_are_powers_of_two():
    # the column of a pixel, twice its place from the middle
    plane = torch.linspace(-7, 7, 8).expand(2, 1, 8, 8)
    x, told = changed(plane, SIZE, n8=5.0)  # 2^1: twice as large
    torch.testing.assert_close(x[..., 2:6], plane[..., 2:6] / 2, **SAME)
    assert told[0, 2].item() == pytest.approx(1.0)
    # direction pi: along the row
    along = torch.special.ndtri(torch.tensor(0.5, dtype=torch.float64)).item()
    x, told = changed(plane, STRETCH, n10=5.0, n11=along)
    torch.testing.assert_close(x[..., 2:6], plane[..., 2:6] / 2, rtol=0, atol=1e-4)
    assert told[0, 5].item() == pytest.approx(1.0) and told[0, 6].item() == pytest.approx(
        0.0, abs=1e-9
    )


def test_turning_a_wide_image_keeps_its_circles_round():
    side = torch.stack(
        torch.meshgrid(torch.arange(32) - 15.5, torch.arange(64) - 31.5, indexing="ij")
    )
    disc = torch.exp(-(side**2).sum(0) / 40).expand(2, 1, 32, 64)
    x, _ = changed(disc, TURN, n9=0.3)
    middle = (..., slice(8, 24), slice(24, 40))  # what turns into it comes from inside
    # bilinear, on a bump a few pixels wide
    torch.testing.assert_close(x[middle], disc[middle], rtol=0, atol=0.01)


def test_each_is_done_as_often_as_asked():
    x = images(4000, 1, 4, 4)
    _, told = augment(x, rng.normal(0, "augment", 0, range(4000), (NUM_RANDOM,)), 0.3)
    rates = (told != 0).float().mean(0)
    # a mirror is as likely to be left as to be turned; the first is always up
    share = torch.tensor([0.5, 0.15, *[0.3] * 7])
    assert (rates - share).abs().max() < 4 * math.sqrt(0.25 / 4000)


# a norm of single channels would take an embedding away that does not scale
@pytest.mark.parametrize(
    "net",
    [
        UNet(8, 3, 3, 8, (1, 2), 1, (), use_scale_shift_norm=True, augmentation=NUM_CONDITIONS),
        DiT(8, 3, 3, augmentation=NUM_CONDITIONS, depth=1, width=16, heads=2),
    ],
)
def test_nothing_told_is_zeros_told_and_something_is_heard(net):
    for parameter in net.parameters():
        torch.nn.init.normal_(
            parameter, std=0.2, generator=torch.Generator().manual_seed(parameter.numel())
        )
    t = torch.tensor([3.0, 900.0])
    assert torch.equal(net(X, t), net(X, t, None, torch.zeros(2, NUM_CONDITIONS)))
    assert (net(X, t) - net(X, t, None, torch.ones(2, NUM_CONDITIONS))).abs().max() > 1e-3


def test_networks_that_were_not_made_for_it_say_so():
    with pytest.raises(ValueError, match="has no embedding of augmentation"):
        UNet(8, 3, 3, 8, (1, 2), 1, ())(X, torch.zeros(2), None, torch.ones(2, NUM_CONDITIONS))


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize(
    "make",
    [
        lambda **how: UNet(
            8, 3, 3, 12, (1, 2), 1, (), num_classes=4, augmentation=NUM_CONDITIONS, **how
        ),
        lambda **how: DiT(
            8, 3, 3, num_classes=4, augmentation=NUM_CONDITIONS, depth=1, width=12, heads=1, **how
        ),
    ],
)
def test_what_is_told_enters_before_the_layers_of_the_time_as_in_edm(make, place):
    """By Karras et al.'s code: silu(layer0(sines + A labels)), layer1, and only then the class."""
    net = make(augmentation_place=place)
    torch.manual_seed(0)
    for weight in net.parameters():
        torch.nn.init.normal_(weight)
    seen = []
    for block in net.modules():
        if isinstance(block, (ResidualBlock, Block)):
            block.register_forward_hook(lambda block, given, out: seen.append(given[1]))
    sines = []
    net.time_embedding.register_forward_hook(lambda layers, given, out: sines.append(given[0]))
    t = torch.tensor([3.0, 500.0])
    y = torch.tensor([1, 3])
    told = torch.randn(2, NUM_CONDITIONS)
    net(X, t, y)
    net(X, t, y, told)
    layers = net.time_embedding
    a = net.augmentation_embedding.weight
    classes = net.class_embedding.weight
    plain, heard = sines
    if place == "after":
        wanted = layers[2](F.silu(layers[0](plain))) + classes[y] + told @ a.T
    else:
        wanted = layers[2](F.silu(layers[0](plain + told @ a.T))) + classes[y]
        assert net.augmentation_embedding.out_features == layers[0].in_features
    # of float32 sums that are about 100
    torch.testing.assert_close(seen[-1], wanted, rtol=1e-5, atol=1e-4)
    assert torch.equal(plain, heard) == (place == "after")


OLD = Path(__file__).parents[1] / "golden" / "augmentation_after.safetensors"


def test_a_checkpoint_of_before_is_told_of_augmentation_as_it_was():
    """Trained on augmented digits, with classes, and asked at commit 0494cba, where augmentation
    entered after the layers.
    """
    made = load.load(OLD, "cpu")
    assert build.conventions(made.config)["augmentation_place"] == "after"
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 1, 8, 8, generator=generator)
    told = torch.randn(2, NUM_CONDITIONS, generator=generator)
    with torch.no_grad():
        out, untold = (
            made.net.eval()(x, torch.tensor([3.0, 17.0]), torch.tensor([1, 7]), *one)
            for one in ([told], [])
        )
    before = torch.tensor(json.loads(OLD.with_suffix(".json").read_text()))
    # another processor sums in another order
    torch.testing.assert_close(out.flatten(1), before, rtol=1e-4, atol=1e-5)
    assert (out - untold).abs().max() > 100 * 1e-4
    for changes, place in (({}, "before"), ({"data.augment": 0.3}, "after")):
        saved = json.loads(files.to_json(files.changed(tiny(), changes)))
        del saved["model"]["conventions"]
        back = files.from_json(json.dumps(saved))
        assert build.conventions(back)["augmentation_place"] == place
        saved["model"]["augmentation_place"] = "before"
        back = files.from_json(json.dumps(saved))
        assert build.conventions(back)["augmentation_place"] == "before"


def test_a_training_is_continued_and_cut_into_micro_batches(tmp_path):
    options = dict(data__augment=0.5, train__length="6 steps")
    run(tiny(**options), tmp_path / "whole")
    run(tiny(**options | dict(train__length="3 steps")), tmp_path / "parts")
    run(tiny(**options), tmp_path / "parts")
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints" / "step_00000006.pt", weights_only=True)[
            "parts"
        ]["net"]
        for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert whole["augmentation_embedding.weight"].abs().sum() > 0
    run(tiny(**options, train__gradient_accumulation_steps=4), tmp_path / "cut")
    one, four = (rows(tmp_path / name)[-1]["train/loss"] for name in ("whole", "cut"))
    assert one == pytest.approx(four, rel=1e-4)  # float32 sums in another order, over six steps
