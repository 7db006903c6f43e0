"""Solvers and spacings: orders on data whose flow is known, full trajectories of diffusers,
both ends, and off the circle.
"""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from scipy.integrate import quad, solve_ivp

from ddpm.common import registry
from ddpm.config import check, defaults
from ddpm.diffusion.denoiser import denoiser
from ddpm.diffusion.process import CLEAN, Level, Levels, initial_noise
from ddpm.diffusion.samplers import euler, heun, visited_levels
from support.oracles import (
    MEAN,
    PATHS,
    SPREAD,
    VARIANTS,
    Tiny,
    exploding,
    flow_to,
    gaussian,
    last,
    mixture,
    noises,
    process,
    sampler,
    straight,
)

MULTISTEP = (
    "dpmpp",
    "dpmpp(order=3)",
    "dpmpp_3m",
    "dpmpp_sde(eta=0.0)",
    "dpmpp_3m_sde(eta=0.0)",
    "unipc",
    "unipc(order=3)",
)


def mixture_flow(x, start, end):
    """The probability flow of the mixture by an eighth-order solver: dy/dr = eps in y = x/alpha,
    r = sigma/alpha.
    """

    def slope(r, y):
        return mixture(torch.tensor(y), Level(0.0, 1.0, r))[1].numpy()

    done = solve_ivp(
        slope,
        (start.ratio, end.ratio),
        (x / start.alpha).flatten().numpy(),
        "DOP853",
        rtol=1e-11,
        atol=1e-12,
    )
    return torch.tensor(done.y[:, -1]).reshape(x.shape) * end.alpha


ORDERS = {
    "ddim": 1,
    "euler": 1,
    "dpmpp(order=1)": 1,
    "heun": 2,
    "dpm2": 2,
    "dpmpp": 2,
    "dpmpp_sde(eta=0.0)": 2,
    "dpmpp_3m": 2,
    "dpmpp_3m_sde(eta=0.0)": 2,
    "unipc(order=1)": 2,
    "dpmpp(order=3)": 3,
    "dpmpp_sde(eta=0.0, order=3)": 3,
    "unipc": 3,
    "unipc(order=3)": 4,
}


def orders(name, denoise, flow, path, steps):
    """Measured orders of convergence: log2 of how the error to the exact flow falls as the
    number of steps doubles.
    """
    errors = []
    for count in steps:
        # the step to CLEAN is the same at any number of steps: not counted
        levels = path.levels(count + 1, "karras")[:-1]
        x = initial_noise(
            levels[0], torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
        )
        errors.append(
            (last(sampler(name)(denoise, x, levels, noises())) - flow(x, levels[0], levels[-1]))
            .abs()
            .max()
            .item()
        )
    return [math.log2(coarse / fine) for coarse, fine in pairwise(errors)]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_convergence_on_a_gaussian(name, path):
    for order in orders(name, gaussian, flow_to, PATHS[path](1000), (128, 256, 512)):
        # the rest is of the next order, and larger in 3M: as its second-order error is small
        assert order == pytest.approx(ORDERS[name], abs=0.15 if "3m" in name else 0.1)


@pytest.mark.parametrize("name", ORDERS)
def test_orders_of_convergence_on_a_mixture(name):
    for order in orders(name, mixture, mixture_flow, process("linear", 2000), (512, 1024)):
        # the rest is of the next order, and larger than for a Gaussian, since the modes part within
        # few of the steps
        assert order == pytest.approx(ORDERS[name], abs=0.2)


