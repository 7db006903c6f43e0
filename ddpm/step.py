"""What one step of training is, and what is read off it.

    images uint8 [b, c, h, w] and labels int64 [b], -1 for none, from the loader; x0 in [-1, 1]; t [b] int64
    `step` counts from 0

What a step draws (times, noise, flips, dropped labels, dropout) is addressed by (seed, step, place in the effective batch),
so a run that was stopped goes on as if it had not been, and micro-batches and ranks change nothing.
"""

import math
from functools import partial

import torch

from ddpm import augment, data, images, rng
from ddpm.room import NoRoom

QUARTILES = 4
LOGGED = "loss", "count", "steps"  # what Meters sums from one log to the next
PER_RANK = "loss", "count", "since"  # and what each rank sums for itself
FORGET = 0.998  # of the largest loss and norm, a step
YOUNG = 100  # steps in which nothing is usual yet, and that the mean loss is about


class Meters:
    """What the steps since the last log measured, summed on the device so that no step waits; a checkpoint part.

    Losses and counts [4] by quartile of t, which each rank sums for its own images, as it does loss and count [2] `since` the
    best weights were chosen last; [4]: steps, the gradient norms of those not skipped, skipped steps, and those of them that
    were spikes, the same on all ranks.
    """

    def __init__(self, timesteps, machine):
        self.timesteps, self.machine = timesteps, machine
        self.sums = {name: torch.zeros(size, device=machine.device)
                     for name, size in (("loss", QUARTILES), ("count", QUARTILES), ("since", 2), ("steps", 4))}

    def add_losses(self, t, losses):
        quartile = t * QUARTILES // self.timesteps
        self.sums["loss"].index_add_(0, quartile, losses.detach())
        self.sums["count"].index_add_(0, quartile, ones := torch.ones_like(losses))
        self.sums["since"] += torch.stack([losses.detach(), ones]).sum(1)

    def add_step(self, norm, skipped, spike):
        self.sums["steps"] += torch.stack([torch.ones_like(norm), norm.masked_fill(skipped, 0), skipped.float(), spike.float()])

    def losses(self):
        """A copy of what `add_losses` has summed, for `forget`."""
        return {name: self.sums[name].clone() for name in PER_RANK}

    def forget(self, before):
        """Take back the losses that were added since `before`."""
        for name, total in before.items():
            self.sums[name].copy_(total)

    def read(self):
        """The means under their tracked keys; this is where the host waits for the device."""
        loss, count = (self.machine.sum(self.sums[name].clone()).tolist() for name in ("loss", "count"))
        steps, norm, skipped, spikes = self.sums["steps"].tolist()
        mean = {"train/loss": sum(loss) / max(sum(count), 1)}
        mean |= {f"train/loss_q{q}": loss[q] / count[q] for q in range(QUARTILES) if count[q]}
        mean |= {"train/skipped_steps": skipped, "train/spikes": spikes}
        return mean | {"train/grad_norm": norm / max(steps - skipped, 1)}

    def loss_since(self):
        """The mean loss since the best weights were chosen last; here too the host waits."""
        loss, count = self.machine.sum(self.sums["since"].clone()).tolist()
        return loss / max(count, 1)

    def reset(self, *names):
        """Begin again with some of the sums."""
        for name in names:
            self.sums[name].zero_()

    def collect(self):
        """Bring the ranks' sums together on the main one, whose state is saved."""
        for name in PER_RANK:
            self.sums[name] = self.machine.sum(self.sums[name]) * self.machine.main

    def state_dict(self):
        return dict(self.sums)

    def load_state_dict(self, state):
        for name, total in self.sums.items():
            total.copy_(state.get(name, torch.zeros_like(total)))  # `since` is of 2026-12
        for name in PER_RANK:
            self.sums[name] *= self.machine.main


