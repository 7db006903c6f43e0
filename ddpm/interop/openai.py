"""Weights of OpenAI's guided-diffusion and improved-diffusion as a checkpoint of ours."""

import re

from ddpm.interop import OPENAI_FLAGS, diffusers
from ddpm.interop.weight_names import OPENAI, channel_multipliers, require


def from_openai(path, tensors, given, labels):
    """(config, weights) of ours for OpenAI's tensors.

    `given` are their flags, for what shapes do not say, and `labels` as for `label_options`.
    Raises ValueError for a missing flag, and for what has no counterpart here.
    """
    rows = len(tensors.get("label_emb.weight", ()))
    named, no_label = diffusers.label_options(path, rows, labels)
    given = {flag: value for flag, value in given.items() if value != -1}  # which is their None
    heads = sorted({"num_heads", "num_head_channels"} & given.keys()) or ["num_heads"]
    needed = ["image_size", "diffusion_steps", "noise_schedule", *heads, "use_new_attention_order"]
    if missing := [OPENAI_FLAGS[flag][1] for flag in needed if flag not in given]:
        remedy = f"add what is true of {', '.join(missing)}"
        raise ValueError(f"{path} does not say how it was trained; {remedy}")
    options = shape_options(path, tensors, given["image_size"]) | flag_options(path, given) | named
    legacy = not given["use_new_attention_order"]
    return diffusers.to_checkpoint(path, tensors, options, OPENAI, True, legacy, no_label)


def shape_options(path, tensors, size):
    """Our options that the names and shapes of OpenAI's tensors tell, for images of a size."""

    def numbers(pattern):
        matches = (re.match(pattern, name) for name in tensors)
        return {int(match[1]) for match in matches if match}

    ups = numbers(r"output_blocks\.(\d+)\.[12]\.(?:conv|in_layers)\.")
    stages = numbers(r"output_blocks\.(\d+)\.")
    blocks = len(stages) // (len(ups) + 1) - 1
    # the largest images first
    firsts = [f"output_blocks.{level * (blocks + 1)}" for level in range(len(ups), -1, -1)]
    widths = [len(tensors[f"{first}.0.out_layers.3.bias"]) for first in firsts]
    stem, channels = tensors["input_blocks.0.0.weight"].shape[:2]
    width = tensors["time_embed.0.weight"].shape[1]
    outputs = "the number of channels out (learn_sigma doubles it)"
    require(path, outputs, len(tensors["out.2.bias"]), [channels, 2 * channels])
    learned = len(tensors["out.2.bias"]) > channels
    # else downsampling has no weights
    resamples = len(numbers(r"input_blocks\.(\d+)\.")) == len(stages)
    require(path, "conv_resample", resamples, [True])
    _, *multipliers = channel_multipliers(path, "channel_mult", [stem, *widths], width)
    shift = tensors["middle_block.0.emb_layers.1.bias"]
    return {
        "data.image_size": size,
        "data.channels": channels,
        "model.model_channels": width,
        "model.channel_mult": tuple(multipliers),
        "model.num_res_blocks": blocks,
        "model.resblock_updown": bool(numbers(r"output_blocks\.(\d+)\.[12]\.in_layers")),
        "model.attention_resolutions": tuple(
            size >> level
            for level, first in enumerate(firsts)
            if f"{first}.1.qkv.weight" in tensors
        ),
        "model.use_scale_shift_norm": len(shift) == 2 * widths[-1],
        "model.conventions": "openai(norm_num_groups=32)",
        "diffusion.variance": "learned" if learned else "large",
        "diffusion.loss": "hybrid" if learned else "mse",
    }


def flag_options(path, given):
    """Our options for OpenAI's flags."""
    steps = given["diffusion_steps"]
    # two of their repositories have different defaults
    allowed = [True, False] if steps != 1000 else [None, True, False]
    rescaled = require(path, "rescale_timesteps", given.get("rescale_timesteps"), allowed)
    schedule = require(path, "noise_schedule", given["noise_schedule"], ["linear", "cosine"])
    return {
        "model.num_heads": given.get("num_heads", 1),
        "model.num_head_channels": given.get("num_head_channels", 0),
        "diffusion.timesteps": steps,
        "diffusion.rescale_timesteps": bool(rescaled),
        "diffusion.predict": "x0" if given.get("predict_xstart") else "eps",
        "diffusion.beta_schedule": schedule,
    }
