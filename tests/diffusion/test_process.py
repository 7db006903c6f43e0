"""The forward process, its posterior and its targets, against Bayes, closed forms and diffusers."""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm.diffusion.denoiser import denoiser
from ddpm.diffusion.process import CLEAN, Level, Process, initial_noise, posterior
from ddpm.diffusion.schedules import get_beta_schedule, get_schedule, tables
from ddpm.diffusion.spacings import SPACINGS
from ddpm.diffusion.targets import TARGETS, get_target

EXACT = dict(rtol=1e-12, atol=1e-14)  # float64, a few operations


def process(name="linear", timesteps=1000):
    return Process(*get_schedule(name, timesteps))


def images(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def straight(timesteps):
    """A path off the circle that ends in pure noise: alpha = 1 - sigma."""
    sigma = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    return Process(1 - sigma, sigma)


def test_q_sample_has_the_moments_of_q():
    x0 = torch.full((40_000, 1, 1, 1), 0.7)
    t = torch.full((40_000,), 300)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    x = process().q_sample(x0, t, noise)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[
        300
    ].item()
    spread = math.sqrt(1 - alpha_bar)
    # five standard errors of a mean and of a standard deviation over 40,000 draws
    assert x.mean().item() == pytest.approx(math.sqrt(alpha_bar) * 0.7, abs=5 * spread / 200)
    assert x.std().item() == pytest.approx(spread, abs=5 * spread / math.sqrt(80_000))


def test_q_sample_takes_each_image_to_its_own_time_in_its_own_dtype():
    t = torch.tensor([0, 999, 17])
    x0 = images(3, 2, 4, 5)
    noise = images(3, 2, 4, 5, seed=1)
    reference = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)
    # its tables are float32: 6e-8 an operation over a product of up to 1000 factors
    torch.testing.assert_close(
        process().q_sample(x0, t, noise), reference.add_noise(x0, noise, t), rtol=0, atol=3e-5
    )
    assert process().q_sample(x0.float(), t, noise.float()).dtype == torch.float32


@pytest.mark.parametrize("name", ["linear", "cosine", "quadratic", "sigmoid"])
def test_posterior_is_bayes_rule(name):
    # q(x_{t-1} | x0) is N(m, p), x_t = a x_{t-1} + sqrt(b) eps; precisions add, by completing the
    # square
    betas = get_beta_schedule(name, 50)
    alpha_bar = torch.cumprod(1 - betas, 0)
    x0 = images(49, 1, 1, 1)
    x_t = images(49, 1, 1, 1, seed=1)
    t = torch.arange(1, 50)
    mean, variance, log_variance = process(name, 50).posterior(x0, x_t, t)
    m = alpha_bar[:-1].sqrt() * x0.flatten()
    p = 1 - alpha_bar[:-1]
    a = (1 - betas[1:]).sqrt()
    b = betas[1:]
    precision = 1 / p + a**2 / b
    # 1 - alpha_bar, as written here, loses up to 1e-16 / 1e-3 of itself
    torch.testing.assert_close(variance.flatten(), 1 / precision, rtol=1e-10, atol=0)
    torch.testing.assert_close(
        mean.flatten(), (m / p + a * x_t.flatten() / b) / precision, rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(log_variance, variance.log(), **EXACT)


def test_posterior_at_the_first_step_is_x0_with_a_finite_log_variance():
    x0 = images(2, 1, 2, 2)
    x_t = images(2, 1, 2, 2, seed=1)
    mean, variance, log_variance = process().posterior(x0, x_t, torch.tensor([0, 1]))
    assert torch.equal(mean[0], x0[0]) and variance[0] == 0
    assert log_variance[0] == log_variance[1] == variance[1].log()  # clipped as by Ho et al.
    assert torch.isfinite(process("linear", 1).posterior(x0, x_t, torch.tensor([0, 0]))[2]).all()


def test_posterior_over_a_stride_is_that_of_respaced_betas():
    full = process("cosine", 1000)
    times = [40, 41, 300, 640, 999]
    alpha_bar = full.alpha[times] ** 2
    # Improved DDPM, eq. 19
    betas = 1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    short = Process(*tables(betas))
    levels = [CLEAN] + [full.level(t) for t in times]
    x0 = images(5, 1, 2, 2)
    x_t = images(5, 1, 2, 2, seed=1)
    mean, variance, _ = short.posterior(x0, x_t, torch.arange(5))
    large = short.posterior(x0, x_t, torch.arange(5), "large")[1]
    for i, (s, t) in enumerate(pairwise(levels)):
        step = posterior(s, t)
        # ratios
        torch.testing.assert_close(
            step.of_x0 * x0[i] + step.of_x * x_t[i], mean[i], rtol=1e-9, atol=1e-12
        )
        # betas are differences: 1e-16 of rounding over about 1e-4, the smallest, between 40 and 41
        assert step.small == pytest.approx(variance[i].item(), rel=1e-9, abs=1e-15)
        assert step.large == pytest.approx(large[i].item(), rel=1e-9)
        assert step.large == pytest.approx(betas[i].item(), rel=1e-9)


def test_posterior_is_bayes_rule_off_the_circle_and_finite_in_pure_noise():
    flow = straight(4)
    s = flow.level(1)
    t = flow.level(2)
    a = t.alpha / s.alpha
    b = t.sigma**2 - (t.alpha / s.alpha * s.sigma) ** 2
    precision = 1 / s.sigma**2 + a**2 / b
    step = posterior(s, t)
    assert step.small == pytest.approx(1 / precision, rel=1e-12)  # float64, a few operations
    assert step.of_x == pytest.approx(a / b / precision, rel=1e-12)
    assert step.of_x0 == pytest.approx(s.alpha / s.sigma**2 / precision, rel=1e-12)
    # q(x_s | x0): pure noise tells nothing
    assert posterior(flow.level(2), flow.level(3)) == (0.25, 0, 0.75**2, 1)
    assert posterior(CLEAN, flow.level(3)) == (1, 0, 0, 1)


@pytest.mark.parametrize("alpha, sigma", [(0.8, 0.6), (0.3, 0.7), (1.0, 40.0)])
@pytest.mark.parametrize("predict", list(TARGETS))
def test_x0_comes_back_from_every_target_on_and_off_the_circle(predict, alpha, sigma):
    x0 = images(2, 3, 4, 4)
    eps = images(2, 3, 4, 4, seed=1)
    out = get_target(predict).compute(x0, eps, alpha, sigma)
    torch.testing.assert_close(
        get_target(predict).x0(alpha * x0 + sigma * eps, out, alpha, sigma), x0, rtol=0, atol=1e-12
    )


def test_targets_are_the_published_ones():
    x0 = images(2, 3, 4, 4)
    eps = images(2, 3, 4, 4, seed=1)
    t = torch.tensor([100, 900])
    reference = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02)
    _, alpha, sigma = process().at(t)
    # its tables are float32: 6e-8 an operation over a product of up to 1000 factors
    ours = get_target("v").compute(x0, eps, alpha, sigma)
    torch.testing.assert_close(ours, reference.get_velocity(x0, eps, t), rtol=0, atol=3e-5)
    assert (
        get_target("eps").compute(x0, eps, alpha, sigma) is eps
        and get_target("x0").compute(x0, eps, alpha, sigma) is x0
    )
    torch.testing.assert_close(get_target("flow").compute(x0, eps, alpha, sigma), eps - x0)
    # on the circle EDM's preconditioning with images of unit deviation is the velocity, up to its
    # sign
    torch.testing.assert_close(
        get_target("edm(sigma_data=1.0)").compute(x0, eps, alpha, sigma),
        -ours.double(),
        rtol=0,
        atol=3e-5,
    )


