"""Durations, rhythms against a naive count, and clocks that are set by hand."""

from fractions import Fraction

import pytest

from ddpm.common.durations import Every, parse_duration, steps_of
from ddpm.training.meters import WARM_UP, Speed, Stopwatch


class Hand:
    """A clock that stands still until it is moved; whole seconds, so that sums are exact."""

    def __init__(self):
        self.time = 1000.0

    def __call__(self):
        return self.time

    def move(self, seconds):
        self.time += seconds


@pytest.mark.parametrize(
    "text, amount, unit",
    [
        ("500 epochs", 500, "epoch"),
        ("1 epoch", 1, "epoch"),
        ("20000 steps", 20_000, "step"),
        ("1 image", 1, "image"),
        ("3e6 images", 3_000_000, "image"),
        ("2.5e3 steps", 2500, "step"),
        ("0.1 epochs", Fraction(1, 10), "epoch"),
        ("10 minutes", 10, "minute"),
        ("1 hour", 1, "hour"),
        ("30 seconds", 30, "second"),
        ("  7  steps ", 7, "step"),
        ("7steps", 7, "step"),
        ("0 steps", 0, "step"),
    ],
)
def test_parse_duration(text, amount, unit):
    assert parse_duration(text) == (amount, unit)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "500",
        "steps",
        "500 stepss",
        "500 parsecs",
        "500 s",
        "-5 steps",
        "+5 steps",
        ".5 epochs",
        "5. steps",
        "five steps",
        "1e steps",
        "1e-3 epochs",
        "1,000 steps",
        "1_000 steps",
        "nan steps",
        "inf steps",
        "1e999999999 steps",
        "5 Steps",
        "5 steps 6",
        "5 steps, 6 steps",
        "5 steps\n6 steps",
        500,
        None,
    ],
)
def test_other_texts_are_refused_with_the_units(text):
    with pytest.raises(ValueError) as caught:
        parse_duration(text)
    assert str(caught.value) == (
        f"cannot read the duration {text!r}; write a number and one of steps, epochs, images, "
        "seconds, minutes, hours, such as '500 steps'"
    )


def test_a_length_has_no_minutes_and_says_why():
    for text in ("10 minutes", "1 hour", "90 seconds"):
        with pytest.raises(ValueError) as caught:
            steps_of(text, 8, 100)
        assert str(caught.value) == (
            f"cannot read the duration {text!r}; write a number and one of steps, epochs, images, "
            "such as '500 steps' (a length in minutes could not be repeated)"
        )
    with pytest.raises(ValueError, match="steps, epochs, images, such as '500 steps'$"):
        parse_duration("10 parsecs", times=False)


@pytest.mark.parametrize(
    "text, batch_size, dataset_size, steps",
    [
        ("7 steps", 64, 1797, 7),
        ("1 epoch", 64, 1797, 29),  # 28.08 steps: the last one begins the next epoch
        ("3 epochs", 64, 1797, 85),  # 84.2, not three times 29
        ("1 epoch", 10, 100, 10),
        ("640 images", 64, 1797, 10),
        ("641 images", 64, 1797, 11),
        ("0.5 epochs", 10, 100, 5),
        ("0.5 steps", 10, 100, 1),
        ("0 epochs", 10, 100, 0),
        ("1.1 epochs", 1, 10, 11),  # in floats, 1.1 x 10 is a little more than 11
        ("0.07 epochs", 1, 100, 7),  # and 0.07 x 100 than 7
        ("1e30 images", 1, 10, 10**30),
    ],
)
def test_steps_of(text, batch_size, dataset_size, steps):
    assert steps_of(text, batch_size, dataset_size) == steps
    assert isinstance(steps_of(text, batch_size, dataset_size), int)


def naive(images, batch_size, steps):
    """The steps at whose end another multiple of `images`, a Fraction, has been reached: counted
    image by image.
    """
    due = []
    following = images
    for step in range(1, steps + 1):
        if step * batch_size >= following:
            due.append(step)
            while following <= step * batch_size:
                following += images
    return due


@pytest.mark.parametrize("batch_size, dataset_size", [(1, 10), (64, 1797), (7, 5), (8, 8)])
@pytest.mark.parametrize(
    "text",
    [
        "1 step",
        "3 steps",
        "2.5 steps",
        "0.5 steps",
        "1 epoch",
        "0.1 epochs",
        "1.1 epochs",
        "2.7 epochs",
        "1 image",
        "100 images",
        "1000 images",
    ],
)
def test_a_counted_rhythm_is_that_of_a_naive_count(text, batch_size, dataset_size):
    number, unit = text.split()
    images = (
        Fraction(number) * {"step": batch_size, "epoch": dataset_size, "image": 1}[unit.rstrip("s")]
    )
    every = Every(text, batch_size, dataset_size)
    due = [step for step in range(1, 301) if every.due(step)]
    assert due == naive(images, batch_size, 300)
    assert not every.never


