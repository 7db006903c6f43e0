"""The DiT: published parameter counts, agreement in output with diffusers, identities, and what
it refuses.
"""

import re

import pytest
import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from einops import rearrange
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ddpm.models.dit import SIZES, Attention, Block, DiT, positions

# of the paper, at 256x256 pixels
LATENT = dict(image_size=32, in_channels=4, out_channels=8, num_classes=1000)
TINY = dict(image_size=8, in_channels=3, out_channels=3, patch_size=2, depth=2, width=32, heads=4)


def filled(net):
    """A network without zeros in it, in evaluation mode."""
    torch.manual_seed(0)
    for weight in net.parameters():
        nn.init.normal_(weight, std=0.2)
    return net.eval()


def tiny(**changes):
    return filled(DiT(**{**TINY, **changes}))


def inputs(batch=2, channels=3, size=(8, 8)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *size, generator=generator), 1000 * torch.rand(
        batch, generator=generator
    )


def refuses(message, call, *args, **kwargs):
    """The call raises a ValueError of one line that holds `message`."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


# parameter counts

PUBLISHED = {  # table 4 of the paper, in millions
    ("S", 2): 33,
    ("S", 4): 33,
    ("S", 8): 33,
    ("B", 2): 130,
    ("B", 4): 130,
    ("B", 8): 131,
    ("L", 2): 458,
    ("L", 4): 458,
    ("L", 8): 459,
    ("XL", 2): 675,
    ("XL", 4): 675,
    ("XL", 8): 676,
}


def closed_form(depth, width, patch, outputs=8, inputs=4, classes=1000):
    """The number of weights of a DiT without its positions, counted from figure 3 of the paper."""

    def dense(i, o):
        return i * o + o

    block = (
        dense(width, 6 * width)
        + dense(width, 3 * width)
        + dense(width, width)
        + 8 * width**2
        + 5 * width
    )
    ends = (
        dense(inputs * patch**2, width) + dense(width, 2 * width) + dense(width, outputs * patch**2)
    )
    return depth * block + ends + dense(256, width) + dense(width, width) + classes * width


@pytest.mark.parametrize("size, patch", PUBLISHED)
def test_published_parameter_counts(size, patch):
    with torch.device("meta"):
        ours = sum(
            weight.numel() for weight in DiT(**LATENT, size=size, patch_size=patch).parameters()
        )
    depth, width, _ = SIZES[size]
    assert ours == closed_form(depth, width, patch)
    # the published class embedding has one row more, for a label that is dropped
    theirs = ours + width
    assert round(theirs / 1e6) == PUBLISHED[size, patch]
    # what the published training script prints: it counts the fixed positions too
    if (size, patch) == ("XL", 2):
        assert theirs + 16 * 16 * width == 675_129_632


# agreement with diffusers, weights copied over


def copy(ours, *theirs):
    for name in ("weight", "bias"):
        value = torch.cat([getattr(layer, name).data for layer in theirs])
        getattr(ours, name).data.copy_(value.reshape(getattr(ours, name).shape))


@pytest.mark.parametrize("label", [2, -1])
def test_output_is_that_of_diffusers_with_the_same_weights(label):
    theirs = filled(
        DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=3,
            out_channels=6,
            num_layers=2,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=5,
            norm_eps=1e-6,
        )
    )
    ours = DiT(**TINY | {"out_channels": 6}, num_classes=5).eval()
    # Theirs repeats the embedding of time and class in every block, filled with the same weights
    # when it converts the published ones, and takes the frequencies of Ho's code instead of the
    # published DiT's; its sixth row is the dropped label.
    embedding = theirs.transformer_blocks[0].norm1.emb
    embedding.class_embedder.embedding_table.weight.data[5] = 0
    for block in theirs.transformer_blocks:
        block.norm1.emb = embedding
    embedding.time_proj.downscale_freq_shift = 0
    copy(ours.patches, theirs.pos_embed.proj)
    copy(ours.time_embedding[0], embedding.timestep_embedder.linear_1)
    copy(ours.time_embedding[2], embedding.timestep_embedder.linear_2)
    ours.class_embedding.weight.data.copy_(embedding.class_embedder.embedding_table.weight[:5])
    for mine, other in zip(ours.blocks, theirs.transformer_blocks, strict=True):
        copy(mine.modulation[1], other.norm1.linear)
        copy(mine.attention.qkv, other.attn1.to_q, other.attn1.to_k, other.attn1.to_v)
        copy(mine.attention.project, other.attn1.to_out[0])
        copy(mine.perceptron[0], other.ff.net[0].proj)
        copy(mine.perceptron[2], other.ff.net[2])
    copy(ours.modulation[1], theirs.proj_out_1)
    copy(ours.head, theirs.proj_out_2)
    (x, t), y = inputs(), torch.full((2,), label)
    with torch.no_grad():
        expected = theirs(x, timestep=t, class_labels=y % 6).sample
        out = ours(x, t, y)
    assert expected.std() > 0.1  # the comparison is about something
    # float32 carries 6e-8 of numbers as large as these, through some ten layers in another order of
    # summation
    torch.testing.assert_close(
        out, expected, rtol=0, atol=1e-5 * max(1, expected.abs().max().item())
    )


@pytest.mark.parametrize("side, width", [(4, 32), (16, 384)])
def test_positions_are_those_of_diffusers(side, width):
    expected = get_2d_sincos_pos_embed(width, side, base_size=side, output_type="pt").float()
    # an angle up to 16 rounds at 1e-6, and so does its frequency
    torch.testing.assert_close(positions(side, side, width, "cpu"), expected, rtol=0, atol=5e-6)
    rows = rearrange(positions(side, side, width, "cpu"), "(h w) d -> h w d", h=side)
    assert torch.equal(
        rearrange(positions(2, side, width, "cpu"), "(h w) d -> h w d", h=2), rows[:2]
    )
    assert torch.equal(
        rearrange(positions(side, 2, width, "cpu"), "(h w) d -> h w d", w=2), rows[:, :2]
    )


# identities


def test_a_fresh_network_returns_zeros_and_a_fresh_block_changes_nothing():
    x, t = inputs()
    assert torch.equal(DiT(**TINY)(x, t), torch.zeros_like(x))
    tokens = torch.randn(2, 16, 32)
    emb = torch.randn(2, 32)
    assert torch.equal(Block(32, 4)(tokens, emb), tokens)


def test_a_dropped_label_adds_zero():
    net, (x, t) = tiny(num_classes=3), inputs()
    assert net.class_embedding.weight.shape == (3, 32)
    unconditional = net(x, t)
    mixed = net(x, t, torch.tensor([2, -1]))
    # another shape of kernel for one row or two: rounding through some ten layers
    torch.testing.assert_close(
        mixed[1], unconditional[1], rtol=0, atol=1e-5 * unconditional.abs().max().item()
    )
    assert not torch.allclose(mixed[0], unconditional[0], atol=0.01)
    plain = tiny()
    plain.load_state_dict(
        {name: value for name, value in net.state_dict().items() if "class" not in name}
    )
    assert torch.equal(plain(x, t), unconditional)


def test_a_time_may_lie_between_steps():
    net, (x, _) = tiny(), inputs()
    assert torch.equal(net(x, torch.tensor([5, 7])), net(x, torch.tensor([5.0, 7.0])))
    assert not torch.equal(net(x, torch.tensor([5.0, 7.0])), net(x, torch.tensor([5.5, 7.0])))


def test_dropout_only_in_training():
    net, (x, t) = tiny(dropout=0.5), inputs()
    assert torch.equal(net(x, t), net(x, t))
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


def test_normed_queries_and_keys_do_not_depend_on_their_scale():
    for qk_norm in (False, True):
        attention = filled(Attention(32, 4, qk_norm))
        tokens = torch.randn(2, 6, 32)
        before = attention(tokens)
        for values in (attention.qkv.weight.data, attention.qkv.bias.data):
            values[:64] *= 3  # those of queries and keys
        # float32, and epsilon 1e-6 next to squares of about 1
        assert torch.allclose(attention(tokens), before, rtol=0, atol=1e-4) == qk_norm


@pytest.mark.parametrize(
    "size, channels, outputs, patch",
    [((8, 8), 1, 1, 1), ((8, 8), 3, 6, 4), ((8, 16), 4, 4, 8), ((12, 4), 2, 5, 2)],
)
def test_shapes(size, channels, outputs, patch):
    net = tiny(image_size=size, in_channels=channels, out_channels=outputs, patch_size=patch)
    x, t = inputs(channels=channels, size=size)
    assert net(x, t).shape == (2, outputs, *size)
    # not the size it was built for
    assert net(torch.cat([x, x], dim=3), t).shape == (2, outputs, size[0], 2 * size[1])


# numbers and memory


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.02), (torch.float16, 0.0025)])
def test_autocast_on_the_cpu(dtype, tolerance):
    net, (x, t), y = tiny(num_classes=3, qk_norm=True), inputs(), torch.tensor([1, -1])
    expected = net(x, t, y)
    with torch.autocast("cpu", dtype=dtype):
        out = net(x, t, y)
    out.float().square().mean().backward()
    # an 8-bit (11-bit) mantissa rounds at 4e-3 (5e-4) of a value; some ten layers leave it below
    # five times that
    assert (out.float() - expected).std() < tolerance * expected.std()
    assert all(weight.grad.isfinite().all() for weight in net.parameters())


def test_traced_whole_by_the_compiler():
    net, (x, t), y = tiny(num_classes=3, qk_norm=True), inputs(), torch.tensor([1, -1])
    # fullgraph: a graph break would raise
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, t, y), net(x, t, y))


def test_runs_on_fake_tensors():
    with FakeTensorMode():
        net = DiT(**LATENT)
        out = net(torch.randn(4, 4, 32, 32), torch.rand(4), torch.zeros(4, dtype=torch.int64))
        out.sum().backward()
    assert out.shape == (4, 8, 32, 32)


# mistakes


def test_sizes_that_do_not_fit():
    message = "image_size 30 cannot be cut into patches of 4; use 28 or 32, or a patch_size of 1, 2"
    refuses(message, DiT, **{**TINY, "image_size": 30, "patch_size": 4})
    refuses(
        "image_size (8, 20) cannot be cut into patches of 8; use (8, 16) or (8, 24), or a "
        "patch_size of 1, 2, 4",
        DiT,
        **{**TINY, "image_size": (8, 20), "patch_size": 8},
    )
    refuses(
        "image_size 7 cannot be cut into patches of 2; use 6 or 8",
        tiny(),
        torch.zeros(1, 3, 7, 7),
        torch.zeros(1),
    )


def test_unknown_sizes_and_widths_that_do_not_divide():
    refuses("unknown size of a DiT 'M'; choose one of S, B, L, XL", DiT, **{**TINY, "size": "M"})
    refuses(
        "width 130 is not a multiple of 4 and of 5 heads; use a multiple of 20",
        DiT,
        **{**TINY, "width": 130, "heads": 5},
    )
    refuses(
        "width 30 is not a multiple of 4 and of 3 heads; use a multiple of 12",
        DiT,
        **{**TINY, "width": 30, "heads": 3},
    )
    for name in (
        "in_channels",
        "out_channels",
        "num_classes",
        "patch_size",
        "depth",
        "width",
        "heads",
    ):
        refuses(f"{name} is -1; use 1 or more", DiT, **{**TINY, name: -1})


def test_labels_without_classes():
    refuses("set num_classes, or pass y=None", tiny(), *inputs(), torch.tensor([0, 1]))
