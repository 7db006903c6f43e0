"""The knobs of a run: `base()` shows them all, and it is the only place with defaults.

A config file offers `get_config(variant=None)`, which returns `base()` and the lines that differ. Here configs are also
checked, frozen, written as JSON and named.
"""

import contextlib
import json
import math
import os
import re
import shlex
import zlib
from pathlib import Path

from ml_collections import ConfigDict, FrozenConfigDict

from ddpm import checkpoint, clock, data, dist, metrics, tracking
from ddpm.diffusion.likelihood import LIKELIHOODS
from ddpm.diffusion.losses import LOSSES, TIMES, WEIGHTINGS
from ddpm.diffusion.process import CLEAN, VARIANCES, Level, Process
from ddpm.diffusion.samplers import SAMPLERS, evaluations
from ddpm.diffusion.schedules import SCHEDULES, get_schedule
from ddpm.diffusion.spacings import SPACINGS
from ddpm.diffusion.targets import TARGETS
from ddpm.files import written_beside
from ddpm.models import MODELS
from ddpm.models.layers import norm_groups
from ddpm.optim import DECAYS, OPTIMIZERS
from ddpm.spec import check_choice, choose, parse, suggest


def base():
    """A new ConfigDict, locked, with every knob, its default, unit and choices."""
    return ConfigDict({
        "seed": 0,  # every random number of the training is an address below it
        "data": {
            "source": "digits",  # digits, folder(path='data/cats'), torchvision(name='CIFAR10'), streaming(path='data/shards')
            "image_size": 16,  # pixels a side
            "channels": 1,  # 1 grey, 3 colour, 4 colour and transparency
            "matte": (255, 255, 255),  # red, green, blue (0 to 255) behind transparent pixels
            "flip": False,  # mirror images left to right at random: for photos, not for digits
            "class_labels": False,  # learn the classes too: a folder's sub-folders, or a data set's labels
            "classes": (),  # their names in order, which a training fills in from its data
            "augment": 0.0,  # how likely each transformation of an image is, which the network is told: 0.12; half are mirrored
            "validation_fraction": 0.1,  # share of the images held out for the validation loss; 0 holds none
            "cache": "auto",  # decoded images in a file: auto ($DDPM_CACHE, else ~/.cache/ddpm), none, or a folder
            "num_workers": 0,  # processes that read images; 0 reads in the training process
        },
        "model": {
            "name": "unet",  # unet, unet_edm2, dit(size='S', patch_size=2), whose depth, width and heads can be given too
            "dropout": 0.0,  # share of activations dropped in every block
            "qk_norm": False,  # attention: each head's queries and keys are normed
            "augmentation_place": "before",  # of data.augment: before the layers of the time embedding, as in EDM, or after
            # from here on: the U-Nets' alone
            "model_channels": 64,  # width of the first level
            "channel_mult": (1, 2, 2),  # width of each level in model_channels; each level after the first halves the image
            "num_res_blocks": 2,  # residual blocks a level
            "res_blocks_per_level": (),  # residual blocks of each level, where they differ: as many as channel_mult; or ()
            "attention_resolutions": (8,),  # sizes of feature maps, in pixels, that get self-attention
            "num_heads": 1,  # attention heads, where num_head_channels is 0
            "num_head_channels": 0,  # channels a head; 0 counts by num_heads
            "use_scale_shift_norm": False,  # the time scales and shifts the norm, instead of being added
            "resblock_updown": False,  # residual blocks change the resolution, instead of single convolutions
            "freq_shift": 1,  # frequencies of the time embedding: 1 as in Ho's code, 0 as in OpenAI's
            "downsample_padding": 0,  # zeros where an image is halved: 0 at its far end, as Ho's, 1 at both, as OpenAI's
            "norm_num_groups": 0,  # groups of a norm, at most; 0 is 32, of 4 channels or more: a group of 1 removes the time
            "noise_embedding": "auto",  # unet_edm2: auto is random Fourier features with predict=edm, else sines; or sines
            "norm_eps": 1e-6,  # added to the variance of a group: 1e-6 as in Ho's code, 1e-5 as in OpenAI's
            "initialization": "glorot",  # of new weights: glorot as in Ho's code, torch as in OpenAI's
        },
        "diffusion": {
            "timesteps": 1000,  # T, noise levels: 1 to 10000
            "beta_schedule": "cosine",  # linear, quadratic, cosine, sigmoid, laplace, shifted_cosine(resolution=128), flow, edm
            "zero_terminal_snr": False,  # rescale the schedule so that it ends in pure noise; not with eps and edm
            "predict": "eps",  # what the network predicts: eps, x0, v, flow, edm(sigma_data=0.5)
            "variance": "small",  # of a step of the sampler ddpm: small, large, learned (by hybrid or vlb)
            "loss": "mse",  # mse, hybrid(vlb_weight=0.001), vlb
            "weighting": "simple",  # simple, min_snr(gamma=5.0), soft_min_snr, p2, sigmoid, sigmoid_eps, edm, uncertainty
            "times": "uniform",  # uniform, stratified, antithetic, logit_normal, lognormal, importance
            "self_condition": False,  # the network sees its last estimate of the image too
            "rescale_timesteps": False,  # the network is given 1000 t / T in place of t, as in OpenAI's code
            "clip": True,  # samples: predicted images are clipped to [-1, 1] at each step
        },
        "train": {
            "length": "10000 steps",  # steps, epochs or images
            "batch_size": 64,  # images an optimiser step, over all micro-batches and ranks
            "gradient_accumulation_steps": 1,  # micro-batches the batch is cut into: less memory, same numbers but for dropout
            "optimizer": "adamw(weight_decay=0.0)",  # adamw, adam; knobs betas, eps, weight_decay
            "learning_rate": 2e-4,
            "warmup": "500 steps",  # the rate rises linearly from 0
            "learning_rate_decay": "constant",  # constant, cosine(length='10000 steps'), linear(...), inverse_sqrt(...)
            "gradient_clip": 1.0,  # largest norm of the gradient; 0 never clips
            "spike": 30.0,  # steps are skipped whose loss or gradient norm is so many times the largest of late; 0 skips none
            "rollback": 0.5,  # where it diverges it goes back, once, and on in another order at this share of the rate; 0 stops
            "amp": "auto",  # type of the network's arithmetic: auto, off, bf16, fp16
            "deterministic": False,  # on a card, bitwise repeatable and slower
            "cudnn_benchmark": "auto",  # on a GPU, cuDNN tries its convolutions and takes the fastest: auto (on), on, off
            "compile": False,  # torch.compile: a minute or more at the start, then fewer kernels; rounds differently
            "channels_last": False,  # memory format of convolutions: may pay in half precision on a card; rounds differently
            "activation_checkpointing": "auto",  # levels computed twice to save memory: none, all, auto (as the card needs)
            "fully_shard": False,  # cards: each keeps a part of weights, averages, optimiser: for what fits no single one
            "label_dropout": 0.1,  # share of class labels dropped, for guidance: the network learns to do without too
            "max_hours": 0.0,  # saves and stops with exit code 75 before the process is so old; 0 is no limit
            "init_from": "",  # run folder or file whose EMA weights a new run begins with
            "resume_from": "",  # checkpoint, or run folder for its newest, at which a new run folder continues that run
        },
        "ema": {
            "decay": 0.9999,  # of the averaged weights, a step
            "warmup": True,  # average over fewer steps at first: decay at most (1 + n) / (10 + n) at step n
            "rampup": 0.0,  # half-life at most this share of the steps so far: 0.05 as in EDM's code; 0 sets no limit
            "more": (),  # further decays averaged beside it, from 0.3 up, for --ema=0.999
            "profiles": (),  # power-function averages to store, by sigma_rel: (0.05, 0.1) makes any --ema up to 0.288
        },
        "sample": {
            "sampler": "ddim",  # ddpm, ddim(eta=0.0), euler, euler_ancestral, heun(churn=0.0), dpmpp(order=2), dpmpp_sde, unipc
            "steps": 50,  # of the sampler, at most diffusion.timesteps; each is one network evaluation, or two by heun and dpm2
            "spacing": "linear",  # linear, trailing, leading, quadratic, karras(rho=7.0), sections(counts=(10, 8, 4, 2, 1))
            "classes": (),  # drawn in turn, names or numbers; empty is all of them
            "guidance": 1.0,  # scale: 1 is none and asks one network once; above 1 follows the class, or leaves the guide, more
            "guidance_interval": (),  # noise levels sigma/alpha between which to guide, such as (0.2, 5.0); empty is all
            "guide": "",  # run folder or file of a weaker training that guides, in place of the network without labels
            "num_images": 64,  # in the grids drawn while training
            "batch_size": 64,  # images drawn at once
            "compile": False,  # torch.compile and, on a card, CUDA graphs: for many images, as the first wait a minute or more
            "ema": 0.0,  # weights after training: 0 is ema.decay's, from 0.3 another of ema.more, below a sigma_rel
            "seed": 0,  # of the latents, apart from the training's seed so that grids of different seeds compare
        },
        "evaluate": {
            "extractor": "auto",  # auto (digits for the digits, else inception), digits, inception, none (nothing is drawn)
            "inception_weights": "",  # path of torch-fidelity's Inception weights; empty looks in its cache, then downloads
            "budget": 0.05,  # share of the training's operations that evaluations may take: chooses what is auto or 0, below
            "num_samples": 0,  # images drawn for the Frechet distance; 0 is from 1,000 up, by the budget
            "sampler": "auto",  # as sample.sampler; auto is that, or dpmpp where the budget is small
            "steps": 0,  # as sample.steps; 0 is that, or 20 where the budget is small
            "spacing": "auto",  # as sample.spacing; auto is that, or karras where the budget chooses the sampler
            "classes": (),  # the only ones drawn, and measured against; empty is all, in the proportions of the data
            "batch_size": 256,  # images drawn and measured at once
            "likelihood": "none",  # bits/dim of held-out images: none, bound (of ancestral sampling), flow (of the ODE), both
            "likelihood_images": 256,  # held-out images that it is the mean of, at most
            "likelihood_evaluations": 100,  # of the network, an image: at so many t, and in a quarter of steps of the ODE
        },
        "every": {  # intervals in steps, epochs, images or minutes, several joined by commas; "0 steps" is never
            "log": "50 steps",
            "sample": "1000 steps",
            "validate": "500 steps",
            "evaluate": "auto",  # auto is up to 20 times, the last at the end, by evaluate.budget
            "save": "5000 steps, 10 minutes",
            "snapshot": "0 steps",  # storing ema.profiles: 16 to 64 times a training
            "milestone": "0 steps",  # checkpoints that are kept for good
        },
        "wandb": {
            "mode": "auto",  # auto (online when logged in, else offline), online, offline, disabled
            "project": "",  # empty is $WANDB_PROJECT, else ddpm
            "entity": "",  # user or team; empty is the default of the login
            "name": "",  # of the run; empty is $WANDB_NAME, else the run folder's
            "group": "",  # runs shown together
            "tags": (),  # words
            "notes": "",  # a sentence about the run
        },
    }).lock()


