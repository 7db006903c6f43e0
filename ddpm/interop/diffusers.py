"""Weights of Hugging Face diffusers to a checkpoint of ours, and back."""

import contextlib
import json
import re

import safetensors
import torch
from einops import rearrange
from safetensors.torch import load_file, save
from torch import nn

from ddpm.common import safe_load
from ddpm.common.files import atomic_folder, atomic_write
from ddpm.common.registry import parse
from ddpm.config import check, defaults, files
from ddpm.diffusion.schedules import SCHEDULES, get_beta_schedule
from ddpm.experiment import build, load
from ddpm.interop import weight_names as tables
from ddpm.interop.weight_names import channel_multipliers, require, tensor_names
from ddpm.models.layers import AttentionBlock
from ddpm.training import weights as training_weights


def from_diffusers(folder, labels):
    """(config, weights) of ours for a diffusers folder; `labels` as for `label_options`."""
    index = read_json(folder / "model_index.json")
    parts = sorted(name for name in index if name[0] != "_")
    require(folder, "model_index.json's list", parts, [["scheduler", "unet"], []])
    path = config_path(folder, "unet", "config")
    other = config_path(folder, "scheduler", "scheduler_config")
    unet = read_json(path)
    scheduler = read_json(other)
    if not scheduler:
        remedy = "put there the noise that the network was trained with"
        raise ValueError(f"there is no {other}; {remedy}")
    options = files.gather(
        tables.fields_as_options(path, unet, tables.UNET)
        | shape_as_options(path, unet)
        | tables.fields_as_options(other, scheduler, tables.SCHEDULER)
    )
    check.check_ranges(options)  # before anything is as long as they say
    learned = options["diffusion.variance"] == "learned"
    channels = options["data.channels"]
    options["diffusion.loss"] = "hybrid" if learned else "mse"
    require(path, "out_channels", unet.get("out_channels", 3), [channels * (1 + learned)])
    steps = options["diffusion.timesteps"]
    options["diffusion.beta_schedule"] = find_schedule(other, scheduler, steps)
    rows = unet.get("num_class_embeds")
    counted = rows is None or type(rows) is int and 0 < rows <= MAX_CLASSES
    require(path, "num_class_embeds", rows, [rows] if counted else [None, f"1 to {MAX_CLASSES}"])
    named, no_label = label_options(path, rows, labels, unet.get(tables.OUR_CLASSES, ()))
    possible = [path.with_name(tables.STORED + suffix) for suffix in (".safetensors", ".bin")]
    stored = next((file for file in possible if file.exists()), None)
    if stored is None:
        raise ValueError(f"there is no {possible[0]}; give a folder with weights, in one file")
    tensors = {
        re.sub(tables.OLD_PART, lambda old: tables.OLD[old[0]], name): value
        for name, value in read_tensors(stored).items()
    }
    cosines_first = unet.get("flip_sin_to_cos", True)
    options |= named
    return to_checkpoint(
        stored, tensors, options, tables.DIFFUSERS, cosines_first, no_label=no_label
    )


def shape_as_options(path, unet):
    """Our options for what a UNet2DModel's config spreads over several fields."""
    for field, value in unet.items():
        if field[0] != "_" and field not in tables.UNET and field not in tables.SHAPE:
            require(path, field, value, [])
    widths = unet["block_out_channels"]
    groups = unet.get("norm_num_groups", 32)
    size = unet["sample_size"]
    blocks = tables.BLOCKS
    types = [require(path, "down_block_types", name, blocks) for name in unet["down_block_types"]]
    ups = [blocks[name][0] for name in types[::-1]]
    require(path, "up_block_types", unet["up_block_types"], [ups])
    ways = {blocks[name][2] for name in types}
    if None in ways:
        ways |= {unet.get(field, "conv") for field in ("downsample_type", "upsample_type")}
    ways = sorted(ways - {None})
    resizing = "the way to resize in down_block_types, downsample_type, upsample_type"
    require(path, resizing, ways, [["conv"], ["resnet"]])
    require(path, "time_embedding_dim", unet.get("time_embedding_dim"), [None, 4 * widths[0]])
    # else None is no norm in the middle
    silent = [None] if unet.get("resnet_time_scale_shift", "default") == "default" else []
    require(path, "attn_norm_num_groups", unet.get("attn_norm_num_groups"), [groups, *silent])
    return {
        "model.model_channels": widths[0],
        "model.channel_mult": channel_multipliers(path, "block_out_channels", widths, widths[0]),
        "model.attention_resolutions": tuple(
            size >> level for level, name in enumerate(types) if blocks[name][1]
        ),
        "model.num_head_channels": unet.get("attention_head_dim", 8) or 0,
        "model.resblock_updown": ways == ["resnet"],
    }


