"""The memory that a config's training step takes, and which savings make it fit."""

import contextlib
import itertools
from bisect import bisect_left
from functools import cache

import torch

from ddpm.config import files
from ddpm.experiment import build, drawing, step
from ddpm.models.layers import recompute
from ddpm.runtime import device, memory
from ddpm.training.network import TrainNetwork


def estimate(config, dtype, images, levels=0):
    """The memory.Account of a step on one GPU, `images` at a time, `levels` recomputed.

    Nothing is allocated or computed. Gradients are accumulated if the config does so.
    """
    accumulated = config.train.gradient_accumulation_steps > 1
    config = files.changed(
        config, {"train.batch_size": images, "train.gradient_accumulation_steps": 1}
    )
    with torch.device("meta"):  # the weights' first values would take longer than the step
        net = build.network(config)
    ledger = memory.Ledger()
    with ledger:
        net.to_empty(device="cpu")
        weights = ledger.live
        recompute(itertools.chain(*net.levels[:levels]))
        averaged = list(step.averages(config, net).values())
    network = TrainNetwork(net, device.Machine(torch.device("cpu"), dtype))
    train_step = step.step(
        config, build.diffusion(config, None), network, averaged, dataset_size=images
    )
    batch = step.blank(config, images)
    return memory.account(
        ledger, train_step, batch, weights, ledger.live - weights, accumulated=accumulated
    )


def bytes_per_gpu(config, account, ranks):
    """The bytes on each of `ranks` GPUs, from the account of the same micro-batch on one GPU."""
    if ranks == 1:
        return account.total
    if not config.train.fully_shard:
        # DDP's buckets; gradients are views of them, unless several micro-batches are summed first
        accumulated = config.train.gradient_accumulation_steps > 1
        return account.total + account.weights - (0 if accumulated else account.gradients)
    with torch.device("meta"):
        net = build.network(config)
    stages = [memory.size_of_all(stage.parameters()) for stage in itertools.chain(*net.levels)]
    # what is in no stage, and the stage at work and the next
    together = account.weights - sum(stages) + sum(sorted(stages)[-2:])
    # as weights and as gradients
    return account.shared / ranks + account.total - account.shared + 2 * together


def choose_recomputed_levels(config, net, machine, note):
    """The number of a network's levels that keep no activations; `note(text)` receives the reason.

    `auto` is the smallest that lets a step fit into the GPU's free memory, and 0 on a CPU.
    """
    wanted = config.train.activation_checkpointing
    free = machine.free()
    count = len(net.levels)
    images = drawing.at_a_time(config, machine)

    @cache  # an account takes seconds
    def needed(levels):
        return memory.with_margin(
            bytes_per_gpu(config, estimate(config, machine.dtype, images, levels), machine.world)
        )

    levels = count if wanted == "all" else 0
    if wanted == "auto" and free is not None:
        levels = min(bisect_left(range(count + 1), True, key=lambda n: needed(n) <= free), count)
    if levels:
        sizes = f"{needed(0) / memory.GIB:.1f} GiB without, {needed(levels) / memory.GIB:.1f} so"
        sizes += "" if free is None else f", {free / memory.GIB:.1f} free"
        note(
            f"{levels} of {count} levels of the network are computed again in the backward pass, "
            f"as train.activation_checkpointing is {wanted}: {sizes}"
        )
    else:
        why = "" if wanted == "none" else ", no GPU"
        if wanted != "none" and free is not None:
            why = f": {needed(0) / memory.GIB:.1f} GiB of {free / memory.GIB:.1f} that are free"
        note(f"all activations are kept (train.activation_checkpointing is {wanted}{why})")
    return levels


def suggest_savings(config, machine, levels=0):
    """Options that take less memory than one image at a time: words, the largest saving first."""
    alone = estimate(config, machine.dtype, 1, levels)
    options = []
    now = alone.total
    for option, value in (
        ("train.activation_checkpointing", "all"),
        ("train.amp", "bf16"),
        ("model.model_channels", config.model.model_channels // 2),
        ("data.image_size", config.data.image_size // 2),
    ):
        dtype = torch.bfloat16 if option == "train.amp" else machine.dtype
        with contextlib.suppress(ValueError):  # of a network that cannot be so
            other = files.changed(config, {option: value})
            build.check(other)
            saved = now - estimate(other, dtype, 1, 99 if value == "all" else levels).total
            options.append((saved, f"--config.{option}={value} (saves {saved / 2**20:,.1f} MiB)"))
    with contextlib.suppress(ValueError):
        other = files.changed(config, {"train.fully_shard": True})
        now_each, then = (bytes_per_gpu(each, alone, machine.world) for each in (config, other))
        size = f"{(now_each - then) / 2**20:,.1f} MiB on {machine.world} ranks"
        options.append((now_each - then, f"--config.train.fully_shard=True (saves {size})"))
    return [words for saved, words in sorted(options, reverse=True) if saved > 0.01 * now]