@pytest.mark.parametrize("name", MULTISTEP)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "flow"])
@pytest.mark.parametrize("spacing, steps", [("linear", 6), ("leading", 8), ("linear", 12)])
def test_the_large_step_onto_the_lowest_level_is_not_extrapolated(spacing, steps, schedule, name):
    levels = process(schedule).levels(steps, spacing)
    noise = torch.linspace(-2, 2, 21, dtype=torch.float64)
    start = initial_noise(levels[0], noise.reshape(21, 1, 1, 1))
    flow = mixture_flow(
        start, levels[0] if levels[0].alpha else Level(0.0, 1e-7, 1.0), Level(0.0, 1.0, 1e-6)
    )
    errors = {
        key: (last(sampler(key)(mixture, start, levels, noises())) - flow).abs().mean()
        for key in (name, "ddim")
    }
    assert errors[name] < errors["ddim"]


# which has corrected x by then
@pytest.mark.parametrize("name", [name for name in MULTISTEP if "unipc" not in name])
def test_a_step_that_more_than_doubles_begins_a_walk_of_its_own(name):
    path = exploding(1000)
    for growth in (1.9, 2.1):
        falls = [0, 0.5, 1, 1 + 0.5 * growth, 1 + growth, 1 + 1.5 * growth]  # of log(sigma/alpha)
        levels = Levels([path.level_of(5 * math.exp(-fall)) for fall in falls], path.level_of)
        walk = [
            initial_noise(levels[0], noises()(0)),
            *sampler(name)(mixture, initial_noise(levels[0], noises()(0)), levels, noises()),
        ]
        fresh = [*sampler(name)(mixture, walk[2], levels[2:], noises())]
        # float64
        alike = [
            torch.allclose(x, again, rtol=0, atol=1e-12)
            for x, again in zip(walk[3:], fresh, strict=True)
        ]
        assert alike == [growth > 2] * 3
        step = last(euler(mixture, walk[2], levels[2:4], noises()))
        assert torch.allclose(walk[3], step, rtol=0, atol=1e-12) == (growth > 2)


