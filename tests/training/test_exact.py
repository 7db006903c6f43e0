"""What promises float32 computes without TF32, which rounds what is multiplied to ten bits; and
nothing else changes.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from ddpm.evaluation import distances, extractors, reference
from ddpm.experiment import build, drawing, load
from ddpm.runtime import device as runtime_device
from support.runs import run, tiny

CPU = torch.device("cpu")


def precision():
    """What torch lets a GPU do with float32, by its older switches, and by those that came with
    version 2.9.
    """
    newer = getattr(torch.backends.cudnn, "conv", None)
    return (
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_tf32,
        newer
        and (torch.backends.cuda.matmul.fp32_precision == "tf32", newer.fp32_precision == "tf32"),
    )


NEWER = getattr(torch.backends.cudnn, "conv", None)
EXACT = ("highest", False, False, NEWER and (False, False))
FAST = ("high", True, True, NEWER and (True, True))


@pytest.fixture(autouse=True)
def fast():
    """As a training in half precision on a GPU sets torch up."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    yield
    torch.set_float32_matmul_precision("highest")


class Noted(TorchDispatchMode):
    """Notes in `seen` the precision at each operation inside."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(precision())
        return function(*args, **(kwargs or {}))


def test_extractors_see_images_exactly():
    plain = extractors.digits(CPU)
    seen = []

    def embed(images):
        seen.append(precision())
        if len(images) == 3:
            raise KeyError
        return plain.embed(images)

    extractor = replace(plain, embed=embed)
    extractor(torch.zeros(2, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(KeyError):
        extractor(torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
    assert seen == [EXACT, EXACT] and precision() == FAST


def test_the_likelihood_is_measured_exactly_and_what_is_drawn_is_not(tmp_path):
    run(tiny(train__length="2 steps"), tmp_path)
    made = load.load(
        tmp_path,
        "cpu",
        **{
            "evaluate.likelihood": "both(images=4, nfe=8)",
        },
    )
    seen = []
    torch.set_float32_matmul_precision("high")  # build.load has set torch up for a CPU
    torch.backends.cudnn.allow_tf32 = True
    hook = register_module_forward_pre_hook(lambda module, _: seen.append(precision()))
    try:
        drawing.likelihood(made.config, made.net, build.dataset(made.config), made.machine)()
        assert set(seen) == {EXACT} and precision() == FAST
        seen.clear()
        list(
            drawing.drawer(made.config, made.net, made.machine)(
                range(2), build.grid_recipe(made.config)
            )
        )
        assert set(seen) == {FAST}
    finally:
        hook.remove()


@pytest.mark.parametrize(
    "measure",
    [
        partial(distances.compare, extractor=extractors.digits(CPU)),
        lambda drawn, real: distances.nearest(drawn, real.features),
    ],
    ids=["compare", "nearest"],
)
def test_distances_are_exact(measure):
    """The Frechet distance is numpy's, in float64; the others are torch's."""
    generator = torch.Generator().manual_seed(0)
    drawn, real = (torch.randn(30, 64, generator=generator) for _ in range(2))
    real = reference.Reference.of(real)
    with Noted() as noted:
        measure(drawn, real)
    assert noted.seen == {EXACT} and precision() == FAST


def test_an_error_restores_what_was_set():
    torch.set_float32_matmul_precision("medium")
    with pytest.raises(KeyError), runtime_device.exact():
        with runtime_device.exact():
            pass
        assert precision() == EXACT
        raise KeyError
    assert precision()[0] == "medium" and torch.backends.cudnn.allow_tf32


def test_without_mixed_precision_nothing_is_rounded():
    runtime_device.start("off", device="cpu")
    assert precision() == EXACT


@pytest.mark.parametrize("amp, expected", [("off", EXACT), ("bf16", FAST), ("fp16", FAST)])
def test_a_gpu_rounds_only_beside_mixed_precision(monkeypatch, amp, expected):
    """On a GPU that is not there: torch is asked about it and answers."""
    torch.set_float32_matmul_precision("highest")
    monkeypatch.setattr(torch, "empty", lambda *size, **options: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    runtime_device.start(amp, device="cuda")
    assert precision() == expected


@pytest.mark.parametrize("deterministic", [False, True])
def test_cudnn_tries_its_convolutions_unless_it_is_deterministic(monkeypatch, deterministic):
    monkeypatch.setattr(torch, "empty", lambda *size, **options: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda wanted: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", deterministic)
    runtime_device.start("off", deterministic, "cuda")
    assert torch.backends.cudnn.benchmark != deterministic


def test_features_of_another_device_or_precision_are_not_taken(tmp_path):
    """A file as it was named before, and that of a GPU, both with other features in them, are
    left as they are.
    """
    extractor = extractors.digits(CPU)
    dataset = build.dataset(tiny(data__source="digits"))
    wrong = torch.full((len(dataset), extractor.width), 7.0)
    gpu = replace(extractor, device=torch.device("cuda", 0))
    others = [
        tmp_path / f"{dataset.fingerprint}-{extractor.name}.safetensors",
        tmp_path / f"{dataset.fingerprint}-{extractor.name}-{gpu.computed}.safetensors",
    ]
    for path in others:
        reference.save_features(reference.Reference.of(wrong), path)
    found = reference.reference(extractor, dataset, tmp_path)
    assert not torch.equal(found.features, wrong) and gpu.computed != extractor.computed
    (mine,) = set(tmp_path.iterdir()) - set(others)
    assert mine.name.endswith("-cpu-float32.safetensors")
    assert torch.equal(reference.reference(extractor, dataset, tmp_path).features, found.features)
    assert torch.equal(reference.load_features(others[0], extractor, "").features, wrong)
