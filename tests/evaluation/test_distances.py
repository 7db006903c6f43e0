"""Scoring against torch-fidelity, scipy and closed forms; the shipped extractor against the
table that admitted it.
"""

import importlib.util
import logging
import math
import random
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import scipy.linalg
import scipy.stats
import torch
import torch_fidelity
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ddpm.common import rng, safe_load
from ddpm.data import open_source
from ddpm.evaluation import distances, extractors
from ddpm.evaluation import reference as evaluation_reference
from ddpm.experiment import build
from ddpm.experiment import drawing as experiment_drawing
from ddpm.runtime import device
from ddpm.runtime.out_of_memory import Room
from ddpm.studies import compatibility
from support.fake_gpu import FakeGPU, needs_cuda_build
from support.runs import tiny

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[2] / "experiments" / "digits_extractor" / "make.py"


def normal(n, d, seed=0):
    return rng.normal(seed, "test", 0, range(n), (d,))


def with_moments(features, mean, std):
    """Features [n, d] moved to have exactly this sample mean [d] and a diagonal sample
    covariance std**2.
    """
    centred = features.double() - features.double().mean(0)
    white = torch.linalg.solve_triangular(
        torch.linalg.cholesky(torch.cov(centred.T)), centred.T, upper=False
    ).T
    return (white * torch.tensor(std) + torch.tensor(mean)).float()


class Pictures:
    """A dataset in memory that counts its reads."""

    def __init__(self, images, fingerprint="f00d"):
        self.images = images
        self.fingerprint = fingerprint
        self.read = []

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        self.read.append(index)
        return self.images[index]


@pytest.fixture(scope="module")
def digits():
    source = open_source("digits", 16, 1, (0, 0, 0))
    return torch.stack([source[i] for i in range(len(source))])


@pytest.fixture(scope="module")
def extractor():
    return extractors.EXTRACTORS["digits"](CPU)


@pytest.fixture(scope="module")
def real(extractor, digits):
    return extractors.extract(extractor, [digits])


# --- numbers ---


def test_frechet_distance_of_known_gaussians():
    first = with_moments(normal(500, 3), [0.0, 1.0, 2.0], [1.0, 2.0, 0.5])
    second = with_moments(normal(700, 3, seed=1), [1.0, 1.0, 0.0], [3.0, 1.0, 0.5])
    # |difference of means|^2 + sum of (std - std')^2
    expected = (1 + 0 + 4) + ((1 - 3) ** 2 + (2 - 1) ** 2 + 0)
    # features are float32
    assert distances.frechet(first, second) == pytest.approx(expected, rel=1e-5)
    assert distances.frechet(first, first) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_agrees_with_scipy(real):
    first = real[:900]
    second = real[900:] * 1.1
    a = first.double().numpy()
    b = second.double().numpy()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    # some features never fire: no root without this
    root = scipy.linalg.sqrtm(covariances[0] + 1e-9 * np.eye(64)).real
    # the symmetric form
    trace = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ covariances[1] @ root), 0)).sum()
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * trace
    # means are summed in float32
    assert distances.frechet(first, second) == pytest.approx(expected, rel=1e-4)


@pytest.mark.filterwarnings("ignore:Matrix is singular")
@pytest.mark.parametrize(
    ("n", "m", "dead"),
    [(300, 400, 0), (300, 400, 9), (12, 400, 0), (300, 20, 9), (12, 20, 0)],
    ids=["full rank", "dead features", "few drawn", "few real", "few of both"],
)
def test_frechet_distance_agrees_with_torch_fidelity_and_scipy_at_any_rank(n, m, dead):
    """In 64 features, whose variances fall by a factor of 1,000.

    Both others take the root of a product that is not symmetric. An eigenvalue of it that should be
    0 is found as 1e-16 of the largest, and its root as 1e-8: 64 of those are 6e-7 of that root,
    which is below the distance. In full rank they agree to 1e-9.
    """
    scales = torch.logspace(0, -1.5, 64)
    scales[:dead] = 0
    first, second = normal(n, 64) * scales * 1.3 + 0.1, normal(m, 64, seed=1) * scales
    found = distances.frechet(first, second)
    close = 1e-9 if n > 64 and m > 64 and not dead else 1e-5
    moments = [fid_features_to_statistics(side.double()) for side in (first, second)]
    theirs = fid_statistics_to_metric(*moments, verbose=False)["frechet_inception_distance"]
    assert found == pytest.approx(theirs, rel=close)
    covariances = [each["sigma"] for each in moments]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    apart = np.square(moments[0]["mu"] - moments[1]["mu"]).sum()
    expected = apart + sum(map(np.trace, covariances)) - 2 * np.trace(root)
    assert found == pytest.approx(expected, rel=close)


