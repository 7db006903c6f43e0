"""Weights alone: exported safetensors, snapshots of averages, and the weights of a checkpoint."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialized

from ddpm.common import safe_load
from ddpm.common.files import atomic_write
from ddpm.training import checkpoint


def export(path, weights, step, config_json, **more):
    """Write name -> tensor to a safetensors file, with step, config and `more` in its header."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    about = {"format": checkpoint.FORMAT, "step": step, "config": config_json} | more
    about["crc32"] = safe_load.checksum(about, tensors)
    with atomic_write(path) as part:  # one key: the order of several is not fixed
        # safetensors' save_file makes files that other users cannot read
        part.write_bytes(serialized(tensors, metadata={"ddpm": json.dumps(about)}))


def save_snapshot(folder, step, config_json, averages, buffers=()):
    """Write averages, word -> (name -> tensor), to one file; returns its path.

    Tensors, except those named in `buffers`, are in half precision, as in Karras et al. 2024.
    """
    path = Path(folder, "snapshots", f"step_{step:08d}.safetensors")
    tensors = {}
    for word, average in averages.items():
        for name, value in average.items():
            halved = value.is_floating_point() and name not in buffers
            tensors[f"{word}/{name}"] = value.half() if halved else value
    export(path, tensors, step, config_json)
    return path


def load_snapshot(path, word):
    """An average in a snapshot, name -> tensor on the host; raises CorruptFile if damaged."""
    _, tensors = exported(path)
    return {
        name.removeprefix(f"{word}/"): value
        for name, value in tensors.items()
        if name.startswith(f"{word}/")
    }


def delete_snapshots_after(folder, step):
    """Delete the snapshots after the step at which a training starts."""
    for at, path in checkpoint.snapshots(folder):
        if at > step:
            path.unlink()


def load_weights(run_or_file):
    """(path, step, config JSON, name -> float32 tensor on the host) of a run folder or file.

    The weights are averaged, of a folder's newest undamaged file; a line on stderr names damaged
    ones. Raises ValueError for a missing or damaged file.
    """
    damaged = []
    files = checkpoint.files_of(run_or_file)
    for file in files:
        try:
            path, step, text, tensors = weights_in(file)
        except safe_load.CorruptFile as error:
            damaged.append(error)
            continue
        for corrupt in damaged:
            if os.environ.get("LOCAL_RANK", "0") == "0":  # the first rank of a machine
                print(f"{corrupt.path} is damaged ({corrupt.why}); ", end="", file=sys.stderr)
                print(f"{path.name}, of step {step}, takes its place", file=sys.stderr)
        return path, step, text, tensors
    raise damaged[0] if len(files) == 1 else checkpoint.all_damaged(damaged)


def weights_in(path):
    """`load_weights` of one file; raises CorruptFile, and ValueError if it is not of ddpm."""
    if path.suffix != ".safetensors":
        content = checkpoint.load(path)
        return path, content["step"], content["config"], ema_weights(path, content, "ema")
    about, tensors = exported(path)
    return path, about["step"], about["config"], tensors


def ema_weights(path, content, part):
    """The averaged weights, name -> tensor, in a part of a checkpoint; ValueError without any."""
    shadow = content["parts"].get(part, {}).get("shadow")
    if not isinstance(shadow, dict) or not all(
        isinstance(value, torch.Tensor) for value in shadow.values()
    ):
        raise ValueError(f"{path} has no averaged weights {part!r}; use another file")
    return shadow


def exported(path):
    """(header, name -> tensor on the host) of an exported file; CorruptFile if it is damaged."""
    about = checkpoint.header(path)
    tensors = load_file(path)
    if about.pop("crc32", None) not in (None, safe_load.checksum(about, tensors)):
        raise safe_load.CorruptFile(path, "it does not fit its checksum")
    return about, tensors


def has_final(folder, step):
    """True if the final weights of a run folder are undamaged and of that step."""
    try:
        return exported(Path(folder, "final.safetensors"))[0]["step"] == step
    except safe_load.CorruptFile:
        return False
