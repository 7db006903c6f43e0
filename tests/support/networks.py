"""The arguments of a U-Net small enough for a test."""

TINY = dict(
    image_size=8,
    in_channels=3,
    out_channels=3,
    model_channels=8,
    channel_mult=(1, 2),
    num_res_blocks=1,
    attention_resolutions=(4,),
)
