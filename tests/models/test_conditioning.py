"""Every block of every network depends on time, class and augmentation, at first and after
training.

A block whose norm removes the embedding still trains, draws and passes every test of shapes: only
its dependence shows it.
"""

import pytest
import torch
from torch import nn

from ddpm.config import defaults, files
from ddpm.experiment import build, remarks
from ddpm.models import MODELS
from ddpm.models.dit import Block
from ddpm.models.layers import ResidualBlock
from ddpm.models.unet_edm2 import MPBlock
from support.runs import run, tiny

BLOCKS = (ResidualBlock, MPBlock, Block)
UNET = dict(
    image_size=8,
    in_channels=2,
    out_channels=2,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
)
CHANGE = 1e-4  # a block without conditioning changes by rounding, 1e-7, the others by 3e-4 to 1

NETWORKS = [
    *(
        pytest.param("unet", UNET | dict(model_channels=width), id=f"unet {width}")
        for width in (2, 4, 8, 12, 16, 20, 23, 26, 32, 40, 64, 128)
    ),
    *(
        pytest.param(
            "unet",
            UNET | dict(model_channels=width, use_scale_shift_norm=True),
            id=f"unet scale-shift {width}",
        )
        for width in (2, 8, 32)
    ),
    pytest.param(
        "unet", UNET | dict(model_channels=16, resblock_updown=True), id="unet resblock_updown"
    ),
    pytest.param("unet", UNET | dict(model_channels=24, norm_num_groups=12), id="unet 12 groups"),
    *(
        pytest.param("unet_edm2", UNET | dict(model_channels=width), id=f"unet_edm2 {width}")
        for width in (4, 16, 32)
    ),
    *(
        pytest.param(
            "dit",
            dict(
                image_size=8,
                in_channels=2,
                out_channels=2,
                depth=2,
                width=width,
                heads=1,
                patch_size=2,
            ),
            id=f"dit {width}",
        )
        for width in (4, 16, 32)
    ),
]


def network(name, options, conditioning=()):
    """A network with weights that are not zero anywhere, and with what it is conditioned on
    besides the time.
    """
    torch.manual_seed(0)
    further = {"class": dict(num_classes=4), "augmentation": dict(augmentation=3)}
    net = MODELS[name](
        **options, **{key: value for kind in conditioning for key, value in further[kind].items()}
    )
    with torch.no_grad():
        for weight in net.parameters():
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.5)
    return net.eval()


def changes(net, first, second):
    """How much each block's output changes, as a share of it, when only the embedding does.

    The block gets the very same x: what comes before it may depend on the time as it likes.
    """
    blocks = [layer for layer in net.modules() if isinstance(layer, BLOCKS)]
    seen = {}
    hooks = [
        block.register_forward_hook(lambda block, given, _: seen.__setitem__(block, given))
        for block in blocks
    ]
    net(*first)
    inputs = dict(seen)
    net(*second)
    for hook in hooks:
        hook.remove()
    found = []
    with torch.no_grad():
        for block in blocks:
            x, emb = inputs[block]
            one = block(x, emb)
            other = block(x, seen[block][1])
            found.append(((one - other).norm() / one.norm()).item())
    return found


def arguments(kind):
    """Two calls of a network that differ only in the time, the class or the augmentation."""
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    t = torch.full((2,), 500.0)
    y = torch.tensor([0, 1])
    if kind == "time":
        return (x, t - 400), (x, t + 400)
    if kind == "class":
        return (x, t, y), (x, t, y + 2)
    return (x, t, None, torch.zeros(2, 3)), (x, t, None, torch.ones(2, 3))


@pytest.mark.parametrize("kind", ["time", "class", "augmentation"])
@pytest.mark.parametrize("name, options", NETWORKS)
def test_every_block_depends_on_what_it_is_conditioned_on(name, options, kind):
    if name == "unet_edm2" and kind == "augmentation":
        with pytest.raises(TypeError, match="augmentation"):
            network(name, options, [kind])
        return
    net = network(name, options, [kind] if kind != "time" else [])
    found = changes(net, *arguments(kind))
    assert found and min(found) > CHANGE, [f"{change:.1e}" for change in found]


@pytest.mark.parametrize("name", ["unet", "dit(depth=2, width=16, heads=1)", "unet_edm2"])
def test_blocks_depend_on_the_time_after_training(name):
    """Where the time decides everything: the same x at first and last times, and what is asked for
    is its opposite.

    A network that cannot tell the times apart has a loss of 1 at best.
    """
    given = files.changed(
        defaults.freeze(defaults.base()),
        {
            "model.name": name,
            "model.model_channels": 16,
            "model.channel_mult": (1, 2),
            "model.num_res_blocks": 1,
            "data.image_size": 8,
            "model.attention_resolutions": (),
        },
    )
    net = build.network(given).train()
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        x = torch.randn(16, 1, 8, 8, generator=generator)
        t = torch.arange(16) % 2 * 999
        loss = (net(x, t.float()) - torch.where(t > 0, 1.0, -1.0).view(-1, 1, 1, 1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.2
    x = torch.randn(2, 1, 8, 8, generator=generator)
    found = changes(net.eval(), (x, torch.full((2,), 100.0)), (x, torch.full((2,), 900.0)))
    assert min(found) > CHANGE, [f"{change:.1e}" for change in found]


def test_groups_of_one_channel_are_said(tmp_path):
    """Which only a number of groups that is given brings: imported weights, and checkpoints from
    before.
    """
    net = network("unet", UNET | dict(model_channels=32, norm_num_groups=32))
    found = changes(net, *arguments("time"))
    # those of 32 channels
    assert [change < 1e-5 for change in found] == [
        True,
        False,
        False,
        False,
        False,
        False,
        True,
        True,
    ]
    (said,) = remarks.conditioning_remarks(net)
    assert said.startswith(
        "3 of 8 residual blocks do not depend on time and class, because a norm with one channel "
        "a group"
    )
    run(
        tiny(
            model__conventions="ho(norm_num_groups=32)",
            train__length="1 steps",
            train__warmup="0 steps",
        ),
        tmp_path,
    )
    assert (
        "8 of 8 residual blocks do not depend on time and class"
        in (tmp_path / "training.log").read_text()
    )
    for options in (dict(norm_num_groups=32, use_scale_shift_norm=True), dict()):
        assert (
            remarks.conditioning_remarks(network("unet", UNET | dict(model_channels=16) | options))
            == []
        )
    assert remarks.conditioning_remarks(nn.Identity()) == []
