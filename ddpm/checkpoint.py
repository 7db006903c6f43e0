"""Named parts on disk: everything to continue a run (`.pt`), and the weights alone to draw from (`.safetensors`).

A part is anything with `state_dict` and `load_state_dict`; a file also carries the step and the config as JSON, so it describes
itself. Files are written beside, fsynced and renamed, and an older one is deleted only after.

A file that is read may be damaged, or somebody's who means harm. Damage is seen by checksums: a `.pt` is a zip, which has one
for each record, and exported weights have one in their header. Nothing here unpickles code or believes a size: a `.pt` may name
what tensors are made of and nothing else, and its tensors stay mapped to the file, so they cannot be more than it is long.
"""

import contextlib
import itertools
import json
import math
import os
import pickletools
import re
import shutil
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialized

from ddpm.files import expanded, make_folder, written_beside

FORMAT = 1
LONGEST = 2**22  # characters of a config, which has some thousand: more would only fill the memory
NAME = re.compile(r"step_(\d{8,})(\.keep)?\.pt")
SNAPSHOT = re.compile(r"step_(\d{8,})\.safetensors")
HARMLESS = re.compile(r"collections OrderedDict|torch._utils _rebuild_(tensor|tensor_v2|parameter)|torch(.storage)? \w+Storage")
LEGACY = 5  # pickles in a file of torch before 1.6, one after the other


class Misfit(ValueError):
    """What is wrong in a file, in words."""


class Damaged(ValueError):
    """The bytes of a file are not those that were written: those of an older checkpoint may be."""

    def __init__(self, path, why):
        self.path, self.why = path, " ".join(str(why).split())[:200]
        super().__init__(f"{path} is damaged or not a checkpoint of ddpm ({self.why}); use another file")


def checkpoints(folder):
    """The checkpoints of a run folder, oldest first, as [(step, path)]."""
    paths = Path(folder, "checkpoints").glob("step_*.pt")
    return sorted((int(match[1]), path) for path in paths if (match := NAME.fullmatch(path.name)))


def save(folder, step, config_json, parts, keep=2, milestone=False, well=math.inf):
    """Write a run's checkpoint, then `prune` older ones; returns the path."""
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
    prune(folder, keep, well)
    return path


def prune(folder, keep=2, well=math.inf):
    """Delete old checkpoints: the newest `keep` stay, the milestones, and the newest up to `well`, a step to roll back to."""
    found = checkpoints(folder)
    spared = [old for at, old in found if at <= well][-1:]
    for _, old in [item for item in found if not NAME.fullmatch(item[1].name)[2]][:-keep]:
        if old not in spared:
            old.unlink()


def cut(folder, step):
    """Delete the checkpoints past a step, the newest first."""
    for _, path in reversed([item for item in checkpoints(folder) if item[0] > step]):
        path.unlink()


def load(path):
    """Read a checkpoint onto the host: dict of `step`, `config` (JSON text) and `parts` (name -> state).

    Raises Damaged for a file that is, ValueError, one line, for one that is not ours.
    """
    content = read(path)
    try:
        ours = describes_itself(content) and all(isinstance(state, dict) for state in content["parts"].values())
    except (KeyError, TypeError, AttributeError):
        ours = False
    if not ours:
        raise ValueError(f"{path} is not a checkpoint of this version of ddpm; use another file")
    return content


def describes_itself(content):
    """True for what has a step and a config in a format that is known; raises KeyError or TypeError for what is no dict."""
    step, text = content["step"], content["config"]
    return content["format"] <= FORMAT and type(step) is int and step >= 0 and type(text) is str


def read(path):
    """What torch.save wrote: dicts, lists, words, numbers and tensors, which are mapped to the file.

    Raises Damaged where it cannot be read or a checksum does not fit, and ValueError where it holds anything else, or tensors
    that claim to be more than they are.
    """
    with open(path, "rb") as file:
        try:
            zipped = file.read(4) == b"PK\3\4"  # as torch tells
            file.seek(0)
            named = set(names_in_zip(file) if zipped else itertools.chain(*(names_in(file) for _ in range(LEGACY))))
        except Misfit as misfit:
            raise Damaged(path, misfit) from None
        except Exception:  # there are as many as ways to be damaged, in words of Python's
            raise Damaged(path, "its list of records, at its end, is cut off or torn" if zipped else
                          "its end is missing, or it is no file of torch's") from None
    if unknown := sorted(name for name in named if not HARMLESS.fullmatch(name)):
        raise ValueError(f"{path} holds more than tensors, numbers and words: {unknown[0]!r}; use another file")
    try:
        with warnings.catch_warnings():  # of torch, about a file that is refused below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        raise Damaged(path, error) from None
    for tensor in tensors_in(content):
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path} has a tensor of {tuple(tensor.shape)} that it does not hold; use another file")
    return content


