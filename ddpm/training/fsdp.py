"""A network too large for one GPU, shared out over ranks by torch's fully_shard (FSDP2), as the
training step sees it.

Each rank keeps its rows of every tensor: of weights, gradients, averages and the optimiser's state.
Stages of the network come together one at a time, while they compute. Files hold full tensors, so
that a run goes on with or without sharding and on any number of ranks.

    rows [r, ...]: a rank's part along the first axis, in rank order; some ranks may have none
"""

import contextlib
import itertools

import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.utils import get_total_norm

from ddpm.training.network import TrainNetwork


class ShardedNetwork(TrainNetwork):
    """A TrainNetwork with this rank's rows in `module`; `net` is full in `summon_full_params()`.

    The optimizer and averages work on the rows as plain tensors, with the results of full ones.
    """

    # stages come together in each micro-step: a rank without room would leave the others waiting
    rehearses = False

    def __init__(self, net, module, machine, compressed=False):
        super().__init__(net, machine, compressed)
        mesh = init_device_mesh(machine.device.type, (machine.world,))
        for stage in itertools.chain(*module.levels):
            fully_shard(stage, mesh=mesh, mp_policy=mixed_precision(machine.dtype, compressed))
        fully_shard(module, mesh=mesh)  # the rest is small, and embeddings are summed in float32
        self.module = self.eval_module = module
        self.sharded = dict(module.named_parameters())
        self.rows = {
            name: torch.nn.Parameter(param.to_local().detach())
            for name, param in self.sharded.items()
        }
        self.weights, self.params = self, list(self.rows.values())

    @property
    def wrapped(self):
        return self.module

    def accumulating(self, more):
        """Every micro-step sums gradients: full ones would take the memory that is to be saved."""
        return contextlib.nullcontext()

    def scaler(self):
        return ShardedGradScaler(
            self.machine.device.type, enabled=self.machine.dtype == torch.float16
        )

    def sync_grads(self):
        for rows, param in zip(self.params, self.sharded.values(), strict=True):
            rows.grad = None if param.grad is None else param.grad.to_local()
            param.grad = None

    def norm(self, others=()):
        own, common = (
            get_total_norm([param.grad for param in params if param.grad is not None]).to(
                self.machine.device
            )
            for params in (self.params, others)
        )
        return (self.machine.sum(own**2) + common**2).sqrt()

    @contextlib.contextmanager
    def summon_full_params(self):
        self.machine.barrier()  # StopTraining if one of the ranks has stopped
        self.net.load_state_dict(self.each(all_gather_rows, self.state_dict()), assign=True)
        self.eval_module = self.net
        try:
            yield
        finally:
            self.eval_module = self.module
            self.net.to("meta")

    def full_state_dict(self, state):
        def on_host(rows, like):
            tensor = all_gather_rows(rows, like)
            return tensor.cpu() if self.machine.main else None

        self.machine.barrier()
        return self.each(on_host, state)

    def as_checkpoint_part(self, part):
        return ShardedPart(part, self)

    def state_dict(self):
        """This rank's rows of the weights, and the buffers, by the plain network's names."""
        return {name: rows.detach() for name, rows in self.rows.items()} | dict(
            self.module.named_buffers()
        )

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def each(self, change, state, like=None):
        """A nested state with `change(tensor, like)` for each tensor shaped as a parameter `like`.

        The nearest key is that parameter's name or, in an optimizer, its number.
        """
        known = dict(enumerate(self.sharded.values())) | self.sharded
        if isinstance(state, dict):
            return {key: self.each(change, v, known.get(key, like)) for key, v in state.items()}
        changes = like is not None and isinstance(state, torch.Tensor) and state.ndim
        return change(state, like) if changes else state


def mixed_precision(dtype, compressed):
    """A stage's policy: weights are gathered in the autocast `dtype`, gradients summed in float32,
    or in bfloat16 if `compressed`.

    Autocast would cast the weights anyway, after twice the traffic. Inputs keep their type.
    """
    sums = torch.bfloat16 if compressed else torch.float32
    gathered = None if dtype == torch.float32 else dtype
    return MixedPrecisionPolicy(gathered, sums, cast_forward_inputs=False)


def all_gather_rows(rows, like):
    """The full tensor, on every rank, from rows that are distributed as those of `like` are."""
    world = like.device_mesh.size()
    most = -(-len(like) // world)  # rows of each rank, except the last one with any
    mine, full = (rows.new_zeros(n * most, *like.shape[1:]) for n in (1, world))
    mine[: len(rows)] = rows
    distributed.all_gather(list(full.chunk(world)), mine)
    return full[: len(like)].clone()


def local_shard(tensor, like):
    """This rank's rows of a full tensor; raises ValueError if its shape is not that of `like`."""
    if tensor.shape != like.shape:
        raise ValueError(
            f"the checkpoint has a tensor {tuple(tensor.shape)} in place of one "
            f"{tuple(like.shape)}; give the config that it was made with"
        )
    rank = like.device_mesh.get_local_rank()
    world = like.device_mesh.size()
    parts = tensor.chunk(world)
    return (parts[rank] if rank < len(parts) else tensor[:0]).clone()


class ShardedPart:
    """A part with a shard on each rank: all call `collect()`, then the main one `state_dict()`."""

    def __init__(self, part, network):
        self.part = part
        self.network = network
        self.state = None

    def collect(self):
        """Gather the full state on the main rank's host."""
        self.state = self.network.full_state_dict(self.part.state_dict())

    def state_dict(self):
        """The full tensors that `collect` gathered, once."""
        state = self.state
        self.state = None
        return state

    def load_state_dict(self, state):
        """Take this rank's rows of full tensors."""
        self.part.load_state_dict(self.network.each(local_shard, state))