def find_schedule(path, scheduler, steps):
    """Our name of the schedule with a diffusers scheduler's betas; raises ValueError for others."""
    betas = scheduler.get("trained_betas")
    if betas is None:
        name = scheduler.get("beta_schedule", "linear")
        make = tables.BETAS[require(path, "beta_schedule", name, tables.BETAS)]
    try:
        if betas is None:
            betas = make(scheduler.get("beta_start", 1e-4), scheduler.get("beta_end", 0.02), steps)
        betas = torch.as_tensor(betas, dtype=torch.float64)
    except (TypeError, ValueError, ArithmeticError):
        fault = "its betas are not the numbers of a schedule; use another file"
        raise ValueError(f"{path}: {fault}") from None
    ends = "(start={:.9g}, end={:.9g})".format(*(betas[[0, -1]] * steps / 1000).tolist())
    for name in (scheduler.get(tables.OUR_NAME), *SCHEDULES, f"linear{ends}", f"quadratic{ends}"):
        with contextlib.suppress(ValueError):  # of what is no schedule, or has no betas
            ours = get_beta_schedule(name, steps)
            # theirs may be float32
            if ours.shape == betas.shape and torch.allclose(ours, betas, rtol=1e-5, atol=1e-9):
                return name
    span = f"{betas[0]:.3g} to {betas[-1]:.3g} in {steps} steps"
    raise ValueError(f"{path}: its betas, {span}, match no schedule of ddpm")


def label_options(path, rows, labels, names=()):
    """(our options for the classes of a network, its row for no label or None).

    `rows` is the length of its label embedding, if any; `labels` has the flags "classes" and
    "no_label" that the user gave; `names` come with the network, one fewer than rows where the last
    row means no label. Raises ValueError where these do not fit.
    """
    if not rows and labels:
        remedy = "leave it out"
        raise ValueError(
            f"--{min(labels)} is for a network with labels, and {path} has none; {remedy}"
        )
    if not rows:
        return {}, None
    no_label = labels.get("no_label", rows - 1 if len(names) == rows - 1 > 0 else None)
    if no_label is not None and (rows == 1 or no_label not in range(rows)):
        known = f"the labels 0 to {rows - 1}; give one of them"
        known = "one label, a class; leave it out" if rows == 1 else known
        raise ValueError(f"--no_label is {no_label}, and {path} has {known}")
    numbers = tuple(str(row) for row in range(rows) if row != no_label)
    names = labels.get("classes", tuple(names) or numbers)
    if not len(names) == len(set(names)) == len(numbers):
        named = f"{len(names)} are named, {len(set(names))} differently"
        remedy = "give --classes= and a name for each, and --no_label= if a label means none"
        raise ValueError(f"{path} has {len(numbers)} classes, and {named}; {remedy}")
    options = {"data.class_labels": True, "data.classes": names}
    if no_label is None:
        options["train.label_dropout"] = 0.0  # by which guidance is refused
    return options, no_label