def with_variant(config, variant, variants):
    """Set the knobs of a config file's variant, `variants[variant]` as `{"model.model_channels": 64}`; None sets nothing.

    Raises ValueError for a variant that the file does not have.
    """
    if variant is not None:
        if not variants:
            raise ValueError(f"this config file has no variants; leave out ':{variant}'")
        config.update_from_flattened_dict(variants[check_choice("variant", variant, list(variants))])
    return config


# What may change between two starts of one run: nothing here touches the numbers of a step.
FREE = ("train.length", "train.max_hours", "train.activation_checkpointing", "train.fully_shard", "every.", "wandb.",
        "evaluate.", "data.classes", "data.cache", "data.num_workers", "sample.batch_size", "sample.compile")

PLACE = "data.source"  # of which a checkpoint keeps the content: that decides whether a run goes on

RANGES = {
    "seed": (0, 2**63 - 1),
    "data.image_size": (1, 4096),
    "data.augment": (0, 0.9),
    "data.validation_fraction": (0, 0.9),
    "data.num_workers": (0, 256),
    "model.model_channels": (1, 65536),
    "model.num_res_blocks": (1, 64),
    "model.num_heads": (1, 1024),
    "model.num_head_channels": (0, 65536),
    "model.dropout": (0, 0.99),
    "model.freq_shift": (0, 1),
    "model.downsample_padding": (0, 1),
    "model.norm_num_groups": (0, 1024),
    "model.norm_eps": (0, 1),
    "diffusion.timesteps": (1, 10_000),
    "train.batch_size": (1, 2**20),
    "train.gradient_accumulation_steps": (1, 2**20),
    "train.learning_rate": (0, 1),
    "train.spike": (0, 1_000_000),
    "train.rollback": (0, 1),
    "train.gradient_clip": (0, float("inf")),
    "train.label_dropout": (0, 0.99),
    "train.max_hours": (0, 10_000),
    "ema.decay": (0, 0.999999999),
    "ema.rampup": (0, 1),
    "sample.steps": (1, 10_000),
    "sample.guidance": (0, 1000),
    "sample.num_images": (1, 4096),
    "sample.batch_size": (1, 65536),
    "sample.ema": (0, 0.999999999),
    "sample.seed": (0, 2**63 - 1),
    "evaluate.budget": (0, 1),
    "evaluate.num_samples": (0, 10_000_000),
    "evaluate.steps": (0, 10_000),
    "evaluate.batch_size": (1, 65536),
    "evaluate.likelihood_images": (1, 10_000_000),
    "evaluate.likelihood_evaluations": (4, 10_000),
}
CHOICES = {
    "data.channels": (1, 3, 4),
    "model.augmentation_place": ("before", "after"),
    "model.initialization": ("glorot", "torch"),
    "model.noise_embedding": ("auto", "sines"),
    "diffusion.variance": VARIANCES,
    "train.amp": dist.AMP,
    "train.cudnn_benchmark": dist.BENCHMARK,
    "train.activation_checkpointing": ("none", "auto", "all"),
    "evaluate.extractor": ("auto", *metrics.EXTRACTORS, "none"),
    "evaluate.likelihood": LIKELIHOODS,
    "wandb.mode": tracking.MODES,
}
SPECS = {
    "data.source": data.SOURCES,
    "model.name": MODELS,
    "diffusion.beta_schedule": SCHEDULES,
    "diffusion.predict": TARGETS,
    "diffusion.loss": LOSSES,
    "diffusion.weighting": WEIGHTINGS,
    "diffusion.times": TIMES,
    "train.optimizer": OPTIMIZERS,
    "train.learning_rate_decay": DECAYS,
    "sample.sampler": SAMPLERS,
    "sample.spacing": SPACINGS,
    "evaluate.sampler": SAMPLERS,
    "evaluate.spacing": SPACINGS,
}
REHEARSAL = [Level(0.0, math.sqrt(0.5), math.sqrt(0.5)), CLEAN]
LENGTHS = ("train.length", "train.warmup")
INTEGER_TUPLES = {
    "data.matte": (0, 255),
    "model.channel_mult": (1, 64),
    "model.res_blocks_per_level": (1, 64),
    "model.attention_resolutions": (1, 4096),
}
FRACTION_TUPLES = {  # apart, so that a number says which of the two it is
    "ema.more": (0.3, 0.999999999, (0.999, 0.9995)), "ema.profiles": (0.001, 0.288, (0.05, 0.1))}
