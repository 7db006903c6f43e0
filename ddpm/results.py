"""Run folders become results: settings averaged over seeds, with intervals, and the differences larger than the noise.

    setting  what the runs of a group share, {"diffusion.beta_schedule": "cosine"}; its knobs are the axes of the study
    unit     what is repeated to see the noise: the training seed, or the sampling seed where there is one training only

A number that is not finite counts as missing, and so does one beyond HUGE, of which no mean or square could be had.
"""

import itertools
import math
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from ddpm import clock, config
from ddpm.tracking import whole_row

FEWEST = 3  # seeds: of two differences the spread is hardly known
HUGE = 1e100
MANY = 4  # words on an axis that are all compared with each other
FRECHET, KERNEL = re.compile(r"eval/(fid|fd_(?!\w+_(perfect|floor))\w+)"), re.compile(r"eval/(kid|kd_\w+)")
PERFECT = "_perfect", "_perfect_sd"  # what a perfect generator gets: the mean, and the standard deviation of one evaluation
RETIRED = "_floor"  # its place until 2026-11: half of it, of a generator that knows the real images by heart
LOSSES, LEARNED = ("val/loss_ema", "val/loss"), "train/loss"
ASKED = "eval/evaluations"
QUANTITY = (  # knobs that decide what the validation loss is a mean of
    "diffusion.timesteps", "diffusion.beta_schedule", "diffusion.zero_terminal_snr", "diffusion.predict", "diffusion.loss",
    "diffusion.weighting", "diffusion.self_condition", "data.class_labels", "data.source", "data.image_size", "data.channels",
    "data.matte", "data.validation_fraction")
LABELS = {
    "val/loss_ema": "validation loss", "val/loss": "validation loss, raw weights", LEARNED: "training loss, raw weights",
    "eval/copying": "copying", "eval/copies": "copies", "eval/bits_per_dim": "bits/dim",
    ASKED: "network evaluations", "eval/bits_per_dim_flow": "bits/dim (flow)"}
FILE = "config"  # the axis of a study that varies the config file itself; its runs have it among their knobs
UNITS = ("seed", "sample.seed")
UNRELATED = (  # knobs that do not touch what is compared
    "wandb.", "every.log", "every.sample", "every.save", "every.milestone", "every.snapshot", "train.activation_checkpointing",
    "data.num_workers", "data.cache", "data.classes", "sample.batch_size", "evaluate.batch_size", "evaluate.inception_weights")
MADE = [re.compile(text) for text in (  # as ddpm.score writes it, of distances and of bits/dim: few parts are `.+`,
    # or a text that is nearly one would take hours
    r"(?P<extractor>[^;]+); (?P<samples>\d+) samples of the (?P<weights>[^;]+) weights in (?P<arithmetic>\w+); "
    r"(?P<sampler>[^;]+), (?P<steps>\d+) steps, (?P<spacing>[^;]+?) spacing, seed (?P<seed>\d+)(, guidance (?P<guidance>.+?))?"
    r"(, classes (?P<classes>.+?))?; against (?P<images>\d+) images (?P<data>\w+)"
    r"(, by (?P<kept>\d+) of them except for the Frechet distance)?",
    r"bits/dim of (?P<likelihood_images>[^,]+)(, given (?P<given>.+),)? under the (?P<weights>[^,]+) weights, "
    r"by (?P<evaluations>\d+) evaluations")]
PROTOCOLS = ("eval/made", "eval/bits_per_dim_made")
MEASURING = "a study of ddpm.evaluate, as experiments/samplers.yaml does"
ON_PURPOSE = {  # parts in which numbers may differ where a knob is an axis; other data or another extractor never compare
    "samples": {"evaluate.num_samples"}, "weights": {"sample.ema"}, "arithmetic": {"train.amp"},
    "sampler": {"evaluate.sampler"}, "steps": {"evaluate.steps"}, "spacing": {"evaluate.spacing", "sample.spacing"},
    "evaluations": {"evaluate.likelihood_evaluations"}, "classes": {"data.class_labels", "evaluate.classes"},
    "given": {"data.class_labels"},
    "guidance": {"sample.guidance", "sample.guidance_interval", "sample.guide"}}


