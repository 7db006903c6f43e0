"""The main job: 1,797 real handwritten digits at 16 pixels, without a download, minutes on two CPU cores.

The variants of the U-Net are those of experiments/architectures.yaml; `dit` spends what it spends, within 4 percent, and
`classes` is told which digit it draws. `studied` has what experiments/targets and architectures found best in short runs.
"""

from ddpm.config import base, with_variant

VARIANTS = {
    "classes": {"data.class_labels": True},
    "studied": {"diffusion.predict": "x0", "diffusion.weighting": "p2", "model.use_scale_shift_norm": True},
    "noattention": {"model.attention_resolutions": ()},
    "scaleshift": {"model.use_scale_shift_norm": True},
    "heads4": {"model.num_heads": 4},
    "deep": {"model.num_res_blocks": 2, "model.model_channels": 26},
    "deeper": {"model.num_res_blocks": 3, "model.model_channels": 23},
    "dit": {"model.name": "dit(depth=8, width=96, heads=3, patch_size=2)"},
}


def get_config(variant=None):
    config = base()
    config.model.model_channels = 32
    config.model.num_res_blocks = 1
    config.diffusion.predict = "v"
    config.train.length = "1200 steps"
    config.train.learning_rate = 2e-3
    config.train.warmup = "50 steps"
    config.train.learning_rate_decay = "cosine(length='1200 steps')"
    config.ema.decay = 0.995
    config.sample.sampler = "ddpm"
    config.sample.steps = 25
    config.evaluate.num_samples = 1797
    config.evaluate.sampler = "ddpm"
    config.evaluate.steps = 25
    config.every.log = "50 steps"
    config.every.sample = "300 steps"
    config.every.validate = "200 steps"
    config.every.evaluate = "1200 steps"
    return with_variant(config, variant, VARIANTS)