def test_edm_is_the_published_preconditioning():
    sigma = 3.0
    data = 0.5
    y = images(2, 3, 4, 4)  # alpha = 1: x is theirs
    target = get_target("edm")
    out = images(2, 3, 4, 4, seed=1)
    c_skip = data**2 / (sigma**2 + data**2)
    c_out = sigma * data / math.sqrt(sigma**2 + data**2)
    torch.testing.assert_close(target.x0(y, out, 1.0, sigma), c_skip * y + c_out * out)
    torch.testing.assert_close(target.scale_input(y, 1.0, sigma), y / math.sqrt(sigma**2 + data**2))
    assert target.c_noise(17.0, 1.0, sigma) == math.log(sigma) / 4
    asked = []
    denoiser(lambda x, t, y: asked.append((x, t)) or x, predict="edm", clip=False)(
        y, Level(17.0, 1.0, sigma)
    )
    torch.testing.assert_close(asked[0][0], y / math.sqrt(sigma**2 + data**2))
    assert asked[0][1].tolist() == pytest.approx([math.log(sigma) / 4] * 2, rel=1e-6)  # float32


def test_a_self_conditioned_network_sees_its_last_estimate():
    seen = []

    def net(x, t, y):
        seen.append(x[:, 1:])
        return x[:, :1] + 1

    x = images(2, 1, 4, 4)
    denoise = denoiser(net, predict="x0", clip=False, self_condition=True)
    first, _ = denoise(x, Level(2.0, 0.8, 0.6))
    denoise(first, Level(1.0, 0.9, 0.4))
    assert (seen[0] == 0).all() and torch.equal(seen[1], first)


@pytest.mark.parametrize("predict", list(TARGETS))
def test_denoiser_recovers_x0_and_eps_and_tells_the_network_its_time(predict):
    x0 = images(3, 1, 4, 4).clamp(-1, 1).float()
    eps = images(3, 1, 4, 4, seed=1).float()
    level = process().level(250.5)
    labels = torch.tensor([2, 0, 1])
    asked = []

    def net(x, t, y):
        asked.append((t, y))
        return get_target(predict).compute(x0, eps, level.alpha, level.sigma)

    for clip in (False, True):
        got = denoiser(net, predict=predict, clip=clip, y=labels)(
            level.alpha * x0 + level.sigma * eps, level
        )
        # float32, 6e-8 an operation, over sigma = 0.65
        torch.testing.assert_close(got, (x0, eps), rtol=0, atol=2e-6)
    told = get_target(predict).c_noise(250.5, level.alpha, level.sigma)
    assert (
        asked[0][0].dtype == torch.float32
        and asked[0][0].tolist() == [pytest.approx(told)] * 3
        and asked[0][1] is labels
    )