def to_checkpoint(path, tensors, options, dialect, cosines_first, legacy=False, no_label=None):
    """(base() with `options`, their tensors under our names and in our order).

    cosines_first: their time embedding has the cosines before the sines
    legacy: they have queries, keys and values head by head
    no_label: their row for no label, which becomes part of a bias here
    """
    steps = options["diffusion.timesteps"]
    unknown = "folder(path='the images it was trained on')"
    options = options | {
        "data.source": unknown,
        "sample.sampler": "ddpm",
        "sample.steps": steps,
        "evaluate.steps": min(50, steps),
    }
    config = files.changed(defaults.freeze(defaults.base()), options)
    build.check(config)
    with torch.device("meta"):
        net = build.network(config)
    weights = {}
    rest = dict(tensors)
    for name, theirs, layer in tensor_names(net, config.model.num_res_blocks, dialect):
        if lacking := [name_there for name_there in theirs if name_there not in rest]:
            fault = f"the tensor {lacking[0]} is missing, which a network of this config needs"
            raise ValueError(f"{path}: {fault}")
        value = torch.cat([rest.pop(name_there).float() for name_there in theirs])
        if legacy and ".qkv." in name:
            order = "(heads three d) ... -> (three heads d) ..."
            value = rearrange(value, order, three=3, heads=layer.heads)
        ones = (1,) * (net.get_parameter(name).dim() - value.dim())
        weights[name] = value.reshape(value.shape + ones)
    if rest:
        raise ValueError(f"{path}: the tensor {min(rest)} has no place in a network of this config")
    if cosines_first:
        rows = weights["time_embedding.0.weight"]
        half, odd = divmod(rows.shape[1], 2)
        cosines, sines, zero = rows.split([half, half, odd], dim=1)
        weights["time_embedding.0.weight"] = torch.cat([sines, cosines, zero], dim=1)
    if no_label is not None:
        rows = weights["class_embedding.weight"]
        weights["time_embedding.2.bias"] = weights["time_embedding.2.bias"] + rows[no_label]
        others = torch.cat([rows[:no_label], rows[no_label + 1 :]])
        weights["class_embedding.weight"] = others - rows[no_label]
    load.put_weights(net, weights, path, assign=True)
    return config, weights


def to_diffusers(source, out):
    """Write a run folder or checkpoint of ours as a diffusers folder; returns the folder."""
    path, _, text, weights = training_weights.load_weights(source)
    config = files.changed(files.from_json(text), {})  # and so checked
    net = load.network_with(config, weights, path)
    unet = unet_fields(path, config, net)
    scheduler = scheduler_fields(path, config)
    tensors = {}
    for name, theirs, layer in tensor_names(net, config.model.num_res_blocks, tables.DIFFUSERS):
        value = net.get_parameter(name).detach().float()
        if isinstance(layer, AttentionBlock) and value.dim() == 4:
            value = rearrange(value, "o i 1 1 -> o i")
        if isinstance(layer, nn.Embedding):
            zeros = value.new_zeros(unet["num_class_embeds"] - len(value), value.shape[1])
            value = torch.cat([value, zeros])
        for name_there, part in zip(theirs, value.chunk(len(theirs)), strict=True):
            tensors[name_there] = part.clone()
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    texts = {"unet/config": unet, "scheduler/scheduler_config": scheduler, "model_index": index}
    with atomic_folder(out) as folder:
        with atomic_write(folder / "unet" / f"{tables.STORED}.safetensors") as part:
            part.write_bytes(save(tensors, metadata={"format": "pt"}))
        for file, fields in texts.items():
            with atomic_write(folder / f"{file}.json") as part:
                part.write_text(json.dumps(fields, indent=2) + "\n")
    return out


