"""Losses, weightings and distributions of times against their closed forms, and against loops
written out.
"""

import itertools
import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from scipy.integrate import quad
from torch.distributions import Normal, kl_divergence

from ddpm.common import rng
from ddpm.common.registry import resolve
from ddpm.config import files
from ddpm.diffusion import likelihood
from ddpm.diffusion.ddpm import DDPM
from ddpm.diffusion.losses import Objective
from ddpm.diffusion.process import Process
from ddpm.diffusion.schedules import SCHEDULES, get_schedule
from ddpm.diffusion.targets import TARGETS, get_target
from ddpm.diffusion.timesteps import TIMES, Importance
from ddpm.diffusion.weightings import WEIGHTINGS, Uncertainty
from ddpm.experiment import build, load, remarks
from ddpm.studies import runs
from ddpm.training import weights as training_weights
from support.runs import rows, run, tiny


def images(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def process(name="cosine", timesteps=100):
    return Process(*get_schedule(name, timesteps))


def weighting_of(name, noise):
    """A weighting of the table, as an objective of a process has it."""
    return Objective(noise, get_target("x0"), weighting=name).weighting


def weigh(name, target, level, noise=None):
    """The weight that a weighting gives to the error on a target."""
    error = torch.ones(len(level.t), dtype=torch.float64)
    return weighting_of(name, noise or process())(error, level, get_target(target))


T = torch.tensor([3, 40, 80])


# the published weights, on the error of eps, as functions of the SNR
@pytest.mark.parametrize(
    "name, of_eps",
    [
        ("simple", lambda snr: 1 + 0 * snr),
        ("min_snr(gamma=4.0)", lambda snr: snr.clamp(max=4.0) / snr),
        ("soft_min_snr(gamma=4.0)", lambda snr: 4 / (snr + 4)),
        ("p2(k=1.5, gamma=0.5)", lambda snr: (1.5 + snr) ** -0.5),
        ("sigmoid_eps(bias=1.0)", lambda snr: 1 / (1 + snr / math.e)),
        ("edm(sigma_data=0.5)", lambda snr: (snr + 4) / snr),
    ],
)
def test_weightings_of_eps_are_the_published_ones(name, of_eps):
    level = process().at(T)
    snr = ((level.alpha / level.sigma) ** 2).flatten()
    # float64, a few operations
    torch.testing.assert_close(weigh(name, "eps", level), of_eps(snr), rtol=1e-12, atol=0)


def test_min_snr_of_the_other_targets_is_the_published_one():
    level = process().at(T)  # Hang et al. 2023, section 3.5
    snr = ((level.alpha / level.sigma) ** 2).flatten()
    torch.testing.assert_close(weigh("min_snr", "x0", level), snr.clamp(max=5), rtol=1e-12, atol=0)
    torch.testing.assert_close(
        weigh("min_snr", "v", level), snr.clamp(max=5) / (snr + 1), rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("path", ["cosine", "flow", "edm"])
@pytest.mark.parametrize(
    "name", [name for name in WEIGHTINGS if name not in ("simple", "uncertainty")]
)
def test_a_weighting_is_of_the_estimate_and_not_of_the_target(name, path):
    x0, eps, guess = (images(3, 1, 2, 2, seed=seed) for seed in range(3))
    noise = process(path)
    losses = []
    level = noise.at(T)
    for target in map(get_target, TARGETS):
        make = partial(target.compute, alpha=level.alpha, sigma=level.sigma)
        wrong = (level.alpha * x0 + level.sigma * eps - level.alpha * guess) / level.sigma
        error = ((make(x0, eps) - make(guess, wrong)) ** 2).mean((1, 2, 3))
        losses.append(weighting_of(name, noise)(error, level, target))
    for other in losses[1:]:
        # float64; eps at sigma = 40 loses six digits
        torch.testing.assert_close(other, losses[0], rtol=1e-8, atol=0)


def test_no_two_weightings_are_one_at_their_defaults():
    """sigmoid_eps with bias 0 and P2 are one function, as the study `targets` found out: 1 / (1
    + SNR).
    """
    level = process().at(T)
    found = {name: weigh(name, "eps", level) for name in WEIGHTINGS if name != "uncertainty"}
    for one, other in itertools.combinations(found, 2):
        assert not torch.allclose(found[one], found[other], rtol=1e-3), f"{one} is {other}"
    torch.testing.assert_close(
        weigh("sigmoid_eps(bias=0.0)", "eps", level), found["p2"], rtol=1e-12, atol=0
    )


def cosine_log_snr(t):
    """Of Nichol & Dhariwal 2021, eq. 17, at t of 1000."""
    f = [math.cos((at / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for at in (t + 1, 0)]
    return math.log(f[0] / (f[1] - f[0]))


def linear_log_snr(t):
    """Of Ho et al. 2020: the product of 1 - beta_i for i = 0 .. t, betas on a line, is a ratio
    of gamma functions.
    """
    rise = (0.02 - 1e-4) / 999
    z = (1 - 1e-4) / rise
    log_alpha_bar = (t + 1) * math.log(rise) + math.lgamma(z + 1) - math.lgamma(z - t)
    return log_alpha_bar - math.log(-math.expm1(log_alpha_bar))


LOG_SNR = {
    "linear": linear_log_snr,
    "cosine": cosine_log_snr,
    "flow": lambda t: 2 * math.log((1000 - t - 1) / (t + 1)),
    "edm": lambda t: -2 * math.log(0.002 * (80 / 0.002) ** (t / 999)),
}


@pytest.mark.parametrize("bias", [2.0, -1.0])
@pytest.mark.parametrize("path", LOG_SNR)
def test_sigmoid_is_the_loss_of_the_papers(path, bias):
    """-1/2 dlambda/dt e^b sigmoid(lambda - b) on x0, up to a factor, by the schedules' closed
    forms (Kingma & Gao 2023).
    """
    noise = process(path, 1000)
    log_snr = LOG_SNR[path]
    t = torch.tensor([12, 40, 200, 500, 700, 900, 960, 987])
    lambdas = torch.tensor([log_snr(at) for at in t.tolist()], dtype=torch.float64)
    slopes = torch.tensor(
        [(log_snr(at + 1e-3) - log_snr(at - 1e-3)) / 2e-3 for at in t.tolist()], dtype=torch.float64
    )
    papers = -0.5 * slopes * math.exp(bias) * torch.sigmoid(lambdas - bias)
    ours = weigh(f"sigmoid(bias={bias})", "x0", noise.at(t), noise)
    # central differences at k steps from where lambda has its pole are off by 1/(3 k^2): 2e-3 at k
    # = 13
    torch.testing.assert_close(ours / ours[3], papers / papers[3], rtol=3e-3, atol=0)
    of_eps = weigh(f"sigmoid(bias={bias})", "eps", noise.at(t), noise)
    expected = slopes * torch.sigmoid(bias - lambdas)
    torch.testing.assert_close(of_eps / of_eps[3], expected / expected[3], rtol=3e-3, atol=0)


@pytest.mark.parametrize(
    "path, ratio",
    [
        # log-SNR 2 log cot u, whose slope is 4 / sin 2u
        ("cosine(s=0.0)", lambda log_snr: 1 / torch.cosh(log_snr / 2)),
        ("flow", lambda log_snr: 1 / torch.cosh(log_snr / 4) ** 2),
        ("edm", torch.ones_like),
    ],
)
def test_sigmoid_eps_lacks_the_slope_of_the_schedule(path, ratio):
    noise = process(path, 1000)
    level = noise.at(torch.arange(1000))
    log_snr = 2 * (noise.alpha / noise.sigma).log()
    lacking = weigh("sigmoid_eps", "x0", level, noise) / weigh("sigmoid", "x0", level, noise)
    middle = int(log_snr.abs().argmin())
    expected = ratio(log_snr)
    inner = slice(10, 990)  # 10 steps from a pole central differences are off by 3e-3
    torch.testing.assert_close(
        (lacking / lacking[middle])[inner], (expected / expected[middle])[inner], rtol=5e-3, atol=0
    )
    finite = log_snr.isfinite()  # the factor is 1 in the mean, so that the loss keeps its scale
    assert (1 / lacking[finite]).mean().item() == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize("timesteps", [1, 2, 3, 1000])
@pytest.mark.parametrize("target", ["x0", "v", "flow"])
def test_sigmoid_is_finite_at_every_level_and_0_in_pure_noise(target, timesteps):
    noise = Process(*get_schedule("linear", timesteps, zero_terminal=True))
    weights = weigh("sigmoid", target, noise.at(torch.arange(timesteps)), noise)
    assert weights.isfinite().all() and (weights[:-1] > 0).all()
    assert (weights[-1] == 0) == (timesteps > 1)


# as the SNR, whose weight on x0 is finite times it
VANISHING = {"min_snr", "soft_min_snr", "p2", "sigmoid", "sigmoid_eps"}


@pytest.mark.parametrize("zero_terminal", [False, True])
@pytest.mark.parametrize("path", SCHEDULES)
def test_a_loss_that_weighs_nothing_where_sampling_starts_is_told(path, zero_terminal):
    for target, name in itertools.product(TARGETS, WEIGHTINGS):
        ends = zero_terminal or path == "flow"
        if ends and not get_target(target).defined_at_zero_snr:
            continue  # refused
        model = DDPM(None, 40, path, target, zero_terminal_snr=zero_terminal, weighting=name)
        # begin below
        for spacing, begins in (
            ("linear", True),
            ("trailing", True),
            ("leading", False),
            ("karras", False),
        ):
            told = remarks.loss_remarks(tiny(sample__steps=12, sample__spacing=spacing), model)
            assert bool(told) == (begins and ends and name in VANISHING), (target, name, spacing)


def test_the_share_of_the_last_times_is_told(tmp_path):
    def weight(u):  # P2 on x0 along the straight path: SNR / (1 + SNR)
        return (1 - u) ** 2 / ((1 - u) ** 2 + u**2)

    model = DDPM(None, 1000, "flow", "x0", weighting="p2")
    (line,) = remarks.loss_remarks(tiny(), model)
    share = float(
        re.search(r"no weight to t = 999, where sampling starts, and (\S+) of its weight", line)[1]
    )
    # a sum over 50 t, in two digits
    assert share == pytest.approx(quad(weight, 0.95, 1)[0] / quad(weight, 0, 1)[0], rel=0.08)
    run(
        tiny(
            diffusion__beta_schedule="flow",
            diffusion__predict="v",
            diffusion__weighting="min_snr",
            train__length="1 steps",
            every__sample="0 steps",
        ),
        tmp_path,
    )
    assert "no weight to t = 19, where sampling starts" in (tmp_path / "training.log").read_text()


def test_edm_weighting_is_simple_on_its_own_target():
    level = process("edm").at(T)
    torch.testing.assert_close(
        weigh("edm(sigma_data=0.4)", "edm(sigma_data=0.4)", level),
        torch.ones(3, dtype=torch.float64),
    )


def test_uncertainty_learns_the_logarithm_of_the_error():
    noise = process(timesteps=50)
    level = noise.at(torch.arange(50))
    error = torch.linspace(0.2, 3, 50)
    weighting = Uncertainty(noise)
    assert torch.equal(weighting(error, level, None), error)  # u = 0 at first
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.02)
    for _ in range(300):
        optimizer.zero_grad()
        weighting(error, level, None).mean().backward()
        optimizer.step()
    # at the minimum e^u = error and the loss 1 + log(error); a fit by 128 waves in 300 steps comes
    # within a few percent
    torch.testing.assert_close(
        weighting(error, level, None).mean(), (1 + error.log()).mean(), rtol=0, atol=0.01
    )


def draws(name, n, noise, batch_size=64):
    """t of many batches, at addresses as in training."""
    times = resolve("time distribution", TIMES, name)
    positions = range(batch_size)
    uniforms = [partial(rng.uniform, 0, "t", step) for step in range(n // batch_size)]
    return torch.cat([times(noise, positions, batch_size, uniform)[0] for uniform in uniforms])


def test_times_are_distributed_as_they_say():
    noise = process("edm", 1000)
    n = 6400
    sampling = 4 * 0.5 / math.sqrt(n)  # four deviations of a share near one half
    for name in ("uniform", "stratified", "antithetic"):
        t = draws(name, n, noise)
        assert (t < 500).float().mean().item() == pytest.approx(0.5, abs=sampling)
        assert t.min() >= 0 and t.max() <= 999
    t = draws("logit_normal(mean=0.5, std=0.8)", n, noise).double()
    logit = ((t + 0.5) / 1000).logit()
    assert logit.mean().item() == pytest.approx(0.5, abs=4 * 0.8 / math.sqrt(n))
    assert logit.std().item() == pytest.approx(0.8, rel=4 / math.sqrt(2 * n))
    log_sigma = noise.sigma[draws("lognormal", n, noise)].log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=4 * 1.2 / math.sqrt(n))
    assert log_sigma.std().item() == pytest.approx(1.2, rel=4 / math.sqrt(2 * n))


def test_stratified_has_one_image_in_each_stretch_and_antithetic_comes_in_pairs():
    noise = process(timesteps=640)
    for t in draws("stratified", 640, noise).split(64):
        # rounding down moves each by less than one
        assert (torch.diff(t.sort().values) - 10).abs().max() <= 1
    pairs = draws("antithetic", 640, noise).view(-1, 2)
    assert (pairs.sum(1) == 639).all()


@pytest.mark.parametrize("name", TIMES)
def test_micro_batches_and_ranks_draw_the_times_of_the_whole_batch(name):
    noise = process(timesteps=30)
    chosen = resolve("time distribution", TIMES, name)
    times = chosen(noise) if name == "importance" else chosen
    uniform = partial(rng.uniform, 3, "t", 7)
    whole, _ = times(noise, range(8), 8, uniform)
    parts = [times(noise, range(start, start + 2), 8, uniform)[0] for start in (0, 2, 4, 6)]
    assert torch.equal(torch.cat(parts), whole)


def test_importance_remembers_the_last_losses_of_each_time():
    noise = process(timesteps=4)
    kept = [[] for _ in range(4)]
    times = Importance(noise, history=3)
    generator = torch.Generator().manual_seed(0)
    # batches in which a time comes up to eight times, and some losses are not numbers
    for _ in range(5):
        t = torch.randint(4, (8,), generator=generator)
        losses = torch.rand(8, generator=generator)
        losses[torch.rand(8, generator=generator) < 0.2] = math.nan
        times.observe(t, losses)
        for one, loss in zip(t.tolist(), losses.tolist(), strict=True):
            if not math.isnan(loss):
                kept[one] = [*kept[one], loss][-3:]
    assert all(len(row) == 3 for row in kept)
    torch.testing.assert_close(
        times.losses.sort(1).values, torch.tensor(kept).sort(1).values, rtol=0, atol=0
    )


def test_importance_draws_by_the_root_of_the_second_moment_and_stays_fair():
    noise = process(timesteps=4)
    losses = torch.tensor([1.0, 2.0, 3.0, 10.0])
    times = Importance(noise, history=2, uniform=0.2)
    u = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    even, _ = times(noise, range(4000), 4000, lambda positions: u)
    assert torch.bincount(even).tolist() == [1000] * 4  # until every time is known
    times.observe(torch.arange(4).repeat(2), losses.repeat(2))
    t, importance = times(noise, range(4000), 4000, lambda positions: u)
    share = 0.8 * losses / 16 + 0.2 / 4
    assert torch.bincount(t).tolist() == pytest.approx((4000 * share).tolist(), abs=1)
    # the weighted mean stays that of even times; shares are rounded to one of 4000
    assert (losses[t] * importance).mean().item() == pytest.approx(losses.mean().item(), rel=2e-3)


def test_kl_and_pixel_likelihood_are_those_of_torch():
    mean = images(50)
    other = images(50, seed=1)
    a = images(50, seed=2)
    b = images(50, seed=3)
    reference = kl_divergence(Normal(mean, (a / 2).exp()), Normal(other, (b / 2).exp()))
    torch.testing.assert_close(
        likelihood.normal_kl(mean, a, other, b), reference, rtol=1e-10, atol=1e-12
    )

    pixels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for centre, log_variance in ((0.1, -3.0), (-0.99, -8.0), (1.7, -2.0)):
        normal = Normal(torch.tensor(centre, dtype=torch.float64), math.exp(log_variance / 2))
        edges = (pixels[1:] + pixels[:-1]) / 2
        below = torch.cat([torch.zeros(1), normal.cdf(edges), torch.ones(1)])
        ours = likelihood.discretized_gaussian_log_likelihood(
            pixels, torch.full_like(pixels, centre), torch.full_like(pixels, log_variance)
        )
        assert ours.exp().sum().item() == pytest.approx(1, abs=1e-9)
        # a difference of two numbers near 1, as written here, loses up to 1e-16
        torch.testing.assert_close(ours.exp(), torch.diff(below), rtol=1e-6, atol=1e-14)
    far = likelihood.discretized_gaussian_log_likelihood(
        torch.tensor([0.5]), torch.tensor([-0.9]), torch.tensor([-14.0])
    )
    # 1.4 / e^-7 deviations away: finite, where a difference of masses is log(0)
    assert -1e7 < far.item() < -1e6


class Two(torch.nn.Module):
    """Means and variances from two weights."""

    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.tensor(0.3))
        self.variance = torch.nn.Parameter(torch.tensor(0.1))

    def forward(self, x, t, y):
        return torch.cat([self.mean * x, self.variance * torch.ones_like(x)], dim=1)


def gradients(**options):
    model = DDPM(Two(), timesteps=20, beta_schedule="cosine", **options)
    x0 = images(6, 1, 4, 4).clamp(-1, 1).float()
    noise = images(6, 1, 4, 4, seed=1).float()
    model.losses(x0, torch.tensor([0, 1, 5, 9, 15, 19]), noise).mean().backward()
    return model.net.mean.grad, model.net.variance.grad


def test_the_bound_teaches_the_variance_and_stops_at_the_mean():
    only, _ = gradients(variance="learned", loss="hybrid(vlb_weight=0.0001)")
    more, variance = gradients(variance="learned", loss="hybrid(vlb_weight=1.0)")
    assert torch.equal(only, more) and variance != 0
    whole, _ = gradients(variance="learned", loss="vlb")
    assert not torch.equal(whole, more)


@pytest.mark.parametrize("t", [0, 1, 10])
def test_a_term_of_the_bound_is_the_published_one(t):
    noise = process(timesteps=20)
    x0 = (
        torch.randint(256, (2, 1, 3, 3), generator=torch.Generator().manual_seed(0)) / 127.5 - 1
    ).double()
    times = torch.full((2,), t)
    x_t = noise.q_sample(x0, times, images(2, 1, 3, 3))
    guess = 0.9 * x0
    frac = torch.full_like(x0, 0.3)
    mean, variance, log_variance = noise.posterior(guess, x_t, times, "learned", frac)
    torch.testing.assert_close(log_variance, variance.log())
    term = likelihood.bound_term(noise, x0, x_t, times, mean, log_variance)
    if t:
        true_mean, true_variance, _ = noise.posterior(x0, x_t, times)
        small, large = (noise.posterior(x0, x_t, times, kind)[1] for kind in ("small", "large"))
        torch.testing.assert_close(
            variance, (0.3 * large.log() + 0.7 * small.log()).exp().expand_as(variance)
        )
        reference = kl_divergence(
            Normal(true_mean, true_variance.sqrt()), Normal(mean, variance.sqrt())
        )
    else:
        reference = -likelihood.discretized_gaussian_log_likelihood(x0, mean, log_variance)
    expected = reference.mean((1, 2, 3)) / math.log(2)
    torch.testing.assert_close(term.double(), expected, rtol=1e-5, atol=0)  # float32 at the end


@pytest.mark.parametrize("end, kind", [(-1.0, "small"), (1.0, "large")])
def test_sampling_with_a_learned_variance_at_either_end_is_sampling_with_that_end(end, kind):
    shape = (2, 1, 4, 4)

    def noise(k):
        return images(*shape, seed=k).float()

    def net(x, t, y):
        return torch.cat([0.1 * x, end * torch.ones_like(x)], dim=1)

    learned = DDPM(net, timesteps=40, beta_schedule="cosine", variance="learned", loss="hybrid")
    fixed = DDPM(lambda x, t, y: 0.1 * x, timesteps=40, beta_schedule="cosine", variance=kind)
    # logarithms and back in float32, ten steps
    torch.testing.assert_close(
        learned.sample(shape, 10, noise=noise),
        fixed.sample(shape, 10, noise=noise),
        rtol=0,
        atol=1e-4,
    )
    for sampler in ("ddim", "heun", "dpmpp"):  # which need no variance
        assert learned.sample(shape, 5, sampler=sampler, noise=noise).isfinite().all()


LEARNING = dict(
    diffusion__weighting="uncertainty",
    diffusion__times="importance(history=1)",
    diffusion__timesteps=4,
)


def test_what_the_objective_learns_is_saved_and_continued_bit_for_bit(tmp_path):
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    run(tiny(**LEARNING), whole)
    run(tiny(**LEARNING, train__length="7 steps"), parts)
    run(tiny(**LEARNING), parts)
    content = [
        torch.load(folder / "checkpoints" / "step_00000012.pt", weights_only=True)["parts"]
        for folder in (whole, parts)
    ]
    assert (
        content[0]["objective"]["weighting.u.weight"].abs().sum() > 0
        and content[0]["objective"]["times.counts"].sum() == 96
    )
    for name, value in content[0]["objective"].items():
        assert torch.equal(value, content[1]["objective"][name]), name
    for name, value in content[0]["net"].items():
        assert torch.equal(value, content[1]["net"][name]), name


@pytest.mark.parametrize(
    "options",
    [
        LEARNING,
        dict(diffusion__self_condition=True),
        dict(diffusion__variance="learned", diffusion__loss="hybrid"),
    ],
    ids=["learning", "self_condition", "learned"],
)
def test_micro_batches_change_nothing_but_rounding(options, tmp_path):
    for parts in (1, 4):
        run(
            tiny(**options, train__length="4 steps", train__gradient_accumulation_steps=parts),
            tmp_path / str(parts),
        )
    one, four = (rows(tmp_path / parts)[-1]["train/loss"] for parts in ("1", "4"))
    assert one == pytest.approx(four, rel=1e-4)  # float32 sums in another order, over four steps


@pytest.mark.parametrize(
    "options, remedy",
    [
        (dict(diffusion__variance="learned"), "set diffusion.loss=hybrid or vlb"),
        (dict(diffusion__loss="hybrid"), "set diffusion.variance=learned"),
        (dict(diffusion__loss="vlb", diffusion__weighting="min_snr"), "diffusion.loss=mse"),
        (dict(diffusion__weighting="min_snr(gamma=-1.0)"), "weighting 'min_snr"),
        (dict(diffusion__times="importance(history=0)"), "history of 1 or more"),
        (dict(diffusion__zero_terminal_snr=True), "predict 'v', 'x0' or 'flow'"),
        (
            dict(diffusion__beta_schedule="flow", diffusion__predict="edm"),
            "predict 'v', 'x0' or 'flow'",
        ),
        (dict(diffusion__predict="edm(sigma_data=0.0)"), "standard deviation"),
        (dict(sample__sampler="ddpm(variance='learned')"), "does not predict a variance"),
    ],
)
def test_contradictions_are_refused_with_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy) as mistake:
        build.check(tiny(**options))
    assert "\n" not in str(mistake.value)


def test_old_configs_keep_their_objective():
    old = files.from_json(
        '{"diffusion": {"timesteps": 10, "beta_schedule": "cosine", "predict": "v", "clip": true}}'
    )
    assert (
        old.diffusion.loss == "mse"
        and old.diffusion.weighting == "simple"
        and old.diffusion.times == "uniform"
    )


def test_weights_and_runs_of_before_keep_the_sigmoid_they_learned_under(tmp_path):
    """A checkpoint that says `sigmoid` without a format, and the kept runs of the study
    `targets`.
    """
    made = tiny(diffusion__weighting="sigmoid")
    text = json.loads(files.to_json(made))
    del text["format"]
    training_weights.export(
        tmp_path / "old.safetensors", build.network(made).state_dict(), 3, json.dumps(text)
    )
    model = build.diffusion(load.load(tmp_path / "old.safetensors", "cpu").config, None)
    alpha, sigma = (table[[5]] for table in get_schedule("cosine", 20))
    level = model.process.at(torch.tensor([5]))
    weight = model.objective.weighting(torch.ones(1, dtype=torch.float64), level, model.target)
    torch.testing.assert_close(
        weight, 1 / (1 + (alpha / sigma) ** 2 / math.e**2), rtol=1e-12, atol=0
    )
    kept = sorted(
        (Path(__file__).parents[2] / "experiments" / "targets" / "runs").glob(
            "*weighting=sigmoid-*"
        )
    )
    assert len(kept) == 9 and {
        runs.read_run(folder).options["diffusion.weighting"] for folder in kept
    } == {"sigmoid_eps"}
