"""The training loop and its events: learn, log, validate, draw, measure, save.

`step` counts from 0; `done` is the number of steps done.
"""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ddpm.common import pixels
from ddpm.common.durations import Every, in_words
from ddpm.evaluation.scorer import copying_warning, write_texts
from ddpm.runtime.device import Machine
from ddpm.runtime.signals import StopTraining
from ddpm.sampling import draw as sampling_draw
from ddpm.tracking.tracker import Tracker
from ddpm.training import checkpoint
from ddpm.training import weights as training_weights
from ddpm.training.background import BackgroundWriter
from ddpm.training.ema import EMA
from ddpm.training.meters import LOGGED, Speed, Stopwatch, portion
from ddpm.training.step import TrainStep
from ddpm.training.validation import Validation

# diverged if so many more steps are skipped than learned from; fp16 finds its loss scale in fewer
PATIENCE = 50
CHECK_EVERY = 50  # steps between checks of the stability where nothing else is due
SMALLEST = 1.0  # loss scale of fp16, below which gradients that overflow are wrong ones
ROLLBACKS = 1
EXCHANGE_STEPS = 10  # at most, between two exchanges of ranks
EXCHANGE_SECONDS = 0.5
QUIET_SECONDS = 60  # of training, after which a line shows that it goes on
BEST = {"val/loss_ema": "best.safetensors", "train/loss": "best_train_loss.safetensors"}


class Diverged(Exception):
    """The training has diverged; `healthy_step` is the last step before that."""

    def __init__(self, text, healthy_step):
        super().__init__(text)
        self.healthy_step = healthy_step


class Best:
    """The lowest loss until now, of the kind `by` (a key of BEST); a checkpoint part."""

    def __init__(self, by):
        self.by = by
        self.loss = math.inf

    @property
    def file(self):
        """The name of the file of the weights at that loss."""
        return BEST[self.by]

    def improved(self, loss):
        """Record `loss`; returns True if it is the lowest until now."""
        better = loss < self.loss
        self.loss = min(self.loss, loss)
        return better

    def state_dict(self):
        return {"loss": self.loss, "by": self.by}

    def load_state_dict(self, state):
        self.loss = state["loss"]


class PendingEvents:
    """The names of the events due at the last step and not over yet, or None; a checkpoint part.

    A stopped training continues with them: intervals in minutes cannot be computed again.
    """

    def __init__(self):
        self.names = None

    def state_dict(self):
        return {"names": None if self.names is None else sorted(self.names)}

    def load_state_dict(self, state):
        self.names = state["names"] and set(state["names"])


@dataclass
class Evaluation:
    """What a training draws and measures with the weights in its plain network."""

    validation: Validation
    draw: Callable  # (image numbers, recipe) -> iterator of (numbers, uint8 [b, c, h, w])
    grid: tuple[range, sampling_draw.Recipe]
    score: Callable  # (draw) -> dict of eval/ numbers, dict of pictures
    likelihood: Callable  # () -> dict of eval/ numbers, dict of texts by file name
    cost_in_images: float  # one evaluation costs as much as training on so many images
    share: float | None  # of the training's operations, all evaluations; None if unknown


