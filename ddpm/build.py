"""Config -> objects. With `assemble`, which puts a training together, the only reader of config sections."""

import contextlib
import inspect
import math
import os
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from ddpm import augment, budget, cache, checkpoint, clock, data, dist, draw, metrics, posthoc, rng, score, spec, tracking
from ddpm import config as configs
from ddpm.diffusion.ddpm import DDPM
from ddpm.diffusion.guidance import unlabelled
from ddpm.diffusion.targets import get_target
from ddpm.models import MODELS
from ddpm.models.layers import ResidualBlock
from ddpm.pictures import BLACK, open_picture


def network(config):
    """The plain network of a config, its weights drawn at the config's seed; it gets those options of `model` that it takes.

    Raises ValueError for what the network cannot be.
    """
    make, taken = chosen_network(config)
    if config.data.augment and "augmentation" not in taken:
        able = " or ".join(name for name in MODELS if "augmentation" in takes(MODELS[name]))
        raise ValueError(f"config.data.augment is {config.data.augment}, and the network {config.model.name} cannot be "
                         f"conditioned on augmentation, so samples would be augmented too; use data.augment=0, or {able}")
    given = dict(config.model) | {
        "image_size": config.data.image_size, "in_channels": channels_in(config),
        "out_channels": config.data.channels * (1 + (config.diffusion.variance == "learned")),
        "num_classes": len(config.data.classes) or None, "augmentation": augment.TOLD if config.data.augment else 0,
        "num_head_channels": config.model.num_head_channels or None}
    if given["noise_embedding"] == "auto":
        given["noise_embedding"] = "fourier" if get_target(config.diffusion.predict).tells_log_noise else "sines"
    rng.reseed_torch(config.seed)
    return make(**{name: value for name, value in given.items() if name in taken})


def chosen_network(config):
    """The constructor of a config's network, the arguments of its name set, and the names of those that are left to give."""
    make = spec.choose("config.model.name", MODELS, config.model.name)
    return make, takes(make.func)


def takes(make):
    """The names of a network's arguments but for those that stand in `model.name`."""
    return {p.name for p in inspect.signature(make).parameters.values() if p.kind is not p.KEYWORD_ONLY}


def unused(config):
    """The options that do nothing with the network and the target of a config."""
    _, taken = chosen_network(config)
    options = [f"model.{name}" for name in config.model if name != "name" and name not in taken]
    return options + ["diffusion.rescale_timesteps"] * get_target(config.diffusion.predict).tells_log_noise


def channels_in(config):
    """The channels that the network takes: those of the images, and of its last guess where it is given that too."""
    return config.data.channels * (1 + config.diffusion.self_condition)


def diffusion(config, net):
    """The process and objective of a config around a network."""
    return DDPM(net, **config.diffusion)


def image_shape(config):
    """(channels, height, width) of the images."""
    return config.data.channels, config.data.image_size, config.data.image_size


def dataset(config):
    """The images of a config, all of them; raises ValueError where there are none."""
    section = config.data
    images = data.open_source(section.source, section.image_size, section.channels, section.matte)
    direct = images.in_memory or spec.parse(section.source)[0] == "streaming"  # which may be more than a disk holds
    if section.cache == "none" or section.cache == "auto" and direct:
        return images
    return cache.decoded(images, None if section.cache == "auto" else section.cache)


def split(config, images):
    """Indices of the images to learn from, and of those held out for validation; the same for every seed."""
    return data.split(len(images), config.data.validation_fraction, 0)


def class_names(config, images):
    """The names of the classes that a config learns from its images; none where it learns none.

    Raises ValueError where the images have no labels, or other classes than the config names.
    """
    given = config.data.classes
    if not config.data.class_labels:
        return ()
    if images.labels is None:
        raise ValueError(f"config.data.class_labels is True, and {config.data.source} has no labels; put the images of a "
                         "folder into a sub-folder for each class, name the label= of a streaming set, or set "
                         "data.class_labels=False")
    if given and given != tuple(images.classes):
        raise ValueError(f"{config.data.source} has the classes {data.shortened(images.classes)}, and the config has "
                         f"{data.shortened(list(given))}; bring those images back, say where they are by "
                         "--config.data.source, or begin a new run without data.classes")
    return tuple(images.classes)