class Guard:
    """Judges each step by its loss and its gradient's norm, on the device so that none waits; a checkpoint part.

    A step is skipped where one of them is not finite, or a spike: more than `spike` times the largest of late, which is half
    forgotten in 350 steps. What is skipped does not count as usual, so one spike hides no other, and a level that has risen for
    good is skipped on and on: then, or where the loss has crept up `spike` times in its geometric mean, `trouble` says so.
    `rollbacks` is how often the run has gone back to when all was well.
    """

    def __init__(self, spike, machine, rollbacks=0):
        self.spike, self.rollbacks, device = spike or math.inf, rollbacks, machine.device
        self.usual = torch.zeros(2, device=device)  # the largest loss and norm of late
        self.mean, self.lowest = torch.zeros(2, device=device)  # of the loss's logarithm of late, and the lowest that it was
        self.learned, self.streak, self.well = torch.zeros(3, dtype=torch.long, device=device)
        self.bad = torch.tensor(-1, device=device)  # the last step that was skipped; `well`, the last at which all was well

    def judge(self, step, loss, norm):
        """Whether a step is to be skipped, and whether as a spike, by scalars on the device that are the same on all ranks."""
        now = torch.stack([loss, norm])
        finite = now.isfinite().all()
        spike = finite & (self.learned >= YOUNG) & (now > self.spike * self.usual).any()
        skipped = spike | ~finite
        usual = torch.maximum(FORGET * self.usual, now)
        mean = torch.lerp(self.mean, loss.clamp(min=1e-30).log(), (1 / (self.learned + 1)).clamp(min=1 / YOUNG))
        self.usual.copy_(torch.where(skipped, self.usual, usual))
        self.mean.copy_(torch.where(skipped, self.mean, mean))
        self.lowest.copy_(torch.where(self.learned < YOUNG / 4, self.mean, torch.minimum(self.lowest, self.mean)))
        self.learned += ~skipped
        self.streak.add_(2 * skipped - 1).clamp_(min=0)
        well = (self.streak == 0) & (self.mean - self.lowest <= math.log(self.spike) / 2)
        self.well.copy_(torch.where(well, step, self.well))
        self.bad.copy_(torch.where(skipped, step, self.bad))
        return skipped, spike

    def trouble(self, patience):
        """What is wrong with the run in words, or None; here the host waits."""
        if (streak := self.streak.item()) >= patience:
            return f"{streak} more steps were skipped than learned from"
        mean, lowest = self.mean.item(), self.lowest.item()
        if mean - lowest > math.log(self.spike):
            return f"the loss has risen from {math.exp(lowest):.3g} to {math.exp(mean):.3g}"
        return None

    def state_dict(self):
        return {name: value for name, value in vars(self).items() if name != "spike"}

    def load_state_dict(self, state):
        """Take over a saved state, but for what a run that has just gone back knows better."""
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                value.copy_(state[name])


