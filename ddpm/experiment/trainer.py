"""Config -> a training, its parts put together; what drawing and measuring need too, `build`
makes.
"""

import os
from pathlib import Path

from ddpm.common import durations, registry
from ddpm.config import defaults, files
from ddpm.data import duplicates, loader
from ddpm.data import order as data_order
from ddpm.evaluation import scorer as evaluation_scorer
from ddpm.experiment import build, cost, drawing, load, memory
from ddpm.experiment import step as experiment_step
from ddpm.training import checkpoint, meters
from ddpm.training import weights as training_weights
from ddpm.training.trainer import ROLLBACKS, Best, Due, Run
from ddpm.training.validation import Validation

UNTRAINED = 0.05  # share of the first weights in an average that blurs or greys what is drawn


def length_remarks(config, dataset_size):
    """What does not fit the length of a training that learns from so many images: lines, mostly
    none.
    """
    section = config.train

    def steps(text):
        return durations.steps_of(text, section.batch_size, dataset_size)

    total = steps(section.length)
    intervals = {
        key: durations.Every(text, section.batch_size, dataset_size)
        for key, text in config.every.items()
        if text != "auto"
    }
    return [
        *batch_remarks(section.batch_size, dataset_size),
        *warmup_remarks(
            section, steps(section.warmup), total, experiment_step.rate(config, dataset_size)
        ),
        *decay_remarks(section, steps, total),
        *average_remarks(config.ema, total),
        *interval_remarks(intervals, total),
    ]


def batch_remarks(batch_size, dataset_size):
    """Of a batch that has more images than there are to learn from."""
    if batch_size > dataset_size:
        yield (
            f"train.batch_size is {batch_size}, more than the "
            f"{registry.quantity(dataset_size, 'image')} to learn from, so each step learns from "
            f"an image {batch_size / dataset_size:.2g} times on average; set "
            f"train.batch_size={dataset_size} or less"
        )