@dataclass
class Trainer:
    """A training at `start` of `total` steps; `experiment.trainer.build_trainer` builds it."""

    folder: Path
    config_json: str  # the resolved config: options that were left open have their values
    machine: Machine
    tracker: Tracker
    start: int
    total: int
    batches: Callable[[int], Any]  # (step) -> iterator of (uint8 [b, c, h, w], labels [b]) from it
    step: TrainStep
    speed: Speed
    every: dict[str, Every]  # event -> when it is due
    evaluation: Evaluation
    parts: dict[str, Any]  # what a checkpoint keeps
    snapshots: dict[str, EMA]  # the power-function averages, by the names of their parts
    rollback: float  # factor of the learning rate after a rollback; 0 for none
    recomputed: int  # levels of the network whose activations are computed again
    source: Path | None = None  # the checkpoint of another folder that this training continues
    diverged: str = ""  # why it has diverged

    def __post_init__(self):
        self.meters = self.step.meters
        self.stability = self.step.stability
        self.network = self.step.diffusion.net
        self.pending = self.parts["due"]
        self.best = self.parts["best"]
        self.parts["tracker"] = self.tracker
        self.step.say = self.network.say = self.machine.room.say = self.tracker.say
        self.write = BackgroundWriter(self.machine)
        self.begun = self.start, self.pending.names
        self.saved = self.begun  # the newest checkpoint: its step and pending events
        self.last_line = time.monotonic()

    @property
    def finished(self):
        """True if nothing is left to do."""
        return self.start >= self.total and self.pending.names is None

    @contextlib.contextmanager
    def averaged(self):
        """The context in which the plain network has the averaged weights."""
        with self.step.ema.averaged(), self.network.summon_full_params():
            yield

    def log_training(self, done):
        """Log what the steps since the last log measured."""
        self.last_line = time.monotonic()
        readings = self.meters.read()
        if skipped := int(readings["train/skipped_steps"]):
            self.tracker.say(
                f"up to step {done}, {skipped} of {int(self.meters.sums['steps'][0])} steps were "
                f"skipped: {int(readings['train/spikes'])} as spikes of loss or gradient, the "
                "others were not finite"
            )
        readings |= self.speed.read(done) | self.machine.memory()
        readings["train/learning_rate"] = self.step.learning_rate(done - 1)
        readings["train/loss_scale"] = self.step.scaler.get_scale()
        readings["train/rollbacks"] = self.stability.rollbacks
        self.tracker.log(done, readings)

    def say_first_loss(self, done):
        """Print the loss of the first step of this process, long before the first row."""
        self.last_line = time.monotonic()
        loss = self.meters.read()["train/loss"]
        self.tracker.say(
            f"the first step is done: train/loss {loss:.4f} at step {done} of {self.total}"
        )

    @property
    def quiet(self):
        """True if the last line of the training is a minute old."""
        return time.monotonic() - self.last_line >= QUIET_SECONDS

    def show_progress(self, done):
        """Show the mean loss since the last row; nothing is recorded."""
        self.last_line = time.monotonic()
        self.tracker.progress(done, self.meters.read()["train/loss"])

    def check_stability(self, done):
        """Raise Diverged if the stability monitor or fp16's loss scale shows it."""
        scale = self.step.scaler.get_scale()
        reason = self.stability.divergence_reason(min(PATIENCE, self.total))
        if not reason and scale < SMALLEST:
            reason = f"fp16's loss scale fell to {scale:g}"
        if reason:
            raise Diverged(f"{reason}, up to step {done}", self.stability.last_healthy_step.item())

    def roll_back(self, diverged):
        """Delete checkpoints after the last healthy step; returns where training restarts."""
        if self.machine.main:
            checkpoint.delete_after(self.folder, diverged.healthy_step)
        self.machine.barrier()
        step, _ = (checkpoint.checkpoints(self.folder) or [(0, None)])[-1]
        return (
            f"from {f'step {step}' if step else 'the start'} on in another order, at "
            f"{self.rollback:g} of the learning rate"
        )

    def begin_after_rollback(self, reason):
        """Track why the training was rolled back, and save, so that a restart does the same."""
        self.tracker.summary("train/diverged", reason)
        self.best.loss = math.inf  # the best weights may come from the diverged steps
        self.save(self.start)

    def diagnosis(self):
        """Words on the last skipped step or, if none was skipped, on the last healthy one."""
        skipped = self.stability.last_skipped_step.item()
        step = skipped if skipped >= 0 else self.stability.last_healthy_step.item()
        return f"step {step + 1}: {self.step.diagnosis(step, next(iter(self.batches(step))))}"

    def choose_best(self, done):
        """Export the averaged weights at their lowest validation loss, or lowest training loss."""
        if self.best.by == "val/loss_ema":
            loss = self.validate(done)
        elif "validate" in self.pending.names or self.best.loss == math.inf:
            loss = self.meters.loss_since()
        else:  # at the end there may be few steps to average over
            return
        if self.best.improved(loss):
            self.tracker.summary(f"best/{self.best.by.replace('/', '_')}", loss)
            self.export(self.best.file, done, best={"by": self.best.by, "loss": loss})

    def validate(self, done):
        """Log the validation loss of the weights and of their average; returns the latter."""
        with self.network.summon_full_params():
            loss = self.evaluation.validation.loss()
        with self.averaged():
            averaged = self.evaluation.validation.loss()
        losses = {"val/loss": loss, "val/loss_ema": averaged}
        self.tracker.log(done, losses | self.speed.progress(done))
        return averaged

    def draw_grid(self, done):
        """Draw a grid of the same latents every time, with the averaged weights."""
        numbers, recipe = self.evaluation.grid
        with self.averaged():
            images = sampling_draw.concatenate(self.evaluation.draw(numbers, recipe))
            images = self.machine.gather(images)
        if self.machine.main:
            show(self.folder, self.tracker, done, {"samples": images})

    def warn_of_cost(self, done):
        """Say how long an evaluation takes that costs more than the training until now."""
        images = done * self.step.batch_size
        if self.evaluation.cost_in_images <= images:
            return
        training = self.speed.seconds(images)
        evaluation = self.speed.seconds(self.evaluation.cost_in_images)
        seconds = ""
        if training is not None:
            words = f"{in_words(evaluation)} against {in_words(training)}"
            seconds = f", about {words} at the speed measured so far"
        share = portion(self.evaluation.cost_in_images / max(images, 1), " of")
        self.tracker.say_once(
            "cost",
            f"the evaluation that begins costs {share} what the training up to step {done} "
            f"did{seconds}; fewer evaluate.num_samples or evaluate.steps cost less, and "
            "--config.every.evaluate='0 steps' leaves it out",
        )

    def evaluate(self, done):
        """Log distances, nearest real images and bits/dim, all of the averaged weights."""
        watch = Stopwatch()
        self.warn_of_cost(done)
        with self.averaged():
            numbers, pictures = self.evaluation.score(self.evaluation.draw)
            bits, files = self.evaluation.likelihood()
        if not (numbers or bits) or not self.machine.main:
            return
        cost = {"speed/evaluation_seconds": watch.lap()}
        if self.evaluation.share is not None:
            cost["eval/share"] = self.evaluation.share
        self.tracker.log(done, numbers | bits | cost | self.speed.progress(done))
        show(self.folder, self.tracker, done, pictures)
        write_texts(self.folder, files)
        grid = grid_file(self.folder, "eval/nearest", done)
        for line in copying_warning(numbers, f"look at {grid}"):
            self.tracker.say(line)

    def export(self, name, done, **more):
        """Write the averaged weights to the file `name`, with `more` in its header."""
        weights = self.network.full_state_dict(self.step.ema.shadow)
        if self.machine.main:
            export = partial(training_weights.export, **more)
            self.write(export, self.folder / name, weights, done, self.config_json)

    def tidy(self):
        """Finish an interrupted final save: prune checkpoints, repair the final weights."""
        if not self.machine.broadcast(training_weights.has_final(self.folder, self.start)):
            self.export("final.safetensors", self.start)
        self.write.wait()
        if self.machine.main:
            checkpoint.prune(self.folder, healthy_step=self.stability.last_healthy_step.item())

    def snapshot(self, done):
        """Store the power-function averages, from which any profile is computed later."""
        full = self.network.full_state_dict
        averages = {name: full(average.shadow) for name, average in self.snapshots.items()}
        if self.machine.main:
            buffers = set(dict(self.step.net.named_buffers()))
            save = training_weights.save_snapshot
            self.write(save, self.folder, done, self.config_json, averages, buffers)

    def save(self, done, milestone=False):
        """Begin to save all that is needed to continue, after the rows up to here are on disk."""
        with self.machine.stop.reserve_time():
            self.tracker.flush()
            for part in self.parts.values():
                if hasattr(part, "collect"):  # each rank has a share of it
                    part.collect()
            if self.machine.main:
                states = {name: part.state_dict() for name, part in self.parts.items()}
                healthy_step = self.stability.last_healthy_step.item()
                save = partial(checkpoint.save, milestone=milestone, healthy_step=healthy_step)
                self.write(save, self.folder, done, self.config_json, states)
        self.saved = done, self.pending.names

    def stop(self, done, stopped):
        """Stop with the other ranks, and save; pending events come first in the next start."""
        self.machine.leave(stopped)
        if self.pending.names is not None:
            self.tracker.forget(done)
        if self.saved != (done, self.pending.names):
            self.save(done, milestone="milestone" in (self.pending.names or ()))