@pytest.mark.parametrize(
    "name, share",
    [("dpmpp_sde(order=3)", 1), ("dpmpp_3m_sde", 0.5), ("dpmpp_3m_sde(eta=0.4)", 0.5)],
)
def test_a_third_order_step_integrates_a_parabola_and_the_published_one_half_of_its_square(
    name, share
):
    eta = registry.parse(name)[1].get("eta", 1.0)
    # log(alpha/sigma)
    levels = [Level(0.0, 1.0, math.exp(-log)) for log in (-1.0, -0.3, 0.5, 1.2, 1.7)]

    def parabola(x, level):
        log = -math.log(level.ratio)
        return torch.full_like(x, 0.3 - 0.7 * log + 0.9 * log**2), x

    start = torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)
    *_, x, stepped, _ = sampler(name)(parabola, start, levels, lambda k: torch.zeros_like(start))
    t = 0.5
    s = 1.2

    # of x0 in the mean of the reverse SDE (Lu et al. 2022, DPM-Solver++, eq. 14, where alpha is 1)
    def weight(log):
        return (1 + eta) * math.exp((1 + eta) * (log - s))

    ends = quad(lambda log: weight(log) * (0.3 - 0.7 * log + 0.9 * log**2), t, s)[0]
    square = quad(lambda log: weight(log) * 0.9 * (log - t) ** 2, t, s)[0]
    mean = math.exp(-(1 + eta) * (s - t)) * x.item() + ends - (1 - share) * square
    assert stepped.item() == pytest.approx(mean, rel=1e-9)  # float64, and quad's own tolerance


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "name",
    [
        "euler_ancestral",
        "dpmpp_sde",
        "dpmpp_sde(eta=0.5)",
        "dpmpp_3m_sde",
        "heun(churn=40.0)",
        "heun(churn=40.0, s_min=0.05, s_max=50.0)",
    ],
)
def test_stochastic_solvers_reproduce_mean_and_variance(name, path):
    shape = (20_000, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    steps = 400 if name == "euler_ancestral" else 100

    def noise(k):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    levels = PATHS[path](1000).levels(steps, "karras")
    x = last(sampler(name)(gaussian, initial_noise(levels[0], noise(0)), levels, noise))
    # five standard errors of 20,000 draws, and 0.005 for finite steps
    assert x.mean().item() == pytest.approx(MEAN, abs=5 * SPREAD / math.sqrt(20_000) + 0.005)
    assert x.std().item() == pytest.approx(SPREAD, abs=5 * SPREAD / math.sqrt(40_000) + 0.005)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", VARIANTS)
def test_every_solver_is_finite_from_either_end_and_ends_at_x0(name, path):
    denoise = denoiser(Tiny(), predict="v", clip=True)
    for spacing, steps in (("linear", 1), ("linear", 2), ("linear", 10), ("karras", 7)):
        levels = PATHS[path](10).levels(steps, spacing)
        start = initial_noise(levels[0], noises()(0))
        walk = [start, *sampler(name)(denoise, start, levels, noises())]
        assert len(walk) == steps + 1 and all(torch.isfinite(x).all() for x in walk)
        if "churn" not in name or steps == 1:  # which raises the noise before the last step too
            # float64, sigma to 80
            torch.testing.assert_close(
                walk[-1], denoise(walk[-2], levels[-2])[0], rtol=0, atol=1e-10
            )


@pytest.mark.parametrize("name", [name for name in VARIANTS if "churn" not in name])
def test_walks_on_two_paths_of_equal_ratios_are_one_walk(name):
    def twice(level):
        return Level(level.t, 2.0, 2 * level.ratio)

    levels = process("cosine").levels(12)
    scaled = Levels([*map(twice, levels[:-1]), CLEAN], lambda ratio: twice(levels.level_of(ratio)))
    walks = [
        sampler(name)(gaussian, initial_noise(way[0], noises()(0)), way, noises())
        for way in (levels, scaled)
    ]
    for (ours, level), (theirs, other) in zip(
        *(
            zip(walk, way[1:], strict=True)
            for walk, way in zip(walks, (levels, scaled), strict=True)
        ),
        strict=True,
    ):
        # float64, where y = x / alpha falls from 20,000
        torch.testing.assert_close(ours / level.alpha, theirs / other.alpha, rtol=1e-10, atol=1e-9)


@pytest.mark.parametrize(
    "left, right",
    [
        ("euler", "ddim"),
        ("dpmpp(order=1)", "ddim"),
        ("euler_ancestral", "ddim(eta=1.0)"),
        ("dpmpp_sde(order=1)", "ddpm"),
        ("dpmpp_sde(eta=0.0)", "dpmpp"),
        ("dpmpp_sde(eta=0.0, order=3)", "dpmpp(order=3)"),
        ("euler_ancestral(eta=0.0)", "euler"),
        ("dpmpp_3m_sde(eta=0.0)", "dpmpp_3m"),
    ],
)
def test_identities(left, right):
    denoise = denoiser(Tiny(), predict="v", clip=False)
    for path in PATHS.values():
        levels = path(50).levels(20)
        start = initial_noise(levels[0], noises()(0))
        for ours, theirs in zip(
            *(sampler(name)(denoise, start, levels, noises()) for name in (left, right)),
            strict=True,
        ):
            # float64, a few operations a step
            torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_euler_is_euler_over_sigma_in_units_of_the_clean_image():
    levels = process().levels(20)
    walk = [noises()(0), *euler(gaussian, noises()(0), levels, noises())]
    for (before, after), (t, s) in zip(pairwise(walk), pairwise(levels), strict=True):
        torch.testing.assert_close(
            after / s.alpha,
            before / t.alpha + (s.ratio - t.ratio) * gaussian(before, t)[1],
            # float64, where y = x / alpha is up to 160 times x
            rtol=1e-11,
            atol=1e-11,
        )


def test_churn_asks_the_network_at_the_raised_noise_and_its_fractional_time():
    path = process("cosine")
    asked = []

    def denoise(x, level):
        asked.append(level)
        return gaussian(x, level)

    levels = path.levels(10, "karras")
    last(heun(denoise, noises()(0), levels, noises(), churn=2.0, s_min=0.05, s_max=50.0))
    firsts = [asked[0], *asked[2::2]]
    assert firsts[0] == levels[0]  # noise is never raised above the first level
    for level, got in zip(levels[1:-1], firsts[1:], strict=True):
        factor = 1.2 if 0.05 <= level.ratio <= 50 else 1
        # float64: T times its rounding in a fraction of t
        assert got.ratio == pytest.approx(factor * level.ratio, rel=1e-9)
        assert got == path.level(got.t)
    for steps, highest in ((10, math.sqrt(2) * levels[1].ratio), (100, levels[0].ratio)):
        asked.clear()
        last(heun(denoise, noises()(0), path.levels(steps, "karras"), noises(), churn=1e9))
        # at most sqrt(2) times, and at most the first level
        assert asked[2].ratio == pytest.approx(highest, rel=1e-9)


def test_a_part_of_the_levels_can_be_churned_too():
    levels = process("cosine").levels(10, "karras")[4:]
    assert isinstance(levels, Levels) and levels[-1] == CLEAN
    assert torch.isfinite(last(heun(gaussian, noises()(0), levels, noises(), churn=5.0))).all()


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("steps", [1, 2, 9])
def test_evaluations_are_counted(name, steps):
    twice = steps - 1 if "heun" in name or name == "dpm2" else 0
    visited = visited_levels(sampler(name), process().levels(steps, "trailing"))
    assert len(visited) == steps + twice
    # from pure noise, or nearly, the first step is Euler's
    for path in (straight(10), process("cosine")):
        visited = visited_levels(sampler(name), path.levels(steps, "trailing"))
        assert len(visited) == steps + max(twice - 1, 0)


@pytest.mark.parametrize("steps", [10, 20])
def test_heun_stays_near_the_flow_where_the_first_step_is_huge(steps):
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    errors = {}
    levels = process("cosine").levels(steps)
    # a full correction there would be off by a thousand differences of x0
    assert levels[0].ratio > 100 * levels[1].ratio
    for name in ("heun", "euler"):
        x = last(sampler(name)(gaussian, initial_noise(levels[0], noise), levels, noises()))
        errors[name] = (x - flow_to(noise, Level(0.0, 0.0, 1.0), CLEAN)).abs().max().item()
    assert errors["heun"] < errors["euler"] / 2


@pytest.mark.parametrize("name", VARIANTS)
def test_noise_is_asked_for_by_step_and_only_by_those_that_need_it(name):
    asked = []
    last(
        sampler(name)(
            gaussian, noises()(0), process().levels(6), lambda k: asked.append(k) or noises()(k)
        )
    )
    none = (
        name in ("ddim", "euler", "heun", "dpm2")
        or name.startswith(("dpmpp(", "unipc"))
        or name in ("dpmpp", "dpmpp_3m")
    )
    assert asked == ([] if none else [2, 3, 4, 5, 6] if "churn" in name else [1, 2, 3, 4, 5])


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("heun(churn=-1.0)", "0 or more"),
        ("heun(s_noise=-1.0)", "0 or more"),
        ("heun(s_min=2.0, s_max=1.0)", "s_min at most"),
        ("dpmpp(order=4)", "give 1, 2 or 3"),
        ("unipc(order=0)", "give 1, 2 or 3"),
        ("dpmpp_sde(eta=-1.0)", "from 0"),
        ("dpmpp_3m_sde(eta=-0.1)", "from 0"),
        ("dpmpp_sde(order=5)", "give 1, 2 or 3"),
        ("euler_ancestral(eta=2.0)", "from 0"),
        ("heun(s_churn=1.0)", "it accepts churn"),
    ],
)
def test_mistakes_are_refused_at_the_start_of_a_run(name, remedy):
    given = defaults.base()
    given.sample.sampler = name
    with pytest.raises(ValueError, match=remedy) as mistake:
        check.check(given)
    assert str(mistake.value).startswith("config.sample.sampler") and "\n" not in str(mistake.value)


