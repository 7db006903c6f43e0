"""Optimisers against torch's unfused ones, the skipped step, and the learning rate's values."""

import copy
import math

import pytest
import torch
from torch import nn

from ddpm.common import registry
from ddpm.training.optim import DECAYS, OPTIMIZERS, learning_rate

UNFUSED = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 1))


def give_gradients(model, seed, scale=1.0):
    torch.manual_seed(seed)
    x = torch.randn(4, 3, 6, 6)
    model.zero_grad()
    (model(x).square().mean() * scale).backward()


def snapshot(model, optimizer):
    return copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))


def same(first, second):
    """Equal to the bit, through nested dicts."""
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    return torch.equal(first, second)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_fused_is_the_same_mathematics(name, memory_format):
    options = dict(betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1)
    ours = network().to(memory_format=memory_format)
    theirs = network()
    fused = OPTIMIZERS[name](ours.parameters(), 1e-2, **options)
    plain = UNFUSED[name](theirs.parameters(), 1e-2, **options)
    assert fused.defaults["fused"] is True
    for step in range(10):
        for model, optimizer in ((ours, fused), (theirs, plain)):
            give_gradients(model, step)
            optimizer.step()
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        # ten steps of at most 1e-2, each right to about 1e-5 of itself (a quotient of float32
        # moments)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_found_inf_skips_weights_moments_and_step_count(name):
    model = network()
    optimizer = OPTIMIZERS[name](model.parameters(), 1e-2, weight_decay=0.1)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step()
    before = snapshot(model, optimizer)
    give_gradients(model, 3, scale=float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    weights, state = snapshot(model, optimizer)
    assert same(before[0], weights)
    assert same(before[1], state)
    assert all(entry["step"].item() == 3 for entry in state.values())
    optimizer.found_inf = torch.tensor(0.0)
    give_gradients(model, 4)
    optimizer.step()
    assert all(entry["step"].item() == 4 for entry in snapshot(model, optimizer)[1].values())
    assert not same(before[0], model.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_found_inf_at_the_very_first_step(name):
    skipped = network()
    fresh = network()
    for model, steps in ((skipped, 2), (fresh, 1)):
        optimizer = OPTIMIZERS[name](model.parameters(), 1e-2)
        if steps == 2:
            give_gradients(model, 0, scale=float("inf"))
            optimizer.found_inf = torch.tensor(1.0)
            optimizer.step()
            optimizer.found_inf = torch.tensor(0.0)
        give_gradients(model, 1)
        optimizer.step()
    assert same(skipped.state_dict(), fresh.state_dict())


def test_grad_scale_divides_the_gradients():
    scaled = network()
    plain = network()
    for model, scale in ((scaled, 1024.0), (plain, 1.0)):
        optimizer = OPTIMIZERS["adamw"](model.parameters(), 1e-2)
        optimizer.grad_scale = torch.tensor(scale)
        optimizer.found_inf = torch.tensor(0.0)
        for step in range(3):
            give_gradients(model, step, scale)
            optimizer.step()
    assert same(scaled.state_dict(), plain.state_dict())  # a power of two scales without rounding


def test_state_round_trip_continues_bitwise():
    model = network()
    optimizer = OPTIMIZERS["adamw"](model.parameters(), 1e-2)
    give_gradients(model, 0)
    optimizer.step()
    twin = copy.deepcopy(model)
    other = OPTIMIZERS["adamw"](twin.parameters(), 1e-2)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (twin, other)):
        give_gradients(one, 1)
        its.step()
    assert same(snapshot(model, optimizer)[0], snapshot(twin, other)[0])
    assert same(snapshot(model, optimizer)[1], snapshot(twin, other)[1])


@pytest.mark.parametrize(
    "rate, options, message",
    [
        (-1.0, {}, "learning_rate is -1.0; use a finite number from 0 up"),
        (math.nan, {}, "learning_rate is nan; use"),
        (1e-3, dict(weight_decay=-0.1), "weight_decay is -0.1; use"),
        (1e-3, dict(eps=math.inf), "eps is inf; use"),
        (
            1e-3,
            dict(betas=(0.9, 1.0)),
            "betas are (0.9, 1.0); use two numbers in [0, 1), such as (0.9, 0.999)",
        ),
        (1e-3, dict(betas=(0.9,)), "betas are (0.9,); use two numbers"),
    ],
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_options_out_of_range(name, rate, options, message):
    with pytest.raises(ValueError) as error:
        OPTIMIZERS[name](network().parameters(), rate, **options)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_specs_reach_the_options():
    adam = registry.resolve("optimizer", OPTIMIZERS, "adam(betas=(0, 0.99), eps=1e-6)")
    group = adam(network().parameters(), 3e-4).param_groups[0]
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (
        3e-4,
        (0.0, 0.99),
        1e-6,
        0.0,
    )
    decay = registry.resolve("learning-rate decay", DECAYS, "cosine(length=100, floor=0.1)")
    assert decay(0) == 1.0 and decay(100) == 0.1
    with pytest.raises(ValueError, match=r"write cosine\(length=...\)"):
        registry.resolve("learning-rate decay", DECAYS, "cosine")
    with pytest.raises(ValueError, match="it takes none"):
        registry.resolve("learning-rate decay", DECAYS, "constant(length=3)")


def decay(text):
    return registry.resolve("learning-rate decay", DECAYS, text)


def test_decays_by_hand():
    # sums and products of a few doubles: right to their last digits
    cosine = decay("cosine(length=200, floor=0.2)")
    linear = decay("linear(length=200, floor=0.2)")
    assert [cosine(step) for step in (0, 50, 100, 150, 200, 999)] == pytest.approx(
        [1.0, 0.6 + 0.4 * math.sqrt(0.5), 0.6, 0.6 - 0.4 * math.sqrt(0.5), 0.2, 0.2], rel=1e-12
    )
    assert [linear(step) for step in (0, 50, 100, 150, 200, 999)] == pytest.approx(
        [1.0, 0.8, 0.6, 0.4, 0.2, 0.2], rel=1e-12
    )
    assert [decay("constant")(step) for step in (0, 10**9)] == [1.0, 1.0]
    root = decay("inverse_sqrt(length=200)")
    assert [root(step) for step in (0, 199, 200, 800, 20_000)] == pytest.approx(
        [1.0, 1.0, 1.0, 0.5, 0.1], rel=1e-12
    )
    assert decay("linear(length=10)")(10) == decay("cosine(length=10)")(10) == 0.0


def test_cosine_is_torchs_annealing():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=50, eta_min=0.03)
    ours = decay("cosine(length=50, floor=0.1)")
    for step in range(51):
        # torch multiplies its way from step to step: fifty double roundings
        assert learning_rate(step, 0.3, 0, ours) == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


def test_warm_up_is_a_line_that_ends_at_base():
    rates = [learning_rate(step, 2e-4, 4, decay("constant")) for step in range(6)]
    assert rates == pytest.approx([0.5e-4, 1e-4, 1.5e-4, 2e-4, 2e-4, 2e-4], rel=1e-12)
    assert [learning_rate(step, 2e-4, 0, decay("constant")) for step in (0, 7)] == [2e-4, 2e-4]


def test_warm_up_and_decay_multiply():
    assert learning_rate(4, 1.0, 10, decay("linear(length=8)")) == pytest.approx(
        0.5 * 0.5, rel=1e-12
    )


def test_warm_up_longer_than_the_run():
    assert learning_rate(11, 1e-3, 1000, decay("constant")) == pytest.approx(1.2e-5, rel=1e-12)


@pytest.mark.parametrize("name", ["cosine", "linear", "inverse_sqrt"])
def test_decays_out_of_range(name):
    with pytest.raises(ValueError, match="has length 0; use 1 step or more"):
        DECAYS[name](0, length=0)
    if name == "inverse_sqrt":
        return
    with pytest.raises(
        ValueError, match="has floor 1.5; use a fraction of the learning rate from 0 to 1"
    ):
        DECAYS[name](0, length=5, floor=1.5)
