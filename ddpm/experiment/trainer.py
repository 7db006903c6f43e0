"""Config -> Trainer: everything that a training needs, built by one call in named steps."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from ddpm.common import durations, registry
from ddpm.config import defaults, files
from ddpm.data import duplicates, loader
from ddpm.data import order as data_order
from ddpm.evaluation import scorer as evaluation_scorer
from ddpm.experiment import autotune, build, cost, drawing, load, memory, remarks
from ddpm.experiment import step as experiment_step
from ddpm.tracking.tracker import Tracker
from ddpm.training import checkpoint, meters
from ddpm.training import weights as training_weights
from ddpm.training.trainer import ROLLBACKS, Best, Evaluation, PendingEvents, Trainer
from ddpm.training.validation import Validation


def build_trainer(config, folder, machine, *, rollbacks=0, tracker=None, say=lambda text: None):
    """Build the Trainer of a config in a folder, at its newest checkpoint if there is one.

    `rollbacks` is how often the training was rolled back, if the checkpoint does not know of more.
    The folder's tracker is opened last, unless a `tracker` is given or the training is finished:
    then nothing is written. `say(text)` announces what takes long. Raises ValueError for what
    cannot be run, on all ranks and before anything is written.
    """
    with machine.raise_on_all_ranks():
        model = build.check(config)
        check_batches(config, machine)
        start = find_start(config, Path(folder))
        initial = None
        if start.content is None and config.train.init_from:
            initial = training_weights.load_weights(config.train.init_from)
        say(f"reading the images of {config.data.source} ...")
        config, images = open_images(start.config, start.content)
        count = len(images.learned)
        total = durations.steps_of(config.train.length, config.train.batch_size, count)
        flops = cost.count_flops(config)
        # what a continued run evaluated with stays, so that its distances compare
        before = files.from_json(start.content["config"]) if start.content else None
        plan = cost.plan_evaluation(config, count, flops, before, model)
    steps = total - start.step
    config, measured = autotune.resolve(plan.config, before, machine, steps, say)
    with machine.raise_on_all_ranks():
        every = intervals(config, count, plan.interval)
        best = Best("val/loss_ema" if len(images.held_out) else "train/loss")
        net = build.network(config)
        notes = first_notes(config, images, machine, net, plan, every, best) + measured
        rollbacks = max(rollbacks, start.rollbacks)
        step, averages, recomputed = build_step(
            config, model, net, machine, images, initial, rollbacks, notes
        )
        parts = checkpoint_parts(averages, step, best, images.identity)
        notes += prepare_step(config, step, say)
        never = every["evaluate"].never
        evaluation = build_evaluation(config, images, step, plan, flops, never, say, notes)
        notes += restore(start, parts, total, config.train.length)
    tracker = tracker or open_tracker(config, folder, machine, start, parts, total)
    for note in notes:
        tracker.say(note)
    return Trainer(
        folder=Path(folder),
        config_json=files.to_json(config),
        machine=machine,
        tracker=tracker,
        start=start.step,
        total=total,
        batches=lambda first: batches(config, images, machine, step.seed, first, total),
        step=step,
        speed=meters.Speed(
            config.train.batch_size,
            count,
            flops.training,
            machine.peak(),
            machine.wait,
            lambda: step.numbers.waited,
        ),
        every=every,
        evaluation=evaluation,
        parts=parts,
        snapshots={name: averages[name] for name in map(load.part_name, config.ema.sigma_rels)},
        rollback=config.train.rollback if rollbacks < ROLLBACKS else 0,
        recomputed=recomputed,
        source=start.source,
    )


class Start(NamedTuple):
    """Where a training starts: a checkpoint's content, or None; `source` is another run's."""

    config: defaults.FrozenConfigDict
    content: dict | None
    source: Path | None
    damaged: list

    @property
    def step(self):
        return self.content["step"] if self.content else 0

    @property
    def rollbacks(self):
        parts = self.content["parts"] if self.content else {}
        return parts.get("guard", {}).get("rollbacks", 0)


class Images(NamedTuple):
    """A training's images: indices learned from and held out, classes, identifying part."""

    source: Any
    learned: Any
    held_out: Any
    has_classes: bool
    identity: Any


def check_batches(config, machine):
    """Raise ValueError for a batch that does not divide, and for an average to draw with."""
    parts = config.train.gradient_accumulation_steps
    if config.train.batch_size % (machine.world * parts):
        raise ValueError(
            f"config.train.batch_size {config.train.batch_size} cannot be cut into "
            f"{machine.world} ranks x {parts} micro-batches; choose a multiple of "
            f"{machine.world * parts}"
        )
    if config.sample.ema:
        raise ValueError(
            f"config.sample.ema is {config.sample.ema}, and a training draws with "
            "config.ema.decay; leave it at 0, and give --ema to generate, sample or evaluate"
        )


