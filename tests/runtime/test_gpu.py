"""What only a GPU can show; skipped without one."""

from pathlib import Path

import pytest
import torch

from ddpm.data import loader
from ddpm.experiment import build, load, memory, trainer
from ddpm.experiment import drawing as experiment_drawing
from ddpm.runtime import device
from ddpm.sampling.draw import concatenate
from ddpm.tracking.tracker import Tracker
from ddpm.training import weights as training_weights
from support.configs import module_of
from support.runs import equal, final_state, rows, run, tiny

MEASURE = module_of(Path(__file__).parents[2] / "experiments" / "memory" / "measure.py")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_a_gpu_learns_in_every_type(tmp_path, amp):
    run(tiny(train__amp=amp, train__length="40 steps"), tmp_path)
    losses = [row["train/loss"] for row in rows(tmp_path) if "train/loss" in row]
    assert losses[-1] < losses[0]
    weights = training_weights.load_weights(tmp_path)[3].values()
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights)


def test_resume_on_a_gpu_is_bitwise_when_deterministic(tmp_path):
    """In a process of its own would be cleaner; torch's deterministic mode is switched off again
    below.
    """
    given = dict(train__deterministic=True, train__amp="fp16", model__dropout=0.2)
    try:
        run(tiny(**given, train__length="20 steps", every__save="20 steps"), tmp_path / "whole")
        run(tiny(**given, train__length="7 steps", every__save="7 steps"), tmp_path / "parts")
        run(tiny(**given, train__length="20 steps", every__save="20 steps"), tmp_path / "parts")
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(final_state(tmp_path / "whole"), final_state(tmp_path / "parts"))


def test_a_step_does_not_wait_for_the_gpu(tmp_path):
    made = trainer.build_trainer(
        tiny(data__flip=True), tmp_path, device.start(device="cuda"), tracker=Tracker()
    )
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


def test_batches_come_ahead_to_the_gpu_whole_and_in_order():
    """Each is read when the GPU has done what it was given before, so until then its memory may
    not be another's.
    """
    machine = device.start("off", device="cuda")
    source = build.dataset(tiny())
    order = torch.randint(len(source), (30, 8), generator=torch.Generator().manual_seed(0)).tolist()
    busy = torch.rand(2048, 2048, device=machine.device)
    found = []
    ahead = machine.prefetch(loader.loader(source, order, pin_memory=True))
    for (images, labels), (pixels, others) in zip(ahead, loader.loader(source, order), strict=True):
        assert images.device == machine.device and torch.equal(labels, others)
        busy = busy @ busy / 1024
        found.append((images.clone(), pixels))
    assert all(torch.equal(images.cpu(), pixels) for images, pixels in found)


def test_a_compiled_network_draws_the_same_through_cuda_graphs(tmp_path, monkeypatch, capsys):
    """In three batches, by a sampler that looks back: an answer which the next one overwrote would
    show.

    In float32 throughout, since TF32 rounds after ten bits and compiled convolutions are others;
    what is left is rounding of 1e-6, which may move a pixel to the next of its 256 values.
    """
    from torch._dynamo.utils import counters

    run(tiny(train__amp="off"), tmp_path)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    drawn = []
    for wanted in (False, True):
        made = load.load(
            tmp_path,
            "cuda",
            **{"sample.compile": wanted, "sample.sampler": "dpmpp", "sample.steps": 6},
        )
        torch.set_float32_matmul_precision("highest")
        counters.clear()
        drawing = experiment_drawing.drawer(made.config, made.net, made.machine)
        drawn.append(concatenate(drawing(range(12), build.grid_recipe(made.config))).int())
    assert abs(drawn[0] - drawn[1]).max() <= 1
    said = capsys.readouterr().out
    assert "the network was compiled for drawing in" in said and "torch.compile failed" not in said
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("levels", [0, 99])
def test_the_account_of_a_step_is_what_the_gpu_takes(amp, levels):
    """Within a tenth, in a step of some hundred MiB: beside that the blocks of torch's
    allocator, of up to 2 MiB, are small.
    """
    machine = device.start(amp, device="cuda")
    given = tiny(model__model_channels=32, train__batch_size=512)
    if not MEASURE.computes(machine):
        pytest.skip("this GPU has no bf16")
    found = memory.estimate(given, machine.dtype, given.train.batch_size, levels)
    assert found.total == pytest.approx(MEASURE.measured(given, machine, levels), rel=0.1)