def test_clipping_x0_changes_eps_so_that_both_still_make_x():
    x = 3 * images(2, 1, 4, 4).float()
    level = process().level(500)
    x0, eps = denoiser(lambda x, t, y: torch.zeros_like(x), predict="eps", clip=True)(x, level)
    assert x0.abs().max() == 1 and eps.abs().max() > 0
    # float32 of values up to 10
    torch.testing.assert_close(level.alpha * x0 + level.sigma * eps, x, rtol=0, atol=2e-6)


def test_the_denoiser_answers_in_the_dtype_of_x_whatever_the_network_does():
    half = denoiser(lambda x, t, y: x.bfloat16(), predict="v", clip=True)
    assert [part.dtype for part in half(torch.zeros(1, 1, 2, 2), process().level(3))] == [
        torch.float32
    ] * 2


def test_levels_at_integers_are_the_tables_and_between_them_log_snr_is_a_line():
    noising = process("cosine", 100)
    assert noising.level(7) == Level(7.0, noising.alpha[7].item(), noising.sigma[7].item())
    low, middle, high = (noising.level(t) for t in (7, 7.25, 8))
    log = [math.log(level.sigma / level.alpha) for level in (low, middle, high)]
    # float64, a few operations
    assert log[1] == pytest.approx(0.75 * log[0] + 0.25 * log[2], rel=1e-12)
    assert math.hypot(middle.alpha, middle.sigma) == pytest.approx(1, rel=1e-14)
    assert middle.t == 7.25


def test_levels_between_off_the_known_paths():
    sigma = torch.arange(1, 5, dtype=torch.float64) / 4
    flow = Process(1 - sigma, 1.5 * sigma)
    low, middle, high = (flow.level(t) for t in (0, 0.5, 1))
    for of in (
        lambda level: level.sigma / level.alpha,
        lambda level: math.hypot(level.alpha, level.sigma),
    ):
        # halfway between logarithms
        assert of(middle) ** 2 == pytest.approx(of(low) * of(high), rel=1e-12)
    last = flow.level(2.5)
    # halfway to an infinite ratio is infinite, and no nan
    assert last.alpha == 0 and math.isfinite(last.sigma)


@pytest.mark.parametrize(
    "spacing, theirs", [("linear", "linspace"), ("trailing", "trailing"), ("leading", "leading")]
)
@pytest.mark.parametrize("steps", [7, 10, 50, 1000])
def test_spacings_are_those_of_diffusers(spacing, theirs, steps):
    reference = DDPMScheduler(1000, timestep_spacing=theirs)
    reference.set_timesteps(steps)
    levels = process().levels(steps, spacing)
    assert [level.t for level in levels[:-1]] == reference.timesteps.tolist()
    assert levels[-1] == CLEAN


@pytest.mark.parametrize("timesteps", [1, 2, 10, 37])
# which come in fixed numbers
@pytest.mark.parametrize("spacing", [spacing for spacing in SPACINGS if spacing != "sections"])
def test_any_number_of_steps_descends_to_clean(spacing, timesteps):
    for steps in range(1, timesteps + 1):
        times = [level.t for level in process("cosine", timesteps).levels(steps, spacing)]
        assert len(times) == steps + 1 and times[-1] == -1
        assert all(before > after for before, after in pairwise(times))
        assert times[0] == timesteps - 1 or spacing in ("leading", "karras")


def test_the_latent_has_the_spread_of_unit_images_at_its_level():
    noise = images(2, 1, 3, 3).float()
    assert torch.equal(initial_noise(process().level(999), noise), noise)
    assert torch.equal(initial_noise(Level(9.0, 3.0, 4.0), noise), 5 * noise)


@pytest.mark.parametrize(
    "mistake, remedy",
    [
        (lambda: process().levels(0), "1 to 1000"),
        (lambda: process().levels(1001), "1 to 1000"),
        (lambda: process().levels(2.5), "1 to 1000"),
        (lambda: process().levels(10, "trail"), "did you mean 'trailing'"),
        (lambda: process().level(999.5), "from 0 to 999"),
        (lambda: process().level(-0.5), "from 0 to 999"),
        (lambda: process().level(math.nan), "from 0 to 999"),
        (lambda: denoiser(None, predict="epsilon", clip=True), "choose one of .*eps"),
    ],
)
def test_mistakes_name_the_remedy(mistake, remedy):
    with pytest.raises(ValueError, match=remedy) as error:
        mistake()
    assert "\n" not in str(error.value)
