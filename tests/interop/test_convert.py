"""Weights of others: the real diffusers there and back, OpenAI's U-Net written out here, and
what is refused.
"""

import itertools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from safetensors.torch import load_file
from torch import nn

from ddpm import convert
from ddpm.config import files
from ddpm.experiment import build, load
from ddpm.generate import generate_images
from ddpm.interop import diffusers, weight_names
from ddpm.training import weights as training_weights
from support.commands import outcome_of
from support.runs import run, tiny

# float32 carries 6e-8; some twenty layers in another order of summation make it about a hundred
# times that
SAME = dict(rtol=0, atol=1e-5)


def randomize(net, seed=0):
    """Random weights, none of them zero or one, and outputs of order one."""
    torch.manual_seed(seed)
    for name, weight in net.named_parameters():
        # as it is at first, so that labels make a difference
        std = 1.0 if name.startswith("class_embedding") else 0.05
        nn.init.normal_(
            weight, mean=1.0 if "norm" in name and name.endswith("weight") else 0.0, std=std
        )
    return net.eval()


def inputs(channels=3, size=8):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, channels, size, size, generator=generator), torch.tensor(
        [0.0, 17.0, 999.0]
    )


@torch.no_grad()
def ours(path, label=None):
    """A converted checkpoint: its config, and its output for a label."""
    loaded = load.load(path, "cpu")
    x, t = inputs(loaded.config.data.channels, loaded.config.data.image_size)
    return loaded.config, loaded.net.eval()(
        x, t, None if label is None else torch.full((3,), label)
    )


# diffusers, there and back

