"""The network as the step calls it: autocast, DDP or shards, compilation; the plain module stays
beside it.
"""

import contextlib
from functools import cached_property

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from ddpm.runtime import compile, device

# how it compiles: dropout draws what it draws without it
LEARNING = {"options": {"fallback_random": True}}


class TrainNetwork:
    """The network as the training step sees it: autocast around it, gradients averaged over ranks,
    float32 out.

    EMA, checkpoint and everything else keep the plain module, so no wrapper's name reaches a file;
    validation, in evaluation mode and without gradients, asks the plain module, so that it compiles
    nothing more. `parameters` are what an optimiser changes, `weights.state_dict()` what is
    averaged, `learner` is the module whose layers learn. `say(text)` hears of what the compiler
    cannot do.
    """

    # ranks can try a micro-step each for itself: inside `accumulating(more=True)` none waits for
    # another
    rehearses = True

    def __init__(self, net, machine):
        self.net = net
        self.machine = machine
        self.asked = net
        self.fast = None
        self.say = print
        self.weights = net
        self.learner = net
        self.parameters = list(net.parameters())

    @cached_property
    def wrapped(self):
        """The network that learns, made when it is asked first: ranks wait for each other there."""
        return DistributedDataParallel(self.net) if self.machine.world > 1 else self.net

    def __call__(self, x, t, y=None, **told):
        fast = self.fast is not None and self.net.training  # self-conditioning's own estimate too
        with self.machine.autocast():
            return (self.learning if fast or torch.is_grad_enabled() else self.asked)(
                x, t, y, **told
            ).float()

    def learning(self, *given, **told):
        """What the network says that learns: compiled, as long as the compiler can do what it
        has not seen yet.
        """
        try:
            return (self.wrapped if self.fast is None else self.fast)(*given, **told)
        except Exception as error:  # a compiler has many
            if self.fast is None or compile.of_kernels(error):
                raise
            self.give_up(error)
        return self.wrapped(*given, **told)

    def give_up(self, error):
        """Learn without the compiler, which has failed so."""
        self.compiled(False)
        self.say(
            f"the network is not compiled, as torch.compile failed: {device.first_words(error)}"
        )

    def train(self):
        self.wrapped.train()

    def accumulating(self, more):
        """The context of a micro-step: ranks exchange gradients only when no more micro-steps
        follow.
        """
        return (
            self.wrapped.no_sync() if more and self.machine.world > 1 else contextlib.nullcontext()
        )

    def compiled(self, wanted=True):
        """From now on, or no longer, learn through torch.compile, which does its work when it is
        asked first.
        """
        self.fast = compile.through(self.wrapped, LEARNING) if wanted else None

    def scaler(self):
        """A GradScaler that scales for float16 and does nothing otherwise."""
        return self.machine.scaler()

    def collect(self):
        """Bring the gradients to where the optimiser looks for them."""

    def norm(self, others=()):
        """The norm of the gradients of the network and of `others`, parameters that are the same
        on all ranks.
        """
        return get_total_norm(
            [one.grad for one in (*self.parameters, *others) if one.grad is not None]
        )

    def whole(self):
        """The context in which the plain network has the weights, to draw and to measure with."""
        return contextlib.nullcontext()

    def gathered(self, state):
        """A state as it is without ranks, on the main one; the others take part and get nothing
        of use.
        """
        return state

    def part(self, part):
        """A checkpoint's part that holds weights, or what there is for each of them, as files
        have it.
        """
        return part
