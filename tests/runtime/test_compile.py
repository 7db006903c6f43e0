"""The network through torch.compile: the same learning and drawing, or the plain network and one
line that says why.

Networks are traced as for any compiler, and then run by torch's own kernels: making code of them
takes minutes on a CPU.
"""

import gc
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from torch._dynamo import lookup_backend
from torch._dynamo.testing import CompileCounter

from ddpm.common.registry import parse
from ddpm.config import files
from ddpm.experiment import build, drawing, load, trainer
from ddpm.generate import generate_images
from ddpm.models import MODELS, layers
from ddpm.runtime import compile, device
from ddpm.training import network as training_network
from ddpm.training.trainer import train
from support.runs import rows, run, tiny

# the same sums, some in another order: rounding of 1e-7, which 12 steps of Adam let grow
CLOSE = 1e-4
GIVEN = dict(
    model__attention_resolutions=(),
    model__channel_mult=(1,),
    model__dropout=0.1,
    train__gradient_accumulation_steps=2,
    train__activation_checkpointing="all",
)


def failing(graph, inputs):
    raise RuntimeError("no C++ compiler here\nand a page of what it tried")


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    monkeypatch.setattr(compile, "COMPILER", "aot_eager")


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    run(tiny(**GIVEN), folder)
    return folder


def losses(folder):
    return [
        value
        for row in rows(folder)
        for key, value in row.items()
        if key in ("train/loss", "val/loss", "train/grad_norm")
    ]


def log(folder):
    return (folder / "training.log").read_text()


@pytest.mark.parametrize("how", [True, "stages"])
def test_a_compiled_network_learns_the_same(plain, tmp_path, how):
    """In two micro-batches, with dropout, all levels recomputed."""
    run(tiny(**GIVEN, train__compile=how), tmp_path)
    assert len(losses(plain)) > 5 and losses(plain) == pytest.approx(losses(tmp_path), rel=CLOSE)
    assert "the network was compiled in" in log(tmp_path) and "the network is not compiled" in log(
        plain
    )


@pytest.mark.parametrize("how", [True, "stages"])
def test_where_compiling_fails_the_plain_network_learns_to_the_same_bits(
    plain, tmp_path, monkeypatch, how
):
    monkeypatch.setattr(compile, "COMPILER", failing)
    run(tiny(**GIVEN, train__compile=how), tmp_path)
    assert losses(plain) == losses(tmp_path)
    (line,) = [
        line
        for line in log(tmp_path).splitlines()
        if "not compiled, as torch.compile failed" in line
    ]
    assert "no C++ compiler here" in line


def test_where_compiling_fails_later_the_plain_network_goes_on(tmp_path, monkeypatch):
    """As for a batch of another size, after memory ran out: here the second half of the run is
    cut into single images.
    """
    options = GIVEN | dict(model__dropout=0.0)  # whose masks depend on how the batch is cut
    run(tiny(**options), tmp_path / "plain")
    torch.compiler.reset()  # or torch 2.7 goes on from what the tests before it have compiled
    given = tiny(**options, train__compile=True)
    compiled = iter([True])

    def once(graph, inputs):
        return aot_eager(graph, inputs) if next(compiled, False) else failing(graph, inputs)

    aot_eager = lookup_backend("aot_eager")
    monkeypatch.setattr(compile, "COMPILER", once)
    made = trainer.build_trainer(given, tmp_path / "compiled", device.start("off"))
    batches = made.batches
    step = made.step
    made.batches = lambda start: (
        step.set_micro_batches(8) or batch if number == 6 else batch
        for number, batch in enumerate(batches(start))
    )
    assert train(made)
    made.tracker.close()
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "compiled"), rel=CLOSE)
    said = log(tmp_path / "compiled")
    assert 0 < said.find("was compiled in") < said.find("not compiled, as torch.compile failed: ")


