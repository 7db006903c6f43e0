"""Noise schedules against their closed forms and against diffusers."""

import math

import pytest
import torch
from diffusers import DDPMScheduler

from ddpm.diffusion import schedules
from ddpm.diffusion.schedules import SCHEDULES, get_beta_schedule, get_schedule, tables

LENGTHS = [1, 2, 10, 1000, 4000, 10_000]
# betas read back from tables: some ulps of 1 - beta, which is at most 1
ROUNDING = dict(rtol=0, atol=1e-14)


@pytest.mark.parametrize("timesteps", LENGTHS)
@pytest.mark.parametrize("name", ["linear", "cosine", "quadratic", "sigmoid", "sigmoid(tau=0.3)"])
def test_every_schedule_is_finite_and_adds_noise_at_every_step(name, timesteps):
    alpha, sigma = get_schedule(name, timesteps)
    betas = get_beta_schedule(name, timesteps)
    assert alpha.shape == sigma.shape == betas.shape == (timesteps,)
    assert alpha.dtype == sigma.dtype == betas.dtype == torch.float64
    assert (betas > 0).all() and (betas <= 0.999).all()
    assert (torch.diff(alpha) < 0).all() and (torch.diff(sigma / alpha) > 0).all()
    assert alpha[-1] > 0 and alpha[0] < 1 and sigma[0] > 0 and sigma[-1] <= 1  # 1 - 1e-17 is 1
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), **ROUNDING)


@pytest.mark.parametrize("timesteps", LENGTHS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_every_path_is_finite_and_adds_noise_at_every_step(name, timesteps):
    for zero_terminal in (False, True):
        alpha, sigma = get_schedule(name, timesteps, zero_terminal)
        assert (
            alpha.shape == sigma.shape == (timesteps,)
            and alpha.dtype == sigma.dtype == torch.float64
        )
        assert alpha.isfinite().all() and sigma.isfinite().all() and sigma[0] > 0
        assert (torch.diff(sigma / alpha) > 0).all()
        assert (alpha[-1] == 0) == ((zero_terminal and timesteps > 1) or name == "flow")


def test_laplace_quantiles_are_those_of_its_distribution():
    log_snr = 2 * (torch.div(*get_schedule("laplace(mean=1.0, scale=0.7)", 999))).log()
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    one, scale = torch.tensor([1.0, 0.7], dtype=torch.float64)
    # t is the probability of more than this log-SNR; sigmoid and its inverse keep 1e-15 of values
    # up to 1e3
    torch.testing.assert_close(
        torch.distributions.Laplace(one, scale).icdf(1 - t), log_snr, rtol=0, atol=1e-9
    )


def test_shifted_cosine_is_the_cosine_of_a_smaller_image():
    plain, shifted = (get_schedule(f"shifted_cosine(resolution={size})", 100) for size in (64, 256))
    # averaging 4x4 pixels divides the noise's deviation by 4: the published reason for the shift
    torch.testing.assert_close(plain[1] / plain[0], shifted[1] / shifted[0] / 4, rtol=1e-12, atol=0)
    t = torch.arange(1, 101, dtype=torch.float64) / 101
    torch.testing.assert_close(plain[0], torch.cos(t * math.pi / 2), rtol=0, atol=1e-12)


def test_flow_is_a_straight_line_and_edm_a_geometric_one():
    alpha, sigma = get_schedule("flow", 10)
    torch.testing.assert_close(sigma, torch.arange(1, 11, dtype=torch.float64) / 10, **ROUNDING)
    torch.testing.assert_close(alpha + sigma, torch.ones_like(alpha), **ROUNDING)
    assert get_schedule("flow(shift=3.0)", 10)[1][4].item() == pytest.approx(
        3 * 0.5 / (1 + 2 * 0.5)
    )
    alpha, sigma = get_schedule("edm", 1000)
    assert (
        (alpha == 1).all() and sigma[0] == pytest.approx(0.002) and sigma[-1] == pytest.approx(80)
    )
    assert torch.diff(sigma.log()).std() < 1e-12


def test_zero_terminal_snr_is_the_published_rescaling():
    ours = get_schedule("linear", 1000, zero_terminal=True)[0]
    theirs = DDPMScheduler(
        1000, beta_start=1e-4, beta_end=0.02, rescale_betas_zero_snr=True
    ).alphas_cumprod.sqrt()
    # theirs is float32, ends at 2^-24 instead of 0, and multiplies a thousand factors
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=3e-4)
    assert ours[0] == pytest.approx(get_schedule("linear", 1000)[0][0].item(), rel=1e-12)


def test_linear_and_quadratic_are_the_published_lines_at_1000():
    line = 1e-4 + (0.02 - 1e-4) * torch.arange(1000, dtype=torch.float64) / 999
    torch.testing.assert_close(get_beta_schedule("linear", 1000), line, **ROUNDING)
    roots = 0.01 + (math.sqrt(0.02) - 0.01) * torch.arange(1000, dtype=torch.float64) / 999
    torch.testing.assert_close(get_beta_schedule("quadratic", 1000), roots**2, **ROUNDING)


