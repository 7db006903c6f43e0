"""Scoring against torch-fidelity, scipy and closed forms; the shipped extractor against the table that admitted it."""

import importlib.util
import logging
import random
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
import torch_fidelity
from conftest import tiny
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric

from ddpm import build, dist, metrics, rng
from ddpm.data import open_source

CPU = torch.device("cpu")
RECIPE = Path(__file__).parents[1] / "experiments" / "digits_extractor" / "make.py"


def normal(n, d, seed=0):
    return rng.normal(seed, "test", 0, range(n), (d,))


def with_moments(features, mean, std):
    """Features [n, d] moved to have exactly this sample mean [d] and a diagonal sample covariance std**2."""
    centred = features.double() - features.double().mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(centred.T)), centred.T, upper=False).T
    return (white * torch.tensor(std) + torch.tensor(mean)).float()


class Pictures:
    """A dataset in memory that counts its reads."""

    def __init__(self, images, fingerprint="f00d"):
        self.images, self.fingerprint, self.read = images, fingerprint, []

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
    return metrics.EXTRACTORS["digits"](CPU)


@pytest.fixture(scope="module")
def real(extractor, digits):
    return metrics.extract(extractor, [digits])


# --- numbers ---


def test_frechet_distance_of_known_gaussians():
    first = with_moments(normal(500, 3), [0.0, 1.0, 2.0], [1.0, 2.0, 0.5])
    second = with_moments(normal(700, 3, seed=1), [1.0, 1.0, 0.0], [3.0, 1.0, 0.5])
    expected = (1 + 0 + 4) + ((1 - 3) ** 2 + (2 - 1) ** 2 + 0)  # |difference of means|^2 + sum of (std - std')^2
    assert metrics.frechet(first, second) == pytest.approx(expected, rel=1e-5)  # features are float32
    assert metrics.frechet(first, first) == pytest.approx(0, abs=1e-5)


def test_frechet_distance_agrees_with_scipy(real):
    first, second = real[:900], real[900:] * 1.1
    a, b = first.double().numpy(), second.double().numpy()
    covariances = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(covariances[0] + 1e-9 * np.eye(64)).real  # some features never fire: no root without this
    trace = np.sqrt(np.maximum(scipy.linalg.eigvalsh(root @ covariances[1] @ root), 0)).sum()  # the symmetric form
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * trace
    assert metrics.frechet(first, second) == pytest.approx(expected, rel=1e-4)  # means are summed in float32


def test_compare_gives_torch_fidelitys_own_numbers(extractor, real):
    generated, reference = real[:300] * 1.05, real[200:]
    found = metrics.compare(generated, reference, extractor, seed=3)
    kernel = kid_features_to_metric(generated, reference, kid_subset_size=299, rng_seed=3, verbose=False)
    cover = prc_features_to_metric(generated, reference, verbose=False)  # its other path, all distances at once
    assert list(found) == ["fd_digits", "kd_digits", "precision_digits", "recall_digits"]
    assert found["fd_digits"] == metrics.frechet(generated, reference)
    assert found["kd_digits"] == kernel["kernel_inception_distance_mean"]
    assert (found["precision_digits"], found["recall_digits"]) == (cover["precision"], cover["recall"])
    assert found == metrics.compare(generated, reference, extractor, seed=3)


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
    first, second = digits[:200], digits[200:600]
    colour = [list(images.expand(-1, 3, -1, -1).contiguous()) for images in (first, second)]  # it insists on RGB
    theirs = torch_fidelity.calculate_metrics(
        input1=ListOfImages(colour[0]), input2=ListOfImages(colour[1]), feature_extractor="digits-under-test", fid=True,
        kid=True, prc=True, kid_subset_size=199, rng_seed=0, cuda=False, cache=False, save_cpu_ram=True, verbose=False,
    )
    ours = metrics.compare(metrics.extract(extractor, [first]), metrics.extract(extractor, [second]), extractor, seed=0)
    # batches of other sizes, and grey as the mean of three channels: rounding of 1e-7 in each feature
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
        numbers = metrics.compare(normal(n, 64), normal(n, 64, seed=1), extractor)
        moved = metrics.compare(normal(n, 64) + 0.5, normal(n, 64, seed=1), extractor)
        # five times below what a shift of half a standard deviation gives, though 50 samples are few
        assert abs(numbers["kd_digits"]) < moved["kd_digits"] / 5
    assert numbers["fd_digits"] > 1  # which the Frechet distance is not: 2 (d + d (d + 1) / 4) / n = 1.5 here


