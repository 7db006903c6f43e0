"""Denoisers: `denoise(x, level) -> (x0, eps)` from a network, its target and guidance.

    x, x0, eps [b, c, h, w], x0 in [-1, 1]; y [b] class labels or None; level of Python floats
    net(x, t, y) -> out [b, c, h, w], or [b, 2c, h, w] with a learned variance; t float32 [b]
    frac [b, c, h, w] in about [0, 1]: where a learned variance lies, third result of `denoise`

Guidance extrapolates from the output of a weaker network, the guide, to that of the network. The
guide is the network without its label (Ho & Salimans 2022, classifier-free guidance) or another,
weaker network (Karras et al. 2024, autoguidance). All targets are linear in x0 and eps, so guiding
the output guides the score: that of p^scale q^(1 - scale), for p of the network and q of the guide.
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch

from ddpm.diffusion import targets
from ddpm.diffusion.process import Level


class Network(Protocol):
    """The interface of ddpm/models: x [b, c, h, w], t [b], y [b] or None -> out [b, c', h, w]."""

    def __call__(
        self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None, /
    ) -> torch.Tensor: ...


class Denoiser(Protocol):
    """What samplers call: (x, level) -> (x0, eps), and `frac` where the variance is learned."""

    def __call__(self, x: torch.Tensor, level: Level, /) -> tuple[torch.Tensor, ...]: ...


class Guidance(NamedTuple):
    """Guidance away from the network `guide(x, t, y) -> out`; at scale 1 there is none.

    `interval` is (low, high] in sigma/alpha, or () for every level (Kynkaanniemi et al. 2024,
    "Applying Guidance in a Limited Interval", whose sigma is sigma/alpha here).
    """

    guide: Callable[..., torch.Tensor] | None = None
    scale: float = 1.0
    interval: tuple = ()

    def applies(self, level: Level) -> bool:
        """Return whether the guide is called at a level of Python floats."""
        low, high = self.interval or (-1.0, float("inf"))
        return self.scale != 1 and low < level.ratio <= high

    def combine(self, out, guide_out, channels):
        """Return guide_out + scale (out - guide_out) in the first `channels`, else `out`."""
        target = out[:, :channels]
        guide_target = guide_out[:, :channels]
        guided = guide_target + self.scale * (target - guide_target)
        return torch.cat([guided, out[:, channels:]], dim=1)


NO_GUIDANCE = Guidance()


def unconditional(net: Network) -> Network:
    """Return the network called without its label."""
    return lambda x, t, y=None: net(x, t)


def call_network(net, target, x, level, y=None, prev_x0=None):
    """Return a network's output in x's dtype; `prev_x0`: its last estimate, which it also takes."""
    scaled = target.scale_input(x, level.alpha, level.sigma)
    time = target.c_noise(level.t, level.alpha, level.sigma)
    if prev_x0 is not None:
        scaled = torch.cat([scaled, prev_x0], dim=1)
    if isinstance(time, torch.Tensor):
        time = time.flatten().float()
    else:
        time = torch.full((len(x),), time, dtype=torch.float32, device=x.device)
    return net(scaled, time, y).to(x.dtype)


def to_x0_eps(x, out, level, target, clip, learned=False):
    """Return (x0, eps), or (x0, eps, frac) with a learned variance; `clip` limits x0, then eps."""
    prediction, *variance = out.chunk(2, dim=1) if learned else [out]
    x0 = target.x0(x, prediction, level.alpha, level.sigma)
    x0 = x0.clamp(-1, 1) if clip else x0
    eps = (x - level.alpha * x0) / level.sigma
    return x0, eps, *((channels + 1) / 2 for channels in variance)


def denoiser(
    net: Network,
    *,
    predict: str,
    clip: bool,
    y: torch.Tensor | None = None,
    learned: bool = False,
    self_condition: bool = False,
    guidance: Guidance = NO_GUIDANCE,
    time_scale: float = 1,
) -> Denoiser:
    """Return the Denoiser of a network for one sampling run; x and the results are float32.

    `learned`: the network predicts its variance; `self_condition`: it also takes its previous
    estimate of x0 (Chen et al. 2023, "Analog Bits", section 2.3), which the denoiser remembers.
    Guidance acts on the output, before x0 is clipped. `time_scale` as in `get_target`. Raises
    ValueError for an unknown target.
    """
    target = targets.get_target(predict, time_scale)
    last_x0 = None

    def denoise(x, level):
        nonlocal last_x0
        prev_x0 = None
        if self_condition:
            prev_x0 = torch.zeros_like(x) if last_x0 is None else last_x0
        out = call_network(net, target, x, level, y, prev_x0)
        if guidance.applies(level):
            guide_out = call_network(guidance.guide, target, x, level, y, prev_x0)
            out = guidance.combine(out, guide_out, x.shape[1])
        estimate = to_x0_eps(x, out, level, target, clip, learned)
        last_x0 = estimate[0]
        return estimate

    return denoise
