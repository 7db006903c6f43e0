"""CUDA's rules without a GPU: tensors of the device "cuda" that have shapes and number types and no
numbers.

Inside a FakeGPU, what is computed on the host is computed, and what is computed on the GPU runs on
torch's fake tensors: mixed devices or types raise as they do on a GPU. Inside `watch`, an operation
at which the host waits for the GPU raises HostWait. There is no backward pass: for that, torch asks
CUDA's driver.
"""

import contextlib
from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

from ddpm.experiment import build, step
from ddpm.runtime import device, prefetch
from ddpm.training import network

needs_cuda_build = pytest.mark.skipif(
    torch.version.cuda is None, reason="this torch is built without CUDA's rules"
)
HALF = (torch.bfloat16, torch.float16)


class HostWait(AssertionError):
    """The host would wait for the GPU."""


class FakeGPU(FakeTensorMode):
    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.watched = False

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        target = kwargs.get("device") and torch.device(kwargs["device"]).type
        if target != "cuda" and not any(isinstance(tensor, FakeTensor) for tensor in tensors):
            return function(*args, **kwargs)
        if self.watched:
            check_wait(function.overloadpacket, tensors, target)
        return super().__torch_dispatch__(function, types, args, kwargs)

    @contextlib.contextmanager
    def watch(self, watched=True):
        """The context in which a wait raises, or does not."""
        before = self.watched
        self.watched = watched
        try:
            yield
        finally:
            self.watched = before


def check_wait(operation, tensors, target):
    """Raise HostWait for an operation that reads numbers from the GPU, or that copies between it
    and memory that is not pinned.

    A number of the host (a tensor without dimensions) travels with the operation's arguments,
    unless it is copied.
    """
    if operation in READS:
        raise HostWait(f"{operation} reads what the GPU has computed")
    copies = operation in COPIES
    places = {
        getattr(tensor, "fake_device", tensor.device).type
        for tensor in tensors
        if copies or tensor.dim()
    }
    if copies and target:
        places.add(target)
    if len(places) > 1:
        raise HostWait(f"{operation} copies between the host and the GPU")


READS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten._linalg_check_errors,
    torch.ops.aten.nonzero,
    torch.ops.aten.equal,
}
COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_}


@dataclass(frozen=True)
class FakeMachine(device.Machine):
    """A Machine on a FakeGPU: the methods that ask CUDA's driver for something do without it."""

    gpu: FakeGPU = None

    def to_device(self, tensor):
        with self.gpu.watch(False):  # the machine's own pins the memory first
            return tensor.to(self.device, non_blocking=True)

    def random_numbers(self, seed, depth=1):
        return prefetch.RandomNumbers(seed)  # no GPU pins memory, and threads have no torch modes

    @contextlib.contextmanager
    def autocast(self):
        with torch.autocast("cuda", enabled=False):  # which would not enable itself without a GPU
            torch.set_autocast_enabled("cuda", self.dtype != torch.float32)
            torch.set_autocast_dtype("cuda", self.dtype)
            yield

    def scaler(self):
        return torch.amp.GradScaler("cuda", enabled=False)


class NoBackward:
    """In the place of a GradScaler: the backward pass leaves a gradient at each parameter that
    asks for one.
    """

    def __init__(self, parameters):
        self.parameters = parameters

    def scale(self, loss):
        assert loss.requires_grad and loss.dtype == torch.float32 and loss.dim() == 0
        return self

    def backward(self):
        for one in self.parameters:
            one.grad = torch.zeros_like(one)

    def unscale_(self, optimizer):
        """Gradients are not scaled."""

    def update(self):
        """There is no scale."""


def machine_of(gpu, dtype):
    return FakeMachine(torch.device("cuda", 0), dtype, gpu=gpu)


def network_of(config):
    """The network of a config on the GPU."""
    with torch.device("cuda"):
        return build.network(config)


def step_of(config, machine):
    """The Step of a config on the GPU, as a training has it."""
    net = network_of(config)
    made = step.step(
        config,
        build.diffusion(config, None),
        network.TrainNetwork(net, machine),
        list(step.averages(config, net).values()),
        1000,
    )
    made.scaler = NoBackward(made.parameters)
    return made