KINDS = {bool: "True or False", int: "a whole number", float: "a number", str: "text", tuple: "a tuple such as (1, 2)"}


def check(config):
    """Raise a ValueError, one line with the remedy, for a value or a combination that cannot be run.

    Nothing is allocated; what only the network knows about its arguments is checked when `build` makes it.
    """
    knobs = flatten(config)
    for key, default in flatten(base()).items():
        if type(knobs[key]) is not type(default):
            raise ValueError(f"config.{key} is {knobs[key]!r}; it takes {KINDS[type(default)]}")
    check_ranges(knobs)
    for key, allowed in CHOICES.items():
        check_choice(f"config.{key}", knobs[key], list(allowed))
    if "/" in knobs["data.source"] and "(" not in knobs["data.source"]:
        raise ValueError(f"config.data.source is {knobs['data.source']!r}; for a folder of images write "
                         f"\"folder(path={knobs['data.source']!r})\"")
    for key, table in SPECS.items():
        if key in ("evaluate.sampler", "evaluate.spacing") and knobs[key] == "auto":
            continue
        with about(key):
            check_renamed(key, knobs[key])
            chosen = choose(f"config.{key}", table, knobs[key])
            if table is SAMPLERS:
                evaluations(chosen, REHEARSAL, knobs["diffusion.variance"] == "learned")  # which refuses what it cannot do
    for key, (low, high) in INTEGER_TUPLES.items():
        if len(knobs[key]) > 64 or not all(type(item) is int and low <= item <= high for item in knobs[key]):
            raise ValueError(
                f"config.{key} is {knobs[key]}; it takes whole numbers between {low} and {high}, such as (1, 2, 2)")
    for key, (low, high, example) in FRACTION_TUPLES.items():
        if not all(type(item) is float and low <= item <= high for item in knobs[key]):
            raise ValueError(f"config.{key} is {knobs[key]}; it takes numbers between {low} and {high}, such as {example}")
        if len({*knobs[key], knobs["ema.decay"]}) <= len(knobs[key]):
            raise ValueError(f"config.{key} is {knobs[key]} beside ema.decay {knobs['ema.decay']}; give each number once")
    if len(knobs["data.matte"]) != 3:
        raise ValueError(
            f"config.data.matte is {knobs['data.matte']}; it takes red, green and blue, such as (255, 255, 255)")
    if not knobs["model.channel_mult"]:
        raise ValueError("config.model.channel_mult is empty; it takes a factor for each level, such as (1, 2, 2)")
    if not all(type(tag) is str for tag in knobs["wandb.tags"]):
        raise ValueError(f"config.wandb.tags is {knobs['wandb.tags']}; it takes words, such as ('cats', 'small')")
    check_classes(knobs)
    check_sharded(knobs)
    for key in LENGTHS:
        with about(key):
            clock.parse_duration(knobs[key], times=False)
    if not clock.parse_duration(knobs["train.length"])[0]:
        raise ValueError(f"config.train.length is {knobs['train.length']!r}; it takes more than nothing, such as '1 step'")
    with about("train.learning_rate_decay"):
        name, arguments = parse(knobs["train.learning_rate_decay"])
        if "length" in arguments:
            arguments["length"] = clock.steps_of(arguments["length"], 1, 1)
        DECAYS[name](0, **arguments)
    for key in config["every"]:
        if (key, knobs[f"every.{key}"]) != ("evaluate", "auto"):
            with about(f"every.{key}"):
                clock.Every(knobs[f"every.{key}"], 1, 1)
    check_budget(knobs)
    if knobs["ema.profiles"] and clock.Every(knobs["every.snapshot"], 1, 1).never:
        raise ValueError(f"config.ema.profiles is {knobs['ema.profiles']}, but never stored; set config.every.snapshot, such "
                         "as '500 steps'")
    if knobs["train.deterministic"] and knobs["train.cudnn_benchmark"] == "on":
        raise ValueError("config.train.deterministic is True and config.train.cudnn_benchmark is 'on', which takes whichever "
                         "convolution was faster this time; set train.cudnn_benchmark=auto, or train.deterministic=False")
    if knobs["train.init_from"] and knobs["train.resume_from"]:
        raise ValueError(f"config.train.init_from is {knobs['train.init_from']!r} and config.train.resume_from "
                         f"{knobs['train.resume_from']!r}; choose init_from to start from weights alone, or resume_from to "
                         "continue with the optimizer, the averages and the step")
    size, parts = knobs["train.batch_size"], knobs["train.gradient_accumulation_steps"]
    if size % parts:
        raise ValueError(f"config.train.batch_size {size} cannot be cut into {parts} equal micro-batches; choose "
                         f"gradient_accumulation_steps among the divisors of {size}")
    with about("diffusion.beta_schedule"):
        process = Process(*get_schedule(*(knobs[f"diffusion.{key}"] for key in (
            "beta_schedule", "timesteps", "zero_terminal_snr"))))
    usual, measured = knobs["sample.spacing"], knobs["evaluate.spacing"]
    named = ("sample", usual) if measured == "auto" else ("evaluate", measured)
    for key, (section, spacing) in (("sample.steps", ("sample", usual)), ("evaluate.steps", named)):
        if knobs[key] > knobs["diffusion.timesteps"]:
            raise ValueError(f"config.{key} is {knobs[key]} with only {knobs['diffusion.timesteps']} timesteps; use "
                             f"{knobs['diffusion.timesteps']} or fewer")
        with about(f"{section}.spacing"):
            process.levels(knobs[key] or knobs["sample.steps"], spacing)


