"""The options of a run, a line each: default, range or choices, and a comment with the unit.

`base()` returns the defaults as a config. A config file offers `get_config(variant=None)`, which
returns `base()` with some options changed. Nothing here imports torch: names with a dot, such as
`diffusion.schedules.SCHEDULES`, are the tables below `ddpm` that hold the choices.
"""

import math
from functools import partial
from typing import NamedTuple

from ml_collections import ConfigDict, FieldReference, FrozenConfigDict

from ddpm.common.registry import check_choice


class Option(NamedTuple):
    """An option of the config: the kind of its check, its default and what else it may be."""

    kind: str  # of its check, an entry of KINDS in check.py
    default: object
    low: float | None = None  # of a number, and of each in a tuple of numbers
    high: float | None = None
    choices: tuple = ()  # values, and tables whose keys are values

    @property
    def types(self):
        """The types that a value may have."""
        return (str, bool) if self.kind == "measured" else (type(self.default),)

    @property
    def takes(self):
        """The types in words, for messages."""
        return "auto, True or False" if self.kind == "measured" else TYPES[type(self.default)]


def choice(default, *choices):
    """One of some values."""
    return Option("choice", default, choices=choices)


def entry(default, *choices):
    """A name in a table, with arguments where the entry has some: `sigmoid(tau=0.5)`."""
    return Option("entry", default, choices=choices)


number = partial(Option, "number")  # default, lowest, highest
numbers = partial(Option, "numbers")  # a tuple: default, lowest and highest of each
flag = partial(Option, "flag")  # True or False
# auto: a GPU measures what is fastest when a training begins, and a CPU takes False; or a value
measured = partial(Option, "measured", "auto")
text = partial(Option, "text", "")
words = partial(Option, "words", ())
length = partial(Option, "length")  # a duration: "20000 steps", "500 epochs", "2000000 images"
interval = partial(Option, "interval")  # durations joined by commas, also of time; "0 steps": never

