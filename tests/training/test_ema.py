"""The moving average against its closed form, and the exchange of weights bit for bit."""

import copy
import weakref

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddpm.training.ema import EMA


class Scaled(nn.Module):
    """A weight, a floating buffer and an integer buffer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 2))
        self.register_buffer("scale", torch.randn(4))
        self.register_buffer("count", torch.tensor(5))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Scaled()


def walk(model, ema, steps):
    """Give the model new random values at each step and update the average; returns the values,
    first to last.
    """
    values = [{name: value.clone() for name, value in model.state_dict().items()}]
    for _ in range(steps):
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape) if value.is_floating_point() else value + 1)
        ema.update()
        values.append({name: value.clone() for name, value in model.state_dict().items()})
    return values


def weighted_sum(values, decays, name):
    """sum_k values[k] * (weight of step k), in float64: what an exponential average is, written
    out.
    """
    total = values[0][name].double()
    for value, decay in zip(values[1:], decays, strict=True):
        total = decay * total + (1 - decay) * value[name].double()
    return total


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_closed_form_geometric_sum(model, decay):
    ema = EMA(model, decay=decay, warmup=False)
    values = walk(model, ema, 30)
    for name in ("weight", "scale"):
        expected = decay**30 * values[0][name].double()
        for k in range(1, 31):
            expected += (1 - decay) * decay ** (30 - k) * values[k][name].double()
        # thirty float32 roundings of 6e-8 on values of order one
        torch.testing.assert_close(ema.shadow[name].double(), expected, rtol=0, atol=3e-6)


def test_warm_up(model):
    ema = EMA(model, decay=0.6)
    values = walk(model, ema, 20)
    decays = [min(0.6, (1 + n) / (10 + n)) for n in range(20)]
    assert decays[0] == 0.1 and decays[-1] == 0.6  # both branches are met
    for name in ("weight", "scale"):
        # twenty float32 roundings of 6e-8 on values of order one
        torch.testing.assert_close(
            ema.shadow[name].double(), weighted_sum(values, decays, name), rtol=0, atol=2e-6
        )


def test_ramp_up_is_edms(model):
    """training_loop.py of NVlabs/edm in its own unit, images: a half-life of 400, or 0.05 of
    those so far; batches of 20.
    """
    ema = EMA(model, decay=0.5 ** (20 / 400), warmup=False, rampup=0.05)
    decays = [0.5 ** (20 / max(min(400, 0.05 * 20 * n), 1e-8)) for n in range(600)]
    assert decays[0] == 0 and decays[399] < decays[400] == decays[599]  # both branches are met
    values = walk(model, ema, 600)
    # a float32 rounding of 6e-8 each step; the last 30 steps count
    torch.testing.assert_close(
        ema.shadow["weight"].double(), weighted_sum(values, decays, "weight"), rtol=0, atol=5e-6
    )


def test_same_as_torchs_averaged_model():
    torch.manual_seed(0)
    model = nn.Linear(5, 4)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # its first update copies
    ema = EMA(model, decay=0.9, warmup=False)
    for _ in range(10):
        for weight in model.parameters():
            nn.init.normal_(weight)
        ema.update()
        theirs.update_parameters(model)
    for name, value in theirs.module.state_dict().items():
        # ten float32 roundings
        torch.testing.assert_close(ema.shadow[name], value, rtol=0, atol=1e-6)


def test_names_dtypes_and_integers(model):
    ema = EMA(model.bfloat16(), decay=0.5, warmup=False)
    assert list(ema.shadow) == list(model.state_dict())
    assert [value.dtype for value in ema.shadow.values()] == [
        torch.float32,
        torch.float32,
        torch.int64,
    ]
    values = walk(model, ema, 3)
    assert ema.shadow["count"].item() == 8  # copied, not averaged
    expected = weighted_sum(values, [0.5] * 3, "weight")
    # the values are bfloat16, their average float32: three roundings of 6e-8
    torch.testing.assert_close(ema.shadow["weight"].double(), expected, rtol=0, atol=1e-6)


def test_the_shadow_is_not_the_model(model):
    ema = EMA(model)
    before = ema.shadow["weight"].clone()
    model.weight.data.zero_()
    assert torch.equal(ema.shadow["weight"], before)


def test_apply_and_restore_are_bit_exact(model):
    ema = EMA(model, decay=0.9)
    raw = walk(model, ema, 3)[-1]
    shadow = {name: value.clone() for name, value in ema.shadow.items()}
    ema.apply_shadow()
    assert all(torch.equal(value, shadow[name]) for name, value in model.state_dict().items())
    ema.restore()
    assert all(torch.equal(value, raw[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, shadow[name]) for name, value in ema.shadow.items())


def test_the_model_keeps_its_own_tensors(model):
    ema = EMA(model)
    walk(model, ema, 1)
    storage = model.weight.data_ptr()  # an optimiser, a graph or a bucket may hold on to it
    with ema.averaged():
        assert model.weight.data_ptr() == storage
    assert model.weight.data_ptr() == storage


class Allocations(TorchDispatchMode):
    """The bytes of storages made inside that live at once, at most."""

    def __init__(self):
        super().__init__()
        self.live = 0
        self.peak = 0
        self.seen = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {
            one.untyped_storage().data_ptr()
            for one in tree_leaves(args)
            if isinstance(one, torch.Tensor)
        }
        out = function(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            storage = one.untyped_storage() if isinstance(one, torch.Tensor) else None
            if (
                storage is not None
                and storage.data_ptr() not in before
                and storage not in self.seen
            ):
                self.seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self.remove, storage.nbytes())
        return out

    def remove(self, size):
        self.live -= size


def test_the_average_is_applied_without_a_second_copy_of_the_weights():
    """At most one tensor's worth is allocated, of 40, and none of it is kept."""
    net = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(40)))
    ema = EMA(net)
    one = 64 * 64 * 4
    walk(net, ema, 2)
    with Allocations() as allocated:
        ema.apply_shadow()
        held = allocated.live
        ema.restore()
    assert held == allocated.live == 0 and one <= allocated.peak <= 2 * one


