"""The training loop and the run it drives: learn, log, validate, draw, score, save.

`step` counts from 0; `done` is the number of steps done.
"""

import contextlib
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddpm.common import pixels, safe_load
from ddpm.common.durations import Every, in_words
from ddpm.evaluation.scorer import copying_warning, write_texts
from ddpm.runtime.device import Machine
from ddpm.runtime.signals import StopTraining
from ddpm.sampling import draw as sampling_draw
from ddpm.training import checkpoint
from ddpm.training import weights as training_weights
from ddpm.training.ema import EMA
from ddpm.training.meters import Meters, Speed, Stopwatch, portion
from ddpm.training.step import LOGGED, Step
from ddpm.training.validation import Validation

PATIENCE = 50  # more steps skipped than learned from: fp16 finds its loss scale in fewer
SMALLEST = 1.0  # loss scale of fp16, below which gradients that overflow are wrong ones
ROLLBACKS = 1
QUIET_SECONDS = 60  # of training, after which a line shows that it goes on
BEST = {"val/loss_ema": "best.safetensors", "train/loss": "best_train_loss.safetensors"}


class Diverged(Exception):
    """The training has gone wrong for good since step `well`."""

    def __init__(self, text, well):
        super().__init__(text)
        self.well = well


class Best:
    """The lowest loss so far, and `by` which loss of BEST that is; a checkpoint part."""

    def __init__(self, by):
        self.by = by
        self.loss = math.inf

    @property
    def file(self):
        """The name of the file of the weights at that loss."""
        return BEST[self.by]

    def improved(self, loss):
        """True where `loss` is the lowest yet, which it then is from now on."""
        better = loss < self.loss
        self.loss = min(self.loss, loss)
        return better

    def state_dict(self):
        return {"loss": self.loss, "by": self.by}

    def load_state_dict(self, state):
        self.loss = state["loss"]


class Due:
    """The events of the step just done, until they are over: their names, or None; a checkpoint
    part.

    A run that was stopped among them goes on with them. What hangs on the time cannot be told anew.
    """

    def __init__(self):
        self.names = None

    def state_dict(self):
        return {"names": None if self.names is None else sorted(self.names)}

    def load_state_dict(self, state):
        self.names = state["names"] and set(state["names"])