def unet_fields(path, config, net):
    """The fields of a UNet2DModel's config for a network; ValueError where it lacks an option."""
    options = build.spelled_out(config)
    model = config.model
    check_counterparts(path, config, options)
    groups = sorted(
        {layer.num_groups for layer in net.modules() if isinstance(layer, nn.GroupNorm)}
    )
    field = f"config.model.conventions {model.conventions}, in groups of its norms,"
    require(path, field, groups, [groups[:1]])
    blocks = [layer for layer in net.modules() if isinstance(layer, AttentionBlock)]
    heads = sorted({layer.norm.num_channels // layer.heads for layer in blocks})
    heads = [None] if all(layer.heads == 1 for layer in blocks) else heads
    require(path, "config.model.num_heads, in channels a head,", heads, [heads[:1]])
    resize = "resnet" if model.resblock_updown else "conv"
    downs = down_blocks(config, resize)
    fields = tables.options_as_fields(path, options, tables.UNET)
    if classes := list(config.data.classes):
        fields["num_class_embeds"] = len(classes) + (config.train.label_dropout > 0)
        fields[tables.OUR_CLASSES] = classes
    return fields | {
        "out_channels": net.head[2].out_channels,
        "block_out_channels": [model.model_channels * mult for mult in model.channel_mult],
        "down_block_types": downs,
        "up_block_types": [tables.BLOCKS[name][0] for name in downs[::-1]],
        "downsample_type": resize,
        "upsample_type": resize,
        "attention_head_dim": heads[0],
        "norm_num_groups": groups[0],
        "attn_norm_num_groups": groups[0],
    }


def check_counterparts(path, config, options):
    """Raise ValueError for an option of a config, as flat `options` too, that diffusers lacks."""
    usual = build.spelled_out(defaults.base())
    # trained weights replace the initial ones
    carried = {
        "model.conventions(initialization)",
        *(option for _, option, _ in tables.UNET.values()),
    }
    carried = carried.union(*tables.SHAPE.values())
    for option, value in options.items():
        if option.startswith("model.") and option not in carried:
            require(path, f"config.{option}", value, [usual[option]])
    process = config.diffusion
    if process.timesteps != 1000:
        require(path, "config.diffusion.rescale_timesteps", process.rescale_timesteps, [False])
    require(path, "config.diffusion.self_condition", process.self_condition, [False])
    first = config.model.channel_mult[0]
    require(path, "config.model.channel_mult, its first,", first, [1])


def down_blocks(config, resize):
    """The names of diffusers' blocks, from the largest images to the smallest."""
    names = {}
    for name, (_, attention, kind) in tables.BLOCKS.items():
        if kind in (None, resize):
            names.setdefault(attention, name)
    sizes = [config.data.image_size >> level for level in range(len(config.model.channel_mult))]
    return [names[size in config.model.attention_resolutions] for size in sizes]


def scheduler_fields(path, config):
    """The fields of a DDPMScheduler's config for a process of ours; betas by name if possible."""
    options = defaults.flatten(config)
    # sampling is the user's choice, so it is never refused
    if config.diffusion.variance != "learned":
        variance = parse(config.sample.sampler)[1].get("variance", config.diffusion.variance)
        options["diffusion.variance"] = variance
    if config.sample.spacing not in tables.SCHEDULER["timestep_spacing"][2].values():
        options["sample.spacing"] = "leading"
    fields = tables.options_as_fields(path, options, tables.SCHEDULER)
    name = config.diffusion.beta_schedule
    steps = config.diffusion.timesteps
    try:
        betas = get_beta_schedule(name, steps)
    except ValueError:
        require(path, "config.diffusion.beta_schedule", name, [])
    start, end = (float(f"{beta:.9g}") for beta in betas[[0, -1]].tolist())
    for theirs, make in tables.BETAS.items():
        if torch.allclose(make(start, end, steps), betas, rtol=1e-8, atol=0):
            return fields | {"beta_schedule": theirs, "beta_start": start, "beta_end": end}
    return fields | {"trained_betas": betas.tolist(), tables.OUR_NAME: name}


def config_path(folder, part, name):
    """The path of the config of a part of a diffusers folder, in a sub-folder if there is one."""
    return (folder / part if (folder / part).is_dir() else folder) / f"{name}.json"


def is_model(folder):
    """True where a folder has diffusers' config of a pipeline or a network."""
    paths = folder / "model_index.json", config_path(folder, "unet", "config")
    return any("_class_name" in read_json(path) for path in paths)


def read_json(path):
    """The dict in a JSON file, empty without a file; raises ValueError for other content."""
    if not path.is_file():
        return {}
    with contextlib.suppress(ValueError, RecursionError), open(path) as file:
        fields = json.loads(file.read(safe_load.LONGEST))
        if isinstance(fields, dict):
            return fields
    raise ValueError(f"{path} is damaged or not a config; use another file")


def read_tensors(path):
    """The tensors in a file, on the CPU; empty if it has anything else. Raises ValueError."""
    try:
        tensors = load_file(path) if path.suffix == ".safetensors" else safe_load.read(path)
    except (OSError, safetensors.SafetensorError):
        raise ValueError(f"{path} is damaged or not a file of weights; use another file") from None
    if isinstance(tensors, dict) and all(map(torch.is_tensor, tensors.values())):
        return tensors
    return {}


MAX_CLASSES = 100_000  # four times those of the full ImageNet
