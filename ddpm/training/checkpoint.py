"""Named parts on disk: everything to continue a run (`.pt`), and the weights alone to draw from
(`.safetensors`).

A part is anything with `state_dict` and `load_state_dict`; a file also carries the step and the
config as JSON, so it describes itself. Files are written atomically, and an older one is deleted
only afterwards.

Files may be corrupt or malicious. Checksums detect corruption: a `.pt` is a zip, which has one for
each record, and exported weights have one in their header. Nothing here unpickles code or trusts a
size: a `.pt` may name only what tensors consist of, and its tensors stay mapped to the file.
"""

import contextlib
import json
import math
import os
import re
import shutil
from pathlib import Path

import safetensors
import torch

from ddpm.common import safe_load
from ddpm.common.files import atomic_write, expand_user, make_folder
from ddpm.common.registry import quantity

FORMAT = 1
NAME = re.compile(r"step_(\d{8,})(\.keep)?\.pt")
SNAPSHOT = re.compile(r"step_(\d{8,})\.safetensors")


def checkpoints(folder):
    """The checkpoints of a run folder, oldest first, as [(step, path)]."""
    paths = Path(folder, "checkpoints").glob("step_*.pt")
    return sorted((int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name)))


def save(folder, step, config_json, states, keep=2, milestone=False, healthy_step=math.inf):
    """Write a run's checkpoint, part name -> state, then `prune` older ones; returns the path."""
    path = Path(folder, "checkpoints", f"step_{step:08d}{'.keep' if milestone else ''}.pt")
    content = {"format": FORMAT, "step": step, "config": config_json, "parts": states}
    for torn in path.parent.glob("*.part"):  # of a process that was killed while it saved
        torn.unlink()
    with atomic_write(path) as part, open(part, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # which hides that the disk is full
            cause = error.__context__
            raise (
                OSError(cause.errno, cause.strerror) if isinstance(cause, OSError) else error
            ) from None
    prune(folder, keep, healthy_step)
    return path


def prune(folder, keep=2, healthy_step=math.inf):
    """Delete all but milestones, the newest `keep`, and the newest one up to `healthy_step`."""
    spared = [path for step, path in checkpoints(folder) if step <= healthy_step][-1:]
    paths = [path for _, path in checkpoints(folder) if not path.name.endswith(".keep.pt")]
    for path in paths[:-keep]:
        if path not in spared:
            path.unlink()


def delete_after(folder, step):
    """Delete the checkpoints past a step, the newest first."""
    for at, path in reversed(checkpoints(folder)):
        if at > step:
            path.unlink()


def load(path, tensors=True):
    """Read a checkpoint onto the host: dict of `step`, `config` (JSON) and `parts` (name -> state).

    Without `tensors` their bytes are neither read nor checked. Raises CorruptFile for a damaged
    file, and ValueError for one that is no checkpoint of ddpm.
    """
    content = safe_load.read(path, tensors)
    parts = content.get("parts") if describes_itself(content) else None
    if not isinstance(parts, dict) or not all(isinstance(part, dict) for part in parts.values()):
        raise ValueError(f"{path} is not a checkpoint of this version of ddpm; use another file")
    return content


def describes_itself(content):
    """True if `content` is a dict with a known format, a step and a config."""
    types = {"format": int, "step": int, "config": str}
    return (
        isinstance(content, dict)
        and all(type(content.get(key)) is kind for key, kind in types.items())
        and content["format"] <= FORMAT
        and content["step"] >= 0
    )


def newest(folder, tensors=True):
    """(newest undamaged checkpoint's content or None, damaged newer ones); else ValueError."""
    damaged = []
    for _, path in reversed(checkpoints(folder)):
        try:
            return load(path, tensors), damaged
        except safe_load.CorruptFile as error:
            damaged.append(error)
        except FileNotFoundError:  # another rank has quarantined it
            pass
    if damaged:
        raise all_damaged(damaged)
    return None, []


def chosen(run_or_file):
    """(path, content) of a named checkpoint, or a run's newest; ValueError without any."""
    path = expand_user(run_or_file)
    if not path.exists():
        raise ValueError(
            f"train.resume_from: {os.path.abspath(path)} is not found; {continuable(path)}"
        )
    if path.is_dir() and (available := checkpoints(path)):
        content, _ = newest(path)
        return next(file for step, file in reversed(available) if step == content["step"]), content
    file = find(path)
    if file.suffix == ".safetensors":
        raise ValueError(
            f"{file} has weights only, and no optimizer to continue with; give a .pt file of "
            "checkpoints/, or start a new run from these weights with train.init_from"
        )
    return file, load(file)


def continuable(path):
    """A description of the checkpoints or runs near a path that does not exist."""
    run = folder_of(path)
    if names := [file.name for _, file in checkpoints(run)][::-1]:
        return f"{Path(run, 'checkpoints')} has {listed(names)}"
    for place in (run, run.parent):
        if runs := sorted(folder.name for folder in place.glob("*") if checkpoints(folder)):
            return f"runs in {place} that can be continued: {listed(runs)}"
    return "give a run folder, or a .pt file of its checkpoints/"


def listed(names, most=5):
    """The first names, joined by commas."""
    return ", ".join(names[:most]) + " ..." * (len(names) > most)


def run_of(file):
    """The run folder of a checkpoint; None for a file that lies elsewhere."""
    return file.parent.parent if file.parent.name == "checkpoints" else None


def take_over(home, folder, step):
    """Copy rows, snapshots and best weights up to a step from one run folder to another."""
    folder = make_folder(folder)
    copied = [path for at, path in snapshots(home) if at <= step] + [home / "metrics.jsonl"]
    for path in home.glob("best*.safetensors"):
        with contextlib.suppress(safe_load.CorruptFile):
            copied += [path] if header(path)["step"] <= step else []
    for path in copied:
        if path.is_file():
            with atomic_write(folder / path.relative_to(home)) as part:
                shutil.copyfile(path, part)


def all_damaged(damaged):
    """The ValueError for a run folder whose checkpoints are all damaged, a list of CorruptFile."""
    path = damaged[0].path
    return ValueError(
        f"all checkpoints in {path.parent} are damaged, such as {path.name} ({damaged[0].why}); "
        "restore one from a copy, or move them away to start again"
    )


def quarantine(damaged):
    """Rename a CorruptFile checkpoint so that nothing reads it; returns the new path."""
    place = Path(f"{damaged.path}.damaged")
    number = 1
    while place.exists():
        number += 1
        place = Path(f"{damaged.path}.damaged{number}")
    return damaged.path.replace(place)


def restore(states, parts):
    """Load a checkpoint's states into all parts; ValueError if one is missing or does not fit."""
    for name, part in parts.items():
        if name not in states:
            raise ValueError(
                f"the checkpoint has no part {name!r}, as it is from another version; continue "
                "with that, or start a new run from its weights by --config.train.init_from"
            )
        try:
            part.load_state_dict(states[name])
        except ValueError:
            raise
        except Exception as error:  # a state may be anything
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"the checkpoint's {name} does not fit this config: {reason}"
            ) from None