SMALL = dict(
    sample_size=8,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
HO = dict(
    downsample_padding=0,
    flip_sin_to_cos=False,
    freq_shift=1,
    norm_eps=1e-6,
    attention_head_dim=None,
)
THREE = dict(
    sample_size=16,
    block_out_channels=(16, 16, 48),
    norm_num_groups=8,
    layers_per_block=2,
    down_block_types=("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
)
RESNET = dict(
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    downsample_type="resnet",
    upsample_type="resnet",
    resnet_time_scale_shift="scale_shift",
    attn_norm_num_groups=32,
)
NETWORKS = {
    "usual": SMALL,
    "as google/ddpm-cifar10-32": SMALL | HO,
    "padding 0": SMALL | dict(downsample_padding=0),
    "sines first": SMALL | dict(flip_sin_to_cos=False),
    "freq_shift 1": SMALL | dict(freq_shift=1),
    "epsilon": SMALL | dict(norm_eps=1e-3, act_fn="swish", dropout=0.1),
    "one head": SMALL | dict(attention_head_dim=None),
    "scale and shift": SMALL | dict(resnet_time_scale_shift="scale_shift", attn_norm_num_groups=32),
    "residual blocks resize": SMALL | RESNET,
    "three levels, grey": THREE | dict(in_channels=1, out_channels=1),
    "odd": SMALL
    | dict(
        block_out_channels=(15, 45), norm_num_groups=5, attention_head_dim=15, layers_per_block=3
    ),
    "one level": SMALL
    | dict(
        block_out_channels=(32,),
        down_block_types=("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",),
    ),
}


@torch.no_grad()
def theirs(folder, label=None):
    """A diffusers folder: its output for a label."""
    net = DDPMPipeline.from_pretrained(folder).unet.eval()
    x, t = inputs(net.config.in_channels, net.config.sample_size)
    return net(x, t, class_labels=None if label is None else torch.full((3,), label)).sample


def saved(folder, network=SMALL, **scheduler):
    """A folder with a random pipeline, as diffusers writes it."""
    DDPMPipeline(randomize(UNet2DModel(**network)), DDPMScheduler(**scheduler)).save_pretrained(
        folder
    )
    return folder


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_diffusers_there_and_back(tmp_path, network):
    folder = saved(tmp_path / "theirs", network)
    path = convert.convert(folder, tmp_path / "ours.safetensors")
    expected = theirs(folder)
    assert expected.std() > 0.1  # the comparison is about something
    torch.testing.assert_close(ours(path)[1], expected, **SAME)
    convert.convert(path, tmp_path / "back")
    torch.testing.assert_close(theirs(tmp_path / "back"), expected, **SAME)
    convert.convert(tmp_path / "back", tmp_path / "again")
    first = load_file(path)
    again = load_file(tmp_path / "again" / "final.safetensors")
    assert (
        all(torch.equal(first[name], again[name]) for name in first)
        and first.keys() == again.keys()
    )


def differ(outputs):
    """Whether a label makes a difference far above the tolerance, so that the comparison of
    labels is about something.
    """
    return (
        min((one - other).abs().max() for one, other in itertools.combinations(outputs, 2)) > 1e-3
    )


def same(outputs, expected):
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, other, **SAME)


LABELLED = [
    SMALL | dict(num_class_embeds=4),
    SMALL | HO | dict(num_class_embeds=2),
    SMALL | RESNET | dict(num_class_embeds=3),
    THREE | dict(in_channels=1, out_channels=1, num_class_embeds=3),
    SMALL | dict(num_class_embeds=1),
]


@pytest.mark.parametrize("network", LABELLED)
def test_labels_there_and_back(tmp_path, network):
    folder = saved(tmp_path / "theirs", network)
    labels = range(network["num_class_embeds"])
    expected = [theirs(folder, label) for label in labels]
    assert len(labels) == 1 or differ(expected)
    path = convert.convert(folder, tmp_path / "ours")
    same([ours(path, label)[1] for label in labels], expected)
    made = load.load(path, "cpu").config
    assert (
        made.data.class_labels
        and made.data.classes == tuple(map(str, labels))
        and made.train.label_dropout == 0
    )
    with pytest.raises(
        ValueError, match="guidance is 2.0, and the network has never done without its label"
    ):
        load.load(path, "cpu", **{"sample.guidance": 2.0})
    convert.convert(path, tmp_path / "back")
    same([theirs(tmp_path / "back", label) for label in labels], expected)
    first = load_file(path)
    again = load_file(convert.convert(tmp_path / "back", tmp_path / "again"))
    assert (
        all(torch.equal(first[name], again[name]) for name in first)
        and first.keys() == again.keys()
    )


@pytest.mark.parametrize("no_label", [0, 2, 3])
def test_a_label_that_means_none_is_ours_without_one(tmp_path, no_label):
    """As networks are trained for classifier-free guidance elsewhere; it goes out as the last."""
    folder = saved(tmp_path / "theirs", SMALL | dict(num_class_embeds=4))
    order = [label for label in range(4) if label != no_label] + [no_label]
    expected = [theirs(folder, label) for label in order]
    assert differ(expected)
    path = convert.convert(folder, tmp_path / "ours", no_label=no_label)
    same([ours(path, label)[1] for label in (0, 1, 2, None)], expected)
    same([ours(path, -1)[1]], expected[-1:])
    made = load.load(path, "cpu", **{"sample.guidance": 2.0}).config
    assert made.data.classes == tuple(map(str, order[:3]))  # which are still their numbers there
    convert.convert(path, tmp_path / "back")
    same([theirs(tmp_path / "back", label) for label in range(4)], expected)
    again = convert.convert(tmp_path / "back", tmp_path / "again", classes=["cat", "dog", "owl"])
    first = load_file(path)
    second = load_file(again)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert load.load(again, "cpu").config.data.classes == ("cat", "dog", "owl")


def test_a_converted_network_draws_its_classes(tmp_path):
    folder = saved(tmp_path / "theirs", SMALL | dict(num_class_embeds=6), num_train_timesteps=4)
    path = convert.convert(folder, tmp_path / "ours")
    options = {"sample.steps": 2, "sample.seed": 0, "sample.batch_size": 1}
    folders = {}
    for chosen in (("3", "5"), ("3",), ("5",)):
        folders[chosen] = tmp_path / "".join(chosen)
        generate_images(path, 2, folders[chosen], "cpu", **options | {"sample.classes": chosen})
    pixels = {
        chosen: [file.read_bytes() for file in sorted(folder.glob("*.png"))]
        for chosen, folder in folders.items()
    }
    assert pixels["3", "5"] == [pixels["3",][0], pixels["5",][1]] and pixels["3",] != pixels["5",]
    with pytest.raises(ValueError, match="unknown class '6'"):
        generate_images(path, 2, tmp_path / "out", "cpu", **options | {"sample.classes": ("6",)})


SCHEDULERS = {
    "usual": (dict(), "linear"),
    "linear": (dict(beta_start=2e-4, beta_end=0.03), "linear(start=0.0002, end=0.03)"),
    "linear, 100 steps": (dict(num_train_timesteps=100), "linear(start=1e-05, end=0.002)"),
    "scaled_linear": (
        dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        "quadratic(start=0.00085, end=0.012)",
    ),
    "cosine": (dict(beta_schedule="squaredcos_cap_v2", num_train_timesteps=50), "cosine"),
    "betas": (dict(trained_betas=torch.linspace(1e-4, 0.02, 1000).tolist()), "linear"),
}


@pytest.mark.parametrize("given, name", SCHEDULERS.values(), ids=SCHEDULERS)
@pytest.mark.parametrize("predict", ["epsilon", "sample", "v_prediction"])
def test_schedules_there_and_back(tmp_path, given, name, predict):
    given = given | dict(
        prediction_type=predict,
        clip_sample=predict != "sample",
        variance_type="fixed_large",
        rescale_betas_zero_snr=predict == "v_prediction",
    )
    fields = dict(DDPMScheduler(**given).config)
    options = weight_names.fields_as_options(
        tmp_path, fields | {"_class_name": "DDPMScheduler"}, weight_names.SCHEDULER
    )
    assert diffusers.find_schedule(tmp_path, fields, options["diffusion.timesteps"]) == name
    made = tiny(**options | {"diffusion.beta_schedule": name})
    assert made.diffusion.variance == "large" and made.diffusion.zero_terminal_snr == (
        predict == "v_prediction"
    )
    back = DDPMScheduler.from_config(diffusers.scheduler_fields(tmp_path, made))
    there = DDPMScheduler(**given)
    # their tables are products of a thousand float32
    torch.testing.assert_close(back.alphas_cumprod, there.alphas_cumprod, rtol=1e-4, atol=1e-7)
    for field in (
        "prediction_type",
        "clip_sample",
        "variance_type",
        "num_train_timesteps",
        "timestep_spacing",
        "rescale_betas_zero_snr",
    ):
        assert back.config[field] == there.config[field]


@pytest.mark.parametrize(
    "name", ["sigmoid", "sigmoid(tau=0.7)", "cosine(s=0.02)", "linear(end=0.9)"]
)
def test_a_schedule_that_diffusers_has_no_name_for_goes_as_its_betas(tmp_path, name):
    made = tiny(diffusion__beta_schedule=name, diffusion__predict="v")
    fields = diffusers.scheduler_fields(tmp_path, made)
    there = DDPMScheduler.from_config(fields)
    process = build.diffusion(made, None).process
    # theirs are float32
    torch.testing.assert_close(
        there.alphas_cumprod.double(), process.alpha**2, rtol=1e-4, atol=1e-7
    )
    assert (
        diffusers.find_schedule(tmp_path, json.loads(json.dumps(fields)), made.diffusion.timesteps)
        == name
    )


def test_old_folders_load_as_in_diffusers(tmp_path):
    """Without sub-folders, with attention's old names, and pickled weights: as the first models
    on the hub were stored.
    """
    folder = saved(tmp_path / "new", SMALL | HO)
    flat = tmp_path / "old"
    flat.mkdir()
    tensors = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, name in old.items():
        tensors = {key.replace(new, name): value for key, value in tensors.items()}
    torch.save(tensors, flat / "diffusion_pytorch_model.bin")
    for file in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        shutil.copy(folder / file, flat)
    path = convert.convert(flat, tmp_path / "ours.safetensors")
    torch.testing.assert_close(ours(path)[1], theirs(folder), **SAME)


# ours, out


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run folder; diffusers has one number of groups for all norms."""
    folder = tmp_path_factory.mktemp("trained")
    run(
        tiny(
            model__conventions="ho(norm_num_groups=8)",
            model__num_head_channels=4,
            sample__sampler="ddpm(variance='large')",
        ),
        folder,
    )
    return folder


@pytest.mark.parametrize("file", ["", "final.safetensors", "checkpoints/step_00000012.pt"])
def test_a_run_goes_out_and_comes_back(tmp_path, trained, file):
    convert.convert(trained / file, tmp_path / "theirs")
    expected = ours(trained)[1]
    assert expected.std() > 0.01
    torch.testing.assert_close(theirs(tmp_path / "theirs"), expected, **SAME)
    back, out = ours(convert.convert(tmp_path / "theirs", tmp_path / "back"))
    torch.testing.assert_close(out, expected, **SAME)
    before = load.load(trained, "cpu").config
    assert back.model == before.model and back.sample.sampler == "ddpm"
    assert before.sample.sampler == "ddpm(variance='large')" and back.diffusion.variance == "large"
    assert dict(back.diffusion) | {"variance": "small"} == dict(before.diffusion)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_classes_go_out_and_come_back(tmp_path, dropout):
    """With one more label, the last, where the network knows what it is to have none."""
    made = tiny(
        model__conventions="ho(norm_num_groups=8)",
        data__class_labels=True,
        data__classes=("cat", "dog"),
        train__label_dropout=dropout,
    )
    weights = randomize(build.network(made)).state_dict()
    path = tmp_path / "ours.safetensors"
    training_weights.export(path, weights, 0, files.to_json(made))
    labels = [0, 1, None] if dropout else [0, 1]
    expected = [ours(path, label)[1] for label in labels]
    assert differ(expected)
    convert.convert(path, tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/unet/config.json").read_text())[
        "num_class_embeds"
    ] == len(labels)
    same([theirs(tmp_path / "theirs", label) for label in range(len(labels))], expected)
    back = convert.convert(tmp_path / "theirs", tmp_path / "back")
    same([ours(back, label)[1] for label in labels], expected)
    config_back = load.load(back, "cpu").config
    assert config_back.data.classes == ("cat", "dog") and (config_back.train.label_dropout > 0) == (
        dropout > 0
    )
    again = load_file(back)
    assert (
        all(torch.equal(weights[name], again[name]) for name in weights)
        and weights.keys() == again.keys()
    )


def test_a_learned_variance_goes_out_and_comes_back(tmp_path):
    run(
        tiny(
            model__conventions="ho(norm_num_groups=8)",
            diffusion__variance="learned",
            diffusion__loss="hybrid",
            train__length="4 steps",
        ),
        tmp_path / "run",
    )
    convert.convert(tmp_path / "run", tmp_path / "theirs")
    expected = ours(tmp_path / "run")[1]
    assert expected.shape[1] == 2
    torch.testing.assert_close(theirs(tmp_path / "theirs"), expected, **SAME)
    back, out = ours(convert.convert(tmp_path / "theirs", tmp_path / "back"))
    torch.testing.assert_close(out, expected, **SAME)
    assert back.diffusion.variance == "learned" and back.diffusion.loss == "hybrid"
    test_an_exported_pipeline_draws_the_same_images(tmp_path / "again", tmp_path / "run", "ddpm")


def test_what_their_process_cannot_be_is_refused(tmp_path):
    for options, said in (
        (
            dict(diffusion__beta_schedule="flow", diffusion__predict="v"),
            "diffusion.beta_schedule is 'flow'",
        ),
        (dict(diffusion__predict="flow"), "config.diffusion.predict is 'flow'"),
        (dict(diffusion__self_condition=True), "config.diffusion.self_condition is True"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        run(
            tiny(
                model__conventions="ho(norm_num_groups=8)",
                train__length="1 steps",
                train__warmup="0 steps",
                **options,
            ),
            folder,
        )
        refuses(said, folder, tmp_path / "theirs")


def test_an_exported_pipeline_draws_the_same_images(tmp_path, trained, sampler=None):
    """From the same noise, by all 20 steps of ancestral sampling in either's own code."""
    pipeline = DDPMPipeline.from_pretrained(convert.convert(trained, tmp_path / "theirs"))
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        2, torch.Generator().manual_seed(5), num_inference_steps=20, output_type="pt"
    ).images
    loaded = load.load(trained, "cpu")
    generator = torch.Generator().manual_seed(5)
    model = build.diffusion(loaded.config, loaded.net)
    shape = (2, 1, 16, 16)
    sampler = sampler or loaded.config.sample.sampler
    mine = model.sample(
        shape, sampler=sampler, noise=lambda k: torch.randn(shape, generator=generator)
    )
    # their tables are float32, and x0 is divided by small alphas on the way
    torch.testing.assert_close(images, mine / 2 + 0.5, rtol=0, atol=1e-3)
    assert images.std() > 0.05 and len(pipeline(1, num_inference_steps=2).images) == 1