class Step:
    """One optimiser step on one effective batch: `step(number, (images, labels))`.

    `augmentation` is the probability of each transformation of an image, `label_dropout` the share of labels that are dropped,
    or None for a network that learns none. Where memory runs out, the batch is cut into more parts, and `say(text)` tells it.
    """

    def __init__(self, *, net, diffusion, optimizer, scaler, averages, meters, guard, machine, seed, batch_size, micro_batches,
                 learning_rate, gradient_clip, flip, augmentation, label_dropout):
        self.net, self.diffusion, self.optimizer, self.scaler = net, diffusion, optimizer, scaler
        self.averages, self.ema = averages, averages[0]  # the first is sampled and measured
        self.objective = diffusion.objective
        self.parameters = [*diffusion.net.parameters, *self.objective.parameters()]
        self.meters, self.guard, self.machine, self.seed = meters, guard, machine, seed
        self.learning_rate, self.gradient_clip = learning_rate, gradient_clip
        self.flip = partial(data.flip, put=machine.put) if flip else lambda batch, *address: batch
        self.augment = partial(self._augmented, augmentation) if augmentation else lambda x0, *address: (x0, None)
        self.label = (lambda labels, *address: None) if label_dropout is None else (
            lambda labels, *address: machine.put(data.drop(labels, label_dropout, *address)))
        self.condition = self._conditioned if diffusion.self_condition else lambda *address: None
        self.places, self.batch_size, self.say = range(batch_size)[machine.share(batch_size)], batch_size, print
        self.cut(micro_batches)
        self.rehearsed = machine.world == 1 or not diffusion.net.rehearses  # alone, a step that has no room is done again
        self.watch = lambda t, losses: None
        self.seen = torch.zeros(2, batch_size, device=machine.device)  # t and loss of a batch, for times that learn from them

    def __call__(self, step, batch):
        """Learn from this rank's share of the effective batch, images and labels in the order of the places.

        Raises NoRoom where memory runs out with one image at a time.
        """
        while not self.rehearsed:
            self._rehearse_together(batch)
        self.diffusion.net.train()
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(step)
        loss = self._gradients_that_fit(step, batch)
        self.diffusion.net.collect()
        for parameter in self.objective.parameters():  # which the network's wrapper does not know
            parameter.grad = self.machine.sum(parameter.grad) / self.machine.world
        self.scaler.unscale_(self.optimizer)
        norm = self.diffusion.net.norm(list(self.objective.parameters()))
        torch.nn.utils.clip_grads_with_norm_(self.parameters, self.gradient_clip, norm)
        loss = self.machine.sum(loss) / self.machine.world
        if next(self.objective.parameters(), None) is not None:  # such a loss has no zero to compare with
            loss = 1 + 0 * loss
        skipped, spike = self.guard.judge(step, loss, norm)
        self.optimizer.found_inf = skipped.float()  # a fused optimiser leaves everything as it is where this is 1
        self.optimizer.step()  # the scaler's own would know of nothing but what is not finite
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        for average in self.averages:
            average.update()
        self.meters.add_step(norm, skipped, spike)
        if self.objective.watches:
            t, losses = self.machine.sum(self.seen)
            self.objective.observe(t.long(), losses)
            self.seen.zero_()

    def rehearse(self, batch):
        """Learn from the first micro-batch of a batch and forget it: nothing changes but what is set up on the way.

        All that the step takes is there: what the optimiser keeps and, where micro-batches follow, the gradients of all before.
        """
        before, count = self.meters.losses(), len(self.parts[0])
        weights = [one.detach().to("cpu", copy=True) for one in self.parameters]  # some networks scale theirs in training
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
                for one, weight in zip(self.parameters, weights, strict=True):
                    one.copy_(weight)

    def diagnosis(self, step, batch):
        """Words on what goes wrong in a step: its gradients are gathered once more, watched layer by layer, and forgotten.

        Where it was skipped and nothing learned since, these are the very numbers that it was skipped for.
        """
        outputs, images, before = {}, [], self.meters.losses()
        hooks = [layer.register_forward_hook(partial(note_output, outputs, name))
                 for name, layer in self.diffusion.net.learner.named_modules() if not [*layer.children()]]
        self.watch = lambda t, losses: images.extend(zip(t.tolist(), losses.tolist(), strict=True))
        self.diffusion.net.compiled(False)
        self.diffusion.net.train()
        try:
            loss = self._gradients(step, batch)
            named = [*self.diffusion.net.learner.named_parameters(), *self.objective.named_parameters()]
            weights = {name: size_of(one) for name, one in named}
            scale = self.scaler.get_scale()
            gradients = {name: size_of(one.grad) / scale for name, one in named if one.grad is not None}
        finally:
            self._forget(before)
            self.watch = lambda t, losses: None
            for hook in hooks:
                hook.remove()
        images.sort(key=lambda image: -math.inf if math.isnan(image[1]) else -image[1])
        return "; ".join([
            f"loss {loss.item():.3g}",
            "worst images at " + ", ".join(f"t = {t} ({one:.3g})" for t, one in images[:3]), largest("weights", weights),
            largest("outputs", {name: value.item() for name, value in outputs.items()}), largest("gradients", gradients),
            f"learning rate {self.learning_rate(step):.3g}", f"loss scale {self.scaler.get_scale():g}"])

    def cut(self, parts):
        """Cut the effective batch into so many micro-batches of one size."""
        size = len(self.places) // parts
        self.parts = [self.places[i * size:(i + 1) * size] for i in range(parts)]

    def _rehearse_together(self, batch):
        """Rehearse on all ranks, which wait for each other only afterwards; cut the batch where one of them had no room."""
        fitted, _ = self.machine.room.fits(partial(self.rehearse, batch))
        self.rehearsed = all(self.machine.exchange(fitted))
        if not self.rehearsed:
            self._cut_further()

    def _gradients_that_fit(self, step, batch):
        """Gather the gradients, the batch cut until there is room; returns the loss."""
        while True:
            fitted, found = self.machine.room.fits(partial(self._gradients, step, batch))
            if fitted:
                return found
            if self.machine.world > 1:  # the others wait in the middle of an exchange
                raise NoRoom(f"rank {self.machine.rank} is out of memory with {len(self.parts[0])} images at a time; "
                             f"--config.train.gradient_accumulation_steps={2 * len(self.parts)} halves them")
            self._cut_further()

    def _gradients(self, step, batch):
        """Gather the gradients of this rank's share; returns its loss. Where that fails, nothing is left of it."""
        loss, before, split = 0, self.meters.losses(), (tensor.split(len(self.parts[0])) for tensor in batch)
        try:
            for micro, (places, pixels, labels) in enumerate(zip(self.parts, *split, strict=True)):
                with self.diffusion.net.accumulating(more=micro + 1 < len(self.parts)):
                    loss += self._learn(step, micro, places, pixels, labels)
            return loss
        except Exception:
            self._forget(before)
            raise

    def _forget(self, before):
        """Drop gradients, and the losses that were added since `before`."""
        self.optimizer.zero_grad(set_to_none=True)
        self.meters.forget(before)
        self.seen.zero_()

    def _set_up_optimizer(self):
        """Let the optimiser allocate what it keeps, by a step that changes nothing; leaves gradients of zero."""
        for one in self.parameters:
            one.grad = torch.zeros_like(one)
        if not self.optimizer.state:
            self.optimizer.found_inf = torch.ones((), device=self.machine.device)
            self.optimizer.step()

    def _cut_further(self):
        """Halve the micro-batches, or as near as divides the batch. Raises NoRoom where they are single images."""
        count = len(self.parts)
        more = next((n for n in range(2 * count, len(self.places) + 1) if len(self.places) % n == 0), None)
        if more is None and count == len(self.places):
            raise NoRoom("out of memory with one image at a time")
        self.cut(more or len(self.places))
        self.say(f"out of memory with {len(self.places) // count} images at a time; continuing with {len(self.parts[0])} at "
                 "a time, with the same results except for dropout; to start with this size, set "
                 f"train.gradient_accumulation_steps={len(self.parts)}")

    def _learn(self, step, micro, places, pixels, labels):
        rng.reseed_torch(self.seed, step, self.machine.rank, micro)  # dropout
        x0 = images.encode(self.flip(self.machine.put(pixels), self.seed, step, places))
        x0, augmentation = self.augment(x0, step, places)
        times = partial(self._times, step)
        t, importance = self.objective.times(self.diffusion.process, places, self.batch_size, times)
        t, noise = self.machine.put(t), self.machine.put(rng.normal(self.seed, "train noise", step, places, x0.shape[1:]))
        y = self.label(labels, self.seed, step, places)
        losses = self.diffusion.losses(x0, t, noise, y, self.condition(step, places), augmentation)
        weighted = losses if importance is None else losses * importance
        loss = weighted.mean() / len(self.parts)
        self.scaler.scale(loss).backward()
        self.meters.add_losses(t, losses)
        self.watch(t, losses)
        if self.objective.watches:
            self.seen[:, places.start:places.stop] = torch.stack([t.to(losses.dtype), losses.detach()])
        return loss.detach()

    def _times(self, step, places):
        """Uniform numbers for the distribution of times, on the device where it learns from the losses there."""
        numbers = rng.uniform(self.seed, "train time", step, places)
        return self.machine.put(numbers) if self.objective.watches else numbers

    def _conditioned(self, step, places):
        return self.machine.put(rng.uniform(self.seed, "train self-condition", step, places) < 0.5)

    def _augmented(self, probability, x0, step, places):
        numbers = rng.normal(self.seed, "augment", step, places, (augment.NUMBERS,))
        return augment.augment(x0, self.machine.put(numbers), probability)