@dataclass(frozen=True)
class Run:
    """What a run folder holds: flat knobs, rows of metrics.jsonl, the last grid drawn, and why it does not count, if so.

    `code` has the commits that ran it, in order, and is empty where they were not recorded.
    """

    name: str
    folder: Path
    knobs: dict
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

    def made(self, key):
        """How the numbers were made that a key such as `eval/made` is about, once each way."""
        return list(dict.fromkeys(str(row[key]) for row in self.rows if row.get(key)))

    def petaflop(self, step):
        """Training compute up to a step in 10^15 operations; None where the run did not count them."""
        counted = [point for point in self.points("progress/petaflop") if point[0]][-1:]
        return counted[0][1] * step / counted[0][0] if counted else None


def finite(value):
    return isinstance(value, (int, float)) and abs(value) < HUGE


def read(folder):
    """The run in a folder, up to the first row that is not whole. Raises ValueError where there is no config to be read."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} holds no run: there is no config.json in it")
    try:
        knobs = config.flatten(config.changed(config.read(path), {}))  # and so checked
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    log = folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True) if log.is_file() else []
    rows = list(itertools.takewhile(lambda row: row is not None, map(whole_row, lines)))
    fault = f"metrics.jsonl is torn after {len(rows)} rows" if len(rows) < len(lines) else "" if rows else "no rows"
    grids = sorted(path for path in folder.glob("samples/step_*.png") if path.stem[5:].isdecimal())
    return Run(folder.name, folder, knobs, rows, grids[-1] if grids else None, fault,
               config.code_in(folder))


def is_training(runs):
    """True where any of the runs is a training, False where all only measured a checkpoint."""
    return any(LEARNED in row for run in runs for row in run.rows)


def cut_short(run):
    """Why a run is no finished training: where it ends, and where it should have; nothing if it is one."""
    if not is_training([run]):
        return "measures a checkpoint, and others are trainings: compare those by themselves"
    epochs, images = dict(run.points("progress/epoch")), dict(run.points("progress/images"))
    sizes = [images[step] / epoch for step, epoch in epochs.items() if step in images and epoch > 1 / HUGE]
    total = clock.steps_of(run.knobs["train.length"], run.knobs["train.batch_size"], round(sizes[-1]) if sizes else 1)
    last = run.rows[-1]["step"]
    return "" if sizes and last >= total else f"ends at step {last}" + (f" of {total}" if sizes else "")


def finished(runs):
    """The runs, those that came to no end marked with a fault."""
    training = is_training(runs)
    return [replace(run, fault=cut_short(run)) if training and not run.fault else run for run in runs]


def distinct(runs, axes):
    """The runs, those marked with a fault that repeat one before them: in options, in seeds and in how they were measured."""
    training, first, told = is_training(runs), {}, []
    for run in runs:
        options = [(knob, value) for knob, value in run.knobs.items()
                   if knob in UNITS or knob in axes or is_related(knob, training)]
        point = (*options, *(text for key in PROTOCOLS for text in run.made(key)))
        other = run if run.fault else first.setdefault(point, run)
        told.append(run if other is run else replace(run, fault=f"repeats {other.name}, with the same knobs and seeds"))
    return told


def measured(runs, metric):
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
    raise ValueError("no run has a distance or a validation loss; set --config.every.evaluate or --config.every.validate")


# settings


def is_related(knob, training=True):
    """True for a knob that may change what is compared; how trainings are measured is judged by `check_made`."""
    ignored = UNRELATED + (("evaluate.",) if training else ())
    return knob not in UNITS and not any(knob == name or name.endswith(".") and knob.startswith(name) for name in ignored)


def varied(runs):
    """The knobs in which runs differ, seeds and what does not matter apart."""
    training = is_training(runs)
    return [knob for knob in runs[0].knobs if is_related(knob, training) and len({run.knobs[knob] for run in runs}) > 1]


def check_same(runs, axes):
    """Raise a ValueError that names a run, and the knob in which it differs from the others of its config file, if no axis."""
    files = defaultdict(list)
    for run in runs:
        files[run.knobs.get(FILE)].append(run)
    for alike in files.values():
        for knob in varied(alike):
            if knob not in axes:
                usual = Counter(run.knobs[knob] for run in alike).most_common(1)[0][0]
                other = next(run for run in alike if run.knobs[knob] != usual)
                raise ValueError(f"{other.folder} is of another study: config.{knob} is {other.knobs[knob]!r} there and "
                                 f"{usual!r} elsewhere; move it away")


def made(text):
    """The parts of an `eval/made`, {"extractor": "digits-e5b6c631", "samples": "1797", ...}."""
    matches = filter(None, (form.fullmatch(text) for form in MADE))
    parts = next((match.groupdict() for match in matches), {"eval/made": text})
    return {part: value for part, value in parts.items() if value is not None}


def check_made(runs, axes):
    """Raise a ValueError that names the part and the runs where distances, or bits/dim, were made in different ways.

    What the axes vary may differ, and the seed.
    """
    for key in PROTOCOLS:
        check_ways([(run.name, made(text)) for run in runs for text in run.made(key)], axes)


def check_ways(ways, axes):
    """Raise a ValueError where the parts of (name, parts) differ, but for what the axes vary and the seed."""
    for part in dict.fromkeys(part for _, way in ways for part in way):
        found = defaultdict(list)
        for name, way in ways:
            found[way.get(part, "something else")].append(name)
        if len(found) > 1 and part != "seed" and not ON_PURPOSE.get(part, set()) & {*axes}:
            who = "; ".join(f"{value[:200]} in {names[0]}" + (f" and {len(names) - 1} more" if names[1:] else "")
                            for value, names in found.items())
            option = next((option for option in sorted(ON_PURPOSE.get(part, ())) if option.startswith("evaluate.")), None)
            remedy = f"give all runs the same config.{option}" if option else "leave runs out"
            raise ValueError(f"numbers made in different ways do not compare: {part} is {who}; {remedy}, or measure their "
                             f"checkpoints in {MEASURING}")


LONGEST_NAME = 60  # of a setting in a figure: letters that fit beside its dots


@dataclass(frozen=True)
class Group:
    """The runs of one setting."""

    setting: dict
    runs: list
    unit: str
    row: int  # of the report's table, from 1

    @property
    def name(self):
        return ", ".join(self.labels) or "all runs"

    @property
    def short(self):
        """The name for a figure, where it must leave room for what is drawn: the row of the table if it is long."""
        return self.name if len(self.name) <= LONGEST_NAME else f"row {self.row}"

    @property
    def labels(self):
        """The setting in words: names speak for themselves, other values are preceded by their knob's."""
        leaves = Counter(axis.rpartition(".")[2] for axis in self.setting)

        def words(axis, value):
            leaf = axis.rpartition(".")[2]
            speaks = axis == FILE or isinstance(value, str) and re.match(r"[a-z_]\w*($|\()", value)
            return shown(value) if speaks else f"{axis if leaves[leaf] > 1 else leaf} {shown(value)}"

        return [words(axis, value) for axis, value in self.setting.items()]

    def values(self, number):
        """{unit: number(run)}, averaged over the runs of a unit, where it is not None."""
        found = defaultdict(list)
        for run in self.runs:
            value = number(run)
            if value is not None:
                found[run.knobs[self.unit]].append(value)
        return {unit: statistics.fmean(values) for unit, values in sorted(found.items())}

    def final(self, key):
        """The mean of a key's last values over the units, and its 95 % half-width."""
        return interval(self.values(lambda run: run.final(key)).values())

    def curve(self, key):
        """[(step, compute in petaflop or None, mean, half-width or None)] at the steps that every run has logged."""
        logged = {run.name: dict(run.points(key)) for run in self.runs}
        steps = sorted(set.intersection(*map(set, logged.values())))
        means = [interval(self.values(lambda run, at=step: logged[run.name][at]).values()) for step in steps]
        return [(step, self.runs[0].petaflop(step), *mean) for step, mean in zip(steps, means, strict=True)]


