"""Randomness by address: numpy's Philox at a key and a counter, nothing advanced, nothing
shared.
"""

import math
import zlib

import numpy as np
import pytest
import torch

from ddpm.common import rng

LARGEST = 2**63 - 1  # the largest seed that a config takes


def philox(seed, purpose, step, index):
    """numpy's own generator at the documented key (seed, purpose) and counter (0, index, step,
    0), as two long integers.
    """
    key = seed | zlib.crc32(purpose.encode()) << 64
    counter = index << 64 | step << 128
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@pytest.mark.parametrize("seed", [0, 1, 2**32, LARGEST])
@pytest.mark.parametrize("step, index", [(0, 0), (3, 0), (0, 3), (800_000, 127), (2**40, 2**40)])
def test_the_numbers_are_numpys_at_that_address(seed, step, index):
    def there():
        return philox(seed, "noise", step, index)

    assert rng.generator(seed, "noise", step, index).random() == there().random()
    assert rng.uniform(seed, "noise", step, [index]).item() == there().random()
    expected = torch.from_numpy(there().standard_normal((2, 3), dtype=np.float32))
    assert torch.equal(rng.normal(seed, "noise", step, [index], (2, 3))[0], expected)
    assert np.array_equal(
        rng.permutation(seed, "noise", step, 10), philox(seed, "noise", step, 0).permutation(10)
    )


def test_the_numbers_are_for_good():
    """As drawn with numpy 2.4: a run of today and one of next year, on another machine, start
    from the same noise.
    """
    assert rng.uniform(7, "times", 3, [5]).item() == float.fromhex("0x1.1561b4e0f55fcp-2")
    assert rng.permutation(7, "order", 3, 8).tolist() == [5, 6, 1, 4, 2, 7, 0, 3]
    # through a logarithm or two, which libraries of mathematics may round differently: one unit in
    # the last place
    assert rng.normal(7, "noise", 3, [5], (2,))[0].tolist() == pytest.approx(
        [2.301931142807007, 0.48937028646469116], rel=2e-7
    )


def test_one_alone_is_the_one_in_a_batch_bitwise():
    batch = rng.normal(1, "noise", 9, range(8), (3, 4, 4))
    assert batch.dtype == torch.float32 and batch.shape == (8, 3, 4, 4)
    assert torch.equal(rng.normal(1, "noise", 9, [5], (3, 4, 4))[0], batch[5])
    assert torch.equal(rng.normal(1, "noise", 9, [6, 2], (3, 4, 4)), batch[[6, 2]])
    times = rng.uniform(1, "time", 9, range(8))
    assert times.dtype == torch.float64 and torch.equal(rng.uniform(1, "time", 9, [5]), times[[5]])


def test_nothing_is_advanced():
    state = torch.get_rng_state()
    numpy_state = np.random.get_state()[1].copy()
    assert torch.equal(rng.normal(0, "noise", 0, [0], (4,)), rng.normal(0, "noise", 0, [0], (4,)))
    rng.uniform(0, "time", 0, [0]), rng.permutation(0, "order", 0, 5)
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(
        np.random.get_state()[1], numpy_state
    )


def test_an_empty_batch():
    assert rng.normal(0, "noise", 0, [], (3, 4)).shape == (0, 3, 4) and rng.uniform(
        0, "time", 0, []
    ).shape == (0,)


def test_other_addresses_are_other_streams():
    """64 draws at each of 6 x 3 x 3 x 3 addresses: no number occurs twice, in whatever place (by
    chance once in 1e8 cases: 1e4^2 / 2 pairs of 2^53 numbers).
    """
    drawn = np.concatenate(
        [
            rng.generator(seed, purpose, step, index).random(64)
            for seed in (0, 1, 2, 2**32, 2**62, LARGEST)
            for purpose in ("train noise", "train time", "sample")
            for step in (0, 1, 2**32)
            for index in (0, 1, 2**32)
        ]
    )
    assert len(np.unique(drawn)) == len(drawn)


def test_neighbours_are_not_correlated():
    """The correlation of n independent pairs has a standard error of 1/sqrt(n); 5 of them."""

    def drawn(seed, purpose, step):
        return rng.normal(seed, purpose, step, range(64), (1000,)).double()

    noise = drawn(0, "noise", 0)
    for other in (
        noise.roll(1, 0),
        drawn(0, "noise", 1),
        drawn(1, "noise", 0),
        drawn(0, "time", 0),
    ):
        assert abs((noise * other).mean().item()) < 5 / math.sqrt(noise.numel())


def test_moments_of_normal():
    """Mean 0, variance 1, third and fourth moments 0 and 3: variances 1, 2, 15, 96 a number; 5
    standard errors.
    """
    x = rng.normal(3, "noise", 0, range(100), (2000,)).double()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((x**power).mean().item() - moment) < 5 * math.sqrt(variance / x.numel()), power


def test_moments_of_uniform():
    """Mean 1/2 and variance 1/12, whose own variance a number is 1/180; 5 standard errors. All
    in [0, 1).
    """
    u = rng.uniform(3, "time", 0, range(20_000))
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean().item() - 1 / 2) < 5 * math.sqrt(1 / 12 / len(u))
    assert abs((u - 1 / 2).square().mean().item() - 1 / 12) < 5 * math.sqrt(1 / 180 / len(u))


@pytest.mark.parametrize("n", [0, 1, 2, 1797])
def test_a_permutation_has_everything_once(n):
    order = rng.permutation(0, "order", 4, n)
    assert order.dtype == np.int64 and np.array_equal(np.sort(order), np.arange(n))
    assert np.array_equal(order, rng.permutation(0, "order", 4, n))


def test_permutations_are_even():
    """Where item 0 lands over 4,000 steps: chi-squared with 4 degrees of freedom is above 25 in
    5 of 100,000 cases.
    """
    places = np.bincount(
        [int(np.argmin(rng.permutation(0, "order", step, 5))) for step in range(4000)], minlength=5
    )
    assert ((places - 800) ** 2 / 800).sum() < 25


def mask(*address):
    rng.reseed_torch(*address)
    return torch.nn.functional.dropout(torch.ones(500), 0.5, training=True)


def test_dropout_repeats_at_its_address():
    first = mask(0, 5, 1, 2)
    torch.rand(100)
    assert torch.equal(mask(0, 5, 1, 2), first)
    assert torch.equal(mask(LARGEST, 5, 1, 2), mask(LARGEST, 5, 1, 2))


def test_dropout_differs_between_addresses():
    """Seed, step, rank and micro-batch each count, also where one could be read as another: a
    shorter address, or a seed that fills two 32-bit words.
    """
    addresses = [
        (0,),
        (0, 0),
        (0, 0, 0, 0),
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (0, 0, 0, 1),
        (2**32, 0, 0, 0),
        (0, 1),
        (2**32,),
        (1,),
        (LARGEST, 0, 0, 0),
        (LARGEST,),
    ]
    masks = {mask(*address).numpy().tobytes() for address in addresses}
    assert len(masks) == len(addresses)
