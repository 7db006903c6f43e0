"""The model as a module: loss, reverse step and sampling, against hand-written formulas and
diffusers.
"""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import nn

from ddpm.diffusion import schedules
from ddpm.diffusion.ddpm import DDPM
from ddpm.diffusion.samplers import SAMPLERS

SHAPE = (4, 3, 8, 8)


class Tiny(nn.Module):
    """A small network with dropout that knows time and class; its answer is about one in size."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3, 3, 3, generator=generator) / 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, y=None):
        assert t.dtype == torch.float32 and t.shape == x.shape[:1]
        shift = torch.cos(t / 100) + (0 if y is None else y)
        return torch.tanh(
            self.dropout(nn.functional.conv2d(x, self.weight, padding=1))
            + shift.reshape(-1, 1, 1, 1)
        )


def batch():
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand(SHAPE, generator=generator) * 2 - 1
    return x0, torch.tensor([0, 3, 500, 999]), torch.randn(SHAPE, generator=generator)


def seeded(shape=SHAPE):
    return lambda k: torch.randn(shape, generator=torch.Generator().manual_seed(k))


def test_forward_is_the_mean_squared_error_on_the_noise():
    x0, t, noise = batch()
    model = DDPM(Tiny()).eval()
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[
        t
    ].reshape(4, 1, 1, 1)
    x = (alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise).float()
    loss = ((model.net(x, t.float()) - noise) ** 2).mean()
    # float32: 6e-8 an operation
    torch.testing.assert_close(model(x0, t=t, noise=noise), loss, rtol=1e-6, atol=0)
    losses = model.losses(x0, t, noise)
    assert losses.shape == (4,) and losses.dtype == torch.float32
    torch.testing.assert_close(losses.mean(), loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("predict", ["x0", "v"])
def test_other_targets(predict):
    x0, t, noise = batch()
    model = DDPM(Tiny(), beta_schedule="cosine", predict=predict).eval()
    reference = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    target = {"x0": x0, "v": reference.get_velocity(x0, noise, t)}[predict]
    loss = ((model.net(reference.add_noise(x0, noise, t), t.float()) - target) ** 2).mean()
    # its tables are float32
    torch.testing.assert_close(model(x0, t=t, noise=noise), loss, rtol=1e-5, atol=0)


def test_times_and_noise_come_from_torch_when_not_given():
    x0, *_ = batch()
    model = DDPM(Tiny(), timesteps=3).eval()
    torch.manual_seed(5)
    drawn = model(x0)
    torch.manual_seed(5)
    t = (torch.rand(4, dtype=torch.float64) * 3).long()
    noise = torch.randn(SHAPE)
    assert torch.equal(drawn, model(x0, t=t, noise=noise))


def test_gradient_is_that_of_the_loss():
    x0, t, noise = batch()
    model = DDPM(Tiny()).eval()
    model(x0, t=t, noise=noise).backward()
    grad = model.net.weight.grad.clone()
    # along the gradient the loss rises by its square: a central difference, float32 losses of 1e-7
    # over a rise of 1e-3
    step = 1e-2 * grad / grad.norm()
    with torch.no_grad():
        model.net.weight += step
        above = model(x0, t=t, noise=noise)
        model.net.weight -= 2 * step
        below = model(x0, t=t, noise=noise)
    assert (above - below).item() / 2e-2 == pytest.approx(grad.norm().item(), rel=1e-2)


def test_a_network_that_knows_the_noise_has_no_loss():
    x0, t, noise = batch()
    assert DDPM(lambda x, t, y: noise)(x0, t=t, noise=noise) == 0


def test_half_precision_answers_give_a_single_precision_loss():
    x0, t, noise = batch()
    model = DDPM(lambda x, t, y: x.bfloat16())
    assert model.losses(x0, t, noise).dtype == torch.float32
    assert model.losses(x0.bfloat16(), t, noise.bfloat16()).dtype == torch.float32


def test_labels_reach_the_network():
    x0, t, noise = batch()
    y = torch.tensor([0, 1, 2, 3])
    model = DDPM(Tiny()).eval()
    with_labels = model.losses(x0, t, noise, y)
    without = model.losses(x0, t, noise)
    assert with_labels[0] == without[0] and (with_labels[1:] != without[1:]).all()
    assert not torch.equal(
        model.p_mean_variance(x0, t, y).mean[1], model.p_mean_variance(x0, t).mean[1]
    )
    images = [model.sample(SHAPE, steps=2, y=labels, noise=seeded()) for labels in (y, None)]
    assert torch.equal(images[0][0], images[1][0]) and not torch.equal(images[0][1], images[1][1])


@pytest.mark.parametrize(
    "name, reference_name", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_reverse_step_agrees_with_diffusers(variance, name, reference_name):
    x, t, _ = batch()
    model = DDPM(Tiny(), beta_schedule=name, variance=variance).eval()
    reference = DDPMScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=reference_name,
        clip_sample=True,
        variance_type=f"fixed_{variance}",
    )
    step = model.p_mean_variance(x, t)
    assert step.mean.shape == step.x0.shape == SHAPE
    assert step.variance.shape == step.log_variance.shape == (4, 1, 1, 1)
    out = model.net(x, t.float())
    for i, time in enumerate(t.tolist()):
        spread = reference._get_variance(time).sqrt() if time > 0 else 0
        noise = torch.randn(SHAPE[1:], generator=torch.Generator().manual_seed(0))
        theirs = reference.step(out[i], time, x[i], generator=torch.Generator().manual_seed(0))
        # its tables are float32: 6e-8 over 1 - alpha_bar, 2e-4 at t = 3 of the cosine, is 3e-4 of a
        # coefficient
        torch.testing.assert_close(step.x0[i], theirs.pred_original_sample, rtol=0, atol=1e-5)
        torch.testing.assert_close(
            step.mean[i], theirs.prev_sample - spread * noise, rtol=0, atol=3e-4
        )
        if time > 0:
            assert step.variance[i].item() == pytest.approx(
                reference._get_variance(time).item(), rel=6e-4
            )


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_log_variance_is_that_of_ho_et_al(name):
    t = torch.arange(1000)
    betas = schedules.get_beta_schedule(name, 1000)
    alpha_bar = torch.cumprod(1 - betas, 0)
    small = betas[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    x = torch.zeros(1000, 1, 1, 1)
    for variance, rest in [("small", small), ("large", betas[1:])]:
        step = DDPM(lambda x, t, y: x, beta_schedule=name, variance=variance).p_mean_variance(x, t)
        # the first value is that of the true posterior at t = 1
        expected = torch.cat([small[:1], rest]).log().float()
        # float32
        torch.testing.assert_close(step.log_variance.flatten(), expected, rtol=1e-6, atol=0)


def test_clip_holds_x0_in_range():
    x, t, _ = batch()
    clipped, free = (
        DDPM(Tiny(), clip=clip).eval().p_mean_variance(3 * x, t).x0 for clip in (True, False)
    )
    assert clipped.abs().max() == 1 < free.abs().max()
    assert torch.equal(free.clamp(-1, 1), clipped)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_sample_is_the_chain_of_reverse_steps(variance):
    model = DDPM(Tiny(), timesteps=20, variance=variance).eval()
    noise = seeded()
    x = noise(0)
    with torch.no_grad():
        for k, t in enumerate(reversed(range(20)), start=1):
            step = model.p_mean_variance(x, torch.full((4,), t))
            x = step.mean + (step.variance.sqrt() * noise(k) if t > 0 else 0)
    # float32 over 20 steps; by default all timesteps are taken, with the model's own variance
    torch.testing.assert_close(model.sample(SHAPE, noise=noise), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 4, 12)])
def test_sample_gives_images_in_range_and_leaves_the_modes_alone(sampler, shape):
    model = DDPM(Tiny(), timesteps=10)
    model.train()
    model.net.dropout.eval()
    images = model.sample(shape, steps=3, sampler=sampler, noise=seeded(shape))
    assert images.shape == shape and images.abs().max() <= 1 and not images.requires_grad
    assert model.training and model.net.training and not model.net.dropout.training
    model.net.dropout.train()
    # without dropout
    assert torch.equal(images, model.sample(shape, steps=3, sampler=sampler, noise=seeded(shape)))


def test_samples_are_in_range_without_clipping_too():
    wild = DDPM(lambda x, t, y: torch.full_like(x, 3.0), timesteps=10, predict="x0", clip=False)
    assert torch.equal(wild.sample(SHAPE, noise=seeded()), torch.ones(SHAPE))


def test_sample_draws_from_torch_when_no_noise_is_given():
    model = DDPM(Tiny(), timesteps=10)
    torch.manual_seed(3)
    first = model.sample(SHAPE)
    torch.manual_seed(3)
    assert torch.equal(first, model.sample(SHAPE)) and not torch.equal(first, model.sample(SHAPE))


def test_a_option_of_the_sampler_beats_the_variance_of_the_model():
    large = DDPM(Tiny(), timesteps=10, variance="large")
    small = DDPM(Tiny(), timesteps=10, variance="small")
    assert torch.equal(
        large.sample(SHAPE, sampler="ddpm(variance='small')", noise=seeded()),
        small.sample(SHAPE, sampler="ddpm", noise=seeded()),
    )
    assert not torch.equal(large.sample(SHAPE, noise=seeded()), small.sample(SHAPE, noise=seeded()))


def test_tables_stay_double_and_out_of_the_weights():
    model = DDPM(Tiny()).bfloat16()
    assert list(model.state_dict()) == ["net.weight"]
    assert model.process.at(torch.tensor([5])).alpha.dtype == torch.float64


def test_pure_noise_is_refused_for_eps_and_accepted_for_others(monkeypatch):
    def straight(timesteps):
        sigma = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
        return 1 - sigma, sigma

    monkeypatch.setitem(schedules.SCHEDULES, "straight", straight)
    with pytest.raises(ValueError, match="ends in pure noise.*predict 'v', 'x0' or 'flow'"):
        DDPM(Tiny(), timesteps=10, beta_schedule="straight")
    for sampler in SAMPLERS:
        model = DDPM(Tiny(), timesteps=10, beta_schedule="straight", predict="v")
        assert torch.isfinite(model.sample(SHAPE, steps=5, sampler=sampler, noise=seeded())).all()


@pytest.mark.parametrize(
    "options, remedy",
    [
        (dict(beta_schedule="cosin"), "did you mean 'cosine'"),
        (dict(timesteps=0), "from 1 to 10000"),
        (dict(predict="noise"), "choose one of .*eps"),
        (dict(variance="medium"), "choose one of small, large"),
    ],
)
def test_mistakes_name_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy) as mistake:
        DDPM(Tiny(), **options)
    assert "\n" not in str(mistake.value)


@pytest.mark.parametrize(
    "options, remedy",
    [
        (dict(steps=11), "1 to 10"),
        (dict(steps=0), "1 to 10"),
        (dict(sampler="dim"), "choose one of .*ddim"),
        (dict(sampler="ddim(eta=2.0)"), "from 0 .* to 1"),
    ],
)
def test_mistakes_in_sampling_name_the_remedy(options, remedy):
    with pytest.raises(ValueError, match=remedy):
        DDPM(Tiny(), timesteps=10).sample(SHAPE, **options)