# OpenAI's U-Net, in few words: a forward pass over nothing but a state dict, as their two papers
# describe the network


class OpenAI:
    """Random weights under OpenAI's names, and what their network makes of them."""

    def __init__(
        self,
        mult=(1, 2),
        blocks=1,
        attends=(False, True),
        scale_shift=False,
        updown=False,
        heads=1,
        new_order=False,
        out=3,
        classes=0,
    ):
        self.mult = mult
        self.blocks = blocks
        self.attends = attends
        self.updown = updown
        self.scale_shift = scale_shift
        self.heads = heads
        self.new_order = new_order
        self.out = out
        self.width = 32
        self.weights = {}
        self.generator = torch.Generator().manual_seed(3)
        self.make()
        if classes:
            self.weights["label_emb.weight"] = torch.randn(
                classes, 4 * self.width, generator=self.generator
            )

    def add(self, name, *shape, mean=0.0):
        draw = torch.randn(shape, generator=self.generator) * 0.05
        self.weights[f"{name}.weight"] = draw + mean
        self.weights[f"{name}.bias"] = torch.randn(shape[0], generator=self.generator) * 0.05

    def add_residual(self, name, inputs, outputs):
        self.add(f"{name}.in_layers.0", inputs, mean=1.0)
        self.add(f"{name}.in_layers.2", outputs, inputs, 3, 3)
        self.add(f"{name}.emb_layers.1", outputs * (1 + self.scale_shift), 4 * self.width)
        self.add(f"{name}.out_layers.0", outputs, mean=1.0)
        self.add(f"{name}.out_layers.3", outputs, outputs, 3, 3)
        if inputs != outputs:
            self.add(f"{name}.skip_connection", outputs, inputs, 1, 1)

    def add_attention(self, name, channels):
        self.add(f"{name}.norm", channels, mean=1.0)
        self.add(f"{name}.qkv", 3 * channels, channels, 1)
        self.add(f"{name}.proj_out", channels, channels, 1)

    def make(self):
        """Walk through the network once, so that every layer has its weights; `self.plan` is
        what was walked through.
        """
        width = self.width
        last = len(self.mult) - 1
        number = 0
        self.add("time_embed.0", 4 * width, width)
        self.add("time_embed.2", 4 * width, 4 * width)
        self.add("input_blocks.0.0", width, 3, 3, 3)
        channels = width
        skips = [width]
        self.plan = {"in": [], "out": []}
        for level, mult in enumerate(self.mult):
            for _ in range(self.blocks):
                number += 1
                self.add_residual(f"input_blocks.{number}.0", channels, channels := width * mult)
                if self.attends[level]:
                    self.add_attention(f"input_blocks.{number}.1", channels)
                self.plan["in"].append((number, self.attends[level], False))
                skips.append(channels)
            if level < last:
                number += 1
                if self.updown:
                    self.add_residual(f"input_blocks.{number}.0", channels, channels)
                else:
                    self.add(f"input_blocks.{number}.0.op", channels, channels, 3, 3)
                self.plan["in"].append((number, False, True))
                skips.append(channels)
        self.add_residual("middle_block.0", channels, channels)
        self.add_attention("middle_block.1", channels)
        self.add_residual("middle_block.2", channels, channels)
        number = 0
        for level in range(last, -1, -1):
            for block in range(self.blocks + 1):
                self.add_residual(
                    f"output_blocks.{number}.0",
                    channels + skips.pop(),
                    channels := width * self.mult[level],
                )
                if self.attends[level]:
                    self.add_attention(f"output_blocks.{number}.1", channels)
                up = level > 0 and block == self.blocks
                place = f"output_blocks.{number}.{1 + self.attends[level]}"
                if up and self.updown:
                    self.add_residual(place, channels, channels)
                elif up:
                    self.add(f"{place}.conv", channels, channels, 3, 3)
                self.plan["out"].append((number, self.attends[level], up))
                number += 1
        self.add("out.0", width, mean=1.0)
        self.add("out.2", self.out, width, 3, 3)

    def parameters(self, name):
        return self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]

    def norm(self, name, x):
        return F.group_norm(x, 32, *self.parameters(name), eps=1e-5)

    def conv(self, name, x, **options):
        return F.conv2d(x, *self.parameters(name), **options)

    def residual(self, name, x, emb, resize=lambda x: x):
        h = self.conv(
            f"{name}.in_layers.2", resize(F.silu(self.norm(f"{name}.in_layers.0", x))), padding=1
        )
        emb = F.linear(F.silu(emb), *self.parameters(f"{name}.emb_layers.1"))[..., None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            h = self.norm(f"{name}.out_layers.0", h) * (1 + scale) + shift
        else:
            h = self.norm(f"{name}.out_layers.0", h + emb)
        h = self.conv(f"{name}.out_layers.3", F.silu(h), padding=1)
        x = resize(x)
        return h + (
            self.conv(f"{name}.skip_connection", x)
            if f"{name}.skip_connection.weight" in self.weights
            else x
        )

    def attention(self, name, x):
        b, c, height, width = x.shape
        flat = self.norm(f"{name}.norm", x).flatten(2)
        qkv = F.conv1d(flat, *self.parameters(f"{name}.qkv"))
        size = c // self.heads
        if self.new_order:  # all queries, all keys, all values
            q, k, v = (part.reshape(b * self.heads, size, -1) for part in qkv.chunk(3, dim=1))
        else:  # head by head
            q, k, v = qkv.reshape(b * self.heads, 3 * size, -1).split(size, dim=1)
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / math.sqrt(size), dim=-1)
        out = torch.einsum("bts,bcs->bct", weight, v).reshape(b, c, -1)
        return x + F.conv1d(out, *self.parameters(f"{name}.proj_out")).reshape(x.shape)

    @torch.no_grad()
    def __call__(self, x, t, label=None):
        half = self.width // 2
        angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(half) / half)
        emb = F.linear(
            torch.cat([angles.cos(), angles.sin()], dim=1), *self.parameters("time_embed.0")
        )
        emb = F.linear(F.silu(emb), *self.parameters("time_embed.2"))
        emb = emb if label is None else emb + self.weights["label_emb.weight"][label]
        h = self.conv("input_blocks.0.0", x, padding=1)
        skips = [h]
        for number, attends, down in self.plan["in"]:
            name = f"input_blocks.{number}.0"
            if down and not self.updown:
                h = self.conv(f"{name}.op", h, stride=2, padding=1)
            else:
                h = self.residual(name, h, emb, *[lambda x: F.avg_pool2d(x, 2)] * down)
            h = self.attention(f"input_blocks.{number}.1", h) if attends else h
            skips.append(h)
        h = self.residual("middle_block.0", h, emb)
        h = self.residual("middle_block.2", self.attention("middle_block.1", h), emb)
        for number, attends, up in self.plan["out"]:
            h = self.residual(f"output_blocks.{number}.0", torch.cat([h, skips.pop()], dim=1), emb)
            h = self.attention(f"output_blocks.{number}.1", h) if attends else h
            name = f"output_blocks.{number}.{1 + attends}"
            if up and self.updown:
                h = self.residual(name, h, emb, lambda x: F.interpolate(x, scale_factor=2))
            elif up:
                h = self.conv(f"{name}.conv", F.interpolate(h, scale_factor=2), padding=1)
        return self.conv("out.2", F.silu(self.norm("out.0", h)), padding=1)


