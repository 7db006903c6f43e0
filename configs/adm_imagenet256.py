"""ImageNet at 256 pixels as Dhariwal & Nichol 2021 trained it (ADM): 553.8 M parameters,
class-conditional, 1,980,000 steps.

The images lie in data/imagenet, one sub-folder a class. Labels are dropped one time in ten, for
classifier-free guidance; their own guidance is by a classifier.
"""

from ddpm.config.defaults import base, with_variant


def get_config(variant=None):
    config = base()
    config.data.source = "folder(path='data/imagenet')"
    config.data.image_size = 256
    config.data.channels = 3
    config.data.flip = True
    config.data.class_labels = True
    config.data.validation_fraction = 0.01
    config.data.num_workers = 8
    config.model.model_channels = 256
    config.model.channel_mult = (1, 1, 2, 2, 4, 4)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (32, 16, 8)
    config.model.num_head_channels = 64
    config.model.dropout = 0.0
    config.model.use_scale_shift_norm = True
    config.model.resblock_updown = True
    config.model.conventions = "openai"
    config.diffusion.beta_schedule = "linear"
    config.diffusion.variance = "learned"
    config.diffusion.loss = "hybrid"
    config.train.length = "1980000 steps"
    config.train.batch_size = 256
    config.train.gradient_accumulation_steps = 4  # of 8 images on each of eight GPUs
    config.train.learning_rate = 1e-4
    config.train.warmup = "0 steps"
    config.train.gradient_clip = 0.0
    config.train.label_dropout = 0.1
    config.ema.decay = 0.9999
    config.ema.warmup = False
    config.sample.sampler = "ddpm"
    config.sample.steps = 250
    config.sample.num_images = 16
    config.sample.batch_size = 16
    config.evaluate.batch_size = 32
    config.every.log = "100 steps"
    config.every.sample = "10000 steps"
    config.every.validate = "10000 steps"
    return with_variant(config, variant, {})
