"""Counters of a training on its device, and its speed, read only when something is logged."""

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import InitVar, dataclass

import torch


def portion(share, of=""):
    """A share in words: `"4.9%"`, followed by `of`, or from 1.05 on `"1.4 times"` or `"twice"`."""
    if share < 1.05:
        return f"{share:.1%}{of}"
    times = f"{share:,.0f}" if share >= 10 else f"{share:.2g}"
    return "twice" if times == "2" else f"{times} times"


WARM_UP = 3  # steps in which a process sets up kernels and memory


class Stopwatch:
    """Seconds of work without pauses; `lap()` returns them and starts again."""

    def __init__(self, now=time.monotonic):
        self.now = now
        self.start = now()
        self.paused = 0.0

    @contextlib.contextmanager
    def pause(self):
        """The context whose time does not count."""
        entered = self.now()
        yield
        self.paused += self.now() - entered

    def read(self):
        """The seconds since the last lap."""
        return self.now() - self.start - self.paused

    def lap(self):
        seconds = self.read()
        self.start = self.now()
        self.paused = 0.0
        return seconds


@dataclass
class Speed:
    """Images and steps a second, and the shares of time spent waiting for images and noise.

    The first WARM_UP steps of a process and pauses do not count; `wait()` waits for the device, and
    `noise_seconds()` returns the seconds that all steps have waited for random numbers.
    With `peak`, the devices' operations a second, also model FLOPs utilization (Chowdhery et al.
    2022, appendix B: activations computed again do not count).
    """

    batch_size: int
    dataset_size: int
    flops_per_image: float = 0
    peak: float = 0
    wait: Callable[[], None] = lambda: None
    noise_seconds: Callable[[], float] = float
    now: InitVar[Callable[[], float]] = time.monotonic

    def __post_init__(self, now):
        self.watch = Stopwatch(now)
        self.pause = self.watch.pause
        self._reset()
        self.rate = None  # images a second, as of the last reading

    def _reset(self):
        self.steps = 0
        self.waited = 0.0
        self.noise_before = self.noise_seconds()

    def timed(self, batches):
        """Yield the same batches and measure the wait for each."""
        batches = iter(batches)
        for count in itertools.count():
            if count == WARM_UP:
                self.wait()
                self.watch.lap()
                self._reset()
            before = self.watch.now()
            batch = next(batches, None)
            self.waited += self.watch.now() - before
            if batch is None:
                return
            self.steps += count >= WARM_UP
            yield batch

    def progress(self, done):
        """Epochs, images and 10^15 operations (forward and backward) after `done` steps."""
        images = done * self.batch_size
        return {
            "progress/epoch": images / self.dataset_size,
            "progress/images": images,
            "progress/petaflop": images * self.flops_per_image / 1e15,
        }

    def seconds(self, images):
        """The seconds that the training takes for `images` at the speed last measured, or None."""
        now = self.steps * self.batch_size / max(self.watch.read(), 1e-9)
        rate = self.rate or now
        return images / rate if rate else None

    def read(self, done):
        """The rates since the last reading, if a step counts, and progress after `done` steps."""
        seconds = max(self.watch.lap(), 1e-9)
        steps = self.steps
        if not steps:
            return self.progress(done)
        rate = self.rate = steps * self.batch_size / seconds
        readings = {
            "speed/images_per_second": rate,
            "speed/step_ms": 1000 * seconds / steps,
            "speed/loader_wait": self.waited / seconds,
            "speed/noise_wait": (self.noise_seconds() - self.noise_before) / seconds,
            "progress/epoch_seconds": self.dataset_size / rate,
        }
        if self.peak:
            readings["speed/mfu"] = rate * self.flops_per_image / self.peak
        self._reset()
        return readings | self.progress(done)


QUARTILES = 4
LOGGED = "loss", "count", "steps"  # what Meters sums from one log to the next
PER_RANK = "loss", "count", "since"  # and what each rank sums for itself
HELD = 64  # micro-batches whose losses are summed at once: sums of each would delay the host


