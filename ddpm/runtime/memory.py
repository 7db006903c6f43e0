"""What a computation would hold in memory, counted on fake tensors, which have shapes and no
numbers.
"""

import weakref
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# oneDNN brings image and weights, or gradient and image, into a layout of its own, and so does
# cuDNN for tensor cores
CONVOLUTIONS = {torch.ops.aten.convolution, torch.ops.aten.convolution_backward}


class Ledger(TorchDispatchMode):
    """Inside, tensors are fake ones of the CPU, and the bytes of those that live are added up.

    `live` now, and `course` at each allocation; `peak` the most so far, and `peak_gradients` the
    gradients of `parameters` in it; `forward` what lived beside gradients when the last backward
    pass began. What kernels take for themselves is not seen, but for the copies of their arguments
    that convolutions make. Tensors of before stay as they are.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.seen = weakref.WeakSet()
        self.parameters = []
        self.live = self.peak = self.peak_gradients = self.forward = 0
        self.rising = False
        self.backward = False
        self.course = []

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
        self.backward = backward
        if self.rising and self.live < self.peak:
            self.rising, self.peak_gradients = False, self.gradients()
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        if function.overloadpacket in CONVOLUTIONS:
            self.reach(sum(size_of(tensor) for tensor in args[:2]))
        return out

    def add(self, storage):
        if storage in self.seen:
            return
        self.seen.add(storage)
        size = storage.nbytes()
        weakref.finalize(storage, self.remove, size)
        self.live += size
        self.reach()

    def reach(self, more=0):
        """Note what lives now, and `more` for the time of one operation."""
        self.course.append(self.live + more)
        if self.course[-1] > self.peak:
            self.peak = self.course[-1]
            self.rising = True

    def remove(self, size):
        self.live -= size

    def gradients(self):
        """The bytes of the gradients that there are."""
        return sum(size_of(one.grad) for one in self.parameters if one.grad is not None)

    def restart(self):
        """Look for a peak from now on."""
        self.peak, self.peak_gradients, self.course = self.live, self.gradients(), []


GIB = 2**30


def with_margin(size):
    """What a GPU must have free for a count of bytes: kernels' own workspace, and gaps between
    blocks, are not counted.
    """
    return size * 1.1 + 2**29


def size_of(tensor):
    return tensor.numel() * tensor.element_size()


def size_of_all(tensors):
    return sum(map(size_of, tensors))


@dataclass(frozen=True)
class Account:
    """The bytes of a training step at its peak, by part; they add up to `total`. `course` has
    the total at each allocation.
    """

    weights: int
    averages: int  # of the weights
    optimizer: int
    gradients: int  # those that there are at the peak
    activations: int  # kept by the forward pass for the backward pass
    workspace: int  # results on their way, beyond those
    course: list

    @property
    def parts(self):
        return [
            self.weights,
            self.averages,
            self.optimizer,
            self.gradients,
            self.activations,
            self.workspace,
        ]

    @property
    def total(self):
        return sum(self.parts)

    @property
    def shared(self):
        """What ranks share out under train.fully_shard."""
        return self.weights + self.averages + self.optimizer + self.gradients


def account(ledger, step, batch, weights, averages, accumulated=False):
    """The account of a training step, `step(number, batch)` on fake weights, once its optimiser has
    begun.

    The first step, on gradients of zero, gives the optimiser what it keeps; the second is looked
    at. What is `accumulated` is added to gradients that there are already: `batch` is then a
    micro-batch, all of which are alike but for the first.
    """
    ledger.parameters = step.parameters
    with ledger:
        for one in step.parameters:
            one.grad = torch.zeros_like(one)
        before = ledger.live
        step.optimizer.step()
        optimizer = ledger.live - before
        if not accumulated:
            step.optimizer.zero_grad(set_to_none=True)
        start = ledger.live - ledger.gradients()
        ledger.restart()
        step(0, batch)
    held = ledger.peak - start - ledger.peak_gradients
    kept = min(ledger.forward - start, held)
    return Account(
        weights, averages, optimizer, ledger.peak_gradients, kept, held - kept, ledger.course
    )


def most_images(one, images, other, others, room):
    """The most images at a time whose step fits, with its margin, into `room` bytes, from the
    accounts of two numbers of them.

    What lives at any one moment of a step is a line in the images; the accounts are `one` of
    `images`, `other` of `others`.
    """
    first = np.array(one.course)
    second = np.array(other.course)
    each = (second - first) / (others - images)
    return (
        bisect_left(
            range(10**6),
            True,
            key=lambda n: with_margin((first + each * (n - images)).max()) > room,
        )
        - 1
    )
