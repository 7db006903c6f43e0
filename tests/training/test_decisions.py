"""Ranks decide together, most steps without an exchange: on two threads that exchange as ranks do."""

import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from ddpm.common.durations import Every
from ddpm.runtime.device import Machine
from ddpm.training.trainer import EXCHANGE_STEPS, Decisions

STEPS = 100
ASKED = 33  # the step during which rank 1 is requested to stop


@dataclass(frozen=True, eq=False)
class Rank(Machine):
    """One of two ranks: `shared` holds what each of them gives."""

    shared: dict = field(default_factory=dict)
    barrier: threading.Barrier = None
    exchanged: list = field(default_factory=list)

    def all_gather(self, value, leaving=False):
        self.exchanged.append(value)
        self.shared[self.rank] = value
        self.barrier.wait(10)
        values = [self.shared[rank] for rank in range(2)]
        self.barrier.wait(10)
        return values


def course(rank, clock):
    """What a rank decides after each of its steps; it waits for the other one only to exchange."""

    def every(text):
        return Every(text, batch_size=1, dataset_size=50, now=lambda: clock[0])

    intervals = {"log": every("7 steps"), "save": every("10 minutes"), "sample": every("0 steps")}
    decide = Decisions(
        SimpleNamespace(machine=rank, every=intervals, quiet=False, start=0, total=STEPS)
    )
    for done in range(1, STEPS + 1):
        if rank.rank == 1 and done == ASKED:
            rank.stop.signal = signal.SIGTERM
        clock[0] += 14 if rank.rank == 0 else 100  # seconds of a step, by their own clocks
        yield decide(done)


@pytest.fixture(scope="module")
def ranks():
    shared = dict(shared={}, barrier=threading.Barrier(2))
    machines = [Rank(torch.device("cpu"), torch.float32, n, 2, **shared) for n in range(2)]
    with ThreadPoolExecutor(2) as pool:
        return machines, list(pool.map(lambda rank: list(course(rank, [0.0])), machines))


def test_all_ranks_decide_the_same_after_each_step(ranks):
    _, (first, second) = ranks
    assert first == second and len(first) == STEPS


def test_counted_events_come_at_their_steps_and_timed_ones_soon_after_by_rank_0s_clock(ranks):
    _, (decisions, _) = ranks
    due = [events for events, _, _ in decisions]
    assert [done for done, names in enumerate(due, 1) if "log" in names] == [*range(7, STEPS, 7)]
    # 10 minutes are 43 steps of 14 seconds
    saved = [done for done, names in enumerate(due, 1) if "save" in names]
    assert len(saved) == 2 and 43 <= saved[0] < 43 + EXCHANGE_STEPS


def test_a_request_to_one_rank_stops_all_after_the_same_step(ranks):
    _, (decisions, _) = ranks
    stops = [done for done, (_, _, requested) in enumerate(decisions, 1) if requested]
    assert ASKED <= stops[0] < ASKED + EXCHANGE_STEPS


def test_most_steps_exchange_nothing(ranks):
    (first, second), _ = ranks
    assert len(first.exchanged) == len(second.exchanged) < STEPS / 3