NETWORKS = {
    "unet": {"model.resblock_updown": True, "model.qk_norm": True},
    "dit(depth=1, width=16, heads=2)": {},
    "unet_edm2": {"diffusion.predict": "edm"},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_one_graph(name, training):
    """Forwards and, of one that learns, backwards, with the numbers that it has without a
    compiler.
    """
    assert {parse(network)[0] for network in NETWORKS} == MODELS.keys()
    given = files.changed(
        tiny(),
        NETWORKS[name]
        | {
            "model.name": name,
            "model.channel_mult": (1,),
            "model.dropout": 0.1,
            "model.attention_resolutions": (16,),
        },
    )
    found = []
    backend = "aot_eager" if training else "eager"
    for wrap in (
        lambda net: net,
        partial(torch.compile, backend=backend, fullgraph=True, dynamic=False),
    ):
        net = build.network(given).train(training)
        for weight in net.parameters():
            torch.nn.init.normal_(
                weight, std=0.2, generator=torch.Generator().manual_seed(weight.numel())
            )
        torch.manual_seed(0)
        out = wrap(net)(torch.ones(2, 1, 16, 16), torch.tensor([0.5, 0.7]))
        if training:
            out.square().mean().backward()
        found.append(
            [out, *(weight.grad for weight in net.parameters() if weight.grad is not None)]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=CLOSE, atol=CLOSE)


def test_each_size_of_batch_has_a_graph_of_fixed_shapes(monkeypatch):
    """More of them than torch compiles by default: it then runs the plain network."""
    shapes = []

    def note(graph, inputs):
        shapes.append([one.shape for one in inputs if isinstance(one, torch.Tensor)])
        return graph

    monkeypatch.setattr(compile, "COMPILER", note)
    torch._dynamo.reset()
    fast = compile.through(torch.nn.Linear(3, 2), training_network.LEARNING)
    for size in range(2, 14):
        fast(torch.ones(size, 3))
    assert [max(shape[0] for shape in found if shape[-1] == 3) for found in shapes] == list(
        range(2, 14)
    )
    assert all(type(side) is int for found in shapes for shape in found for side in shape)


def test_compiled_by_stage_gradients_are_the_same_and_evaluation_is_plain(monkeypatch):
    """Each stage once, recomputed or not; afterwards nothing is compiled."""
    counter = CompileCounter()
    monkeypatch.setattr(compile, "COMPILER", counter)
    net = build.network(tiny(model__attention_resolutions=(), model__channel_mult=(1,)))
    stages = [stage for level in net.levels for stage in level]
    layers.recompute(net.levels[0])
    for weight in net.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    network = training_network.TrainNetwork(net, device.Machine(torch.device("cpu"), torch.float32))
    x, t = torch.ones(2, 1, 16, 16), torch.tensor([0.5, 0.7])
    found = []
    for how in (False, "stages", False):
        network.use_compiler(how)
        network.train()
        out = network(x, t)
        out.square().mean().backward()
        found.append([out, *(weight.grad for weight in net.parameters())])
        net.zero_grad()
        with torch.no_grad():
            network(x, t)  # in training: an own estimate
            net.eval()
            network(x, t), network(x[:1], t[:1]), net(x, t)
    assert counter.frame_count == 2 * len(stages)  # with gradients and without
    for grads in found[1:]:
        torch.testing.assert_close(found[0], grads, rtol=1e-5, atol=1e-5)


def network_with(compiler, monkeypatch):
    monkeypatch.setattr(compile, "COMPILER", compiler)
    net = training_network.TrainNetwork(
        torch.nn.Bilinear(3, 2, 4), device.Machine(torch.device("cpu"), torch.float32)
    )
    net.use_compiler()
    net.train()
    return net


def test_the_own_estimate_is_compiled_and_validation_is_not(monkeypatch):
    calls = []
    net = network_with(
        lambda graph, inputs: lambda *given: calls.append(1) or graph(*given), monkeypatch
    )
    net.eval_module = lambda x, t, y: torch.zeros(2, 4)
    net.compiled = (lambda fast: lambda x, t, y: fast(x, t))(net.compiled)
    given = torch.ones(2, 3), torch.ones(2, 2)
    with torch.no_grad():
        net(*given)
        assert len(calls) == 1
        net.net.eval()
        net(*given)
    assert len(calls) == 1


@pytest.mark.parametrize(
    "error",
    [
        getattr(torch, "AcceleratorError", RuntimeError)(
            "CUDA error: an illegal memory access was encountered", 700
        ),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ],
)
def test_a_failure_of_the_gpu_is_not_the_compilers(error, monkeypatch):
    def kernel(*given):
        raise error

    net = network_with(lambda graph, inputs: kernel, monkeypatch)
    net.compiled = (lambda fast: lambda x, t, y: fast(x, t))(net.compiled)
    with pytest.raises(type(error), match="CUDA|GET"):
        net(torch.ones(2, 3), torch.ones(2, 2))
    assert net.compiled is not None
    drawing = compile.Compiled(torch.nn.Bilinear(3, 2, 4), {2})
    drawing.fast = (lambda fast: lambda x, t, y: fast(x, t))(drawing.fast)
    with pytest.raises(type(error), match="CUDA|GET"):
        drawing(torch.ones(2, 3), torch.ones(2, 2))


def drawn(run_folder, out, **options):
    generate_images(run_folder, 5, out, device="cpu", **options)  # in batches of 4 and 1
    return np.stack([np.asarray(Image.open(path), dtype=int) for path in sorted(out.glob("*.png"))])


@pytest.mark.parametrize("compiler", ["aot_eager", failing])
def test_a_compiled_network_draws_the_same_or_the_plain_one_does(
    plain, tmp_path, monkeypatch, capsys, compiler
):
    monkeypatch.setattr(compile, "COMPILER", compiler)
    before = drawn(plain, tmp_path / "plain")
    after = drawn(plain, tmp_path / "compiled", **{"sample.compile": True})
    assert abs(before - after).max() <= 1
    assert ("as torch.compile failed" in capsys.readouterr().out) == (compiler is failing)


@pytest.mark.parametrize("lacking, graphs", [(False, 0), (True, 1)])
def test_a_compiled_network_is_released_where_training_lacks_memory(monkeypatch, lacking, graphs):
    """After each drawing; what is compiled for training stays."""
    living = []

    def note(graph, inputs):
        living.append(weakref.ref(graph))
        return graph.forward

    monkeypatch.setattr(compile, "COMPILER", note)
    monkeypatch.setattr(device.Machine, "lacks_memory", lambda machine: lacking)
    given = tiny(sample__compile=True, model__channel_mult=(1,), model__attention_resolutions=())
    machine = device.Machine(torch.device("cpu"), torch.float32)
    net = build.network(given)
    training = compile.through(net, training_network.LEARNING)
    draw = drawing.drawer(given, net, machine)
    for _ in range(3):  # torch compiles some again after the first: einops has met more types
        before = len(living)
        assert len(list(draw(range(4), build.grid_recipe(given)))) == 1
        drawn = living[before:]
        net.train()
        training(torch.ones(2, 1, 16, 16), torch.ones(2))
    gc.collect()
    assert len(drawn) == graphs and len(living) == before + graphs
    assert all(graph() is None for graph in drawn)


def test_a_gpu_lacks_memory_where_less_is_free_than_at_the_peak(monkeypatch):
    machine = device.Machine(torch.device("cuda", 0), torch.float32)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: 7)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda gpu: 3)
    for free, lacks in ((3, True), (4, False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda gpu, free=free: (free, 8))
        assert machine.lacks_memory() == lacks


def test_another_memory_format_learns_the_same(tmp_path):
    """And its weights are stored and loaded like any; dropout, which goes through the memory in
    order, would differ.
    """
    for folder, last in (("plain", False), ("last", True)):
        run(tiny(train__channels_last=last, train__length="6 steps"), tmp_path / folder)
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "last"), rel=CLOSE)
    assert (
        abs(
            drawn(tmp_path / "plain", tmp_path / "a") - drawn(tmp_path / "last", tmp_path / "b")
        ).max()
        <= 1
    )


def test_larger_images_are_drawn_in_the_format_that_is_faster_on_a_cpu(tmp_path, monkeypatch):
    run(
        tiny(data__image_size=32, model__attention_resolutions=(16,), train__length="3 steps"),
        tmp_path / "run",
    )
    faster = drawn(tmp_path / "run", tmp_path / "a")
    weight = load.load(tmp_path / "run", "cpu").net.stem.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(device.Machine, "memory_format", lambda self, side: torch.contiguous_format)
    assert abs(faster - drawn(tmp_path / "run", tmp_path / "b")).max() <= 1


def test_graphs_of_two_networks_do_not_count_together(monkeypatch):
    """Of one class, compiled one by one: torch would count and search them together."""
    monkeypatch.setattr(compile, "GRAPHS", 1)
    given = torch.ones(2, 3)
    counter = CompileCounter()
    monkeypatch.setattr(compile, "COMPILER", counter)
    nets = [compile.through(torch.nn.Linear(3, side), {}) for side in (1, 2, 3)]
    assert [fast(given).shape[1] for fast in nets] == [1, 2, 3] and counter.frame_count == 3