def test_few_images_take_few_operations():
    """Twelve against twelve in Inception's 2,048 features: no matrix of features by features."""
    drawn, real = normal(12, 2048), normal(12, 2048, seed=1)
    with FlopCounterMode(display=False) as counter:
        distances.frechet(drawn, real)
    assert counter.get_total_flops() < 100 * 12 * 2048
    reference = evaluation_reference.Reference.of(real)
    with FlopCounterMode(display=False) as counter:
        distances.compare(drawn, reference, extractors.EXTRACTORS["digits"](CPU))
    assert counter.get_total_flops() < 100 * 12 * 2048 * 12


def test_blocks_change_no_number(extractor, real, monkeypatch):
    """Blocks of 7 rows against one of all: products of rows alone differ by rounding at most."""
    reference = evaluation_reference.Reference.of(real[600:])
    left_out = torch.arange(len(reference.features)) % 3 == 0
    whole = distances.compare(real[:500], reference, extractor, left_out=left_out)
    monkeypatch.setattr(distances, "PAIRS", 7 * len(reference.features))
    parts = distances.compare(real[:500], reference, extractor, left_out=left_out)
    assert parts[0] == pytest.approx(whole[0], rel=1e-3, abs=1e-6)
    exact = torch.cdist(real[:500].double(), reference.features[~left_out].double()).min(1).values
    for numbers, distance, which in (whole, parts):
        # a squared distance is a difference of squared norms near 30 in float32
        torch.testing.assert_close(distance.double(), exact, rtol=0, atol=1e-2)
        assert not left_out[which].any() and len(numbers) == 4
        apart = (real[:500] - reference.features[which]).norm(dim=1)
        torch.testing.assert_close(apart.double(), exact, rtol=0, atol=1e-2)


def test_memory_that_runs_out_on_a_gpu_moves_the_comparison_to_the_cpu(extractor):
    said = []
    gpu = replace(extractor, device=torch.device("cuda", 0), room=Room(said.append))

    def work(device):
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return device

    assert gpu.on_device(work) == CPU and extractor.on_device(work) == CPU
    assert said == ["out of memory comparing features (CUDA out of memory); using the CPU"]


@needs_cuda_build
def test_features_are_compared_on_the_gpu_they_are_on(real):
    with FakeGPU():
        drawn, others = (torch.empty(side, 64, device="cuda") for side in (20, 30))
        members, _ = distances.subsets(20, 30, 9, 0, "cuda")
        sums, radii = distances.within(drawn, members)
        gaussian = distances.Gaussian.of(torch.empty(8, 64, device="cuda"))
        blocks = list(distances.blocks(drawn, others))
    for tensor in (members, sums, radii, *gaussian, *blocks[0][1:]):
        assert tensor.device.type == "cuda"
    assert (sums.dtype, radii.dtype, gaussian.root.dtype) == (
        torch.float64,
        torch.float32,
        torch.float64,
    )


def test_compare_gives_torch_fidelitys_own_numbers(extractor, real):
    generated = real[:300] * 1.05
    reference = real[200:]
    found, distance, which = distances.compare(
        generated, evaluation_reference.Reference.of(reference), extractor, seed=3
    )
    kernel = kid_features_to_metric(
        generated, reference, kid_subset_size=299, rng_seed=3, verbose=False
    )
    # its other path, all distances at once
    cover = prc_features_to_metric(generated, reference, verbose=False)
    assert list(found) == ["fd_digits", "kd_digits", "precision_digits", "recall_digits"]
    assert found["fd_digits"] == distances.frechet(generated, reference)
    # float32 sums of values near 1 in another order: 1e-7 each, and the distance is their difference
    assert found["kd_digits"] == pytest.approx(kernel["kernel_inception_distance_mean"], abs=1e-6)
    assert (found["precision_digits"], found["recall_digits"]) == (
        cover["precision"],
        cover["recall"],
    )
    again, *closest = distances.compare(
        generated, evaluation_reference.Reference.of(reference), extractor, seed=3
    )
    assert found == again and torch.equal(closest[0], distance) and torch.equal(closest[1], which)