class Meters:
    """Sums over the steps since the last log, on the device; a checkpoint part.

    Each rank sums for its own images `loss` and `count` [4] by quartile of t, and loss and count
    [2] `since` the last choice of the best weights. `steps` [4] is the same on all ranks: steps,
    gradient norms of those not skipped, skipped steps, and spikes among them. What is added stays
    in lists until it is read or HELD is reached.
    """

    def __init__(self, timesteps, machine):
        self.timesteps = timesteps
        self.machine = machine
        sizes = {"loss": QUARTILES, "count": QUARTILES, "since": 2, "steps": 4}
        self.sums = {name: torch.zeros(n, device=machine.device) for name, n in sizes.items()}
        self.losses = []  # (t, losses) of a micro-batch
        self.steps = []  # (norm, skipped, spike) of a step

    def add_losses(self, t, losses):
        self.losses.append((t, losses.detach()))

    def add_step(self, norm, skipped, spike):
        self.steps.append((norm, skipped, spike))
        if len(self.losses) >= HELD:
            self.sum_up()

    def forget(self, count):
        """Drop all but the first `count` of the micro-batches in `losses`."""
        del self.losses[count:]

    def sum_up(self):
        """Add what was held to the sums, in the order of the steps."""
        if self.losses:
            times, losses = zip(*self.losses, strict=True)
            t = torch.cat(times)
            quartile = t * QUARTILES // self.timesteps
            self.sums["loss"].index_add_(0, quartile, torch.cat(losses))
            self.sums["count"].index_add_(0, quartile, torch.ones(len(t), device=t.device))
            add_in_order(self.sums["since"][:1], torch.stack([each.sum() for each in losses]))
            self.sums["since"][1] += len(t)
            self.losses.clear()
        if self.steps:
            norm, skipped, spike = map(torch.stack, zip(*self.steps, strict=True))
            add_in_order(self.sums["steps"][1:2], norm.masked_fill(skipped, 0))
            self.sums["steps"][0] += len(norm)
            self.sums["steps"][2:] += torch.stack([skipped, spike]).sum(1)
            self.steps.clear()

    def read(self):
        """The means under their tracked keys; the host waits for the device here."""
        self.sum_up()
        loss, count = (
            self.machine.sum(self.sums[name].clone()).tolist() for name in ("loss", "count")
        )
        steps, norm, skipped, spikes = self.sums["steps"].tolist()
        mean = {"train/loss": sum(loss) / max(sum(count), 1)}
        mean |= {f"train/loss_q{q}": loss[q] / count[q] for q in range(QUARTILES) if count[q]}
        mean |= {"train/skipped_steps": skipped, "train/spikes": spikes}
        return mean | {"train/grad_norm": norm / max(steps - skipped, 1)}

    def loss_since(self):
        """The mean loss since the last choice of the best weights; the host waits here."""
        self.sum_up()
        loss, count = self.machine.sum(self.sums["since"].clone()).tolist()
        return loss / max(count, 1)

    def reset(self, *names):
        """Set these sums to zero."""
        self.sum_up()
        for name in names:
            self.sums[name].zero_()

    def collect(self):
        """Sum over ranks on the main one, whose state is saved."""
        self.sum_up()
        for name in PER_RANK:
            self.sums[name] = self.machine.sum(self.sums[name]) * self.machine.main

    def state_dict(self):
        self.sum_up()
        return dict(self.sums)

    def load_state_dict(self, state):
        self.losses.clear()
        self.steps.clear()
        for name, total in self.sums.items():
            total.copy_(state.get(name, torch.zeros_like(total)))  # `since` is of 2026-12
        for name in PER_RANK:
            self.sums[name] *= self.machine.main


def add_in_order(total, values):
    """Add the values [n] to total [1] one after another, as adding each at its step would."""
    index = torch.zeros(len(values), dtype=torch.long, device=values.device)
    total.index_add_(0, index, values)
