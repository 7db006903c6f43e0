"""What draws and measures, built from a config: drawer, scorer, likelihood, guide."""

import numpy as np

from ddpm.config import defaults, files
from ddpm.data import order, source
from ddpm.data.decode import BLACK, open_picture
from ddpm.diffusion.denoiser import unconditional
from ddpm.evaluation import bits_per_dim, extractors
from ddpm.evaluation import scorer as evaluation_scorer
from ddpm.experiment import build, cost, load
from ddpm.runtime import compile
from ddpm.sampling import draw
from ddpm.training import weights as training_weights


def scorer(config, images, machine, model=None):
    """The Scorer of a config; ValueError for images of other classes, or too few of some."""
    if config.evaluate.extractor == "none":
        return evaluation_scorer.NullScorer()
    config = build.with_classes(config, build.class_names(config, images))
    learned, held_out = build.split(config, images)
    if wanted := source.class_numbers(config.evaluate.classes, config.data.classes):
        kept = np.flatnonzero(np.isin(images.labels, wanted))
        if len(kept) < extractors.MIN_IMAGES:
            raise ValueError(
                f"config.evaluate.classes {config.evaluate.classes} has {len(kept)} images, too "
                f"few to compare; choose classes with {extractors.MIN_IMAGES} or more"
            )
        images, learned, held_out = (
            source.subset(images, kept),
            *(np.flatnonzero(np.isin(kept, x)) for x in (learned, held_out)),
        )
    how = build.evaluation_recipe(config, images)
    return evaluation_scorer.Scorer(
        build.extractor(config, machine),
        images,
        learned,
        held_out,
        how,
        config.evaluate.num_samples,
        load.weights_name(config),
        cost.count_nfe(config, how, model=model),
        machine,
    )


def at_a_time(config, machine):
    """The most images that a training has on a GPU at once: a micro-batch."""
    return max(
        config.train.batch_size // (machine.world * config.train.gradient_accumulation_steps), 1
    )


def likelihood(config, net, images, machine, model=None):
    """The bits per dimension of held-out images, or training ones; ValueError for other classes."""
    measurement = build.likelihood(config)
    learned, held_out = build.split(config, images)
    if not measurement.by:
        return evaluation_scorer.NullScorer()
    whose, indices = ("held-out", held_out) if len(held_out) else ("training", learned)
    indices = order.evenly_spaced(indices, measurement.images)
    return bits_per_dim.Likelihood(
        images,
        indices,
        whose,
        (model or build.diffusion(config, None)).around(net),
        measurement.by,
        measurement.nfe,
        min(config.evaluate.batch_size, at_a_time(config, machine)),
        load.weights_name(config),
        machine,
        images.labels if build.class_names(config, images) else None,
    )


def drawer(config, net, machine, how=draw.draw, model=None):
    """`f(seeds, recipe)` draws with the network's weights at the time, by `how` of draw.py.

    A compiled network is released after each drawing if training lacks the memory that it holds.
    Raises ValueError if `sample.guide_checkpoint` cannot guide this network.
    """
    sizes = {config.sample.batch_size, config.evaluate.batch_size}
    net = compile.Compiled(net, sizes) if config.sample.compile else net
    model = (model or build.diffusion(config, None)).around(net)
    weaker = guide(config, machine)

    def drawn(seeds, recipe):
        yield from how(model, recipe, seeds, build.image_shape(config), machine, weaker)
        if config.sample.compile and machine.lacks_memory():
            net.release()

    return drawn


def guide(config, machine):
    """The network net(x, t, y) that guides a config's drawing, with its averaged weights, or None.

    It may be of any size, without classes. Raises ValueError for another process or target.
    """
    if config.sample.guidance == 1 or not config.sample.guide_checkpoint:
        return None
    path, _, text, weights = training_weights.load_weights(config.sample.guide_checkpoint)
    other = files.changed(files.from_json(text), {})  # and so checked
    ours = defaults.flatten(config)
    theirs = defaults.flatten(other)
    for key in SHARED:
        if theirs[key] != ours[key] and (key != "data.classes" or theirs[key]):
            raise ValueError(
                f"{path} cannot guide: its config.{key} is {theirs[key]!r}, not {ours[key]!r}; "
                "give as sample.guide_checkpoint a training that differs in network, length and "
                "optimiser alone"
            )
    net = load.network_with(other, weights, path).to(machine.device).eval()
    return net if other.data.classes else unconditional(net)


SHARED = (  # what a guide's config has in common with that of the network it guides
    "data.image_size",
    "data.channels",
    "data.classes",
    "diffusion.timesteps",
    "diffusion.beta_schedule",
    "diffusion.zero_terminal_snr",
    "diffusion.predict",
    "diffusion.self_condition",
    "diffusion.rescale_timesteps",
)


def pictures(config, paths, mask=None):
    """(pictures uint8 [c, h, w], mask bool [h, w] or None, notes) of files, made as for training.

    The mask is True where its picture is white and opaque. Raises ValueError for an unreadable file
    and for a mask that is empty or does not fit the first picture.
    """
    section = config.data
    read = [
        open_picture(path, section.image_size, section.channels, section.background)
        for path in paths
    ]
    pictures = [pixels for pixels, _ in read]
    target = section.image_size
    notes = [
        f"{path} has {width}x{height} pixels and is enlarged: the network's images have "
        f"{target}x{target}"
        for path, (_, (width, height)) in zip(paths, read, strict=True)
        if min(width, height) < target
    ]
    if mask is None:
        return pictures, None, notes
    (grey,), (width, height) = open_picture(mask, section.image_size, 1, BLACK)
    if (width, height) != read[0][1] and not (width == height and len(set(read[0][1])) == 1):
        raise ValueError(
            f"mask {str(mask)!r} is {width}x{height} and the image "
            f"{'x'.join(map(str, read[0][1]))}; give one of the image's size, or two squares"
        )
    area = grey >= 128
    if not area.any():
        raise ValueError(
            f"mask {str(mask)!r} has nothing white, where the image is to be painted, in the "
            "square that the network sees; give one that is white there, and black or transparent "
            "elsewhere"
        )
    return pictures, area, notes