def test_calculate_metrics_over_images_gives_the_same_numbers(extractor, digits):
    """The whole of torch-fidelity from images on, with our extractor under its registry."""

    class Registered(torch_fidelity.FeatureExtractorBase):
        get_provided_features_list = staticmethod(lambda: ("64",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "64")

        def __init__(self, name, features_list, **kwargs):
            super().__init__(name, features_list)

        def forward(self, images):
            return (extractor(images),)

    torch_fidelity.register_feature_extractor("digits-under-test", Registered)
    first = digits[:200]
    second = digits[200:600]
    # it insists on RGB
    colour = [list(images.expand(-1, 3, -1, -1).contiguous()) for images in (first, second)]
    theirs = torch_fidelity.calculate_metrics(
        input1=ListOfImages(colour[0]),
        input2=ListOfImages(colour[1]),
        feature_extractor="digits-under-test",
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=199,
        rng_seed=0,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    reference = evaluation_reference.Reference.of(extractors.extract(extractor, [second]))
    ours = distances.compare(extractors.extract(extractor, [first]), reference, extractor)[0]
    # batches of other sizes, and grey as the mean of three channels: rounding of 1e-7 in each
    # feature
    assert ours["fd_digits"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-4)
    assert ours["kd_digits"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-4)
    assert ours["precision_digits"] == theirs["precision"]
    assert ours["recall_digits"] == theirs["recall"]


class ListOfImages(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


def test_kernel_distance_is_unbiased_at_any_count(extractor):
    for n in (50, 1500):
        reference = evaluation_reference.Reference.of(normal(n, 64, seed=1))
        numbers, *_ = distances.compare(normal(n, 64), reference, extractor)
        moved, *_ = distances.compare(normal(n, 64) + 0.5, reference, extractor)
        # five times below what a shift of half a standard deviation gives, though 50 samples are
        # few
        assert abs(numbers["kd_digits"]) < moved["kd_digits"] / 5
    # which the Frechet distance is not: 2 (d + d (d + 1) / 4) / n = 1.5 here
    assert numbers["fd_digits"] > 1


def test_precision_and_recall_see_a_missing_mode(extractor):
    reference = evaluation_reference.Reference.of(
        torch.cat([normal(100, 64), normal(100, 64, seed=1) + 100])
    )
    half, *_ = distances.compare(normal(100, 64), reference, extractor)
    # the drawn images are those of one mode
    assert (half["precision_digits"], half["recall_digits"]) == (1, 0.5)


@pytest.mark.parametrize(("n", "m"), [(2000, 20_000), (2000, 2000)])
def test_a_perfect_generator_of_a_gaussian_in_closed_form(n, m):
    """Wishart: E|mean - mean'|^2 = d (1/n + 1/m), and the roots of the covariances add d (d + 1) /
    4 of that.

    The mean of 100 draws is known to 1.2 %, the next order is about 2 %, and the m images stand for
    the Gaussian with an error of their own of 2 %: 10 % are three times all of it. With one side
    drawn alone the second case would be half.
    """
    d = 16
    real = normal(m, d)
    # without distances between 20,000 images, which this number does without
    reference = evaluation_reference.Reference(real, distances.Moments.of(real), "")
    mean, deviation = distances.fid_of_reference_resample(reference, n)
    assert mean == pytest.approx((d + d * (d + 1) / 4) * (1 / n + 1 / m), rel=0.1)
    # d squares of normals with weight 1, and d (d + 1) / 2 with weight 1/2: each has a variance of
    # twice its weight squared
    expected = math.sqrt(2 * d + d * (d + 1) / 4) / (d + d * (d + 1) / 4)
    # a deviation of 100 draws is known to 7 %
    assert deviation / mean == pytest.approx(expected, rel=0.25)


def test_a_perfect_generator_of_the_digits_scores_as_digits_that_were_never_seen(extractor, real):
    """Against a half of the digits the other half is what a perfect generator draws: 40 splits,
    whose mean has an error of 0.059 / sqrt(40) = 0.009; every twentieth half is resampled, with
    the same spread in 2 times 100 draws: 0.006.
    """
    apart = []
    told = []
    for k in range(40):
        order = rng.permutation(k, "test", 0, len(real))
        apart.append(distances.frechet(real[order[:898]], real[order[898:]]))
        if k % 20 == 0:
            told.append(
                distances.fid_of_reference_resample(
                    evaluation_reference.Reference.of(real[order[898:]]), 898
                )[0]
            )
    # and each half stands for all digits with an error of its own, about a tenth of 0.23
    assert np.mean(told) == pytest.approx(np.mean(apart), abs=0.05)


def test_what_a_perfect_generator_gets_falls_with_the_count_and_is_remembered(
    extractor, real, monkeypatch, tmp_path
):
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path))
    reference = evaluation_reference.Reference.of(real, "f00d-digits")
    found = [
        distances.perfect_generator(reference, n, extractor)["fd_digits_perfect"]
        for n in (250, 500, 1000, 1797)
    ]
    # against the 0.04 of README until 2026-11
    assert found == sorted(found, reverse=True) and found[-1] > 0.1
    monkeypatch.setattr(
        distances,
        "fid_of_reference_resample",
        lambda *arguments: pytest.fail("it was computed again"),
    )
    assert distances.perfect_generator(reference, 500, extractor)["fd_digits_perfect"] == found[1]
    monkeypatch.undo()
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path))
    (path,) = tmp_path.glob("*.json")
    path.write_text('{"500 samples": ["?", 1]}')
    assert distances.perfect_generator(reference, 500, extractor)["fd_digits_perfect"] == found[1]


