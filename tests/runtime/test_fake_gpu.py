"""Every entry of every table on a GPU that is not there: no device or type is mixed, the host never
waits, no graph breaks.

What a GPU takes in memory by its rules for number types is what the planner counts by the CPU's.
"""

import inspect
import itertools
from collections import deque

import pytest
import torch
import torch.nn.functional as F

from ddpm.config import files
from ddpm.data import augment
from ddpm.diffusion.denoiser import unconditional
from ddpm.diffusion.editing import EDITS, get_edit
from ddpm.diffusion.likelihood import bound, timestep_strata
from ddpm.diffusion.losses import LOSSES
from ddpm.diffusion.process import VARIANCES
from ddpm.diffusion.samplers import SAMPLERS
from ddpm.diffusion.targets import TARGETS
from ddpm.diffusion.timesteps import TIMES
from ddpm.diffusion.weightings import WEIGHTINGS
from ddpm.experiment import build
from ddpm.experiment import step as experiment_step
from ddpm.models import MODELS
from ddpm.runtime import memory
from ddpm.sampling import draw
from ddpm.training.optim import OPTIMIZERS
from support.configs import FILES, module_of
from support.fake_gpu import HALF, FakeGPU, machine_of, needs_cuda_build, network_of, step_of
from support.runs import tiny

pytestmark = needs_cuda_build

SMALL = {"dit": "dit(depth=1, width=16, heads=2)"}
QUICK = {"model.name": SMALL["dit"]}  # where the network is beside the point
FEATURES = {
    "model.use_scale_shift_norm": True,
    "model.resblock_updown": True,
    "model.qk_norm": True,
    "model.dropout": 0.1,
    "data.augment": 0.5,
    "data.flip": True,
    "diffusion.self_condition": True,
}
CLASSES = {"data.class_labels": True, "data.classes": ("cat", "dog")}
LEARNED = {"diffusion.variance": "learned", "diffusion.loss": "hybrid"}


def given(changes):
    return files.changed(tiny(), changes)


def accepted(name):
    """A config of a network with every one of FEATURES that it does not refuse, and classes."""
    found = {"model.name": SMALL.get(name, name), **CLASSES, **LEARNED}
    for feature, value in FEATURES.items():
        try:
            build.check(given(found | {feature: value}))
        except ValueError:
            continue
        found[feature] = value
    return found


def learn(settings, dtype=torch.bfloat16):
    """Two steps of a training, the second of them watched; returns its Step."""
    with FakeGPU() as gpu:
        step = step_of(settings, machine_of(gpu, dtype))
        step(0, experiment_step.blank(settings, settings.train.batch_size))
        with gpu.watch():
            step(1, experiment_step.blank(settings, settings.train.batch_size))
    return step


def drawn(settings, recipe=None, dtype=torch.bfloat16, walk=lambda machine: draw.walk_from_noise):
    """Draw two images while watched, by a recipe that changes some fields of the config's;
    returns the result.
    """
    with FakeGPU() as gpu:
        net = network_of(settings).eval()
        model = build.diffusion(settings, net)
        how = build.grid_recipe(settings)._replace(**recipe or {})
        with gpu.watch():
            machine = machine_of(gpu, dtype)
            shape = build.image_shape(settings)
            steps = draw.trajectory(
                model, how, range(2), shape, machine, unconditional(net), walk(machine)
            )
            x = deque(steps, maxlen=1).pop()
    assert (
        x.device.type == "cuda"
        and x.dtype == torch.float32
        and x.shape == (2, *build.image_shape(settings))
    )
    return x


in_half = pytest.mark.parametrize("dtype", HALF, ids=str)


@pytest.mark.parametrize(
    "everything, dtype", [(False, HALF[0]), *((True, dtype) for dtype in HALF)], ids=str
)
@pytest.mark.parametrize("name", MODELS)
def test_every_network_learns_and_draws(name, everything, dtype):
    settings = given(accepted(name) if everything else {"model.name": SMALL.get(name, name)})
    learn(settings, dtype)
    drawn(settings, {"steps": 2, "guidance": 2.0 if everything else 1.0}, dtype)


@in_half
@pytest.mark.parametrize("predict", TARGETS)
def test_every_target_and_weighting(predict, dtype):
    with FakeGPU() as gpu:
        machine = machine_of(gpu, dtype)
        net = network_of(given(QUICK))
        x = torch.randn(2, 1, 16, 16, device="cuda")
        t = torch.zeros(2, dtype=torch.long, device="cuda")
        for weighting in WEIGHTINGS:
            model = build.diffusion(
                given({"diffusion.predict": predict, "diffusion.weighting": weighting}), net
            )
            model.objective.to(machine.device)
            model.process.at(t)  # moves the tables
            with gpu.watch(), machine.autocast():
                losses = model.losses(x, t, torch.randn_like(x))
            assert losses.device.type == "cuda" and losses.dtype == torch.float32


CASES = [
    *({"diffusion.times": name} for name in TIMES),
    *(
        {"diffusion.loss": loss, "diffusion.variance": variance}
        for loss in LOSSES
        for variance in VARIANCES
    ),
    *({"train.optimizer": name} for name in OPTIMIZERS),
    {"diffusion.weighting": "uncertainty"},
    {
        "diffusion.times": "importance",
        "train.gradient_accumulation_steps": 2,
        "ema.extra_decays": (0.5,),
    },
]