def test_precision_and_recall_see_a_missing_mode(extractor):
    reference = torch.cat([normal(100, 64), normal(100, 64, seed=1) + 100])
    half = metrics.compare(normal(100, 64), reference, extractor)
    assert (half["precision_digits"], half["recall_digits"]) == (1, 0.5)  # the drawn images are those of one mode


def test_floor_of_a_gaussian_and_its_fall_with_the_count(extractor, real):
    # Wishart: E|mean - mu|^2 = d / n, and (sqrt(l) - 1)^2 = (l - 1)^2 / 4 over eigenvalues gives d (d + 1) / (4 n).
    # Its spread is about 10 % of it, the next order and the finite reference (20,000) another few.
    d, n = 16, 2000
    expected = d / n + d * (d + 1) / (4 * n)
    found = metrics.floor(normal(20_000, d), n, extractor)
    assert found == {"fd_digits_floor": pytest.approx(expected, rel=0.35)}
    floors = [metrics.floor(real, n, extractor)["fd_digits_floor"] for n in (250, 500, 1000, 1797)]
    assert floors == sorted(floors, reverse=True) and floors[-1] > 0


def test_too_few_images_is_one_line(extractor, real):
    for measure in (lambda: metrics.compare(real[:3], real, extractor), lambda: metrics.floor(real, 3, extractor)):
        with pytest.raises(ValueError, match="^3 images are too few to compare; measure at least 4[^\n]*$"):
            measure()
    assert all(np.isfinite(list(metrics.compare(real[:4], real, extractor).values())))


# --- the shipped extractor ---


def test_the_shipped_extractor_tells_apart_what_it_must(extractor, digits):
    spec = importlib.util.spec_from_file_location("recipe", RECIPE)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    labels = torch.tensor(open_source("digits", 16, 1, (0, 0, 0)).labels)
    with torch.random.fork_rng():
        table = recipe.measure(extractor, digits, labels)
    times_floor = {row: value / table["half against half"] for row, value in table.items()}
    # In floors, so that the scale has no say. The figures are those that the recipe had to reach to be accepted at all.
    for row, least in {
        "noise 10/255": 3.9, "noise 20/255": 14.7, "noise 40/255": 66, "blur 1 px": 5.9, "blur 2 px": 34,
        "uniform noise": 817, "one class missing, mean": 14.7,
    }.items():
        assert times_floor[row] > least, (row, times_floor[row])
    assert table["noise 10/255"] < table["noise 20/255"] < table["noise 40/255"] < table["uniform noise"]
    assert table["blur 1 px"] < table["blur 2 px"] < table["uniform noise"]
    assert table["perfect generator, 1797"] < table["perfect generator, 1000"] < table["perfect generator, 500"]
    assert table["perfect generator, 500"] < table["noise 10/255"]  # even a small evaluation sees that much noise