OPTIONS = {
    # every random number of the training follows from it
    "seed": number(0, 0, 2**63 - 1),
    # --- data ---
    # digits, folder(path='data/cats'), torchvision(name='CIFAR10'), streaming(path='data/shards')
    "data.source": entry("digits", "data.SOURCES"),
    "data.image_size": number(16, 1, 4096),  # pixels a side
    "data.channels": choice(1, 1, 3, 4),  # 1 grey, 3 colour, 4 colour and transparency
    # red, green, blue behind transparent pixels
    "data.background": numbers((255, 255, 255), 0, 255),
    "data.flip": flag(False),  # mirror images left to right at random: for photos, not for digits
    # learn the classes too: the sub-folders of a folder, or the labels of a data set
    "data.class_labels": flag(False),
    "data.classes": words(),  # their names in order; a training fills them in from its data
    # probability of each of EDM's augmentations, on which the network is conditioned: 0.12 in EDM
    "data.augment": number(0.0, 0, 0.9),
    "data.validation_fraction": number(0.1, 0, 0.9),  # share of the images that is held out
    # decoded images in a file: auto ($DDPM_CACHE, else ~/.cache/ddpm), none, or a folder
    "data.cache": Option("text", "auto"),
    "data.num_workers": number(0, 0, 256),  # threads that read images; 0 is the training itself
    # --- model ---
    # unet, unet_edm2, dit(size='S', patch_size=2), whose depth, width and heads can be given too
    "model.name": entry("unet", "models.MODELS"),
    "model.dropout": number(0.0, 0, 0.99),  # share of activations dropped in every block
    "model.qk_norm": flag(False),  # attention normalizes the queries and keys of each head
    # details of a code: ho, openai; arguments norm_num_groups, initialization and others, which
    # ddpm/models/conventions.py has
    "model.conventions": entry("ho", "models.conventions.CONVENTIONS"),
    # from here on: of the U-Nets alone
    "model.model_channels": number(64, 1, 65536),  # width of the first level
    # width of each level in model_channels; each level after the first halves the image
    "model.channel_mult": numbers((1, 2, 2), 1, 64),
    "model.num_res_blocks": number(2, 1, 64),  # residual blocks a level
    # residual blocks of each level, where they differ: as many as channel_mult; or ()
    "model.res_blocks_per_level": numbers((), 1, 64),
    "model.attention_resolutions": numbers((8,), 1, 4096),  # pixels a side that get self-attention
    "model.num_heads": number(1, 1, 1024),  # attention heads, where num_head_channels is 0
    "model.num_head_channels": number(0, 0, 65536),  # channels a head; 0 counts by num_heads
    "model.use_scale_shift_norm": flag(False),  # time scales and shifts the norm; else it is added
    "model.resblock_updown": flag(False),  # residual blocks resample, instead of convolutions
    # --- diffusion ---
    "diffusion.timesteps": number(1000, 1, 10_000),  # T, noise levels
    # linear, quadratic, cosine, sigmoid, laplace, shifted_cosine(resolution=128), flow, edm
    "diffusion.beta_schedule": entry("cosine", "diffusion.schedules.SCHEDULES"),
    # rescale the schedule so that it ends in pure noise; not with eps and edm
    "diffusion.zero_terminal_snr": flag(False),
    # what the network predicts: eps, x0, v, flow, edm(sigma_data=0.5)
    "diffusion.predict": entry("eps", "diffusion.targets.TARGETS"),
    # variance of a step of the sampler ddpm: small, large; learned needs the loss hybrid or vlb
    "diffusion.variance": choice("small", "diffusion.process.VARIANCES"),
    # mse, hybrid(vlb_weight=0.001), vlb
    "diffusion.loss": entry("mse", "diffusion.losses.LOSSES"),
    # simple, min_snr(gamma=5.0), soft_min_snr, p2, sigmoid, sigmoid_eps, edm, uncertainty
    "diffusion.weighting": entry("simple", "diffusion.weightings.WEIGHTINGS"),
    # uniform, stratified, antithetic, logit_normal, lognormal, importance
    "diffusion.times": entry("uniform", "diffusion.timesteps.TIMES"),
    "diffusion.self_condition": flag(False),  # the network sees its last estimate of the image too
    "diffusion.rescale_timesteps": flag(False),  # the network sees 1000 t / T, as in OpenAI's code
    "diffusion.clip": flag(True),  # predicted images are clipped to [-1, 1] at each sampler step
    # --- train ---
    "train.length": length("10000 steps"),
    # images an optimizer step, over all micro-batches and ranks
    "train.batch_size": number(64, 1, 2**20),
    # micro-batches the batch is cut into: less memory, same numbers except for dropout; a GPU that
    # measures compile or channels_last takes fewer where these fit and are faster
    "train.gradient_accumulation_steps": number(1, 1, 2**20),
    # adamw, adam; arguments betas, eps, weight_decay
    "train.optimizer": entry("adamw(weight_decay=0.0)", "training.optim.OPTIMIZERS"),
    "train.learning_rate": number(2e-4, 0, 1),
    "train.warmup": length("500 steps"),  # the rate rises linearly: n steps begin with 1/n of it
    # constant, cosine(length='10000 steps'), linear(...), inverse_sqrt(...)
    "train.learning_rate_decay": entry("constant", "training.optim.DECAYS"),
    # largest norm of the gradient; 0 never clips
    "train.gradient_clip": number(1.0, 0, math.inf),
    # skip steps whose loss or gradient norm is this many times the recent maximum; 0 skips none
    "train.spike_threshold": number(30.0, 0, 1_000_000),
    # after divergence, go back once and on in another order at this share of the rate; 0 stops
    "train.rollback": number(0.5, 0, 1),
    # type of the network's arithmetic
    "train.amp": choice("auto", "runtime.device.AMP"),
    # on a GPU, bitwise repeatable and slower: cuDNN does not try its convolutions for the fastest
    "train.deterministic": flag(False),
    # torch.compile: a minute or more at the start, then fewer kernels; rounds differently. True
    # compiles the network as one graph, stages each of its stages
    "train.compile": measured(choices=("auto", True, False, "stages")),
    # memory format of convolutions: may pay in half precision on a GPU; rounds differently
    "train.channels_last": measured(choices=("auto", True, False)),
    # levels computed twice to save memory: auto is as many as the GPU needs
    "train.activation_checkpointing": choice("auto", "none", "auto", "all"),
    # each GPU keeps a part of weights, averages and optimizer: for what fits no single one
    "train.fully_shard": flag(False),
    # type in which ranks exchange gradients: bf16 halves the traffic of a slow link, and rounds
    "train.gradient_compression": choice("none", "none", "bf16"),
    # share of class labels dropped, for guidance: the network learns to do without too
    "train.label_dropout": number(0.1, 0, 0.99),
    # saves and stops with exit code 75 before the process is so many hours old; 0 is no limit
    "train.max_hours": number(0.0, 0, 10_000),
    "train.init_from": text(),  # run folder or file whose EMA weights a new run begins with
    # checkpoint, or run folder for its newest, at which a new run folder continues that run
    "train.resume_from": text(),
    # --- ema ---
    "ema.decay": number(0.9999, 0, 0.999999999),  # of the averaged weights, a step
    "ema.warmup": flag(True),  # at step n, decay at most (1 + n) / (10 + n)
    # half-life at most this share of the steps until now: 0.05 in EDM's code; 0 sets no limit
    "ema.rampup": number(0.0, 0, 1),
    # further decays to average with, for --ema=0.999
    "ema.extra_decays": numbers((), 0.3, 0.999999999),
    # power-function averages to store, by sigma_rel: (0.05, 0.1) makes any --ema up to 0.288
    "ema.sigma_rels": numbers((), 0.001, 0.288),
    # --- sample ---
    # ddpm, ddim(eta=0.0), euler, euler_ancestral, heun(churn=0.0), dpmpp(order=2), dpmpp_sde, unipc
    "sample.sampler": entry("ddim", "diffusion.samplers.SAMPLERS"),
    # at most diffusion.timesteps; each evaluates the network once, or twice in heun and dpm2
    "sample.steps": number(50, 1, 10_000),
    # linear, trailing, leading, quadratic, karras(rho=7.0), sections(counts=(10, 8, 4, 2, 1))
    "sample.spacing": entry("linear", "diffusion.spacings.SPACINGS"),
    "sample.classes": words(),  # drawn in turn, names or numbers; empty is all of them
    # 1 is none; above 1 follows the class, or leaves the guide, more
    "sample.guidance": number(1.0, 0, 1000),
    # two noise levels sigma/alpha between which to guide, such as (0.2, 5.0); empty is all
    "sample.guidance_interval": Option("levels", ()),
    # run folder or file of a weaker training that guides, in place of the network without labels
    "sample.guide_checkpoint": text(),
    "sample.num_images": number(64, 1, 4096),  # in the grids drawn while training
    "sample.batch_size": number(64, 1, 65536),  # images drawn at once
    # torch.compile, with CUDA graphs on a GPU: for many images, as the first wait minutes
    "sample.compile": flag(False),
    # averaged weights: 0 is ema.decay's, from 0.3 one of ema.extra_decays, below that a sigma_rel
    "sample.ema": number(0.0, 0, 0.999999999),
    # of the noise, apart from the training's seed so that grids of different seeds compare
    "sample.seed": number(0, 0, 2**63 - 1),
    # --- evaluate ---
    # auto is digits for the digits, else inception; none draws nothing. inception(weights='PATH')
    # reads torch-fidelity's file there, else from its cache, else downloads it
    "evaluate.extractor": entry("auto", "auto", "none", "evaluation.extractors.EXTRACTORS"),
    # share of the training's operations that evaluations may take, where every.evaluate is auto
    "evaluate.budget": number(0.05, 0, 1),
    # images drawn for the Frechet distance; 0 is 10,000, or the number in the data if smaller
    "evaluate.num_samples": number(0, 0, 10_000_000),
    # as sample.sampler; auto is dpmpp in 20 steps on karras spacing where the spacing is auto too
    "evaluate.sampler": entry("auto", "auto", "diffusion.samplers.SAMPLERS"),
    # as sample.steps; 0 is 20 where sampler and spacing are both auto, else sample.steps
    "evaluate.steps": number(0, 0, 10_000),
    # as sample.spacing; auto is karras where the sampler is auto too, else sample.spacing
    "evaluate.spacing": entry("auto", "auto", "diffusion.spacings.SPACINGS"),
    # classes drawn and measured against; empty is all, in the proportions of the data
    "evaluate.classes": words(),
    "evaluate.batch_size": number(256, 1, 65536),  # images drawn and measured at once
    # bits/dim of held-out images: bound (of ancestral sampling), flow (of the ODE), both
    # by argument images=256 the mean of so many at most, and by nfe=100 so many network evaluations
    # an image: at as many t, or in a quarter of as many steps of the ODE
    "evaluate.likelihood": entry("none", "diffusion.likelihood.LIKELIHOODS"),
    # --- intervals in steps, epochs, images or minutes ---
    "every.log": interval("50 steps"),
    "every.sample": interval("1000 steps"),
    "every.validate": interval("500 steps"),
    "every.evaluate": interval("auto"),  # auto is up to 20 times and at the end, by evaluate.budget
    "every.save": interval("5000 steps, 10 minutes"),
    "every.snapshot": interval("0 steps"),  # stores ema.sigma_rels: 16 to 64 times a training
    "every.milestone": interval("0 steps"),  # checkpoints that are never deleted
    # --- wandb ---
    # auto is online when logged in, else offline
    "wandb.mode": choice("auto", "tracking.wandb.MODES"),
    "wandb.project": text(),  # empty is $WANDB_PROJECT, else ddpm
    "wandb.entity": text(),  # user or team; empty is the default of the login
    "wandb.name": text(),  # of the run; empty is $WANDB_NAME, else the run folder's
    "wandb.group": text(),  # runs shown together
    "wandb.tags": words(),
}


