"""Layers and U-Net: parameter counts, shapes, closed forms, and agreement in output with
diffusers.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from diffusers.models.embeddings import get_timestep_embedding
from einops import rearrange
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm.models import MODELS, DiT, UNet, UNetEDM2
from ddpm.models.layers import (
    AttentionBlock,
    Downsample,
    ResidualBlock,
    Upsample,
    group_norm,
    linear,
    timestep_embedding,
)
from support.networks import TINY

HO_CIFAR10 = dict(
    image_size=32,
    in_channels=3,
    out_channels=3,
    model_channels=128,
    channel_mult=(1, 2, 2, 2),
    num_res_blocks=2,
    attention_resolutions=(16,),
    dropout=0.1,
)


def tiny(**changes):
    """A tiny network in which no weight is zero."""
    torch.manual_seed(0)
    net = UNet(**{**TINY, **changes}).eval()
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    return net


def inputs(batch=2, channels=3, size=(8, 8)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size, generator=generator), 1000 * torch.rand(
        batch, generator=generator
    )


def parameters(net):
    return sum(weight.numel() for weight in net.parameters())


def refuses(message, call, *args, **kwargs):
    """The call raises a ValueError of one line that holds `message`."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


# parameter counts


def test_ho_cifar10_network_has_35746307_parameters():
    with torch.device("meta"):
        net = UNet(**HO_CIFAR10)
        theirs = UNet2DModel(
            sample_size=32,
            block_out_channels=(128, 256, 256, 256),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
        )
    assert parameters(net) == parameters(theirs) == 35_746_307


def closed_form(
    channels, mult, blocks, attention, outputs=3, classes=0, scale_shift=True, updown=False
):
    """The number of weights of such a U-Net, counted from Ho et al. 2020 and Dhariwal and Nichol
    2021, tables and figures.

    `attention` has the levels with attention, the whole image being 0; `blocks` the residual blocks
    of each.
    """

    def conv(i, o, kernel=3):
        return i * o * kernel**2 + o

    def block(i, o):
        shortcut = conv(i, o, 1) if i != o else 0
        return (
            2 * i
            + conv(i, o)
            + conv(4 * channels, (1 + scale_shift) * o, 1)
            + 2 * o
            + conv(o, o)
            + shortcut
        )

    def attend(c):
        return 2 * c + conv(c, 3 * c, 1) + conv(c, c, 1)

    resize = (lambda c: block(c, c)) if updown else (lambda c: conv(c, c))
    count = (
        conv(channels, 4 * channels, 1)
        + conv(4 * channels, 4 * channels, 1)
        + 4 * channels * classes
        + conv(3, channels)
    )
    here = channels
    skips = [channels]
    for level, factor in enumerate(mult):
        for _ in range(blocks[level]):
            count += block(here, factor * channels) + (level in attention) * attend(
                factor * channels
            )
            here = factor * channels
            skips.append(here)
        if level < len(mult) - 1:
            count += resize(here)
            skips.append(here)
    count += 2 * block(here, here) + attend(here)
    for level, factor in reversed(list(enumerate(mult))):
        for _ in range(blocks[level] + 1):
            count += block(here + skips.pop(), factor * channels) + (level in attention) * attend(
                factor * channels
            )
            here = factor * channels
        count += resize(here) if level else 0
    return count + 2 * here + conv(here, outputs)


OPENAI = dict(
    in_channels=3,
    out_channels=6,
    use_scale_shift_norm=True,
    freq_shift=0,
    downsample_padding=1,
    norm_eps=1e-5,
)
IMPROVED_CIFAR10 = OPENAI | dict(
    image_size=32,
    model_channels=128,
    channel_mult=(1, 2, 2, 2),
    num_res_blocks=3,
    attention_resolutions=(16, 8),
    num_heads=4,
)
ADM = OPENAI | dict(attention_resolutions=(32, 16, 8), resblock_updown=True)
ADM64 = ADM | dict(
    image_size=64,
    model_channels=192,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=3,
    num_head_channels=64,
)
ADM128 = ADM | dict(
    image_size=128, model_channels=256, channel_mult=(1, 1, 2, 3, 4), num_res_blocks=2, num_heads=4
)
ADM256 = ADM | dict(
    image_size=256,
    model_channels=256,
    channel_mult=(1, 1, 2, 2, 4, 4),
    num_res_blocks=2,
    num_head_channels=64,
)


