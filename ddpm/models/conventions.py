"""Details in which codes of one network differ, by the code that has them: a network gets those
that its constructor takes.
"""

from functools import partial

from ddpm.common.registry import check_choice


def conventions(
    *,
    freq_shift,
    downsample_padding,
    norm_eps,
    initialization,
    norm_num_groups=0,
    augmentation_place="before",
    noise_embedding="auto",
):
    """Arguments of networks as a dict; raises ValueError for a value out of range.

    freq_shift          of the time embedding, 0 or 1
    downsample_padding  zeros where an image is halved: 0 at its far end, 1 at both ends
    norm_eps            added to the variance of a group
    initialization      of the weights: `glorot` or `torch`
    norm_num_groups     most groups of a norm; 0 is 32 with four channels or more each
    augmentation_place  where data.augment enters: `before` the layers of the time embedding, as in
                        EDM, or `after` them
    noise_embedding     of unet_edm2: `sines`, or `auto`, random Fourier features with predict=edm
    """
    arguments = locals()
    for name, (low, high) in RANGES.items():
        if not low <= arguments[name] <= high:
            raise ValueError(f"{name} is {arguments[name]}; it must lie between {low} and {high}")
    for name, allowed in CHOICES.items():
        check_choice(name, arguments[name], allowed)
    return arguments


RANGES = {
    "freq_shift": (0, 1),
    "downsample_padding": (0, 1),
    "norm_eps": (0, 1),
    "norm_num_groups": (0, 1024),
}
CHOICES = {
    "initialization": ("glorot", "torch"),
    "augmentation_place": ("before", "after"),
    "noise_embedding": ("auto", "sines"),
}

# name -> f(*, the arguments above) -> dict
CONVENTIONS = {
    "ho": partial(
        conventions,
        freq_shift=1,
        downsample_padding=0,
        norm_eps=1e-6,
        initialization="glorot",
    ),
    "openai": partial(
        conventions,
        freq_shift=0,
        downsample_padding=1,
        norm_eps=1e-5,
        initialization="torch",
    ),
}