def compare(scheduler, name, steps, tolerance, scaled=False, calls=1, given=lambda k: {}):
    """Compare a full trajectory with a scheduler of diffusers at its own timesteps; `scaled` ones
    walk in x / alpha.
    """
    scheduler.set_timesteps(steps)
    # Heun's has its second evaluations among them
    times = list(dict.fromkeys(scheduler.timesteps.tolist()))
    levels = [*(process().level(t) for t in times), CLEAN]
    net = Tiny()
    walk = sampler(name)(denoiser(net, predict="v", clip=False), noises()(0), levels, noises())
    x = noises()(0) / (levels[0].alpha if scaled else 1)
    asked = iter(scheduler.timesteps)
    for k, (ours, level) in enumerate(zip(walk, levels[1:], strict=True), start=1):
        for _ in range(calls if level != CLEAN else 1):
            t = next(asked)
            out = net(scheduler.scale_model_input(x, t).double(), t.reshape(1))
            x = scheduler.step(out, t, x, **given(k)).prev_sample
        torch.testing.assert_close(
            ours, x.double() * (level.alpha if scaled else 1), rtol=0, atol=tolerance
        )
    assert next(asked, None) is None


def seeded(k):
    return {"generator": torch.Generator().manual_seed(k)}


# Their tables are float32, products of up to 1000 factors, and so are some of their samples: off by
# 1e-5 to 3e-4.
VELOCITY = dict(
    beta_start=1e-4, beta_end=0.02, prediction_type="v_prediction", timestep_spacing="trailing"
)
FLOAT32 = 3e-4


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_trajectories_agree_with_diffusers_euler_and_heun(steps):
    compare(EulerDiscreteScheduler(**VELOCITY), "euler", steps, FLOAT32, scaled=True)
    compare(
        EulerAncestralDiscreteScheduler(**VELOCITY),
        "euler_ancestral",
        steps,
        FLOAT32,
        scaled=True,
        given=seeded,
    )
    compare(HeunDiscreteScheduler(**VELOCITY), "heun", steps, FLOAT32, scaled=True, calls=2)


