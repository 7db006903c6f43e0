"""Samplers against closed forms, each other, and diffusers."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from ddpm.common import registry
from ddpm.diffusion.denoiser import denoiser
from ddpm.diffusion.process import CLEAN, initial_noise
from ddpm.diffusion.samplers import SAMPLERS, ddim, ddpm
from support.oracles import (
    FLOAT32_TABLES,
    MEAN,
    SHAPE,
    SPREAD,
    Tiny,
    flow_to,
    gaussian,
    last,
    noises,
    process,
)


@pytest.mark.parametrize("sampler", [*SAMPLERS, "ddpm(variance='large')", "ddim(eta=1.0)"])
@pytest.mark.parametrize("steps", [1, 2, 10])
@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_a_walk_yields_every_step_and_stays_finite(sampler, steps, name):
    denoise = denoiser(Tiny(), predict="eps", clip=True)
    levels = process(name, 10).levels(steps)
    walk = list(
        registry.resolve("sampler", SAMPLERS, sampler)(denoise, noises()(0), levels, noises())
    )
    assert len(walk) == steps and all(x.shape == SHAPE and torch.isfinite(x).all() for x in walk)
    # on the step to CLEAN no noise is added: the sample is the estimate of x0
    before = walk[-2] if steps > 1 else noises()(0)
    # float64
    torch.testing.assert_close(walk[-1], denoise(before, levels[-2])[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("spacing, steps", [("linear", 1000), ("trailing", 13), ("leading", 50)])
def test_ddpm_small_is_ddim_with_eta_one(clip, spacing, steps):
    denoise = denoiser(Tiny(), predict="v", clip=clip)
    levels = process("cosine").levels(steps, spacing)
    pairs = zip(
        ddpm(denoise, noises()(0), levels, noises()),
        ddim(denoise, noises()(0), levels, noises(), eta=1.0),
        strict=True,
    )
    for ancestral, implicit in pairs:
        # float64; the two forms round differently, and dividing by sigma_0 = 0.006 magnifies it
        torch.testing.assert_close(ancestral, implicit, rtol=0, atol=1e-10)


def test_ddim_is_euler_on_the_probability_flow():
    levels = process().levels(20)
    walk = [noises()(0), *ddim(gaussian, noises()(0), levels, noises())]
    for (before, after), (t, s) in zip(pairwise(walk), pairwise(levels), strict=True):
        euler = before / t.alpha + (s.sigma / s.alpha - t.sigma / t.alpha) * gaussian(before, t)[1]
        # float64, where y = x / alpha is up to 160 times x
        torch.testing.assert_close(after / s.alpha, euler, rtol=1e-11, atol=1e-11)


def test_ddim_draws_no_noise_unless_eta_asks_for_it():
    levels = process().levels(5)

    def forbidden(k):
        raise AssertionError(f"noise {k} was drawn")

    last(ddim(gaussian, noises()(0), levels, forbidden))
    asked = []
    last(ddim(gaussian, noises()(0), levels, lambda k: asked.append(k) or noises()(k), eta=0.3))
    assert asked == [1, 2, 3, 4]  # none on the step to CLEAN
    asked.clear()
    last(ddpm(gaussian, noises()(0), levels, lambda k: asked.append(k) or noises()(k)))
    assert asked == [1, 2, 3, 4]


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_ddim_converges_at_first_order_to_the_exact_flow(name):
    def error(steps):
        # 1025 timesteps divide evenly; the step from t = 0 to CLEAN is the same at any number of
        # steps: not counted
        levels = process(name, 1025).levels(steps + 1)[:-1]
        x = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
        return (
            (last(ddim(gaussian, x, levels, noises())) - flow_to(x, levels[0], levels[-1]))
            .abs()
            .max()
            .item()
        )

    errors = [error(steps) for steps in (64, 128, 256, 512)]
    for coarse, fine in pairwise(errors):
        # first order; the rest is of second order
        assert coarse / fine == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("sampler", ["ddpm", "ddpm(variance='large')", "ddim(eta=0.5)"])
def test_stochastic_samplers_reproduce_mean_and_variance(sampler):
    shape = (20_000, 1, 1, 1)
    levels = process().levels(1000)
    generator = torch.Generator().manual_seed(0)

    def noise(k):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = last(
        registry.resolve("sampler", SAMPLERS, sampler)(
            gaussian, initial_noise(levels[0], noise(0)), levels, noise
        )
    )
    # five standard errors of 20,000 draws, and 0.005 for a thousand finite steps
    assert x.mean().item() == pytest.approx(MEAN, abs=5 * SPREAD / math.sqrt(20_000) + 0.005)
    assert x.std().item() == pytest.approx(SPREAD, abs=5 * SPREAD / math.sqrt(40_000) + 0.005)


@pytest.mark.parametrize("steps, spacing", [(1000, "leading"), (50, "leading"), (10, "trailing")])
@pytest.mark.parametrize(
    "predict, theirs", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]
)
@pytest.mark.parametrize(
    "name, reference_name", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_trajectories_agree_with_diffusers_ddim(
    eta, name, reference_name, predict, theirs, steps, spacing
):
    reference = DDIMScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=reference_name,
        clip_sample=True,
        prediction_type=theirs,
        timestep_spacing=spacing,
    )
    reference.set_timesteps(steps)
    net = Tiny()
    levels = process(name).levels(steps, spacing)
    walk = ddim(denoiser(net, predict=predict, clip=True), noises()(0), levels, noises(), eta=eta)
    x = noises()(0)
    for k, (t, ours) in enumerate(zip(reference.timesteps, walk, strict=True), start=1):
        out = net(x, t.reshape(1))
        x = reference.step(
            out, t, x, eta=eta, use_clipped_model_output=True, variance_noise=noises()(k)
        ).prev_sample
        if eta > 0 and k == steps and spacing == "trailing":
            break  # it adds noise on the step to clean images
        torch.testing.assert_close(ours, x, rtol=0, atol=FLOAT32_TABLES)


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize(
    "name, reference_name", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_trajectories_agree_with_diffusers_ddpm(name, reference_name, steps, variance):
    reference = DDPMScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=reference_name,
        clip_sample=True,
        variance_type=f"fixed_{variance}",
        timestep_spacing="leading",
    )
    reference.set_timesteps(steps)
    net = Tiny()
    levels = process(name).levels(steps, "leading")
    walk = ddpm(
        denoiser(net, predict="eps", clip=True), noises()(0), levels, noises(), variance=variance
    )
    x = noises()(0)
    for k, (t, ours) in enumerate(zip(reference.timesteps, walk, strict=True), start=1):
        same = torch.Generator().manual_seed(k)
        x = reference.step(net(x, t.reshape(1)), t, x, generator=same).prev_sample
        torch.testing.assert_close(ours, x, rtol=0, atol=FLOAT32_TABLES)


def test_float32_stays_float32_with_host_numbers_in_double():
    denoise = denoiser(lambda x, t, y: x.tanh(), predict="v", clip=True)
    single = noises(dtype=torch.float32)
    for sampler in SAMPLERS.values():
        assert last(sampler(denoise, single(0), process().levels(4), single)).dtype == torch.float32


def test_mistakes_name_the_remedy():
    levels = [process().level(3), CLEAN]
    with pytest.raises(ValueError, match="from 0 .* to 1"):
        last(ddim(gaussian, noises()(0), levels, noises(), eta=1.5))
    with pytest.raises(ValueError, match="choose one of small, large"):
        last(ddpm(gaussian, noises()(0), levels, noises(), variance="medium"))
    with pytest.raises(ValueError, match="choose one of .*ddim"):
        registry.resolve("sampler", SAMPLERS, "ddimm")
