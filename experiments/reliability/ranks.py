"""Ranks are killed, and come and go: torchrun's own agent starts the training again, and it goes
on.
"""

import json
import os
import signal
import threading
import time

import numpy as np
import pytest
from faults import Found, differences, forked, small, training
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from support.runs import rows

WORLD = 2  # ranks, where they do not come and go


def agent(work, ranks=WORLD, nodes=(1, 1), endpoint="localhost:0", restarts=100, **options):
    """`work` for `forked`: what torchrun does on a node, with ranks that are forked; a node that
    it waits for has a second.
    """
    how = LaunchConfig(
        *nodes,
        ranks,
        run_id="ddpm",
        rdzv_backend="c10d",
        rdzv_endpoint=endpoint,
        max_restarts=restarts,
        monitor_interval=0.05,
        rdzv_configs={"last_call_timeout": 1},
        start_method="fork",
        **options,
    )

    def run():
        if any(elastic_launch(how, work)().values()):
            raise AssertionError("a rank ended with another code than 0")

    return run


def killed_at(moments, folder):
    """What a rank does: train; but at start k, if it is the rank of moments[k], (rank, seconds),
    it dies after so long.
    """

    def work():
        start, rank = (int(os.environ[key]) for key in ("TORCHELASTIC_RESTART_COUNT", "RANK"))
        if start < len(moments) and moments[start][0] == rank:
            threading.Thread(
                target=dead_after, args=(moments[start][1], folder / "kills"), daemon=True
            ).start()
        return training(small(), folder / "run")()

    return work


def dead_after(seconds, kills):
    time.sleep(seconds)
    with open(kills, "a") as file:
        file.write("x")
    os.kill(os.getpid(), signal.SIGKILL)


def rank_killed(folder, times, seed):
    """Kills of a rank that is drawn, at moments that are drawn from the seconds that a training
    takes.
    """
    rng = np.random.default_rng(seed)
    done = 0
    lost = []
    begun = time.monotonic()
    assert forked(agent(killed_at([], folder)), folder / "log", limit=600) == 0
    takes = time.monotonic() - begun
    (folder / "run").rename(folder / "whole")
    while done < times and not lost:
        one = folder / f"killed {done}"
        moments = [
            (int(rng.integers(WORLD)), rng.uniform(0, 0.7 * takes))
            for _ in range(min(times - done, 5))
        ]
        code = forked(agent(killed_at(moments, one)), folder / "log", limit=600)
        lost += (
            [f"{one.name}: exit code {code}"]
            if code
            else differences(folder / "whole", one / "run")
        )
        done += len((one / "kills").read_text()) if (one / "kills").exists() else 0
    return Found(done, lost, f"{takes:.1f} s a training of {WORLD} ranks")


def other_worlds(folder, times, seed):
    """A training goes on from each of its checkpoints on a number of ranks that is drawn."""
    rng = np.random.default_rng(seed)
    lost = []
    worlds = []
    every = dict(every__validate="0 steps", every__sample="0 steps", every__save="1000 steps")
    assert forked(training(small(**every), folder / "whole"), folder / "log", limit=600) == 0
    stops = np.linspace(0, 30, times + 2)[1:].astype(int)
    for stop in stops:
        worlds.append(
            int(rng.choice([world for world in (1, 2, 4) if world != (worlds or [0])[-1]]))
        )
        work = training(small(**every | dict(train__length=f"{stop} steps")), folder / "run")
        code = forked(agent(work, worlds[-1], restarts=0), folder / "log", limit=600)
        lost += [f"exit code {code} on {worlds[-1]} ranks"] if code else []
    ours, theirs = ({row["step"]: row for row in rows(folder / run)} for run in ("whole", "run"))
    for step, row in ours.items():  # sums in another order
        if step in stops:  # where the training stopped, a window of the log was cut
            continue
        loss = theirs.get(step, {}).get("train/loss")
        if loss is None or loss != pytest.approx(row["train/loss"], rel=1e-4):
            lost.append(f"step {step}: loss {loss} for {row['train/loss']}")
    return Found(len(worlds) - 1, lost, "on " + ", ".join(map(str, worlds)) + " ranks")


def nodes_come_and_go(folder, times, seed):
    """A second node joins a training, and is killed, its agent and its rank; the first goes on
    with it and without.
    """
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # as the README says
    rng = np.random.default_rng(seed)
    log = folder / "run" / "training.log"
    metrics = folder / "run" / "metrics.jsonl"
    steps = 150 * (times + 1)
    port = 20_000 + os.getpid() % 20_000
    given = small(
        train__length=f"{steps} steps",
        every__log="1 step",
        every__validate="0 steps",
        every__sample="0 steps",
        every__milestone="0 steps",
        every__save="20 steps",
    )

    def node():
        """Start an agent with one rank; returns its process, which leads a group."""
        if (child := os.fork()) == 0:
            os.setpgid(0, 0)
            work = agent(training(given, folder / "run"), 1, (1, 2), f"localhost:{port}")
            os._exit(forked(work, folder / "log", limit=900))
        return child

    def until(what, true):
        begun = time.monotonic()
        while not true():
            if time.monotonic() - begun > 120:
                raise TimeoutError(f"{what} took more than 120 s")
            time.sleep(0.05)

    def step():
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        return json.loads(lines[-1])["step"] if lines else 0

    def starts(world):
        return log.read_text().count(f"rank 0 of {world}") if log.exists() else 0

    nodes = [node()]
    try:
        for time_of_it in range(1, times + 1):
            at = step()
            until("a step", lambda: step() > at)  # noqa: B023
            nodes.append(node())
            until("joining", lambda: starts(2) == time_of_it)  # noqa: B023
            at = step() + int(rng.integers(1, 30))
            until("going on together", lambda: step() >= min(at, steps - 1))  # noqa: B023
            alone = starts(1)
            os.killpg(nodes[1], signal.SIGKILL)
            os.waitpid(nodes.pop(), 0)
            until("going on alone", lambda: starts(1) > alone)  # noqa: B023
        code = os.waitstatus_to_exitcode(os.waitpid(nodes.pop(), 0)[1])
    finally:
        for group in nodes:
            os.killpg(group, signal.SIGKILL)
            os.waitpid(group, 0)
    lost = [f"exit code {code}"] if code else []
    if (found := [row["step"] for row in rows(folder / "run")]) != list(range(1, steps + 1)):
        lost.append(f"{len(set(range(1, steps + 1)) - set(found))} of {steps} rows")
    return Found(times, lost, f"{steps} steps")