def check_ranges(knobs):
    """Raise a ValueError for a number among some knobs that lies out of its range."""
    for key in [key for key in RANGES if key in knobs]:
        low, high = RANGES[key]
        if not low <= knobs[key] <= high:
            raise ValueError(f"config.{key} is {knobs[key]}; it must lie between {low} and {high}")


def check_renamed(key, value):
    """Raise a ValueError for a value that has another name now."""
    for renamed, before, name, reused in RENAMED:
        if renamed == key and reused is None and parse(value)[0] == before:
            raise ValueError(f"config.{key} is {value!r}, which is called {name!r} now; write --config.{key}={name}")


def check_sharded(knobs):
    """Raise a ValueError for what a network that ranks share out cannot be."""
    if not knobs["train.fully_shard"]:
        return
    for key in ("train.compile", "train.channels_last"):
        if knobs[key]:
            raise ValueError(f"config.train.fully_shard and config.{key} are both True; choose one of them")
    if parse(knobs["model.name"])[0] == "unet_edm2":
        raise ValueError("config.train.fully_shard cannot be True with config.model.name 'unet_edm2', whose layers write into "
                         "their weights while they compute; choose another network, or train.fully_shard=False")


def check_budget(knobs):
    """Raise a ValueError for what leaves the budget of evaluations nothing to choose a number of images by."""
    count, often = knobs["evaluate.num_samples"], knobs["every.evaluate"]
    if 0 < count < metrics.FEWEST:
        raise ValueError(f"config.evaluate.num_samples is {count}; it takes {metrics.FEWEST} or more, or 0 for as many as "
                         "evaluate.budget allows")
    if count or often == "auto" or (every := clock.Every(often, 1, 1)).never:
        return
    if every.seconds:
        raise ValueError(f"config.every.evaluate is {often!r}, and no budget can tell how often that will be; give "
                         "evaluate.num_samples too, such as 10000")
    if not knobs["evaluate.budget"]:
        raise ValueError(f"config.every.evaluate is {often!r}, and evaluate.budget 0 allows no image; give "
                         "evaluate.num_samples, such as 10000, or a budget, such as 0.05")


