"""Named parts on disk: everything to continue a run (`.pt`), and the weights alone to draw from (`.safetensors`).

A part is anything with `state_dict` and `load_state_dict`; a file also carries the step and the config as JSON, so it describes
itself. Files are written beside, fsynced and renamed, and an older one is deleted only after; nothing here unpickles code.
"""

import json
import math
import pickle
import re
import warnings
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialized

from ddpm.files import written_beside

FORMAT = 1
NAME = re.compile(r"step_(\d{8,})(\.keep)?\.pt")
SNAPSHOT = re.compile(r"step_(\d{8,})\.safetensors")


def checkpoints(folder):
    """The checkpoints of a run folder, oldest first, as [(step, path)]."""
    paths = Path(folder, "checkpoints").glob("step_*.pt")
    return sorted((int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name)))


def save(folder, step, config_json, parts, keep=2, milestone=False, well=math.inf):
    """Write a run's checkpoint, then delete older ones; returns the path.

    The newest `keep` stay, the milestones, and the newest up to step `well`, to which a run can be rolled back.
    """
    path = Path(folder, "checkpoints", f"step_{step:08d}{'.keep' if milestone else ''}.pt")
    states = {name: part.state_dict() for name, part in parts.items()}
    content = {"format": FORMAT, "step": step, "config": config_json, "parts": states}
    for torn in path.parent.glob("*.part"):  # of a process that was killed while it saved
        torn.unlink()
    with written_beside(path) as part, open(part, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # which hides that the disk is full
            cause = error.__context__
            raise OSError(cause.errno, cause.strerror) if isinstance(cause, OSError) else error from None
    found = checkpoints(folder)
    spared = [old for at, old in found if at <= well][-1:]
    for _, old in [item for item in found if not NAME.fullmatch(item[1].name)[2]][:-keep]:
        if old not in spared:
            old.unlink()
    return path


def cut(folder, step):
    """Delete the checkpoints past a step, the newest first."""
    for _, path in reversed([item for item in checkpoints(folder) if item[0] > step]):
        path.unlink()


def load(path):
    """Read a checkpoint onto the host: dict of `step`, `config` (JSON text) and `parts` (name -> state).

    Raises ValueError, one line, for a file that is damaged or not one of ours.
    """
    try:
        with warnings.catch_warnings():  # of torch, about a file that is refused below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
        assert content["format"] <= FORMAT and {"step", "config", "parts"} <= content.keys()
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AssertionError, pickle.UnpicklingError):
        raise ValueError(f"{path} is damaged or not a checkpoint of ddpm; use another file") from None
    return content


def newest(folder):
    """What `load` reads from a run folder's newest checkpoint; None where there is none yet."""
    found = checkpoints(folder)
    try:
        return load(found[-1][1]) if found else None
    except ValueError as error:
        place = f"from step {found[-2][0]}" if len(found) > 1 else "from the start"
        raise ValueError(f"{error}, or delete it to go on {place}") from None


def restore(states, parts):
    """Put the states that `load` returned into the parts, all of them.

    Raises ValueError where the file lacks a part or a part refuses its state.
    """
    for name, part in parts.items():
        if name not in states:
            raise ValueError(f"the checkpoint has no part {name!r}, it has {', '.join(states)}; it is from another version")
        try:
            part.load_state_dict(states[name])
        except (RuntimeError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"the checkpoint's {name} does not fit this config: {reason}") from None


def export(path, weights, step, config_json):
    """Write weights (name -> tensor) and the config into one safetensors file: all that drawing needs."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    about = {"ddpm": json.dumps({"format": FORMAT, "step": step, "config": config_json})}  # one key: several have no order
    with written_beside(path) as part:
        part.write_bytes(serialized(tensors, metadata=about))  # its own save_file hides the file from other users


def snapshots(folder):
    """The snapshots of a run folder, oldest first, as [(step, path)]."""
    paths = Path(folder, "snapshots").glob("step_*.safetensors")
    return sorted((int(match[1]), path) for path in paths if (match := SNAPSHOT.fullmatch(path.name)))


def save_snapshot(folder, step, config_json, averages, buffers=()):
    """Write averages, word -> (name -> tensor), into one file, to be combined later; returns its path.

    In half precision, as Karras et al. 2024 do: rounding by 2^-11 of a weight is far below what averages differ by. `buffers`
    are names of tensors that stay as they are.
    """
    path = Path(folder, "snapshots", f"step_{step:08d}.safetensors")
    export(path, {f"{word}/{name}": value.half() if value.is_floating_point() and name not in buffers else value
                  for word, average in averages.items() for name, value in average.items()}, step, config_json)
    return path


def load_snapshot(path, word):
    """One of the averages in a snapshot, name -> tensor on the host; raises ValueError for a damaged file."""
    header(path)
    with safetensors.safe_open(path, "pt") as file:
        return {name.removeprefix(f"{word}/"): file.get_tensor(name) for name in file.keys() if name.startswith(f"{word}/")}


def cut_snapshots(folder, step):
    """Delete the snapshots past a step, from which a run is about to go on, or to begin."""
    for _, path in [item for item in snapshots(folder) if item[0] > step]:
        path.unlink()


def folder_of(run_or_file):
    """The run folder that a run folder or a file in one means."""
    path = Path(run_or_file)
    return path if path.is_dir() else path.parent.parent if path.parent.name == "checkpoints" else path.parent


def find(run_or_file):
    """The file that a run folder or a file name means: final weights, if no checkpoint is newer, else the newest checkpoint.

    Raises ValueError where there is none.
    """
    path = Path(run_or_file)
    if path.is_file():
        return path
    if not path.is_dir():
        runs = sorted(str(folder) for folder in Path("runs").glob("*") if folder.is_dir())
        there = f" (there is {', '.join(runs[:5])}{' ...' if len(runs) > 5 else ''})" if runs else ""
        raise ValueError(f"{path} is neither a file nor a run folder; give runs/NAME{there}, or a .pt or .safetensors file")
    final, found = path / "final.safetensors", checkpoints(path)
    if final.is_file() and (not found or header(final)["step"] >= found[-1][0]):  # a prolonged run has newer checkpoints
        return final
    if not found:
        raise ValueError(f"{path} has no final.safetensors and no checkpoint yet; train longer, or give another run")
    return found[-1][1]


def load_weights(run_or_file):
    """The averaged weights of a run folder or file: (path, step, config JSON, name -> float32 tensor on the host).

    Raises ValueError for a missing or damaged file.
    """
    path = find(run_or_file)
    if path.suffix != ".safetensors":
        content = load(path)
        return path, content["step"], content["config"], content["parts"]["ema"]["shadow"]
    about = header(path)
    return path, about["step"], about["config"], load_file(path)


def header(path):
    """The dict of `step` and `config` in a file that `export` wrote; raises ValueError for a damaged or foreign one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {})["ddpm"])
        assert type(about["step"]) is int and type(about["config"]) is str and about["format"] <= FORMAT
    except (OSError, safetensors.SafetensorError, KeyError, ValueError, TypeError, AssertionError):
        raise ValueError(f"{path} is damaged or not written by ddpm; use another file of the run") from None
    return about
