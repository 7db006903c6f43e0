"""Memory runs out, by real allocations and by injected errors: batches are cut and no number
changes.
"""

import contextlib
import os
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from ddpm import evaluate, generate
from ddpm.evaluation.extractors import digits
from ddpm.experiment import build, drawing, load, trainer
from ddpm.experiment import step as experiment_step
from ddpm.main import train_and_close
from ddpm.models.unet import UNet
from ddpm.runtime import device
from ddpm.runtime.out_of_memory import BatchDoesNotFit, Room, ran_out
from ddpm.sampling import draw
from ddpm.tracking.tracker import Tracker
from ddpm.training.trainer import train
from support.runs import rows, run, tiny

CPU = torch.device("cpu")
DISGUISED = [  # as torch 2.14, cuDNN 9.24 and reports of users have them
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    # of torch 2.8 on
    getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
    torch.OutOfMemoryError("CUDA out of memory."),
    MemoryError(),
]
INNOCENT = [
    RuntimeError(
        "cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if you passed in a "
        "non-contiguous input."
    ),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
    ValueError("out of memory"),
]


@contextlib.contextmanager
def crowded(most, error=None, training=False):
    """Inside, U-Nets that learn, or those that do not, run out of memory with more than `most`
    images; yields batch sizes.
    """
    asked = []

    def check(module, inputs):
        if isinstance(module, UNet) and module.training == training:
            asked.append(len(inputs[0]))
            if asked[-1] > most:
                raise error or torch.OutOfMemoryError("CUDA out of memory")

    hook = register_module_forward_pre_hook(check)
    try:
        yield asked
    finally:
        hook.remove()


@pytest.mark.parametrize("error", DISGUISED, ids=lambda error: str(error)[:40])
def test_what_counts_as_out_of_memory(error):
    assert ran_out(error)


@pytest.mark.parametrize("error", INNOCENT, ids=lambda error: str(error)[:40])
def test_what_does_not(error):
    assert not ran_out(error)


def test_not_supported_counts_on_a_full_gpu_alone(monkeypatch):
    """Users report it on full GPUs (pytorch issue 44473); elsewhere it is what it says."""
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    for free, expected in ((0.5, True), (4.0, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda free=free: (free, 8.0))
        assert ran_out(INNOCENT[0]) is expected and not ran_out(INNOCENT[1])


def test_the_hosts_own_error_counts():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert ran_out(caught.value)


def test_batches_are_cut_until_they_fit_and_stay_so():
    """By real allocations: 2^58 bytes an image from the fourth on are more than any machine has."""
    said = []
    tried = []
    room = Room(said.append)

    def work(batch):
        tried.append(len(batch))
        torch.empty(2**58 if len(batch) > 3 else 1, dtype=torch.uint8)
        return [item**2 for item in batch]

    for _ in range(2):
        found = list(room.in_batches("squaring", range(11), 8, work))
        assert [item for batch, _ in found for item in batch] == list(range(11))
        assert [item for _, squares in found for item in squares] == [n**2 for n in range(11)]
    assert tried == [8, 4, 2, 2, 2, 2, 2, 1] + [2, 2, 2, 2, 2, 1]
    assert said == [
        "out of memory squaring 8 images at a time; continuing with 4 at a time, with the same "
        "results",
        "out of memory squaring 4 images at a time; continuing with 2 at a time, with the same "
        "results",
    ]


def test_nothing_of_what_failed_is_held_when_memory_is_given_back(monkeypatch):
    """The frames of the error hold tensors, without which emptying the allocator's cache frees
    nothing.
    """
    living = []
    seen = []
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: seen.append([ref() is None for ref in living])
    )

    def work():
        big = torch.ones(1000)
        living.append(weakref.ref(big))
        torch.empty(2**60, dtype=torch.uint8)
        return big

    assert Room().fits(work)[0] is False and seen == [[True]]


def test_other_errors_and_a_single_image_end_the_work():
    def broken(batch):
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        list(Room().in_batches("drawing", range(4), 2, broken))
    with pytest.raises(
        BatchDoesNotFit, match=r"out of memory drawing a single image \(.*can't allocate memory"
    ):
        list(
            Room(lambda text: None).in_batches(
                "drawing", range(4), 2, lambda batch: torch.empty(2**60, dtype=torch.uint8)
            )
        )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    os.environ["DDPM_CACHE"] = str(folder / "cache")
    run(tiny(train__length="4 steps", data__source="digits", every__save="4 steps"), folder / "run")
    return folder / "run"