def check_classes(knobs):
    """Raise a ValueError for what cannot be of guidance, and of classes as far as they are known yet."""
    learned, classes = knobs["data.class_labels"], knobs["data.classes"]
    for key in ("data.classes", "sample.classes", "evaluate.classes"):
        if not all(type(one) is str or type(one) is int and key != "data.classes" for one in knobs[key]):
            raise ValueError(f"config.{key} is {knobs[key]}; it takes the names of classes, such as ('cat', 'dog')")
        if knobs[key] and not learned:
            raise ValueError(f"config.{key} is {knobs[key]}, and the network knows no classes; leave it out, or train with "
                             "data.class_labels=True")
        if classes:
            with about(key):
                data.class_numbers(knobs[key], classes)
    between = knobs["sample.guidance_interval"]
    if between != () and not (len(between) == 2 and all(type(one) in (int, float) for one in between)
                              and 0 <= between[0] < between[1]):
        raise ValueError(f"config.sample.guidance_interval is {between}; it takes two noise levels sigma/alpha, the lower "
                         "first, such as (0.2, 5.0), or () for all")
    if knobs["sample.guidance"] == 1 or knobs["sample.guide"]:
        return
    given = f"config.sample.guidance is {knobs['sample.guidance']}, and the network"
    otherwise = "name a weaker run as sample.guide, or set sample.guidance=1"
    if not learned:
        raise ValueError(f"{given} knows no classes to be guided by; train with data.class_labels=True, {otherwise}")
    if not knobs["train.label_dropout"]:
        raise ValueError(f"{given} has never done without its label; train with train.label_dropout=0.1, {otherwise}")