def same_data(config, images):
    """The checkpoint part that says which images a config learns from, wherever they lie."""
    classes = class_names(config, images)
    return data.Same(config.data.source, images=len(images), fingerprint=images.fingerprint,
                     **({"classes": classes} if classes else {}))


def other_data(config, images, run_or_file=None):
    """A note where the images are not those that a run learned from: lines, mostly none."""
    try:
        content, _ = checkpoint.newest(checkpoint.folder_of(run_or_file or checkpoint.newest_run()))
    except ValueError:  # all are damaged
        content = None
    changes = same_data(config, images).changes(content["parts"].get("data", {})) if content else ""
    return [f"measured against other images than it learned from: {changes}"] if changes else []


def with_classes(config, names):
    """The config with the names of its classes, by which a checkpoint is rebuilt without the data."""
    return configs.changed(config, {"data.classes": names}) if names else config


def grid_recipe(config):
    """How the grids of a config are drawn: of its classes, one after the other."""
    numbers = range(len(config.data.classes))
    return recipe(config, config.sample, data.class_numbers(config.sample.classes, config.data.classes) or numbers, "in turn")


def edit_recipe(config):
    """How pictures are edited: as images of the classes that the config names, and without a label where it names none.

    Raises ValueError where the network has never done without a label, and for a guidance without one to be guided to.
    """
    classes, section = config.data.classes, config.sample
    if classes and not section.classes and not config.train.label_dropout:
        raise ValueError(f"the network has never done without its label; write --classes={classes[0]}, or another class")
    if section.guidance != 1 and not section.classes and not section.guide:
        raise ValueError(f"guidance {section.guidance} of an edit has no class to guide to; write --classes=, or --guidance=1")
    return recipe(config, section, data.class_numbers(section.classes, classes), "none")


def evaluation_recipe(config, images):
    """How the images are drawn that are measured against `images`: of classes in their proportions."""
    order = rng.permutation(0, "label", 0, len(images)) if config.data.classes else ()
    return recipe(config, config.evaluate, [images.labels[index] for index in order], "as in the data")


def recipe(config, section, labels, usual):
    """How a section of the config draws images of labels that come round; what it lacks is the section `sample`'s."""
    shared, names = config.sample, config.data.classes
    said = ", ".join(names[number] for number in data.class_numbers(section.classes, names)) or usual
    spacing = section.spacing if section.spacing != "auto" else shared.spacing
    return draw.Recipe(section.sampler, section.steps, spacing, shared.seed, section.batch_size, labels, said,
                       shared.guidance, shared.guidance_interval, shared.guide)


def extractor(config, machine):
    """The feature extractor of a config; raises ValueError where its weights are not to be had."""
    found = metrics.EXTRACTORS[extractor_name(config)](machine.device, config.evaluate.inception_weights)
    return replace(found, room=machine.room)


def extractor_name(config):
    """The name of the extractor of a config, what `auto` means for its data."""
    name = config.evaluate.extractor
    return name if name != "auto" else "digits" if spec.parse(config.data.source)[0] == "digits" else "inception"


def scorer(config, images, machine):
    """What measures drawn images as the config says.

    Raises ValueError where the images have other classes than the config, or too few of those that it measures.
    """
    if config.evaluate.extractor == "none":
        return score.Nothing()
    config = with_classes(config, class_names(config, images))
    learned, held_out = split(config, images)
    if wanted := data.class_numbers(config.evaluate.classes, config.data.classes):
        kept = np.flatnonzero(np.isin(images.labels, wanted))
        if len(kept) < metrics.FEWEST:
            raise ValueError(f"config.evaluate.classes {config.evaluate.classes} has {len(kept)} images, too few to compare; "
                             f"choose classes with {metrics.FEWEST} or more")
        images, learned, held_out = data.part(images, kept), *(np.flatnonzero(np.isin(kept, x)) for x in (learned, held_out))
    how = evaluation_recipe(config, images)
    return score.Scorer(extractor(config, machine), images, learned, held_out, how, config.evaluate.num_samples,
                        weights_name(config), evaluations(config, how), machine)


def remarks(config, section):
    """What a person should know of how a section of the config, `sample` or `evaluate`, draws: lines, mostly none."""
    sampler = spec.parse(config[section].sampler)[0]
    if config.diffusion.variance == "learned" and sampler != "ddpm":
        return [f"the sampler {sampler!r} has no use for the learned variance; {section}.sampler=ddpm has"]
    return []


