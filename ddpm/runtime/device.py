"""Where a run computes: device, number type and rank, decided once and printed with the reason.

Everything that differs between a laptop, a GPU and eight GPUs stands here; elsewhere there is no
device string, no autocast and no torch.distributed. One process is a world of one, for which every
collective is the identity.
"""

import contextlib
import os
import resource
import sys
from dataclasses import dataclass, field

import torch
import torch.distributed as distributed

from ddpm.runtime import gpus, prefetch, ranks
from ddpm.runtime.out_of_memory import Room
from ddpm.runtime.signals import StopRequest, StopTraining

AMP = ("auto", "off", "bf16", "fp16")
BENCHMARK = ("auto", "on", "off")


@dataclass(frozen=True)
class Machine:
    """`device`, autocast type `dtype` (float32 means off), `rank` of `world`; `notes` say why, a
    line each.

    `cpu_group` is the group in which ranks exchange what lies on the host, without going through
    the GPU. `stop` is the request to stop this process, `room` knows what fits into memory.
    """

    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    world: int = 1
    notes: list = field(default_factory=list)
    cpu_group: distributed.ProcessGroup | None = None
    stop: StopRequest = field(default_factory=StopRequest, compare=False)
    room: Room = field(default_factory=Room, compare=False)

    def __post_init__(self):
        self.room.check = self.stop.check

    @property
    def main(self):
        """True on the one rank that writes files and tracks."""
        return self.rank == 0

    def to_device(self, tensor):
        """The tensor on this device; the host does not wait for a copy to a GPU."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            # a copy from other memory waits for what the GPU is doing
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def autocast(self):
        """The context in which a network runs."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self):
        """A GradScaler that scales for float16 and does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def rank_slice(self, n):
        """The slice of n things that is this rank's, contiguous and in rank order."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def sum(self, tensor):
        """The sum of a tensor over ranks."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor

    def all_gather(self, value, leaving=False):
        """The values of all ranks, in rank order.

        Raises StopTraining on all ranks where one of them is `leaving` the work that they share.
        """
        if self.world == 1:
            return [value]
        gathered = [None] * self.world
        distributed.all_gather_object(gathered, (leaving, value), group=self.cpu_group)
        if any(leaves for leaves, _ in gathered):
            raise StopTraining(agreed=True)
        return [value for _, value in gathered]

    def leave(self, stopped):
        """Let the other ranks know of a StopTraining: they raise it at their next collective."""
        if self.world > 1 and not stopped.agreed:
            with contextlib.suppress(StopTraining):
                self.all_gather(None, leaving=True)

    def check_stop(self):
        """Raise StopTraining if a stop is requested and this process is alone: several ranks stop
        after the same step.
        """
        if self.world == 1:
            self.stop.check()

    def barrier(self):
        """Wait for all ranks."""
        self.all_gather(None)

    def gather(self, tensor):
        """The ranks' host tensors [n_i, ...] joined in rank order, on every rank."""
        return tensor if self.world == 1 else torch.cat(self.all_gather(tensor))

    def broadcast(self, value):
        """What rank 0 says: for decisions that hang on a clock or a file."""
        return self.all_gather(value)[0]

    @contextlib.contextmanager
    def raise_on_all_ranks(self):
        """A block without exchange between ranks, which all leave well or none does.

        Where a ValueError or OSError is raised on some of them, rank 0 raises the first one's, and
        the others exit with 2, quietly.
        """
        refused = None
        try:
            yield
        except (ValueError, OSError) as error:
            if self.world == 1:
                raise
            refused = error
        said = self.all_gather(refused and str(refused))
        first = next((rank for rank, words in enumerate(said) if words is not None), None)
        if first is None:
            return
        if not self.main:
            sys.exit(2)
        raise refused if first == 0 else ValueError(f"rank {first}: {said[first]}")

    def report_failure(self, words):
        """Leave word of why this rank fails; returns the words of the first that failed, which
        is why the others do.
        """
        if self.world == 1:
            return words
        with contextlib.suppress(Exception):  # of a store that went with the rank which held it
            return (
                distributed.distributed_c10d._get_default_store()
                .compare_set("failed", "", words)
                .decode()
            )
        return words

    def wait(self):
        """Let a GPU come to the end of what it was given to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory_format(self, side):
        """The memory format in which a network draws images of so many pixels a side fastest,
        where it was measured.
        """
        return (
            torch.channels_last
            if self.device.type == "cpu" and side >= 32
            else torch.contiguous_format
        )

    def prefetch(self, batches):
        """The same batches (images, labels); on a GPU, the images are copied there while those
        before are worked on.
        """
        return (
            prefetch.fetched_ahead(batches, self.device) if self.device.type == "cuda" else batches
        )

    def empty_cache(self):
        """Give back what the GPU's allocator holds and nothing uses."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak(self):
        """The operations a second, at most, of all ranks' GPUs together; 0 on a CPU and on
        GPUs that ddpm.GPUs lacks.
        """
        gpu = (
            gpus.gpu_of(torch.cuda.get_device_name(self.device))
            if self.device.type == "cuda"
            else None
        )
        return gpu.peak(self.dtype) * self.world if gpu else 0

    def free(self):
        """The bytes that are free on the GPU; None on a CPU, where other things decide how much
        a process may have.
        """
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None

    def memory(self):
        """Peak memory so far in GiB under its tracked keys."""
        # ru_maxrss counts bytes there, KiB elsewhere
        unit = 2**30 if sys.platform == "darwin" else 2**20
        use = {"memory/rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
        if self.device.type == "cuda":
            use["memory/vram_peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            use["memory/vram_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        return use


def round_float32(wanted):
    """Let a GPU round what float32 products and convolutions multiply to TF32's ten bits, or not.

    By torch's older switches alone: to read them is an error once its newer `fp32_precision` is set
    to something else.
    """
    torch.set_float32_matmul_precision("high" if wanted else "highest")
    torch.backends.cudnn.allow_tf32 = wanted


@contextlib.contextmanager
def exact():
    """Inside, float32 is float32 on a GPU too, without TF32; a decorator as well."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    round_float32(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def amp_dtype(amp, device):
    """The autocast type that `amp` (one of AMP) means on a device, and the reason in words."""
    if amp != "auto":
        return {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[
            amp
        ], "asked for by train.amp"
    if device.type != "cuda":
        return torch.float32, "no GPU"
    if computes_bf16(device):
        return torch.bfloat16, "the GPU computes bf16, which needs no loss scaling"
    return torch.float16, "the GPU has no bf16; losses are scaled"


def computes_bf16(device):
    """Whether a GPU computes bf16 itself. Of AMD's, torch says that all do: the architecture
    tells.
    """
    if torch.version.hip:
        return not torch.cuda.get_device_properties(device).gcnArchName.startswith(WITHOUT_BF16)
    return torch.cuda.is_bf16_supported(including_emulation=False)


# before MI100, and before RX 7000
WITHOUT_BF16 = ("gfx8", "gfx900", "gfx902", "gfx906", "gfx909", "gfx90c", "gfx10")


def busy_cores(device):
    """A note where other processes keep the cores busy and this one computes on several threads:
    lines, mostly none.

    Threads that spin while they wait for each other then compute a third as fast as threads that
    sleep, or slower.
    """
    load = os.getloadavg()[0]
    cores = os.cpu_count() or 1
    if (
        device.type != "cpu"
        or torch.get_num_threads() == 1
        or "OMP_WAIT_POLICY" in os.environ
        or load < 0.75 * cores
    ):
        return []
    return [
        f"other processes keep this machine busy (load {load:.1f} on {cores} cores): with "
        "OMP_WAIT_POLICY=PASSIVE before the command its threads do not spin while they wait, "
        "which can be several times as fast"
    ]


def start(amp="auto", deterministic=False, device=None, stop=None, cudnn_benchmark="auto"):
    """Decide device, type and rank, and set torch up for them; under torchrun, join the other
    ranks.

    `device` is a torch device string for those who must choose; by default the GPU of this rank,
    else the CPU. `stop` is the StopRequest of this process. `cudnn_benchmark`, one of BENCHMARK,
    is by default on unless `deterministic`. Raises ValueError where that device does not exist
    here, and for a rank that is no number.
    """
    # the name of torch 2.9 on, and that before
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        # or memory is fragmented as batch sizes change
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    rank, world, local = (
        ranks.number_in_environment(*one)
        for one in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = torch.device("cuda", local) if str(chosen) == "cuda" else chosen
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"device {device!r} is not to be had on this machine; use cpu"
            + (", cuda" if torch.cuda.is_available() else "")
        ) from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # first: what is asked of CUDA from here on is of this GPU
    dtype, reason = amp_dtype(amp, chosen)
    name = (
        torch.cuda.get_device_name(chosen)
        if chosen.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    notes = [
        f"device {chosen} ({name}), rank {rank} of {world}",
        f"networks compute in {dtype} ({reason})",
    ]
    if chosen.type == "cuda":
        torch.backends.cudnn.benchmark = (
            cudnn_benchmark == "on" or cudnn_benchmark == "auto" and not deterministic
        )
    round_float32(chosen.type == "cuda" and dtype != torch.float32)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    cpu_group = None
    if world > 1:
        if not distributed.is_initialized():
            ranks.join("nccl" if chosen.type == "cuda" else "gloo")
        cpu_group = distributed.new_group(backend="gloo", timeout=ranks.PATIENCE)
    notes += busy_cores(chosen)
    return Machine(chosen, dtype, rank, world, notes, cpu_group, stop or StopRequest())
