"""Config -> a training, its parts put together; what drawing and measuring need too, `build` makes."""

import contextlib
import itertools
import math
import os
import time
from bisect import bisect_left
from functools import cache, partial
from pathlib import Path

import torch

from ddpm import build, checkpoint, clock, data, dist, memory, optim, posthoc, rng, score, spec
from ddpm import config as configs
from ddpm.dist import StepNetwork, of_kernels
from ddpm.ema import EMA
from ddpm.models.layers import recompute
from ddpm.step import Guard, Meters, Step, Validation
from ddpm.train import ROLLBACKS, Best, Due, Run

UNTRAINED = 0.05  # share of the first weights in an average that blurs or greys what is drawn


def averages(config, weights):
    """The averages of a training by the names of their parts; the first is the one that is drawn and measured."""
    section = config.ema
    made = {"ema": EMA(weights, section.decay, section.warmup, section.rampup)}
    made |= {build.part_name(decay): EMA(weights, decay, section.warmup, section.rampup) for decay in section.more}
    return made | {build.part_name(width): EMA(weights, posthoc.power_function(width)) for width in section.profiles}


def rate(config, dataset_size, rollbacks=0):
    """The learning rate as a function of the step, for a run that has been rolled back so often."""
    section = config.train

    def steps(text):
        return clock.steps_of(text, section.batch_size, dataset_size)

    name, arguments = spec.parse(section.learning_rate_decay)
    if "length" in arguments:
        arguments["length"] = steps(arguments["length"])
    decay = partial(optim.DECAYS[name], **arguments)
    base = section.learning_rate * section.rollback ** rollbacks
    return lambda step: optim.learning_rate(step, base, steps(section.warmup), decay)


def length_remarks(config, dataset_size):
    """What does not fit the length of a training that learns from so many images: lines, mostly none."""
    section = config.train

    def steps(text):
        return clock.steps_of(text, section.batch_size, dataset_size)

    total = steps(section.length)
    intervals = {key: clock.Every(text, section.batch_size, dataset_size)
                 for key, text in config.every.items() if text != "auto"}
    return [*warmup_remarks(section, steps(section.warmup), total, rate(config, dataset_size)),
            *decay_remarks(section, steps, total), *average_remarks(config.ema, total), *interval_remarks(intervals, total)]


