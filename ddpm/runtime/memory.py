"""The memory that a computation needs and the bytes that it moves, counted on fake tensors: shapes
without data.
"""

import weakref
from bisect import bisect_left
from typing import NamedTuple

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# oneDNN, and cuDNN for tensor cores, copy their first two arguments into another layout
ATEN = torch.ops.aten
CONVOLUTIONS = {ATEN.convolution, ATEN.convolution_backward}
PRODUCTS = CONVOLUTIONS | {ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm}
# passes over the input beyond the reads and writes of arguments and results: for the statistics
NORMS = {ATEN.native_group_norm: 1, ATEN.native_group_norm_backward: 2}


class Traffic(NamedTuple):
    """Bytes that the kernels of a step with one micro-batch read and write in a GPU's memory."""

    products: float = 0  # convolutions and matrix products
    transposes: float = 0  # copies of a convolution's tensors into NHWC and back
    passes: float = 0  # all other operations of the forward and backward pass
    update: float = 0  # what follows: norm of the gradients, optimizer, averages
    # operations, of which each launches a kernel or more
    launches: float = 0  # of the forward and backward pass
    update_launches: float = 0


class Ledger(TorchDispatchMode):
    """Context in which new tensors are fake CPU tensors, and the bytes of live storages are summed.

    `live` is the present sum, `course` its value at each allocation, `peak` its maximum,
    `peak_gradients` the gradients of `parameters` at the peak, `forward` the sum without gradients
    when the last backward pass started, `traffic` the Traffic. Workspaces of kernels are not
    counted, except the copies that convolutions make of their arguments. Tensors from before are
    unchanged.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.seen = weakref.WeakSet()
        self.parameters = []
        self.live = self.peak = self.peak_gradients = self.forward = 0
        self.rising = False
        self.backward = self.learned = False  # in a backward pass; after one
        self.course = []
        self.moved = Traffic()._asdict()

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *how):
        super().__exit__(*how)
        self.fake.__exit__(*how)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.prim.device.default:  # half of all calls
            return args[0].fake_device
        backward = torch._C._current_graph_task_id() != -1
        if backward and not self.backward:
            self.forward = self.live - self.gradients()
        self.learned |= self.backward and not backward
        self.backward = backward
        if self.rising and self.live < self.peak:
            self.rising, self.peak_gradients = False, self.gradients()
        out = function(*args, **(kwargs or {}))
        results = tensors_in(out)
        for tensor in results:
            self.add(tensor.untyped_storage())
        if not function.is_view:
            self.move(function.overloadpacket, args, results)
        if function.overloadpacket in CONVOLUTIONS:
            self.reach(sum(size_of(tensor) for tensor in args[:2]))
        return out

    def move(self, operation, args, results):
        """Add an operation to the traffic."""
        size = size_of_all(tensors_in(args)) + size_of_all(results)
        moved = self.moved
        moved["update_launches" if self.learned else "launches"] += 1
        if self.learned:
            moved["update"] += size
        elif operation in PRODUCTS:
            moved["products"] += size
            if operation in CONVOLUTIONS:
                moved["transposes"] += 2 * size
                # the bias is added to the output, or its gradient summed, by another kernel
                forward = operation is ATEN.convolution
                moved["passes"] += 2 * size_of_all(results) if forward else size_of(args[0])
        else:
            moved["passes"] += size
            if operation in NORMS:
                moved["passes"] += NORMS[operation] * size_of(args[0])

    @property
    def traffic(self):
        return Traffic(**self.moved)

    def add(self, storage):
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self.remove, size)
        self.live += size
        self.reach()

    def reach(self, more=0):
        """Record the live bytes, plus `more` for the duration of one operation."""
        self.course.append(self.live + more)
        if self.course[-1] > self.peak:
            self.peak = self.course[-1]
            self.rising = True

    def remove(self, size):
        self.live -= size

    def gradients(self):
        """The bytes of the gradients that exist."""
        return size_of_all(p.grad for p in self.parameters if p.grad is not None)

    def restart(self):
        """Reset the peak, the course and the traffic."""
        self.peak, self.peak_gradients, self.course = self.live, self.gradients(), []
        self.moved, self.learned = Traffic()._asdict(), False


GIB = 2**30


def with_margin(size):
    """Bytes that a GPU must have free for `size` counted ones: for workspaces and fragmentation."""
    return size * 1.1 + 2**29


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def size_of(tensor):
    return tensor.numel() * tensor.element_size()


def size_of_all(tensors):
    return sum(map(size_of, tensors))


class Account(NamedTuple):
    """Bytes of a training step at its peak, by part; `course` is the sum at each allocation,
    `traffic` the bytes that the step moves.
    """

    weights: int
    averages: int  # of the weights
    optimizer: int
    gradients: int  # that exist at the peak
    activations: int  # kept by the forward pass for the backward pass
    workspace: int  # other intermediate results
    course: list
    traffic: Traffic

    @property
    def parts(self):
        return self[:-2]

    @property
    def total(self):
        return sum(self.parts)

    @property
    def shared(self):
        """The bytes that train.fully_shard divides among ranks."""
        return sum(self[:4])


def account(ledger, step, batch, weights, averages, accumulated=False):
    """The Account of a training step `step(number, batch)` on fake weights.

    A step on zero gradients first creates the optimizer's state. `accumulated`: gradients of the
    micro-batch `batch` are added to existing ones.
    """
    ledger.parameters = step.parameters
    with ledger:
        for parameter in step.parameters:
            parameter.grad = torch.zeros_like(parameter)
        before = ledger.live
        step.optimizer.step()
        optimizer = ledger.live - before
        if not accumulated:
            step.optimizer.zero_grad(set_to_none=True)
        start = ledger.live - ledger.gradients()
        ledger.restart()
        step(0, batch)
    gradients = ledger.peak_gradients
    rest = ledger.peak - start - gradients
    activations = min(ledger.forward - start, rest)
    workspace = rest - activations
    return Account(
        weights,
        averages,
        optimizer,
        gradients,
        activations,
        workspace,
        ledger.course,
        ledger.traffic,
    )


def traffic_of(smaller, images, larger, more_images, count):
    """The Traffic of `count` images at a time, from two accounts as in `most_images`."""
    share = (count - images) / (more_images - images)
    pairs = zip(smaller.traffic, larger.traffic, strict=True)
    return Traffic(*(few + share * (more - few) for few, more in pairs))


def most_images(smaller, images, larger, more_images, available):
    """The largest batch whose step fits, with its margin, into `available` bytes.

    Extrapolates from the accounts of `images` (`smaller`) and `more_images` (`larger`) at a time:
    at each moment of a step the live bytes are linear in their number.
    """
    course = np.array(smaller.course)
    per_image = (np.array(larger.course) - course) / (more_images - images)

    def is_too_large(count):
        return with_margin((course + per_image * (count - images)).max()) > available

    return bisect_left(range(10**6), True, key=is_too_large) - 1
