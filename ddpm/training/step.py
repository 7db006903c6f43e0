"""One step of training, and what it measures.

    images uint8 [b, c, h, w] and labels int64 [b], -1 for none, from the loader; x0 in
    [-1, 1]; t [b] int64
    `step` counts from 0

Random numbers (times, noise, flips, dropped labels, dropout) are addressed by (seed, step, place in
the effective batch): a resumed run continues exactly, and micro-batches and ranks change nothing.
"""

import math
from collections.abc import Callable
from dataclasses import InitVar, dataclass
from functools import partial
from typing import Any

import torch

from ddpm.common import pixels as common_pixels
from ddpm.common import rng
from ddpm.data import augment
from ddpm.diffusion.ddpm import DDPM
from ddpm.runtime.device import Machine
from ddpm.runtime.out_of_memory import BatchDoesNotFit
from ddpm.training.ema import EMA
from ddpm.training.meters import Meters
from ddpm.training.stability import StabilityMonitor


@dataclass(kw_only=True, eq=False)
class TrainStep:
    """One optimizer step on one effective batch: `step(number, (images, labels))`.

    If memory runs out, the batch is divided further, and `say(text)` prints it.
    """

    diffusion: DDPM  # around a TrainNetwork
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    averages: list[EMA]  # the first is sampled and measured
    meters: Meters
    stability: StabilityMonitor
    machine: Machine
    seed: int
    batch_size: int
    micro_batches: InitVar[int]
    learning_rate: Callable[[int], float]
    gradient_clip: float
    flip: bool
    augmentation: float  # the probability of each transformation of an image
    label_dropout: float | None  # the share of labels that are dropped; None for no labels
    say: Callable[[str], Any] = print

    def __post_init__(self, micro_batches):
        self.net = self.diffusion.net.net
        self.ema = self.averages[0]
        self.objective = self.diffusion.objective
        self.parameters = [*self.diffusion.net.params, *self.objective.parameters()]
        layers = self.diffusion.net.module.modules()  # which draw by nn.Dropout alone
        self.drops = any(isinstance(layer, torch.nn.Dropout) and layer.p for layer in layers)
        self.numbers = self.machine.random_numbers(self.seed, depth=2)
        self.places = range(self.batch_size)[self.machine.rank_slice(self.batch_size)]
        self.set_micro_batches(micro_batches)
        # alone, a step that has no room is done again
        self.rehearsed = self.machine.world == 1 or not self.diffusion.net.rehearses
        self.watch = lambda t, losses: None
        # t and loss of a batch, for times that learn from them
        self.seen = torch.zeros(2, self.batch_size, device=self.machine.device)

    def __call__(self, step, batch):
        """Learn from this rank's share of the batch; BatchDoesNotFit if no image fits."""
        while not self.rehearsed:  # on all ranks, with less at a time if one has no room
            fitted, _ = self.machine.room.fits(partial(self.rehearse, batch))
            self.rehearsed = all(self.machine.all_gather(fitted))
            if not self.rehearsed:
                self._halve_micro_batches()
        self.diffusion.net.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        loss = self._gradients_that_fit(step, batch)
        self.diffusion.net.sync_grads()
        for parameter in self.objective.parameters():  # which the network's wrapper does not know
            parameter.grad = self.machine.sum(parameter.grad) / self.machine.world
        self.scaler.unscale_(self.optimizer)
        norm = self.diffusion.net.norm(list(self.objective.parameters()))
        if self.gradient_clip < math.inf:  # or each gradient would be multiplied by 1
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.gradient_clip, norm)
        loss = self.machine.sum(loss) / self.machine.world
        # a learned weighting lets the loss fall below 0, where ratios mean nothing: 1 if it is
        # finite, else NaN, so that the norm alone shows spikes
        if next(self.objective.parameters(), None) is not None:
            loss = 1 + 0 * loss
        skipped, spike = self.stability.update(step, loss, norm)
        # a fused optimizer changes nothing if this is 1
        self.optimizer.found_inf = skipped.float()
        self.optimizer.step()  # the scaler's own step would only skip what is not finite
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages:
            average.update()
        self.meters.add_step(norm, skipped, spike)
        if self.objective.adapts_times:
            t, losses = self.machine.sum(self.seen)
            self.objective.observe(t.long(), losses)
            self.seen.zero_()

    def rehearse(self, batch):
        """Compute a micro-batch's gradients and drop them, to set up kernels and try the memory."""
        before = len(self.meters.losses)
        count = len(self.parts[0])
        # some networks scale theirs in training
        weights = [value.detach().to("cpu", copy=True) for value in self.parameters]
        self.diffusion.net.train()
        try:
            self._set_up_optimizer()
            if len(self.parts) == 1:
                self.optimizer.zero_grad(set_to_none=True)
            with self.diffusion.net.accumulating(more=True):
                self._learn(0, 0, self.parts[0], *(tensor[:count] for tensor in batch))
        finally:
            self._forget(before)
            with torch.no_grad():
                for value, weight in zip(self.parameters, weights, strict=True):
                    value.copy_(weight)

    def diagnosis(self, step, batch):
        """Compute a skipped step's gradients again; returns words on what goes wrong in it."""
        outputs = {}
        images = []
        before = len(self.meters.losses)
        hooks = [
            layer.register_forward_hook(partial(note_output, outputs, name))
            for name, layer in self.diffusion.net.module.named_modules()
            if not [*layer.children()]
        ]
        self.watch = lambda t, losses: images.extend(zip(t.tolist(), losses.tolist(), strict=True))
        self.diffusion.net.use_compiler(False)
        self.diffusion.net.train()
        try:
            loss = self._gradients(step, batch)
            named = [
                *self.diffusion.net.module.named_parameters(),
                *self.objective.named_parameters(),
            ]
            weights = {name: size_of(value) for name, value in named}
            scale = self.scaler.get_scale()
            trained = {name: value.grad for name, value in named if value.grad is not None}
            gradients = {name: size_of(grad) / scale for name, grad in trained.items()}
        finally:
            self._forget(before)
            self.watch = lambda t, losses: None
            for hook in hooks:
                hook.remove()
        images.sort(key=lambda image: -math.inf if math.isnan(image[1]) else -image[1])
        return "; ".join(
            [
                f"loss {loss.item():.3g}",
                "worst images at " + ", ".join(f"t = {t} ({value:.3g})" for t, value in images[:3]),
                largest("weights", weights),
                largest("outputs", {name: value.item() for name, value in outputs.items()}),
                largest("gradients", gradients),
                f"learning rate {self.learning_rate(step):.3g}",
                f"loss scale {self.scaler.get_scale():g}",
            ]
        )

    def set_micro_batches(self, count):
        """Divide the effective batch into `count` micro-batches of one size."""
        size = len(self.places) // count
        self.parts = [self.places[i * size : (i + 1) * size] for i in range(count)]

    def _gradients_that_fit(self, step, batch):
        """Compute the gradients, with the batch divided until it fits; returns the loss."""
        while True:
            fitted, loss = self.machine.room.fits(partial(self._gradients, step, batch))
            if fitted:
                return loss
            if self.machine.world > 1:  # the others wait in the middle of a collective
                raise BatchDoesNotFit(
                    f"rank {self.machine.rank} is out of memory with {len(self.parts[0])} images "
                    f"at a time; --config.train.gradient_accumulation_steps={2 * len(self.parts)} "
                    "halves them"
                )
            self._halve_micro_batches()

    def _gradients(self, step, batch):
        """Compute the gradients of this rank's share; returns its loss."""
        loss = 0
        before = len(self.meters.losses)
        split = (tensor.split(len(self.parts[0])) for tensor in batch)
        try:
            for micro, (places, pixels, labels) in enumerate(zip(self.parts, *split, strict=True)):
                with self.diffusion.net.accumulating(more=micro + 1 < len(self.parts)):
                    loss += self._learn(step, micro, places, pixels, labels)
            return loss
        except Exception:
            self._forget(before)
            raise

    def _forget(self, before):
        """Drop gradients, and the losses of all but the first `before` micro-batches held."""
        self.optimizer.zero_grad(set_to_none=True)
        self.meters.forget(before)
        self.seen.zero_()

    def _set_up_optimizer(self):
        """Let the optimizer allocate its state by a step without effect; leaves zero gradients."""
        for value in self.parameters:
            value.grad = torch.zeros_like(value)
        if not self.optimizer.state:
            self.optimizer.found_inf = torch.ones((), device=self.machine.device)
            self.optimizer.step()

    def _halve_micro_batches(self):
        """Halve micro-batches, or divide by the next factor; BatchDoesNotFit for single images."""
        count = len(self.parts)
        total = len(self.places)
        if count == total:
            raise BatchDoesNotFit("out of memory with one image at a time")
        divisors = (n for n in range(2 * count, total) if total % n == 0)
        self.set_micro_batches(next(divisors, total))
        self.say(
            f"out of memory with {total // count} images at a time; continuing with "
            f"{len(self.parts[0])} at a time, with the same results except for dropout; to start "
            f"with this size, set train.gradient_accumulation_steps={len(self.parts)}"
        )

    def _learn(self, step, micro, places, pixels, labels):
        """Add the gradients of a micro-batch; returns its part of the loss."""
        to_device = self.machine.to_device
        if self.drops:
            rng.reseed_torch(self.seed, step, self.machine.rank, micro)
        pixels = to_device(pixels)
        if self.flip:
            mirrored = self.numbers.uniform("flip", step, places) < 0.5
            pixels = augment.flip(pixels, to_device(mirrored))
        x0 = common_pixels.encode(pixels)
        transforms = None
        if self.augmentation:
            numbers = self.numbers.normal("augment", step, places, (augment.NUM_RANDOM,))
            x0, transforms = augment.augment(x0, to_device(numbers), self.augmentation)
        times = partial(self._uniform_times, step)
        t, importance = self.objective.times(self.diffusion.process, places, self.batch_size, times)
        t = to_device(t)
        noise = to_device(self.numbers.normal("train noise", step, places, x0.shape[1:]))
        y = None
        if self.label_dropout is not None:
            numbers = self.numbers.uniform("label drop", step, places)
            y = to_device(augment.drop_labels(labels, numbers, self.label_dropout))
        estimated = None
        if self.diffusion.self_condition:
            numbers = self.numbers.uniform("train self-condition", step, places)
            estimated = to_device(numbers < 0.5)
        losses = self.diffusion.losses(x0, t, noise, y, estimated, transforms)
        weighted = losses if importance is None else losses * importance
        loss = weighted.mean() / len(self.parts)
        self.scaler.scale(loss).backward()
        self.meters.add_losses(t, losses)
        self.watch(t, losses)
        if self.objective.adapts_times:
            seen = torch.stack([t.to(losses.dtype), losses.detach()])
            self.seen[:, places.start : places.stop] = seen
        return loss.detach()

    def _uniform_times(self, step, places):
        """Uniform numbers for the distribution of times, on the device if it learns from losses."""
        numbers = self.numbers.uniform("train time", step, places)
        return self.machine.to_device(numbers) if self.objective.adapts_times else numbers


def note_output(outputs, name, layer, inputs, out):
    """A layer's forward hook: keep the largest magnitude of its first output."""
    if isinstance(out, torch.Tensor):
        outputs.setdefault(name, out.detach().abs().max())


def size_of(tensor):
    """The norm of a tensor, or of this rank's rows of it."""
    return getattr(tensor, "to_local", lambda: tensor)().norm().item()


def largest(what, sizes):
    """A description of sizes by name: the first that are not finite, else the largest."""
    lost = [name for name, size in sizes.items() if not math.isfinite(size)]
    if lost:
        return f"{what} not finite in {len(lost)} of {len(sizes)}, first in {', '.join(lost[:3])}"
    return f"largest {what} " + ", ".join(
        f"{name} ({sizes[name]:.3g})" for name in sorted(sizes, key=sizes.get, reverse=True)[:3]
    )