@pytest.mark.parametrize(
    "network, classes, count",
    [
        # Published to the unit: Ho's, and ADM's at 256 pixels without classes, whose file of
        # float32 weights has 4 bytes for each of so many; a class adds a row of 1,024. ADM's others
        # are published in millions: 296, 422, 554 (its table 11).
        (HO_CIFAR10, 0, 35_746_307),
        (IMPROVED_CIFAR10, 0, 52_546_438),
        (ADM64, 1000, 295_904_454),
        (ADM128, 1000, 421_529_606),
        (ADM256, 0, 552_814_086),
        (ADM256, 1000, 553_838_086),
    ],
    ids=["ho", "improved", "adm64", "adm128", "adm256_unconditional", "adm256"],
)
def test_published_parameter_counts(network, classes, count):
    with torch.device("meta"):
        net = UNet(**network, num_classes=classes or None)
    mult = network["channel_mult"]
    size = network["image_size"]
    levels = [
        level for level in range(len(mult)) if size >> level in network["attention_resolutions"]
    ]
    other = closed_form(
        network["model_channels"],
        mult,
        [network["num_res_blocks"]] * len(mult),
        levels,
        network["out_channels"],
        classes,
        network.get("use_scale_shift_norm", False),
        network.get("resblock_updown", False),
    )
    assert parameters(net) == other == count


def test_blocks_of_each_level():
    net = tiny(channel_mult=(1, 2, 2), num_res_blocks=5, res_blocks_per_level=(1, 3, 2))
    assert parameters(net) == closed_form(8, (1, 2, 2), (1, 3, 2), [1], scale_shift=False)
    same, (x, t) = tiny(num_res_blocks=2, res_blocks_per_level=(2, 2)), inputs()
    assert net(x, t).shape == x.shape and torch.equal(same(x, t), tiny(num_res_blocks=2)(x, t))


def test_no_transposed_convolution():
    assert not any(isinstance(module, nn.ConvTranspose2d) for module in UNet(**TINY).modules())


# agreement with diffusers, weights copied over


def diffusers_config(scale_shift=False, updown=False, groups=32):
    """diffusers' names for TINY at width 32, with the settings of google's released DDPMs."""
    return dict(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=(
            "ResnetDownsampleBlock2D" if updown else "DownBlock2D",
            "AttnDownBlock2D",
        ),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D" if updown else "UpBlock2D"),
        downsample_padding=0,
        downsample_type="resnet" if updown else "conv",
        upsample_type="resnet" if updown else "conv",
        attention_head_dim=None,
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        norm_eps=1e-6,
        flip_sin_to_cos=False,
        freq_shift=1,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
    )


def copy(ours, theirs):
    """Copy weight and bias of a diffusers layer (or of several, stacked) into one of ours."""
    theirs = theirs if isinstance(theirs, (list, tuple)) else [theirs]
    for name in ("weight", "bias"):
        value = torch.cat([getattr(layer, name) for layer in theirs])
        getattr(ours, name).data.copy_(value.reshape(getattr(ours, name).shape))


def copy_block(ours, theirs):
    names = dict(
        norm1="norm1", conv1="conv1", project="time_emb_proj", norm2="norm2", conv2="conv2"
    )
    for name, their_name in names.items():
        copy(getattr(ours, name), getattr(theirs, their_name))
    if theirs.conv_shortcut is not None:
        copy(ours.shortcut, theirs.conv_shortcut)


def copy_attention(ours, theirs):
    copy(ours.norm, theirs.group_norm)
    copy(ours.qkv, [theirs.to_q, theirs.to_k, theirs.to_v])
    copy(ours.project, theirs.to_out[0])