def label(key):
    """A tracked key as people know it: `eval/fd_digits` is FD (digits)."""
    if key in LABELS:
        return LABELS[key]
    kind, _, extractor = key.partition("/")[2].partition("_")
    return f"{kind.upper()} ({extractor})" if extractor else kind.upper()


def shown(value):
    """A knob's value as people write it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def grouped(runs, axes, reference=None):
    """The groups of runs, sorted by their settings: numbers rising; words too, but those of the reference first."""
    trainings = {run.knobs["seed"] for run in runs}
    unit = "sample.seed" if len(trainings) == 1 and len({run.knobs["sample.seed"] for run in runs}) > 1 else "seed"
    members = defaultdict(list)
    for run in runs:
        members[tuple(run.knobs[axis] for axis in axes)].append(run)

    def place(values):
        return [(value != (reference or {}).get(axis), shown(value)) if isinstance(value, (str, tuple)) else (False, value)
                for axis, value in zip(axes, values, strict=True)]

    return [Group(dict(zip(axes, values, strict=True)), members[values], unit, row)
            for row, values in enumerate(sorted(members, key=place), 1)]


def numeric_axes(groups):
    """The axes along which there is something to draw: three or more numbers, all else being equal."""

    def numeric(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    return [axis for axis in groups[0].setting if all(numeric(group.setting[axis]) for group in groups)
            and max(map(len, lines_along(groups, axis).values())) >= 3]


def lines_along(groups, axis):
    """Groups that differ in a numeric axis alone, in its order: {the other knobs' values: [group, ...]}."""
    lines = defaultdict(list)
    for group in sorted(groups, key=lambda group: group.setting[axis]):
        lines[tuple(value for knob, value in group.setting.items() if knob != axis)].append(group)
    return dict(lines)


# statistics


def interval(values):
    """The mean of values and the half-width of its 95 % interval by Student's t; None for fewer than two values."""
    values = list(values)
    mean, n = statistics.fmean(values), len(values)
    return mean, student(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def student(freedom, among=1):
    """What Student's t must reach to be significant at 5 %, two-sided, as the first by Holm's rule `among` so many tests."""
    from scipy.stats import t  # half a second of start-up

    return float(t.isf(0.025 / among, freedom))


@dataclass(frozen=True)
class Difference:
    """By how much the metric of one group lies below another's: mean and 95 % half-width over shared seeds, and p.

    `wins` counts the seeds in which it does. p is of the paired t-test, corrected for the number of comparisons; half-width
    and p are None for fewer than `FEWEST` seeds.
    """

    better: Group
    worse: Group
    by: float
    half: float | None
    wins: int
    seeds: int
    p: float | None

    @property
    def clear(self):
        """True where it is larger than the noise."""
        return self.p is not None and self.p < 0.05


def difference(first, second, metric):
    """The difference of two groups, p not yet corrected; None where they share no seed.

    A paired test on the metric's own scale: pairs share data order, times and noise, and it asks for no equal spread.
    """
    ones, others = (group.values(lambda run: run.final(metric)) for group in (first, second))
    gaps = [others[unit] - ones[unit] for unit in ones if unit in others]
    if not gaps:
        return None
    if statistics.fmean(gaps) < 0:
        first, second, gaps = second, first, [-gap for gap in gaps]
    mean, half = interval(gaps)
    few = len(gaps) < FEWEST
    return Difference(first, second, mean, None if few else half, sum(gap > 0 for gap in gaps), len(gaps),
                      None if few else paired_p(gaps))


def paired_p(gaps):
    """The two-sided p of the t-test that the mean of the gaps is 0."""
    from scipy.stats import t

    mean, error = statistics.fmean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))
    if error == 0:
        return float(mean == 0)
    return float(2 * t.sf(abs(mean) / error, len(gaps) - 1))