THEIR_FLAGS = dict(
    image_size=8,
    diffusion_steps=1000,
    noise_schedule="linear",
    num_heads=1,
    use_new_attention_order=False,
)


@pytest.mark.parametrize(
    "options, flags",
    [
        (dict(), dict()),
        (dict(heads=4), dict(num_heads=4)),
        (dict(heads=4, new_order=True), dict(num_heads=4, use_new_attention_order=True)),
        (dict(heads=2, attends=(False, True)), dict(num_heads=-1, num_head_channels=32)),
        (
            dict(scale_shift=True, updown=True),
            dict(diffusion_steps=4000, noise_schedule="cosine", rescale_timesteps=False),
        ),
        (dict(out=6), dict(diffusion_steps=4000, noise_schedule="cosine", rescale_timesteps=True)),
        (
            dict(mult=(1, 1, 2), blocks=2, attends=(False, True, False), scale_shift=True),
            dict(predict_xstart=True),
        ),
        (
            dict(mult=(1, 3), blocks=3, attends=(True, True), updown=True, heads=2),
            dict(num_heads=2),
        ),
        (dict(mult=(1,), attends=(False,)), dict()),
        (dict(out=6), dict()),
    ],
)
def test_weights_of_openai(tmp_path, options, flags):
    net = OpenAI(**options)
    flags = THEIR_FLAGS | flags
    torch.save(net.weights, tmp_path / "model.pt")
    path = convert.convert(tmp_path / "model.pt", tmp_path / "ours", **flags)
    expected = net(*inputs())
    assert expected.std() > 0.1
    made, out = ours(path)
    torch.testing.assert_close(out, expected, **SAME)
    assert (
        made.diffusion.beta_schedule == flags["noise_schedule"]
        and made.diffusion.timesteps == flags["diffusion_steps"]
    )
    assert made.diffusion.predict == ("x0" if "predict_xstart" in flags else "eps")
    assert made.diffusion.variance == ("learned" if net.out == 6 else "large")


