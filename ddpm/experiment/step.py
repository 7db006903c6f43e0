"""The training step and its averages, built from a config."""

import itertools
import math
import time
from functools import partial

import torch

from ddpm.common import durations, registry, rng
from ddpm.experiment import build, load
from ddpm.models.layers import recompute
from ddpm.runtime.compile import of_kernels
from ddpm.training import optim, posthoc_ema
from ddpm.training.ema import EMA
from ddpm.training.meters import Meters
from ddpm.training.network import TrainNetwork
from ddpm.training.stability import StabilityMonitor
from ddpm.training.step import TrainStep


def averages(config, weights):
    """A training's averages by the names of their parts; the first is drawn and measured."""
    section = config.ema
    named = {"ema": EMA(weights, section.decay, section.warmup, section.rampup)}
    for decay in section.extra_decays:
        named[load.part_name(decay)] = EMA(weights, decay, section.warmup, section.rampup)
    for width in section.sigma_rels:
        named[load.part_name(width)] = EMA(weights, posthoc_ema.power_function(width))
    return named


def rate(config, dataset_size, rollbacks=0):
    """The learning rate as a function of the step, after `rollbacks` rollbacks."""
    section = config.train

    def steps(text):
        return durations.steps_of(text, section.batch_size, dataset_size)

    name, arguments = registry.parse(section.learning_rate_decay)
    if "length" in arguments:
        arguments["length"] = steps(arguments["length"])
    decay = partial(optim.DECAYS[name], **arguments)
    base = section.learning_rate * section.rollback**rollbacks
    return lambda step: optim.learning_rate(step, base, steps(section.warmup), decay)


def step(config, model, network, averages, dataset_size, rollbacks=0):
    """The step that trains a TrainNetwork and its averages, after `rollbacks` rollbacks."""
    section = config.train
    machine = network.machine
    model = model.around(network)
    model.objective.to(machine.device)
    return TrainStep(
        diffusion=model,
        averages=averages,
        machine=machine,
        meters=Meters(config.diffusion.timesteps, machine),
        stability=StabilityMonitor(section.spike_threshold, machine, rollbacks),
        scaler=network.scaler(),
        optimizer=registry.resolve("optimizer", optim.OPTIMIZERS, section.optimizer)(
            [*network.params, *model.objective.parameters()], section.learning_rate
        ),
        seed=rng.another(config.seed, rollbacks),
        learning_rate=rate(config, dataset_size, rollbacks),
        batch_size=section.batch_size,
        micro_batches=section.gradient_accumulation_steps,
        gradient_clip=section.gradient_clip or math.inf,
        flip=config.data.flip,
        augmentation=config.data.augment,
        label_dropout=section.label_dropout if config.data.classes else None,
    )


def wrap_network(config, net, machine, levels, note):
    """The TrainNetwork of a network on the host, moved to the machine or sharded over its ranks."""
    section = config.train
    compressed = section.gradient_compression == "bf16"
    recompute(itertools.chain(*net.levels[:levels]))
    if not section.fully_shard or machine.world == 1:
        if section.fully_shard:
            note("train.fully_shard does nothing in one process: torchrun starts several")
        form = torch.channels_last if section.channels_last else torch.contiguous_format
        return TrainNetwork(net.to(machine.device, memory_format=form), machine, compressed)
    # not above: torch takes a second for what only such runs need
    from ddpm.training.fsdp import ShardedNetwork

    note(
        "weights, gradients, averages and the optimiser's state are shared out over "
        f"{machine.world} ranks (train.fully_shard)"
    )
    with torch.device("meta"):
        twin = build.network(config)
    recompute(itertools.chain(*twin.levels[:levels]))
    return ShardedNetwork(twin, net, machine, compressed)


def blank(config, count):
    """A batch of black images, of the first class where there are any."""
    labels = torch.full((count,), 0 if config.data.classes else -1)
    return torch.zeros(count, *build.image_shape(config), dtype=torch.uint8), labels


def compile_network(config, train_step):
    """Let a step learn through torch.compile, tried on a blank batch; returns the outcome."""
    net = train_step.diffusion.net
    begun = time.monotonic()
    messages = []
    fitted = True
    net.use_compiler(config.train.compile)
    if not net.rehearses:
        return "each stage of the network is compiled at the first step (train.compile)"
    net.say = messages.append
    try:
        fitted, _ = train_step.machine.room.fits(
            partial(train_step.rehearse, blank(config, len(train_step.places)))
        )
        train_step.machine.wait()
    except Exception as error:  # of the backward pass
        if of_kernels(error):
            raise
        net.give_up(error)
    if not fitted:
        return "the network is compiled at the first step that has room (train.compile)"
    if messages:
        return messages[0]
    return f"the network was compiled in {time.monotonic() - begun:.0f} s (train.compile)"
