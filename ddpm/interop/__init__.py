"""Weights of other codebases."""

from absl import flags

OPENAI_FLAGS = {  # OpenAI's flags, for what shapes do not say
    "image_size": (flags.DEFINE_integer, "--image_size=64"),
    "diffusion_steps": (flags.DEFINE_integer, "--diffusion_steps=1000"),
    "noise_schedule": (flags.DEFINE_string, "--noise_schedule=linear"),
    "num_heads": (flags.DEFINE_integer, "--num_heads=4 or --num_head_channels=64"),
    "num_head_channels": (flags.DEFINE_integer, "--num_head_channels=64"),
    "use_new_attention_order": (flags.DEFINE_bool, "--use_new_attention_order=False"),
    "rescale_timesteps": (flags.DEFINE_bool, "--rescale_timesteps=True"),
    "predict_xstart": (flags.DEFINE_bool, "--predict_xstart=True"),
}