def holm(ps):
    """p-values corrected for their number (Holm 1979): the chance of one false alarm in all of them stays at the level."""
    corrected, highest = [None] * len(ps), 0.0
    for rank, index in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        highest = corrected[index] = min(1.0, max(highest, (len(ps) - rank) * ps[index]))
    return corrected


def pairs(groups, reference=None):
    """Which groups are compared: those that differ in one axis, since every comparison more costs certainty in the others.

    On a numeric axis they are neighbours; on one with more than `MANY` words one of them is the reference, a setting
    {axis: value}, if there is one. A group that finds no partner so is compared with all others.
    """
    chosen, numeric = [], numeric_axes(groups)
    for first, second in itertools.combinations(groups, 2):
        differing = [axis for axis in first.setting if first.setting[axis] != second.setting[axis]]
        if len(differing) == 1 and (axis := differing[0]) not in numeric:
            many = len({group.setting[axis] for group in groups}) > MANY
            if not (many and reference) or reference[axis] in (first.setting[axis], second.setting[axis]):
                chosen.append((first, second))
    for axis in numeric:
        chosen += [pair for line in lines_along(groups, axis).values() for pair in itertools.pairwise(line)]
    met = {id(group) for pair in chosen for group in pair}
    chosen += [pair for pair in itertools.combinations(groups, 2) if any(id(group) not in met for group in pair)]
    return chosen