def copy_layers(ours, theirs):
    assert len(ours) == len(theirs)
    kinds = {ResidualBlock: copy_block, AttentionBlock: copy_attention}
    for mine, other in zip(ours, theirs, strict=True):
        kinds.get(type(mine), lambda a, b: copy(a.conv, b.conv))(mine, other)


def in_order(block, sampler):
    """The layers of a diffusers block in the order in which they run."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    pairs = zip(block.resnets, attentions, strict=True)
    return [layer for pair in pairs for layer in pair if layer is not None] + list(
        getattr(block, sampler) or []
    )


def copy_network(ours, theirs):
    copy(ours.stem, theirs.conv_in)
    copy(ours.time_embedding[0], theirs.time_embedding.linear_1)
    copy(ours.time_embedding[2], theirs.time_embedding.linear_2)
    copy_layers(
        [layer for stage in ours.encoder for layer in stage],
        [layer for block in theirs.down_blocks for layer in in_order(block, "downsamplers")],
    )
    middle = theirs.mid_block
    copy_layers(ours.middle, [middle.resnets[0], middle.attentions[0], middle.resnets[1]])
    copy_layers(
        [layer for stage in ours.decoder for layer in stage],
        [layer for block in theirs.up_blocks for layer in in_order(block, "upsamplers")],
    )
    copy(ours.head[0], theirs.conv_norm_out)
    copy(ours.head[2], theirs.conv_out)


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("updown", [False, True])
@pytest.mark.parametrize("given, groups", [(0, 8), (32, 32)])
def test_output_is_that_of_diffusers_with_the_same_weights(scale_shift, updown, given, groups):
    torch.manual_seed(0)
    theirs = UNet2DModel(**diffusers_config(scale_shift, updown, groups)).eval()
    ours = UNet(
        **{**TINY, "model_channels": 32},
        use_scale_shift_norm=scale_shift,
        resblock_updown=updown,
        norm_num_groups=given,
    ).eval()
    for name, weight in theirs.named_parameters():
        nn.init.normal_(
            weight, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=0.05
        )
    copy_network(ours, theirs)
    x, t = inputs()
    with torch.no_grad():
        expected = theirs(x, t).sample
        out = ours(x, t)
    assert expected.std() > 0.1  # the comparison is about something
    # float32 carries 6e-8; some twenty layers in another order of summation make it about a hundred
    # times that
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5)


# time embedding


def test_timestep_embedding_closed_form():
    t = torch.tensor([0.0, 1.0, 2.5, 999.0])
    out = timestep_embedding(t, 8)
    for b, time in enumerate(t.tolist()):
        for k in range(4):
            angle = time * 10000 ** (-k / 3)
            # a frequency is right to about 2e-7 (float32 exp), an angle of 999 to about 2e-4
            assert out[b, k].item() == pytest.approx(math.sin(angle), abs=3e-4)
            assert out[b, 4 + k].item() == pytest.approx(math.cos(angle), abs=3e-4)


@pytest.mark.parametrize("dim", [4, 32, 33, 128])
def test_timestep_embedding_is_that_of_diffusers(dim):
    t = torch.tensor([0.0, 0.25, 17.0, 999.0])
    expected = get_timestep_embedding(t, dim, flip_sin_to_cos=False, downscale_freq_shift=1)
    # both round the exponent, in another order: 1e-7 of a frequency times an angle up to 999
    torch.testing.assert_close(timestep_embedding(t, dim), expected, rtol=0, atol=5e-4)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_timestep_embedding_of_few_dimensions(dim):
    t = torch.tensor([0.5, 3.0])
    expected = (
        torch.stack([t.sin(), t.cos(), torch.zeros(2)], dim=1)[:, :dim]
        if dim > 1
        else torch.zeros(2, 1)
    )
    assert torch.equal(timestep_embedding(t, dim), expected)


def test_timestep_embedding_of_integers_is_float32():
    t = torch.tensor([3, 998])
    assert timestep_embedding(t, 16).dtype == torch.float32
    assert torch.equal(timestep_embedding(t, 16), timestep_embedding(t.double(), 16))


# layers


@pytest.mark.parametrize(
    "channels, groups",
    [
        (1, 1),
        (3, 1),
        (8, 2),
        (20, 5),
        (23, 1),
        (26, 2),
        (32, 8),
        (37, 1),
        (48, 12),
        (72, 18),
        (128, 32),
        (192, 32),
        (200, 25),
    ],
)
def test_groups_are_32_at_most_of_four_channels_at_least(channels, groups):
    """From 128 channels on, in multiples of 32, they are the 32 of every published network;
    below, those of EDM's rule.
    """
    assert group_norm(channels).num_groups == groups
    assert channels < 8 or channels // groups >= 4


@pytest.mark.parametrize("channels, groups", [(1, 1), (20, 20), (32, 32), (48, 24), (192, 32)])
def test_a_number_of_groups_that_is_given_is_taken_as_far_as_it_divides(channels, groups):
    """As imported weights and checkpoints from before need it."""
    assert group_norm(channels, most=32).num_groups == groups


def test_a_network_has_one_number_of_groups_which_diffusers_can_say():
    for width, groups in ((8, 2), (32, 8), (64, 16), (128, 32), (192, 32)):
        norms = [
            layer
            for layer in tiny(model_channels=width).modules()
            if isinstance(layer, nn.GroupNorm)
        ]
        assert {norm.num_groups for norm in norms} == {groups}, width


def softmax_attention(block, x):
    """Attention written out, one head after another, in float64."""
    weights = {name: value.double() for name, value in block.state_dict().items()}
    block = AttentionBlock(x.shape[1], num_heads=block.heads).double()
    block.load_state_dict(weights)
    h = x.double()
    q, k, v = rearrange(block.qkv(block.norm(h)), "b c h w -> b c (h w)").chunk(3, dim=1)
    outs = []
    for one_q, one_k, one_v in zip(
        *(part.chunk(block.heads, dim=1) for part in (q, k, v)), strict=True
    ):
        scores = torch.einsum("bdi,bdj->bij", one_q, one_k) / math.sqrt(one_q.shape[1])
        outs.append(torch.einsum("bij,bdj->bdi", scores.softmax(dim=-1), one_v))
    return h + block.project(torch.cat(outs, dim=1).reshape(h.shape))


@pytest.mark.parametrize(
    "options, heads",
    [
        (dict(), 1),
        (dict(num_heads=4), 4),
        (dict(num_heads=4, num_head_channels=6), 2),
        (dict(num_head_channels=12), 1),
    ],
)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_attention_is_a_softmax(options, heads, memory_format):
    torch.manual_seed(0)
    block = AttentionBlock(12, **options)
    assert block.heads == heads
    for weight in block.parameters():
        nn.init.normal_(weight)
    x = torch.randn(2, 12, 3, 5)
    block = block.to(memory_format=memory_format)
    shaped = x.contiguous(memory_format=memory_format)
    # float32 against float64, values of order ten
    torch.testing.assert_close(
        block(shaped).double(), softmax_attention(block, x), rtol=1e-4, atol=1e-4
    )


def test_resizing_layers():
    x = torch.randn(2, 8, 4, 6)
    assert Upsample(8)(x).shape == (2, 8, 8, 12)
    assert Downsample(8)(x).shape == (2, 8, 2, 3)
    emb = torch.randn(2, 16)
    assert ResidualBlock(8, 12, 16, up=True)(x, emb).shape == (2, 12, 8, 12)
    assert ResidualBlock(8, 12, 16, down=True)(x, emb).shape == (2, 12, 2, 3)


def test_a_fresh_residual_branch_is_closed():
    x = torch.randn(2, 8, 4, 4)
    emb = torch.randn(2, 16)
    assert torch.equal(ResidualBlock(8, 8, 16, use_scale_shift_norm=True)(x, emb), x)
    assert torch.equal(AttentionBlock(8)(x), x)


def test_initialisation_has_variance_2_over_fan_in_plus_fan_out():
    torch.manual_seed(0)
    dense = linear(300, 200).weight
    convolution = Upsample(64).conv.weight
    qkv = AttentionBlock(128).qkv.weight
    # a uniform sample's variance has relative standard error sqrt(0.8 / n): below 0.7 % for each,
    # so 4 % is safe
    assert dense.var().item() == pytest.approx(2 / (300 + 200), rel=0.04)
    assert convolution.var().item() == pytest.approx(2 / (9 * 64 + 9 * 64), rel=0.04)
    for part in qkv.chunk(3):
        assert part.var().item() == pytest.approx(2 / (128 + 128), rel=0.04)


# the network


@pytest.mark.parametrize(
    "size, channels, out_channels, channel_mult, attention",
    [
        (8, 1, 1, (1,), (8,)),
        (8, 2, 4, (1, 2), ()),
        (16, 3, 6, (1, 2, 3), (4, 16)),
        ((4, 12), 4, 4, (1, 2, 2), (2,)),
        ((24, 8), 5, 5, (1, 1, 2, 2), (1, 8)),
    ],
)
@pytest.mark.parametrize("options", [dict(), dict(use_scale_shift_norm=True, resblock_updown=True)])
def test_shapes(size, channels, out_channels, channel_mult, attention, options):
    h, w = (size, size) if isinstance(size, int) else size
    changes = dict(
        image_size=size, in_channels=channels, out_channels=out_channels, channel_mult=channel_mult
    )
    net = tiny(**changes, attention_resolutions=attention, **options)
    x, t = inputs(channels=channels, size=(h, w))
    assert net(x, t).shape == (2, out_channels, h, w)
    wide = torch.cat([x, x], dim=3)  # another size than it was built for
    assert net(wide, t).shape == (2, out_channels, h, 2 * w)


def test_attention_stands_where_it_was_asked_for():
    seen = []
    net = tiny(
        image_size=(16, 32), channel_mult=(1, 1, 2), attention_resolutions=(8,), num_res_blocks=2
    )
    for module in net.modules():
        if isinstance(module, AttentionBlock):
            module.register_forward_hook(
                lambda module, args, out: seen.append(tuple(out.shape[-2:]))
            )
    net(*inputs(size=(16, 32)))
    # encoder, middle, decoder; the shorter side counts
    assert seen == [(8, 16)] * 2 + [(4, 8)] + [(8, 16)] * 3


@pytest.mark.parametrize(
    "options", [dict(), dict(use_scale_shift_norm=True, resblock_updown=True, num_classes=3)]
)
def test_a_fresh_network_returns_exactly_zero(options):
    net = UNet(**TINY, **options)
    x, t = inputs()
    assert torch.equal(
        net(x, t, torch.tensor([0, -1]) if "num_classes" in options else None), torch.zeros_like(x)
    )


def test_every_weight_has_a_gradient():
    net = tiny(num_classes=3)
    x, t = inputs()
    net(x, t, torch.tensor([0, 2])).square().sum().backward()
    assert all(
        weight.grad is not None and weight.grad.isfinite().all() for weight in net.parameters()
    )
    assert all(
        weight.grad.abs().sum() > 0
        for name, weight in net.named_parameters()
        if not name.endswith("bias")
    )


def test_time_may_be_fractional_or_whole():
    net, (x, _) = tiny(), inputs()
    assert torch.equal(net(x, torch.tensor([5, 7])), net(x, torch.tensor([5.0, 7.0])))
    assert not torch.equal(net(x, torch.tensor([5.0, 7.0])), net(x, torch.tensor([5.5, 7.0])))


def test_a_dropped_label_adds_zero():
    net, (x, t) = tiny(num_classes=3), inputs()
    assert net.class_embedding.weight.shape == (3, 32)
    unconditional = net(x, t)
    dropped = net(x, t, torch.tensor([-1, -1]))
    assert torch.equal(dropped, unconditional)
    mixed = net(x, t, torch.tensor([2, -1]))
    assert torch.equal(mixed[1], unconditional[1])
    assert not torch.equal(mixed[0], unconditional[0])
    plain = tiny()
    plain.load_state_dict(
        {name: value for name, value in net.state_dict().items() if "class" not in name}
    )
    assert torch.equal(plain(x, t), unconditional)


def test_dropout_only_in_training():
    net, (x, t) = tiny(dropout=0.5), inputs()
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


# numbers and memory


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.0025)])
def test_autocast_on_the_cpu(dtype, tolerance):
    net, (x, t) = tiny(num_classes=3), inputs()
    y = torch.tensor([1, -1])
    expected = net(x, t, y)
    with torch.autocast("cpu", dtype=dtype):
        out = net(x, t, y)
    out.float().square().mean().backward()
    # an 8-bit (11-bit) mantissa rounds at 4e-3 (5e-4) of a value; some twenty layers leave it below
    # five times that
    assert (out.float() - expected).std() < tolerance * expected.std()
    assert all(weight.grad.isfinite().all() for weight in net.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_norms_are_kept_from_a_gpu_s_autocast(dtype, monkeypatch):
    """There it would bring group_norm to float32, input and output: it is off inside, and all is
    of the type that came in.
    """
    seen = []
    norm = F.group_norm

    def watched(x, groups, weight, bias, eps):
        seen.append((torch.is_autocast_enabled("cpu"), {x.dtype, weight.dtype, bias.dtype}))
        return norm(x, groups, weight, bias, eps)

    monkeypatch.setattr(F, "group_norm", watched)
    net, (x, t) = tiny(use_scale_shift_norm=True), inputs()
    with torch.autocast("cpu", dtype=dtype):
        net(x, t)
    assert seen and all(one == (False, {dtype}) for one in seen)


def test_float64_and_bfloat16_networks():
    net, (x, t) = tiny(), inputs()
    expected = net(x, t)
    out = net.double()(x.double(), t.double())
    assert out.dtype == torch.float64
    # the time's sine is float32 in both; the rest is float32's 6e-8 through twenty layers
    torch.testing.assert_close(
        out.float(), expected, rtol=0, atol=1e-5 * expected.abs().max().item()
    )
    assert net.bfloat16()(x.bfloat16(), t).dtype == torch.bfloat16


@pytest.mark.parametrize("options", [dict(), dict(use_scale_shift_norm=True, resblock_updown=True)])
def test_channels_last(options):
    net, (x, t) = tiny(**options), inputs()
    expected = net(x, t)
    out = net.to(memory_format=torch.channels_last)(
        x.contiguous(memory_format=torch.channels_last), t
    )
    assert out.is_contiguous(memory_format=torch.channels_last)
    # other kernels, other order of summation: float32's 6e-8 through twenty layers
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def test_traced_whole_by_the_compiler():
    net, (x, t) = tiny(num_classes=3), inputs()
    y = torch.tensor([1, -1])
    # fullgraph: a graph break would raise
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, t, y), net(x, t, y))


def test_runs_on_fake_tensors():
    with FakeTensorMode():
        net = UNet(**HO_CIFAR10, num_classes=10)
        out = net(torch.randn(4, 3, 32, 32), torch.rand(4), torch.zeros(4, dtype=torch.int64))
        out.sum().backward()
    assert out.shape == (4, 3, 32, 32)


def test_construction_is_a_function_of_torchs_seed():
    def build():
        torch.manual_seed(3)
        return UNet(**TINY, num_classes=2).state_dict()

    first = build()
    second = build()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_table_of_architectures():
    assert {"unet": UNet, "unet_edm2": UNetEDM2, "dit": DiT} == MODELS


def test_normed_queries_and_keys_do_not_depend_on_their_scale():
    for qk_norm in (False, True):
        net, (x, t) = tiny(num_heads=4, qk_norm=qk_norm), inputs()
        before = net(x, t)
        for layer in net.modules():
            if isinstance(layer, AttentionBlock):
                queries_and_keys = 2 * layer.norm.num_channels
                layer.qkv.weight.data[:queries_and_keys] *= 3
                layer.qkv.bias.data[:queries_and_keys] *= 3
        # float32 through twenty layers, and epsilon 1e-6 next to squares of about 1
        assert (
            torch.allclose(net(x, t), before, rtol=0, atol=1e-4 * before.abs().max().item())
            == qk_norm
        )


# mistakes


def test_sizes_that_do_not_fit():
    deep = {**TINY, "channel_mult": (1, 2, 2, 2), "attention_resolutions": ()}
    for size, remedy in ((30, "24 or 32"), (4, "8"), (0, "8"), ((24, 36), "(24, 32) or (24, 40)")):
        message = (
            f"image_size {size} cannot be halved 3 times; use {remedy}, or a shorter channel_mult"
        )
        refuses(message, UNet, **{**deep, "image_size": size})
    net = UNet(**TINY)
    for size, given, remedy in (((7, 7), "7", "6 or 8"), ((8, 9), "(8, 9)", "8 or (8, 10)")):
        message = f"image_size {given} cannot be halved 1 time; use {remedy}, or"
        refuses(message, net, torch.zeros(1, 3, *size), torch.zeros(1))


def test_attention_that_never_occurs():
    message = "attention resolution 16 does not occur in this network; use any of 8, 4"
    refuses(message, UNet, **{**TINY, "attention_resolutions": (4, 16)})


def test_heads_that_do_not_divide():
    refuses(
        "num_heads 3 does not divide 16 channels; use one of 1, 2, 4, 8, 16",
        UNet,
        **TINY,
        num_heads=3,
    )
    refuses(
        "num_head_channels 64 does not divide 16 channels; use one of 1, 2, 4",
        UNet,
        **TINY,
        num_head_channels=64,
    )
    refuses("num_heads 0 does not divide", UNet, **TINY, num_heads=0)


def test_labels_without_classes():
    refuses("set num_classes, or pass y=None", UNet(**TINY), *inputs(), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "name", ["in_channels", "out_channels", "model_channels", "num_res_blocks", "num_classes"]
)
def test_counts_start_at_one(name):
    refuses(f"{name} is 0; use 1 or more", UNet, **{**TINY, name: 0})


def test_blocks_for_levels_that_are_not_there():
    refuses(
        "res_blocks_per_level has 3 numbers for 2 levels; give one for each",
        UNet,
        **TINY,
        res_blocks_per_level=(1, 2, 1),
    )
    refuses("res_blocks_per_level is 0; use 1 or more", UNet, **TINY, res_blocks_per_level=(1, 0))


@pytest.mark.parametrize("mult", [(), (1, 0)])
def test_channel_mult_needs_levels(mult):
    refuses(
        f"channel_mult is {mult}; use one or more whole numbers",
        UNet,
        **{**TINY, "channel_mult": mult},
    )


def test_initialization_as_torch_is_that_of_its_layers():
    """Uniform in 1 / sqrt(fan_in) for weights and biases, as OpenAI's code leaves them; what
    closes a branch is still zero.
    """
    given = dict(
        image_size=8,
        in_channels=3,
        out_channels=3,
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(4,),
        num_classes=4,
        augmentation=9,
    )
    torch.manual_seed(0)
    net = UNet(**given, initialization="torch")
    usual = UNet(**given)
    layers = {
        name: layer
        for name, layer in net.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d))
    }
    zero = {name for name, layer in layers.items() if not layer.weight.any()}
    assert (
        zero == {name for name in layers if not usual.get_submodule(name).weight.any()}
        and "head.2" in zero
    )
    for name in layers.keys() - zero:
        weight = layers[name].weight.detach()
        bound = layers[name].weight[0].numel() ** -0.5
        assert weight.abs().max() <= bound and layers[name].bias.abs().max() <= bound
        assert layers[name].bias.any() and not usual.get_submodule(name).bias.any()
        # of a uniform number the square has a relative deviation of 0.9; five of them over the root
        # of their number
        assert (
            abs(weight.square().mean().item() / (bound**2 / 3) - 1)
            < 5 * 0.9 / weight.numel() ** 0.5
        )