@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_trajectories_agree_with_diffusers_multistep(steps):
    for order in (1, 2):
        compare(
            DPMSolverMultistepScheduler(**VELOCITY, solver_order=order),
            f"dpmpp(order={order})",
            steps,
            FLOAT32,
        )
        compare(
            DPMSolverMultistepScheduler(
                **VELOCITY, solver_order=order, algorithm_type="sde-dpmsolver++"
            ),
            f"dpmpp_sde(order={order})",
            steps,
            FLOAT32,
            given=lambda k: {"variance_noise": noises()(k)},
        )
    for order in (1, 2, 3):
        compare(
            UniPCMultistepScheduler(**VELOCITY, solver_order=order),
            f"unipc(order={order})",
            steps,
            FLOAT32,
        )


class Whole(DPMSolverMultistepScheduler):
    """With the half of the second derivative that is missing in the authors' third order."""

    def multistep_dpm_solver_third_order_update(self, outputs, sample, **others):
        t, *s = (
            -math.log(sigma)
            for sigma in self.sigmas[[self.step_index + 1 - i for i in range(4)]].tolist()
        )
        h = t - s[0]
        h_0 = s[0] - s[1]
        h_1 = s[1] - s[2]
        second = (
            h**2 * ((outputs[2] - outputs[1]) / h_0 - (outputs[1] - outputs[0]) / h_1) / (h_0 + h_1)
        )
        alpha = 1 / math.hypot(1, math.exp(-t))
        half = alpha * (0.5 - (h + math.expm1(-h)) / h**2) * second
        return (
            super().multistep_dpm_solver_third_order_update(outputs, sample=sample, **others) + half
        )


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 14])
def test_third_order_agrees_with_diffusers_but_for_half_of_the_second_derivative(steps):
    # up to 14 steps: from 15 on its last step but one is of third order, ours of second
    compare(Whole(**VELOCITY, solver_order=3), "dpmpp(order=3)", steps, FLOAT32)
    compare(DPMSolverMultistepScheduler(**VELOCITY, solver_order=3), "dpmpp_3m", steps, FLOAT32)
    if steps > 3:
        with pytest.raises(AssertionError):
            compare(
                DPMSolverMultistepScheduler(**VELOCITY, solver_order=3),
                "dpmpp(order=3)",
                steps,
                FLOAT32,
            )


