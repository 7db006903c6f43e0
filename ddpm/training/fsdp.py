"""A network too large for one GPU, shared out over ranks by torch's fully_shard (FSDP2), as the
training step sees it.

Each rank keeps its rows of every tensor: of weights, gradients, averages and the optimiser's state.
Stages of the network come together one at a time, while they compute. Files hold whole tensors, so
that a run goes on with or without sharding and on any number of ranks.

    rows [r, ...]: a rank's part along the first axis, in rank order; some ranks may have none
"""

import contextlib
import itertools

import torch
import torch.distributed as distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.nn.utils import get_total_norm

from ddpm.training.network import TrainNetwork


class ShardedNetwork(TrainNetwork):
    """A TrainNetwork whose `net` has tensors only inside `whole()`: between, it is on "meta", and
    `learner`, a twin, has rows.

    The optimiser and averages work on the rows as plain tensors, to which they do the same as to
    whole ones.
    """

    # stages come together in each micro-step: a rank without room would leave the others waiting
    rehearses = False

    def __init__(self, net, learner, machine):
        super().__init__(net, machine)
        mesh = init_device_mesh(machine.device.type, (machine.world,))
        for stage in (*itertools.chain(*learner.levels), learner):
            fully_shard(stage, mesh=mesh)
        self.learner = self.asked = learner
        self.sharded = dict(learner.named_parameters())
        self.rows = {
            name: torch.nn.Parameter(one.to_local().detach()) for name, one in self.sharded.items()
        }
        self.weights, self.parameters = self, list(self.rows.values())

    @property
    def wrapped(self):
        return self.learner

    def accumulating(self, more):
        """Every micro-step exchanges gradients: kept whole until the last, they would take the
        room that is to be saved.
        """
        return contextlib.nullcontext()

    def scaler(self):
        return ShardedGradScaler(
            self.machine.device.type, enabled=self.machine.dtype == torch.float16
        )

    def collect(self):
        for rows, one in zip(self.parameters, self.sharded.values(), strict=True):
            rows.grad = None if one.grad is None else one.grad.to_local()
            one.grad = None

    def norm(self, others=()):
        mine, same = (
            get_total_norm([one.grad for one in some if one.grad is not None]).to(
                self.machine.device
            )
            for some in (self.parameters, others)
        )
        return (self.machine.sum(mine**2) + same**2).sqrt()

    @contextlib.contextmanager
    def whole(self):
        self.machine.barrier()  # none has left, who would be waited for
        self.net.load_state_dict(self.each(brought, self.state_dict()), assign=True)
        self.asked = self.net
        try:
            yield
        finally:
            self.asked = self.learner
            self.net.to("meta")

    def gathered(self, state):
        def on_host(rows, like):
            tensor = brought(rows, like)
            return tensor.cpu() if self.machine.main else None

        self.machine.barrier()
        return self.each(on_host, state)

    def part(self, part):
        return Gathered(part, self)

    def state_dict(self):
        """This rank's rows of the weights, and the buffers, by the plain network's names."""
        return {name: rows.detach() for name, rows in self.rows.items()} | dict(
            self.learner.named_buffers()
        )

    @torch.no_grad()
    def load_state_dict(self, state):
        for name, value in self.state_dict().items():
            value.copy_(state[name])

    def each(self, change, state, like=None):
        """A nested state with `change(tensor, like)` in place of each tensor that has the shape of
        a parameter `like`.

        The nearest key says which that is: the parameter's name or, in an optimiser, its number.
        """
        known = dict(enumerate(self.sharded.values())) | self.sharded
        if isinstance(state, dict):
            return {
                key: self.each(change, value, known.get(key, like)) for key, value in state.items()
            }
        return (
            change(state, like)
            if like is not None and isinstance(state, torch.Tensor) and state.ndim
            else state
        )


def brought(rows, like):
    """The whole tensor, on every rank, of which ranks have the rows that they have of the
    sharded tensor `like`.
    """
    world = like.device_mesh.size()
    most = -(-len(like) // world)  # the ranks have as many, but for the last that have any
    mine, whole = (rows.new_zeros(n * most, *like.shape[1:]) for n in (1, world))
    mine[: len(rows)] = rows
    distributed.all_gather(list(whole.chunk(world)), mine)
    return whole[: len(like)].clone()


def rows_of(tensor, like):
    """This rank's rows of a whole tensor. Raises ValueError for one of another shape than
    `like`.
    """
    if tensor.shape != like.shape:
        raise ValueError(
            f"the checkpoint has a tensor {tuple(tensor.shape)} in place of one "
            f"{tuple(like.shape)}; give the config that it was made with"
        )
    rank = like.device_mesh.get_local_rank()
    world = like.device_mesh.size()
    parts = tensor.chunk(world)
    return (parts[rank] if rank < len(parts) else tensor[:0]).clone()


class Gathered:
    """A checkpoint's part that ranks have shared out: `collect()` on all of them, then
    `state_dict()` on the main one.
    """

    def __init__(self, part, network):
        self.part = part
        self.network = network
        self.state = None

    def collect(self):
        """Bring what is saved together on the main rank's host."""
        self.state = self.network.gathered(self.part.state_dict())

    def state_dict(self):
        """What was collected, whole tensors, which are forgotten here."""
        state = self.state
        self.state = None
        return state

    def load_state_dict(self, state):
        """Take this rank's rows of whole tensors."""
        self.part.load_state_dict(self.network.each(rows_of, state))
