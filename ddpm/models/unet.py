"""The U-Net of Ho et al. 2020: `net(x, t, y) -> out`.

x [b, c, h, w], noisy images as the target scales them; t [b], float or integer, in training
timesteps or, for the target edm, log(sigma/alpha) / 4
y [b] int64 class labels or None; out [b, out_channels, h, w], in the units of the target
"""

from functools import partial

import torch
from torch import nn

from ddpm.common.registry import quantity
from ddpm.models import layers


def check_size(size, halvings):
    """Raise ValueError if a side of `size` (h, w) cannot be halved `halvings` times."""
    trouble = f"cannot be halved {quantity(halvings, 'time')}"
    layers.check_multiple(size, 2**halvings, trouble, "a shorter channel_mult")


def check_shape(counts, model_channels, channel_mult, blocks, num_classes):
    """Raise ValueError for numbers that make no U-Net; `counts` are further ones, 1 or more."""
    counts = counts | dict(
        model_channels=model_channels, res_blocks_per_level=min(blocks, default=1)
    )
    if num_classes is not None:
        counts["num_classes"] = num_classes
    layers.check_counts(counts)
    if model_channels == 1:
        raise ValueError(
            "model_channels is 1, too few for a sine and a cosine of the time; use 2 or more"
        )
    if not channel_mult or min(channel_mult) < 1:
        raise ValueError(
            f"channel_mult is {channel_mult}; use one or more whole numbers from 1 up, as (1, 2, 2)"
        )
    if len(blocks) != len(channel_mult):
        raise ValueError(
            f"res_blocks_per_level has {len(blocks)} numbers for {len(channel_mult)} levels; give "
            "one for each"
        )


def level_sides(image_size, levels, attention_resolutions):
    """Return each level's shorter side; ValueError for sizes that do not halve or never occur."""
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    check_size(size, levels - 1)
    sides = [min(size) >> level for level in range(levels)]
    for resolution in attention_resolutions:
        if resolution not in sides:
            raise ValueError(
                f"attention resolution {resolution} does not occur in this network; use any of "
                f"{', '.join(map(str, sides))}"
            )
    return sides


def resizers(block, resblock_updown, padding):
    """Return two functions, of the channels, that create a layer of half and of twice the size."""
    if not resblock_updown:
        return partial(layers.Downsample, padding=padding), layers.Upsample
    return (lambda channels: block(channels, channels, down=True)), (
        lambda channels: block(channels, channels, up=True)
    )