def test_half_precision_weights_come_back_bit_for_bit(model):
    """Their average has digits that they cannot hold, which are not lost either."""
    ema = EMA(model.bfloat16(), decay=0.9)
    raw = walk(model, ema, 3)[-1]
    shadow = {name: value.clone() for name, value in ema.shadow.items()}
    with ema.averaged():
        assert torch.equal(model.weight, shadow["weight"].bfloat16())
        assert torch.equal(ema.shadow["weight"], shadow["weight"])
    assert all(torch.equal(value, raw[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, shadow[name]) for name, value in ema.shadow.items())


def test_averages_nest(model):
    """Of one average, and of two of one model."""
    first = EMA(model, decay=0.9)
    second = EMA(model, decay=0.5)
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    for value in model.state_dict().values():
        value.add_(1)
    first.update(), second.update()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    averages = [
        {name: value.clone() for name, value in ema.shadow.items()} for ema in (first, second)
    ]
    with first.averaged(), first.averaged():
        with second.averaged():
            assert torch.equal(model.weight, averages[1]["weight"])
        assert torch.equal(model.weight, averages[0]["weight"])
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    for ema, average in zip((first, second), averages, strict=True):
        assert all(torch.equal(value, average[name]) for name, value in ema.shadow.items())
    assert not torch.equal(kept["weight"], raw["weight"])


def test_an_average_that_cannot_be_applied_changes_nothing(model, monkeypatch):
    """Memory runs out at the second tensor."""
    ema = EMA(model, decay=0.9)
    raw = walk(model, ema, 2)[-1]
    shadow = {name: value.clone() for name, value in ema.shadow.items()}
    clone = torch.Tensor.clone
    calls = []

    def failing(tensor):
        calls.append(tensor)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return clone(tensor)

    monkeypatch.setattr(torch.Tensor, "clone", failing)
    with pytest.raises(torch.OutOfMemoryError):
        ema.apply_shadow()
    monkeypatch.undo()
    assert all(torch.equal(value, raw[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, shadow[name]) for name, value in ema.shadow.items())
    ema.update()


def test_an_optimiser_goes_on_as_if_no_average_had_been_applied():
    states = []
    for applied in (False, True):
        torch.manual_seed(0)
        net = nn.Linear(5, 4)
        x = torch.randn(3, 5)
        optimizer = torch.optim.Adam(net.parameters(), fused=True)
        ema = EMA(net)
        for _ in range(4):
            net(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            if applied:
                with ema.averaged():
                    net(x)
        assert [id(one) for one in optimizer.param_groups[0]["params"]] == [
            id(one) for one in net.parameters()
        ]
        states.append((net.state_dict(), ema.shadow, optimizer.state_dict()["state"]))
    assert all(
        torch.equal(a, b)
        for a, b in zip(tree_leaves(states[0]), tree_leaves(states[1]), strict=True)
    )


def test_averaged_restores_upon_an_exception(model):
    ema = EMA(model)
    raw = walk(model, ema, 2)[-1]
    with pytest.raises(KeyError), ema.averaged() as net:
        assert net is model
        assert torch.equal(model.weight, ema.shadow["weight"])
        raise KeyError
    assert torch.equal(model.weight, raw["weight"])
    ema.update()


def test_out_of_order_calls(model):
    ema = EMA(model)
    with pytest.raises(RuntimeError, match=r"call apply_shadow\(\) before restore\(\)"):
        ema.restore()
    ema.apply_shadow()
    with pytest.raises(RuntimeError, match=r"call restore\(\) first"):
        ema.apply_shadow()
    with pytest.raises(RuntimeError, match=r"call restore\(\) before update\(\)"):
        ema.update()
    ema.restore()
    with pytest.raises(RuntimeError, match="not applied"):
        ema.restore()


def test_state_round_trip_continues_bitwise(model):
    ema = EMA(model, decay=0.9)
    walk(model, ema, 4)
    state = copy.deepcopy(ema.state_dict())
    twin = copy.deepcopy(model)
    other = EMA(twin, decay=0.9)
    tensors = dict(other.shadow)
    other.load_state_dict(state)
    assert all(other.shadow[name] is tensor for name, tensor in tensors.items())  # in place
    for one, average in ((model, ema), (twin, other)):
        torch.manual_seed(7)
        walk(one, average, 3)
    assert other.updates == ema.updates == 7
    assert all(torch.equal(value, other.shadow[name]) for name, value in ema.shadow.items())
    # the state was copied, not adopted
    assert not torch.equal(state["shadow"]["weight"], other.shadow["weight"])


def test_state_of_another_network_is_refused():
    ema = EMA(nn.Linear(2, 3))
    before = {name: value.clone() for name, value in ema.shadow.items()}
    cases = [
        (nn.Linear(2, 4), "weight is (4, 2), not (3, 2)"),
        (nn.Linear(2, 3, bias=False), "bias is missing"),
        (nn.Sequential(nn.Linear(2, 3)), "and 1 more"),
    ]
    for other, message in cases:
        with pytest.raises(ValueError) as error:
            ema.load_state_dict(EMA(other).state_dict())
        text = str(error.value)
        assert message in text and "build the network from" in text and "\n" not in text
    assert all(torch.equal(value, before[name]) for name, value in ema.shadow.items())


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1, 2.0, float("nan")])
def test_decay_out_of_range(model, decay):
    with pytest.raises(ValueError, match=r"is outside \[0, 1\); use a number such as 0.9999"):
        EMA(model, decay=decay)


def test_wrapped_networks_are_refused():
    for wrapped in (
        nn.DataParallel(nn.Linear(2, 2)),
        torch.compile(nn.Linear(2, 2), backend="eager"),
    ):
        with pytest.raises(AssertionError, match="plain network"):
            EMA(wrapped)
