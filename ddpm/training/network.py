"""The network as the step calls it: autocast, DDP, compilation; the plain module stays plain."""

import contextlib
import itertools
from functools import cached_property

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from ddpm.common import errors
from ddpm.runtime import compile

# how it compiles: dropout draws what it draws without it
LEARNING = {"options": {"fallback_random": True}}


class TrainNetwork:
    """The network as the training step calls it: net(x, t, y) -> float32, with autocast around it,
    gradients averaged over ranks, and compilation.

    EMA and checkpoints keep the plain module, so no wrapper's name reaches a file. Validation, in
    evaluation mode without gradients, calls the plain module, so nothing more is compiled. `params`
    are what the optimizer changes, `weights.state_dict()` what is averaged, `module` the module
    whose layers learn. Ranks exchange gradients in bfloat16 if `compressed`. `say(text)` prints
    what the compiler cannot do.
    """

    # inside `accumulating(more=True)` no rank waits for another: each can try a micro-step alone
    rehearses = True

    def __init__(self, net, machine, compressed=False):
        self.net = net
        self.compressed = compressed
        self.machine = machine
        self.eval_module = net
        self.compiled = None
        self.plain_stages = []  # (stage, its forward method) of those that are compiled
        self.say = print
        self.weights = net
        self.module = net
        self.params = list(net.parameters())

    @cached_property
    def wrapped(self):
        """The module that learns, built at its first use: ranks wait for each other there."""
        if self.machine.world == 1:
            return self.net
        # gradients are views of the buckets that ranks exchange, not copies
        wrapped = DistributedDataParallel(self.net, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # they are constants; the argument changed its name
        if self.compressed:
            # here, as most runs do not need it
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            # a function of another name: without NCCL, torch refuses that of its hook
            hook = default_hooks.bf16_compress_hook
            wrapped.register_comm_hook(None, lambda state, bucket: hook(state, bucket))
        return wrapped

    def __call__(self, x, t, y=None, **conditions):
        # in training also for self-conditioning's own estimate, which has no gradients
        compiled = self.compiled is not None and self.net.training
        train = compiled or torch.is_grad_enabled()
        with self.machine.autocast():
            call = self.forward_train if train else self.eval_module
            return call(x, t, y, **conditions).float()

    def forward_train(self, *inputs, **conditions):
        """The output of the compiled module or, once compilation has failed, of the plain one."""
        if self.compiled is not None:
            try:
                return self.compiled(*inputs, **conditions)
            except Exception as error:  # a compiler has many
                if compile.of_kernels(error):
                    raise
                self.give_up(error)
        return self.wrapped(*inputs, **conditions)

    def give_up(self, error):
        """Go on without the compiler after this error."""
        self.use_compiler(False)
        self.say(
            "the network is not compiled, as torch.compile failed: "
            f"{errors.one_line_with_type(error)}"
        )

    def train(self):
        if not self.module.training:  # or the visit to each layer takes half a millisecond
            self.wrapped.train()

    def accumulating(self, more):
        """The context of a micro-step: ranks sum gradients only if no more micro-steps follow."""
        if more and self.machine.world > 1:
            return self.wrapped.no_sync()
        return contextlib.nullcontext()

    def use_compiler(self, how=True):
        """Train through torch.compile, which compiles at the next call, or stop doing so.

        `how` is True for one graph of the network, "stages" for one of each stage, False for none.
        Several ranks compile by stage: between two stages gradients or shards are exchanged.
        """
        for stage, plain in self.plain_stages:
            stage.forward = plain
        self.plain_stages = []
        self.compiled = None
        if how == "stages" or (how and self.machine.world > 1):
            for stage in itertools.chain(*self.module.levels):
                self.plain_stages.append((stage, stage.forward))
                stage.forward = compiled_in_training(stage)
            self.compiled = self.wrapped
        elif how:
            self.compiled = compile.through(self.wrapped, LEARNING)

    def scaler(self):
        """A GradScaler that scales for float16 and does nothing otherwise."""
        return self.machine.scaler()

    def sync_grads(self):
        """Put the gradients where the optimizer reads them."""

    def norm(self, others=()):
        """The norm of the gradients of the network and of `others`, which all ranks have alike."""
        params = (*self.params, *others)
        return get_total_norm([param.grad for param in params if param.grad is not None])

    def summon_full_params(self):
        """The context in which the plain network has the full weights."""
        return contextlib.nullcontext()

    def full_state_dict(self, state):
        """A state with full tensors on the main rank; all ranks take part."""
        return state

    def as_checkpoint_part(self, part):
        """The checkpoint part that saves and loads `part` with full tensors."""
        return part


def compiled_in_training(stage):
    """A forward method of a module that is compiled in training mode and plain otherwise."""
    plain = stage.forward
    fast = compile.through(plain, LEARNING)
    return lambda *inputs: (fast if stage.training else plain)(*inputs)