@contextlib.contextmanager
def about(key):
    """A ValueError raised inside names the knob that it is about."""
    try:
        yield
    except ValueError as error:
        known = f"config.{key}" in str(error)
        raise ValueError(str(error) if known else f"config.{key}: {error}") from None


def flatten(config, prefix=""):
    """The knobs as a flat dict `{"train.batch_size": 64, ...}`."""
    flat = {}
    for key, value in config.items():
        nested = hasattr(value, "items")
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def freeze(config):
    """An unchangeable copy."""
    return FrozenConfigDict(config)


FORMAT = 2  # of saved configs; those that do not say are of format 1
RENAMED = (  # option, its value before and since, the first format in which the old value means something else (None: nothing)
    ("diffusion.weighting", "sigmoid", "sigmoid_eps", 2),
    ("model.name", "unet_mp", "unet_edm2", None),
)


def to_json(config):
    """The config as JSON text that `from_json` reads back to an equal config."""
    return json.dumps({"format": FORMAT} | config.to_dict(), indent=2)


def from_json(text):
    """The frozen config that a run folder or a checkpoint carries; knobs it does not know yet take their defaults, or what
    they were before they were knobs.

    Names that meant something else in its format are translated. It is data and never run. Raises ValueError for what is not
    such a config.
    """
    try:
        saved = json.loads(text if len(text) <= checkpoint.LONGEST else "")
        version, _, knobs = saved.pop("format", 1), saved.pop("code", None), flatten(saved)
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise ValueError("the saved config is not a JSON object; the file is damaged or not one of ours") from None
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ValueError(f"the saved config has the format {version!r}, and this version knows 1 to {FORMAT}; use the version "
                         "of ddpm that wrote it")
    for key, before, name, reused in RENAMED:
        if (reused is None or version < reused) and isinstance(knobs.get(key), str):
            knobs[key] = re.sub(rf"^\s*{before}\b", name, knobs[key])
    config = base()
    known = flatten(config)
    for key, value in knobs.items():
        if key not in known:
            raise ValueError(f"the saved config has a knob {key!r} that this version does not know"
                             f"{suggest(key, list(known))}; use the version of ddpm that wrote it")
        kind = type(known[key])
        if kind is tuple and isinstance(value, list) or kind is float and type(value) is int and abs(value) < 2**53:
            value = kind(value)
        if type(value) is not kind:
            raise ValueError(f"the saved config has {value!r} for {key}; it takes {KINDS[kind]}")
        config.update_from_flattened_dict({key: value})
    for key in BEFORE.keys() - knobs.keys():
        config.update_from_flattened_dict({key: BEFORE[key](config)})
    if version < 2 and same_groups(config):
        config.model.norm_num_groups = 0  # as configs are written now, so that a run goes on by the same command
    return freeze(config)