def unused_remarks(config):
    """A note on options that are set and do nothing with the network and the target of a config: lines, mostly none."""
    given, usual = configs.flatten(config), configs.flatten(configs.base())
    idle = [f"{key}={given[key]}" for key in unused(config) if given[key] != usual[key]]
    chosen = " and ".join(f"{key}={spec.parse(given[key])[0]}" for key in ("model.name", "diffusion.predict"))
    return [f"{', '.join(idle)} {'have' if len(idle) > 1 else 'has'} no effect with {chosen}"] if idle else []


def unconditioned(net):
    """A note where residual blocks of a network do not depend on time and class: lines, mostly none."""
    blocks = [layer for layer in net.modules() if isinstance(layer, ResidualBlock)]
    count = sum(not block.is_conditioned for block in blocks)
    if not count:
        return []
    return [f"{count} of {len(blocks)} residual blocks do not depend on time and class, because a norm with one channel a "
            "group removes what is added before it; for a new run leave model.norm_num_groups at 0"]


def loss_remarks(objective):
    """What a person should know of how a loss weighs the noise levels: lines, mostly none."""
    weights = objective.weights
    if weights[-1] > 0:
        return []
    share = weights[-math.ceil(len(weights) / 20):].sum() / weights.sum()
    return [f"the loss gives no weight to t = {len(weights) - 1}, where sampling starts, and {share:.1e} of its weight to the "
            "last 5 % of t, so the network hardly learns what it predicts there; diffusion.weighting=simple weighs every t"]