@dataclass
class Run:
    """A training that stands at `start` steps done of `total`, with all it needs;
    `experiment.trainer.run` makes it.
    """

    folder: Path
    config_json: str
    filled: dict  # options that the config left open, by name, with what they became
    machine: Machine
    recomputed: int  # levels of the network whose activations are not kept
    start: int
    total: int
    # (step) -> iterator of images uint8 [b, c, h, w] and labels [b], from that step on
    batches: Callable[[int], Any]
    step: Step
    meters: Meters
    speed: Speed
    # share of the learning rate with which it goes back where it diverges; 0 where it does not
    rollback: float
    every: dict[str, Every]
    due: Due
    validation: Validation
    best: Best
    # (seeds, recipe) -> iterator of (seeds, uint8 [b, c, h, w]) with the weights in the network
    draw: Callable
    grid: tuple[range, sampling_draw.Recipe]
    score: Callable  # (draw) -> dict of eval/ numbers, dict of pictures
    evaluation: float  # images that could be learned from with the operations of one evaluation
    # of the training's operations that its evaluations take, where that can be known
    share: float | None
    likelihood: Callable  # () -> dict of eval/ numbers, dict of texts by file name
    parts: dict[str, Any]
    stored: dict[str, EMA]  # the power-function averages, by the names of their parts
    notes: list[str]  # what a person should read first
    damaged: list[safe_load.CorruptFile]  # newer checkpoints than that of `start`
    tracker_state: dict | None  # what the tracker left in the checkpoint
    source: Path | None = None  # the checkpoint of another folder at which this one begins
    tracker: Any = None
    saved: tuple | None = None  # the newest checkpoint: its step and what was due
    diverged: str = ""  # why it has gone wrong for good

    def __post_init__(self):
        self.begun = self.saved = self.start, self.due.names
        self.last_line = time.monotonic()

    @property
    def finished(self):
        """True where nothing is left to do."""
        return self.start >= self.total and self.due.names is None

    @property
    def logged(self):
        """The last step whose row may be written: not that of events that are still to do."""
        return self.start - (self.due.names is not None)

    def track(self, tracker):
        """Begin to be followed by a tracker, which from now on is a part of the checkpoint; what
        lies past it is cut.
        """
        if self.machine.main:
            training_weights.cut_snapshots(self.folder, self.start)
            for found in self.damaged:
                self.notes.insert(
                    0,
                    f"{found.path} is damaged ({found.why}); it is called "
                    f"{checkpoint.set_aside(found).name} now, and the run goes on from step "
                    f"{self.start}",
                )
        self.tracker = self.parts["tracker"] = tracker
        self.step.say = self.step.diffusion.net.say = self.machine.room.say = tracker.say
        for note in self.notes:
            tracker.say(note)
        if self.source:  # which may be gone the next time
            self.save(self.start)

    def whole(self):
        """The context in which the plain network has the weights."""
        return self.step.diffusion.net.whole()

    @contextlib.contextmanager
    def averaged(self):
        """The context in which the plain network has the averaged weights."""
        with self.step.ema.averaged(), self.whole():
            yield

    def gathered(self, average):
        """An average's whole weights, by name, on the main rank."""
        return self.step.diffusion.net.gathered(average.shadow)

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
        rate = self.step.learning_rate(done - 1)
        scale = self.step.scaler.get_scale()
        self.tracker.log(
            done,
            readings
            | {
                "train/learning_rate": rate,
                "train/loss_scale": scale,
                "train/rollbacks": self.step.guard.rollbacks,
            },
        )

    def say_first_loss(self, done):
        """Say the loss of the first step of this process, long before the first row."""
        self.last_line = time.monotonic()
        loss = self.meters.read()["train/loss"]
        self.tracker.say(
            f"the first step is done: train/loss {loss:.4f} at step {done} of {self.total}"
        )

    @property
    def quiet(self):
        """True where the last line of the training is a minute old."""
        return time.monotonic() - self.last_line >= QUIET_SECONDS

    def show_progress(self, done):
        """Show the mean loss since the last row, which nothing records."""
        self.last_line = time.monotonic()
        self.tracker.progress(done, self.meters.read()["train/loss"])

    def check(self, done):
        """Raise Diverged where the training has gone wrong for good, which its guard and fp16's
        loss scale tell.
        """
        guard = self.step.guard
        scale = self.step.scaler.get_scale()
        trouble = guard.trouble(min(PATIENCE, self.total))
        if not trouble and scale < SMALLEST:
            trouble = f"fp16's loss scale fell to {scale:g}"
        if trouble:
            raise Diverged(f"{trouble}, up to step {done}", guard.well.item())

    def roll_back(self, diverged):
        """Cut what is not from when all was well, for the run to be made anew; returns words on
        where that begins.
        """
        if self.machine.main:
            checkpoint.cut(self.folder, diverged.well)
        self.machine.barrier()
        step, _ = (checkpoint.checkpoints(self.folder) or [(0, None)])[-1]
        return (
            f"from {f'step {step}' if step else 'the start'} on in another order, at "
            f"{self.rollback:g} of the learning rate"
        )

    def go_back(self, why):
        """Stand, made anew, where the run has gone back to: tracking keeps why, and a save lets
        the next start go this way.
        """
        self.tracker.summary("train/diverged", why)
        self.best.loss = math.inf  # the best weights may be of the other way
        self.save(self.start)

    def diagnosis(self):
        """Words on the last step that was skipped, or where none was on the last that all was
        well at.
        """
        guard = self.step.guard
        step = (guard.bad if guard.bad >= 0 else guard.well).item()
        return f"step {step + 1}: {self.step.diagnosis(step, next(iter(self.batches(step))))}"

    def choose_best(self, done):
        """Keep the averaged weights where they are the best yet: by the validation loss, which is
        logged too.

        Where no image is held out it is by the training loss since the last time.
        """
        if self.best.by == "val/loss_ema":
            self.keep_best(self.validate(done), done)
        elif "validate" in self.due.names or self.best.loss == math.inf:
            # at the end there may be few steps to average over
            self.keep_best(self.meters.loss_since(), done)

    def keep_best(self, loss, done):
        """Keep the averaged weights, if their loss is the lowest yet."""
        if self.best.improved(loss):
            self.tracker.summary(f"best/{self.best.by.replace('/', '_')}", loss)
            self.export(self.best.file, done, {"by": self.best.by, "loss": loss})

    def validate(self, done):
        """Log the validation loss of the weights and of their average; returns the latter."""
        with self.whole():
            loss = self.validation.loss()
        with self.averaged():
            averaged = self.validation.loss()
        self.tracker.log(
            done, {"val/loss": loss, "val/loss_ema": averaged} | self.speed.progress(done)
        )
        return averaged

    def draw_grid(self, done):
        """Draw the same latents as every time, with the averaged weights, into samples/ and the
        tracker.
        """
        seeds, recipe = self.grid
        with self.averaged():
            drawn = self.machine.gather(sampling_draw.joined(self.draw(seeds, recipe)))
        if self.machine.main:
            show(self.folder, self.tracker, done, {"samples": drawn})

    def remark_on_cost(self, done):
        """Say before the first evaluation that costs more than the training it measures how long
        both take.
        """
        images = done * self.step.batch_size
        if self.evaluation <= images:
            return
        ours = self.speed.seconds(images)
        theirs = self.speed.seconds(self.evaluation)
        spent = (
            ""
            if ours is None
            else f", about {in_words(theirs)} against {in_words(ours)} at the speed measured so far"
        )
        share = portion(self.evaluation / max(images, 1), " of")
        self.tracker.say_once(
            "cost",
            f"the evaluation that begins costs {share} what the training up to step {done} "
            f"did{spent}; fewer evaluate.num_samples or evaluate.steps cost less, and "
            "--config.every.evaluate='0 steps' leaves it out",
        )

    def evaluate(self, done):
        """Log how far from real images drawn ones are, the real ones nearest to them, and
        bits/dim, by the averaged weights.
        """
        watch = Stopwatch()
        self.remark_on_cost(done)
        with self.averaged():
            numbers, pictures = self.score(self.draw)
            bits, files = self.likelihood()
        if (numbers or bits) and self.machine.main:
            cost = {"speed/evaluation_seconds": watch.lap()} | (
                {} if self.share is None else {"eval/share": self.share}
            )
            self.tracker.log(done, numbers | bits | cost | self.speed.progress(done))
            show(self.folder, self.tracker, done, pictures)
            write_texts(self.folder, files)
            for line in copying_warning(
                numbers, f"look at {grid_file(self.folder, 'eval/nearest', done)}"
            ):
                self.tracker.say(line)

    def export(self, name, done, best=None):
        """Write the averaged weights as `name`: all that drawing needs, and by which loss they
        are the best, if they are.
        """
        weights = self.gathered(self.step.ema)
        if self.machine.main:
            training_weights.export(
                self.folder / name,
                weights,
                done,
                self.config_json,
                **({"best": best} if best else {}),
            )

    def tidy(self):
        """Do, of a finished run, what a kill in its last save has left undone, and make final
        weights anew that are damaged.
        """
        if not self.machine.broadcast(training_weights.has_final(self.folder, self.start)):
            self.export("final.safetensors", self.start)
        if self.machine.main:
            checkpoint.prune(self.folder, well=self.step.guard.well.item())

    def snapshot(self, done):
        """Store the power-function averages, from which any profile is made later."""
        averages = {name: self.gathered(average) for name, average in self.stored.items()}
        if self.machine.main:
            training_weights.save_snapshot(
                self.folder, done, self.config_json, averages, dict(self.step.net.named_buffers())
            )

    def save(self, done, milestone=False):
        """Save everything to continue, once the rows up to here are on disk."""
        with self.machine.stop.reserve_time():
            self.tracker.flush()
            for part in self.parts.values():
                if hasattr(part, "collect"):  # ranks share it out
                    part.collect()
            if self.machine.main:
                checkpoint.save(
                    self.folder,
                    done,
                    self.config_json,
                    self.parts,
                    milestone=milestone,
                    well=self.step.guard.well.item(),
                )
        self.saved = done, self.due.names

    def stop(self, done, stopped):
        """Leave together with the other ranks, and save if that is not done: events that are not
        over come first next time.
        """
        self.machine.leave(stopped)
        if self.due.names is not None:
            self.tracker.forget(done)
        if self.saved != (done, self.due.names):
            self.save(done, milestone="milestone" in (self.due.names or ()))