def reclaimable(folder):
    """A description of files of a run that are not needed to continue, with their sizes."""
    newest = [path for _, path in checkpoints(folder)[-1:]]
    kinds = {
        "milestone": "checkpoints/*.keep.pt",
        "damaged file": "checkpoints/*.damaged*",
        "snapshot": "snapshots/*",
    }
    lines = []
    for kind, pattern in kinds.items():
        sizes = [path.stat().st_size for path in Path(folder).glob(pattern) if path not in newest]
        if sizes:
            lines.append(f"{quantity(len(sizes), kind)}, {pattern} ({sum(sizes) / 2**20:,.1f} MiB)")
    return ", ".join(lines)


def snapshots(folder):
    """The snapshots of a run folder, oldest first, as [(step, path)]."""
    paths = Path(folder, "snapshots").glob("step_*.safetensors")
    return sorted(
        (int(match[1]), path) for path in paths if (match := SNAPSHOT.fullmatch(path.name))
    )


def folder_of(run_or_file):
    """The run folder that a run folder or a file in one means."""
    path = Path(run_or_file)
    return path if path.is_dir() else run_of(path) or path.parent


def newest_run(runs="runs"):
    """The folder in `runs`, or in a study there, with the newest weights; ValueError if none."""
    times = {}
    for folder in (*Path(runs).glob("*/"), *Path(runs).glob("*/*/")):
        if (folder / "final.safetensors").is_file():
            times[(folder / "final.safetensors").stat().st_mtime_ns] = folder
        if checkpoints(folder):
            times[(folder / "checkpoints").stat().st_mtime_ns] = folder
    if not times:
        raise ValueError(
            f"no checkpoint given, and {Path(runs).absolute()} holds no run with weights; write "
            "--checkpoint=RUN_OR_FILE"
        )
    return times[max(times)]


def find(run_or_file):
    """The newest file of weights that a run folder or file name means; ValueError without any."""
    return files_of(run_or_file)[0]


def files_of(run_or_file):
    """All files of weights of a run folder or file name, the newest first; ValueError if none."""
    path = expand_user(run_or_file)
    if path.is_file():
        return [path]
    if not path.is_dir():
        runs = sorted(
            str(folder)
            for folder in Path("runs").glob("*")
            if checkpoints(folder) or Path(folder, "final.safetensors").is_file()
        )
        there = f" (there is {listed(runs)})" if runs else ""
        raise ValueError(
            f"{os.path.abspath(path)} is neither a file nor a run folder; give runs/NAME{there}, "
            "or a .pt or .safetensors file"
        )
    final = path / "final.safetensors"
    numbered = checkpoints(path)
    if final.is_file():
        try:
            numbered.append((header(final)["step"], final))  # a prolonged run has newer checkpoints
        except safe_load.CorruptFile:
            numbered.append((math.inf, final))
    if not numbered:
        raise ValueError(
            f"{path} has no final.safetensors and no checkpoint yet; train longer, or give "
            "another run"
        )
    # final weights before a checkpoint of that step
    return [file for _, file in sorted(numbered, key=lambda item: item[0])][::-1]


def header(path):
    """The dict of step, config and more that `export` wrote; CorruptFile if damaged or foreign."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("ddpm", "")
        about = json.loads(text) if len(text) <= safe_load.LONGEST else {}
    except (OSError, safetensors.SafetensorError) as error:
        raise safe_load.CorruptFile(path, error) from None
    except (ValueError, RecursionError):
        about = {}
    if not describes_itself(about):
        raise safe_load.CorruptFile(path, "it has no header of ddpm's")
    return about