def at_a_time(config, machine):
    """The most images that a training has on a card at once: a micro-batch."""
    return max(config.train.batch_size // (machine.world * config.train.gradient_accumulation_steps), 1)


def likelihood(config, net, images, machine):
    """What measures bits a dimension as the config says: of held-out images or, where there are none, of those learned from.

    Raises ValueError where the images have other classes than the config.
    """
    section, (learned, held_out) = config.evaluate, split(config, images)
    if section.likelihood == "none":
        return score.Nothing()
    whose, indices = ("held-out", held_out) if len(held_out) else ("training", learned)
    indices = data.thinned(indices, section.likelihood_images)
    return score.Likelihood(images, indices, whose, diffusion(config, net), section.likelihood,
                            section.likelihood_evaluations, min(section.batch_size, at_a_time(config, machine)),
                            weights_name(config), machine, images.labels if class_names(config, images) else None)


def drawer(config, net, machine, how=draw.draw):
    """`f(seeds, recipe)`: draw with the weights in the plain network at the time; `how` is draw.draw or draw.frames.

    Raises ValueError where the config names a guide that cannot be one.
    """
    sizes = {config.sample.batch_size, config.evaluate.batch_size}
    model, weaker = diffusion(config, dist.Compiled(net, sizes) if config.sample.compile else net), guide(config, machine)
    return lambda seeds, recipe: how(model, recipe, seeds, image_shape(config), machine, weaker)


def guide(config, machine):
    """The network net(x, t, y) that guides the drawing of a config, its averaged weights in it; None where none is asked.

    It may be of any size, and without classes. Raises ValueError where it is of another process or target.
    """
    if config.sample.guidance == 1 or not config.sample.guide:
        return None
    path, _, text, weights = checkpoint.load_weights(config.sample.guide)
    other = configs.changed(configs.from_json(text), {})  # and so checked
    ours, theirs = configs.flatten(config), configs.flatten(other)
    for key in SHARED:
        if theirs[key] != ours[key] and (key != "data.classes" or theirs[key]):
            raise ValueError(f"{path} cannot guide: its config.{key} is {theirs[key]!r}, not {ours[key]!r}; give as "
                             "sample.guide a training that differs in network, length and optimiser alone")
    net = network_with(other, weights, path).to(machine.device).eval()
    return net if other.data.classes else unlabelled(net)


SHARED = (  # what a guide's config has in common with that of the network it guides
    "data.image_size", "data.channels", "data.classes", "diffusion.timesteps", "diffusion.beta_schedule",
    "diffusion.zero_terminal_snr", "diffusion.predict", "diffusion.self_condition", "diffusion.rescale_timesteps")


def evaluations(config, recipe, edit=None):
    """How many network evaluations an image takes, drawn or edited; raises ValueError where the recipe cannot make the edit."""
    return draw.evaluations(diffusion(config, None), recipe, edit)


def pictures(config, paths, mask=None):
    """The pictures at `paths`, uint8 [c, h, w] each, as a config's training data are, and the mask, bool [h, w], or None.

    The mask is True where its picture is white; what is transparent there is not masked. Raises ValueError for a file that
    cannot be read, and a mask that does not lie over the first picture or has nothing white.
    """
    section = config.data
    read = [open_picture(path, section.image_size, section.channels, section.matte) for path in paths]
    if mask is None:
        return [pixels for pixels, _ in read], None
    (grey,), (width, height) = open_picture(mask, section.image_size, 1, BLACK)
    if (width, height) != read[0][1] and not (width == height and len(set(read[0][1])) == 1):
        raise ValueError(f"mask {str(mask)!r} is {width}x{height} and the image {'x'.join(map(str, read[0][1]))}; give one of "
                         "the image's size, or two squares")
    area = grey >= 128
    if not area.any():
        raise ValueError(f"mask {str(mask)!r} has nothing white, where the image is to be painted, in the square that the "
                         "network sees; give one that is white there, and black or transparent elsewhere")
    return [pixels for pixels, _ in read], area


def check(config):
    """Raise a ValueError for what only network, process and W&B know to be impossible; no memory is taken."""
    tracking.check(dict(config.wandb))
    with torch.device("meta"):
        net = network(config)
    diffusion(config, net)


class Kernels(TorchDispatchMode):
    """Counts the operations inside that compute something, and so launch a kernel or more."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


class Operations(NamedTuple):
    """The floating-point operations of a network on one image, and the kernels that it launches for a micro-batch at least."""

    forward: int
    training: int  # forward and backward
    kernels: int = 0  # forward and backward, where it is not compiled


def operations(config):
    """The Operations of a config's network, counted without computing any."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter, Kernels() as launched:
        net, (_, *size) = network(config), image_shape(config)
        launched.count = 0  # the weights' first values are no part of a step
        out = net(torch.empty(1, channels_in(config), *size), torch.zeros(1, dtype=torch.long))
        forward = counter.get_total_flops()
        out.sum().backward()
    guess = forward * config.diffusion.self_condition  # which is given its own estimate
    return Operations(forward, counter.get_total_flops() + guess, launched.count)


def drawing_operations(config, asked):
    """The operations of one image that an evaluation draws and looks at, by a network that takes the Operations `asked`."""
    if config.evaluate.extractor == "none":
        return 0
    looks = metrics.OPERATIONS[extractor_name(config)]
    return evaluations(config, recipe(config, config.evaluate, (), "")) * asked.forward + looks


def likelihood_operations(config, asked):
    """The operations, at most, of the bits a dimension in one evaluation."""
    section = config.evaluate
    each = {"none": 0, "bound": asked.forward, "flow": asked.training, "both": sum(asked[:2])}[section.likelihood]
    return section.likelihood_images * section.likelihood_evaluations * each


def settled(config, sampler="", steps=0, spacing="auto", count=budget.COMPARED):
    """The config with what its section `evaluate` leaves open: these, or as the section `sample` draws.

    `spacing` belongs to `sampler`, and is left out where the config names another; `auto` stays, and is `sample.spacing`.
    """
    section, shared = config.evaluate, config.sample
    return configs.changed(config, {
        "evaluate.sampler": (sampler or shared.sampler) if section.sampler == "auto" else section.sampler,
        "evaluate.spacing": spacing if section.sampler == section.spacing == "auto" else section.spacing,
        "evaluate.steps": section.steps or steps or shared.steps, "evaluate.num_samples": section.num_samples or count})


def ways(config, asked, spacing):
    """The budget's Ways in which an evaluation may be drawn: as the section `sample` draws, and a faster one, if there is.

    `spacing` is that of the faster one.
    """
    found, (fast, steps, _) = [], budget.FAST
    for given in ((), (fast, min(steps, config.diffusion.timesteps), spacing)):
        with contextlib.suppress(ValueError):  # a spacing may know no such number of steps
            one = settled(config, *given)
            section = one.evaluate
            found.append(budget.Way(section.sampler, section.steps, drawing_operations(one, asked), section.spacing))
    return found if found[-1].cost < found[0].cost else found[:1]


class Evaluated(NamedTuple):
    """How a training is evaluated: by a config that leaves nothing open, how often, and what that takes."""

    config: configs.FrozenConfigDict
    interval: str
    operations: int  # of one evaluation
    share: float | None  # of the training's operations, all evaluations; None where the interval hangs on the time
    words: str  # for people


def evaluated(config, images, asked, spacing=budget.FAST[2]):
    """The Evaluated of a training that learns from `images` images, by a network that takes the Operations `asked`.

    `evaluate.budget` chooses what is left open, as of `budget.choose`; `spacing` comes with its faster sampler. The features of
    the real images are kept for all runs, and not counted.
    """
    section, train, interval = config.evaluate, config.train, config.every.evaluate
    steps, auto = clock.steps_of(train.length, train.batch_size, images), interval == "auto"
    whole, bits = steps * train.batch_size * asked.training, likelihood_operations(config, asked)
    allowed = f"evaluate.budget is {section.budget:.1%}"

    def one(config):
        return config.evaluate.num_samples * drawing_operations(config, asked) + bits

    def never(words):
        usual = settled(config)
        return Evaluated(usual, "0 steps", one(usual), 0.0, words)

    times = 0 if auto else clock.Every(interval, train.batch_size, images).times(steps)
    if section.extractor == section.likelihood == "none":
        return never("no evaluation, as evaluate.extractor and evaluate.likelihood are none")
    if times == 0 and not (auto and section.budget):
        return never(f"no evaluation, as {allowed if auto else f'every.evaluate is {interval!r}'}")

    possible = ways(config, asked, spacing)
    way, count, chosen = budget.choose(section.budget * whole, possible, bits, section.num_samples, times or 0)
    made = settled(config, way.sampler, way.steps, way.spacing, count)
    how = f"{count:,} images by {way.sampler} in {way.steps} steps" if way.cost else "bits/dim alone"
    how += f", {budget.portion(one(made) / whole, ' of')} the training's operations"
    if not auto and section.num_samples and section.steps and section.sampler != "auto":
        allowed = "all as the config says, so that evaluate.budget chooses nothing"
    if auto and not chosen:
        return never(f"no evaluation: one of {how}, is too much, as {allowed}; to get one at the end anyway, set "
                     f"--config.every.evaluate={train.length!r}")
    if auto:
        interval = f"{math.ceil(steps / chosen)} steps"
        times = clock.Every(interval, train.batch_size, images).times(steps)
    share = None if times is None else times * one(made) / whole
    when = "at the end" if times == 1 else f"every {interval} and at the end"
    total = "" if times == 1 else " each" if times is None else f" each, {budget.portion(share)} for all {times}"
    return Evaluated(made, interval, one(made), share, f"evaluation {when}: {how}{total} ({allowed})")


class Loaded(NamedTuple):
    """What a checkpoint describes, with the network on the machine's device, its averaged weights in it."""

    name: str  # for people
    step: int
    config: configs.FrozenConfigDict
    machine: dist.Machine
    net: torch.nn.Module


def load(run_or_file, device=None, **knobs):
    """Rebuild what a checkpoint describes; of the newest run of runs/, which is said, where none is given.

    `knobs` that are not None take the place of those in the checkpoint's config, `{"sample.steps": 25}`. Raises ValueError
    for a missing, damaged or foreign file, and for knobs that cannot be.
    """
    if run_or_file is None:
        run_or_file = checkpoint.newest_run()
        if os.environ.get("LOCAL_RANK", "0") == "0":  # the first rank of a machine tells
            print(f"no checkpoint given: taking the newest run, {run_or_file}", flush=True)
    path, step, text, weights = checkpoint.load_weights(run_or_file)
    config = settled(configs.changed(configs.from_json(text), knobs))
    if (name := weights_name(config)) != "EMA":
        step, weights = chosen_weights(path, step, config)
    if knobs.get("sample.guide") and config.sample.guidance == 1:
        raise ValueError(f"the guide {config.sample.guide} is not asked where guidance is 1; give such as --guidance=2 too")
    net = network_with(config, weights, path)
    section = config.train
    machine = dist.start(section.amp, section.deterministic, device, cudnn_benchmark=section.cudnn_benchmark)
    net = net.to(machine.device, memory_format=machine.layout(config.data.image_size))
    return Loaded(f"{path} ({name} weights, step {step})", step, config, machine, net)


def network_with(config, weights, path):
    """The network of a config that takes over the weights that a file holds; raises ValueError where they are of another."""
    with torch.device("meta"):
        net = network(config)
    put_weights(net, weights, path, assign=True)
    return net


def check_same_network(config, other, path):
    """Raise a ValueError for weights whose config makes another network, be it of the same shapes, or is given other times."""
    ours, theirs = configs.flatten(config), configs.flatten(other)
    if len(config.data.classes) != len(other.data.classes):
        were, are = (data.in_words(one.data.classes) if one.data.classes else "none" for one in (other, config))
        raise ValueError(f"{path} was trained with other classes: they were {were}, are {are} in {config.data.source}; begin "
                         "from a run with as many, or train without train.init_from")
    free = {"model.dropout", "model.initialization", *unused(config)}
    keys = [key for key in ours if key.startswith("model.") or key == "diffusion.rescale_timesteps"]
    differing = [key for key in keys if key not in free and ours[key] != theirs[key]]
    if differing:
        unlike = "; ".join(f"{key} {theirs[key]!r}, not {ours[key]!r}" for key in differing)
        raise ValueError(f"{path} was trained with {unlike}; to begin from it add {configs.as_flags(other, differing)}")


def put_weights(net, weights, path, assign=False):
    """Load the weights that a file holds; raises ValueError where they are of another network."""
    try:
        net.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"the weights in {path} are of another network than the config's: {reason}") from None