def names_in_zip(file):
    """What the pickle in a zip of torch's names, after all records were held against their checksums."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if any(one.compress_type for one in records) or sum(one.file_size for one in records) > os.fstat(file.fileno()).st_size:
            raise Misfit("its records claim to be longer than it is")
        if len({one.filename.lower() for one in records}) < len(records):
            raise Misfit("two of its records have one name")
        if torn := archive.testzip():
            raise Misfit(f"{torn} does not fit its checksum")
        pickled = [one for one in records if one.filename.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise Misfit("it is a zip, and not one of torch's")
        with archive.open(pickled[0]) as content:
            return names_in(content)


def names_in(file):
    """What a pickle names, such as "collections OrderedDict"; nothing is built of it."""
    named = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
    return [str(value or code.name) for code, value, _ in pickletools.genops(file) if code.name in named]


def tensors_in(content):
    """The tensors in nested dicts and lists."""
    waiting, seen = [content], set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:  # or a few bytes could be walked for ever
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, (dict, list, tuple)):
            waiting += one.values() if isinstance(one, dict) else one


def newest(folder):
    """(what `load` reads from the newest checkpoint of a run folder that is whole, [the Damaged of those after it]).

    (None, []) where there is none yet; raises ValueError where all are damaged.
    """
    damaged, found = [], checkpoints(folder)
    for _, path in reversed(found):
        try:
            return load(path), damaged
        except Damaged as error:
            damaged.append(error)
        except FileNotFoundError:  # another rank has set it aside
            pass
    if damaged:
        raise none_whole(damaged)
    return None, []


def chosen(run_or_file):
    """(path, what `load` reads) of a checkpoint that is named, or of the newest of a run folder that is undamaged.

    Raises ValueError where there is none, and for a file or folder that has weights only.
    """
    path = Path(run_or_file)
    if path.is_dir() and (found := checkpoints(path)):
        content, _ = newest(path)
        return next(file for step, file in reversed(found) if step == content["step"]), content
    file = find(path)
    if file.suffix == ".safetensors":
        raise ValueError(f"{file} has weights only, and no optimizer to continue with; give a .pt file of checkpoints/, or "
                         "start a new run from these weights with train.init_from")
    return file, load(file)


def run_of(file):
    """The run folder in which a checkpoint lies; None for one that lies alone."""
    return file.parent.parent if file.parent.name == "checkpoints" else None


def take_over(home, folder, step):
    """Copy what a run folder has kept up to a step into another: rows, snapshots, the best weights."""
    folder = make_folder(folder)
    kept = [path for at, path in snapshots(home) if at <= step] + [home / "metrics.jsonl"]
    for path in home.glob("best*.safetensors"):
        with contextlib.suppress(Damaged):
            kept += [path] if header(path)["step"] <= step else []
    for path in kept:
        if path.is_file():
            with written_beside(folder / path.relative_to(home)) as part:
                shutil.copyfile(path, part)


def none_whole(damaged):
    """The ValueError for a run folder whose files are all Damaged."""
    one = damaged[0]
    return ValueError(f"no checkpoint in {one.path.parent} is whole, {one.path.name} for one is damaged ({one.why}); bring one "
                      "back from a copy, or move them away to begin anew")


def set_aside(damaged):
    """Give a Damaged checkpoint another name, under which nothing looks for it; returns that."""
    numbers = itertools.chain([""], itertools.count(2))
    place = next(place for number in numbers if not (place := Path(f"{damaged.path}.damaged{number}")).exists())
    return damaged.path.replace(place)


def restore(states, parts):
    """Put the states that `load` returned into the parts, all of them.

    Raises ValueError where the file lacks a part or a part refuses its state.
    """
    for name, part in parts.items():
        if name not in states:
            raise ValueError(f"the checkpoint has no part {name!r}, as it is from another version; go on with that, "
                             "or begin a new run from its weights by --config.train.init_from")
        try:
            part.load_state_dict(states[name])
        except ValueError:
            raise
        except Exception as error:  # a state may be anything
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"the checkpoint's {name} does not fit this config: {reason}") from None


def export(path, weights, step, config_json, **more):
    """Write weights (name -> tensor), the config and what else `header` is to tell into one safetensors file."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    about = {"format": FORMAT, "step": step, "config": config_json} | more
    about["crc32"] = checksum(about, tensors)
    with written_beside(path) as part:  # about is one key, for several have no order
        part.write_bytes(serialized(tensors, metadata={"ddpm": json.dumps(about)}))  # its save_file hides it from other users


def checksum(about, tensors):
    """The CRC-32 of names, types, shapes and bytes of tensors, and of what else is told about them."""
    named = sorted(tensors.items())
    found = zlib.crc32(json.dumps([about, [(name, str(one.dtype), one.shape) for name, one in named]]).encode())
    for _, tensor in named:
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), found)
    return found


def spare(folder):
    """What of a run takes room and is not needed to go on, in words; nothing where that is so."""
    newest = [path for _, path in checkpoints(folder)[-1:]]
    kinds = {"milestones, checkpoints/*.keep.pt": "checkpoints/*.keep.pt", "damaged files": "checkpoints/*.damaged*",
             "snapshots/": "snapshots/*"}
    found = {words: [path.stat().st_size for path in Path(folder).glob(pattern) if path not in newest]
             for words, pattern in kinds.items()}
    return ", ".join(f"{len(sizes)} {words} ({sum(sizes) / 2**20:,.1f} MiB)" for words, sizes in found.items() if sizes)


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
    _, tensors = exported(path)
    return {name.removeprefix(f"{word}/"): value for name, value in tensors.items() if name.startswith(f"{word}/")}