def base():
    """A new ConfigDict, locked, with every option at its default."""
    sections = {}
    for key, option in OPTIONS.items():
        section, _, leaf = key.rpartition(".")
        # ConfigDict keeps the type of a value, except of a reference to an object
        value = FieldReference("auto", object) if option.kind == "measured" else option.default
        (sections.setdefault(section, {}) if section else sections)[leaf] = value
    return ConfigDict(sections).lock()


def with_variant(config, variant, variants):
    """Set the options of a config file's variant, `variants[variant]` as `{"model.model_channels":
    64}`; None sets nothing.

    Raises ValueError for a variant that the file does not have.
    """
    if variant is not None:
        if not variants:
            raise ValueError(f"this config file has no variants; leave out ':{variant}'")
        config.update_from_flattened_dict(
            variants[check_choice("variant", variant, list(variants))]
        )
    return config


PLACE = "data.source"  # may change where a checkpoint's fingerprint of the images stays the same


TYPES = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a tuple such as (1, 2)",
}


def flatten(config, prefix=""):
    """The options as a flat dict `{"train.batch_size": 64, ...}`."""
    flat = {}
    for key, value in config.items():
        nested = hasattr(value, "items")
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return flat


def freeze(config):
    """An unchangeable copy."""
    return FrozenConfigDict(config)


