"""The diffusion model as one module: a network, its process, the training loss, and a convenient `sample`.

    x0, x, noise [b, c, h, w], images in [-1, 1]; t [b] int64 in 0 .. T-1; y [b] class labels or None
    net(x, t, y) -> out [b, c, h, w], with t float32 [b]
"""

from collections import deque
from functools import partial
from typing import NamedTuple

import torch
from einops import reduce
from torch import nn

from ddpm import spec
from ddpm.diffusion import samplers, schedules
from ddpm.diffusion.process import TARGETS, VARIANCES, Process, denoiser, estimate, latent


class Step(NamedTuple):
    """p(x_{t-1} | x_t): mean and x0 [b, c, h, w], variance and log-variance [b, 1, 1, 1]."""

    mean: torch.Tensor
    variance: torch.Tensor
    log_variance: torch.Tensor
    x0: torch.Tensor


class DDPM(nn.Module):
    """A denoising diffusion probabilistic model (Ho et al. 2020) around a network `net(x, t, y)`.

    `beta_schedule` names an entry of SCHEDULES, `predict` one of TARGETS (what the network says), `variance` one of
    VARIANCES (of ancestral sampling); `clip` holds the estimate of x0 in [-1, 1] while sampling. Attributes:
    `process`, and `samplers`, which is SAMPLERS with this model's variance as the default. Raises ValueError for
    unknown names, and for `eps` where the schedule ends in pure noise.
    """

    def __init__(self, net, timesteps=1000, beta_schedule="linear", predict="eps", variance="small", clip=True):
        super().__init__()
        self.net = net
        self.predict = spec.check_choice("target", predict, TARGETS)
        self.variance = spec.check_choice("variance", variance, VARIANCES)
        self.clip = clip
        self.process = Process(*schedules.get_schedule(beta_schedule, timesteps))
        if predict == "eps" and self.process.alpha[-1].float() == 0:  # the precision that x is divided in
            raise ValueError(f"schedule {beta_schedule!r} ends in pure noise, from which 'eps' tells nothing about x0; "
                             "predict 'v' or 'x0' instead")
        self.samplers = samplers.SAMPLERS | {"ddpm": partial(samplers.ddpm, variance=variance)}

    def q_sample(self, x0, t, noise=None):
        """Return x_t ~ q(x_t | x0), the images noised to times t (Ho et al. 2020, eq. 4), by torch's generator if need be."""
        return self.process.q_sample(x0, t, torch.randn_like(x0) if noise is None else noise)

    def p_mean_variance(self, x, t, y=None):
        """Return the Step of p(x_{t-1} | x_t) that the network implies (Ho et al. 2020, eqs. 1 and 11)."""
        level = self.process.at(t)
        level = level._replace(alpha=level.alpha.to(x.dtype), sigma=level.sigma.to(x.dtype))
        x0, _ = estimate(x, self.net(x, t.float(), y), level, self.predict, self.clip)
        return Step(*self.process.posterior(x0, x, t, self.variance), x0)

    def losses(self, x0, t, noise, y=None):
        """Return each image's mean squared error on the target, float32 [b] (Ho et al. 2020, eq. 14)."""
        _, alpha, sigma = self.process.at(t)
        target = TARGETS[self.predict].make(x0, noise, alpha.to(x0.dtype), sigma.to(x0.dtype))
        out = self.net(self.q_sample(x0, t, noise), t.float(), y)
        return reduce((out.float() - target.float()) ** 2, "b c h w -> b", "mean")

    def forward(self, x0, y=None, t=None, noise=None):
        """Return the training loss, a scalar; times and noise not given are drawn from torch's generator."""
        t = torch.randint(self.process.timesteps, (len(x0),), device=x0.device) if t is None else t
        noise = torch.randn_like(x0) if noise is None else noise
        return self.losses(x0, t, noise, y).mean()

    @torch.no_grad()
    def sample(self, shape, steps=None, sampler="ddpm", y=None, noise=None):
        """Return new images [b, c, h, w] in [-1, 1], for shape (b, c, h, w), in `steps` steps, or as many as timesteps.

        `noise(k)` gives standard-normal noise for the latent (k = 0) and for step k; without it torch's generator does.
        Raises ValueError for an unknown sampler and for steps outside 1 .. T.
        """
        walk = spec.choose("sampler", self.samplers, sampler)
        levels = self.process.levels(self.process.timesteps if steps is None else steps)
        device = next(self.parameters(), torch.empty(0)).device
        noise = noise or (lambda k: torch.randn(shape, device=device))
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        try:
            denoise = denoiser(self.net, predict=self.predict, clip=self.clip, y=y)
            x = deque(walk(denoise, latent(levels[0], noise(0)), levels, noise), maxlen=1).pop()  # the last one
        finally:
            for module, training in modes:
                module.training = training
        return x.clamp(-1, 1)