def test_too_few_images_is_one_line(extractor, real):
    few = evaluation_reference.Reference.of(real[:3])
    all_of_them = evaluation_reference.Reference.of(real)
    for measure in (
        lambda: distances.compare(real[:3], all_of_them, extractor),
        lambda: distances.perfect_generator(all_of_them, 3, extractor),
        lambda: distances.perfect_generator(few, 10, extractor),
    ):
        with pytest.raises(
            ValueError, match="^3 images are too few to compare; measure at least 4[^\n]*$"
        ):
            measure()
    assert all(np.isfinite(list(distances.compare(real[:4], all_of_them, extractor)[0].values())))


# --- the shipped extractor ---


def test_the_shipped_extractor_tells_apart_what_it_must(extractor, digits):
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    labels = torch.tensor(open_source("digits", 16, 1, (0, 0, 0)).labels)
    with torch.random.fork_rng():
        table = recipe.measure(extractor, digits, labels)
    times_floor = {row: value / table["half against half"] for row, value in table.items()}
    # In floors, so that the scale has no say. The figures are those that the recipe had to reach to
    # be accepted at all.
    for row, least in {
        "noise 10/255": 3.9,
        "noise 20/255": 14.7,
        "noise 40/255": 66,
        "blur 1 px": 5.9,
        "blur 2 px": 34,
        "uniform noise": 817,
        "one class missing, mean": 14.7,
    }.items():
        assert times_floor[row] > least, (row, times_floor[row])
    assert (
        table["noise 10/255"]
        < table["noise 20/255"]
        < table["noise 40/255"]
        < table["uniform noise"]
    )
    assert table["blur 1 px"] < table["blur 2 px"] < table["uniform noise"]
    assert (
        table["perfect generator, 1797"]
        < table["perfect generator, 1000"]
        < table["perfect generator, 500"]
    )
    # even a small evaluation sees that much noise
    assert table["perfect generator, 500"] < table["noise 10/255"]


