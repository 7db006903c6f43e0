"""Bits a dimension against closed forms, on data whose likelihood is known: a Gaussian, whose
best denoiser is linear.
"""

import csv
import math
import sys
from itertools import pairwise, product

import pytest
import torch
from numpy.polynomial.hermite_e import hermegauss
from numpy.polynomial.legendre import leggauss
from PIL import Image
from torch.distributions import Normal, kl_divergence

from ddpm.diffusion import likelihood
from ddpm.diffusion.ddpm import DDPM
from ddpm.diffusion.process import initial_noise
from ddpm.evaluate import evaluate
from ddpm.studies import compatibility, figures, runs
from support.oracles import MEAN, SPREAD, gaussian
from support.runs import rows, run, tiny

PATHS = {
    "linear": {},
    "cosine": {},
    "flow": {},
    "edm": {},
    "pure": {"beta_schedule": "linear", "zero_terminal_snr": True},
}
PIXELS = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).reshape(256, 1, 1, 1)


class Exact(torch.nn.Module):
    """The best network for data ~ N(MEAN, SPREAD^2), which tells x0, and `frac` where it is asked
    for a variance too.
    """

    def __init__(self, frac=None):
        super().__init__()
        self.frac = frac

    def forward(self, x, t, y):
        (time,) = set(t.tolist())  # of all images one, here
        x0 = gaussian(x, self.noise.level(time))[0]
        return (
            x0
            if self.frac is None
            else torch.cat([x0, torch.full_like(x0, 2 * self.frac - 1)], dim=1)
        )


def exact(path="linear", timesteps=20, frac=None, **options):
    """The DDPM around it."""
    if frac is not None:
        options |= {"variance": "learned", "loss": "hybrid"}
    model = DDPM(
        Exact(frac),
        timesteps,
        predict="x0",
        clip=False,
        **{"beta_schedule": path} | PATHS[path] | options,
    )
    model.net.noise = model.process
    return model


def whole(model, x0, noise):
    """The bound with every t, at one noise for all of them."""
    edges = likelihood.timestep_strata(model.process, model.process.timesteps + 1)
    return likelihood.bound(
        model, x0, edges, lambda k: torch.zeros(len(x0), dtype=torch.float64), lambda k: noise
    )


@pytest.mark.parametrize("path", PATHS)
def test_the_prior_is_what_is_left_of_an_image_where_sampling_starts(path):
    noise = exact(path).process
    x0 = PIXELS[::16]
    level = noise.level(noise.timesteps - 1)
    left = Normal(level.alpha * x0, level.sigma)
    start = Normal(torch.zeros(1), initial_noise(level, torch.ones(1).double()))
    expected = kl_divergence(left, start).flatten() / math.log(2)
    term = likelihood.prior_term(noise, x0)
    # float32 at the end; torch's log(1 + 1e-4)
    torch.testing.assert_close(term.double(), expected, rtol=1e-5, atol=1e-12)
    assert (term == 0).all() if level.alpha == 0 else (term > 0).any()


