"""Calls the network at a level and turns what it predicts into (x0, eps): `denoise(x, level)`,
for every sampler.
"""

import torch

from ddpm.diffusion import targets
from ddpm.diffusion.guidance import NONE


def ask(net, target, x, level, y=None, before=None):
    """Return a network's output at x and a level, in x's dtype; `before` is an earlier estimate
    of x0 for one that takes it.
    """
    shown = target.shown(x, level.alpha, level.sigma)
    told = target.told(level.t, level.alpha, level.sigma)
    if before is not None:
        shown = torch.cat([shown, before], dim=1)
    if isinstance(told, torch.Tensor):
        told = told.flatten().float()
    else:
        told = torch.full((len(x),), told, dtype=torch.float32, device=x.device)
    return net(shown, told, y).to(x.dtype)


def estimate(x, out, level, target, clip, learned=False):
    """Return (x0, eps) from a network's output, and `mix` where the second half of its channels
    tells a learned variance.

    `clip` holds x0 in [-1, 1], and eps is what then remains of x.
    """
    said, *channels = out.chunk(2, dim=1) if learned else [out]
    x0 = target.x0(x, said, level.alpha, level.sigma)
    x0 = x0.clamp(-1, 1) if clip else x0
    return x0, (x - level.alpha * x0) / level.sigma, *((channel + 1) / 2 for channel in channels)


def denoiser(
    net, *, predict, clip, y=None, learned=False, self_condition=False, guidance=NONE, time_scale=1
):
    """Make `denoise(x, level)` of a network, for one walk of a sampler; x is float32 and so are the
    results.

    `learned` and `self_condition` say what the network was made for: a learned variance, and its
    last estimate of x0 beside x (Chen et al. 2023, "Analog Bits", section 2.3); `guidance` moves
    what it says, before x0 is clipped; `time_scale` is as of `get_target`. Raises ValueError for an
    unknown target.
    """
    target = targets.get_target(predict, time_scale)
    last = None

    def denoise(x, level):
        nonlocal last
        before = (torch.zeros_like(x) if last is None else last) if self_condition else None
        out = ask(net, target, x, level, y, before)
        if guidance.applies(level):
            out = guidance.move(out, ask(guidance.worse, target, x, level, y, before), x.shape[1])
        told = estimate(x, out, level, target, clip, learned)
        last = told[0]
        return told

    return denoise
