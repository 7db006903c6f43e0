"""A folder of cat photos at 128 pixels: the recipe for one GPU with 8 GB, and smaller variants for
less.

`--config=configs/cats128.py:small` picks a variant. The photos lie in data/cats; other places by
`--config.data.source="folder(path='...')"`.

Estimated by ddpm.plan, not measured on a GPU: in bf16, two images at a time need 6.33 GiB and fit
into 8 GB. Four at a time need 7.64 GiB and fit if nothing else uses the GPU, not even a display:
--config.train.gradient_accumulation_steps=2. With 12 GB all eight fit at a time (9.44 GiB):
--config.train.gradient_accumulation_steps=1. Fewer parts are faster.
"""

from ddpm.config.defaults import base, with_variant

VARIANTS = {  # what differs from the full recipe
    "small": {"model.model_channels": 128, "train.gradient_accumulation_steps": 2},
    "tiny": {
        "model.model_channels": 64,
        "model.num_res_blocks": 1,
        "train.gradient_accumulation_steps": 1,
    },
    "64px": {
        "data.image_size": 64,
        "model.model_channels": 128,
        "train.batch_size": 16,
        "train.gradient_accumulation_steps": 2,
    },
    "dit": {
        "model.name": "dit(size='B', patch_size=4)",
        "model.dropout": 0.0,
        "train.learning_rate": 1e-4,
    },  # 1,024 patches
}


def get_config(variant=None):
    config = base()
    config.data.source = "folder(path='data/cats')"
    config.data.image_size = 128
    config.data.channels = 3
    config.data.flip = True
    config.data.validation_fraction = 0.02
    config.data.num_workers = 4
    config.model.model_channels = 192
    config.model.channel_mult = (1, 2, 3, 4)
    config.model.num_res_blocks = 2
    config.model.attention_resolutions = (16,)
    config.model.num_head_channels = 64
    config.model.dropout = 0.1
    config.model.use_scale_shift_norm = True
    config.diffusion.timesteps = 1000
    config.diffusion.beta_schedule = "cosine"
    config.train.length = "500 epochs"
    config.train.batch_size = 8
    config.train.gradient_accumulation_steps = (
        4  # two images at a time: activations for eight would not fit beside the weights
    )
    config.train.learning_rate = 2e-4
    config.train.warmup = "5000 steps"
    config.train.gradient_clip = 1.0
    config.ema.decay = 0.9999
    config.sample.num_images = 16
    config.sample.batch_size = 16
    config.evaluate.batch_size = 16
    config.every.log = "100 steps"
    config.every.sample = "5000 steps"
    config.every.validate = "5000 steps"
    return with_variant(config, variant, VARIANTS)