def drawn(folder, batch_size, how=draw.draw):
    made = load.load(folder, "cpu", **{"sample.batch_size": batch_size})
    batches = list(
        drawing.drawer(made.config, made.net, made.machine, how)(
            range(7), build.grid_recipe(made.config)
        )
    )
    return [image for _, images in batches for image in images]


@pytest.mark.parametrize(
    "error", [DISGUISED[0], DISGUISED[4], DISGUISED[7]], ids=["cuDNN", "cuBLAS", "torch"]
)
def test_drawing_goes_on_with_the_same_images(trained, capsys, error):
    """To the bit those of the smaller batches; in the middle of a walk too, since each image has
    its own noise.
    """
    expected = drawn(trained, 2)
    with crowded(3, error) as asked:
        found = drawn(trained, 5)
    assert max(asked) == 5 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert (
        capsys.readouterr().out.count("out of memory drawing 5 images at a time; continuing with 2")
        == 1
    )


def test_a_film_goes_on_too(trained):
    expected, (first, *_) = drawn(trained, 2, draw.frames), drawn(trained, 2)
    with crowded(3):
        found = drawn(trained, 5, draw.frames)
    assert len(found) == len(expected) == 7 * 4 and torch.equal(found[-7], first)
    # other batches: rounding
    assert all(abs(a.int() - b.int()).max() <= 1 for a, b in zip(found, expected, strict=True))


def test_measuring_goes_on_with_the_same_numbers(trained):
    """Distances and bits/dim; of the digits' features, whose network is not ours to hook, errors
    come from the allocator.
    """
    options = {
        "evaluate.num_samples": 16,
        "evaluate.likelihood": "both(images=6, nfe=8)",
    }
    expected = evaluate.evaluate(trained, "cpu", **options, **{"evaluate.batch_size": 2})
    with crowded(3) as asked:
        found = evaluate.evaluate(trained, "cpu", **options, **{"evaluate.batch_size": 5})
    assert max(asked) == 5 and "eval/bits_per_dim_flow" in found and "eval/fd_digits" in found
    assert same_numbers(found, expected)


def same_numbers(a, b):
    return a.keys() == b.keys() and all(
        a[key] == (pytest.approx(b[key], rel=1e-9) if isinstance(b[key], float) else b[key])
        for key in a
    )


def test_an_extractor_looks_at_fewer_images_at_a_time():
    plain = digits(CPU)
    said = []
    sizes = []
    images = torch.randint(256, (70, 1, 16, 16), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )

    def embed(batch):
        sizes.append(len(batch))
        if len(batch) > 20:
            torch.empty(2**60, dtype=torch.uint8)
        return plain.embed(batch)

    found = replace(plain, embed=embed, room=Room(said.append))(images)
    assert sizes[:3] == [64, 32, 16] and len(said) == 2
    torch.testing.assert_close(found, plain(images), rtol=1e-5, atol=1e-5)  # sums of other batches
    assert plain(images[:0]).shape == (0, 64)


def test_a_training_validates_draws_and_measures_with_what_fits(tmp_path):
    """The rows of a training whose evaluations run out of memory are those of one whose batches
    are small.
    """
    given = dict(
        train__length="4 steps",
        every__validate="4 steps",
        every__sample="4 steps",
        every__evaluate="4 steps",
        data__source="digits",
        evaluate__likelihood="bound(images=8, nfe=4)",
    )
    run(tiny(**given), tmp_path / "plain")
    made = trainer.build_trainer(tiny(**given), tmp_path / "crowded", device.start())
    with crowded(3):
        assert train(made)
    made.tracker.close()
    log = (tmp_path / "crowded" / "training.log").read_text()
    for line in (
        "validating 8 images at a time; continuing with 4",
        "validating 4 images at a time; continuing with 2",
        "drawing 4 images at a time; continuing with 2",
        "measuring bits/dim of 8 images at a time; continuing with 4",
    ):
        assert log.count(f"out of memory {line}") == 1
    for a, b in zip(rows(tmp_path / "plain"), rows(tmp_path / "crowded"), strict=True):
        assert a.keys() == b.keys()
        for key, value in a.items():
            rel = 1e-3 if key.startswith("eval/") else 1e-6  # pixels may round otherwise
            assert b[key] == (
                pytest.approx(value, rel=rel, abs=1e-9) if isinstance(value, float) else value
            ), key


