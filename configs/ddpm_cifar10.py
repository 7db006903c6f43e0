"""CIFAR-10 as Ho et al. 2020 trained it: 35.7 M parameters, 800,000 steps."""

from ddpm.config.defaults import base, with_variant

# what differs; `dit` spends what the U-Net spends, within 3 percent, at its paper's rate
VARIANTS = {
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
    config.model.dropout = 0.1
    config.diffusion.beta_schedule = "linear"
    config.train.length = "800000 steps"
    config.train.batch_size = 128
    config.train.optimizer = "adam"
    config.train.learning_rate = 2e-4
    config.train.warmup = "5000 steps"
    config.train.gradient_clip = 1.0
    config.ema.decay = 0.9999
    config.ema.warmup = False
    config.sample.sampler = "ddpm(variance='large')"
    config.sample.steps = (
        1000  # the paper's FID: 50,000 images drawn so, by ddpm.evaluate afterwards
    )
    config.every.log = "100 steps"
    config.every.sample = "20000 steps"
    config.every.validate = "10000 steps"
    return with_variant(config, variant, VARIANTS)
