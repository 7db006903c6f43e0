"""A network with the chosen weights, from a run folder or checkpoint."""

import os
from functools import partial
from typing import NamedTuple

import torch

from ddpm.config import defaults, files
from ddpm.data import source
from ddpm.experiment import build, cost
from ddpm.runtime import device as runtime_device
from ddpm.training import checkpoint, posthoc_ema
from ddpm.training import weights as training_weights


class Loaded(NamedTuple):
    """What a checkpoint describes, and its network, averaged, on the machine's device."""

    name: str  # for people
    step: int
    config: defaults.FrozenConfigDict
    machine: runtime_device.Machine
    net: torch.nn.Module


def load(run_or_file, device=None, **options):
    """Rebuild what a checkpoint describes; for None, that of the newest run in runs/.

    `options` that are not None replace those of the checkpoint's config, `{"sample.steps": 25}`.
    Raises ValueError for a missing, damaged or foreign file, and for impossible options.
    """
    if run_or_file is None:
        run_or_file = checkpoint.newest_run()
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the first rank of a machine tells
            print(f"no checkpoint given: taking the newest run, {run_or_file}", flush=True)
    path, step, text, weights = training_weights.load_weights(run_or_file)
    config = cost.resolve_evaluation(files.changed(files.from_json(text), options))
    if (name := weights_name(config)) != "EMA":
        step, weights = chosen_weights(path, step, config)
    if options.get("sample.guide_checkpoint") and config.sample.guidance == 1:
        raise ValueError(
            f"the guide {config.sample.guide_checkpoint} is not asked where guidance is 1; give "
            "such as --guidance=2 too"
        )
    net = network_with(config, weights, path)
    section = config.train
    machine = runtime_device.start(section.amp, section.deterministic, device)
    net = net.to(machine.device, memory_format=machine.memory_format(config.data.image_size))
    return Loaded(f"{path} ({name} weights, step {step})", step, config, machine, net)


def network_with(config, weights, path):
    """A config's network with the weights of a file; ValueError if they are of another network."""
    with torch.device("meta"):
        net = build.network(config)
    put_weights(net, weights, path, assign=True)
    return net


def check_same_network(config, other, path):
    """Raise ValueError if a file's config makes another network, or one that gets other times."""
    ours = build.spelled_out(config)
    theirs = build.spelled_out(other)
    if len(config.data.classes) != len(other.data.classes):
        were, are = (
            source.in_words(each.data.classes) if each.data.classes else "none"
            for each in (other, config)
        )
        raise ValueError(
            f"{path} was trained with other classes: they were {were}, are {are} in "
            f"{config.data.source}; begin from a run with as many, or train without train.init_from"
        )
    free = {"model.dropout", "model.conventions(initialization)", *build.unused(config)}
    keys = [key for key in ours if key.startswith("model.") or key == "diffusion.rescale_timesteps"]
    differing = [key for key in keys if key not in free and ours[key] != theirs[key]]
    if differing:
        unlike = "; ".join(f"{key} {theirs[key]!r}, not {ours[key]!r}" for key in differing)
        options = dict.fromkeys(map(files.option_of, differing))
        raise ValueError(
            f"{path} was trained with {unlike}; to begin from it add "
            f"{files.as_flags(other, options)}"
        )


def put_weights(net, weights, path, assign=False):
    """Load the weights that a file holds; raises ValueError where they are of another network."""
    try:
        net.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"the weights in {path} are of another network than the config's: {reason}"
        ) from None


def part_name(number):
    """The checkpoint's part that holds a further average: of a decay, or of a sigma_rel."""
    return f"ema {number}"


def weights_name(config):
    """The weights that are drawn and measured, in words."""
    chosen = config.sample.ema
    if chosen in (0, config.ema.decay):
        return "EMA"
    return f"EMA {'sigma_rel' if chosen <= posthoc_ema.WIDEST else 'decay'} {chosen}"


def chosen_weights(path, step, config):
    """(step, weights) of the average that config.sample.ema selects, up to the step of a file.

    Another decay is in the checkpoint of that step; a sigma_rel is made from the snapshots. Raises
    ValueError if there are none, or if they do not span it.
    """
    chosen = config.sample.ema
    section = config.ema
    folder = checkpoint.folder_of(path)
    if chosen in section.extra_decays:
        found = [other for at, other in checkpoint.checkpoints(folder) if at == step]
        if path.suffix == ".pt":
            found = [path]
        if found:
            return step, training_weights.ema_weights(
                found[-1], checkpoint.load(found[-1]), part_name(chosen)
            )
        raise ValueError(
            f"the average with decay {chosen} is kept in checkpoints, and {folder} has none of "
            f"step {step}; give one of its .pt files"
        )
    found = [item for item in checkpoint.snapshots(folder) if item[0] <= step]
    if chosen > posthoc_ema.WIDEST or not found:
        decays = ", ".join(map(str, (section.decay, *section.extra_decays)))
        others = ";"
        if found:
            others = f", and {len(found)} snapshots for any sigma_rel up to 0.288; choose one, or"
        raise ValueError(
            f"{folder} has no weights averaged with {weights_name(config)}. It has EMA decay "
            f"{decays}{others} train with config.ema.extra_decays for another decay, or with "
            "config.ema.sigma_rels and config.every.snapshot for a sigma_rel"
        )
    stored = [
        (at, width, partial(training_weights.load_snapshot, snapshot, part_name(width)))
        for at, snapshot in found
        for width in section.sigma_rels
    ]
    return found[-1][0], posthoc_ema.reconstruct(stored, chosen)