def test_the_shipped_file_is_small_and_named_by_its_hash(extractor, tmp_path):
    assert extractor.name == extractors.DIGITS.stem and extractors.DIGITS.stat().st_size < 100_000
    damaged = tmp_path / extractors.DIGITS.name
    damaged.write_bytes(extractors.DIGITS.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged .*; install ddpm again$"):
        extractors.digits_extractor(damaged, CPU)


def test_features_do_not_depend_on_company(extractor, digits, real):
    """Two ranks with uneven shards, and one image alone, give the rows of one batch; batch
    statistics would not.
    """
    alone = torch.cat([extractor(digits[i : i + 1]) for i in range(5)])
    shards = extractors.extract(extractor, [*digits[:1000].split(37), *digits[1000:].split(64)])
    # float32 sums over 512 numbers in another order: a few units in the last place of values near 1
    torch.testing.assert_close(alone, real[:5], rtol=0, atol=2e-5)
    torch.testing.assert_close(shards, real, rtol=0, atol=2e-5)
    assert distances.frechet(shards, real[:700]) == pytest.approx(
        distances.frechet(real, real[:700]), rel=1e-3
    )
    assert extractors.extract(extractor, []).shape == (0, 64)


def test_features_are_float32_on_the_cpu_and_colour_and_alpha_are_understood(
    extractor, digits, real
):
    assert (real.shape, real.dtype, real.device) == ((1797, 64), torch.float32, CPU)
    assert not real.requires_grad
    grey = digits[:8]
    clear = torch.full_like(grey, 255)
    for images in (
        grey.expand(-1, 3, -1, -1),
        torch.cat([grey, clear], 1),
        torch.cat([grey, grey, grey, clear], 1),
    ):
        torch.testing.assert_close(extractor(images), real[:8], rtol=0, atol=2e-5)
    nothing = torch.cat([grey, torch.zeros_like(grey)], 1)
    # transparent is white
    torch.testing.assert_close(extractor(nothing), extractor(clear), rtol=0, atol=0)


def test_scoring_disturbs_no_generator(digits, inception_file, tmp_path):
    def states():
        return (
            torch.random.get_rng_state().tolist(),
            random.getstate(),
            np.random.get_state()[1].tolist(),
        )

    before = states()
    extractors.EXTRACTORS["inception"](CPU, weights=inception_file)
    extractor = extractors.EXTRACTORS["digits"](CPU)
    real = evaluation_reference.reference(extractor, Pictures(digits[:50]), tmp_path)
    distances.compare(real.features[:20], real, extractor)
    distances.perfect_generator(real, 20, extractor)
    assert states() == before


def test_autocast_and_gradients_outside_do_not_reach_in(extractor, digits, real):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extractor(digits[:64])
    assert torch.equal(inside, real[:64])


# --- Inception ---


def test_inception_goes_through_torch_fidelitys_own_network(inception_file):
    extractor = extractors.EXTRACTORS["inception"](CPU, weights=str(inception_file))
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], inception_file)
    colour = (
        rng.uniform(0, "pixels", 0, range(3 * 3 * 16 * 12))
        .mul(256)
        .to(torch.uint8)
        .reshape(3, 3, 16, 12)
    )
    grey = colour[:1, :1]
    with torch.no_grad():
        expected = theirs(torch.cat([colour, grey.expand(-1, 3, -1, -1)]))[0]
    found = extractors.extract(extractor, [colour, grey])
    # the same kernels on batches of another size: rounding
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert extractor.metric_names == ("fid", "kid", "precision", "recall")
    # not the published ones
    assert extractor.name.startswith("inception-") and extractor.name != "inception-v3-compat"


def test_extractors_take_the_operations_that_budgets_count(inception_file):
    for name, count in extractors.OPERATIONS.items():
        for size in (16, 40):
            with FlopCounterMode(display=False) as counter:
                weights = {"weights": str(inception_file)} if name == "inception" else {}
                extractor = extractors.EXTRACTORS[name](CPU, **weights)
                extractor(torch.zeros(1, 3, size, size, dtype=torch.uint8))
            assert counter.get_total_flops() == count
    assert set(extractors.OPERATIONS) == set(extractors.EXTRACTORS)


def test_no_inception_weights_and_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    # nothing listens there, wherever the test runs
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    patience = socket.getdefaulttimeout()
    start = time.monotonic()
    with pytest.raises(ValueError) as error:
        extractors.EXTRACTORS["inception"](CPU)
    line = str(error.value)
    assert (
        "\n" not in line
        and extractors.INCEPTION in line
        and "evaluate.extractor=\"inception(weights='PATH')\"" in line
    )
    assert str(tmp_path / "hub" / "checkpoints") in line
    assert time.monotonic() - start < 20 and socket.getdefaulttimeout() == patience
    assert not list(tmp_path.rglob("*.pth*")), "half a download was left"