def grid_file(folder, key, done):
    """The file of the grid with a tracked key at a step."""
    name = "step" if key == "samples" else key.rpartition("/")[2]
    return Path(folder, "samples", f"{name}_{done:08d}.png")


def show(folder, tracker, done, pictures):
    """Save images [b, c, h, w] by their tracked keys as grids in samples/ and in the tracker."""
    for key, images in pictures.items():
        nrow = None if key == "samples" else 8
        pixels.save_image_grid(images, grid_file(folder, key, done), nrow)
        tracker.log(done, {}, {key: pixels.make_grid(images, nrow)})


class Decisions:
    """What ranks decide together between steps: which events are due, and whether to stop.

    They exchange at a step with a counted event, at the last, and else every EXCHANGE_STEPS steps
    or, where steps are longer, about EXCHANGE_SECONDS: an exchange takes up to a millisecond.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.machine = trainer.machine
        self.due = set()  # by this rank's clock, since the last exchange
        self.next = 0  # the step of the next exchange, the same on all ranks
        self.last = trainer.start, time.monotonic()

    def __call__(self, done):
        """After `done` steps: the events due, whether a line is due, whether to stop."""
        self.due |= {name for name, every in self.trainer.every.items() if every.due(done)}
        if not self.exchanges(done):
            return set(), False, False
        requested = self.machine.stop.requested
        mine = self.due, self.trainer.quiet, self.steps_until_next(done), requested
        self.due = set()
        # rank 0's clock counts, and a request to any rank
        decisions = self.machine.all_gather(mine)
        due, quiet, steps, _ = decisions[0]
        self.next = done + steps
        return due, quiet, any(stops for *_, stops in decisions)

    def exchanges(self, done):
        """Whether ranks exchange after `done` steps, with the same answer on all."""
        if self.machine.world == 1 or done >= self.next or done == self.trainer.total:
            return True
        return any(every.counted(done) for every in self.trainer.every.values())

    def steps_until_next(self, done):
        """The steps that take EXCHANGE_SECONDS at the speed since the last exchange."""
        before, then = self.last
        self.last = done, time.monotonic()
        each = (self.last[1] - then) / max(done - before, 1)
        return min(max(int(EXCHANGE_SECONDS / max(each, 1e-9)), 1), EXCHANGE_STEPS)


def events(trainer, done):
    """Run what is due after `done` steps, and at the end all events that are wanted at all.

    Raises Diverged, and StopTraining if a stop is requested before the events are over.
    """
    wanted = {name for name, every in trainer.every.items() if not every.never}
    due = trainer.pending.names or set()
    last = done == trainer.total
    now = due | wanted if last else due
    if "log" in now:
        trainer.log_training(done)
    if now or last:
        trainer.check_stability(done)
    with trainer.speed.pause():
        if "validate" in now:
            trainer.choose_best(done)
        if "sample" in now:
            trainer.draw_grid(done)
        if "evaluate" in now:
            trainer.evaluate(done)
        trainer.machine.barrier()  # StopTraining if one of the ranks has stopped
        if last:
            trainer.export("final.safetensors", done)
        if "snapshot" in now:
            trainer.snapshot(done)
        if "log" in due:
            trainer.meters.reset(*LOGGED)
        if "validate" in due:
            trainer.meters.reset("since")
        trainer.pending.names = None
        trainer.tracker.flush()  # or the row would come with the next one
        if now & {"save", "milestone"}:
            trainer.save(done, milestone="milestone" in due)


def train(trainer):
    """Train and save; True at the end, False if a stop is requested before. Raises Diverged."""
    done = trainer.start
    machine = trainer.machine
    decide = Decisions(trainer)
    if trainer.source:  # which may be gone at the next start
        trainer.save(done)
    with machine.stop.install_handlers() as stop, trainer.write, trainer.step.numbers:
        try:
            if trainer.pending.names is not None:
                events(trainer, done)
            for step, batch in enumerate(trainer.speed.timed(trainer.batches(done)), done):
                with stop.reserve_time():
                    trainer.step(step, batch)
                trainer.write.check()
                done = step + 1
                trainer.tracker.tick(done)
                if step == trainer.start:
                    trainer.say_first_loss(done)

                due, quiet, requested = decide(done)
                if due or done == trainer.total:
                    trainer.pending.names = due
                    machine.wait()  # steps still queued on a GPU would count as a pause
                if requested:
                    raise StopTraining(agreed=True)
                if quiet and "log" not in due:
                    trainer.show_progress(done)
                if trainer.pending.names is not None:
                    events(trainer, done)
                elif done % CHECK_EVERY == 0:
                    trainer.check_stability(done)
        except StopTraining as stopped:
            trainer.stop(done, stopped)
    return done == trainer.total and trainer.pending.names is None
