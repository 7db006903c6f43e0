"""Steps that go wrong are skipped, a run that has gone wrong goes back once, and then it stops
and says why.
"""

import contextlib
import re

import pytest
import torch

from ddpm.common import rng
from ddpm.common.errors import DIVERGED, DONE
from ddpm.main import train_experiment
from ddpm.models.unet import UNet
from ddpm.runtime import device
from ddpm.training import checkpoint, weights
from ddpm.training.stability import FORGET, YOUNG, StabilityMonitor
from support.runs import equal, final_state, rows, tiny
from support.wandb_logs import segments

QUIET = dict(every__sample="0 steps", every__validate="0 steps")
HOT = QUIET | dict(  # a rate at which fp16 overflows as soon as it is reached
    train__amp="fp16",
    train__learning_rate=1.0,
    train__warmup="60 steps",
    train__length="44 steps",
    every__log="4 steps",
    every__save="4 steps",
)


def judged(monitor, losses, norms=None, start=0):
    """What a monitor says of a course of losses: for each whether it is skipped, and whether as a
    spike.
    """
    return [
        tuple(map(bool, monitor.update(step, torch.tensor(loss), torch.tensor(norm))))
        for step, (loss, norm) in enumerate(zip(losses, norms or losses, strict=True), start)
    ]


def healthy(count):
    """Losses that fall from 1 to 0.01 with a heavy tail: the largest of a thousand is twenty
    times their median.
    """
    noise = torch.randn(count, generator=torch.Generator().manual_seed(0)).double()
    return (0.01 + 0.99 / (1 + torch.arange(count) / 50)).mul(noise.exp()).tolist()


@pytest.fixture
def monitor():
    return StabilityMonitor(30.0, device.start())


def test_a_healthy_course_is_left_alone(monitor):
    assert not any(skipped for skipped, _ in judged(monitor, healthy(3000)))
    assert (
        monitor.divergence_reason(50) is None
        and monitor.last_healthy_step == 2999
        and monitor.last_skipped_step == -1
    )


@pytest.mark.parametrize(
    "loss, norm, spike",
    [(float("nan"), 1.0, False), (1.0, float("inf"), False), (1e4, 0.1, True), (0.1, 1e4, True)],
)
def test_what_is_skipped_is_not_usual(monitor, loss, norm, spike):
    judged(monitor, healthy(300))
    before = {name: torch.as_tensor(value).clone() for name, value in monitor.state_dict().items()}
    assert judged(monitor, [loss], [norm], start=300) == [(True, spike)]
    for name in ("usual", "mean", "lowest", "learned"):
        assert torch.equal(before[name], monitor.state_dict()[name])
    assert (monitor.skip_excess, monitor.last_skipped_step, monitor.last_healthy_step) == (
        1,
        300,
        before["well"],
    )
    assert judged(monitor, [0.03], start=301) == [(False, False)] and monitor.skip_excess == 0


def test_a_level_that_has_risen_for_good_is_trouble_in_the_end_and_was_not_well_before(monitor):
    judged(monitor, healthy(300))
    assert (
        all(skipped for skipped, _ in judged(monitor, [1e3] * 49, start=300))
        and monitor.divergence_reason(50) is None
    )
    judged(monitor, [1e3], start=349)
    assert (
        monitor.divergence_reason(50) == "50 more steps were skipped than learned from"
        and monitor.last_healthy_step < 300
    )


def test_a_loss_that_creeps_up_is_trouble(monitor):
    judged(monitor, healthy(1000))
    assert not any(
        skipped for skipped, _ in judged(monitor, [0.02 * 1.01**k for k in range(900)], start=1000)
    )
    assert (
        re.match(r"the loss has risen from 0.0\d+ to \d+", monitor.divergence_reason(50))
        and monitor.last_healthy_step < 1500
    )


def test_a_young_run_and_one_without_a_threshold_have_no_spikes(monitor):
    assert not any(skipped for skipped, _ in judged(monitor, [1.0] * (YOUNG - 1) + [1e6]))
    off = StabilityMonitor(0.0, device.start())
    assert judged(off, [1.0] * 300 + [1e20, float("nan")])[-2:] == [(False, False), (True, False)]
    assert off.divergence_reason(50) is None and pytest.approx(0.5, abs=0.01) == FORGET**350


def test_a_monitor_goes_on_where_it_was():
    whole, first, second = (StabilityMonitor(30.0, device.start()) for _ in range(3))
    course = healthy(150) + [1e5] * 3 + healthy(20)
    judged(whole, course)
    judged(first, course[:151])
    second.load_state_dict(
        {name: torch.as_tensor(value).clone() for name, value in first.state_dict().items()}
    )
    judged(second, course[151:], start=151)
    assert equal(whole.state_dict(), second.state_dict())