@pytest.mark.parametrize("rescaled, scale", [(True, 1000 / 4000), (False, 1.0)])
def test_a_converted_network_hears_the_times_that_it_was_trained_with(tmp_path, rescaled, scale):
    """OpenAI's code gives t 1000 / T to the network where its flag says so, at any respacing."""
    net = OpenAI()
    torch.save(net.weights, tmp_path / "model.pt")
    flags = THEIR_FLAGS | dict(
        diffusion_steps=4000, noise_schedule="cosine", rescale_timesteps=rescaled
    )
    loaded = load.load(convert.convert(tmp_path / "model.pt", tmp_path / "ours", **flags), "cpu")
    model = build.diffusion(loaded.config, loaded.net.eval())
    x = inputs()[0]
    for level in model.process.levels(7)[:-1]:
        _, eps = model.denoiser(clip=False)(x, level)
        # through x0 and back
        torch.testing.assert_close(
            eps, net(x, torch.full((3,), scale * level.t)), rtol=0, atol=2e-4
        )
    noise = torch.zeros_like(x)
    t = torch.tensor([0, 1777, 3999])
    level = model.process.at(t)
    x_t = (level.alpha * x).float()
    expected = net(x_t, scale * t.float()).square().mean((1, 2, 3))
    with torch.no_grad():
        torch.testing.assert_close(model.losses(x, t, noise), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "options", [dict(classes=3), dict(classes=2, scale_shift=True, updown=True, out=6)]
)
def test_labels_of_openai(tmp_path, options):
    net = OpenAI(**options)
    labels = range(options["classes"])
    torch.save(net.weights, tmp_path / "model.pt")
    expected = [net(*inputs(), label) for label in labels]
    assert differ(expected)
    path = convert.convert(tmp_path / "model.pt", tmp_path / "ours", **THEIR_FLAGS)
    same([ours(path, label)[1] for label in labels], expected)
    made = load.load(path, "cpu").config
    assert made.data.classes == tuple(map(str, labels)) and made.train.label_dropout == 0
    path = convert.convert(tmp_path / "model.pt", tmp_path / "guided", no_label=0, **THEIR_FLAGS)
    same([ours(path, label)[1] for label in (None, *labels[:-1])], expected)


