"""A DiT-XL/2 (Peebles & Xie 2023) on small images themselves, CIFAR-10 at 32 pixels, in place of an
autoencoder's latents.

Class-conditional, with learned variance, as in the paper. `:s`, `:b` and `:l` are its smaller
sizes.
"""

from ddpm.config.defaults import base, with_variant

VARIANTS = {
    size.lower(): {"model.name": f"dit(size='{size}', patch_size=2)"} for size in ("S", "B", "L")
}


def get_config(variant=None):
    config = base()
    config.data.source = "torchvision(name='CIFAR10')"
    config.data.image_size = 32
    config.data.channels = 3
    config.data.flip = True
    config.data.class_labels = True
    config.data.validation_fraction = (
        0.0  # all 50,000 images are learned from; 0.02 brings val/loss, eval/copying and best
    )
    config.model.name = "dit(size='XL', patch_size=2)"
    config.diffusion.beta_schedule = "linear"
    config.diffusion.variance = "learned"
    config.diffusion.loss = "hybrid"
    config.train.length = "400000 steps"
    config.train.batch_size = 256
    config.train.gradient_accumulation_steps = 4
    config.train.learning_rate = 1e-4
    config.train.warmup = "0 steps"
    config.train.gradient_clip = 0.0
    config.train.label_dropout = 0.1
    config.ema.decay = 0.9999
    config.ema.warmup = False
    config.sample.sampler = "ddpm"
    config.sample.steps = 250
    config.sample.num_images = 40
    config.every.log = "100 steps"
    config.every.sample = "10000 steps"
    config.every.validate = "10000 steps"
    return with_variant(config, variant, VARIANTS)
