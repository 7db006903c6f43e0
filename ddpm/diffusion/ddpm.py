"""The diffusion model as one module: a network, its process, the training loss, and a convenient
`sample`.

x0, x, noise [b, c, h, w], images in [-1, 1]; t [b] int64 in 0 .. T-1; y [b] class labels or None
net(x, t, y) -> out [b, c, h, w], with t float32 [b]; out has 2c channels where the variance is
learned
"""

from collections import deque
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange, reduce
from torch import nn

from ddpm.common import registry
from ddpm.diffusion import samplers, schedules
from ddpm.diffusion.denoiser import ask, denoiser, estimate
from ddpm.diffusion.guidance import NONE, Guidance, unlabelled
from ddpm.diffusion.likelihood import bound_term
from ddpm.diffusion.losses import Objective
from ddpm.diffusion.process import VARIANCES, Process, latent
from ddpm.diffusion.targets import get_target


class Step(NamedTuple):
    """p(x_{t-1} | x_t): mean and x0 [b, c, h, w], variance and log-variance [b, 1, 1, 1], or [b,
    c, h, w] where learned.
    """

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor
    x0: torch.Tensor


class DDPM(nn.Module):
    """A denoising diffusion probabilistic model (Ho et al. 2020) around a network `net(x, t, y)`.

    `beta_schedule` names an entry of SCHEDULES, `predict` one of TARGETS (what the network says),
    `variance` one of VARIANCES (of ancestral sampling; for a learned one the network has twice the
    channels out); `clip` holds the estimate of x0 in [-1, 1] while sampling; `zero_terminal_snr`
    lets the schedule end in pure noise; `loss`, `weighting` and `times` name entries of LOSSES,
    WEIGHTINGS and TIMES; with `self_condition` the network takes twice the channels, the second
    half being its last estimate of x0; with `rescale_timesteps` it is given 1000 t / T in place of
    t. Attributes: `process`, `objective`, and `samplers`, which is SAMPLERS with this model's
    variance as the default. Raises ValueError for unknown names, and for what contradicts itself.
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
        # the precision that x is divided in
        if not self.target.pure_noise and self.process.alpha[-1].float() == 0:
            suffix = " with zero_terminal_snr" if zero_terminal_snr else ""
            which = f"schedule {beta_schedule!r}{suffix}"
            raise ValueError(
                f"{which} ends in pure noise, from which {predict!r} tells nothing about x0; "
                "predict 'v', 'x0' or 'flow' instead"
            )
        self.objective = Objective(self.process, self.target, loss, weighting, times, self.learned)
        self.samplers = samplers.SAMPLERS | {"ddpm": partial(samplers.ddpm, variance=variance)}

    @property
    def learned(self):
        """Whether the network tells a variance too."""
        return self.variance == "learned"

    def denoiser(self, net=None, y=None, guidance=NONE, clip=None):
        """Make the `denoise(x, level)` that samplers call, for one walk, of this network or another
        one like it.

        `clip` takes the place of the model's.
        """
        return denoiser(
            self.net if net is None else net,
            predict=self.predict,
            clip=self.clip if clip is None else clip,
            y=y,
            learned=self.learned,
            self_condition=self.self_condition,
            guidance=guidance,
            time_scale=self.time_scale,
        )

    def q_sample(self, x0, t, noise=None):
        """Return x_t ~ q(x_t | x0), the images noised to times t (Ho et al. 2020, eq. 4), by
        torch's generator if need be.
        """
        return self.process.q_sample(x0, t, torch.randn_like(x0) if noise is None else noise)

    def p_mean_variance(self, x, t, y=None):
        """Return the Step of p(x_{t-1} | x_t) that the network implies (Ho et al. 2020, eqs. 1
        and 11).
        """
        level = rounded(self.process.at(t), x.dtype)
        out = ask(self.net, self.target, x, level, y, self.own_estimate(self.net, x, level, y))
        x0, _, *mix = estimate(x, out, level, self.target, self.clip, self.learned)
        return Step(*self.process.posterior(x0, x, t, self.variance, *mix), x0)

    def losses(self, x0, t, noise, y=None, conditioned=None, augmentation=None):
        """Return each image's loss, float32 [b]: by default the mean squared error on the target
        (Ho et al. 2020, eq. 14).

        A network that takes its own estimate of x0 is given one for the images that `conditioned`,
        bool [b], names; one that learns augmented images is told of it, as ddpm.augment has it.
        """
        net = self.net if augmentation is None else partial(self.net, augmentation=augmentation)
        exact = self.process.at(t)
        level = rounded(exact, x0.dtype)
        x = level.alpha * x0 + level.sigma * noise
        out = ask(
            net, self.target, x, level, y, self.own_estimate(net, x, level, y, conditioned)
        ).float()
        said = out.chunk(2, dim=1)[0] if self.learned else out
        objective = self.objective
        losses = 0
        if objective.mse:
            target = self.target.make(x0, noise, level.alpha, level.sigma)
            error = reduce((said - target.float()) ** 2, "b c h w -> b", "mean")
            losses = objective.weighting(error, exact, self.target)
        if objective.bound:
            if objective.mse:  # then the bound teaches the variance alone
                out = torch.cat([said.detach(), out.chunk(2, dim=1)[1]], dim=1)
            guess, _, *mix = estimate(x, out, level, self.target, clip=False, learned=self.learned)
            mean, _, log_variance = self.process.posterior(guess, x, t, self.variance, *mix)
            weight = objective.bound * self.process.timesteps
            losses = losses + weight * bound_term(self.process, x0, x, t, mean, log_variance)
        return losses

    @torch.no_grad()
    def own_estimate(self, net, x, level, y, conditioned=None):
        """What the network is given of its own: None where it takes nothing, nothing yet (0) for
        images not conditioned.
        """
        if not self.self_condition:
            return None
        before = torch.zeros_like(x)
        if conditioned is None:
            return before
        first = estimate(
            x,
            ask(net, self.target, x, level, y, before),
            level,
            self.target,
            self.clip,
            self.learned,
        )[0]
        return torch.where(rearrange(conditioned, "b -> b 1 1 1"), first, before)

    def forward(self, x0, y=None, t=None, noise=None):
        """Return the training loss, a scalar; times and noise not given are drawn from torch's
        generator.
        """
        importance = None
        if t is None:
            numbers = torch.rand(len(x0), dtype=torch.float64)
            t, importance = self.objective.times(
                self.process, range(len(x0)), len(x0), lambda places: numbers[list(places)]
            )
            t = t.to(x0.device)
        noise = torch.randn_like(x0) if noise is None else noise
        conditioned = torch.rand(len(x0), device=x0.device) < 0.5 if self.self_condition else None
        losses = self.losses(x0, t, noise, y, conditioned)
        self.objective.observe(t, losses)
        return (losses if importance is None else losses * importance).mean()

    @torch.no_grad()
    def sample(self, shape, steps=None, sampler="ddpm", y=None, noise=None, guidance=1.0):
        """Return new images [b, c, h, w] in [-1, 1], for shape (b, c, h, w), in `steps` steps, or
        as many as timesteps.

        `noise(k)` gives standard-normal noise for the latent (k = 0) and for step k; without it
        torch's generator does. Labels y [b] are followed the more, the more `guidance` is above 1
        (Ho & Salimans 2022). Raises ValueError for an unknown sampler and for steps outside 1 .. T.
        """
        walk = registry.resolve("sampler", self.samplers, sampler)
        levels = self.process.levels(self.process.timesteps if steps is None else steps)
        device = next(self.parameters(), torch.empty(0)).device
        noise = noise or (lambda k: torch.randn(shape, device=device))
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            denoise = self.denoiser(y=y, guidance=Guidance(unlabelled(self.net), guidance))
            # the last one
            x = deque(walk(denoise, latent(levels[0], noise(0)), levels, noise), maxlen=1).pop()
        finally:
            for module, training in modes:
                module.training = training
        return x.clamp(-1, 1)


def rounded(level, dtype):
    """The float64 level of a batch in the dtype that networks compute in."""
    return level._replace(alpha=level.alpha.to(dtype), sigma=level.sigma.to(dtype))
