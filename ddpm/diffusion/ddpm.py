"""The diffusion model as one module: a network, its process, the training loss and sampling.

x0, x, noise [b, c, h, w], images in [-1, 1]; t [b] int64 in 0 .. T-1; y [b] labels or None
net(x, t, y) -> out [b, c, h, w], t float32 [b]; out has 2c channels with a learned variance
"""

import copy
from collections import deque
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import nn

from ddpm.common import registry
from ddpm.diffusion import samplers, schedules
from ddpm.diffusion.denoiser import (
    NO_GUIDANCE,
    Guidance,
    call_network,
    denoiser,
    to_x0_eps,
    unconditional,
)
from ddpm.diffusion.likelihood import bound_term
from ddpm.diffusion.losses import Objective
from ddpm.diffusion.process import VARIANCES, Process, initial_noise
from ddpm.diffusion.targets import get_target


class GaussianStep(NamedTuple):
    """p(x_{t-1} | x_t); mean, x0 [b, c, h, w]; variances [b, 1, 1, 1], or like x0 if learned."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor
    x0: torch.Tensor


class DDPM(nn.Module):
    """A denoising diffusion probabilistic model (Ho et al. 2020) of a network `net(x, t, y)`.

    beta_schedule      an entry of SCHEDULES; zero_terminal_snr: rescaled to end in pure noise
    predict            an entry of TARGETS: the meaning of the network's output
    variance           an entry of VARIANCES, for ancestral sampling; `learned` needs 2c channels
    clip               limit estimates of x0 to [-1, 1] while sampling
    loss, weighting, times   entries of LOSSES, WEIGHTINGS and TIMES
    self_condition     the network takes 2c channels: x, then its previous estimate of x0
    rescale_timesteps  the network receives 1000 t / T instead of t

    Attributes: `process`, `objective`, and `samplers`: SAMPLERS with this model's variance as
    default. Raises ValueError for unknown names and for options that contradict each other.
    """

    def __init__(
        self,
        net,
        timesteps=1000,
        beta_schedule="linear",
        predict="eps",
        variance="small",
        clip=True,
        zero_terminal_snr=False,
        loss="mse",
        weighting="simple",
        times="uniform",
        self_condition=False,
        rescale_timesteps=False,
    ):
        super().__init__()
        self.net = net
        self.predict = predict
        self.time_scale = 1000 / timesteps if rescale_timesteps else 1
        self.target = get_target(predict, self.time_scale)
        self.variance = registry.check_choice("variance", variance, VARIANCES)
        self.clip = clip
        self.self_condition = self_condition
        self.process = Process(*schedules.get_schedule(beta_schedule, timesteps, zero_terminal_snr))
        # float32 is the precision in which x is divided by alpha
        if not self.target.defined_at_zero_snr and self.process.alpha[-1].float() == 0:
            suffix = " with zero_terminal_snr" if zero_terminal_snr else ""
            raise ValueError(
                f"schedule {beta_schedule!r}{suffix} ends in pure noise, where {predict!r} does "
                "not determine x0; predict 'v', 'x0' or 'flow' instead"
            )
        self.objective = Objective(
            self.process, self.target, loss, weighting, times, self.learns_variance
        )
        self.samplers = samplers.SAMPLERS | {"ddpm": partial(samplers.ddpm, variance=variance)}

    def around(self, net):
        """The same model, its tables and objective shared, around another network."""
        model = copy.copy(self)
        # a shallow copy shares `_modules`, which has `net` if it is a module; a plain callable is
        # in `__dict__`
        model._modules = self._modules.copy()
        model._modules.pop("net", None)
        model.__dict__.pop("net", None)
        model.net = net
        return model

    @property
    def learns_variance(self):
        """Whether the network predicts its variance."""
        return self.variance == "learned"

    def denoiser(self, net=None, y=None, guidance=NO_GUIDANCE, clip=None):
        """Return the Denoiser of one sampling run; `net` and `clip` default to the model's."""
        return denoiser(
            self.net if net is None else net,
            predict=self.predict,
            clip=self.clip if clip is None else clip,
            y=y,
            learned=self.learns_variance,
            self_condition=self.self_condition,
            guidance=guidance,
            time_scale=self.time_scale,
        )

    def q_sample(self, x0, t, noise=None):
        """Return x_t ~ q(x_t | x_0) (Ho et al. 2020, eq. 4); by default torch draws the noise."""
        return self.process.q_sample(x0, t, torch.randn_like(x0) if noise is None else noise)

    def p_mean_variance(self, x, t, y=None):
        """Return the GaussianStep of p(x_{t-1} | x_t) (Ho et al. 2020, eqs. 1 and 11)."""
        level = rounded(self.process.at(t), x.dtype)
        prev_x0 = self.own_estimate(self.net, x, level, y)
        out = call_network(self.net, self.target, x, level, y, prev_x0)
        x0, _, *frac = to_x0_eps(x, out, level, self.target, self.clip, self.learns_variance)
        return GaussianStep(*self.process.posterior(x0, x, t, self.variance, *frac), x0)

    def losses(self, x0, t, noise, y=None, conditioned=None, augmentation=None):
        """Return each image's loss, float32 [b] (by default Ho et al. 2020, eq. 14).

        With self-conditioning, the images of `conditioned`, bool [b], get an estimate of x0, the
        others zeros. `augmentation` [b, n] describes the transforms of data.augment to the network.
        """
        net = self.net if augmentation is None else partial(self.net, augmentation=augmentation)
        exact = self.process.at(t)
        level = rounded(exact, x0.dtype)
        x = level.alpha * x0 + level.sigma * noise
        prev_x0 = self.own_estimate(net, x, level, y, conditioned)
        out = call_network(net, self.target, x, level, y, prev_x0).float()
        prediction = out.chunk(2, dim=1)[0] if self.learns_variance else out
        objective = self.objective
        losses = 0
        if objective.mse:
            target = self.target.compute(x0, noise, level.alpha, level.sigma)
            error = reduce((prediction - target.float()) ** 2, "b c h w -> b", "mean")
            losses = objective.weighting(error, exact, self.target)
        if objective.bound:
            if objective.mse:  # in the hybrid loss the bound trains only the variance
                out = torch.cat([prediction.detach(), out.chunk(2, dim=1)[1]], dim=1)
            estimate, _, *frac = to_x0_eps(x, out, level, self.target, False, self.learns_variance)
            mean, _, log_variance = self.process.posterior(estimate, x, t, self.variance, *frac)
            weight = objective.bound * self.process.timesteps
            losses = losses + weight * bound_term(self.process, x0, x, t, mean, log_variance)
        return losses

    @torch.no_grad()
    def own_estimate(self, net, x, level, y, conditioned=None):
        """Return the x0 for self-conditioning, 0 where not `conditioned` [b]; None without it."""
        if not self.self_condition:
            return None
        zeros = torch.zeros_like(x)
        if conditioned is None:
            return zeros
        out = call_network(net, self.target, x, level, y, zeros)
        first = to_x0_eps(x, out, level, self.target, self.clip, self.learns_variance)[0]
        return torch.where(rearrange(conditioned, "b -> b 1 1 1"), first, zeros)

    def forward(self, x0, y=None, t=None, noise=None):
        """Return the training loss, a scalar; t and noise default to torch's generator."""
        importance = None
        if t is None:
            numbers = torch.rand(len(x0), dtype=torch.float64)
            t, importance = self.objective.times(
                self.process, range(len(x0)), len(x0), lambda positions: numbers[list(positions)]
            )
            t = t.to(x0.device)
        noise = torch.randn_like(x0) if noise is None else noise
        conditioned = torch.rand(len(x0), device=x0.device) < 0.5 if self.self_condition else None
        losses = self.losses(x0, t, noise, y, conditioned)
        self.objective.observe(t, losses)
        return (losses if importance is None else losses * importance).mean()

    @torch.no_grad()
    def sample(self, shape, steps=None, sampler="ddpm", y=None, noise=None, guidance=1.0):
        """Return new images of `shape` (b, c, h, w) in [-1, 1], in `steps` steps (default T).

        `noise(k)` returns standard-normal noise for the start (k = 0) and for step k; the default
        is torch's generator. `guidance` above 1 strengthens the labels y [b] (Ho & Salimans 2022).
        Raises ValueError for an unknown sampler and for steps outside 1 .. T.
        """
        sample = registry.resolve("sampler", self.samplers, sampler)
        levels = self.process.levels(self.process.timesteps if steps is None else steps)
        device = next(self.parameters(), torch.empty(0)).device
        noise = noise or (lambda k: torch.randn(shape, device=device))
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            denoise = self.denoiser(y=y, guidance=Guidance(unconditional(self.net), guidance))
            states = sample(denoise, initial_noise(levels[0], noise(0)), levels, noise)
            x = deque(states, maxlen=1).pop()
        finally:
            for module, training in modes:
                module.training = training
        return x.clamp(-1, 1)


def rounded(level, dtype):
    """Return the float64 level of a batch with alpha and sigma in the network's dtype."""
    return level._replace(alpha=level.alpha.to(dtype), sigma=level.sigma.to(dtype))