def test_without_room_for_one_image_a_training_says_where(tmp_path):
    made = trainer.build_trainer(tiny(), tmp_path, device.start())
    with crowded(0, RuntimeError("GET was unable to find an engine to execute this computation")):
        assert train_and_close(made) == 1
    (line,) = [
        line for line in (tmp_path / "training.log").read_text().splitlines() if "failed: " in line
    ]
    assert "out of memory validating a single image (GET was unable" in line
    assert "what helps, by what it saves: --config." in line


def test_a_command_without_room_is_one_line(trained, tmp_path):
    """In a separate process, where each layer asks for more memory than there is."""
    code = (
        "import runpy, sys, torch\n"
        "from torch.nn.modules.module import register_module_forward_pre_hook\n"
        "register_module_forward_pre_hook(lambda *_: torch.empty(2**60, dtype=torch.uint8))\n"
        f"sys.argv[1:] = ['--checkpoint={trained}', '--out={tmp_path}', '--num_images=2']\n"
        "runpy.run_module('ddpm.generate', run_name='__main__', alter_sys=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()
    assert len(last) == 1 and last[0].startswith("error: out of memory drawing a single image (")
    assert last[0].endswith("end other programs that use the same memory, or give --device=cpu")


def test_a_generated_file_is_the_same(trained, tmp_path):
    plain = generate.generate_images(trained, 5, tmp_path / "a", "cpu", **{"sample.batch_size": 2})
    with crowded(3, DISGUISED[5]):
        cut = generate.generate_images(
            trained, 5, tmp_path / "b", "cpu", **{"sample.batch_size": 5}
        )
    assert [path.read_bytes() for path in plain] == [path.read_bytes() for path in cut]


@pytest.mark.parametrize(
    "error", [DISGUISED[0], DISGUISED[4], DISGUISED[6]], ids=["cuDNN", "cuBLAS", "accelerator"]
)
def test_a_step_takes_disguised_errors_for_what_they_are(tmp_path, error):
    given = tiny(train__length="2 steps", every__validate="0 steps", every__sample="0 steps")
    assert run(
        tiny(
            train__length="2 steps",
            every__validate="0 steps",
            every__sample="0 steps",
            train__gradient_accumulation_steps=2,
        ),
        tmp_path / "halves",
    )
    made = trainer.build_trainer(given, tmp_path / "crowded", device.start())
    with crowded(4, error, training=True):
        assert train(made)
    made.tracker.close()
    first, second = (
        load.load(tmp_path / name, "cpu").net.state_dict() for name in ("halves", "crowded")
    )
    assert all(torch.equal(value, second[key]) for key, value in first.items())


@pytest.mark.parametrize("name", ["unet", "unet_edm2"])
def test_a_rehearsal_changes_nothing(tmp_path, name):
    """Not even a network that scales its weights whenever it learns; nor an optimiser, which it
    lets allocate its state.
    """
    given = tiny(model__name=name, train__gradient_accumulation_steps=2)
    plain, rehearsed = (
        trainer.build_trainer(given, tmp_path / folder, device.start(), tracker=Tracker())
        for folder in "ab"
    )
    before = {key: value.clone() for key, value in rehearsed.step.net.state_dict().items()}
    rehearsed.step.rehearse(experiment_step.blank(given, 8))
    assert all(
        torch.equal(value, before[key]) for key, value in rehearsed.step.net.state_dict().items()
    )
    assert rehearsed.step.optimizer.state and all(
        one.grad is None for one in rehearsed.step.parameters
    )
    for made in (plain, rehearsed):
        for step, batch in zip(range(3), made.batches(0), strict=False):
            made.step(step, batch)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            plain.step.net.state_dict().values(),
            rehearsed.step.net.state_dict().values(),
            strict=True,
        )
    )


@pytest.mark.skipif(
    not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="this torch does not tell"
)
def test_segments_expand_unless_the_user_says_otherwise():
    """As torch's allocator itself has read it, in processes of their own: it reads once."""
    code = (
        "from ddpm.runtime import device; import torch; device.start(device='cpu'); "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    clean = {key: value for key, value in os.environ.items() if "ALLOC_CONF" not in key}
    own = "max_split_size_mb:64"
    cases = (
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": own}, own),
        ({"PYTORCH_ALLOC_CONF": own}, own),
    )
    for given, read in cases:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=clean | given,
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == read
