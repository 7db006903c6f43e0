"""Device, dtype and rank of a run, decided once and printed with the reason.

All differences between a laptop, one GPU and eight GPUs are here. With a world size of one, every
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


@dataclass(frozen=True)
class Machine:
    """`device`, autocast `dtype` (float32: off), `rank` and world size `world`.

    `notes` are lines that give the reasons. `cpu_group` is the process group for objects on the
    host. `stop` is the request to stop this process; `room` splits batches that do not fit.
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
        """True on rank 0, which writes files and tracks."""
        return self.rank == 0

    def to_device(self, tensor):
        """The tensor on this device; a copy to a GPU is asynchronous."""
        if self.device.type == "cuda" and tensor.device.type == "cpu":
            # a copy from pageable memory waits for the GPU
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def autocast(self):
        """The autocast context for a network."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def scaler(self):
        """A GradScaler, enabled for float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def rank_slice(self, n):
        """The slice of n items that this rank works on, contiguous and in rank order."""
        return slice(n * self.rank // self.world, n * (self.rank + 1) // self.world)

    def sum(self, tensor):
        """The sum of a tensor over ranks, in place."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor

    def all_gather(self, value, leaving=False):
        """The values of all ranks in order; raises StopTraining on all if one is `leaving`."""
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
        """Raise StopTraining if requested and alone: several ranks stop after the same step."""
        if self.world == 1:
            self.stop.check()

    def barrier(self):
        """Wait for all ranks."""
        self.all_gather(None)

    def gather(self, tensor):
        """Concatenate the ranks' host tensors [n_i, ...], in rank order, on every rank."""
        return tensor if self.world == 1 else torch.cat(self.all_gather(tensor))

    def broadcast(self, value):
        """The value of rank 0, for decisions that depend on a clock or a file."""
        return self.all_gather(value)[0]

    @contextlib.contextmanager
    def raise_on_all_ranks(self):
        """Context for a block without collectives that must succeed on all ranks or on none.

        On a ValueError or OSError, rank 0 raises that of the lowest rank, and others exit with 2.
        """
        refusal = None
        try:
            yield
        except (ValueError, OSError) as error:
            if self.world == 1:
                raise
            refusal = error
        messages = self.all_gather(refusal and str(refusal))
        first = next((rank for rank, text in enumerate(messages) if text is not None), None)
        if first is None:
            return
        if not self.main:
            sys.exit(2)
        raise refusal if first == 0 else ValueError(f"rank {first}: {messages[first]}")

    def report_failure(self, reason):
        """Record why this rank fails; returns the first reason recorded, the root cause."""
        if self.world == 1:
            return reason
        with contextlib.suppress(Exception):  # the store ends with the rank that holds it
            store = distributed.distributed_c10d._get_default_store()
            return store.compare_set("failed", "", reason).decode()
        return reason

    def wait(self):
        """Synchronize with the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def memory_format(self, side):
        """The memory format that was measured fastest for sampling images of `side` pixels."""
        on_cpu = self.device.type == "cpu"
        return torch.channels_last if on_cpu and side >= 32 else torch.contiguous_format

    def prefetch(self, batches):
        """The same batches (images, labels); images are copied to a GPU one batch ahead."""
        if self.device.type != "cuda":
            return batches
        return prefetch.fetched_ahead(batches, self.device)

    def random_numbers(self, seed, depth=1):
        """RandomNumbers, drawn `depth` steps ahead by threads where a GPU computes the network."""
        if self.device.type != "cuda":  # the network needs all cores
            return prefetch.RandomNumbers(seed)
        cores = (os.cpu_count() or 1) // ranks.number_in_environment("LOCAL_WORLD_SIZE", 1)
        return prefetch.RandomNumbers(seed, depth, min(max(cores // 2, 1), 4), pin=True)

    def empty_cache(self):
        """Return unused cached memory to the GPU."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def peak(self):
        """Peak operations per second of all ranks' GPUs; 0 on a CPU or an unknown GPU."""
        if self.device.type != "cuda":
            return 0
        gpu = gpus.gpu_of(torch.cuda.get_device_name(self.device))
        return gpu.peak(self.dtype) * self.world if gpu else 0

    def free(self):
        """Free bytes on the GPU; None on a CPU."""
        return torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else None

    def lacks_memory(self):
        """Whether a GPU has less free than this process needs at its peak; False on a CPU."""
        if self.device.type != "cuda":
            return False
        self.empty_cache()
        peak = torch.cuda.max_memory_allocated(self.device)
        return self.free() < peak - torch.cuda.memory_allocated(self.device)

    def reset_peak(self):
        """Forget the most bytes that torch has reserved on the GPU, and return them; 0 on a CPU."""
        if self.device.type != "cuda":
            return 0
        peak = torch.cuda.max_memory_reserved(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        return peak

    def memory(self):
        """Peak memory of this process in GiB, by tracked key."""
        # ru_maxrss is in bytes on macOS, in KiB elsewhere
        unit = 2**30 if sys.platform == "darwin" else 2**20
        use = {"memory/rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit}
        if self.device.type == "cuda":
            use["memory/vram_peak_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
            use["memory/vram_reserved_gib"] = torch.cuda.max_memory_reserved(self.device) / 2**30
        return use


def round_float32(tf32):
    """Switch TF32 for float32 matrix products and convolutions on or off.

    Uses torch's older switches only: reading them raises once `fp32_precision` is set differently.
    """
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32


@contextlib.contextmanager
def exact():
    """Context or decorator that switches TF32 off."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    round_float32(False)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def amp_dtype(amp, device):
    """The autocast dtype for `amp` (one of AMP) on a device, and the reason in words."""
    if amp != "auto":
        dtypes = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
        return dtypes[amp], "set by train.amp"
    if device.type != "cuda":
        return torch.float32, "no GPU"
    if computes_bf16(device):
        return torch.bfloat16, "the GPU computes bf16, which needs no loss scaling"
    return torch.float16, "the GPU has no bf16; losses are scaled"


def computes_bf16(device):
    """Whether a GPU has bf16 arithmetic; torch says so of every AMD GPU, older ones included."""
    if torch.version.hip:
        return not torch.cuda.get_device_properties(device).gcnArchName.startswith(WITHOUT_BF16)
    return torch.cuda.is_bf16_supported(including_emulation=False)


# AMD architectures before MI100 and before RX 7000
WITHOUT_BF16 = ("gfx8", "gfx900", "gfx902", "gfx906", "gfx909", "gfx90c", "gfx10")


def busy_cores(device):
    """Advice, if any, for a busy machine, where threads that spin are a third as fast, or less."""
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


def start(amp="auto", deterministic=False, device=None, stop=None):
    """Choose device, dtype and rank, configure torch and join the other ranks under torchrun.

    `device` is a torch device string, by default this rank's GPU, else the CPU. `stop` is the
    StopRequest of this process. cuDNN tries its convolutions for the fastest unless
    `deterministic`. Raises ValueError for a device that is not available and an invalid rank.
    """
    # the first is the name from torch 2.9 on
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}:
        # or changing batch sizes fragment the memory
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    rank, world, local = (
        ranks.number_in_environment(name, default)
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        chosen = torch.device("cuda", local) if str(chosen) == "cuda" else chosen
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError):
        raise ValueError(
            f"device {device!r} is not available on this machine; use cpu"
            + (" or cuda" if torch.cuda.is_available() else "")
        ) from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)  # first: calls to CUDA below concern this GPU
    dtype, reason = amp_dtype(amp, chosen)
    on_gpu = chosen.type == "cuda"
    name = torch.cuda.get_device_name(chosen) if on_gpu else f"{torch.get_num_threads()} threads"
    notes = [
        f"device {chosen} ({name}), rank {rank} of {world}",
        f"networks compute in {dtype} ({reason})",
    ]
    if on_gpu:
        torch.backends.cudnn.benchmark = not deterministic
    round_float32(on_gpu and dtype != torch.float32)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    cpu_group = None
    if world > 1:
        if not distributed.is_initialized():
            ranks.join("nccl" if on_gpu else "gloo")
        cpu_group = distributed.new_group(backend="gloo", timeout=ranks.PATIENCE)
    notes += busy_cores(chosen)
    return Machine(chosen, dtype, rank, world, notes, cpu_group, stop or StopRequest())
