"""Where a run computes: device, number type and rank, decided once and printed with the reason.

Everything that differs between a laptop, a card and eight cards stands here; elsewhere there is no device string, no autocast
and no torch.distributed. One process is a world of one, for which every collective is the identity.
"""

import contextlib
import itertools
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property

import torch
import torch.distributed as distributed
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from ddpm import cards
from ddpm.interrupt import Interrupted, Wish
from ddpm.room import Room, ran_out

AMP = ("auto", "off", "bf16", "fp16")
BENCHMARK = ("auto", "on", "off")
PATIENCE = timedelta(minutes=30)  # that ranks wait for one which works alone, as on the features of the real images
COMPILER = "inductor"  # torch's own
GRAPHS = 64  # that it makes of one network, at most
LEARNING = {"options": {"fallback_random": True}}  # how it compiles: dropout draws what it draws without it
DRAWING = {"mode": "reduce-overhead"}  # on a card CUDA graphs, in which an answer is overwritten by the next


@dataclass(frozen=True)
class Machine:
    """`device`, autocast type `dtype` (float32 means off), `rank` of `world`; `notes` say why, a line each.

    `hosts` is the group in which ranks exchange what lies on the host, without going through the card. `wish` knows whether
    this process is asked to stop, `room` what fits into memory.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    notes: list = field(default_factory=list)
    hosts: distributed.ProcessGroup | None = None
    wish: Wish = field(default_factory=Wish, compare=False)
    room: Room = field(default_factory=Room, compare=False)

    @property
    def main(self):
        """True on the one rank that writes files and tracks."""
        return self.rank == 0

    def put(self, tensor):
        """The tensor on this device; the host does not wait for a copy to a card."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            tensor = tensor.pin_memory()  # a copy from other memory waits for what the card is doing
        return tensor.to(self.device, non_blocking=True)

    def autocast(self):
        """The context in which a network runs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self):
        """A GradScaler that scales for float16 and does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def share(self, n):
        """The slice of n things that is this rank's, contiguous and in rank order."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def sum(self, tensor):
        """The sum of a tensor over ranks."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor

    def exchange(self, value, left=False):
        """What each rank says, in rank order. Raises Interrupted on all ranks where one has `left` the work they share."""
        if self.world == 1:
            return [value]
        said = [None] * self.world
        with self.wish.whole():
            distributed.all_gather_object(said, (left, value), group=self.hosts)
            if any(gone for gone, _ in said):
                raise Interrupted(told=True)
        return [value for _, value in said]

    def leave(self, interrupted):
        """Come together with the others after Interrupted: they hear of it when they exchange something next."""
        if self.world > 1 and not interrupted.told:
            with contextlib.suppress(Interrupted):
                self.exchange(None, left=True)

    def waiting(self):
        """The context of waiting for a batch: alone it may be abandoned; several ranks stop after the same step."""
        return self.wish.abandonable() if self.world == 1 else contextlib.nullcontext()

    def gather(self, tensor):
        """The ranks' host tensors [n_i, ...] joined in rank order, on every rank."""
        return tensor if self.world == 1 else torch.cat(self.exchange(tensor))

    def agree(self, value):
        """What rank 0 says: for decisions that hang on a clock or a file."""
        return self.exchange(value)[0]

    @contextlib.contextmanager
    def together(self):
        """A block without exchange between ranks, which all leave well or none does.

        Where a ValueError or OSError is raised on some of them, rank 0 raises the first one's, and the others exit with 2,
        quietly.
        """
        refused = None
        try:
            yield
        except (ValueError, OSError) as error:
            if self.world == 1:
                raise
            refused = error
        said = self.exchange(refused and str(refused))
        first = next((rank for rank, words in enumerate(said) if words is not None), None)
        if first is None:
            return
        if not self.main:
            sys.exit(2)
        raise refused if first == 0 else ValueError(f"rank {first}: {said[first]}")

    def cause(self, words):
        """Leave word of why this rank fails; returns the words of the first that failed, which is why the others do."""
        if self.world == 1:
            return words
        with contextlib.suppress(Exception):  # of a store that went with the rank which held it
            return distributed.distributed_c10d._get_default_store().compare_set("failed", "", words).decode()
        return words

    def wait(self):
        """Let a card come to the end of what it was given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def layout(self, side):
        """The memory format in which a network draws images of so many pixels a side fastest, where it was measured."""
        return torch.channels_last if self.device.type == "cpu" and side >= 32 else torch.contiguous_format

    def ahead(self, batches):
        """The same batches (images, labels); on a card, the images are copied there while those before are worked on."""
        return fetched_ahead(batches, self.device) if self.device.type == "cuda" else batches

    def release(self):
        """Give back what the card's allocator holds and nothing uses."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak(self):
        """The operations a second, at most, of all ranks' cards together; 0 on a CPU and on cards that ddpm.cards lacks."""
        card = cards.card_of(torch.cuda.get_device_name(self.device)) if self.device.type == "cuda" else None
        return card.peak(self.dtype) * self.world if card else 0

    def free(self):
        """The bytes that are free on the card; None on a CPU, where other things decide how much a process may have."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None

    def memory(self):
        """Peak memory so far in GiB under its tracked keys."""
        unit = 2**30 if sys.platform == "darwin" else 2**20  # ru_maxrss counts bytes there, KiB elsewhere
        use = {"memory/rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
        if self.device.type == "cuda":
            use["memory/vram_peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            use["memory/vram_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        return use


def fetched_ahead(batches, device):
    """Yield (images on a card, labels on the host), the copies going beside what the card computes, one batch ahead."""
    beside, here, batches = torch.cuda.Stream(device), torch.cuda.current_stream(device), iter(batches)

    def fetch():
        with torch.cuda.stream(beside):
            return [(images.to(device, non_blocking=True), labels) for images, labels in itertools.islice(batches, 1)]

    coming = fetch()
    while coming:
        here.wait_stream(beside)
        images, labels = coming.pop()
        images.record_stream(here)  # or their memory would be given away while they are in use
        coming = fetch()
        yield images, labels


class StepNetwork:
    """The network as the training step sees it: autocast around it, gradients averaged over ranks, float32 out.

    EMA, checkpoint and everything else keep the plain module, so no wrapper's name reaches a file; validation, in evaluation
    mode and without gradients, asks the plain module, so that it compiles nothing more. `parameters` are what an optimiser
    changes, `weights.state_dict()` what is averaged, `learner` is the module whose layers learn. `say(text)` hears
    of what the compiler cannot do.
    """

    rehearses = True  # ranks can try a micro-step each for itself: inside `accumulating(more=True)` none waits for another

    def __init__(self, net, machine):
        self.net, self.machine, self.asked, self.fast, self.say = net, machine, net, None, print
        self.weights, self.learner, self.parameters = net, net, list(net.parameters())

    @cached_property
    def wrapped(self):
        """The network that learns, made when it is asked first: ranks wait for each other there."""
        return DistributedDataParallel(self.net) if self.machine.world > 1 else self.net

    def __call__(self, x, t, y=None, **told):
        fast = self.fast is not None and self.net.training  # self-conditioning's own estimate too
        with self.machine.autocast():
            return (self.learning if fast or torch.is_grad_enabled() else self.asked)(x, t, y, **told).float()

    def learning(self, *given, **told):
        """What the network says that learns: compiled, as long as the compiler can do what it has not seen yet."""
        try:
            return (self.wrapped if self.fast is None else self.fast)(*given, **told)
        except Exception as error:  # a compiler has many
            if self.fast is None or of_kernels(error):
                raise
            self.give_up(error)
        return self.wrapped(*given, **told)

    def give_up(self, error):
        """Learn without the compiler, which has failed so."""
        self.compiled(False)
        self.say(f"the network is not compiled, as torch.compile failed: {first_words(error)}")

    def train(self):
        self.wrapped.train()

    def accumulating(self, more):
        """The context of a micro-step: ranks exchange gradients only when no more micro-steps follow."""
        return self.wrapped.no_sync() if more and self.machine.world > 1 else contextlib.nullcontext()

    def compiled(self, wanted=True):
        """From now on, or no longer, learn through torch.compile, which does its work when it is asked first."""
        self.fast = through(self.wrapped, LEARNING) if wanted else None

    def scaler(self):
        """A GradScaler that scales for float16 and does nothing otherwise."""
        return self.machine.scaler()

    def collect(self):
        """Bring the gradients to where the optimiser looks for them."""

    def norm(self, others=()):
        """The norm of the gradients of the network and of `others`, parameters that are the same on all ranks."""
        return get_total_norm([one.grad for one in (*self.parameters, *others) if one.grad is not None])

    def whole(self):
        """The context in which the plain network has the weights, to draw and to measure with."""
        return contextlib.nullcontext()

    def gathered(self, state):
        """A state as it is without ranks, on the main one; the others take part and get nothing of use."""
        return state

    def part(self, part):
        """A checkpoint's part that holds weights, or what there is for each of them, as files have it."""
        return part