# (option, old value, new value, format): configs saved before that format of a checkpoint mean the
# new value by the old one; None: all configs do
RENAMED_VALUES = (
    ("diffusion.weighting", "sigmoid", "sigmoid_eps", 2),
    ("model.name", "unet_mp", "unet_edm2", None),
)

# option of an earlier version: the option that has its value now, or `option(argument)`; or ""
RENAMED_OPTIONS = {
    "data.matte": "data.background",
    "model.augmentation_place": "model.conventions(augmentation_place)",
    "model.downsample_padding": "model.conventions(downsample_padding)",
    "model.freq_shift": "model.conventions(freq_shift)",
    "model.initialization": "model.conventions(initialization)",
    "model.noise_embedding": "model.conventions(noise_embedding)",
    "model.norm_eps": "model.conventions(norm_eps)",
    "model.norm_num_groups": "model.conventions(norm_num_groups)",
    "train.cudnn_benchmark": "",
    "train.spike": "train.spike_threshold",
    "ema.more": "ema.extra_decays",
    "ema.profiles": "ema.sigma_rels",
    "sample.guide": "sample.guide_checkpoint",
    "evaluate.inception_weights": "evaluate.extractor(weights)",
    "evaluate.likelihood_images": "evaluate.likelihood(images)",
    "evaluate.likelihood_evaluations": "evaluate.likelihood(nfe)",
    "wandb.notes": "",  # W&B reads $WANDB_NOTES
}


def moved(key):
    """A note on what an option of an earlier version is now, `" (it is data.background now)"`; ""
    for another key.
    """
    now = RENAMED_OPTIONS.get(key.removeprefix("config."))
    if now == "":
        return " (it was removed)"
    if now is None:
        return ""
    option, _, argument = now.rstrip(")").partition("(")
    if argument:
        return f" (it is an argument now: {option}='NAME({argument}=...)')"
    return f" (it is {now} now)"
