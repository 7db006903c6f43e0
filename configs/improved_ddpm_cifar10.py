"""CIFAR-10 as Nichol & Dhariwal 2021 trained it: 52.5 M parameters, learned variance, cosine, T =
4000, 500,000 steps.

`:vlb` is their L_vlb: the bound alone, with times by the second moment of the loss.
"""

from ddpm.config.defaults import base, with_variant

VARIANTS = {"vlb": {"diffusion.loss": "vlb", "diffusion.times": "importance"}}


def get_config(variant=None):
    config = base()
    config.data.source = "torchvision(name='CIFAR10')"
    config.data.image_size = 32
    config.data.channels = 3
    config.data.validation_fraction = (
        0.0  # all 50,000 images are learned from; 0.02 brings val/loss, eval/copying and best
    )
    config.model.model_channels = 128
    config.model.channel_mult = (1, 2, 2, 2)
    config.model.num_res_blocks = 3
    config.model.attention_resolutions = (16, 8)
    config.model.num_heads = 4
    config.model.dropout = 0.3
    config.model.use_scale_shift_norm = True
    config.model.conventions = "openai"
    config.diffusion.timesteps = 4000
    config.diffusion.beta_schedule = "cosine"
    config.diffusion.variance = "learned"
    config.diffusion.loss = "hybrid"
    config.diffusion.rescale_timesteps = True
    config.train.length = "500000 steps"
    config.train.batch_size = 128
    config.train.learning_rate = 1e-4
    config.train.warmup = "0 steps"
    config.train.gradient_clip = 0.0
    config.ema.decay = 0.9999
    config.ema.warmup = False
    config.sample.sampler = "ddpm"
    config.sample.steps = 250
    config.evaluate.sampler = "ddpm"
    config.evaluate.steps = 250
    config.every.log = "100 steps"
    config.every.sample = "20000 steps"
    config.every.validate = "10000 steps"
    return with_variant(config, variant, VARIANTS)