def test_the_order_of_heads_matters(tmp_path):
    """The test above could tell: the other order of the same weights is another network."""
    net = OpenAI(heads=4)
    torch.save(net.weights, tmp_path / "model.pt")
    flags = THEIR_FLAGS | dict(num_heads=4, use_new_attention_order=True)
    path = convert.convert(tmp_path / "model.pt", tmp_path / "ours", **flags)
    assert (ours(path)[1] - net(*inputs())).abs().max() > 1e-3


# mistakes


def test_the_command(tmp_path):
    torch.save(OpenAI(classes=2).weights, tmp_path / "model.pt")
    code, out, err = outcome_of("convert", "model.pt", "--out=ours.safetensors", cwd=tmp_path)
    assert (
        code == 2
        and out == ""
        and err
        == (
            "error: model.pt does not say how it was trained; add what is true of "
            "--image_size=64, --diffusion_steps=1000, --noise_schedule=linear, --num_heads=4 or "
            "--num_head_channels=64, --use_new_attention_order=False\n"
        )
    )
    code, out, err = outcome_of(
        "convert",
        "model.pt",
        "--out=ours.safetensors",
        "--image_size=8",
        "--diffusion_steps=1000",
        "--num_heads=1",
        "--noise_schedule=linear",
        "--nouse_new_attention_order",
        "--classes=cat,dog",
        cwd=tmp_path,
    )
    assert (code, out) == (0, "wrote ours.safetensors\n"), err
    assert load.load(tmp_path / "ours.safetensors", "cpu").config.data.classes == ("cat", "dog")
    convert.convert(tmp_path / "ours.safetensors", tmp_path / "theirs")
    assert DDPMPipeline.from_pretrained(tmp_path / "theirs").unet.config.sample_size == 8


def refuses(message, *arguments, **flags):
    """The conversion is refused in one line that holds `message`, and nothing is written."""
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        convert.convert(*arguments, **flags)
    assert "\n" not in str(error.value) and not Path(arguments[1]).exists()


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("small") / "model")


