"""What only a card can show; skipped without one."""

import pytest
import torch
from conftest import rows, run, tiny
from test_train import equal, final_state

from ddpm import assemble, checkpoint, dist

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")]


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_card_learns_in_every_type(tmp_path, amp):
    run(tiny(train__amp=amp, train__length="40 steps"), tmp_path)
    losses = [row["train/loss"] for row in rows(tmp_path) if "train/loss" in row]
    assert losses[-1] < losses[0]
    weights = checkpoint.load_weights(tmp_path)[3].values()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights)


def test_resume_on_a_card_is_bitwise_when_deterministic(tmp_path):
    """In a process of its own would be cleaner; torch's deterministic mode is switched off again below."""
    given = dict(train__deterministic=True, train__amp="fp16", model__dropout=0.2)
    try:
        run(tiny(**given, train__length="20 steps", every__save="20 steps"), tmp_path / "whole")
        run(tiny(**given, train__length="7 steps", every__save="7 steps"), tmp_path / "parts")
        run(tiny(**given, train__length="20 steps", every__save="20 steps"), tmp_path / "parts")
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))


def test_a_step_does_not_wait_for_the_card(tmp_path):
    made = assemble.run(tiny(data__flip=True), tmp_path, dist.start(device="cuda"))
    batches = made.batches(0)
    for step in range(3):
        made.step(step, next(batches))
    batch = next(batches)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.step(3, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