@pytest.mark.parametrize("name", ["linear", "quadratic"])
def test_rescaling_keeps_the_end_as_noisy_at_any_length(name):
    def log_alpha_bar(timesteps):
        return 2 * get_schedule(name, timesteps)[0][-1].log().item()

    # a sum of log(1 - beta), -7 to -10: its second-order term, the sum of beta^2 / 2, is 0.07 at T
    # = 1000 and ten times that at T = 100; without the rescaling the full sum would be four times
    # as large at T = 4000
    assert log_alpha_bar(100) == pytest.approx(log_alpha_bar(1000), rel=0.1)
    assert log_alpha_bar(4000) == pytest.approx(log_alpha_bar(1000), rel=0.01)


def test_cosine_alpha_bar_is_a_squared_cosine():
    alpha, _ = get_schedule("cosine", 1000)
    t = torch.arange(1, 1000, dtype=torch.float64)  # the last step is the clipped one
    f = (
        torch.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
        / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    )
    # a product of 1000 factors, each an ulp off; near the end the cosine itself keeps 1e-13
    torch.testing.assert_close(alpha[:-1] ** 2, f, rtol=1e-12, atol=0)
    assert get_beta_schedule("cosine", 1000)[-1] == 0.999


@pytest.mark.parametrize("options", [{}, {"tau": 0.5}, {"start": 0.0, "end": 3.0, "tau": 0.7}])
def test_sigmoid_alpha_bar_is_a_rescaled_logistic(options):
    start, end, tau = (
        options.get(key, default) for key, default in [("start", -3.0), ("end", 3.0), ("tau", 1.0)]
    )
    alpha, _ = SCHEDULES["sigmoid"](1000, **options)
    u = torch.arange(1, 1000, dtype=torch.float64) / 1000
    low, high = torch.sigmoid(torch.tensor([start, end], dtype=torch.float64) / tau)
    expected = (high - torch.sigmoid((u * (end - start) + start) / tau)) / (high - low)
    # the difference with `high` cancels: 1e-16 of rounding over a last value of about 1e-6
    torch.testing.assert_close(alpha[:-1] ** 2, expected, rtol=1e-9, atol=0)


def test_tables_keep_both_ends_to_full_precision():
    # after t equal steps alpha_bar is (1 - beta)^t
    _, sigma = tables(torch.full((3000,), 1e-14, dtype=torch.float64))
    # some ulps; from 1 - alpha_bar it would be 0.1 % off
    assert sigma[0].item() == pytest.approx(1e-7, rel=1e-15)
    alpha, _ = tables(torch.full((2000,), 0.3, dtype=torch.float64))
    # 2000 roundings of an exponent near 357, 6e-14 each
    assert alpha[-1].item() == pytest.approx(0.7**1000, rel=1e-10)


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ("linear", "linear"),
        ("cosine", "squaredcos_cap_v2"),
        ("quadratic", "scaled_linear"),
    ],
)
def test_agreement_with_diffusers(ours, theirs):
    reference = DDPMScheduler(1000, beta_start=1e-4, beta_end=0.02, beta_schedule=theirs)
    # its betas are float32, 6e-8 an operation; its alpha_bar is a product of 1000 factors 1 - beta,
    # each rounded up to 6e-8, so 6e-5 at worst; the cosine's last factor, 0.001, carries its
    # rounding a thousandfold: again 6e-5
    torch.testing.assert_close(
        get_beta_schedule(ours, 1000).float(), reference.betas, rtol=1e-6, atol=0
    )
    alpha_bar = get_schedule(ours, 1000)[0] ** 2
    torch.testing.assert_close(alpha_bar.float(), reference.alphas_cumprod, rtol=1e-4, atol=0)


def test_a_name_may_carry_its_options():
    assert torch.equal(
        get_schedule("sigmoid(tau=0.5)", 50)[0], SCHEDULES["sigmoid"](50, tau=0.5)[0]
    )
    assert torch.equal(
        get_schedule("linear(end=0.01)", 1000)[0], SCHEDULES["linear"](1000, end=0.01)[0]
    )


@pytest.mark.parametrize(
    "name, timesteps, remedy",
    [
        ("cosin", 10, "did you mean 'cosine'.*choose one of .*linear"),
        ("sigmoid(tua=0.5)", 10, "it accepts start, end, tau"),
        ("linear", 0, "whole number from 1 to 10000"),
        ("linear", 10_001, "whole number from 1 to 10000"),
        ("linear", 10.5, "whole number from 1 to 10000"),
        ("sigmoid(tau=0.0)", 10, "choose other arguments"),
        ("quadratic(start=-1.0)", 10, "choose other arguments"),
        ("linear(start=0.0)", 10, "choose other arguments"),
        ("linear(end=0.0)", 10, "choose other arguments"),
    ],
)
def test_mistakes_name_the_remedy(name, timesteps, remedy):
    with pytest.raises(ValueError, match=remedy) as mistake:
        get_beta_schedule(name, timesteps)
    assert "\n" not in str(mistake.value)


def test_a_path_off_the_circle_has_tables_but_no_betas(monkeypatch):
    def straight(timesteps):
        sigma = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
        return 1 - sigma, sigma

    monkeypatch.setitem(schedules.SCHEDULES, "straight", straight)
    assert get_schedule("straight", 4)[1].tolist() == [0.25, 0.5, 0.75, 1]
    with pytest.raises(ValueError, match="has no betas.*use get_schedule"):
        get_beta_schedule("straight", 4)