def test_it_goes_back_once_and_ends_well_and_may_be_stopped_at_any_point_of_that(
    tmp_path,
):
    assert train_experiment(tiny(**HOT | dict(train__rollback=1e-3)), tmp_path / "whole") == DONE
    log = (tmp_path / "whole" / "training.log").read_text()
    (gone,) = re.findall(r"diverged: .*, up to step (\d+)", log)
    (back,) = re.findall(
        r"rolled back: from step (\d+) on in another order, at 0.001 of the learning rate", log
    )
    assert 0 < int(back) < int(gone) < 40
    written = rows(tmp_path / "whole")
    assert [row["step"] for row in written] == list(range(4, 45, 4)) and written[-1][
        "train/loss"
    ] < 1
    assert {row["train/rollbacks"] for row in written} == {0, 1}
    assert all((row["train/rollbacks"] == 1) == (row["step"] > int(back)) for row in written)
    assert written[-1]["train/learning_rate"] == pytest.approx(1e-3 * 44 / 60)

    for length in (int(gone) - 4, int(gone) + 4, 44):  # in the bad stretch, after it
        given = tiny(**HOT | dict(train__rollback=1e-3, train__length=f"{length} steps"))
        assert train_experiment(given, tmp_path / "parts") == DONE
    assert (
        equal(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))
        and rows(tmp_path / "parts") == written
    )


@contextlib.contextmanager
def broken(at, factor):
    """Inside, at the `at`-th batch the weights of the network's last layers are multiplied so,
    once.
    """
    calls = []

    def break_once(module, _):
        if (
            isinstance(module, UNet)
            and module.training
            and module.head[0].weight.device.type != "meta"
        ):
            calls.append(module)
            if len(calls) == at:
                with torch.no_grad():
                    torch._foreach_mul_([*module.head.parameters()], factor)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(break_once)
    try:
        yield
    finally:
        hook.remove()


@pytest.mark.parametrize("length, seen", [(12, 12), (120, 50)])
def test_a_run_without_events_is_not_done_when_all_its_steps_were_skipped(tmp_path, length, seen):
    never = dict.fromkeys(("every__log", "every__save"), "0 steps")
    with broken(1, float("nan")):
        code = train_experiment(
            tiny(**QUIET | never | dict(train__rollback=0.0, train__length=f"{length} steps")),
            tmp_path,
        )
    assert code == DIVERGED
    assert f"up to step {seen}\n" in (tmp_path / "training.log").read_text()
    assert not (tmp_path / "final.safetensors").exists()


def test_it_stops_where_it_diverges_again_and_says_where(tmp_path):
    given = tiny(**HOT | dict(train__warmup="0 steps", wandb__mode="offline"))
    assert train_experiment(given, tmp_path) == DIVERGED
    log = (tmp_path / "training.log").read_text()
    assert "rolled back: from the start on in another order, at 0.5 of the learning rate" in log
    (diagnosis,) = (line for line in log.splitlines() if "diagnosis: " in line)
    assert re.search(
        r"diagnosis: step \d+: loss (nan|inf); worst images at t = \d+ \((nan|inf)\)", diagnosis
    )
    assert re.search(r"outputs not finite in \d+ of \d+, first in \w+\.", diagnosis)
    assert "largest weights" in diagnosis and "learning rate 0.5; loss scale" in diagnosis
    told = [one.get("summary", {}).get("update", {}) for one in segments(tmp_path)[-1]]
    assert {one["train/diverged"] for one in told if "train/diverged" in one} == set(
        re.findall(r"diverged: (.*)", log)
    )
    assert {one["train/diagnosis"] for one in told if "train/diagnosis" in one} == {
        diagnosis.partition("diagnosis: ")[2]
    }
    assert checkpoint.load(checkpoint.checkpoints(tmp_path)[0][1])["parts"]["tracker"]["summary"][
        "train/diverged"
    ]
    assert not (tmp_path / "final.safetensors").exists()
    assert train_experiment(given, tmp_path) == DIVERGED  # and it does not go back a second time


def test_weights_that_are_broken_in_memory_are_left_behind(tmp_path):
    given = tiny(
        **QUIET
        | dict(
            train__length="170 steps",
            every__log="10 steps",
            every__save="20 steps",
            model__channel_mult=(1,),
            model__attention_resolutions=(),
        )
    )
    with broken(109, 1000):
        assert train_experiment(given, tmp_path) == DONE
    log = (tmp_path / "training.log").read_text()
    assert (
        "up to step 120, 10 of 10 steps were skipped: 10 as spikes of loss or gradient, the "
        "others were not finite" in log
    )
    assert "diverged: 52 more steps were skipped than learned from, up to step 160" in log
    assert "rolled back: from step 100 on in another order, at 0.5 of the learning rate" in log
    final = weights.load_weights(tmp_path)[3]
    assert max(value.abs().max() for value in final.values()) < 5
    assert [row["step"] for row in rows(tmp_path)] == list(range(10, 171, 10)) and rows(tmp_path)[
        -1
    ]["train/loss"] < 1


def test_another_seed_shares_nothing_with_the_first():
    assert rng.another(7, 0) == 7 and rng.another(7, 1) != rng.another(7, 2) != rng.another(8, 1)
    assert rng.another(7, 1) == rng.another(7, 1) and 0 <= rng.another(2**63 - 1, 1) < 2**63