@pytest.mark.parametrize(
    "file, field, value",
    [
        ("unet/config.json", "_class_name", "UNet2DConditionModel"),
        ("unet/config.json", "sample_size", None),
        ("unet/config.json", "sample_size", [8, 8]),
        ("unet/config.json", "out_channels", 6),
        ("unet/config.json", "num_class_embeds", 0),
        ("unet/config.json", "num_class_embeds", "ten"),
        ("unet/config.json", "class_embed_type", "timestep"),
        ("unet/config.json", "center_input_sample", True),
        ("unet/config.json", "time_embedding_type", "fourier"),
        ("unet/config.json", "time_embedding_dim", 100),
        ("unet/config.json", "freq_shift", 2),
        ("unet/config.json", "downsample_padding", 2),
        ("unet/config.json", "resnet_time_scale_shift", "spatial"),
        ("unet/config.json", "act_fn", "gelu"),
        ("unet/config.json", "add_attention", False),
        ("unet/config.json", "mid_block_type", None),
        ("unet/config.json", "mid_block_scale_factor", 2),
        ("unet/config.json", "attn_norm_num_groups", 16),
        ("unet/config.json", "block_out_channels", [32, 48]),
        ("unet/config.json", "up_block_types", ["UpBlock2D", "UpBlock2D"]),
        ("unet/config.json", "cross_attention_dim", 768),
        ("scheduler/scheduler_config.json", "_class_name", "PNDMScheduler"),
        ("scheduler/scheduler_config.json", "beta_schedule", "sigmoid"),
        ("scheduler/scheduler_config.json", "prediction_type", "flow"),
        ("scheduler/scheduler_config.json", "variance_type", "learned"),
        ("scheduler/scheduler_config.json", "thresholding", True),
        ("scheduler/scheduler_config.json", "clip_sample_range", 2.0),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "many"),
    ],
)
def test_a_field_without_a_counterpart_is_named(tmp_path, small, file, field, value):
    folder = shutil.copytree(small, tmp_path / "model")
    fields = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(fields | {field: value}))
    refuses(
        f"{folder / file}: {field} is {value!r}, which has no counterpart", folder, tmp_path / "out"
    )


