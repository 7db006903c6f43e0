"""Names of a U-Net's tensors in diffusers and in OpenAI's code, and fields of diffusers' configs.

Tables, and the functions that read them in both directions.
"""

import re
from math import sqrt

from torch import nn

from ddpm.diffusion.schedules import get_beta_schedule, line
from ddpm.models.layers import AttentionBlock, Downsample, ResidualBlock, Upsample


def tensor_names(net, blocks, dialect):
    """Yield (our name, names in a dialect, layer) of each tensor of a U-Net.

    `blocks` is its number of residual blocks a level; several names share the tensor's rows.
    """
    for name, layer in net.named_modules():
        place = name
        numbers = {}
        if match := re.fullmatch(r"(encoder|decoder)\.(\d+)\.(\d)", name):
            stage = int(match[2])
            kind = "attention" if isinstance(layer, AttentionBlock) else "resize"
            if isinstance(layer, ResidualBlock) and isinstance(layer.resize, nn.Identity):
                kind = "block"
            place = f"{match[1]} {kind}"
            level, block = divmod(stage, blocks + 1)
            numbers = {"level": level, "block": block, "stage": stage, "layer": match[3]}
            numbers["next"] = stage + 1
        if place not in PLACES:
            continue
        prefix = PLACES[place][dialect].format(**numbers)
        for part, theirs in PARTS.get(type(layer), SAME_NAME).items():
            for leaf, _ in layer.get_submodule(part).named_parameters():
                rows = theirs[dialect].split(" ")
                yield dotted(name, part, leaf), [dotted(prefix, row, leaf) for row in rows], layer


def dotted(*words):
    return ".".join(filter(None, words))


def fields_as_options(path, fields, table):
    """Our options for the fields of a diffusers config in a table; raises ValueError for others."""
    options = {}
    for field, (usual, option, values) in table.items():
        value = fields.get(field, usual)
        if not isinstance(values, type):
            options[option] = values[require(path, field, value, values)]
        elif isinstance(value, (values, int)):
            options[option] = values(value)
        else:
            require(path, field, value, [f"a {values.__name__}"])
    return {option: value for option, value in options.items() if option}


def options_as_fields(path, options, table):
    """The fields of a diffusers config for our options."""
    fields = {}
    for field, (_, option, values) in table.items():
        if isinstance(values, type):
            fields[field] = options[option]
        else:
            ours = option and require(path, f"config.{option}", options[option], values.values())
            fields[field] = next(there for there, here in values.items() if here == ours)
    return fields