@in_half
@pytest.mark.parametrize("changes", CASES, ids=lambda changes: ",".join(map(str, changes.values())))
def test_every_loss_and_distribution_of_times(changes, dtype):
    settings = given(QUICK)
    try:
        settings = given(QUICK | changes)
        build.check(settings)
    except ValueError as error:
        assert "variance" in str(error)
        return
    learn(settings, dtype)


def test_images_are_augmented_at_any_shape():
    with FakeGPU() as gpu, gpu.watch():
        x, told = augment.augment(
            torch.randn(2, 3, 8, 16, device="cuda"),
            torch.randn(2, augment.NUM_RANDOM, device="cuda"),
            0.5,
        )
    assert x.shape == (2, 3, 8, 16) and told.device.type == "cuda"


VALUES = {"order": (1, 2, 3), "eta": (0.0, 0.5), "churn": (0.0, 10.0), "variance": VARIANCES}


def ways(name):
    """The spec of a sampler with every value of its arguments that changes what it computes."""
    known = [key for key in inspect.signature(SAMPLERS[name]).parameters if key in VALUES]
    for values in itertools.product(*(VALUES[key] for key in known)):
        yield (
            "{}({})".format(name, ", ".join(map("{}={!r}".format, known, values)))
            if known
            else name
        )


@in_half
@pytest.mark.parametrize("sampler", [way for name in SAMPLERS for way in ways(name)])
def test_every_sampler(sampler, dtype):
    changes = LEARNED if "learned" in sampler else {}
    drawn(
        given(QUICK | CLASSES | changes),
        {"sampler": sampler, "steps": 4, "guidance": 2.0, "interval": (0.2, 5.0)},
        dtype,
    )


@in_half
@pytest.mark.parametrize("predict", TARGETS)
def test_every_target_draws(predict, dtype):
    drawn(
        given(QUICK | {"diffusion.predict": predict, "diffusion.self_condition": True}), dtype=dtype
    )


@in_half
@pytest.mark.parametrize("name", EDITS)
def test_every_edit(name, dtype):
    edit = get_edit("inpaint(jump_length=1, resamplings=2)" if name == "inpaint" else name)
    pictures = [torch.zeros(1, 16, 16, dtype=torch.uint8)] * edit.images
    mask = torch.ones(16, 16, dtype=torch.bool) if edit.mask else None
    drawn(
        given(QUICK),
        {"sampler": "ddim", "steps": 4},
        dtype,
        walk=lambda machine: draw.edited(edit, pictures, mask, 2, machine),
    )


def test_the_bound():
    settings = given(QUICK | LEARNED)
    with FakeGPU() as gpu:
        model = build.diffusion(settings, network_of(settings).eval())
        x = torch.zeros(2, 1, 16, 16, device="cuda")
        u = torch.zeros(2, device="cuda")
        model.process.at(torch.zeros(2, dtype=torch.long, device="cuda"))
        with gpu.watch():
            found = bound(
                model,
                x,
                timestep_strata(model.process, 3),
                lambda k: u,
                lambda k: torch.randn_like(x),
            )
    assert found.total.shape == (2,) and found.total.device.type == "cuda"


class Fused(torch.autograd.Function):
    """Attention by a kernel that keeps its arguments and its result, as those of GPUs do: which
    one runs is CUDA's to say.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out)
        return out


def kept(settings, device):
    """The bytes that a forward pass in bfloat16 leaves for the backward pass, by a device's
    rules.
    """
    ledger = memory.Ledger()
    with ledger, torch.device(device):
        net = build.network(settings)
        side = settings.data.image_size
        x = torch.randn(2, build.channels_in(settings), side, side)
        t = torch.rand(2)
        before = ledger.live
        with torch.autocast(device, enabled=False):  # which would not enable CUDA's without a GPU
            torch.set_autocast_enabled(device, True)
            torch.set_autocast_dtype(device, torch.bfloat16)
            out = net(x, t, torch.zeros(2, dtype=torch.long) if settings.data.classes else None)
        return ledger.live - before + 0 * len(out)


SHIPPED = {path.stem: module_of(path).get_config() for path in FILES}
# a mask of dropout takes a byte on a GPU, and more on a CPU
LESS = {"model.num_res_blocks": 1, "model.dropout": 0.0}
PLANNED = {
    name: files.changed(
        settings,
        LESS
        | (
            {"model.name": settings.model.name.replace("(", "(depth=1, ")}
            if settings.model.name.startswith("dit")
            else {}
        ),
    )
    for name, settings in SHIPPED.items()
} | {name: given(accepted(name) | LESS | {"model.qk_norm": False}) for name in MODELS}


@pytest.mark.parametrize("name", PLANNED)
def test_a_gpu_keeps_what_the_planner_counts(name, monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", Fused.apply)
    assert kept(PLANNED[name], "cuda") == kept(PLANNED[name], "cpu")


@pytest.mark.parametrize("name", ["unet", "dit"])
def test_norms_of_queries_and_keys_take_no_more_than_planned(name, monkeypatch):
    """A GPU has a kernel for them, which keeps less than the CPU's several."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", Fused.apply)
    settings = given({"model.name": SMALL.get(name, name), "model.qk_norm": True})
    assert kept(settings, "cuda") <= kept(settings, "cpu")