@pytest.mark.parametrize(
    "options", [{"variance": "small"}, {"variance": "large"}, {"frac": 0.3}], ids=str
)
@pytest.mark.parametrize("path", PATHS)
def test_every_term_is_its_closed_form(path, options):
    model = exact(path, **options)
    x0 = PIXELS[::16]
    # a term is quadratic in the noise: the mean over -1 and 1 is that over all noise
    ours = sum(whole(model, x0, sign * torch.ones_like(x0)).kl for sign in (-1, 1)).double() / 2
    share = {"small": 0.0, "large": 1.0}.get(options.get("variance"), options.get("frac"))
    for t in range(1, model.process.timesteps):
        alpha, sigma = (table[t].item() for table in (model.process.alpha, model.process.sigma))
        before = model.process.sigma[t - 1].item()
        spread = model.process.alpha[t - 1].item()
        step = alpha / spread  # x_t = step x_{t-1} + noise of variance `large`
        large = sigma**2 - step**2 * before**2
        small = large * before**2 / sigma**2
        gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
        # of the best estimate, in the mean over noise
        error = ((x0 - MEAN) * (1 - gain * alpha)) ** 2 + (gain * sigma) ** 2
        variance = small ** (1 - share) * large**share
        distance = (spread * large / sigma**2) ** 2 * error
        kl = 0.5 * (math.log(variance / small) + small / variance - 1 + distance / variance)
        # float32 at the end, and large as a difference of squares above
        torch.testing.assert_close(ours[:, t - 1], kl.flatten() / math.log(2), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("options", [{}, {"frac": 0.3}], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_the_reconstruction_is_the_mass_on_the_pixel(path, options):
    model = exact(path, **options)
    eps = 0.7
    first, second = (model.process.level(t) for t in (0, 1))
    x_t = first.alpha * PIXELS + first.sigma * eps
    gain = first.alpha * SPREAD**2 / (first.alpha**2 * SPREAD**2 + first.sigma**2)
    mean = MEAN + gain * (x_t - first.alpha * MEAN)
    large = second.sigma**2 - (second.alpha / first.alpha) ** 2 * first.sigma**2
    small = large * first.sigma**2 / second.sigma**2  # that of t = 1, as at t = 0 the true one is 0
    share = options.get("frac", 0.0)
    normal = Normal(mean, (small ** (1 - share) * first.sigma ** (2 * share)) ** 0.5)
    upper = normal.cdf(PIXELS + 1 / 255)
    lower = normal.cdf(PIXELS - 1 / 255)
    mass = torch.where(
        PIXELS < -0.999, upper, torch.where(PIXELS > 0.999, 1 - lower, upper - lower)
    ).flatten()
    ours = whole(model, PIXELS, torch.full_like(PIXELS, eps)).reconstruction.double()
    known = mass > 1e-9  # a difference of two numbers near 1, as written here, is good to 1e-16
    assert known.sum() > 200 or path == "edm"  # where the deviation is a hundredth of a pixel
    # float32 at the end
    torch.testing.assert_close(ours[known], -mass[known].log2(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_strata_hold_each_time_once_and_no_more_than_their_share(path):
    for timesteps, count in ((1000, 100), (20, 6), (7, 3), (5, 5), (5, 9), (1, 4), (2, 2)):
        noise = exact(path, timesteps).process
        edges = likelihood.timestep_strata(noise, count)
        assert (
            edges[:2] == [0, 1]
            and edges[-1] == timesteps
            and len(edges) == min(count, timesteps) + 1
        )
        assert all(before < after for before, after in pairwise(edges))
        adds = torch.diff(((noise.alpha / noise.sigma) ** 2).log1p()).abs()  # of t = 1, 2, ...
        for first, end in pairwise(edges[1:]):  # its share may begin within its first t
            assert (
                end == first + 1
                or adds[first : end - 1].sum() <= adds.sum() / (len(edges) - 2) + 1e-9
            )


def test_a_stretch_stands_for_its_times():
    model = exact()
    x0 = PIXELS[::64]
    full = whole(model, x0, torch.ones_like(x0)).kl
    edges = [0, 1, 5, 20]
    u = (torch.arange(60, dtype=torch.float64) + 0.5) / 60  # every t of either stretch as often
    found = [
        likelihood.bound(
            model, x0, edges, lambda k, u=u: u.expand(len(x0)), lambda k: torch.ones_like(x0)
        )
        for u in u
    ]
    mean = torch.stack([each.kl for each in found]).mean(0)
    # float32 sums of some ten
    torch.testing.assert_close(mean[:, 0], full[:, :4].sum(1), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean[:, 1], full[:, 4:].sum(1), rtol=1e-5, atol=0)


def test_the_bound_lies_above_the_true_bits_by_a_gap_that_shrinks_with_more_steps():
    """Data are the Gaussian's pixels, each as often as it is likely; the mean over noise by
    quadrature, so nothing is drawn.
    """
    normal = Normal(torch.tensor(MEAN, dtype=torch.float64), SPREAD)
    upper = torch.where(PIXELS > 0.999, 1, normal.cdf(PIXELS + 1 / 255))
    mass = (upper - torch.where(PIXELS < -0.999, 0, normal.cdf(PIXELS - 1 / 255))).flatten()
    true = -(mass * mass.log2()).sum().item()
    nodes, weights = hermegauss(20)

    def gap(path, timesteps):
        model = exact(path, timesteps)
        twice = torch.cat([PIXELS, PIXELS])
        found = whole(model, twice, torch.ones_like(twice).index_fill_(0, torch.arange(256), -1))
        total = mass.repeat(2) @ (found.total - found.reconstruction).double() / 2
        # which is not quadratic
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            noise = torch.full_like(PIXELS, node)
            only = likelihood.bound(
                model, PIXELS, [0, 1], lambda k: torch.zeros(256), lambda k, noise=noise: noise
            )
            total = total + weight * (mass @ only.reconstruction.double())
        return total.item() - true

    gaps = [gap("linear", timesteps) for timesteps in (10, 100, 1000)]
    assert gaps[0] > 1.5 * gaps[1] > 1.5**2 * gaps[2] > 0
    assert all(gap(path, 20) > 0 for path in PATHS)


def karras(model, steps):
    return model.process.levels(steps + 1, "karras")[:-1]


@pytest.mark.parametrize("path", PATHS)
def test_the_flow_has_the_exact_density_with_an_error_of_fourth_order(path):
    model = exact(path, 1000)
    y = MEAN + SPREAD * torch.linspace(-2.5, 2.5, 12, dtype=torch.float64).reshape(12, 1, 1, 1)
    # exact: the flow of a Gaussian has no cross derivatives
    trace = likelihood.hutchinson(torch.ones_like(y))
    errors = {}
    for steps in (25, 50, 100):
        levels = karras(model, steps)
        low = SPREAD**2 + levels[-1].ratio ** 2
        high = SPREAD**2 + levels[0].ratio ** 2
        # a Gaussian stays one, and its quantiles stay its quantiles
        end = MEAN + (y - MEAN) * math.sqrt(high / low)
        start = Normal(torch.zeros(1, dtype=torch.float64), math.hypot(1, levels[0].ratio))
        expected = (start.log_prob(end) + 0.5 * math.log(high / low)).flatten()
        errors[steps] = (likelihood.flow(gaussian, y, levels, trace) - expected).abs().max().item()
    # the rest is of the next order
    assert math.log2(errors[50] / errors[100]) == pytest.approx(4, abs=0.3)
    assert errors[25] < 5e-3  # nats, of the 10 in the tails: what 100 evaluations come to
    # noise at sigma/alpha = 80 lacks the Gaussian's mean: 0.4 / 80 for each deviation, and 0.9 /
    # 80^2 in its variance
    torch.testing.assert_close(
        expected,
        Normal(MEAN, math.sqrt(low)).log_prob(y).flatten(),
        rtol=0,
        atol=2.5 * 0.4 / 80 + 1e-3,
    )


def exact_trace(f, y):
    """f(y) and its divergence by its full Jacobian."""
    # images are independent: [c h w, b, c h w]
    jacobian = torch.autograd.functional.jacobian(lambda y: f(y).sum(0), y)
    size = y[0].numel()
    return f(y), torch.einsum("ibi->b", jacobian.reshape(size, len(y), size))


def test_hutchinson_is_the_trace_in_the_mean_over_all_probes():
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def f(y):
        return torch.tanh(y.flatten(1) @ weight).reshape(y.shape)

    probes = [
        torch.tensor(signs, dtype=torch.float64).reshape(1, 1, 2, 2).expand_as(y)
        for signs in product((-1, 1), repeat=4)
    ]
    found = torch.stack([likelihood.hutchinson(probe)(f, y)[1] for probe in probes])
    torch.testing.assert_close(found.mean(0), exact_trace(f, y)[1], rtol=1e-12, atol=0)  # float64
    assert found.std(0).min() > 0.1


def test_bits_under_the_flow_are_those_of_the_pixels():
    model = exact("linear", 1000)
    x0 = PIXELS[110:240:30]
    u, weights = leggauss(3)
    found = [
        likelihood.flow_bits(model, x0, karras(model, 40), (node + 1) / 2, torch.ones_like(x0))
        for node in u
    ]
    ours = sum(weight / 2 * each for weight, each in zip(weights, found, strict=True))
    seen = Normal(MEAN, math.hypot(SPREAD, karras(model, 2)[-1].ratio))  # t = 0 is slightly noisy
    true = -(seen.cdf(x0 + 1 / 255) - seen.cdf(x0 - 1 / 255)).log2().flatten()
    # such a density hardly bends in a pixel, (2 / 255 / 0.3)^2 / 24; noise at sigma/alpha = 80
    # lacks the mean, as above
    torch.testing.assert_close(ours.double(), true, rtol=0, atol=1e-4 + 2 * 0.4 / 80 / math.log(2))


LIKELIHOOD = dict(
    evaluate__extractor="none",
    evaluate__likelihood="both(images=5, nfe=8)",
    every__evaluate="6 steps",
)


def test_bits_are_tracked_repeated_by_the_command_and_add_up(tmp_path, monkeypatch, capsys):
    run(tiny(**LIKELIHOOD, diffusion__variance="learned", diffusion__loss="hybrid"), tmp_path)
    logged = rows(tmp_path)[-1]
    terms = {
        name: logged[f"eval/bits_per_dim_{name}"] for name in ("prior", "kl", "reconstruction")
    }
    assert sum(terms.values()) == pytest.approx(logged["eval/bits_per_dim"], rel=1e-9)
    assert math.isfinite(logged["eval/bits_per_dim_flow"]) and "eval/fd_digits" not in logged
    assert logged["eval/bits_per_dim_protocol"].startswith("bits/dim of 5 held-out images of ")
    curve = list(csv.DictReader((tmp_path / "likelihood.csv").open()))
    assert [row["term"] for row in curve] == ["reconstruction", *["kl"] * 7, "prior"]
    assert all(
        int(after["first_t"]) == int(before["last_t"]) + 1 for before, after in pairwise(curve[:-1])
    )
    for name, value in terms.items():  # six digits there
        assert sum(
            float(row["bits_per_dim"]) for row in curve if row["term"] == name
        ) == pytest.approx(value, rel=1e-5)
    assert all(
        float(before["log_snr"]) > float(after["log_snr"]) for before, after in pairwise(curve[:-1])
    )
    again = evaluate(tmp_path, workdir=tmp_path / "again")
    assert again == {
        key: pytest.approx(logged[key], rel=1e-5) if "protocol" not in key else logged[key]
        for key in again
    }
    assert (tmp_path / "again" / "likelihood.csv").exists()
    with Image.open(tmp_path / "again" / "likelihood.png") as picture:
        assert min(picture.size) > 200
    drawn = figures.likelihood((tmp_path / "likelihood.csv").read_text()).axes
    assert drawn[0].patches[0].get_data().values[-1] == pytest.approx(
        float(curve[-2]["bits_per_dim"])
        / (int(curve[-2]["last_t"]) - int(curve[-2]["first_t"]) + 1)
    )
    assert drawn[1].lines[0].get_ydata()[0] == pytest.approx(logged["eval/bits_per_dim"], rel=1e-5)
    other = evaluate(tmp_path, **{"evaluate.batch_size": 2})  # convolutions sum in another order
    assert other["eval/bits_per_dim"] == pytest.approx(logged["eval/bits_per_dim"], rel=1e-5)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    evaluate(tmp_path, workdir=tmp_path / "bare")
    assert (
        "likelihood.csv is not drawn: matplotlib is missing; pip install" in capsys.readouterr().out
    )
    assert (tmp_path / "bare" / "likelihood.csv").exists() and not (
        tmp_path / "bare" / "likelihood.png"
    ).exists()
    with pytest.raises(ValueError, match="nothing to measure"):
        evaluate(tmp_path, **{"evaluate.likelihood": "none"})


def test_without_held_out_images_it_says_whose_bits_they_are(tmp_path):
    run(
        tiny(
            **LIKELIHOOD | dict(evaluate__likelihood="bound(images=5, nfe=8)"),
            data__validation_fraction=0.0,
            diffusion__self_condition=True,
            diffusion__beta_schedule="flow",
            diffusion__predict="flow",
        ),
        tmp_path,
    )
    logged = rows(tmp_path)[-1]
    assert (
        "5 training images" in logged["eval/bits_per_dim_protocol"]
        and "eval/bits_per_dim_flow" not in logged
    )
    assert logged["eval/bits_per_dim_prior"] == 0


def test_bits_made_in_different_ways_do_not_compare():
    def measured(made):
        return runs.Run(
            "a",
            None,
            {},
            [{"step": 1, "eval/bits_per_dim": 3.0, "eval/bits_per_dim_protocol": made}],
        )

    text = "bits/dim of {} held-out images of 0123456789ab under the EMA weights, by {} evaluations".format
    compatibility.check_same_protocol([measured(text(9, 100)), measured(text(9, 100))], [])
    with pytest.raises(ValueError, match="likelihood_images is 9 .* in a; 8 .* in a"):
        compatibility.check_same_protocol([measured(text(9, 100)), measured(text(8, 100))], [])
    with pytest.raises(ValueError, match="evaluations is 100 in a; 40 in a"):
        compatibility.check_same_protocol(
            [measured(text(9, 100)), measured(text(9, 40))], ["diffusion.timesteps"]
        )
    compatibility.check_same_protocol(
        [measured(text(9, 100)), measured(text(9, 40))], ["evaluate.likelihood"]
    )
