"""Files that mean harm, at every command that takes one: each is refused in one line, runs nothing
and takes no memory.
"""

import collections
import io
import json
import logging
import os
import pickle
import resource
import struct
import tarfile
import zipfile
from pathlib import Path

import torch
from crashes import alone
from faults import Found, as_command, forked, last_line, small, training
from safetensors.torch import save

from ddpm import convert, data
from ddpm.common import files as common_files
from ddpm.config import files as config_files
from ddpm.data import source
from ddpm.evaluate import evaluate
from ddpm.evaluation import extractors, reference
from ddpm.generate import generate_images
from ddpm.sample import sample_from_checkpoint

# bytes that a command may take beyond what it holds already; what the files claim is a thousand
# times as much
ROOM = 2**30
HUGE = 2**50


class Reduced:
    """What a pickle makes by calling a function."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Stored(pickle.Pickler):
    """A pickle as torch writes it, in which a word ("storage", numel) stands for a storage that
    claims so many floats.
    """

    def persistent_id(self, one):
        claims = isinstance(one, tuple) and one[:1] == ("storage",)
        return ("storage", torch.FloatStorage, "0", "cpu", one[1]) if claims else None


def tensor(shape, strides, claimed):
    """A tensor of a shape over a storage that claims `claimed` floats; the file has four."""
    return Reduced(
        torch._utils._rebuild_tensor_v2,
        ("storage", claimed),
        0,
        shape,
        strides,
        False,
        collections.OrderedDict(),
    )


def pickled(one, protocol=2):
    Stored(file := io.BytesIO(), protocol).dump(one)
    return file.getvalue()


def zipped(content, names=(), prefix="archive", method=zipfile.ZIP_STORED):
    """A zip as torch writes it around a pickle, with records of other names."""
    with zipfile.ZipFile(file := io.BytesIO(), "w", method) as archive:
        archive.writestr(f"{prefix}/data.pkl", content)
        archive.writestr(f"{prefix}/byteorder", "little")
        archive.writestr(f"{prefix}/data/0", bytes(16))
        archive.writestr(f"{prefix}/version", "3\n")
        for name in names:
            archive.writestr(name, b"harm")
    return file.getvalue()


def claiming(content, size):
    """A zip whose first record claims to be as long as that, in its directory."""
    changed = bytearray(content)
    place = content.index(b"PK\1\2")
    changed[place + 20 : place + 28] = struct.pack("<II", size, size)
    return bytes(changed)


def tar(names):
    with tarfile.open(fileobj=(file := io.BytesIO()), mode="w") as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    return file.getvalue()


def checkpoint_of(text, shadow=None):
    """The pickle of a checkpoint with a config, which any command would read."""
    weights = {"head.weight": tensor((4,), (1,), 4)} if shadow is None else shadow
    parts = {
        name: {} for name in ("net", "optimizer", "scaler", "meters", "best", "data", "tracker")
    }
    return pickled(
        {"format": 1, "step": 3, "config": text, "parts": parts | {"ema": {"shadow": weights}}}
    )


def exported_of(text, **more):
    """A safetensors file of ours with a config."""
    return save(
        {"head.weight": torch.zeros(4)},
        {"ddpm": json.dumps({"format": 1, "step": 3, "config": text} | more)},
    )


def safetensors_of(header, content=b""):
    header = json.dumps(header).encode() if isinstance(header, dict) else header
    return struct.pack("<Q", len(header)) + header + content


def with_option(key, value):
    options = json.loads(config_files.to_json(small()))
    section, _, leaf = key.partition(".")
    options[section][leaf] = value
    return json.dumps(options)


def configs(mark):
    """Configs as JSON that would run code, read files or fill the memory; `mark` is a path that
    code would make.
    """
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    return {
        "code as a source": with_option("data.source", code),
        "code as a schedule": with_option("diffusion.beta_schedule", code),
        "code in an argument": with_option("diffusion.predict", f"edm(sigma_data={code})"),
        "code as a network": with_option("model.name", f"dit(size={code})"),
        "code as a sampler": with_option("sample.sampler", code),
        "10^9 channels": with_option("model.model_channels", 10**9),
        "10^12 timesteps": with_option("diffusion.timesteps", 10**12),
        "10^400 timesteps": with_option("diffusion.timesteps", 10**400),
        "a rate of 10^400": with_option("train.learning_rate", 10**400),
        "10^9 blocks": with_option("model.name", "dit(depth=1000000000)"),
        "a width of 10^12": with_option("model.name", "dit(width=1000000000000)"),
        "10^9 blocks a level": with_option("model.num_res_blocks", 10**9),
        "10^6 levels": with_option("model.channel_mult", [1] * 10**6),
        "10^9 pixels": with_option("data.image_size", 10**9),
        "10^9 heads": with_option("model.num_heads", 10**9),
        "sections of 10^12": with_option("sample.spacing", "sections(counts=(1000000000000,))"),
        "nested 10^6 deep": "[" * 10**6,
        "objects nested 10^5 deep": '{"a":' * 10**5,
        "8 MB": '{"seed": ' + " " * 2**23 + "0}",
        "another type": with_option("model", 3),
        "an unknown option": with_option("model.hook", code),
        "a number of 10^6 digits": '{"seed": ' + "9" * 10**6 + "}",
    }


def checkpoints(mark, folder):
    """Files named .pt: name -> bytes. What would run code would make the file `mark`, what would
    escape, one in `folder`.
    """
    touch = Reduced(os.system, f"touch {mark}")
    whole = pickled({"a": tensor((4,), (1,), 4)})
    return {
        "code": zipped(pickled(touch)),
        "code in a tensor's place": zipped(checkpoint_of("{}", {"head.weight": touch})),
        "code deep inside": zipped(pickled([{"a": [{"b": (1, [touch])}]}] * 3)),
        "code in a bare pickle": pickled(touch),
        "code by exec": zipped(pickled(Reduced(exec, f"open({str(mark)!r}, 'w')"))),
        "code by eval": zipped(pickled(Reduced(eval, f"open({str(mark)!r}, 'w')"))),
        "code in protocol 4": zipped(pickled(touch, 4)),
        "code before a zip": pickled(touch) + zipped(whole),
        "torch.load again": zipped(pickled(Reduced(torch.load, str(mark), None, None))),
        "a TorchScript": zipped(whole, ["archive/constants.pkl", "archive/code/__torch__.py"]),
        "names that climb": zipped(
            whole, ["../../../harm", f"{folder}/harm", "archive/../../harm"]
        ),
        "a folder that climbs": zipped(whole, prefix="../../harm"),
        "a name twice": zipped(whole, ["archive/DATA.pkl"]),
        "a tar": tar(["../harm", "storages", "tensors", "pickle"]),
        "a record of 4 GB": claiming(zipped(whole), 2**32 - 2),
        "packed": zipped(bytes(2**26), method=zipfile.ZIP_DEFLATED),
        "2^50 floats in no storage": zipped(
            checkpoint_of("{}", {"head.weight": tensor((HUGE,), (1,), HUGE)})
        ),
        "2^20 floats where four are": zipped(
            checkpoint_of("{}", {"head.weight": tensor((2**20,), (1,), 2**20)})
        ),
        "2^50 floats that are one": zipped(
            checkpoint_of("{}", {"head.weight": tensor((HUGE,), (0,), 4)})
        ),
        "2^62 strides": zipped(checkpoint_of("{}", {"head.weight": tensor((4,), (2**62,), 4)})),
        "a negative storage": zipped(checkpoint_of("{}", {"head.weight": tensor((4,), (1,), -4)})),
        "2^50 bytes": zipped(pickled(Reduced(bytearray, HUGE))),
        "a tensor made of a number": zipped(pickled(Reduced(torch.FloatTensor, HUGE))),
        "a tensor of no data": zipped(
            pickled(
                Reduced(
                    torch._utils._rebuild_meta_tensor_no_storage,
                    torch.float32,
                    (HUGE,),
                    (1,),
                    False,
                )
            )
        ),
        "a sparse tensor": zipped(
            pickled(
                Reduced(
                    torch._utils._rebuild_sparse_tensor,
                    torch.sparse_coo,
                    (tensor((1, 1), (1, 1), 4), tensor((1,), (1,), 4), (HUGE,), True),
                )
            )
        ),
        "nothing": b"",
        "text": b"not a checkpoint",
        "a list": zipped(pickled([1, 2])),
        "no parts": zipped(pickled({"format": 1})),
        "parts that are words": zipped(
            pickled({"format": 1, "step": 3, "config": "{}", "parts": {"ema": "shadow"}})
        ),
        "a step that is a word": zipped(
            pickled({"format": 1, "step": "3", "config": "{}", "parts": {}})
        ),
        **{f"config: {name}": zipped(checkpoint_of(text)) for name, text in configs(mark).items()},
    }


def exports(mark):
    """Files named .safetensors: name -> bytes."""
    one = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    return {
        "a header of 2^60": struct.pack("<Q", 2**60) + b"{}",
        "a header of 2^31": struct.pack("<Q", 2**31) + b"{}",
        "2^50 floats": safetensors_of(
            {"a": one | {"shape": [HUGE], "data_offsets": [0, 4 * HUGE]}}, bytes(16)
        ),
        "2^50 floats in four": safetensors_of({"a": one | {"shape": [HUGE]}}, bytes(16)),
        "2^64 floats in none": safetensors_of(
            {"a": one | {"shape": [2**32, 2**32], "data_offsets": [0, 0]}}
        ),
        "two in one place": safetensors_of({"a": one, "b": one}, bytes(16)),
        "before its beginning": safetensors_of({"a": one | {"data_offsets": [-16, 0]}}, bytes(16)),
        "a header nested 10^6 deep": safetensors_of(b'{"a":' * 10**6),
        "a zip": zipped(b""),
        "nothing": b"",
        "no header of ours": save({"a": torch.zeros(4)}),
        "our header nested": save({}, {"ddpm": "[" * 10**6}),
        "our header of 8 MB": exported_of("{}", more=" " * 2**23),
        "another checksum": exported_of(config_files.to_json(small()), crc32=1),
        "a step that is a list": save(
            {}, {"ddpm": json.dumps({"format": 1, "step": [], "config": "{}"})}
        ),
        **{f"config: {name}": exported_of(text) for name, text in configs(mark).items()},
    }


def folders(mark):
    """Folders as diffusers writes them: name -> {path: bytes}."""
    unet = {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D"] * 2,
        "up_block_types": ["UpBlock2D"] * 2,
    }
    noise = {"_class_name": "DDPMScheduler"}
    nested = b"[" * 10**6
    four = save({"conv_in.bias": torch.zeros(4)})
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "scheduler": ["diffusers", "DDPMScheduler"],
    }
    touch = zipped(pickled({"conv_in.bias": Reduced(os.system, f"touch {mark}")}))

    def folder(index=index, unet=unet, noise=noise, **weights):
        parts = {"model_index": index, "unet/config": unet, "scheduler/scheduler_config": noise}
        stored = "unet/diffusion_pytorch_model"
        return {
            f"{name}.json": part if isinstance(part, bytes) else json.dumps(part).encode()
            for name, part in parts.items()
        } | {
            f"{stored}.{suffix}": content
            for suffix, content in (weights or {"safetensors": four}).items()
        }

    return {
        "10^11 steps": folder(noise=noise | {"num_train_timesteps": 10**11}),
        "10^400 steps": folder(noise=noise | {"num_train_timesteps": 10**400}),
        "steps of NaN": folder(noise=noise | {"num_train_timesteps": float("nan")}),
        "betas that are words": folder(noise=noise | {"trained_betas": ["a"] * 1000}),
        "10^5 betas": folder(noise=noise | {"trained_betas": [0.1] * 10**5}),
        "a beta of 10^400": folder(noise=noise | {"beta_end": 10**400}),
        "betas under the root": folder(
            noise=noise | {"beta_schedule": "scaled_linear", "beta_start": -1}
        ),
        "betas of 10^308": folder(noise=noise | {"beta_start": -1e308, "beta_end": 1e308}),
        "a schedule that is code": folder(
            noise=noise | {"_ddpm_schedule": f"__import__('os').system('touch {mark}')"}
        ),
        "a schedule that is a list": folder(
            noise=noise | {"_ddpm_schedule": [[]], "trained_betas": [0.1] * 1000}
        ),
        "10^11 classes": folder(unet=unet | {"num_class_embeds": 10**11}),
        "classes that are a number": folder(
            unet=unet | {"num_class_embeds": 3, "_ddpm_classes": 7}
        ),
        "10^12 pixels": folder(unet=unet | {"sample_size": 10**12}),
        "10^9 blocks": folder(unet=unet | {"layers_per_block": 10**9}),
        "a norm of 10^400": folder(unet=unet | {"norm_eps": 10**400}),
        "10^12 channels": folder(unet=unet | {"block_out_channels": [10**12, 10**12]}),
        "10^5 levels": folder(
            unet=unet
            | {
                "block_out_channels": [32] * 10**5,
                "down_block_types": ["DownBlock2D"] * 10**5,
                "up_block_types": ["UpBlock2D"] * 10**5,
            }
        ),
        "no channels": folder(unet=unet | {"block_out_channels": [0, 0]}),
        "fields that are a list": folder(unet=[1]),
        "an index nested": folder(index=nested),
        "a network nested": folder(unet=nested),
        "noise nested": folder(noise=nested),
        "an index that climbs": folder(
            index=index | {"unet": ["../..", "UNet2DModel"], "../../harm": ["a", "b"]}
        ),
        "other weights": folder(),
        "weights that are code": folder(bin=touch),
        "weights that are text": folder(bin=b"text"),
        "weights of 2^50 floats": folder(safetensors=exports(mark)["2^50 floats"]),
        "weights of 2^50 floats, pickled": folder(
            bin=zipped(pickled({"a": tensor((HUGE,), (1,), HUGE)}))
        ),
    }


def resumed(path, folder):
    """The checkpoint of a run that stands in its folder already, and the only one."""
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "checkpoints" / "step_00000003.pt").write_bytes(path.read_bytes())
    return training(small(), run)()


def commands(folder, trained):
    """Every command that takes a file: name -> (f(path), the suffixes that it takes)."""
    out = folder / "out"
    both = (".pt", ".safetensors")
    return {
        "main, going on": (lambda path: resumed(path, folder), (".pt",)),
        "main, init_from": (
            lambda path: training(small(train__init_from=str(path)), folder / "new")(),
            both,
        ),
        "generate": (lambda path: generate_images(path, 1, out), both),
        "generate, guide": (
            lambda path: generate_images(
                trained, 1, out, **{"sample.guide_checkpoint": str(path), "sample.guidance": 2.0}
            ),
            both,
        ),
        "sample": (lambda path: sample_from_checkpoint(path, out / "grid.png", 1), both),
        "evaluate": (lambda path: evaluate(path), both),
        # all that it does with them
        "evaluate, Inception": (
            lambda path: extractors.inception("cpu", weights=str(path)),
            (".pt",),
        ),
        "convert": (lambda path: convert.convert(path, out / "converted"), (*both, ".diffusers")),
    }


def refused(folder, times, seed):
    """A third of the files at all commands, in a child that may take a GiB more than it has;
    another third in the next turn.
    """
    done = 0
    lost = []
    trained = alone().folder
    mark = folder / "harm"
    files = folder / "deep" / "er" / "files"
    files.mkdir(parents=True)
    paths = []
    for suffix, contents in ((".pt", checkpoints(mark, folder)), (".safetensors", exports(mark))):
        for number, (name, content) in enumerate(contents.items()):
            paths.append((f"{name} ({suffix})", files / f"{number}{suffix}"))
            paths[-1][1].write_bytes(content)
    for number, (name, contents) in enumerate(folders(mark).items()):
        paths.append((f"{name} (a diffusers folder)", files / f"{number}.diffusers"))
        for place, content in contents.items():
            (paths[-1][1] / place).parent.mkdir(parents=True, exist_ok=True)
            (paths[-1][1] / place).write_bytes(content)
    for turn in range(times):
        for command, (enter, suffixes) in commands(folder, trained).items():
            given = [
                (name, path)
                for name, path in paths[turn % 3 :: 3]
                if path.suffix in suffixes
                # which has a config of its own
                and not (name.startswith("config: ") and command.startswith("main"))
            ]
            log = folder / "said"

            def all_of_them():
                held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (held + ROOM, held + ROOM))
                for name, path in given:  # noqa: B023
                    print(f"@ {name}", flush=True)
                    print(f"= {as_command(lambda: enter(path))()}", flush=True)  # noqa: B023

            log.unlink(missing_ok=True)
            code = forked(all_of_them, log)
            if code:
                lost.append(f"{command}: exit code {code}, {last_line(log)}")
            answers = log.read_text().split("@ ")[1:]
            for (name, _), answer in zip(given, answers, strict=False):
                said = answer.strip().splitlines()[1:]
                done += 1
                if said[-1:] != ["= 2"] or len(said) != 2 or not said[0].startswith("error: "):
                    lost.append(f"{command} of {name}: {' / '.join(said)[-300:]}")
    if found := [
        *folder.rglob("harm*"),
        *(path for path in (folder / "out").rglob("*") if path.is_file()),
    ]:
        lost.append(f"made {found}")
    return Found(
        done,
        lost,
        f"{len(paths)} files at {len(commands(folder, trained))} commands, with at most 1 GiB of "
        "memory more",
    )


def caches(folder, times, seed):
    """What is kept in `$DDPM_CACHE` between runs, in place of what was kept there: it is made
    anew.
    """
    lost = []
    done = 0
    digits = data.open_source("digits", 16, 1)
    logging.getLogger("ddpm.evaluation").setLevel(logging.ERROR)  # which tells of each
    extractor = extractors.EXTRACTORS["digits"]("cpu")
    part = source.subset(digits, range(64))
    right = reference.reference(extractor, part, folder / "right").features
    (place,) = (folder / "right").glob("*.safetensors")
    flips = [
        place.read_bytes()[:n] + bytes([place.read_bytes()[n] ^ 4]) + place.read_bytes()[n + 1 :]
        for n in (300, 2000, -9)
    ]
    files = exports(folder / "harm") | checkpoints(folder / "harm", folder)
    for number, content in enumerate([*files.values(), *flips]):
        home = folder / f"home {number}"
        home.mkdir()
        (home / place.name).write_bytes(content)
        found = reference.reference(extractor, part, home).features
        done += 1
        if not torch.equal(found, right) or (home / place.name).read_bytes() != place.read_bytes():
            lost.append(f"features of file {number}")
    os.environ["DDPM_CACHE"], before = str(folder), os.environ.get("DDPM_CACHE", "")
    try:
        for name, text in configs(folder / "harm").items():
            (folder / "told.json").write_text(text)
            with common_files.cached_json("told") as told:
                done += 1
                if not isinstance(told, dict):
                    lost.append(f"what is remembered, {name}")
    finally:
        os.environ["DDPM_CACHE"] = before
    return Found(done, lost + [str(path) for path in folder.rglob("harm")])
