"""Device, type and rank; and two real processes over gloo, which run this file, against one with
the joined batch.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed, nn

from ddpm.runtime import device as runtime_device
from ddpm.runtime import ranks as runtime_ranks
from ddpm.runtime.device import AMP, Machine, amp_dtype
from ddpm.training.network import TrainNetwork

CPU = torch.device("cpu")
BATCH = 8


class Net(nn.Module):
    """A small network over the waist net(x, t, y)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Conv2d(3, 8, 3, padding=1)
        self.leave = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t, y=None):
        return self.leave(torch.tanh(self.enter(x)) * t.view(-1, 1, 1, 1))


def gradients(machine, micro_batches):
    """What a step over this rank's share of a fixed batch of 8 leaves in `.grad`, as {name:
    tensor}.
    """
    torch.manual_seed(1)
    x = torch.randn(BATCH, 3, 6, 6)
    t = torch.rand(BATCH)
    target = torch.randn(BATCH, 3, 6, 6)
    plain = Net()
    net = TrainNetwork(plain, machine)
    mine = torch.arange(BATCH)[machine.rank_slice(BATCH)].chunk(micro_batches)
    for micro, places in enumerate(mine):
        with net.accumulating(more=micro + 1 < micro_batches):
            loss = (net(x[places], t[places]) - target[places]).square().mean()
            (loss / micro_batches).backward()
    return {name: parameter.grad for name, parameter in plain.named_parameters()}