def channel_multipliers(path, field, widths, width):
    """Widths divided by `width`; raises ValueError where they are not multiples of it."""
    if widths[0] != width or any(other % width for other in widths):
        require(path, field, list(widths), [f"{width} and multiples of it"])
    return tuple(other // width for other in widths)


def require(path, field, value, allowed):
    """Return the value of a field if it is allowed, else raise ValueError."""
    if value not in list(allowed):
        others = f"; it can be {', '.join(map(str, allowed))}" if allowed else ""
        raise ValueError(
            f"{path}: {field} is {value!r}, which has no counterpart on the other side{others}"
        )
    return value


DIFFUSERS = 0
OPENAI = 1  # the columns of the next tables
PLACES = {  # where a layer of ours is: in a UNet2DModel, in OpenAI's UNetModel
    "stem": ("conv_in", "input_blocks.0.0"),
    "time_embedding.0": ("time_embedding.linear_1", "time_embed.0"),
    "time_embedding.2": ("time_embedding.linear_2", "time_embed.2"),
    "encoder block": ("down_blocks.{level}.resnets.{block}", "input_blocks.{next}.{layer}"),
    "encoder attention": ("down_blocks.{level}.attentions.{block}", "input_blocks.{next}.{layer}"),
    "encoder resize": ("down_blocks.{level}.downsamplers.0", "input_blocks.{next}.{layer}"),
    "class_embedding": ("class_embedding", "label_emb"),
    "middle.0": ("mid_block.resnets.0", "middle_block.0"),
    "middle.1": ("mid_block.attentions.0", "middle_block.1"),
    "middle.2": ("mid_block.resnets.1", "middle_block.2"),
    "decoder block": ("up_blocks.{level}.resnets.{block}", "output_blocks.{stage}.{layer}"),
    "decoder attention": ("up_blocks.{level}.attentions.{block}", "output_blocks.{stage}.{layer}"),
    "decoder resize": ("up_blocks.{level}.upsamplers.0", "output_blocks.{stage}.{layer}"),
    "head.0": ("conv_norm_out", "out.0"),
    "head.2": ("conv_out", "out.2"),
}
SAME_NAME = {"": ("", "")}
PARTS = {  # what a layer of ours consists of: in diffusers, in OpenAI's code
    ResidualBlock: {
        "norm1": ("norm1", "in_layers.0"),
        "conv1": ("conv1", "in_layers.2"),
        "project": ("time_emb_proj", "emb_layers.1"),
        "norm2": ("norm2", "out_layers.0"),
        "conv2": ("conv2", "out_layers.3"),
        "shortcut": ("conv_shortcut", "skip_connection"),
    },
    AttentionBlock: {
        "norm": ("group_norm", "norm"),
        "qkv": ("to_q to_k to_v", "qkv"),
        "project": ("to_out.0", "proj_out"),
    },
    Downsample: {"conv": ("conv", "op")},
    Upsample: {"conv": ("conv", "conv")},
}
# of early diffusers
OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
OLD_PART = "|".join(map(re.escape, OLD))
STORED = "diffusion_pytorch_model"

# a field of UNet2DModel: what it is if left out, our option, {its values: ours} or the type of a
# value that is the same
UNET = {
    "_class_name": (None, None, {"UNet2DModel": None}),
    "sample_size": (None, "data.image_size", int),
    "in_channels": (3, "data.channels", int),
    "layers_per_block": (2, "model.num_res_blocks", int),
    "dropout": (0.0, "model.dropout", float),
    "freq_shift": (0, "model.conventions(freq_shift)", {0: 0, 1: 1}),
    "downsample_padding": (1, "model.conventions(downsample_padding)", {0: 0, 1: 1}),
    "norm_num_groups": (32, "model.conventions(norm_num_groups)", int),
    "norm_eps": (1e-5, "model.conventions(norm_eps)", float),
    "resnet_time_scale_shift": (
        "default",
        "model.use_scale_shift_norm",
        {"default": False, "scale_shift": True},
    ),
    "flip_sin_to_cos": (True, None, {False: None, True: None}),  # is a permutation of weights
    "act_fn": ("silu", None, {"silu": None, "swish": None}),
    "center_input_sample": (False, None, {False: None}),
    "time_embedding_type": ("positional", None, {"positional": None}),
    "mid_block_type": ("UNetMidBlock2D", None, {"UNetMidBlock2D": None}),
    "mid_block_scale_factor": (1, None, {1: None}),
    "add_attention": (True, None, {True: None}),
    "class_embed_type": (None, None, {None: None}),
    "num_train_timesteps": (None, None, {None: None}),  # of a learned time embedding
}
SHAPE = {  # its other fields, which are read together, and the options that they make
    "block_out_channels": ("model.model_channels", "model.channel_mult"),
    "down_block_types": ("model.attention_resolutions", "model.resblock_updown"),
    "up_block_types": (),
    "downsample_type": (),
    "upsample_type": (),
    "attention_head_dim": ("model.num_heads", "model.num_head_channels"),
    "attn_norm_num_groups": (),
    "num_class_embeds": ("data.classes",),
    "out_channels": (),
    "time_embedding_dim": (),
}
# diffusers' block on the way down: the one on the way up, with attention or not, how it resizes
# (None: see another)
BLOCKS = {
    "DownBlock2D": ("UpBlock2D", False, "conv"),
    "AttnDownBlock2D": ("AttnUpBlock2D", True, None),
    "ResnetDownsampleBlock2D": ("ResnetUpsampleBlock2D", False, "resnet"),
}
VARIANCES = {"fixed_small": "small", "fixed_small_log": "small", "fixed_large": "large"}
VARIANCES |= {"learned_range": "learned"}
SCHEDULER = {  # a field of DDPMScheduler, as in UNET
    "_class_name": (None, None, {"DDPMScheduler": None}),
    "num_train_timesteps": (1000, "diffusion.timesteps", int),
    "prediction_type": (
        "epsilon",
        "diffusion.predict",
        {"epsilon": "eps", "sample": "x0", "v_prediction": "v"},
    ),
    "clip_sample": (True, "diffusion.clip", {True: True, False: False}),
    "clip_sample_range": (1.0, None, {1.0: None}),
    "variance_type": ("fixed_small", "diffusion.variance", VARIANCES),
    "timestep_spacing": (
        "leading",
        "sample.spacing",
        {"leading": "leading", "linspace": "linear", "trailing": "trailing"},
    ),
    "steps_offset": (0, None, {0: None}),
    "thresholding": (False, None, {False: None}),
    "rescale_betas_zero_snr": (False, "diffusion.zero_terminal_snr", {False: False, True: True}),
}
BETAS = {  # beta_schedule: its betas from the first to the last
    "linear": line,
    "scaled_linear": lambda start, end, steps: line(sqrt(start), sqrt(end), steps) ** 2,
    "squaredcos_cap_v2": lambda start, end, steps: get_beta_schedule("cosine", steps),
}
OUR_NAME = "_ddpm_schedule"  # says in a diffusers file which schedule its trained_betas are
# and the names of its labels, without the last one if it means no label
OUR_CLASSES = "_ddpm_classes"
