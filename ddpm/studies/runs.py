"""Run folders become results: settings averaged over seeds, with intervals, and the differences
larger than the noise.

    setting  what the runs of a group share, {"diffusion.beta_schedule": "cosine"}; its options are
             the axes of the study
    unit     what is repeated to see the noise: the training seed, or the sampling seed where there
             is one training only

A number that is not finite counts as missing, and so does one beyond HUGE, of which no mean or
square could be had.
"""

import itertools
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from ddpm.common import durations
from ddpm.config import defaults, files
from ddpm.tracking.rows import whole_row

MIN_SEEDS = 3  # seeds: of two differences the spread is hardly known
LARGEST_NUMBER = 1e100
ALL_PAIRS_UP_TO = 4  # words on an axis that are all compared with each other
FRECHET = re.compile(r"eval/(fid|fd_(?!\w+_(perfect|floor))\w+)")
KERNEL = re.compile(r"eval/(kid|kd_\w+)")
# what a perfect generator gets: the mean, and the standard deviation of one evaluation
PERFECT = "_perfect", "_perfect_sd"
# its place until 2026-11: half of it, of a generator that knows the real images by heart
OLD_FLOOR = "_floor"
LOSSES = ("val/loss_ema", "val/loss")
TRAIN_LOSS = "train/loss"
NFE = "eval/nfe"
LOSS_OPTIONS = (  # options that decide what the validation loss is a mean of
    "diffusion.timesteps",
    "diffusion.beta_schedule",
    "diffusion.zero_terminal_snr",
    "diffusion.predict",
    "diffusion.loss",
    "diffusion.weighting",
    "diffusion.self_condition",
    "data.class_labels",
    "data.source",
    "data.image_size",
    "data.channels",
    "data.matte",
    "data.validation_fraction",
)
LABELS = {
    "val/loss_ema": "validation loss",
    "val/loss": "validation loss, raw weights",
    TRAIN_LOSS: "training loss, raw weights",
    "eval/copying": "copying",
    "eval/copies": "copies",
    "eval/bits_per_dim": "bits/dim",
    NFE: "network evaluations",
    "eval/bits_per_dim_flow": "bits/dim (flow)",
}
# the axis of a study that varies the config file itself; its runs have it among their options
CONFIG_AXIS = "config"
UNITS = ("seed", "sample.seed")
UNRELATED = (  # options that do not touch what is compared
    "wandb.",
    "every.log",
    "every.sample",
    "every.save",
    "every.milestone",
    "every.snapshot",
    "train.activation_checkpointing",
    "data.num_workers",
    "data.cache",
    "data.classes",
    "sample.batch_size",
    "evaluate.batch_size",
    "evaluate.inception_weights",
)
PROTOCOLS = ("eval/protocol", "eval/bits_per_dim_protocol")
RENAMED_KEYS = {  # tracked keys of runs made before 2026-11-28: their names today
    "eval/made": "eval/protocol",
    "eval/bits_per_dim_made": "eval/bits_per_dim_protocol",
    "eval/evaluations": "eval/nfe",
}
MEASURE_STUDY = "a study of ddpm.evaluate, as experiments/samplers.yaml does"


@dataclass(frozen=True)
class Run:
    """What a run folder holds: flat options, rows of metrics.jsonl, the last grid drawn, and why it
    does not count, if so.

    `code` has the commits that ran it, in order, and is empty where they were not recorded.
    """

    name: str
    folder: Path
    options: dict
    rows: list
    grid: Path | None = None
    fault: str = ""
    code: tuple = ()

    def points(self, key):
        """The (step, value) of a tracked key, where it is finite."""
        return [(row["step"], row[key]) for row in self.rows if finite(row.get(key))]

    def final(self, key):
        """The value of a key in the last row that has it; None where that is not finite."""
        last = [row[key] for row in self.rows if key in row][-1:]
        return last[0] if last and finite(last[0]) else None

    def best(self, key):
        """The lowest value of a key; None where there is none."""
        return min((value for _, value in self.points(key)), default=None)

    def highest(self, key):
        return max((value for _, value in self.points(key)), default=None)

    def median(self, key):
        values = [value for _, value in self.points(key)]
        return statistics.median(values) if values else None

    def protocols(self, key):
        """The distinct texts under a key such as `eval/protocol`, in order."""
        return list(dict.fromkeys(str(row[key]) for row in self.rows if row.get(key)))

    def petaflop(self, step):
        """Training compute up to a step in 10^15 operations; None where the run did not count
        them.
        """
        counted = [point for point in self.points("progress/petaflop") if point[0]][-1:]
        return counted[0][1] * step / counted[0][0] if counted else None