def test_a_resumed_rhythm_is_the_same():
    whole = Every("0.3 epochs, 7 steps", 64, 1797)
    due = [step for step in range(1, 101) if whole.due(step)]
    for start in (1, 36, 50, 99):
        resumed = Every("0.3 epochs, 7 steps", 64, 1797)
        assert [step for step in range(start, 101) if resumed.due(step)] == [
            step for step in due if step >= start
        ]


def test_a_timed_interval():
    now = Hand()
    every = Every("1 minute", 8, 100, now=now)
    assert not every.due(1)
    now.move(59)
    assert not every.due(2)
    now.move(1)
    assert every.due(3) and not every.due(4)
    now.move(200)  # late by more than two minutes: due once, and again a minute from now
    assert every.due(5) and not every.due(6)
    now.move(60)
    assert every.due(7)


@pytest.mark.parametrize(
    "text, seconds", [("90 seconds", 90), ("1.5 minutes", 90), ("0.5 hours", 1800)]
)
def test_units_of_time(text, seconds):
    now = Hand()
    every = Every(text, 8, 100, now=now)
    now.move(seconds - 1)
    assert not every.due(1)
    now.move(1)
    assert every.due(2)


def test_joined_intervals_are_due_with_any_of_them_and_share_a_clock():
    now = Hand()
    every = Every("10 steps, 1 minute", 8, 100, now=now)
    due = []
    for step in range(1, 31):
        now.move(8)  # 7.5 steps a minute: the eighth step is the first after a minute
        if every.due(step):
            due.append(step)
    # time begins again at each: 8 by time, 10 by count, 18 by time, 20 by count, 28 by time, 30 by
    # count
    assert due == [8, 10, 18, 20, 28, 30]


@pytest.mark.parametrize(
    "text", ["0 steps", "0 epochs", "0 minutes", "0.0 images", "0 steps, 0 minutes"]
)
def test_zero_means_never(text):
    now = Hand()
    every = Every(text, 8, 100, now=now)
    now.move(1e9)
    assert every.never and not any(every.due(step) for step in range(1, 100))


def test_zero_beside_another_interval_says_nothing():
    every = Every("0 minutes, 4 steps", 8, 100)
    assert not every.never and [step for step in range(1, 10) if every.due(step)] == [4, 8]


@pytest.mark.parametrize("text", ["", "never", "10 steps,", "10 steps; 5 minutes", "1,000 steps"])
def test_an_interval_that_cannot_be_read(text):
    with pytest.raises(
        ValueError, match="^cannot read the duration .*minutes.*such as '500 steps'$"
    ):
        Every(text, 8, 100)


def test_a_stopwatch_leaves_out_its_pauses():
    now = Hand()
    watch = Stopwatch(now)
    now.move(3)
    with watch.pause():
        now.move(100)
    now.move(4)
    assert watch.lap() == 7
    now.move(5)
    assert watch.lap() == 5 and watch.lap() == 0


def test_speed_counts_whole_steps_without_the_pauses():
    """8 images a step; 1 s of waiting and 3 s of work each, 50 s at first; read at some steps and
    paused after each one.

    The device is 20 s behind when the warm-up ends. Half a second of the work waits for noise.
    """
    now = Hand()
    waits = []
    speed = Speed(
        batch_size=8,
        dataset_size=80,
        flops_per_image=5e12,
        peak=4e13,
        wait=lambda: now.move(20),
        noise_seconds=lambda: sum(waits),
        now=now,
    )
    now.move(500)  # opening a tracker, say

    def slow():
        for batch in range(1, WARM_UP + 7):
            now.move(1)
            yield batch

    readings = {}
    for done in speed.timed(slow()):
        now.move(3 if done > WARM_UP else 50)
        waits.append(0.5 if done > WARM_UP else 40)
        if done in (1, *(WARM_UP + k for k in (2, 5, 6))):
            readings[done] = speed.read(done)
        with speed.pause():
            now.move(1000)
    assert readings.pop(1) == {
        "progress/epoch": 0.1,
        "progress/images": 8,
        "progress/petaflop": 0.04,
    }
    for done, reading in readings.items():
        assert reading == {
            "speed/images_per_second": 2.0,
            "speed/step_ms": 4000.0,
            "speed/loader_wait": 0.25,
            "speed/noise_wait": 0.125,
            "progress/epoch": done / 10,
            "progress/images": 8 * done,
            "progress/epoch_seconds": 40.0,
            "progress/petaflop": done / 25,
            "speed/mfu": 0.25,
        }  # 10 of 40 TFLOP/s


def test_speed_gives_the_batches_on_and_ends_with_them():
    speed = Speed(8, 80)
    assert list(speed.timed([1, 2, 3])) == [1, 2, 3] and list(speed.timed([])) == []


def test_speed_of_a_resumed_run_counts_its_own_steps():
    now = Hand()
    speed = Speed(4, 80, now=now)
    for done, _ in enumerate(speed.timed(range(WARM_UP + 3)), 103 - WARM_UP - 2):
        now.move(2)
        reading = speed.read(done) if done == 103 else None
    assert reading["speed/images_per_second"] == 2.0 and reading["progress/images"] == 412