def grid_file(folder, key, done):
    """Where images are kept as a grid, by their tracked key."""
    return Path(
        folder,
        "samples",
        f"{'step' if key == 'samples' else key.rpartition('/')[2]}_{done:08d}.png",
    )


def show(folder, tracker, done, pictures):
    """Keep images [b, c, h, w] by their tracked keys as grids in samples/ and in the tracker."""
    for key, drawn in pictures.items():
        nrow = None if key == "samples" else 8
        pixels.save_image_grid(drawn, grid_file(folder, key, done), nrow)
        tracker.log(done, {}, {key: pixels.make_grid(drawn, nrow)})


def events(run, done):
    """What is due after `done` steps, and at the end all that is wanted at all. May raise
    StopTraining.
    """
    wanted = {name for name, every in run.every.items() if not every.never}
    due = run.due.names or set()
    last = done == run.total
    now = due | wanted if last else due
    if "log" in now:
        run.log_training(done)
    if now or last:
        run.check(done)
    with run.speed.pause():
        if "validate" in now:
            run.choose_best(done)
        if "sample" in now:
            run.draw_grid(done)
        if "evaluate" in now:
            run.evaluate(done)
        run.machine.barrier()  # none has left
        if last:
            run.export("final.safetensors", done)
        if "snapshot" in now:
            run.snapshot(done)
        if "log" in due:
            run.meters.reset(*LOGGED)
        if "validate" in due:
            run.meters.reset("since")
        run.due.names = None
        run.tracker.flush()  # or the row would come with the next one
        if now & {"save", "milestone"}:
            run.save(done, milestone="milestone" in due)