def same_groups(config):
    """Whether the 32 groups of a config are what 0, the default since format 2, comes to: in wide U-Nets and without norms."""
    model = config.model
    wide = bool(model.channel_mult) and norm_groups(min(model.channel_mult) * model.model_channels) == 32
    return model.norm_num_groups == 32 and (wide or parse(model.name)[0] != "unet")


BEFORE = {  # what a knob that a saved config lacks meant, where that is not its default
    "model.augmentation_place": lambda config: "after" if config.data.augment else "before",
    "model.norm_num_groups": lambda config: 32,
    "model.noise_embedding": lambda config: "sines" if parse(config.model.name)[0] == "unet_edm2" and parse(
        config.diffusion.predict)[0] == "edm" else "auto",
}


def read(path):
    """The frozen config in a file such as a run folder's config.json; raises ValueError as `from_json` does."""
    with open(path) as file:
        return from_json(file.read(checkpoint.LONGEST + 1))


def changed(config, knobs):
    """A frozen copy with other values for some knobs, `{"sample.steps": 25}`; None leaves a knob as it is.

    Raises ValueError where the result cannot be run.
    """
    copy = ConfigDict(config.to_dict()).lock()
    copy.update_from_flattened_dict({key: value for key, value in knobs.items() if value is not None})
    check(copy)
    return freeze(copy)


def tracked(config):
    """The config as W&B shows it: flat, under the names that a sweep's parameters have, and with its format."""
    knobs = {"format": FORMAT} | flatten(config)
    return {f"config.{key}": list(value) if isinstance(value, tuple) else value for key, value in knobs.items()}


COMMIT = re.compile(r"[0-9a-f]{7,40}( with changes [0-9a-f]{8})?")  # as `tracking.commit` tells it


