"""Reads run folders, and marks the runs that do not count.

    setting  what the runs of a group share, {"diffusion.beta_schedule": "cosine"}; its options are
             the axes of the study
    unit     what is repeated to show the noise: the training seed, or the sampling seed where there
             is only one training

A number that is not finite, or beyond LARGEST_NUMBER, whose square overflows, counts as missing.
"""

import itertools
import re
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

from ddpm.common import durations
from ddpm.config import defaults, files
from ddpm.tracking.rows import parse_row

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
    "data.background",
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
UNRELATED = (  # besides the section wandb, options that do not touch what is compared
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
    "evaluate.extractor",
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
    """The content of a run folder."""

    name: str
    folder: Path
    options: dict  # flat
    rows: list  # of metrics.jsonl
    grid: Path | None = None  # the last one drawn
    fault: str = ""  # why the run does not count
    code: tuple = ()  # the commits that ran it, in order, if they were recorded

    def with_options(self, options):
        return replace(self, options=self.options | options)

    def points(self, key):
        """The (step, value) of a tracked key, where it is finite."""
        return [(row["step"], row[key]) for row in self.rows if finite(row.get(key))]

    def values(self, key):
        return [value for _, value in self.points(key)]

    def final(self, key):
        """The value of a key in the last row that has it; None where that is not finite."""
        last = [row[key] for row in self.rows if key in row][-1:]
        return last[0] if last and finite(last[0]) else None

    def best(self, key):
        """The lowest value of a key; None where there is none."""
        return min(self.values(key), default=None)

    def highest(self, key):
        return max(self.values(key), default=None)

    def median(self, key):
        values = self.values(key)
        return statistics.median(values) if values else None

    def protocols(self, key):
        """The distinct texts under a key such as `eval/protocol`, in order."""
        return list(dict.fromkeys(str(row[key]) for row in self.rows if row.get(key)))

    def petaflop(self, step):
        """Training compute up to a step in 10^15 operations; None where it was not counted."""
        counted = [point for point in self.points("progress/petaflop") if point[0]][-1:]
        return counted[0][1] * step / counted[0][0] if counted else None


def finite(value):
    return isinstance(value, (int, float)) and abs(value) < LARGEST_NUMBER


def read_run(folder):
    """The run in a folder, up to its first damaged row; ValueError without a readable config."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: there is no config.json in it")
    try:
        options = defaults.flatten(files.changed(files.read(path), {}))  # which checks it
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    log = folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
    rows = [
        {RENAMED_KEYS.get(key, key): value for key, value in row.items()}
        for row in itertools.takewhile(lambda row: row is not None, map(parse_row, lines))
    ]
    fault = "" if rows else "no rows"
    if len(rows) < len(lines):
        fault = f"metrics.jsonl is torn after {len(rows)} rows"
    grids = sorted(path for path in folder.glob("samples/step_*.png") if path.stem[5:].isdecimal())
    grid = grids[-1] if grids else None
    return Run(folder.name, folder, options, rows, grid, fault, files.code_in(folder))


def is_training(runs):
    """True where any of the runs is a training, False where all only measured a checkpoint."""
    return any(TRAIN_LOSS in row for row in rows_of(runs))


def rows_of(runs):
    return itertools.chain.from_iterable(run.rows for run in runs)


def protocols_of(runs, key):
    """(Name of a run, a text under a key such as `eval/protocol`), for each of its texts."""
    named = []
    for run in runs:
        named += [(run.name, text) for text in run.protocols(key)]
    return named


def why_unfinished(run):
    """Why a run is not a finished training; empty where it is one."""
    if not is_training([run]):
        return "measures a checkpoint, and others are trainings: compare those by themselves"
    epochs = dict(run.points("progress/epoch"))
    images = dict(run.points("progress/images"))
    steps = [step for step in epochs if step in images and epochs[step] > 1 / LARGEST_NUMBER]
    size = round(images[steps[-1]] / epochs[steps[-1]]) if steps else 1
    length = run.options["train.length"]
    total = durations.steps_of(length, run.options["train.batch_size"], size)
    last = run.rows[-1]["step"]
    if not steps:
        return f"ends at step {last}"
    return "" if last >= total else f"ends at step {last} of {total}"


def mark_unfinished(runs):
    """The runs, unfinished trainings marked with a fault."""
    if not is_training(runs):
        return runs
    return [run if run.fault else replace(run, fault=why_unfinished(run)) for run in runs]


def mark_repeats(runs, axes):
    """The runs, with a fault where they repeat options, seeds and protocol of an earlier one."""
    training = is_training(runs)
    first = {}
    marked = []
    for run in runs:
        options = [
            (option, value)
            for option, value in run.options.items()
            if option in UNITS or option in axes or is_related(option, training)
        ]
        protocols = itertools.chain.from_iterable(map(run.protocols, PROTOCOLS))
        other = run if run.fault else first.setdefault((*options, *protocols), run)
        if other is not run:
            run = replace(run, fault=f"repeats {other.name}, with the same options and seeds")
        marked.append(run)
    return marked


def mark_unmeasured(runs, metric):
    """The runs, those whose last row lacks the metric marked with a fault."""
    marked = []
    for run in runs:
        last = run.rows[-1] if run.rows else {}
        if not run.fault and not finite(last.get(metric)):
            fault = f"{metric} is not finite" if metric in last else f"no {metric}"
            run = replace(run, fault=f"{fault} at the end")
        marked.append(run)
    return marked


def keys(runs, pattern=".*"):
    """The tracked numbers of any of the runs that match a pattern in full, sorted."""
    names = set()
    for row in rows_of(runs):
        names |= {key for key, value in row.items() if finite(value)}
    return sorted(key for key in names if re.fullmatch(pattern, key))


def main_metric(runs, wanted=None):
    """The metric that decides: the wanted, a Frechet distance, or a loss; ValueError if none."""
    known = keys(runs)
    for key in (wanted, *keys(runs, FRECHET), *LOSSES):
        if key in known:
            return key
    remedy = "set --config.every.evaluate or --config.every.validate"
    raise ValueError(f"no run has a distance or a validation loss; {remedy}")


# settings


def is_related(option, training=True):
    """True for an option that may change what is compared."""
    # `check_same_protocol` judges how trainings are measured
    sections = ("wandb.", "evaluate.") if training else ("wandb.",)
    return option not in UNITS + UNRELATED and not option.startswith(sections)


def varied(runs):
    """The related options in which runs differ."""
    training = is_training(runs)
    return [
        option
        for option in (runs[0].options if runs else ())
        if is_related(option, training) and len({run.options[option] for run in runs}) > 1
    ]