def test_weights_that_are_not_what_they_say_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / extractors.INCEPTION
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a download")
    with pytest.raises(ValueError, match="is damaged .*delete it to download it again$"):
        extractors.EXTRACTORS["inception"](CPU)
    with pytest.raises(
        ValueError, match="^cannot read the extractor's weights .*No such file.*; leave it empty"
    ):
        extractors.EXTRACTORS["inception"](CPU, weights=tmp_path / "nowhere.pth")
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="^[^\n]*holds no Inception weights[^\n]*$"):
        extractors.EXTRACTORS["inception"](CPU, weights=other)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_weights_file_runs_no_code(tmp_path):
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="holds no Inception weights"):
        extractors.EXTRACTORS["inception"](CPU, weights=tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


# --- the reference and its cache ---


def test_the_reference_is_computed_once_for_each_content(
    extractor, digits, real, tmp_path, monkeypatch
):
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    first = Pictures(digits[:100])
    features = evaluation_reference.reference(extractor, first, batch_size=30).features
    assert first.read and sorted(first.read) == list(range(100))
    # batches of another size: rounding
    torch.testing.assert_close(features, real[:100], rtol=0, atol=2e-5)
    again = Pictures(digits[:100])
    changed = Pictures(digits[100:200], fingerprint="beef")
    assert (
        torch.equal(evaluation_reference.reference(extractor, again).features, features)
        and not again.read
    )
    assert (
        not torch.equal(evaluation_reference.reference(extractor, changed).features, features)
        and len(changed.read) == 100
    )
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [
        f"{fingerprint}-{extractor.name}-{extractor.computed}.safetensors"
        for fingerprint in ("beef", "f00d")
    ]


@pytest.mark.parametrize(
    "harm", [lambda content: content[:-5], lambda content: b"", lambda content: b"x" * 99]
)
def test_a_torn_cache_is_computed_again(extractor, digits, tmp_path, caplog, harm):
    features = evaluation_reference.reference(extractor, Pictures(digits[:20]), tmp_path).features
    path = next(tmp_path.iterdir())
    path.write_bytes(harm(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(
            evaluation_reference.reference(extractor, Pictures(digits[:20]), tmp_path).features,
            features,
        )
    assert "cannot be read" in caplog.text
    mended = Pictures(digits[:20])
    assert (
        torch.equal(evaluation_reference.reference(extractor, mended, tmp_path).features, features)
        and not mended.read
    )


def test_a_cache_of_before_there_were_moments_is_computed_again(
    extractor, digits, real, tmp_path, caplog
):
    """As commit 0494cba wrote it: features alone, of at most 50,000 images."""
    tensors = {"features": real[:20] + 1}
    old = safetensors.torch.save(tensors, {"crc32": str(safe_load.checksum({}, tensors))})
    (tmp_path / f"f00d-{extractor.name}-{extractor.computed}.safetensors").write_bytes(old)
    found = evaluation_reference.reference(extractor, Pictures(digits[:20]), tmp_path)
    torch.testing.assert_close(found.features, real[:20], rtol=0, atol=2e-5)
    assert (
        found.moments.count == 20
        and "it holds features and not features with the moments" in caplog.text
    )


def test_a_cache_of_before_there_were_radii_is_completed(extractor, digits, tmp_path, caplog):
    """As commit 3a836ad wrote it: features and moments; no image is read again."""
    first = evaluation_reference.reference(extractor, Pictures(digits[:80]), tmp_path)
    (path,) = tmp_path.iterdir()
    moments = first.moments
    tensors = {
        "features": first.features,
        "count": torch.tensor(moments.count),
        "mean": moments.mean,
        "scatter": moments.scatter,
    }
    path.write_bytes(
        safetensors.torch.save(tensors, {"crc32": str(safe_load.checksum({}, tensors))})
    )
    for _ in range(2):
        pictures = Pictures(digits[:80])
        found = evaluation_reference.reference(extractor, pictures, tmp_path)
        assert not pictures.read and not caplog.text
        assert torch.equal(found.root, first.root) and torch.equal(found.radii, first.radii)
    assert len(safetensors.torch.load_file(path)) == 6


def test_what_the_reference_alone_decides_is_computed_once(
    extractor, digits, tmp_path, monkeypatch
):
    """A second evaluation, in another process too, compares drawn images alone."""
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path))
    reference = evaluation_reference.reference(extractor, Pictures(digits[:300]))
    drawn = reference.features[:200] * 1.1
    first = distances.compare(drawn, reference, extractor)[0]
    again = evaluation_reference.reference(extractor, Pictures(digits[:300]))
    within = distances.within
    sizes = []
    monkeypatch.setattr(distances, "within", lambda *of: (sizes.append(len(of[0])), within(*of))[1])
    assert distances.compare(drawn, again, extractor)[0] == first and sizes == [200]


def test_a_cache_that_cannot_be_written_is_done_without(extractor, digits, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    found = evaluation_reference.reference(
        extractor, Pictures(digits[:20]), tmp_path / "file" / "cache"
    )
    assert len(found.features) == 20 and "cannot be kept" in caplog.text


def test_a_large_reference_keeps_the_moments_of_all_and_the_features_of_some(
    extractor, digits, real, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation_reference, "MAX_FEATURES", 10)
    pictures = Pictures(digits[:205])
    found = evaluation_reference.reference(extractor, pictures, tmp_path, batch_size=30)
    places = [i * 205 // 10 for i in range(10)]  # a folder sorted by class keeps all classes
    torch.testing.assert_close(found.features, real[places], rtol=0, atol=2e-5)
    assert (
        sorted(pictures.read) == list(range(205))
        and evaluation_reference.reference_indices(205) == places
    )
    expected = real[:205].double().numpy()
    for moments in (
        found.moments,
        evaluation_reference.reference(extractor, pictures, tmp_path).moments,
    ):  # computed, and from the cache
        assert moments.count == 205 and len(pictures.read) == 205
        # batches of another size: features differ by 2e-5 at most, and have values of order 1
        np.testing.assert_allclose(moments.mean, expected.mean(0), rtol=0, atol=2e-5)
        np.testing.assert_allclose(
            moments.covariance, np.cov(expected, rowvar=False), rtol=0, atol=1e-4
        )
    drawn = real[1000:1100]
    numbers, some = (
        distances.compare(drawn, one, extractor)[0]
        for one in (found, evaluation_reference.Reference.of(real[places]))
    )
    assert numbers["fd_digits"] == pytest.approx(distances.frechet(drawn, real[:205]), rel=1e-4)
    assert (
        numbers["fd_digits"] < some["fd_digits"]
        and numbers["recall_digits"] == some["recall_digits"]
    )


def test_moments_in_parts_are_those_of_all_at_once_far_from_zero():
    """Against numpy in float64, where sums of squares would have lost every digit: values of 1e8
    that differ by 1.
    """
    features = normal(1000, 5).double() + 1e8
    times = torch.from_numpy(np.random.default_rng(0).integers(0, 4, 1000))
    found = distances.Moments.none(5)
    for rows, counts in zip(features.split(77), times.split(77), strict=True):
        found.add(rows, counts)
    repeated = features.repeat_interleave(times, 0).numpy()
    assert found.count == len(repeated)
    np.testing.assert_allclose(found.covariance, np.cov(repeated, rowvar=False), rtol=0, atol=1e-6)
    np.testing.assert_allclose(found.mean, repeated.mean(0), rtol=1e-14)


def test_copying_against_the_mann_whitney_statistic_of_scipy():
    drawn = torch.randn(60, generator=torch.Generator().manual_seed(0))
    held_out = torch.arange(-20.0, 20.0)
    drawn[:5] = held_out[10]  # ties
    expected = scipy.stats.mannwhitneyu(held_out, drawn).statistic / (60 * 40)
    found = distances.copying(drawn, held_out)
    assert found["copying"] == pytest.approx(expected, abs=1e-6)
    assert (
        found["copies"] == (drawn < held_out[1]).double().mean()
        and found["copies_perfect"] == 2 / 41
    )


@pytest.mark.parametrize(
    ("held_out", "values"), [(19, None), (33, None), (180, None), (33, 40), (180, 12)]
)
def test_a_perfect_generator_gets_the_share_of_copies_that_is_told(held_out, values):
    """Distances of both kinds from one distribution, 2,000 times: of any value, or of so few
    values that most are equal.
    """
    chance = np.random.default_rng(held_out)
    drawing = chance.random if values is None else lambda n: chance.integers(values, size=n) ** 2.0
    found = [
        distances.copying(*map(torch.from_numpy, (drawing(100), drawing(held_out))))
        for _ in range(2000)
    ]
    for key, expected in (("copies", (held_out + 1) // 20 / (held_out + 1)), ("copying", 0.5)):
        numbers = np.array([one[key] for one in found])
        told = found[0][f"{key}_perfect_sd"]
        assert found[0][f"{key}_perfect"] == expected
        assert numbers.mean() == pytest.approx(expected, abs=3.5 * told / math.sqrt(2000))
        # the deviation of 2,000 draws is known to 1.6 % of a normal one, and of this skew one to 4
        if values is None:
            assert numbers.std() == pytest.approx(told, rel=0.12)


def test_with_few_held_out_images_copies_are_not_told():
    found = distances.copying(torch.rand(50), torch.rand(18))
    assert set(found) == {"copying", "copying_perfect", "copying_perfect_sd"}
    # and a little of the 50 drawn
    assert found["copying_perfect_sd"] == pytest.approx(1 / math.sqrt(12 * 18), rel=0.2)


def test_copies_are_seen_where_held_out_images_are_learned_from_too():
    """Nine of 39 held-out images have a twin among the training images, at distance 0 as copies
    are: 2 of 10 at 0 by lot.
    """
    held_out = torch.cat([torch.zeros(9), 1 + torch.rand(30)])
    assert distances.copying(torch.zeros(100), held_out)["copies"] == pytest.approx(0.2)


def test_copies_of_training_images_are_seen(digits):
    """Training images score as copies, unseen ones as expected of a perfect generator."""
    features = extractors.extract(extractors.digits("cpu"), digits.split(256))[
        rng.permutation(0, "test", 0, len(digits))
    ]
    learned = features[:1200]
    unseen = features[1200:1500]
    held_out = features[1500:]
    distance = distances.nearest(held_out, learned)[0]
    copied, which = distances.nearest(learned[:200], learned)
    found = distances.copying(copied, distance)
    assert (found["copying"], found["copies"]) == (1, 1)
    assert torch.equal(which, torch.arange(200))
    honest = distances.copying(distances.nearest(unseen, learned)[0], distance)
    for key in ("copying", "copies"):
        assert abs(honest[key] - honest[f"{key}_perfect"]) < 3 * honest[f"{key}_perfect_sd"]


def test_a_small_folder_shows_what_is_copied(digits, tmp_path):
    """A generator that repeats its training images, and one that draws what was held out, which
    could be no better.
    """
    for k, image in enumerate(digits[:64]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{k:02}.png")
    given = tiny(
        data__source=f"folder(path='{tmp_path}')",
        data__validation_fraction=0.3,
        evaluate__extractor="digits",
        evaluate__num_samples=19,
    )
    images = build.dataset(given)
    learned, held_out = (list(part) for part in build.split(given, images))
    score = experiment_drawing.scorer(given, images, device.start())
    pixels = torch.stack([images[k] for k in range(len(images))])

    def drawing(which):
        return score(lambda seeds, recipe: iter([(seeds, pixels[which][: len(seeds)])]))

    numbers, pictures = drawing(learned)
    drawn = pictures["eval/nearest"][::2]
    nearest = pictures["eval/nearest"][1::2]
    assert (numbers["eval/copying"], numbers["eval/copies"]) == (1, 1) and len(drawn) == len(
        held_out
    ) == 19
    assert torch.equal(drawn, pixels[learned][:19]) and torch.equal(nearest, drawn)
    for key in ("fd_digits", "copying", "copies"):
        assert numbers[f"eval/{key}_perfect_sd"] > 0 and numbers[f"eval/{key}_perfect"] > 0
    assert (
        numbers["eval/protocol"].endswith(f"against 64 images {images.fingerprint[:12]}")
        and not score.notes
    )

    numbers, pictures = drawing(held_out)
    # the nearest of 19 held-out ones ties with itself, by lot half of the time: 1 / 2 of one image
    # in 19
    assert numbers["eval/copying"] == 0.5 and numbers["eval/copies"] == pytest.approx(1 / 38)
    features = extractors.extract(score.extractor, [pixels])
    closest = torch.cdist(features[held_out].double(), features[learned].double()).argmin(1)
    assert torch.equal(pictures["eval/nearest"][1::2], pixels[learned][closest])


def test_a_scorer_says_what_its_numbers_rest_on(digits, tmp_path, monkeypatch):
    """18 held-out images of 60, and room for the features of 20."""
    for k, image in enumerate(digits[:60]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{k:02}.png")
    given = tiny(
        data__source=f"folder(path='{tmp_path}')",
        data__validation_fraction=0.3,
        evaluate__extractor="digits",
    )
    score = experiment_drawing.scorer(given, build.dataset(given), device.start())
    assert score.notes == [
        "eval/copies is not measured: that takes 19 held-out images, and there are 18; raise "
        "data.validation_fraction in a new run"
    ]
    monkeypatch.setattr(evaluation_reference, "MAX_FEATURES", 20)
    images = build.dataset(given)
    score = experiment_drawing.scorer(given, images, device.start())
    assert score.protocol.endswith(
        f"against 60 images {images.fingerprint[:12]}, by 20 of them except for the Frechet "
        "distance"
    )
    assert (
        compatibility.parse_protocol(score.protocol)["images"] == "60"
        and compatibility.parse_protocol(score.protocol)["kept"] == "20"
    )
    pixels = torch.stack([images[k] for k in range(16)])
    numbers, _ = score(lambda seeds, recipe: iter([(seeds, pixels)]))
    features = extractors.extract(score.extractor, [torch.stack([images[k] for k in range(60)])])
    assert numbers["eval/fd_digits"] == pytest.approx(
        distances.frechet(features[:16], features), rel=1e-4
    )
    assert "eval/copying" in numbers and "eval/copies" not in numbers