def train(run):
    """Train to the run's length and return True, or until asked to stop and return False; either
    way everything is saved.
    """
    done = run.start
    machine = run.machine
    with machine.stop.install_handlers() as stop:
        try:
            if run.due.names is not None:
                events(run, done)
            for step, batch in enumerate(run.speed.timed(run.batches(run.start)), run.start):
                with stop.reserve_time():
                    run.step(step, batch)
                done = step + 1
                run.tracker.tick(done)
                if step == run.start:
                    run.say_first_loss(done)

                due = {name for name, every in run.every.items() if every.due(done)}
                said = machine.all_gather((due, run.quiet, stop.requested))
                due, quiet, _ = said[0]
                # only rank 0's clock counts, and a request to any rank
                requested = any(requested for *_, requested in said)
                if due or done == run.total:
                    run.due.names = due
                    # steps that a GPU has not come to yet would be counted to the pause
                    machine.wait()
                if requested:
                    raise StopTraining(agreed=True)
                if quiet and "log" not in due:
                    run.show_progress(done)
                if run.due.names is not None:
                    events(run, done)
                elif done % PATIENCE == 0:
                    run.check(done)
        except StopTraining as stopped:
            run.stop(done, stopped)
    return done == run.total and run.due.names is None


if __name__ == "__main__":
    sys.exit("error: the command that trains is `python -m ddpm.main --config=configs/digits.py`")
