"""The options of a run: `base()` shows them all, and it is the only place with defaults.

A config file offers `get_config(variant=None)`, which returns `base()` and the lines that differ.
Here configs are also checked, frozen, written as JSON and named.
"""

from ml_collections import ConfigDict, FrozenConfigDict

from ddpm.common.registry import check_choice


def base():
    """A new ConfigDict, locked, with every option, its default, unit and choices."""
    return ConfigDict(
        {
            "seed": 0,  # every random number of the training is an address below it
            "data": {
                # digits, folder(path='data/cats'), torchvision(name='CIFAR10'),
                # streaming(path='data/shards')
                "source": "digits",
                "image_size": 16,  # pixels a side
                "channels": 1,  # 1 grey, 3 colour, 4 colour and transparency
                "matte": (255, 255, 255),  # red, green, blue (0 to 255) behind transparent pixels
                "flip": False,  # mirror images left to right at random: for photos, not for digits
                # learn the classes too: a folder's sub-folders, or a data set's labels
                "class_labels": False,
                "classes": (),  # their names in order, which a training fills in from its data
                # how likely each transformation of an image is, which the network is told: 0.12;
                # half are mirrored
                "augment": 0.0,
                # share of the images held out for the validation loss; 0 holds none
                "validation_fraction": 0.1,
                # decoded images in a file: auto ($DDPM_CACHE, else ~/.cache/ddpm), none, or a
                # folder
                "cache": "auto",
                "num_workers": 0,  # processes that read images; 0 reads in the training process
            },
            "model": {
                # unet, unet_edm2, dit(size='S', patch_size=2), whose depth, width and heads can be
                # given too
                "name": "unet",
                "dropout": 0.0,  # share of activations dropped in every block
                "qk_norm": False,  # attention: each head's queries and keys are normed
                # of data.augment: before the layers of the time embedding, as in EDM, or after
                "augmentation_place": "before",
                # from here on: the U-Nets' alone
                "model_channels": 64,  # width of the first level
                # width of each level in model_channels; each level after the first halves the image
                "channel_mult": (1, 2, 2),
                "num_res_blocks": 2,  # residual blocks a level
                # residual blocks of each level, where they differ: as many as channel_mult; or ()
                "res_blocks_per_level": (),
                # sizes of feature maps, in pixels, that get self-attention
                "attention_resolutions": (8,),
                "num_heads": 1,  # attention heads, where num_head_channels is 0
                "num_head_channels": 0,  # channels a head; 0 counts by num_heads
                # the time scales and shifts the norm, instead of being added
                "use_scale_shift_norm": False,
                # residual blocks change the resolution, instead of single convolutions
                "resblock_updown": False,
                # frequencies of the time embedding: 1 as in Ho's code, 0 as in OpenAI's
                "freq_shift": 1,
                # zeros where an image is halved: 0 at its far end, as Ho's, 1 at both, as OpenAI's
                "downsample_padding": 0,
                # groups of a norm, at most; 0 is 32, of 4 channels or more: a group of 1 removes
                # the time
                "norm_num_groups": 0,
                # unet_edm2: auto is random Fourier features with predict=edm, else sines; or sines
                "noise_embedding": "auto",
                # added to the variance of a group: 1e-6 as in Ho's code, 1e-5 as in OpenAI's
                "norm_eps": 1e-6,
                # of new weights: glorot as in Ho's code, torch as in OpenAI's
                "initialization": "glorot",
            },
            "diffusion": {
                "timesteps": 1000,  # T, noise levels: 1 to 10000
                # linear, quadratic, cosine, sigmoid, laplace, shifted_cosine(resolution=128), flow,
                # edm
                "beta_schedule": "cosine",
                # rescale the schedule so that it ends in pure noise; not with eps and edm
                "zero_terminal_snr": False,
                # what the network predicts: eps, x0, v, flow, edm(sigma_data=0.5)
                "predict": "eps",
                # of a step of the sampler ddpm: small, large, learned (by hybrid or vlb)
                "variance": "small",
                "loss": "mse",  # mse, hybrid(vlb_weight=0.001), vlb
                # simple, min_snr(gamma=5.0), soft_min_snr, p2, sigmoid, sigmoid_eps, edm,
                # uncertainty
                "weighting": "simple",
                # uniform, stratified, antithetic, logit_normal, lognormal, importance
                "times": "uniform",
                "self_condition": False,  # the network sees its last estimate of the image too
                # the network is given 1000 t / T in place of t, as in OpenAI's code
                "rescale_timesteps": False,
                "clip": True,  # samples: predicted images are clipped to [-1, 1] at each step
            },
            "train": {
                "length": "10000 steps",  # steps, epochs or images
                "batch_size": 64,  # images an optimiser step, over all micro-batches and ranks
                # micro-batches the batch is cut into: less memory, same numbers but for dropout
                "gradient_accumulation_steps": 1,
                # adamw, adam; options betas, eps, weight_decay
                "optimizer": "adamw(weight_decay=0.0)",
                "learning_rate": 2e-4,
                "warmup": "500 steps",  # the rate rises linearly from 0
                # constant, cosine(length='10000 steps'), linear(...), inverse_sqrt(...)
                "learning_rate_decay": "constant",
                "gradient_clip": 1.0,  # largest norm of the gradient; 0 never clips
                # steps are skipped whose loss or gradient norm is so many times the largest of
                # late; 0 skips none
                "spike": 30.0,
                # where it diverges it goes back, once, and on in another order at this share of the
                # rate; 0 stops
                "rollback": 0.5,
                "amp": "auto",  # type of the network's arithmetic: auto, off, bf16, fp16
                "deterministic": False,  # on a GPU, bitwise repeatable and slower
                # on a GPU, cuDNN tries its convolutions and takes the fastest: auto (on), on, off
                "cudnn_benchmark": "auto",
                # torch.compile: a minute or more at the start, then fewer kernels; rounds
                # differently
                "compile": False,
                # memory format of convolutions: may pay in half precision on a GPU; rounds
                # differently
                "channels_last": False,
                # levels computed twice to save memory: none, all, auto (as the GPU needs)
                "activation_checkpointing": "auto",
                # GPUs: each keeps a part of weights, averages, optimiser: for what fits no single
                # one
                "fully_shard": False,
                # share of class labels dropped, for guidance: the network learns to do without too
                "label_dropout": 0.1,
                # saves and stops with exit code 75 before the process is so old; 0 is no limit
                "max_hours": 0.0,
                "init_from": "",  # run folder or file whose EMA weights a new run begins with
                # checkpoint, or run folder for its newest, at which a new run folder continues that
                # run
                "resume_from": "",
            },
            "ema": {
                "decay": 0.9999,  # of the averaged weights, a step
                # average over fewer steps at first: decay at most (1 + n) / (10 + n) at step n
                "warmup": True,
                # half-life at most this share of the steps so far: 0.05 as in EDM's code; 0 sets no
                # limit
                "rampup": 0.0,
                "more": (),  # further decays averaged beside it, from 0.3 up, for --ema=0.999
                # power-function averages to store, by sigma_rel: (0.05, 0.1) makes any --ema up to
                # 0.288
                "profiles": (),
            },
            "sample": {
                # ddpm, ddim(eta=0.0), euler, euler_ancestral, heun(churn=0.0), dpmpp(order=2),
                # dpmpp_sde, unipc
                "sampler": "ddim",
                # of the sampler, at most diffusion.timesteps; each is one network evaluation, or
                # two by heun and dpm2
                "steps": 50,
                # linear, trailing, leading, quadratic, karras(rho=7.0), sections(counts=(10, 8, 4,
                # 2, 1))
                "spacing": "linear",
                "classes": (),  # drawn in turn, names or numbers; empty is all of them
                # scale: 1 is none and asks one network once; above 1 follows the class, or leaves
                # the guide, more
                "guidance": 1.0,
                # noise levels sigma/alpha between which to guide, such as (0.2, 5.0); empty is all
                "guidance_interval": (),
                # run folder or file of a weaker training that guides, in place of the network
                # without labels
                "guide": "",
                "num_images": 64,  # in the grids drawn while training
                "batch_size": 64,  # images drawn at once
                # torch.compile and, on a GPU, CUDA graphs: for many images, as the first wait a
                # minute or more
                "compile": False,
                # weights after training: 0 is ema.decay's, from 0.3 another of ema.more, below a
                # sigma_rel
                "ema": 0.0,
                # of the latents, apart from the training's seed so that grids of different seeds
                # compare
                "seed": 0,
            },
            "evaluate": {
                # auto (digits for the digits, else inception), digits, inception, none (nothing is
                # drawn)
                "extractor": "auto",
                # path of torch-fidelity's Inception weights; empty looks in its cache, then
                # downloads
                "inception_weights": "",
                # share of the training's operations that evaluations may take: chooses what is auto
                # or 0, below
                "budget": 0.05,
                # images drawn for the Frechet distance; 0 is from 1,000 up, by the budget
                "num_samples": 0,
                # as sample.sampler; auto is that, or dpmpp where the budget is small
                "sampler": "auto",
                "steps": 0,  # as sample.steps; 0 is that, or 20 where the budget is small
                # as sample.spacing; auto is that, or karras where the budget chooses the sampler
                "spacing": "auto",
                # the only ones drawn, and measured against; empty is all, in the proportions of the
                # data
                "classes": (),
                "batch_size": 256,  # images drawn and measured at once
                # bits/dim of held-out images: none, bound (of ancestral sampling), flow (of the
                # ODE), both
                "likelihood": "none",
                "likelihood_images": 256,  # held-out images that it is the mean of, at most
                # of the network, an image: at so many t, and in a quarter of steps of the ODE
                "likelihood_evaluations": 100,
            },
            # intervals in steps, epochs, images or minutes, several joined by commas; "0 steps" is
            # never
            "every": {
                "log": "50 steps",
                "sample": "1000 steps",
                "validate": "500 steps",
                # auto is up to 20 times, the last at the end, by evaluate.budget
                "evaluate": "auto",
                "save": "5000 steps, 10 minutes",
                "snapshot": "0 steps",  # storing ema.profiles: 16 to 64 times a training
                "milestone": "0 steps",  # checkpoints that are kept for good
            },
            "wandb": {
                # auto (online when logged in, else offline), online, offline, disabled
                "mode": "auto",
                "project": "",  # empty is $WANDB_PROJECT, else ddpm
                "entity": "",  # user or team; empty is the default of the login
                "name": "",  # of the run; empty is $WANDB_NAME, else the run folder's
                "group": "",  # runs shown together
                "tags": (),  # words
                "notes": "",  # a sentence about the run
            },
        }
    ).lock()


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


PLACE = "data.source"  # of which a checkpoint keeps the content: that decides whether a run goes on


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


# option, its value before and since, the first format in which the old value means something else
# (None: nothing)
RENAMED = (
    ("diffusion.weighting", "sigmoid", "sigmoid_eps", 2),
    ("model.name", "unet_mp", "unet_edm2", None),
)