def write(config, folder, code=None):
    """Save the config as the run folder's config.json, with the commits of the code that ran it, where they are known."""
    saved = json.loads(to_json(config)) | ({"code": code} if code else {})
    with written_beside(Path(folder, "config.json")) as part:
        part.write_text(json.dumps(saved, indent=2) + "\n")


def code_in(folder):
    """The commits that a run folder's config.json records, in the order in which they ran; () where it records none."""
    try:
        recorded = json.loads(Path(folder, "config.json").read_text()).get("code", ())
        return tuple(one for one in recorded if COMMIT.fullmatch(one))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return ()


def check_continues(config, folder):
    """Raise a ValueError that names the knobs in which a config contradicts the run that the folder holds already."""
    path = Path(folder, "config.json")
    if path.is_file():
        try:
            saved = read(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; give another --workdir, or delete it to continue with this config") from None
        differing = contradictions(saved, config)
        if differing:
            keys = contradicted(saved, config)
            same = f"add {as_flags(saved, keys)}" if len(keys) <= 3 else "give the same config"
            raise ValueError(f"{folder} holds a run with another config ({'; '.join(differing)}); "
                             f"give another --workdir or, to continue it, {same}")


def check_resumes(config, saved, path):
    """Raise a ValueError that names the options in which a config contradicts the run that a new folder continues."""
    begun = changed(config, {key: flatten(saved)[key] for key in ("train.init_from", "train.resume_from")})
    if differing := contradictions(saved, begun):
        raise ValueError(f"{path} is of a run with another config ({'; '.join(differing)}); to continue it, add "
                         f"{as_flags(saved, contradicted(saved, begun))}; to change that, start from its weights alone with "
                         "train.init_from")


def check_measures(config, folder):
    """Raise a ValueError where a folder that is to keep a measurement holds another one, or a training."""
    path = Path(folder, "config.json")
    try:
        another = path.exists() and flatten(read(path)) != flatten(config)
    except ValueError:  # of a damaged one
        another = True
    if another or Path(folder, "checkpoints").exists():
        raise ValueError(f"{folder} holds another run; give another --workdir")


def is_free(key):
    """True for a knob that may change between two starts of one run."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)


def contradicted(saved, given):
    """The knobs in which `given` differs from the config of the run it wants to continue, which knows where it began."""
    old, new = flatten(saved), flatten(given)
    return [key for key in new if not is_free(key) and key != PLACE and old[key] != new[key]
            and (key, new[key]) != ("train.resume_from", "")]


def contradictions(saved, given):
    """Lines naming the knobs in which `given` differs from the config of the run it wants to continue."""
    old, new = flatten(saved), flatten(given)
    return [f"{key}: {old[key]!r} there, {new[key]!r} here" for key in contradicted(saved, given)]


def as_flags(config, keys):
    """The words of a command line that set some knobs to what a config has."""
    knobs = flatten(config)
    return shlex.join(f"--config.{key}={knobs[key]}" for key in keys)


def run_name(file, overrides):
    """A run's name from its config file (`configs/cats128.py:small`) and the knobs set on the command line.

    What a folder's name cannot hold becomes `_`, or is cut; a checksum then keeps two runs from sharing a name.
    """
    path, _, variant = str(file).partition(":")
    leaves = [key.rpartition(".")[2] for key in flatten(base())]
    given = [(key, value) for key, value in sorted(overrides.items()) if not is_free(key)]
    parts, whole = [Path(path).stem + (f"-{variant}" if variant else "")], True
    for key, value in given:
        leaf = key.rpartition(".")[2]
        word = re.sub(r"[^\w.+-]+", "_", str(value), flags=re.ASCII).strip("_")
        whole = whole and (word == value or not isinstance(value, str))  # numbers and tuples stay told apart
        parts.append(f"{leaf if leaves.count(leaf) == 1 else key}={word}")
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(parts), flags=re.ASCII)
    if whole and name == "-".join(parts) and len(name) <= 120:
        return name
    return f"{name[:110]}-{zlib.crc32(repr((parts[0], given)).encode()):08x}"


def default_workdir(file, overrides):
    """`runs/NAME`; inside a W&B agent NAME ends with the agent's run id, so that a repeated sweep is a new run."""
    run_id = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return Path("runs") / (run_name(file, overrides) + (f"-{run_id}" if run_id else ""))