def cut_snapshots(folder, step):
    """Delete the snapshots past a step, from which a run is about to go on, or to begin."""
    for _, path in [item for item in snapshots(folder) if item[0] > step]:
        path.unlink()


def folder_of(run_or_file):
    """The run folder that a run folder or a file in one means."""
    path = Path(run_or_file)
    return path if path.is_dir() else path.parent.parent if path.parent.name == "checkpoints" else path.parent


def newest_run(runs="runs"):
    """The run folder in `runs`, or in a study's folder there, whose weights are the newest; raises ValueError without any."""
    times = {}
    for folder in (path for depth in ("*", "*/*") for path in Path(runs).glob(depth) if path.is_dir()):
        final = folder / "final.safetensors"
        for weights in (*([final] if final.is_file() else ()), *([folder / "checkpoints"] if checkpoints(folder) else ())):
            times[weights.stat().st_mtime_ns] = folder
    if not times:
        raise ValueError(f"no checkpoint given, and {Path(runs).absolute()} holds no run with weights; write "
                         "--checkpoint=RUN_OR_FILE")
    return times[max(times)]


def find(run_or_file):
    """The file that a run folder or a file name means: final weights, if no checkpoint is newer, else the newest checkpoint.

    Raises ValueError where there is none.
    """
    return files_of(run_or_file)[0]


def files_of(run_or_file):
    """The files of weights that a run folder or a file name means, the newest first; raises ValueError where there is none."""
    path = expanded(run_or_file)
    if path.is_file():
        return [path]
    if not path.is_dir():
        runs = sorted(str(folder) for folder in Path("runs").glob("*") if folder.is_dir())
        there = f" (there is {', '.join(runs[:5])}{' ...' if len(runs) > 5 else ''})" if runs else ""
        raise ValueError(f"{os.path.abspath(path)} is neither a file nor a run folder; give runs/NAME{there}, or a .pt or "
                         ".safetensors file")
    final, found = path / "final.safetensors", checkpoints(path)
    if final.is_file():
        try:
            found.append((header(final)["step"], final))  # a prolonged run has newer checkpoints
        except Damaged:
            found.append((math.inf, final))
    if not found:
        raise ValueError(f"{path} has no final.safetensors and no checkpoint yet; train longer, or give another run")
    return [one for _, one in sorted(found, key=lambda item: item[0])][::-1]  # final weights before a checkpoint of that step


def load_weights(run_or_file):
    """The averaged weights of a run folder or file: (path, step, config JSON, name -> float32 tensor on the host).

    In a run folder these are of the newest file that is whole, and a line on stderr tells of those after it. Raises ValueError
    for a missing or damaged file.
    """
    damaged, files = [], files_of(run_or_file)
    for file in files:
        try:
            path, step, *found = weights_in(file)
        except Damaged as error:
            damaged.append(error)
            continue
        for one in damaged if os.environ.get("LOCAL_RANK", "0") == "0" else ():  # the first rank of a machine tells
            print(f"{one.path} is damaged ({one.why}); {path.name}, of step {step}, takes its place", file=sys.stderr)
        return path, step, *found
    raise damaged[0] if len(files) == 1 else none_whole(damaged)


def weights_in(path):
    """What `load_weights` returns, of a file; raises Damaged for one that is, ValueError for one that is not ours."""
    if path.suffix != ".safetensors":
        content = load(path)
        return path, content["step"], content["config"], shadow(path, content, "ema")
    about, tensors = exported(path)
    return path, about["step"], about["config"], tensors


def shadow(path, content, part):
    """The averaged weights, name -> tensor, in a part of what `load` read from a path; raises ValueError where it has none."""
    found = content["parts"].get(part, {}).get("shadow")
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path} has no averaged weights {part!r}; use another file")
    return found


def exported(path):
    """(header, name -> tensor on the host) of a file that `export` wrote; raises Damaged where its checksum does not fit.

    A file of before there were checksums has none.
    """
    about, tensors = header(path), load_file(path)
    if about.pop("crc32", None) not in (None, checksum(about, tensors)):
        raise Damaged(path, "it does not fit its checksum")
    return about, tensors


def has_final(folder, step):
    """True where the final weights of a run folder are whole, and of that step."""
    try:
        return exported(Path(folder, "final.safetensors"))[0]["step"] == step
    except Damaged:
        return False


def header(path):
    """The dict of `step`, `config` and more in a file that `export` wrote; raises Damaged for a damaged or foreign one."""
    try:
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("ddpm", "")
        about = json.loads(text) if len(text) <= LONGEST else {}
        ours = describes_itself(about)
    except (OSError, safetensors.SafetensorError) as error:
        raise Damaged(path, error) from None
    except (KeyError, ValueError, TypeError, RecursionError):
        ours = False
    if not ours:
        raise Damaged(path, "it has no header of ddpm's")
    return about