def finite(value):
    return isinstance(value, (int, float)) and abs(value) < LARGEST_NUMBER


def read_run(folder):
    """The run in a folder, up to the first row that is not whole. Raises ValueError where there
    is no config to be read.
    """
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: there is no config.json in it")
    try:
        options = defaults.flatten(files.changed(files.read(path), {}))  # and so checked
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    log = folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
    rows = [
        {RENAMED_KEYS.get(key, key): value for key, value in row.items()}
        for row in itertools.takewhile(lambda row: row is not None, map(whole_row, lines))
    ]
    fault = (
        f"metrics.jsonl is torn after {len(rows)} rows"
        if len(rows) < len(lines)
        else ""
        if rows
        else "no rows"
    )
    grids = sorted(path for path in folder.glob("samples/step_*.png") if path.stem[5:].isdecimal())
    return Run(
        folder.name,
        folder,
        options,
        rows,
        grids[-1] if grids else None,
        fault,
        files.code_in(folder),
    )


def is_training(runs):
    """True where any of the runs is a training, False where all only measured a checkpoint."""
    return any(TRAIN_LOSS in row for run in runs for row in run.rows)


def why_unfinished(run):
    """Why a run is no finished training: where it ends, and where it should have; nothing if it
    is one.
    """
    if not is_training([run]):
        return "measures a checkpoint, and others are trainings: compare those by themselves"
    epochs = dict(run.points("progress/epoch"))
    images = dict(run.points("progress/images"))
    sizes = [
        images[step] / epoch
        for step, epoch in epochs.items()
        if step in images and epoch > 1 / LARGEST_NUMBER
    ]
    total = durations.steps_of(
        run.options["train.length"],
        run.options["train.batch_size"],
        round(sizes[-1]) if sizes else 1,
    )
    last = run.rows[-1]["step"]
    return (
        ""
        if sizes and last >= total
        else f"ends at step {last}" + (f" of {total}" if sizes else "")
    )


def mark_unfinished(runs):
    """The runs, those that came to no end marked with a fault."""
    training = is_training(runs)
    return [
        replace(run, fault=why_unfinished(run)) if training and not run.fault else run
        for run in runs
    ]


def mark_repeats(runs, axes):
    """The runs, those marked with a fault that repeat one before them: in options, in seeds and
    in how they were measured.
    """
    training = is_training(runs)
    first = {}
    told = []
    for run in runs:
        options = [
            (option, value)
            for option, value in run.options.items()
            if option in UNITS or option in axes or is_related(option, training)
        ]
        point = (*options, *(text for key in PROTOCOLS for text in run.protocols(key)))
        other = run if run.fault else first.setdefault(point, run)
        told.append(
            run
            if other is run
            else replace(run, fault=f"repeats {other.name}, with the same options and seeds")
        )
    return told


def mark_unmeasured(runs, metric):
    """The runs, those that lack the last value of the metric marked with a fault."""

    def fault(run):
        last = run.rows[-1]
        if finite(last.get(metric)):
            return ""
        return f"{metric} is not finite at the end" if metric in last else f"no {metric} at the end"

    return [run if run.fault else replace(run, fault=fault(run)) for run in runs]


def keys(runs, pattern=".*"):
    """The tracked numbers that any of the runs has, sorted, whose whole name matches."""
    found = {key for run in runs for row in run.rows for key, value in row.items() if finite(value)}
    return sorted(key for key in found if re.fullmatch(pattern, key))


def main_metric(runs, wanted=None):
    """The metric that decides: the wanted one, else a Frechet distance, else the validation loss.

    Raises ValueError where no run has any of them.
    """
    found = keys(runs)
    for key in (wanted, *keys(runs, FRECHET), *LOSSES):
        if key in found:
            return key
    raise ValueError(
        "no run has a distance or a validation loss; set --config.every.evaluate or "
        "--config.every.validate"
    )


# settings


def is_related(option, training=True):
    """True for an option that may change what is compared; how trainings are measured is judged by
    `check_same_protocol`.
    """
    ignored = UNRELATED + (("evaluate.",) if training else ())
    return option not in UNITS and not any(
        option == name or name.endswith(".") and option.startswith(name) for name in ignored
    )


def varied(runs):
    """The options in which runs differ, seeds and what does not matter apart."""
    training = is_training(runs)
    return [
        option
        for option in runs[0].options
        if is_related(option, training) and len({run.options[option] for run in runs}) > 1
    ]
