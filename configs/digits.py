"""The main job: 1,797 real handwritten digits at 16 pixels, without a download, minutes on two CPU cores."""

from ddpm.config import base, with_variant


def get_config(variant=None):
    config = base()
    config.model.model_channels = 32
    config.diffusion.predict = "v"
    config.train.length = "600 steps"
    config.train.learning_rate = 1e-3
    config.train.warmup = "50 steps"
    config.ema.decay = 0.999
    config.sample.steps = 25
    config.evaluate.num_samples = 1797
    config.evaluate.steps = 25
    config.every.log = "20 steps"
    config.every.sample = "200 steps"
    config.every.validate = "100 steps"
    config.every.evaluate = "600 steps"
    return with_variant(config, variant, {})