def test_the_shipped_file_is_small_and_named_by_its_hash(extractor, tmp_path):
    assert extractor.name == metrics.DIGITS.stem and metrics.DIGITS.stat().st_size < 100_000
    damaged = tmp_path / metrics.DIGITS.name
    damaged.write_bytes(metrics.DIGITS.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged .*; install ddpm again$"):
        metrics.digits_extractor(damaged, CPU)


def test_features_do_not_depend_on_company(extractor, digits, real):
    """Two ranks with uneven shards, and one image alone, give the rows of one batch; batch statistics would not."""
    alone = torch.cat([extractor(digits[i:i + 1]) for i in range(5)])
    shards = metrics.extract(extractor, [*digits[:1000].split(37), *digits[1000:].split(64)])
    # float32 sums over 512 numbers in another order: a few units in the last place of values near 1
    torch.testing.assert_close(alone, real[:5], rtol=0, atol=2e-5)
    torch.testing.assert_close(shards, real, rtol=0, atol=2e-5)
    assert metrics.frechet(shards, real[:700]) == pytest.approx(metrics.frechet(real, real[:700]), rel=1e-3)
    assert metrics.extract(extractor, []).shape == (0, 64)


def test_features_are_float32_on_the_cpu_and_colour_and_alpha_are_understood(extractor, digits, real):
    assert (real.shape, real.dtype, real.device) == ((1797, 64), torch.float32, CPU)
    assert not real.requires_grad
    grey = digits[:8]
    clear = torch.full_like(grey, 255)
    for images in (grey.expand(-1, 3, -1, -1), torch.cat([grey, clear], 1), torch.cat([grey, grey, grey, clear], 1)):
        torch.testing.assert_close(extractor(images), real[:8], rtol=0, atol=2e-5)
    nothing = torch.cat([grey, torch.zeros_like(grey)], 1)
    torch.testing.assert_close(extractor(nothing), extractor(clear), rtol=0, atol=0)  # transparent is white


def test_scoring_disturbs_no_generator(digits, inception_file, tmp_path):
    def states():
        return torch.random.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = states()
    metrics.EXTRACTORS["inception"](CPU, inception_file)
    extractor = metrics.EXTRACTORS["digits"](CPU, "")
    real = metrics.reference(extractor, Pictures(digits[:50]), tmp_path)
    metrics.compare(real[:20], real, extractor)
    metrics.floor(real, 20, extractor)
    assert states() == before


def test_autocast_and_gradients_outside_do_not_reach_in(extractor, digits, real):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = extractor(digits[:64])
    assert torch.equal(inside, real[:64])


# --- Inception ---


def test_inception_goes_through_torch_fidelitys_own_network(inception_file):
    extractor = metrics.EXTRACTORS["inception"](CPU, str(inception_file))
    theirs = FeatureExtractorInceptionV3("theirs", ["2048"], inception_file)
    colour = rng.uniform(0, "pixels", 0, range(3 * 3 * 16 * 12)).mul(256).to(torch.uint8).reshape(3, 3, 16, 12)
    grey = colour[:1, :1]
    with torch.no_grad():
        expected = theirs(torch.cat([colour, grey.expand(-1, 3, -1, -1)]))[0]
    found = metrics.extract(extractor, [colour, grey])
    # the same kernels on batches of another size: rounding
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert extractor.metric_names == ("fid", "kid", "precision", "recall")
    assert extractor.name.startswith("inception-") and extractor.name != "inception-v3-compat"  # not the published ones


def test_extractors_take_the_operations_that_budgets_count(inception_file):
    for name, count in metrics.OPERATIONS.items():
        for size in (16, 40):
            with FlopCounterMode(display=False) as counter:
                metrics.EXTRACTORS[name](CPU, str(inception_file))(torch.zeros(1, 3, size, size, dtype=torch.uint8))
            assert counter.get_total_flops() == count
    assert set(metrics.OPERATIONS) == set(metrics.EXTRACTORS)


def test_no_inception_weights_and_no_network_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there, wherever the test runs
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    patience, start = socket.getdefaulttimeout(), time.monotonic()
    with pytest.raises(ValueError) as error:
        metrics.EXTRACTORS["inception"](CPU, "")
    line = str(error.value)
    assert "\n" not in line and metrics.INCEPTION in line and "--config.evaluate.inception_weights=PATH" in line
    assert str(tmp_path / "hub" / "checkpoints") in line
    assert time.monotonic() - start < 20 and socket.getdefaulttimeout() == patience
    assert not list(tmp_path.rglob("*.pth*")), "half a download was left"


def test_weights_that_are_not_what_they_say_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub" / "checkpoints" / metrics.INCEPTION
    cached.parent.mkdir(parents=True)
    cached.write_bytes(b"half a download")
    with pytest.raises(ValueError, match="is damaged .*delete it to download it again$"):
        metrics.EXTRACTORS["inception"](CPU, "")
    with pytest.raises(ValueError, match="^cannot read the extractor's weights .*No such file.*; leave it empty"):
        metrics.EXTRACTORS["inception"](CPU, tmp_path / "nowhere.pth")
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, other)
    with pytest.raises(ValueError, match="^[^\n]*holds no Inception weights[^\n]*$"):
        metrics.EXTRACTORS["inception"](CPU, other)


class Trap:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_weights_file_runs_no_code(tmp_path):
    torch.save(Trap(tmp_path / "sprung"), tmp_path / "trap.pth")
    with pytest.raises(ValueError, match="holds no Inception weights"):
        metrics.EXTRACTORS["inception"](CPU, tmp_path / "trap.pth")
    assert not (tmp_path / "sprung").exists()


# --- the reference and its cache ---


def test_the_reference_is_computed_once_for_each_content(extractor, digits, real, tmp_path, monkeypatch):
    monkeypatch.setenv("DDPM_CACHE", str(tmp_path / "cache"))
    first = Pictures(digits[:100])
    features = metrics.reference(extractor, first, batch_size=30)
    assert first.read and sorted(first.read) == list(range(100))
    torch.testing.assert_close(features, real[:100], rtol=0, atol=2e-5)  # batches of another size: rounding
    again, changed = Pictures(digits[:100]), Pictures(digits[100:200], fingerprint="beef")
    assert torch.equal(metrics.reference(extractor, again), features) and not again.read
    assert not torch.equal(metrics.reference(extractor, changed), features) and len(changed.read) == 100
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == [
        f"{fingerprint}-{extractor.name}.safetensors" for fingerprint in ("beef", "f00d")
    ]