class Compiled:
    """A network net(x, t, y) asked often, without gradients: through torch.compile and, on a card, CUDA graphs.

    The first question takes the time of compiling it, which `say(text)` is told. Where that fails, and for batches of other
    `sizes`, each of which would take as long again, the plain network answers.
    """

    def __init__(self, net, sizes, say=print):
        self.net, self.sizes, self.say = net, sizes, say
        self.fast, self.fresh = through(net, DRAWING), True

    def __call__(self, x, t, y=None):
        if self.fast is None or len(x) not in self.sizes:
            return self.net(x, t, y)
        begun = time.monotonic()
        try:
            out = self.fast(x, t, y).clone()
            if self.fresh:
                self.say(f"the network was compiled for drawing in {time.monotonic() - begun:.0f} s")
                self.fresh = False
            return out
        except Exception as error:  # a compiler has many
            if of_kernels(error):
                raise
            self.say(f"drawing with the plain network, as torch.compile failed: {first_words(error)}")
            self.fast = None
            return self.net(x, t, y)

    def eval(self):
        self.net.eval()


def through(net, how):
    """A network through torch.compile, which makes a graph for each size of batch.

    By default it makes one for all sizes from the second on, whose kernels are slower. Learning and drawing, with labels and
    without, share the limit of graphs, beyond which torch runs the plain network and says nothing.
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    return torch.compile(net, backend=COMPILER, dynamic=False, **(how if COMPILER == "inductor" else {}))


def of_kernels(error):
    """Whether an exception is of the computation, as that memory runs out or CUDA fails, and not of the compiler.

    Kernels raise RuntimeError itself, where they raise no class below; compilers have classes of their own.
    """
    of_cuda = getattr(torch, "AcceleratorError", RuntimeError)  # of torch 2.8 on
    return ran_out(error) or type(error) in (RuntimeError, of_cuda)


def first_words(error):
    """What an exception says first, with its type: compilers add pages."""
    return " ".join([type(error).__name__, *str(error).split()])[:200]


def round_float32(wanted):
    """Let a GPU round what float32 products and convolutions multiply to TF32's ten bits, or not.

    By torch's older switches alone: to read them is an error once its newer `fp32_precision` is set to something else.
    """
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted


@contextlib.contextmanager
def exact():
    """Inside, float32 is float32 on a GPU too, without TF32; a decorator as well."""
    products, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    round_float32(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def amp_dtype(amp, device):
    """The autocast type that `amp` (one of AMP) means on a device, and the reason in words."""
    if amp != "auto":
        return {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp], "asked for by train.amp"
    if device.type != "cuda":
        return torch.float32, "no card"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "the card computes bf16, which needs no loss scaling"
    return torch.float16, "the card has no bf16; losses are scaled"


def busy_cores(device):
    """A note where other processes keep the cores busy and this one computes on several threads: lines, mostly none.

    Threads that spin while they wait for each other then compute a third as fast as threads that sleep, or slower.
    """
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if device.type != "cpu" or torch.get_num_threads() == 1 or "OMP_WAIT_POLICY" in os.environ or load < 0.75 * cores:
        return []
    return [f"other processes keep this machine busy (load {load:.1f} on {cores} cores): with OMP_WAIT_POLICY=PASSIVE before "
            "the command its threads do not spin while they wait, which can be several times as fast"]


def start(amp="auto", deterministic=False, device=None, wish=None, cudnn_benchmark="auto"):
    """Decide device, type and rank, and set torch up for them; under torchrun, join the other ranks.

    `device` is a torch device string for those who must choose; by default the card of this rank, else the CPU. `wish` hears
    what asks this process to stop. `cudnn_benchmark`, one of BENCHMARK, is by default on unless `deterministic`. Raises
    ValueError where that device does not exist here, and for a rank that is no number.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:  # the name of torch 2.9 on, and that before
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"  # or memory is fragmented as batch sizes change
    rank, world, local = (number_in_environment(*one) for one in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = torch.device("cuda", local) if str(chosen) == "cuda" else chosen
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {device!r} is not to be had on this machine; use cpu" +
                         (", cuda" if torch.cuda.is_available() else "")) from None
    dtype, reason = amp_dtype(amp, chosen)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{torch.get_num_threads()} threads"
    notes = [f"device {chosen} ({name}), rank {rank} of {world}", f"networks compute in {dtype} ({reason})"]
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = cudnn_benchmark == "on" or cudnn_benchmark == "auto" and not deterministic
    round_float32(chosen.type == "cuda" and dtype != torch.float32)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    hosts = None
    if world > 1:
        if not distributed.is_initialized():
            join("nccl" if chosen.type == "cuda" else "gloo")
        hosts = distributed.new_group(backend="gloo", timeout=PATIENCE)
    notes += busy_cores(chosen)
    return Machine(chosen, dtype, rank, world, notes, hosts, wish or Wish())


def number_in_environment(name, default):
    """The number that torchrun or a scheduler's script gives; raises ValueError for what is none."""
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise ValueError(f"{name} is {text!r} in the environment and must be a number, as torchrun sets it; unset it")
    return int(text)


def join(backend):
    """Meet the other ranks where the environment says, each time anew.

    torchrun's store outlives the ranks, and would tell those that it starts again where the dead ones were (pytorch issue
    135712). On one node its count of restarts tells them apart; nodes may count differently, and do without the store (README).
    """
    store, rank, world = next(rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = distributed.PrefixStore(f"start {os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    distributed.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=PATIENCE)


def restarted():
    """True under torchrun, which starts the ranks again, or reports an error, where they exit with another code than 0."""
    return distributed.is_torchelastic_launched()


def abandon(code):
    """End this process at once, where others are gone: leaving in order would wait for them."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def stop():
    """Leave the other ranks in order."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