def part_name(number):
    """The checkpoint's part that holds a further average: of a decay, or of a sigma_rel."""
    return f"ema {number}"


def weights_name(config):
    """The weights that are drawn and measured, in words."""
    chosen = config.sample.ema
    if chosen in (0, config.ema.decay):
        return "EMA"
    return f"EMA {'sigma_rel' if chosen <= posthoc.WIDEST else 'decay'} {chosen}"


def chosen_weights(path, step, config):
    """(step, weights) of the average that config.sample.ema asks for, up to the step of a file of weights.

    A further decay is in the checkpoint of that step; a sigma_rel is made from the snapshots. Raises ValueError where there
    are none, or where they come nowhere near it.
    """
    chosen, section, folder = config.sample.ema, config.ema, checkpoint.folder_of(path)
    if chosen in section.more:
        found = [path] if path.suffix == ".pt" else [other for at, other in checkpoint.checkpoints(folder) if at == step]
        if found:
            return step, checkpoint.shadow(found[-1], checkpoint.load(found[-1]), part_name(chosen))
        raise ValueError(f"the average with decay {chosen} is kept in checkpoints, and {folder} has none of step {step}; give "
                         "one of its .pt files")
    found = [item for item in checkpoint.snapshots(folder) if item[0] <= step]
    if chosen > posthoc.WIDEST or not found:
        decays = ", ".join(map(str, (section.decay, *section.more)))
        raise ValueError(f"{folder} has no {weights_name(config)} weights; it has the decays {decays} and {len(found)} "
                         "snapshots for any sigma_rel up to 0.288. Choose one of those, or train with config.ema.more, or with "
                         "config.ema.profiles and config.every.snapshot")
    stored = [(at, width, partial(checkpoint.load_snapshot, snapshot, part_name(width)))
              for at, snapshot in found for width in section.profiles]
    return found[-1][0], posthoc.reconstruct(stored, chosen)


def tracker(config, folder, machine, start, total, state=None, source=None):
    """Write a run's config.json and open its tracker, whose rows continue after step `start` of `total`.

    Both record the code, beside that which ran the folder until now, or ran the folder `source` where the run was begun.
    """
    code, shown = tracking.commit(), configs.tracked(config)
    if machine.main:
        ran = list(dict.fromkeys(filter(None, (*configs.code_in(source or folder), code))))
        configs.write(config, folder, ran)
        shown |= {"code": ran} if ran else {}
    return tracking.open_tracker(folder, config=shown, wandb=dict(config.wandb), start_step=start, total_steps=total,
                                 state=state, main=machine.main, code=code)