def warmup_remarks(section, warmup, total, rate):
    """Of a warm-up that takes more than half of a training."""
    if 2 * warmup > total:
        ends = (
            f", which ends at the rate {rate(total - 1):.2g} of {section.learning_rate:.2g}"
            if warmup > total
            else ""
        )
        # commas join durations
        shorter = registry.quantity(max(total // 20, 1), "step").replace(",", "")
        yield (
            f"train.warmup is {section.warmup!r}, "
            f"{'longer than' if ends else 'more than half of'} the training of "
            f"{registry.quantity(total, 'step')}{ends}; set train.warmup={shorter!r}"
        )


def decay_remarks(section, steps, total):
    """Of a decay of the learning rate that ends long before a training, or long after it."""
    name, arguments = registry.parse(section.learning_rate_decay)
    length = steps(arguments["length"]) if "length" in arguments else total
    # which falls on and on
    if 0.95 * total <= length <= 1.05 * total or name == "inverse_sqrt" and length < total:
        return
    late = "begins after the end" if name == "inverse_sqrt" else "goes on after the end"
    what = late if length > total else "is over before the end"
    yield (
        f"train.learning_rate_decay is {section.learning_rate_decay!r}, which {what} of the "
        f"training of {registry.quantity(total, 'step')}; give it the length {section.length!r}"
    )


def average_remarks(section, total):
    """Of averages in which much is left of the weights that a training begins with."""
    for decay in (section.decay, *section.more):
        if not section.warmup and not section.rampup and decay**total > UNTRAINED:
            yield (
                f"{decay**total:.0%} of an average of decay {decay:g} without ema.warmup are "
                f"untrained weights after {registry.quantity(total, 'step')}; set ema.warmup=True, "
                f"or a decay up to {UNTRAINED ** (1 / total):.3g}"
            )


def interval_remarks(intervals, total):
    """Of intervals, by their names in the section `every`, that do not end within a training."""
    late = [key for key, every in intervals.items() if (every.first() or 0) > total]
    if "milestone" in late:
        late.remove("milestone")
        yield (
            f"every.milestone is longer than the training of {registry.quantity(total, 'step')}, "
            "which keeps no milestone"
        )
    if late:
        names = ", ".join(f"every.{key}" for key in late)
        yield (
            f"{names}: longer than the training of {registry.quantity(total, 'step')}, so only "
            "once, at its end"
        )


def batches(config, images, indices, machine, seed, start, total):
    """This rank's share of each effective batch from step `start` to `total`: uint8 [b, c, h, w]
    and labels int64 [b].
    """
    size = config.train.batch_size
    share = machine.rank_slice(config.train.batch_size)
    order = (
        indices[data_order.batch_indices(seed, len(indices), step, size)[share]]
        for step in range(start, total)
    )
    workers = min(config.data.num_workers, os.cpu_count() or 1)
    return machine.prefetch(
        loader.loader(
            images, order, workers, machine.device.type == "cuda", check=machine.check_stop
        )
    )


def training_scorer(config, every, images, machine, notes):
    """The scorer of a training: nothing where it is never asked, nor, with a note, where its
    extractor is not to be had.

    Raises ValueError for a file of weights that is named in the config and cannot be used.
    """
    if every.never:
        return evaluation_scorer.NullScorer()
    try:
        scorer = drawing.scorer(config, images, machine)
        notes += scorer.notes
        return scorer
    except ValueError as error:
        if config.evaluate.inception_weights:  # named, so a mistake and not a lack of network
            raise
        notes.append(f"going on without evaluation: {error}")
        return evaluation_scorer.NullScorer()


def run(config, folder, machine, rollbacks=0, say=lambda text: None):
    """Make the run of a config in a folder: new, or standing where its newest checkpoint left it.

    It was rolled back so often, or as often as the checkpoint knows. `say(text)` hears what is
    about to take long. Raises ValueError for what cannot be run, before anything is written.
    """
    section = config.train
    folder = Path(folder)
    equal = machine.world * section.gradient_accumulation_steps
    if section.batch_size % equal:
        raise ValueError(
            f"config.train.batch_size {section.batch_size} cannot be cut into {machine.world} "
            f"ranks x {section.gradient_accumulation_steps} micro-batches; choose a multiple of "
            f"{equal}"
        )
    if config.sample.ema:
        raise ValueError(
            f"config.sample.ema is {config.sample.ema}, and a training draws with "
            "config.ema.decay; leave it at 0, and give --ema to generate, sample or evaluate"
        )
    content, damaged = checkpoint.newest(folder)  # files first: they may be refused
    given = defaults.flatten(config)
    source = None
    if content is not None:  # which knows where it began, also when the command no longer says so
        config = files.changed(
            config, {"train.resume_from": files.from_json(content["config"]).train.resume_from}
        )
    elif section.resume_from:
        source, content = checkpoint.chosen(section.resume_from)
        files.check_resumes(config, files.from_json(content["config"]), source)
    first = (
        training_weights.load_weights(section.init_from)
        if content is None and section.init_from
        else None
    )
    say(f"reading the images of {config.data.source}")
    images = build.dataset(config)
    classes = build.class_names(config, images)
    config = build.with_classes(config, classes)
    same = build.same_data(config, images)
    if content is not None:  # before the network, whose shapes follow the classes
        checkpoint.restore(content["parts"], {"data": same})
    learned, held_out = build.split(config, images)
    total = durations.steps_of(section.length, section.batch_size, len(learned))
    asked = cost.operations(config)
    before = files.from_json(content["config"]) if content else None  # so its distances compare
    config, interval, operations, share, evaluation = cost.plan_evaluation(
        config, len(learned), asked, before
    )
    every = {
        name: durations.Every(text, section.batch_size, len(learned))
        for name, text in {**config.every, "evaluate": interval}.items()
    }
    if not config.ema.profiles:
        every["snapshot"] = durations.Every("0 steps", section.batch_size, len(learned))
    best = Best("val/loss_ema" if len(held_out) else "train/loss")
    if content is not None:
        rollbacks = max(rollbacks, content["parts"].get("guard", {}).get("rollbacks", 0))

    net = build.network(config)
    notes = [
        *machine.notes,
        *images.notes,
        *build.remarks(config, "sample"),
        *build.unused_remarks(config),
        *build.unconditioned(net),
        f"{registry.quantity(len(learned), 'image')} to learn from, {len(held_out)} held out",
        f"a step learns from a batch of {section.batch_size}, {drawing.at_a_time(config, machine)} "
        "at a time" + (f" on each of {machine.world} ranks" if machine.world > 1 else ""),
        evaluation,
    ]
    notes += length_remarks(config, len(learned))
    if twins := duplicates.split_leakage(images.near_duplicates, held_out):
        notes.append(
            f"{twins} held-out image{'s have' if twins > 1 else ' has'} a near-duplicate that is "
            "learned from: val/loss and eval/copying flatter"
        )
    if not every["validate"].never:
        notes.append(
            f"{best.file} keeps the averaged weights at the lowest {best.by}"
            + (
                ""
                if len(held_out)
                else f" of {config.every.validate}, as no image is held out; that falls on where "
                "images are copied, which only held-out images show: "
                "data.validation_fraction=0.1 in a new run"
            )
        )
    # by what is free before the network takes its place
    levels = memory.recomputed(config, net, machine, notes.append)
    if first:
        path, _, text, weights = first
        load.check_same_network(config, files.from_json(text), path)
        load.put_weights(net, weights, path)
    network = experiment_step.learning(config, net, machine, levels, notes.append)
    averaged = experiment_step.averages(config, network.weights)
    made = experiment_step.step(config, network, list(averaged.values()), len(learned), rollbacks)
    notes += build.loss_remarks(config, made.diffusion)
    shared = {"net": network.weights, **averaged, "optimizer": made.optimizer}
    parts = {
        **{name: network.part(one) for name, one in shared.items()},
        "scaler": made.scaler,
        "meters": made.meters,
        "guard": made.guard,
        "best": best,
        "due": Due(),
        "data": same,
    }
    if made.objective.state_dict():  # a weighting or times that learn
        parts["objective"] = made.objective
    if section.compile:
        say("compiling the network, which takes a minute or more (train.compile)")
        notes.append(experiment_step.compiled(config, made))
    else:
        notes.append(
            "the network is not compiled (train.compile): "
            + (
                "that takes minutes on a CPU"
                if machine.free() is None
                else "what that saves on a GPU is yet to be measured"
            )
        )
    notes.append(
        "convolutions are in channels last (train.channels_last)"
        if section.channels_last
        else "convolutions keep the usual memory format (train.channels_last): the other "
        + (
            "is slower to learn in on a CPU"
            if machine.free() is None
            else "is yet to be measured on a GPU"
        )
    )
    if machine.free() is not None and not machine.peak():
        notes.append("speed/mfu is not tracked, as ddpm.GPUs lacks this GPU")
    if not every["evaluate"].never and config.evaluate.extractor != "none":
        say(f"loading the feature extractor {build.extractor_name(config)}")
    scorer = training_scorer(config, every["evaluate"], images, machine, notes)
    if not scorer.protocol:
        operations = 0 if every["evaluate"].never else cost.likelihood_operations(config, asked)
    if content is not None:
        checkpoint.restore(content["parts"], parts)
        if source:
            if content["step"] >= total and parts["due"].names is None:
                raise ValueError(
                    f"{source} is of step {content['step']}, and config.train.length "
                    f"{section.length!r} ends at step {total}; give a longer one"
                )
            notes.append(f"continues {source} from step {content['step']} (train.resume_from)")
        if parts["due"].names is not None:
            notes.append(
                f"first what is still to do at step {content['step']}: "
                f"{', '.join(sorted(parts['due'].names))}"
            )
    return Run(
        folder=folder,
        config_json=files.to_json(config),
        machine=machine,
        recomputed=levels,
        filled={
            key: value for key, value in defaults.flatten(config).items() if value != given[key]
        },
        start=content["step"] if content else 0,
        total=total,
        step=made,
        meters=made.meters,
        every=every,
        due=parts["due"],
        best=best,
        parts=parts,
        notes=notes,
        rollback=section.rollback if rollbacks < ROLLBACKS else 0,
        stored={name: averaged[name] for name in map(load.part_name, config.ema.profiles)},
        batches=lambda start: batches(config, images, learned, machine, made.seed, start, total),
        speed=meters.Speed(
            section.batch_size, len(learned), asked.training, machine.peak(), machine.wait
        ),
        validation=Validation(
            images,
            held_out,
            network.net,
            made.diffusion,
            machine,
            drawing.at_a_time(config, machine),
            images.labels if classes else None,
        ),
        draw=drawing.drawer(config, network.net, machine),
        grid=(range(config.sample.num_images), build.grid_recipe(config)),
        score=scorer,
        share=share,
        evaluation=operations / asked.training,
        likelihood=drawing.likelihood(config, network.net, images, machine),
        damaged=damaged,
        tracker_state=content and tracker_state(content, source),
        source=source,
    )


def tracker_state(content, source):
    """What the tracker left in a checkpoint; a folder that continues another's is a new run of
    W&B.
    """
    state = content["parts"].get("tracker", {})
    return {key: value for key, value in state.items() if key != "wandb_id"} if source else state


def track(config, made):
    """Let a run be followed by its tracker, after what its folder takes over from the one where
    it was begun.
    """
    home = made.source and checkpoint.run_of(made.source)
    if home and made.machine.main:
        checkpoint.take_over(home, made.folder, made.start)
    made.track(
        build.tracker(
            files.changed(config, made.filled),
            made.folder,
            made.machine,
            made.logged,
            made.total,
            made.tracker_state,
            home,
        )
    )