def warmup_remarks(section, warmup, total, rate):
    """Of a warm-up that takes more than half of a training."""
    if 2 * warmup > total:
        ends = f", which ends at the rate {rate(total - 1):.2g} of {section.learning_rate:.2g}" if warmup > total else ""
        shorter = max(total // 20, 1)
        yield (f"train.warmup is {section.warmup!r}, {'longer than' if ends else 'more than half of'} the training of "
               f"{total:,} steps{ends}; set train.warmup='{shorter} step{'s' * (shorter > 1)}'")


def decay_remarks(section, steps, total):
    """Of a decay of the learning rate that ends long before a training, or long after it."""
    name, arguments = spec.parse(section.learning_rate_decay)
    length = steps(arguments["length"]) if "length" in arguments else total
    if 0.95 * total <= length <= 1.05 * total or name == "inverse_sqrt" and length < total:  # which falls on and on
        return
    late = "begins after the end" if name == "inverse_sqrt" else "goes on after the end"
    what = late if length > total else "is over before the end"
    yield (f"train.learning_rate_decay is {section.learning_rate_decay!r}, which {what} of the training of {total:,} steps; "
           f"give it the length {section.length!r}")


def average_remarks(section, total):
    """Of averages in which much is left of the weights that a training begins with."""
    for decay in (section.decay, *section.more):
        if not section.warmup and not section.rampup and decay ** total > UNTRAINED:
            yield (f"{decay ** total:.0%} of an average of decay {decay:g} without ema.warmup are untrained weights after "
                   f"{total:,} steps; set ema.warmup=True, or a decay up to {UNTRAINED ** (1 / total):.3g}")


def interval_remarks(intervals, total):
    """Of intervals, by their names in the section `every`, that do not end within a training."""
    late = [key for key, every in intervals.items() if (every.first() or 0) > total]
    if "milestone" in late:
        late.remove("milestone")
        yield f"every.milestone is longer than the training of {total:,} steps, which keeps no milestone"
    if late:
        names = ", ".join(f"every.{key}" for key in late)
        yield f"{names}: longer than the training of {total:,} steps, so only once, at its end"


def batches(config, images, indices, machine, seed, start, total):
    """This rank's share of each effective batch from step `start` to `total`: uint8 [b, c, h, w] and labels int64 [b]."""
    size, share = config.train.batch_size, machine.share(config.train.batch_size)
    order = (indices[data.batch_indices(seed, len(indices), step, size)[share]] for step in range(start, total))
    workers = min(config.data.num_workers, os.cpu_count() or 1)
    return machine.ahead(data.loader(images, order, workers, pin_memory=machine.device.type == "cuda"))


def step(config, network, averages, dataset_size, rollbacks=0):
    """The step that trains a StepNetwork and its averages, for a run that has been rolled back so often."""
    section, machine, model = config.train, network.machine, build.diffusion(config, network)
    model.objective.to(machine.device)
    return Step(
        net=network.net, diffusion=model, averages=averages, machine=machine,
        meters=Meters(config.diffusion.timesteps, machine), guard=Guard(section.spike, machine, rollbacks),
        scaler=network.scaler(), optimizer=spec.choose("optimizer", optim.OPTIMIZERS, section.optimizer)(
            [*network.parameters, *model.objective.parameters()], section.learning_rate),
        seed=rng.another(config.seed, rollbacks), learning_rate=rate(config, dataset_size, rollbacks),
        batch_size=section.batch_size, micro_batches=section.gradient_accumulation_steps,
        gradient_clip=section.gradient_clip or math.inf, flip=config.data.flip,
        augmentation=config.data.augment, label_dropout=section.label_dropout if config.data.classes else None)


def learning(config, net, machine, levels, note):
    """The StepNetwork of a network on the host that recomputes so many levels: on the machine, or shared out over its ranks."""
    section = config.train
    recompute(itertools.chain(*net.levels[:levels]))
    if not section.fully_shard or machine.world == 1:
        if section.fully_shard:
            note("train.fully_shard does nothing in one process: torchrun starts several")
        form = torch.channels_last if section.channels_last else torch.contiguous_format
        return StepNetwork(net.to(machine.device, memory_format=form), machine)
    from ddpm.sharded import ShardedNetwork  # not above: torch takes a second for what only such runs need

    note(f"weights, gradients, averages and the optimiser's state are shared out over {machine.world} ranks "
         "(train.fully_shard)")
    with torch.device("meta"):
        twin = build.network(config)
    recompute(itertools.chain(*twin.levels[:levels]))
    return ShardedNetwork(twin, net, machine)


def blank(config, count):
    """A batch of black images, of the first class where there are any."""
    labels = torch.full((count,), 0 if config.data.classes else -1)
    return torch.zeros(count, *build.image_shape(config), dtype=torch.uint8), labels


def compiled(config, made):
    """Let a step learn through torch.compile, tried on a blank batch; says how long that took, or why it is not done."""
    net, begun, said, fitted = made.diffusion.net, time.monotonic(), [], True
    net.compiled()
    net.say = said.append
    try:
        fitted, _ = made.machine.room.fits(partial(made.rehearse, blank(config, len(made.places))))
        made.machine.wait()
    except Exception as error:  # of the backward pass
        if of_kernels(error):
            raise
        net.give_up(error)
    if not fitted:
        return "the network is compiled at the first step that has room (train.compile)"
    return said[0] if said else f"the network was compiled in {time.monotonic() - begun:.0f} s (train.compile)"


def account(config, dtype, images, levels=0):
    """The memory of a step of a config on one card, by part: `images` at a time, `levels` of the network recomputed.

    Nothing is allocated or computed. Gradients are accumulated where the config does so.
    """
    parts = config.train.gradient_accumulation_steps
    config = configs.changed(config, {"train.batch_size": images, "train.gradient_accumulation_steps": 1})
    with torch.device("meta"):  # the weights' first values would take longer than the step
        net = build.network(config)
    ledger = memory.Ledger()
    with ledger:
        net.to_empty(device="cpu")
        weights = ledger.live
        recompute(itertools.chain(*net.levels[:levels]))
        averaged = list(averages(config, net).values())
    network = StepNetwork(net, dist.Machine(torch.device("cpu"), dtype))
    made = step(config, network, averaged, dataset_size=images)
    return memory.account(ledger, made, blank(config, images), weights, ledger.live - weights, accumulated=parts > 1)


def on_each(config, found, ranks):
    """The bytes on each of so many cards, where `found` is the account of the same micro-batch on one alone."""
    if ranks == 1:
        return found.total
    if not config.train.fully_shard:
        return found.total + found.weights  # a copy of the gradients to exchange
    with torch.device("meta"):
        net = build.network(config)
    stages = [memory.size_of_all(stage.parameters()) for stage in itertools.chain(*net.levels)]
    together = found.weights - sum(stages) + sum(sorted(stages)[-2:])  # what is in no stage, and the stage at work and the next
    return found.shared / ranks + found.total - found.shared + 2 * together  # as weights and as gradients


def recomputed(config, net, machine, note):
    """How many levels of a network keep no activations; `note(text)` is told why.

    `auto` is as few as fit into what is free on the card beside a training step, and none on a CPU.
    """
    wanted, free, count = config.train.activation_checkpointing, machine.free(), len(net.levels)
    images = build.at_a_time(config, machine)

    @cache  # an account takes seconds
    def needed(levels):
        return memory.with_margin(on_each(config, account(config, machine.dtype, images, levels), machine.world))

    if wanted == "auto":
        levels = 0 if free is None else min(bisect_left(range(count + 1), True, key=lambda n: needed(n) <= free), count)
    else:
        levels = count if wanted == "all" else 0
    if levels:
        sizes = f"{needed(0) / memory.GIB:.1f} GiB without, {needed(levels) / memory.GIB:.1f} so"
        sizes += "" if free is None else f", {free / memory.GIB:.1f} free"
        note(f"{levels} of {count} levels of the network are computed again in the backward pass, as "
             f"train.activation_checkpointing is {wanted}: {sizes}")
    else:
        why = "" if wanted == "none" else ", no card" if free is None else (
            f": {needed(0) / memory.GIB:.1f} GiB of {free / memory.GIB:.1f} that are free")
        note(f"all activations are kept (train.activation_checkpointing is {wanted}{why})")
    return levels


def savings(config, machine, levels=0):
    """What would take less memory than a step with one image at a time that recomputes `levels`: words, by what it saves."""
    alone, found = account(config, machine.dtype, 1, levels), []
    now = alone.total
    for knob, value in (("train.activation_checkpointing", "all"), ("train.amp", "bf16"),
                        ("model.model_channels", config.model.model_channels // 2),
                        ("data.image_size", config.data.image_size // 2)):
        dtype = torch.bfloat16 if knob == "train.amp" else machine.dtype
        with contextlib.suppress(ValueError):  # of a network that cannot be so
            other = configs.changed(config, {knob: value})
            build.check(other)
            saved = now - account(other, dtype, 1, 99 if value == "all" else levels).total
            found.append((saved, f"--config.{knob}={value} (saves {saved / 2**20:,.1f} MiB)"))
    with contextlib.suppress(ValueError):
        other = configs.changed(config, {"train.fully_shard": True})
        saved = on_each(config, alone, machine.world) - on_each(other, alone, machine.world)
        found.append((saved, f"--config.train.fully_shard=True (saves {saved / 2**20:,.1f} MiB on {machine.world} ranks)"))
    return [words for saved, words in sorted(found, reverse=True) if saved > 0.01 * now]


def training_scorer(config, every, images, machine, notes):
    """The scorer of a training: nothing where it is never asked, nor, with a note, where its extractor is not to be had.

    Raises ValueError for a file of weights that is named in the config and cannot be used.
    """
    if every.never:
        return score.Nothing()
    try:
        scorer = build.scorer(config, images, machine)
        notes += scorer.notes
        return scorer
    except ValueError as error:
        if config.evaluate.inception_weights:  # named, so a mistake and not a lack of network
            raise
        notes.append(f"going on without evaluation: {error}")
        return score.Nothing()


def run(config, folder, machine, rollbacks=0, say=lambda text: None):
    """Make the run of a config in a folder: new, or standing where its newest checkpoint left it.

    It was rolled back so often, or as often as the checkpoint knows. `say(text)` hears what is about to take long. Raises
    ValueError for what cannot be run, before anything is written.
    """
    section, folder = config.train, Path(folder)
    equal = machine.world * section.gradient_accumulation_steps
    if section.batch_size % equal:
        raise ValueError(f"config.train.batch_size {section.batch_size} cannot be cut into {machine.world} ranks x "
                         f"{section.gradient_accumulation_steps} micro-batches; choose a multiple of {equal}")
    if config.sample.ema:
        raise ValueError(f"config.sample.ema is {config.sample.ema}, and a training draws with config.ema.decay; leave it at "
                         "0, and give --ema to generate, sample or evaluate")
    content, damaged = checkpoint.newest(folder)  # files first: they may be refused
    given, source = configs.flatten(config), None
    if content is not None:  # which knows where it began, also when the command no longer says so
        config = configs.changed(config, {"train.resume_from": configs.from_json(content["config"]).train.resume_from})
    elif section.resume_from:
        source, content = checkpoint.chosen(section.resume_from)
        configs.check_resumes(config, configs.from_json(content["config"]), source)
    first = checkpoint.load_weights(section.init_from) if content is None and section.init_from else None
    say(f"reading the images of {config.data.source}")
    images = build.dataset(config)
    classes = build.class_names(config, images)
    config = build.with_classes(config, classes)
    same = build.same_data(config, images)
    if content is not None:  # before the network, whose shapes follow the classes
        checkpoint.restore(content["parts"], {"data": same})
    learned, held_out = build.split(config, images)
    total, asked = clock.steps_of(section.length, section.batch_size, len(learned)), build.operations(config)
    begun = {"spacing": configs.from_json(content["config"]).evaluate.spacing} if content else {}  # so its distances compare
    config, interval, operations, share, evaluation = build.evaluated(config, len(learned), asked, **begun)
    every = {name: clock.Every(text, section.batch_size, len(learned))
             for name, text in {**config.every, "evaluate": interval}.items()}
    if not config.ema.profiles:
        every["snapshot"] = clock.Every("0 steps", section.batch_size, len(learned))
    best = Best("val/loss_ema" if len(held_out) else "train/loss")
    if content is not None:
        rollbacks = max(rollbacks, content["parts"].get("guard", {}).get("rollbacks", 0))

    net = build.network(config)
    notes = [*machine.notes, *images.notes, *build.remarks(config, "sample"), *build.unused_remarks(config),
             *build.unconditioned(net), f"{spec.counted(len(learned), 'image')} to learn from, {len(held_out)} held out",
             f"a step learns from {section.batch_size} of them, {build.at_a_time(config, machine)} at a time" +
             (f" on each of {machine.world} ranks" if machine.world > 1 else ""), evaluation]
    notes += length_remarks(config, len(learned))
    if twins := data.across(images.alike, held_out):
        notes.append(f"{twins} held-out image{'s have' if twins > 1 else ' has'} a near-duplicate that is learned from: "
                     "val/loss and eval/copying flatter")
    if not every["validate"].never:
        notes.append(f"{best.file} keeps the averaged weights at the lowest {best.by}" + (
            "" if len(held_out) else f" of {config.every.validate}, as no image is held out; that falls on where images are "
            "copied, which only held-out images show: data.validation_fraction=0.1 in a new run"))
    levels = recomputed(config, net, machine, notes.append)  # by what is free before the network takes its place
    if first:
        path, _, text, weights = first
        build.check_same_network(config, configs.from_json(text), path)
        build.put_weights(net, weights, path)
    network = learning(config, net, machine, levels, notes.append)
    averaged = averages(config, network.weights)
    made = step(config, network, list(averaged.values()), len(learned), rollbacks)
    notes += build.loss_remarks(made.objective)
    shared = {"net": network.weights, **averaged, "optimizer": made.optimizer}
    parts = {**{name: network.part(one) for name, one in shared.items()}, "scaler": made.scaler, "meters": made.meters,
             "guard": made.guard, "best": best, "due": Due(), "data": same}
    if made.objective.state_dict():  # a weighting or times that learn
        parts["objective"] = made.objective
    if section.compile:
        say("compiling the network, which takes a minute or more (train.compile)")
        notes.append(compiled(config, made))
    else:
        notes.append("the network is not compiled (train.compile): " + (
            "that takes minutes on a CPU" if machine.free() is None else "what that saves on a card is yet to be measured"))
    notes.append("convolutions are in channels last (train.channels_last)" if section.channels_last else
                 "convolutions keep the usual memory format (train.channels_last): the other " + (
                     "is slower to learn in on a CPU" if machine.free() is None else "is yet to be measured on a card"))
    if machine.free() is not None and not machine.peak():
        notes.append("speed/mfu is not tracked, as ddpm.cards lacks this card")
    if not every["evaluate"].never and config.evaluate.extractor != "none":
        say(f"loading the feature extractor {build.extractor_name(config)}")
    scorer = training_scorer(config, every["evaluate"], images, machine, notes)
    if not scorer.made:
        operations = 0 if every["evaluate"].never else build.likelihood_operations(config, asked)
    if content is not None:
        checkpoint.restore(content["parts"], parts)
        if source:
            if content["step"] >= total and parts["due"].names is None:
                raise ValueError(f"{source} is of step {content['step']}, and config.train.length {section.length!r} ends at "
                                 f"step {total}; give a longer one")
            notes.append(f"continues {source} from step {content['step']} (train.resume_from)")
        if parts["due"].names is not None:
            notes.append(f"first what is still to do at step {content['step']}: {', '.join(sorted(parts['due'].names))}")
    return Run(
        folder=folder, config_json=configs.to_json(config), machine=machine, recomputed=levels,
        filled={key: value for key, value in configs.flatten(config).items() if value != given[key]},
        start=content["step"] if content else 0, total=total, step=made, meters=made.meters, every=every, due=parts["due"],
        best=best, parts=parts, notes=notes, rollback=section.rollback if rollbacks < ROLLBACKS else 0,
        stored={name: averaged[name] for name in map(build.part_name, config.ema.profiles)},
        batches=lambda start: batches(config, images, learned, machine, made.seed, start, total),
        speed=clock.Speed(section.batch_size, len(learned), asked.training, machine.peak(), machine.wait),
        validation=Validation(images, held_out, network.net, made.diffusion, machine, build.at_a_time(config, machine),
                              images.labels if classes else None),
        draw=build.drawer(config, network.net, machine), grid=(range(config.sample.num_images), build.grid_recipe(config)),
        score=scorer, share=share, evaluation=operations / asked.training,
        likelihood=build.likelihood(config, network.net, images, machine),
        damaged=damaged, tracker_state=content and tracker_state(content, source), source=source)


def tracker_state(content, source):
    """What the tracker left in a checkpoint; a folder that continues another's is a new run of W&B."""
    state = content["parts"].get("tracker", {})
    return {key: value for key, value in state.items() if key != "wandb_id"} if source else state


def track(config, made):
    """Let a run be followed by its tracker, after what its folder takes over from the one where it was begun."""
    home = made.source and checkpoint.run_of(made.source)
    if home and made.machine.main:
        checkpoint.take_over(home, made.folder, made.start)
    made.track(build.tracker(configs.changed(config, made.filled), made.folder, made.machine, made.logged, made.total,
                             made.tracker_state, home))
