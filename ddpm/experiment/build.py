"""Config -> network, data, DDPM and recipes; only this folder reads sections of a config."""

import inspect
from dataclasses import replace

import torch

from ddpm import data
from ddpm.common import registry, rng
from ddpm.config import defaults, files
from ddpm.data import augment, cache
from ddpm.data import order as data_order
from ddpm.data import source as data_source
from ddpm.diffusion.ddpm import DDPM
from ddpm.diffusion.likelihood import LIKELIHOODS
from ddpm.diffusion.targets import get_target
from ddpm.evaluation import extractors
from ddpm.models import MODELS
from ddpm.models.conventions import CONVENTIONS
from ddpm.sampling import draw
from ddpm.tracking import tracker as tracking_tracker
from ddpm.tracking import wandb
from ddpm.training import checkpoint


def network(config):
    """The plain network of a config, weights drawn at its seed; ValueError if it is impossible."""
    make, taken = chosen_network(config)
    if config.data.augment and "augmentation" not in taken:
        able = " or ".join(name for name in MODELS if "augmentation" in takes(MODELS[name]))
        raise ValueError(
            f"config.data.augment is {config.data.augment}, and the network {config.model.name} "
            "cannot be conditioned on augmentation, so samples would be augmented too; use "
            f"data.augment=0, or {able}"
        )
    given = (
        dict(config.model)
        | conventions(config)
        | {
            "image_size": config.data.image_size,
            "in_channels": channels_in(config),
            "out_channels": config.data.channels * (1 + (config.diffusion.variance == "learned")),
            "num_classes": len(config.data.classes) or None,
            "augmentation": augment.NUM_CONDITIONS if config.data.augment else 0,
            "num_head_channels": config.model.num_head_channels or None,
        }
    )
    if given["noise_embedding"] == "auto":
        given["noise_embedding"] = (
            "fourier" if get_target(config.diffusion.predict).is_log_noise else "sines"
        )
    rng.reseed_torch(config.seed)
    return make(**{name: value for name, value in given.items() if name in taken})


def chosen_network(config):
    """A network's constructor with its name's arguments set, and the names of its others."""
    make = registry.resolve("config.model.name", MODELS, config.model.name)
    return make, takes(make.func)


def takes(make):
    """The names of a network's arguments, except those that stand in `model.name`."""
    return {
        p.name for p in inspect.signature(make).parameters.values() if p.kind is not p.KEYWORD_ONLY
    }


def conventions(config):
    """The arguments that `model.conventions` stands for."""
    return registry.resolve("config.model.conventions", CONVENTIONS, config.model.conventions)()


def spelled_out(config):
    """The options as a flat dict, with `model.conventions(norm_eps)` and its other arguments in
    place of `model.conventions`.
    """
    options = defaults.flatten(config)
    del options["model.conventions"]
    return options | {
        f"model.conventions({name})": value for name, value in conventions(config).items()
    }


def unused(config):
    """Options without effect, named as by `spelled_out`: name -> the option that is the reason."""
    _, taken = chosen_network(config)
    found = {
        f"model.{name}": "model.name"
        for name in config.model
        if name not in ("name", "conventions") and name not in taken
    }
    found |= {
        f"model.conventions({name})": "model.name"
        for name in conventions(config)
        if name not in taken
    }
    found |= {
        f"model.{name}": f"model.{other}"
        for name, other in REPLACED.items()
        if {name, other} <= taken and config.model[other]
    }
    if get_target(config.diffusion.predict).is_log_noise:
        found["diffusion.rescale_timesteps"] = "diffusion.predict"
    return found


# option of a network -> another
REPLACED = {"num_heads": "num_head_channels", "num_res_blocks": "res_blocks_per_level"}


def channels_in(config):
    """The network's input channels: an image and, with self-conditioning, its last estimate."""
    return config.data.channels * (1 + config.diffusion.self_condition)


def diffusion(config, net):
    """The process and objective of a config around a network."""
    return DDPM(net, **config.diffusion)


def image_shape(config):
    """(channels, height, width) of the images."""
    return config.data.channels, config.data.image_size, config.data.image_size


def dataset(config):
    """All images of a config; raises ValueError if there are none."""
    section = config.data
    images = data.open_source(
        section.source, section.image_size, section.channels, section.background
    )
    # which may be more than a disk holds
    direct = images.in_memory or registry.parse(section.source)[0] == "streaming"
    if section.cache == "none" or section.cache == "auto" and direct:
        return images
    return cache.cache_decoded(images, None if section.cache == "auto" else section.cache)


def split(config, images):
    """Indices of the images to learn from and of those held out; the same for every seed."""
    return data_order.split(len(images), config.data.validation_fraction, 0)