def find_start(config, folder):
    """The Start of a training: the folder's newest checkpoint, else that of train.resume_from."""
    content, damaged = checkpoint.newest(folder)
    source = None
    if content is not None:  # it knows where it began, also if the command no longer says so
        origin = files.from_json(content["config"]).train.resume_from
        config = files.changed(config, {"train.resume_from": origin})
    elif config.train.resume_from:
        source, content = checkpoint.chosen(config.train.resume_from)
        files.check_resumes(config, files.from_json(content["config"]), source)
    return Start(config, content, source, damaged)


def open_images(config, content):
    """The config with its classes, and Images; ValueError if a checkpoint learned from others."""
    source = build.dataset(config)
    classes = build.class_names(config, source)
    config = build.with_classes(config, classes)
    identity = build.same_data(config, source)
    if content is not None:  # before the network, whose shapes follow the classes
        checkpoint.restore(content["parts"], {"data": identity})
    return config, Images(source, *build.split(config, source), bool(classes), identity)


def intervals(config, count, evaluate):
    """Event -> Every, for a training that learns from `count` images."""
    texts = dict(config.every) | {"evaluate": evaluate}
    if not config.ema.sigma_rels:
        texts["snapshot"] = "0 steps"
    return {
        name: durations.Every(text, config.train.batch_size, count) for name, text in texts.items()
    }


def first_notes(config, images, machine, net, plan, every, best):
    """What a person should know of machine, images, network, evaluation and length: lines."""
    ranks = f" on each of {machine.world} ranks" if machine.world > 1 else ""
    return [
        *machine.notes,
        *images.source.notes,
        *remarks.sampling_remarks(config, "sample"),
        *remarks.unused_remarks(config),
        *remarks.conditioning_remarks(net),
        f"{registry.quantity(len(images.learned), 'image')} to learn from, "
        f"{len(images.held_out)} held out",
        f"a step learns from a batch of {config.train.batch_size}, "
        f"{drawing.at_a_time(config, machine)} at a time{ranks}",
        plan.words,
        *remarks.length_remarks(config, len(images.learned)),
        *split_notes(config, images, every, best),
    ]


def split_notes(config, images, every, best):
    """What the held-out images can tell, and by what the best weights are chosen: lines."""
    if twins := duplicates.split_leakage(images.source.near_duplicates, images.held_out):
        yield (
            f"{registry.quantity(twins, 'held-out image has', 'held-out images have')} a "
            "near-duplicate that is learned from: val/loss and eval/copying flatter"
        )
    if every["validate"].never:
        return
    line = f"{best.file} keeps the averaged weights at the lowest {best.by}"
    if not len(images.held_out):
        line += (
            f" of {config.every.validate}, as no image is held out; that falls on where images "
            "are copied, which only held-out images show: data.validation_fraction=0.1 in a new run"
        )
    yield line


def build_step(config, model, net, machine, images, initial, rollbacks, notes):
    """The TrainStep, its averages by part name, and the number of recomputed levels."""
    # by the memory that is free before the network is moved there
    recomputed = memory.choose_recomputed_levels(config, net, machine, notes.append)
    if initial:
        path, _, text, weights = initial
        load.check_same_network(config, files.from_json(text), path)
        load.put_weights(net, weights, path)
    network = experiment_step.wrap_network(config, net, machine, recomputed, notes.append)
    averages = experiment_step.averages(config, network.weights)
    step = experiment_step.step(
        config, model, network, list(averages.values()), len(images.learned), rollbacks
    )
    notes += remarks.loss_remarks(config, step.diffusion)
    return step, averages, recomputed


def checkpoint_parts(averages, step, best, identity):
    """What a checkpoint keeps, by name; the tracker joins it when it is open."""
    network = step.diffusion.net
    sharded = {"net": network.weights, **averages, "optimizer": step.optimizer}
    parts = {
        **{name: network.as_checkpoint_part(part) for name, part in sharded.items()},
        "scaler": step.scaler,
        "meters": step.meters,
        "guard": step.stability,
        "best": best,
        "due": PendingEvents(),
        "data": identity,
    }
    if step.objective.state_dict():  # a weighting or times that learn
        parts["objective"] = step.objective
    return parts