def note_output(outputs, name, layer, given, out):
    """A layer's hook: keep the largest magnitude of what it first says."""
    if isinstance(out, torch.Tensor):
        outputs.setdefault(name, out.detach().abs().max())


def size_of(tensor):
    """The norm of a tensor, or of this rank's rows of it."""
    return getattr(tensor, "to_local", lambda: tensor)().norm().item()


def largest(what, sizes):
    """Words on sizes by name: the first that are not finite or, where all are, the largest."""
    lost = [name for name, size in sizes.items() if not math.isfinite(size)]
    if lost:
        return f"{what} not finite in {len(lost)} of {len(sizes)}, first in {', '.join(lost[:3])}"
    return f"largest {what} " + ", ".join(f"{name} ({sizes[name]:.3g})" for name in sorted(sizes, key=sizes.get)[:-4:-1])


class Validation:
    """The loss on a fixed set of (image, t, noise) that no training changes: `loss()` is that of the weights in the network.

    `labels` are those of all images of the dataset, for a network that learns them.

    The times are spread evenly over 0 .. T-1, in an order of their own. Every seed has the same set, so that runs compare.
    """

    def __init__(self, dataset, indices, net, diffusion, machine, batch_size, labels=None, most=1024):
        indices = data.thinned(indices, most)
        order = rng.permutation(0, "validation time", 0, len(indices))
        self.times = torch.from_numpy((order + 0.5) * diffusion.process.timesteps / max(len(indices), 1)).long()
        self.dataset, self.indices, self.net = dataset, indices, net
        self.labels = None if labels is None else torch.tensor([labels[index] for index in indices])
        self.diffusion, self.machine, self.batch_size = diffusion, machine, batch_size

    @torch.no_grad()
    def loss(self):
        self.net.eval()
        total = torch.zeros(2, dtype=torch.float64)
        mine = range(len(self.indices))[self.machine.share(len(self.indices))]
        for places, loss in self.machine.room.in_batches("validating", mine, self.batch_size, self._loss_of):
            total += torch.stack([loss, torch.tensor(len(places), dtype=torch.float64)])
        loss, count = self.machine.gather(total[None]).sum(0).tolist()
        return loss / count

    def _loss_of(self, places):
        """The sum of the losses of the images at some places, float64 on the host."""
        x0 = images.encode(self.machine.put(self.dataset.batch([self.indices[place] for place in places])))
        noise = rng.normal(0, "validation noise", 0, places, x0.shape[1:])
        y = None if self.labels is None else self.machine.put(self.labels[list(places)])
        losses = self.diffusion.losses(x0, self.machine.put(self.times[list(places)]), self.machine.put(noise), y)
        return losses.double().sum().cpu()