def as_one_of_two(folder):
    """What each of the two processes does: try every collective and leave what it saw in
    `folder`.
    """
    torch.set_num_threads(1)
    machine = runtime_device.start("off", device="cpu")
    rank = machine.rank
    seen = {
        "notes": machine.notes,
        "main": machine.main,
        "world": machine.world,
        "share": range(7)[machine.rank_slice(7)],
        "backend of hosts": distributed.get_backend(machine.cpu_group),
        "sum": machine.sum(torch.tensor([1.0, 10.0]) * (rank + 1)),
        "sum of doubles": machine.sum(torch.tensor([1 / 3], dtype=torch.float64)),
        "gather uneven": machine.gather(torch.full((rank + 1, 2), rank, dtype=torch.uint8)),
        "gather where rank 0 has none": machine.gather(torch.arange(3 * rank).view(-1, 3)),
        "gather shares of 1": machine.gather(torch.arange(1)[machine.rank_slice(1)]),
        "agree on a set": machine.broadcast({"log", "save"} if rank == 0 else set()),
        "agree on nothing": machine.broadcast(None if rank == 0 else 5),
        "gradients": gradients(machine, 1),
        "accumulated": gradients(machine, 2),
        "names": list(Net().state_dict()) == list(gradients(machine, 1)),
    }
    # a second start in one process joins the ranks that are there
    again = runtime_device.start("off", device="cpu")
    seen["agree after another start"] = again.broadcast(rank)
    torch.save(seen, Path(folder, f"{rank}.pt"))
    runtime_ranks.stop()
    runtime_ranks.stop()  # having left is no error


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """What rank 0 and rank 1 saw."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = Path(__file__).parents[2]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment = os.environ | common | {"PYTHONPATH": str(root)}
    command = [sys.executable, __file__, str(folder)]
    ranks = [
        subprocess.Popen(
            command,
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank in (0, 1)
    ]
    try:
        said = [rank.communicate(timeout=120)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


def test_two_ranks_know_who_they_are(pair):
    for rank, seen in enumerate(pair):
        assert seen["world"] == 2 and seen["main"] == (rank == 0)
        assert f"rank {rank} of 2" in seen["notes"][0] and "device cpu" in seen["notes"][0]
    assert [list(seen["share"]) for seen in pair] == [[0, 1, 2], [3, 4, 5, 6]]


def test_collectives(pair):
    for seen in pair:
        assert seen["sum"].tolist() == [3.0, 30.0]
        assert (
            seen["sum of doubles"].dtype == torch.float64 and seen["sum of doubles"].item() == 2 / 3
        )
        assert (
            seen["gather uneven"].tolist() == [[0, 0], [1, 1], [1, 1]]
            and seen["gather uneven"].dtype == torch.uint8
        )
        assert seen["gather where rank 0 has none"].tolist() == [[0, 1, 2]]
        assert seen["gather shares of 1"].tolist() == [0]
        assert seen["agree on a set"] == {"log", "save"} and seen["agree on nothing"] is None
        assert seen["agree after another start"] == 0
        assert seen["backend of hosts"] == "gloo"


@pytest.mark.parametrize("way", ["gradients", "accumulated"])
def test_two_ranks_learn_what_one_process_learns_from_the_joined_batch(pair, way):
    """The same sum of 8 x 36 products in another order: float32 rounds to 6e-8 of the largest,
    some tens of times.
    """
    one = gradients(Machine(CPU, torch.float32), 1)
    for seen in pair:
        assert seen["names"] and list(seen[way]) == list(one)
        for name, gradient in one.items():
            torch.testing.assert_close(
                seen[way][name], gradient, rtol=1e-5, atol=2e-6 * gradient.abs().max().item()
            )
            assert torch.equal(seen[way][name], pair[0][way][name])  # and both ranks the very same


def test_accumulation_changes_nothing_in_one_process():
    """The tolerance is that of the test above."""
    whole, parts = (
        gradients(Machine(CPU, torch.float32), micro_batches) for micro_batches in (1, 4)
    )
    for name, gradient in whole.items():
        torch.testing.assert_close(
            parts[name], gradient, rtol=1e-5, atol=2e-6 * gradient.abs().max().item()
        )


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [0, 1, 2, 7, 64, 1797])
def test_shares_are_a_partition_in_rank_order(n, world):
    shares = [
        range(n)[Machine(CPU, torch.float32, rank, world).rank_slice(n)] for rank in range(world)
    ]
    assert [item for share in shares for item in share] == list(range(n))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_alone_every_collective_is_the_identity():
    machine = Machine(CPU, torch.float32)
    x = torch.arange(6.0).view(2, 3)
    assert machine.main and machine.rank_slice(5) == slice(0, 5)
    assert (
        machine.sum(x) is x
        and machine.gather(x) is x
        and machine.broadcast(x) is x
        and machine.to_device(x) is x
    )
    assert set(machine.memory()) == {"memory/rss_gib"}


def test_peak_memory_is_in_gib():
    """After 256 MiB were touched, the peak of the process is between that and what this machine
    can have.
    """
    torch.ones(2**26)
    assert 0.25 < Machine(CPU, torch.float32).memory()["memory/rss_gib"] < 2000


@pytest.mark.parametrize(
    "amp, dtype, reason",
    [
        ("auto", torch.float32, "no GPU"),
        ("off", torch.float32, "set by train.amp"),
        ("bf16", torch.bfloat16, "set by train.amp"),
        ("fp16", torch.float16, "set by train.amp"),
    ],
)
def test_amp_on_the_cpu(amp, dtype, reason):
    assert amp in AMP and amp_dtype(amp, CPU) == (dtype, reason)
    machine = runtime_device.start(amp, device="cpu")
    assert machine == Machine(CPU, dtype, 0, 1, machine.notes)
    assert machine.notes[1] == f"networks compute in {dtype} ({reason})"
    assert machine.scaler().is_enabled() == (dtype == torch.float16)
    net = Net()
    inside = []
    net.enter.register_forward_hook(lambda module, given, out: inside.append(out.dtype))
    out = TrainNetwork(net, machine)(torch.randn(2, 3, 6, 6), torch.rand(2))
    assert inside == [dtype] and out.dtype == torch.float32
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


@pytest.mark.parametrize(
    "hip, name, major, dtype",
    [
        # RX 6800, RX 5500
        ("6.4", "gfx1030", 10, torch.float16),
        ("6.4", "gfx1012:xnack-", 10, torch.float16),
        ("6.4", "gfx906:sramecc+:xnack-", 9, torch.float16),  # MI50
        # MI100, MI210
        ("6.4", "gfx908:sramecc+:xnack-", 9, torch.bfloat16),
        ("6.4", "gfx90a:sramecc+:xnack-", 9, torch.bfloat16),
        ("6.4", "gfx942", 9, torch.bfloat16),
        ("6.4", "gfx1100", 11, torch.bfloat16),
        ("6.4", "gfx1201", 12, torch.bfloat16),
        (None, None, 7, torch.float16),
        (None, None, 8, torch.bfloat16),
    ],
)
def test_bf16_is_chosen_where_the_gpu_computes_it(monkeypatch, hip, name, major, dtype):
    """What torch tells of a GPU is given here; what it makes of that is its own: that all of
    AMD's compute bf16.
    """
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.version, "cuda", None if hip else "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    properties = SimpleNamespace(major=major, **({"gcnArchName": name} if hip else {}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    assert amp_dtype("auto", torch.device("cuda", 0))[0] == dtype
    assert amp_dtype("bf16", torch.device("cuda", 0))[0] == torch.bfloat16


def test_every_choice_of_amp_has_a_meaning():
    assert {amp: amp_dtype(amp, CPU)[0] for amp in AMP} == {
        "auto": torch.float32,
        "off": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }


def test_nothing_asked_for_is_the_gpu_if_there_is_one():
    assert runtime_device.start().device.type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("text", ["x", "-1", "1.5", ""])
def test_a_rank_that_is_no_number_is_one_line(monkeypatch, text):
    monkeypatch.setenv("RANK", text)
    with pytest.raises(
        ValueError, match=f"RANK is {text!r} in the environment and must be a number, .*; unset it"
    ) as caught:
        runtime_device.start()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "tpu:0", "cpu:x"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError) as caught:
        runtime_device.start(device=device)
    line = str(caught.value)
    assert (
        line.startswith(f"device {device!r} is not available on this machine; use cpu")
        and "\n" not in line
    )


@pytest.mark.parametrize(
    "load, threads, policy, said",
    [
        (5.0, 2, None, True),
        (0.2, 2, None, False),
        (5.0, 1, None, False),
        (5.0, 2, "PASSIVE", False),
    ],
)
def test_a_busy_machine_is_named_with_what_helps(monkeypatch, load, threads, policy, said):
    monkeypatch.delenv("OMP_WAIT_POLICY")
    if policy:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    notes = " ".join(runtime_device.start("off", device="cpu").notes)
    assert ("(load 5.0 on 2 cores): with OMP_WAIT_POLICY=PASSIVE" in notes) == said


if __name__ == "__main__":
    as_one_of_two(sys.argv[1])