@pytest.mark.parametrize("steps", [4, 10, 38])  # by which their times fall on whole ones
def test_a_rectified_flow_agrees_with_diffusers(steps):
    scheduler = FlowMatchEulerDiscreteScheduler()
    net = Tiny()
    path = process("flow")
    scheduler.set_timesteps(steps)
    # theirs count from 1
    levels = [*(path.level(round(t - 1)) for t in scheduler.timesteps.tolist()), CLEAN]
    x = noises()(0)
    walk = sampler("euler")(denoiser(net, predict="flow", clip=False), x, levels, noises())
    for ours, t in zip(walk, scheduler.timesteps, strict=True):
        x = scheduler.step(net(x, t.reshape(1) - 1), t, x).prev_sample
        torch.testing.assert_close(ours, x.double(), rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("steps", [2, 10, 18])
@pytest.mark.parametrize(
    "name, scheduler",
    [
        ("euler", EDMEulerScheduler()),
        ("dpmpp(order=1)", EDMDPMSolverMultistepScheduler(solver_order=1)),
        ("dpmpp", EDMDPMSolverMultistepScheduler(solver_order=2)),
    ],
    ids=["euler", "dpmpp1", "dpmpp2"],
)
def test_edm_agrees_with_diffusers_in_levels_preconditioning_and_steps(name, scheduler, steps):
    scheduler.set_timesteps(steps)
    net = Tiny()
    levels = process("edm").levels(steps, "karras")
    # theirs are float32
    assert [level.sigma for level in levels] == pytest.approx(scheduler.sigmas.tolist(), rel=1e-5)
    x = initial_noise(levels[0], noises()(0))
    walk = sampler(name)(denoiser(net, predict="edm", clip=False), x, levels, noises())
    for ours, t, level in zip(walk, scheduler.timesteps, levels[1:], strict=True):
        x = scheduler.step(net(scheduler.scale_model_input(x, t), t.reshape(1)), t, x).prev_sample
        scale = math.hypot(1, level.sigma)  # x is as large as 80
        torch.testing.assert_close(ours / scale, x.double() / scale, rtol=0, atol=FLOAT32)


@pytest.mark.parametrize("steps", [2, 10, 25])
def test_karras_levels_are_those_of_diffusers(steps):
    reference = EulerDiscreteScheduler(beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True)
    reference.set_timesteps(steps)
    # more than there is: from T-1 on, as it does
    levels = process().levels(steps, "karras(sigma_max=200.0)")
    assert levels[0].t == 999 and levels[-2].t == 0 and levels[-1] == CLEAN
    # its tables are float32
    assert [level.ratio for level in levels] == pytest.approx(reference.sigmas.tolist(), rel=2e-4)


def test_karras_levels_begin_at_sigma_max_and_end_at_the_tables():
    path = exploding(1000)
    levels = path.levels(18, "karras")
    i = np.arange(18)
    # Karras et al. 2022, eq. 5 and table 1
    expected = (80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert [level.sigma / level.alpha for level in levels[:-1]] == pytest.approx(
        expected.tolist(), rel=1e-9
    )
    assert process("cosine").levels(5, "karras")[0].ratio == pytest.approx(80, rel=1e-9)
    # below pure noise, which has no finite ratio
    assert straight(1000).levels(5, "karras(sigma_max=1e9)")[0].t == 998


def test_quadratic_times_have_evenly_falling_roots():
    times = [level.t for level in process().levels(50, "quadratic")[:-1]]
    assert np.diff(np.sqrt(times)) == pytest.approx(-math.sqrt(999) / 49, rel=1e-9)  # float64
    assert times[0] == 999 and times[-1] == 0


@pytest.mark.parametrize(
    "timesteps, counts",
    [(300, (10, 15, 20)), (1000, (10, 8, 4, 2, 1)), (4000, (25,)), (13, (3, 2, 4))],
)
def test_sections_hold_as_many_steps_as_told(timesteps, counts):
    parts = np.array_split(np.arange(timesteps), len(counts))
    expected = [
        t
        for part, count in zip(parts, counts, strict=True)
        for t in np.linspace(part[0], part[-1], count).round()
    ]
    times = [
        level.t
        for level in process("cosine", timesteps).levels(sum(counts), f"sections(counts={counts})")[
            :-1
        ]
    ]
    assert times == expected[::-1]


@pytest.mark.parametrize(
    "spacing, steps, remedy",
    [
        ("sections", 50, "have 25 steps, not 50; use 25"),
        ("sections(counts=(5, 0))", 5, "whole numbers of 1 or more"),
        ("sections(counts=(49, 1))", 50, None),
        ("sections(counts=(48, 1, 1))", 50, None),
        ("sections(counts=(400, 1, 1))", 402, "400 steps do not fit into a section of 334"),
        ("karras(rho=0.0)", 50, "give a number above 0"),
        ("karras(sigma_max=0.0)", 50, "has no 50 distinct times"),
    ],
)
def test_spacings_that_cannot_be_are_refused_at_the_start_of_a_run(spacing, steps, remedy):
    given = defaults.base()
    given.sample.spacing = spacing
    given.sample.steps = steps
    given.evaluate.steps = steps
    if remedy is None:
        check.check(given)
    else:
        with pytest.raises(ValueError, match=remedy) as mistake:
            check.check(given)
        assert str(mistake.value).startswith("config.sample.spacing: ") and "\n" not in str(
            mistake.value
        )


@pytest.mark.parametrize("path", PATHS)
def test_the_level_of_a_ratio_is_the_inverse_of_the_ratio_of_a_level(path):
    made = PATHS[path](50)
    for t in (0, 0.25, 1, 17, 30.5, 47.9):
        assert made.level_of(made.level(t).ratio).t == pytest.approx(t, abs=1e-10)  # float64
    assert made.level_of(1e-9).t == 0 and made.level_of(1e9).t == (49 if made.alpha[-1] > 0 else 48)


@pytest.mark.parametrize("timesteps", [10, 1000])
@pytest.mark.parametrize(
    "schedule, constant",
    [
        ("flow", lambda level: level.alpha + level.sigma),
        ("edm", lambda level: level.alpha),
        ("cosine", lambda level: level.alpha**2 + level.sigma**2),
        ("laplace", lambda level: level.alpha**2 + level.sigma**2),
    ],
)
def test_levels_between_timesteps_lie_on_the_path(schedule, constant, timesteps):
    path = process(schedule, timesteps)
    for t in (0.5, 3.3, timesteps - 3.1):  # the last of flow is pure noise, infinitely far
        below = path.level(int(t))
        level = path.level(t)
        above = path.level(int(t) + 1)
        assert constant(level) == pytest.approx(1, abs=1e-12)  # float64
        part = math.log(level.ratio / below.ratio) / math.log(above.ratio / below.ratio)
        assert below.ratio < level.ratio < above.ratio and part == pytest.approx(
            t - int(t), abs=1e-9
        )