@pytest.mark.parametrize("harm", [lambda content: content[:-5], lambda content: b"", lambda content: b"x" * 99])
def test_a_torn_cache_is_computed_again(extractor, digits, tmp_path, caplog, harm):
    features = metrics.reference(extractor, Pictures(digits[:20]), tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(harm(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert torch.equal(metrics.reference(extractor, Pictures(digits[:20]), tmp_path), features)
    assert "cannot be read" in caplog.text
    mended = Pictures(digits[:20])
    assert torch.equal(metrics.reference(extractor, mended, tmp_path), features) and not mended.read


def test_a_cache_that_cannot_be_written_is_done_without(extractor, digits, tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    features = metrics.reference(extractor, Pictures(digits[:20]), tmp_path / "file" / "cache")
    assert len(features) == 20 and "cannot be kept" in caplog.text


def test_a_large_reference_is_thinned_evenly(extractor, digits, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(metrics, "MOST", 10)
    pictures = Pictures(digits[:25])
    assert len(metrics.reference(extractor, pictures, tmp_path)) == 10
    assert sorted(pictures.read) == [0, 2, 5, 7, 10, 12, 15, 17, 20, 22]  # a folder sorted by class keeps all classes
    assert "10 of 25 images stand for the reference" in caplog.text


def test_copying_against_the_mann_whitney_statistic_of_scipy():
    drawn, held_out = torch.randn(60, generator=torch.Generator().manual_seed(0)), torch.arange(-20.0, 20.0)
    drawn[:5] = held_out[10]  # ties
    expected = scipy.stats.mannwhitneyu(held_out, drawn).statistic / (60 * 40)
    found = metrics.copying(drawn, held_out)
    assert found["copying"] == pytest.approx(expected, abs=1e-6)
    assert found["copies"] == (drawn < np.quantile(held_out, 0.05)).float().mean()


def test_copies_of_training_images_are_seen(digits):
    """Training images score as copies, unseen ones as expected of a perfect generator."""
    features = metrics.extract(metrics.digits("cpu"), digits.split(256))[rng.permutation(0, "test", 0, len(digits))]
    learned, unseen, held_out = features[:1200], features[1200:1500], features[1500:]
    distance = metrics.nearest(held_out, learned)[0]
    copied, which = metrics.nearest(learned[:200], learned)
    assert metrics.copying(copied, distance) == {"copying": 1.0, "copies": 1.0}
    assert torch.equal(which, torch.arange(200))
    honest = metrics.copying(metrics.nearest(unseen, learned)[0], distance)
    # three standard errors of each, at 300 against 297 images: 0.5 +- 3 * 0.024 and 0.05 +- 3 * 0.018
    assert abs(honest["copying"] - 0.5) < 0.072 and honest["copies"] < 0.104


def test_a_small_folder_shows_what_is_copied(digits, tmp_path):
    """A generator that repeats its training images, and one that draws what was held out, which could be no better."""
    for k, image in enumerate(digits[:60]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{k:02}.png")
    given = tiny(data__source=f"folder(path='{tmp_path}')", data__validation_fraction=0.3, evaluate__extractor="digits",
                 evaluate__num_samples=18)
    images = build.dataset(given)
    learned, held_out = (list(part) for part in build.split(given, images))
    score = build.scorer(given, images, dist.start())
    pixels = torch.stack([images[k] for k in range(len(images))])

    def drawing(which):
        return score(lambda seeds, recipe: iter([(seeds, pixels[which][:len(seeds)])]))

    numbers, pictures = drawing(learned)
    drawn, nearest = pictures["eval/nearest"][::2], pictures["eval/nearest"][1::2]
    assert (numbers["eval/copying"], numbers["eval/copies"]) == (1, 1) and len(drawn) == 18
    assert torch.equal(drawn, pixels[learned][:18]) and torch.equal(nearest, drawn)

    numbers, pictures = drawing(held_out)
    assert numbers["eval/copying"] == 0.5 and numbers["eval/copies"] == pytest.approx(1 / 18)  # the very nearest; float32
    features = metrics.extract(score.extractor, [pixels])
    closest = torch.cdist(features[held_out].double(), features[learned].double()).argmin(1)
    assert torch.equal(pictures["eval/nearest"][1::2], pixels[learned][closest])