def differences(groups, metric, reference=None):
    """The differences between groups in the final value of a metric, p corrected for their number."""
    found = [gap for first, second in pairs(groups, reference) if (gap := difference(first, second, metric))]
    corrected = iter(holm([gap.p for gap in found if gap.p is not None]))
    return [gap if gap.p is None else replace(gap, p=next(corrected)) for gap in found]


@dataclass(frozen=True)
class Comparison:
    """All runs, those that do not count with their fault; the others in groups; the metric that decides, and by how much."""

    runs: list
    axes: list
    groups: list
    metric: str
    gaps: list

    @property
    def counted(self):
        return [run for group in self.groups for run in group.runs]

    @property
    def ways(self):
        """How the distances of each run were made, in parts."""
        return [made(text) for run in self.counted for text in run.made("eval/made")]

    @property
    def visible(self):
        """The smallest differences that half of the comparisons would show: (as the clearest of all, alone, their number).

        Half of the median 95 % interval is what one test alone shows; Holm's rule asks more of the clearest of several. None
        where no comparison shows its noise.
        """
        shown = [gap for gap in self.gaps if gap.half]
        count = sum(gap.p is not None for gap in self.gaps)
        first = [gap.half * student(gap.seeds - 1, count) / student(gap.seeds - 1) for gap in shown]
        return (statistics.median(first), statistics.median(gap.half for gap in shown), count) if shown else None

    @property
    def unlike(self):
        """The varied knobs under which a loss is not the same quantity: other noise levels, targets or images."""
        return [knob for knob in varied(self.counted) if knob in QUANTITY]


def compare(runs, axes=None, wanted=None, reference=None):
    """Compare runs by a wanted metric, or by the one they have.

    `axes` are the knobs that vary on purpose, by default all; `reference` is the setting that others are measured by. Raises
    ValueError for runs that do not belong together, and where none is finished.
    """
    runs = finished(runs)
    axes = varied(runs) if axes is None else list(axes)
    check_same(runs, axes)
    runs = distinct(runs, axes)
    whole = [run for run in runs if not run.fault]
    if whole:
        check_made(whole, axes)
        runs = measured(runs, metric := main_metric(whole, wanted))
    counted = [run for run in runs if not run.fault]
    if not counted:
        faults = "; ".join(f"{run.name}: {run.fault}" for run in runs[:3])
        raise ValueError(f"none of {len(runs)} runs is finished ({faults}{' ...' * (len(runs) > 3)})")
    found = Comparison(runs, axes, grouped(counted, axes, reference), metric, [])
    alike = metric not in LOSSES or not found.unlike
    return replace(found, gaps=differences(found.groups, metric, reference)) if alike else found
