"""CIFAR-10 as a rectified flow (Liu et al. 2023): straight paths, the velocity as target, Euler's
method; on Ho's network.

`:logit_normal` draws the middle of the path more often (Esser et al. 2024); `:dit` is on a
transformer (Ma et al. 2024, SiT).
"""

from ddpm.config.defaults import base, with_variant

VARIANTS = {
    "logit_normal": {"diffusion.times": "logit_normal"},
    "dit": {
        "model.name": "dit(size='S', patch_size=2)",
        "model.dropout": 0.0,
        "train.learning_rate": 1e-4,
    },
}


def get_config(variant=None):
    config = base()
    config.data.source = "torchvision(name='CIFAR10')"
    config.data.image_size = 32
    config.data.channels = 3
    config.data.flip = True
    config.data.validation_fraction = (
        0.0  # all 50,000 images are learned from; 0.02 brings val/loss, eval/copying and best
    )
    config.model.model_channels = 128
    config.model.channel_mult = (1, 2, 2, 2)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16,)
    config.model.dropout = 0.15
    config.diffusion.beta_schedule = "flow"
    config.diffusion.predict = "flow"
    config.diffusion.clip = False
    config.train.length = "800000 steps"
    config.train.batch_size = 128
    config.train.optimizer = "adam"
    config.train.learning_rate = 2e-4
    config.train.warmup = "5000 steps"
    config.ema.decay = 0.999999
    config.sample.sampler = "euler"
    config.sample.steps = 100
    config.sample.spacing = "trailing"
    config.every.log = "100 steps"
    config.every.sample = "20000 steps"
    config.every.validate = "10000 steps"
    return with_variant(config, variant, VARIANTS)
