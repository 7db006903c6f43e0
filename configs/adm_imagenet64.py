"""ImageNet at 64 pixels as Dhariwal & Nichol 2021 trained it (ADM): 295.9 M parameters,
class-conditional, 540,000 steps.

The images lie in data/imagenet, one sub-folder a class. Labels are dropped one time in ten, for
classifier-free guidance; their own guidance is by a classifier.
"""

from ddpm.config.defaults import base, with_variant


def get_config(variant=None):
    config = base()
    config.data.source = "folder(path='data/imagenet')"
    config.data.image_size = 64
    config.data.channels = 3
    config.data.flip = True
    config.data.class_labels = True
    config.data.validation_fraction = 0.01
    config.data.num_workers = 8
    config.model.model_channels = 192
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.num_res_blocks = 3
    config.model.attention_resolutions = (32, 16, 8)
    config.model.num_head_channels = 64
    config.model.dropout = 0.1
    config.model.use_scale_shift_norm = True
    config.model.resblock_updown = True
    config.model.conventions = "openai"
    config.diffusion.beta_schedule = "cosine"
    config.diffusion.variance = "learned"
    config.diffusion.loss = "hybrid"
    config.train.length = "540000 steps"
    config.train.batch_size = 2048
    config.train.gradient_accumulation_steps = 4  # of 64 images on each of eight GPUs
    config.train.learning_rate = 3e-4
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
