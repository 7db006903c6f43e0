"""The U-Net of Ho et al. 2020: `net(x, t, y) -> out`, the network waist.

x [b, c, h, w] in [-1, 1]; t [b], float or integer, in units of training timesteps; y [b] int64
class labels or None; out [b, out_channels, h, w], in the units of whatever target it is trained on.
"""

from functools import partial

import torch
from torch import nn

from ddpm.common.registry import quantity
from ddpm.models.layers import (
    AttentionBlock,
    Downsample,
    ResidualBlock,
    Upsample,
    add_augmentation,
    add_class,
    augmentation_embedding,
    check_multiple,
    conv,
    group_norm,
    initialize_as_torch,
    linear,
    norm_groups,
    timestep_embedding,
)


def check_size(size, halvings):
    """Raise ValueError where a side of `size` (h, w) cannot be halved `halvings` times."""
    check_multiple(
        size,
        2**halvings,
        f"cannot be halved {quantity(halvings, 'time')}",
        "a shorter channel_mult",
    )


class Stage(nn.Sequential):
    """Layers between two skip connections, in a row; the embedding goes to the residual blocks."""

    def forward(self, x, emb):
        for layer in self:
            x = layer(x, emb) if isinstance(layer, ResidualBlock) else layer(x)
        return x


class UNet(nn.Module):
    """A U-Net of residual blocks with attention at chosen sizes and always in the middle.

    `image_size` is an int or (h, w). `attention_resolutions` are sizes of feature maps, counted by
    the shorter side: at image_size (64, 128) the resolution 16 is the 16x32 map. Level i has
    `model_channels * channel_mult[i]` channels and `num_res_blocks` residual blocks, or
    `res_blocks_per_level[i]` where those are given; `num_head_channels`, where given, decides the
    heads in place of `num_heads`. Built for one size, it runs on any that can be halved as often.
    The class embedding has `num_classes` rows, standard normal at first; a label of -1 is dropped:
    it adds zero. The last layer starts at zero, so a fresh network returns zeros. Norms have
    `norm_num_groups` groups at most, or, where that is 0, at most 32 of at least four channels each
    in the narrowest level. `freq_shift` to `norm_eps` are those in which weights from elsewhere
    differ: OpenAI's and most of diffusers' want 0, 1, 32 and 1e-5. `initialization` is `glorot`, as
    Ho's code, or `torch`, as OpenAI's. With `augmentation` the forward pass takes a fourth argument
    [b, augmentation], what was done to the images; None is nothing. It is added to the sines of the
    time, `before` the layers that make the embedding of them as in EDM's code, or `after` those.

    Raises ValueError for a size that cannot be halved often enough, an attention resolution that
    never occurs, heads that do not divide the channels, blocks for other levels than there are, and
    labels where there are no classes.
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
        levels = len(channel_mult)
        blocks = res_blocks_per_level or (num_res_blocks,) * levels
        counts = {
            "in_channels": in_channels,
            "out_channels": out_channels,
            "model_channels": model_channels,
        }
        counts |= {
            "num_res_blocks": num_res_blocks,
            "num_classes": 1 if num_classes is None else num_classes,
        }
        counts |= {
            "norm_num_groups": norm_num_groups or 1,
            "res_blocks_per_level": min(blocks, default=1),
        }
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} is {count}; use 1 or more")
        if model_channels == 1:
            raise ValueError(
                "model_channels is 1, too few for a sine and a cosine of the time; use 2 or more"
            )
        if not channel_mult or min(channel_mult) < 1:
            raise ValueError(
                f"channel_mult is {channel_mult}; use one or more whole numbers from 1 up, as (1, "
                "2, 2)"
            )
        if len(blocks) != levels:
            raise ValueError(
                f"res_blocks_per_level has {len(blocks)} numbers for {levels} levels; give one "
                "for each"
            )
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.halvings = levels - 1
        check_size(size, self.halvings)
        resolutions = [min(size) >> level for level in range(levels)]
        for resolution in attention_resolutions:
            if resolution not in resolutions:
                raise ValueError(
                    f"attention resolution {resolution} does not occur in this network; "
                    f"use any of {', '.join(map(str, resolutions))}"
                )

        self.model_channels = model_channels
        self.freq_shift = freq_shift
        embedding_channels = 4 * model_channels
        # one number for the whole network, as published ones have, which diffusers' files can say
        groups = norm_num_groups or norm_groups(min(channel_mult) * model_channels)
        norm = partial(group_norm, most=groups, eps=norm_eps)

        def block(inputs, outputs, **resize):
            return ResidualBlock(
                inputs,
                outputs,
                embedding_channels,
                dropout,
                use_scale_shift_norm,
                norm=norm,
                **resize,
            )

        def attention(channels):
            return AttentionBlock(channels, num_heads, num_head_channels, norm, qk_norm)

        def block_at(level, inputs, outputs):
            attends = resolutions[level] in attention_resolutions
            return (
                [block(inputs, outputs), attention(outputs)]
                if attends
                else [block(inputs, outputs)]
            )

        self.time_embedding = nn.Sequential(
            linear(model_channels, embedding_channels),
            nn.SiLU(),
            linear(embedding_channels, embedding_channels),
        )
        self.class_embedding = (
            None if num_classes is None else nn.Embedding(num_classes, embedding_channels)
        )
        self.augments_after = augmentation_place == "after"
        self.augmentation_embedding = augmentation_embedding(
            augmentation, embedding_channels if self.augments_after else model_channels
        )

        channels = model_channels
        self.stem = conv(in_channels, channels, 3)
        skips = [channels]
        self.encoder = nn.ModuleList()
        # the stages at each size of image, the largest first
        self.levels = [[] for _ in channel_mult]
        for level, mult in enumerate(channel_mult):
            for _ in range(blocks[level]):
                self.encoder.append(Stage(*block_at(level, channels, mult * model_channels)))
                self.levels[level].append(self.encoder[-1])
                channels = mult * model_channels
                skips.append(channels)
            if level < self.halvings:
                shrink = (
                    block(channels, channels, down=True)
                    if resblock_updown
                    else Downsample(channels, downsample_padding)
                )
                self.encoder.append(Stage(shrink))
                self.levels[level].append(self.encoder[-1])
                skips.append(channels)

        self.middle = Stage(
            block(channels, channels), attention(channels), block(channels, channels)
        )
        self.levels[-1].append(self.middle)

        self.decoder = nn.ModuleList()
        for level, mult in reversed(list(enumerate(channel_mult))):
            for _ in range(blocks[level] + 1):
                self.decoder.append(
                    Stage(*block_at(level, channels + skips.pop(), mult * model_channels))
                )
                self.levels[level].append(self.decoder[-1])
                channels = mult * model_channels
            if level > 0:
                self.decoder[-1].append(
                    block(channels, channels, up=True) if resblock_updown else Upsample(channels)
                )

        self.head = nn.Sequential(
            norm(channels), nn.SiLU(), conv(channels, out_channels, 3, zero=True)
        )
        if initialization == "torch":
            initialize_as_torch(self)

    def embed(self, t, y, augmentation, dtype):
        """The embedding [b, 4 model_channels] of times, labels and augmentation; y None is every
        label dropped.
        """
        waves = timestep_embedding(t, self.model_channels, freq_shift=self.freq_shift).to(dtype)
        if not self.augments_after:
            waves = add_augmentation(waves, augmentation, self.augmentation_embedding)
        emb = add_class(self.time_embedding(waves), y, self.class_embedding)
        return (
            add_augmentation(emb, augmentation, self.augmentation_embedding)
            if self.augments_after
            else emb
        )

    def forward(self, x, t, y=None, augmentation=None):
        check_size(x.shape[-2:], self.halvings)
        emb = self.embed(t, y, augmentation, x.dtype)
        h = self.stem(x)
        skips = [h]
        for stage in self.encoder:
            h = stage(h, emb)
            skips.append(h)
        h = self.middle(h, emb)
        for stage in self.decoder:
            h = stage(torch.cat([h, skips.pop()], dim=1), emb)
        return self.head(h)