def prepare_step(config, step, say):
    """Compile the network if the config says so; returns lines on that, memory format and MFU."""
    section = config.train
    machine = step.machine
    if section.compile:
        say("compiling the network, which takes a minute or more (train.compile) ...")
        notes = [experiment_step.compile_network(config, step)]
    else:
        notes = ["the network is not compiled (train.compile)"]
    layout = "channels last" if section.channels_last else "the usual memory format"
    notes.append(f"convolutions compute in {layout} (train.channels_last)")
    if machine.free() is not None and not machine.peak():
        notes.append("speed/mfu is not tracked, as ddpm/runtime/gpus.py lacks this GPU")
    return notes


def build_evaluation(config, images, step, plan, flops, never, say, notes):
    """The Evaluation of a training, with notes on what it cannot measure."""
    machine = step.machine
    if not never and config.evaluate.extractor != "none":
        say(f"loading the feature extractor {build.extractor_name(config)} ...")
    scorer = training_scorer(config, never, images.source, machine, step.diffusion, notes)
    operations = plan.operations
    if not scorer.protocol:
        operations = 0 if never else cost.likelihood_operations(config, flops)
    source = images.source
    size = drawing.at_a_time(config, machine)
    labels = source.labels if images.has_classes else None
    return Evaluation(
        validation=Validation(
            source, images.held_out, step.net, step.diffusion, machine, size, labels
        ),
        draw=drawing.drawer(config, step.net, machine, model=step.diffusion),
        grid=(range(config.sample.num_images), build.grid_recipe(config)),
        score=scorer,
        likelihood=drawing.likelihood(config, step.net, source, machine, step.diffusion),
        cost_in_images=operations / flops.training,
        share=plan.share,
    )


def training_scorer(config, never, images, machine, model, notes):
    """The scorer, or NullScorer if never used or, with a note, if its extractor is unavailable."""
    if never:
        return evaluation_scorer.NullScorer()
    try:
        scorer = drawing.scorer(config, images, machine, model)
        notes += scorer.notes
        return scorer
    except ValueError as error:
        # named, so a mistake and not a lack of network
        if registry.parse(config.evaluate.extractor)[1].get("weights"):
            raise
        notes.append(f"going on without evaluation: {error}")
        return evaluation_scorer.NullScorer()


def restore(start, parts, total, length):
    """Load a checkpoint into the parts; returns lines on it. ValueError if nothing is left."""
    if start.content is None:
        return []
    checkpoint.restore(start.content["parts"], parts)
    pending = parts["due"].names
    if start.source and start.step >= total and pending is None:
        raise ValueError(
            f"{start.source} is of step {start.step}, and config.train.length {length!r} ends at "
            f"step {total}; give a longer one"
        )
    notes = []
    if start.source:
        notes.append(f"continues {start.source} from step {start.step} (train.resume_from)")
    if pending is not None:
        names = ", ".join(sorted(pending))
        notes.append(f"first what is still to do at step {start.step}: {names}")
    return notes


def open_tracker(config, folder, machine, start, parts, total):
    """Remove what lies past the start, take over the continued folder's files, open the Tracker."""
    if start.step >= total and parts["due"].names is None:
        return Tracker()
    home = start.source and checkpoint.run_of(start.source)
    notes = []
    if machine.main:
        if home:
            checkpoint.take_over(home, folder, start.step)
        training_weights.delete_snapshots_after(folder, start.step)
        for damaged in start.damaged:
            name = checkpoint.quarantine(damaged).name
            notes.append(
                f"{damaged.path} is damaged ({damaged.why}); it is called {name} now, and the run "
                f"goes on from step {start.step}"
            )
    # the last step whose row may be written: not that of pending events
    logged = start.step - (parts["due"].names is not None)
    state = start.content and tracker_state(start.content, start.source)
    tracker = build.tracker(config, folder, machine, logged, total, state, home)
    for note in reversed(notes):  # the oldest file first
        tracker.say(note)
    return tracker


def tracker_state(content, source):
    """The tracker's part of a checkpoint; a folder that continues another's is a new W&B run."""
    state = content["parts"].get("tracker", {})
    return {key: value for key, value in state.items() if key != "wandb_id"} if source else state


def batches(config, images, machine, seed, start, total):
    """This rank's share of each batch up to `total`: uint8 [b, c, h, w] and labels int64 [b]."""
    size = config.train.batch_size
    share = machine.rank_slice(size)
    order = (
        images.learned[data_order.batch_indices(seed, len(images.learned), step, size)[share]]
        for step in range(start, total)
    )
    workers = min(config.data.num_workers, os.cpu_count() or 1)
    pin = machine.device.type == "cuda"
    return machine.prefetch(
        loader.loader(images.source, order, workers, pin, check=machine.check_stop)
    )