@pytest.mark.parametrize(
    "file, content, message",
    [
        (
            "unet/config.json",
            {"down_block_types": ["CrossAttnDownBlock2D"]},
            "down_block_types is 'CrossAttnDownBlock2D'",
        ),
        (
            "unet/config.json",
            {"block_out_channels": None},
            "is damaged, or not a U-Net that ddpm knows",
        ),
        (
            "unet/config.json",
            {"resnet_time_scale_shift": "scale_shift"},
            "attn_norm_num_groups is None",
        ),
        (
            "unet/config.json",
            {"layers_per_block": 2},
            "the tensor down_blocks.0.resnets.1.norm1.weight is missing",
        ),
        (
            "unet/config.json",
            {"block_out_channels": [32, 96]},
            "are of another network than the config's: ",
        ),
        (
            "unet/config.json",
            {"num_class_embeds": 10},
            "the tensor class_embedding.weight is missing",
        ),
        (
            "unet/config.json",
            {"attention_head_dim": 5},
            "num_head_channels 5 does not divide 64 channels",
        ),
        ("unet/config.json", {"sample_size": 7}, "image_size 7 cannot be halved"),
        ("unet/config.json", {"in_channels": 2, "out_channels": 2}, "config.data.channels"),
        (
            "scheduler/scheduler_config.json",
            {"trained_betas": [0.1, 0.3, 0.2], "num_train_timesteps": 3},
            "match no schedule of ddpm",
        ),
        (
            "scheduler/scheduler_config.json",
            {"trained_betas": [0.1, 0.2]},
            "match no schedule of ddpm",
        ),
        ("scheduler/scheduler_config.json", {"beta_end": 1.5}, "match no schedule of ddpm"),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": -1},
            "config.diffusion.timesteps is -1; it must lie",
        ),
        (
            "scheduler/scheduler_config.json",
            {"num_train_timesteps": 10**11},
            "timesteps is 100000000000; it must lie between",
        ),
        (
            "unet/config.json",
            {"num_class_embeds": 10**11},
            "num_class_embeds is 100000000000, which has no counterpart",
        ),
        ("unet/config.json", {"sample_size": 10**400}, "config.data.image_size is 1000"),
        ("model_index.json", {"vqvae": ["diffusers", "VQModel"]}, "'vqvae'"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(tmp_path, small, file, content, message):
    folder = shutil.copytree(small, tmp_path / "model")
    fields = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(fields | content))
    refuses(message, folder, tmp_path / "out")


def test_files_that_are_missing_or_damaged_are_one_line(tmp_path, small):
    out = tmp_path / "out"
    weights = "unet/diffusion_pytorch_model.safetensors"
    refuses("--num_heads is for weights of OpenAI", small, out, num_heads=4)
    refuses("give the folder", small / weights, out)
    refuses("neither a file nor a run folder", tmp_path / "nothing", out)
    refuses("neither a file nor a run folder", tmp_path / "nothing", out, no_label=3)
    with pytest.raises(ValueError, match="is there already; give another --out"):
        convert.convert(small, tmp_path)
    for name, message in (
        (weights, "model.safetensors; give"),
        ("scheduler/scheduler_config.json", "there is no "),
    ):
        folder = shutil.copytree(small, tmp_path / Path(name).name)
        (folder / name).unlink()
        refuses(message, folder, out)
    folder = shutil.copytree(small, tmp_path / "torn")
    (folder / weights).write_bytes(b"torn")
    refuses("is damaged or not a file of weights", folder, out)
    (folder / "unet/config.json").write_text("{")
    refuses("config.json is damaged or not a config", folder, out)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(no_label=3), "--no_label is 3, and {} has the labels 0 to 2; give one of them"),
        (dict(no_label=-1), "--no_label is -1, and {} has the labels 0 to 2"),
        (
            dict(classes=["cat", "dog"]),
            "{} has 3 classes, and 2 are named, 2 differently; give --classes= and a name for each",
        ),
        (dict(classes=["cat", "dog", "cat"]), "{} has 3 classes, and 3 are named, 2 differently"),
        (dict(classes=["cat", "dog", "owl"], no_label=2), "{} has 2 classes, and 3 are named"),
        (dict(num_heads=4), "--num_heads is for weights of OpenAI"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(tmp_path, flags, message):
    folder = saved(tmp_path / "model", SMALL | dict(num_class_embeds=3))
    refuses(message.format(folder / "unet" / "config.json"), folder, tmp_path / "out", **flags)


def test_labels_that_are_none_are_one_line(tmp_path, small):
    refuses(
        f"--no_label is for a network with labels, and {small / 'unet/config.json'} has none",
        small,
        tmp_path / "out",
        no_label=3,
    )
    folder = saved(tmp_path / "one", SMALL | dict(num_class_embeds=1))
    refuses("has one label, a class; leave it out", folder, tmp_path / "out", no_label=0)
    path = convert.convert(folder, tmp_path / "ours.safetensors")
    refuses(
        f"--classes is for a network of others, and {path} is one of ddpm",
        path,
        tmp_path / "out",
        classes=["cat"],
    )
    for count, said in (
        (2, "are of another network than the config's: "),
        (None, "class_embedding.weight has no place"),
    ):
        file = folder / "unet/config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"num_class_embeds": count}))
        refuses(said, folder, tmp_path / "out")


class Opens:
    """What a pickle of bad intent looks like: loading it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_no_code_is_run(tmp_path):
    torch.save({"input_blocks.0.0.weight": Opens(tmp_path / "ran")}, tmp_path / "model.pt")
    refuses("holds more than tensors, numbers and words", tmp_path / "model.pt", tmp_path / "out")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change, flags, message",
    [
        (
            {"label_emb.weight": torch.zeros(10, 64)},
            {},
            "are of another network than the config's: ",
        ),
        (
            {"label_emb.weight": torch.zeros(10, 128)},
            {"no_label": 10},
            "has the labels 0 to 9; give one of them",
        ),
        ({}, {"classes": ["cat"]}, "--classes is for a network with labels, and"),
        (
            {"out.2.weight": torch.zeros(9, 32, 3, 3), "out.2.bias": torch.zeros(9)},
            {},
            "the number of channels out (learn_sigma doubles it) is 9",
        ),
        (
            {"input_blocks.2.0.op.weight": None, "input_blocks.2.0.op.bias": None},
            {},
            "conv_resample is False",
        ),
        ({"time_embed.0.weight": torch.zeros(256, 64)}, {}, "channel_mult is [32, 32, 64]"),
        ({"middle_block.1.qkv.bias": None}, {}, "the tensor middle_block.1.qkv.bias is missing"),
        (
            {"middle_block.3.weight": torch.zeros(1)},
            {},
            "the tensor middle_block.3.weight has no place",
        ),
        (
            {},
            {"diffusion_steps": 4000},
            "rescale_timesteps is None, which has no counterpart on the other side; it can be "
            "True, F",
        ),
        ({}, {"noise_schedule": "sigmoid"}, "noise_schedule is 'sigmoid'"),
        ({}, {"num_heads": 3}, "num_heads 3 does not divide 64 channels"),
        ({}, {"image_size": 9}, "image_size 9 cannot be halved"),
        ({}, {"num_heads": None}, "add what is true of --num_heads=4 or --num_head_channels=64"),
    ],
)
def test_openais_that_do_not_fit_are_one_line(tmp_path, change, flags, message):
    weights = {
        name: value for name, value in (OpenAI().weights | change).items() if value is not None
    }
    torch.save(weights, tmp_path / "model.pt")
    refuses(message, tmp_path / "model.pt", tmp_path / "out", **THEIR_FLAGS | flags)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(model__conventions="ho(norm_num_groups=32)"),
            "config.model.conventions ho(norm_num_groups=32), in groups of its norms, is [8, 16, 24, 32]",
        ),
        (
            dict(model__conventions="ho(norm_num_groups=8)", model__channel_mult=(2, 2)),
            "config.model.channel_mult, its first, is 2",
        ),
        (
            dict(
                model__conventions="ho(norm_num_groups=8)",
                model__attention_resolutions=(16, 8),
                model__num_heads=2,
            ),
            "config.model.num_heads, in channels a head, is [4, 8]",
        ),
        (
            dict(model__name="dit(depth=2, width=16, heads=2)"),
            "config.model.name is 'dit(depth=2, width=16, heads=2)'",
        ),
        (dict(model__qk_norm=True), "config.model.qk_norm is True"),
        (dict(diffusion__rescale_timesteps=True), "config.diffusion.rescale_timesteps is True"),
        (dict(model__res_blocks_per_level=(1, 2)), "config.model.res_blocks_per_level is (1, 2)"),
    ],
)
def test_ours_that_do_not_fit_are_one_line(tmp_path, options, message):
    made = tiny(**options)
    training_weights.export(
        tmp_path / "ours.safetensors", build.network(made).state_dict(), 0, files.to_json(made)
    )
    refuses(message, tmp_path / "ours.safetensors", tmp_path / "out")