class Stage(nn.Sequential):
    """Layers between two skip connections; the residual blocks get the embedding."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, layers.ResidualBlock) else layer(x)
        return x


class UNet(layers.ConditionedNetwork):
    """A U-Net of residual blocks with attention at chosen sizes and always in the middle.

    image_size             int or (h, w); the network runs on any size that can be halved as often
    attention_resolutions  sizes of feature maps by their shorter side: at image_size (64, 128) the
                           resolution 16 is the 16x32 map
    channel_mult           level i has model_channels * channel_mult[i] channels and num_res_blocks
                           residual blocks, or res_blocks_per_level[i] if given
    num_head_channels      if given, decides the number of heads instead of num_heads
    num_classes            rows of the class embedding, initially standard normal; label -1 adds 0
    norm_num_groups        the most groups of a norm; 0: at most 32, of at least four channels each
                           in the narrowest level
    freq_shift, downsample_padding, norm_num_groups, norm_eps
                           0, 1, 32 and 1e-5 for weights of OpenAI's code and most of diffusers
    initialization         `glorot`, as Ho's code, or `torch`, as OpenAI's
    augmentation           n > 0: the forward pass takes a fourth argument [b, n], the transforms of
                           data.augment, or None; added `before` the layers of the time embedding,
                           as in EDM's code, or `after` them

    The last layer starts at zero, so a fresh network returns zeros. Raises ValueError for a size
    that cannot be halved often enough, an attention resolution that does not occur, heads that do
    not divide the channels, blocks for other levels than there are, and labels without classes.
    """

    def __init__(
        self,
        image_size,
        in_channels,
        out_channels,
        model_channels,
        channel_mult,
        num_res_blocks,
        attention_resolutions,
        num_heads=1,
        num_head_channels=None,
        dropout=0,
        use_scale_shift_norm=False,
        resblock_updown=False,
        num_classes=None,
        freq_shift=1,
        downsample_padding=0,
        norm_num_groups=0,
        norm_eps=1e-6,
        qk_norm=False,
        res_blocks_per_level=(),
        augmentation=0,
        augmentation_place="before",
        initialization="glorot",
    ):
        super().__init__()
        counts = {"in_channels": in_channels, "out_channels": out_channels}
        counts |= {"num_res_blocks": num_res_blocks, "norm_num_groups": norm_num_groups or 1}
        blocks = res_blocks_per_level or (num_res_blocks,) * len(channel_mult)
        check_shape(counts, model_channels, channel_mult, blocks, num_classes)
        sides = level_sides(image_size, len(channel_mult), attention_resolutions)
        attends = [side in attention_resolutions for side in sides]
        self.halvings = len(channel_mult) - 1
        self.model_channels = model_channels
        self.freq_shift = freq_shift
        width = 4 * model_channels
        self.add_embeddings(model_channels, width, num_classes, augmentation, augmentation_place)

        # one number for the network, as in the published ones, which diffusers' files can express
        groups = norm_num_groups or layers.norm_groups(min(channel_mult) * model_channels)
        norm = partial(layers.group_norm, most=groups, eps=norm_eps)
        block = partial(layers.ResidualBlock, embedding_channels=width, dropout=dropout, norm=norm)
        block = partial(block, use_scale_shift_norm=use_scale_shift_norm)
        attention = partial(
            layers.AttentionBlock, num_heads=num_heads, num_head_channels=num_head_channels
        )
        attention = partial(attention, norm=norm, qk_norm=qk_norm)
        resizing = resizers(block, resblock_updown, downsample_padding)

        channels = [mult * model_channels for mult in channel_mult]
        self.stem = layers.conv(in_channels, model_channels, 3)
        self._add_levels(channels, blocks, attends, block, attention, *resizing)
        last = layers.conv(channels[0], out_channels, 3, zero=True)
        self.head = nn.Sequential(norm(channels[0]), nn.SiLU(), last)
        if initialization == "torch":
            layers.initialize_as_torch(self)

    def _add_levels(self, widths, blocks, attends, block, attention, downsample, upsample):
        """Add encoder, middle and decoder; weights are drawn in this order."""

        def stage(level, inputs):
            parts = [block(inputs, widths[level])]
            if attends[level]:
                parts.append(attention(widths[level]))
            return Stage(*parts)

        self.levels = [[] for _ in widths]  # the stages by size of the image, the largest first
        channels = self.model_channels
        skips = [channels]
        self.encoder = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(blocks[level]):
                self.encoder.append(stage(level, channels))
                self.levels[level].append(self.encoder[-1])
                channels = width
                skips.append(channels)
            if level < self.halvings:
                self.encoder.append(Stage(downsample(channels)))
                self.levels[level].append(self.encoder[-1])
                skips.append(channels)
        self.middle = Stage(
            block(channels, channels), attention(channels), block(channels, channels)
        )
        self.levels[-1].append(self.middle)
        self.decoder = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for _ in range(blocks[level] + 1):
                self.decoder.append(stage(level, channels + skips.pop()))
                self.levels[level].append(self.decoder[-1])
                channels = width
            if level > 0:
                self.decoder[-1].append(upsample(channels))

    def forward(
        self,
        x: torch.Tensor,
        t: torch.Tensor,
        y: torch.Tensor | None = None,
        augmentation: torch.Tensor | None = None,
    ) -> torch.Tensor:
        check_size(x.shape[-2:], self.halvings)
        features = layers.timestep_embedding(t, self.model_channels, freq_shift=self.freq_shift)
        emb = self.embed(features.to(x.dtype), y, augmentation)
        h = self.stem(x)
        skips = [h]
        for stage in self.encoder:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        for stage in self.decoder:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.head(h)