def class_names(config, images):
    """The names of the classes that a config learns from its images, or ().

    Raises ValueError for images without labels, or of other classes than the config names.
    """
    given = config.data.classes
    if not config.data.class_labels:
        return ()
    if images.labels is None:
        raise ValueError(
            f"config.data.class_labels is True, and {config.data.source} has no labels; put the "
            "images of a folder into a sub-folder for each class, name the label= of a streaming "
            "set, or set data.class_labels=False"
        )
    if given and given != tuple(images.classes):
        raise ValueError(
            f"{config.data.source} has the classes {data_source.shorten(images.classes)}, and "
            f"the config has {data_source.shorten(list(given))}; bring those images back, say "
            "where they are by --config.data.source, or begin a new run without data.classes"
        )
    return tuple(images.classes)


def same_data(config, images):
    """The checkpoint part that says which images a config learns from, wherever they lie."""
    classes = class_names(config, images)
    return data_source.DatasetCheck(
        config.data.source,
        images=len(images),
        fingerprint=images.fingerprint,
        **({"classes": classes} if classes else {}),
    )


def other_data(config, images, run_or_file=None):
    """A remark if the images are not those that a run learned from: lines, mostly none."""
    try:
        content, _ = checkpoint.newest(
            checkpoint.folder_of(run_or_file or checkpoint.newest_run()), tensors=False
        )
    except ValueError:  # all are damaged
        content = None
    changes = same_data(config, images).changes(content["parts"].get("data", {})) if content else ""
    return [f"measured against other images than it learned from: {changes}"] if changes else []


def with_classes(config, names):
    """The config with its classes named, so that a checkpoint is rebuilt without the data."""
    return files.changed(config, {"data.classes": names}) if names else config


def grid_recipe(config):
    """How the grids of a config are drawn: of its classes, one after the other."""
    names = config.data.classes
    labels = data_source.class_numbers(config.sample.classes, names) or range(len(names))
    return recipe(config, config.sample, labels, "in turn")


def edit_recipe(config):
    """The Recipe of edits: images of the classes in sample.classes, or without labels.

    Raises ValueError if the network has only learned with labels, and for guidance without a class.
    """
    classes = config.data.classes
    section = config.sample
    if classes and not section.classes and not config.train.label_dropout:
        raise ValueError(
            f"the network has never done without its label; write --classes={classes[0]}, or "
            "another class"
        )
    if section.guidance != 1 and not section.classes and not section.guide_checkpoint:
        raise ValueError(
            f"guidance {section.guidance} of an edit has no class to guide to; write --classes=, "
            "or --guidance=1"
        )
    return recipe(config, section, data_source.class_numbers(section.classes, classes), "none")


def evaluation_recipe(config, images):
    """How images are drawn to be measured against `images`: of classes in their proportions."""
    order = rng.permutation(0, "label", 0, len(images)) if config.data.classes else ()
    return recipe(
        config, config.evaluate, [images.labels[index] for index in order], "as in the data"
    )


def recipe(config, section, labels, usual):
    """The Recipe of a section, of labels in turn; what it lacks is that of the section `sample`."""
    shared = config.sample
    names = config.data.classes
    chosen = [names[number] for number in data_source.class_numbers(section.classes, names)]
    spacing = section.spacing if section.spacing != "auto" else shared.spacing
    return draw.Recipe(
        section.sampler,
        section.steps,
        spacing,
        shared.seed,
        section.batch_size,
        labels,
        ", ".join(chosen) or usual,
        shared.guidance,
        shared.guidance_interval,
        shared.guide_checkpoint,
    )


def likelihood(config):
    """The Measurement of likelihood that a config asks for."""
    return registry.resolve("likelihood", LIKELIHOODS, config.evaluate.likelihood)()


def extractor(config, machine):
    """The feature extractor of a config; raises ValueError if its weights are unavailable."""
    text = config.evaluate.extractor
    if text == "auto":
        text = extractor_name(config)
    make = registry.resolve("config.evaluate.extractor", extractors.EXTRACTORS, text)
    return replace(make(machine.device), room=machine.room)


def extractor_name(config):
    """The name of the extractor of a config, what `auto` means for its data."""
    name, _ = registry.parse(config.evaluate.extractor)
    if name != "auto":
        return name
    return "digits" if registry.parse(config.data.source)[0] == "digits" else "inception"


def check(config):
    """The DDPM of a config, without a network; ValueError if one, a process or W&B refuses it."""
    wandb.check(dict(config.wandb))
    with torch.device("meta"):
        network(config)
    return diffusion(config, None)


def tracker(config, folder, machine, start, total, state=None, source=None):
    """Write a run's config.json and open its tracker, whose rows continue after step `start`.

    Both record the commits of the code that ran the folder, or `source`, where the run began.
    """
    code = tracking_tracker.commit()
    shown = files.tracked(config)
    if machine.main:
        ran = list(dict.fromkeys(filter(None, (*files.code_in(source or folder), code))))
        files.write(config, folder, ran)
        shown |= {"code": ran} if ran else {}
    return tracking_tracker.open_tracker(
        folder,
        config=shown,
        wandb=dict(config.wandb),
        start_step=start,
        total_steps=total,
        state=state,
        main=machine.main,
        code=code,
    )
