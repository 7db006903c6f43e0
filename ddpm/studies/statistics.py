"""Intervals over seeds, paired differences, and their p-values corrected by Holm's method."""

import itertools
import math
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from ddpm.studies import compatibility
from ddpm.studies import runs as studies_runs

VARIED = "varied"
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
        """The name for a figure, where it must leave room for what is drawn: the row of the
        table if it is long.
        """
        return self.name if len(self.name) <= LONGEST_NAME else f"row {self.row}"

    @property
    def labels(self):
        """The setting in words: names speak for themselves, other values are preceded by their
        option's.
        """
        leaves = Counter(axis.rpartition(".")[2] for axis in self.setting)

        def words(axis, value):
            leaf = axis.rpartition(".")[2]
            speaks = (
                axis == studies_runs.CONFIG_AXIS
                or isinstance(value, str)
                and re.match(r"[a-z_]\w*($|\()", value)
            )
            return (
                option_text(value)
                if speaks
                else f"{axis if leaves[leaf] > 1 else leaf} {option_text(value)}"
            )

        return [words(axis, value) for axis, value in self.setting.items()]

    def values(self, number):
        """{unit: number(run)}, averaged over the runs of a unit, where it is not None."""
        found = defaultdict(list)
        for run in self.runs:
            value = number(run)
            if value is not None:
                found[run.options[self.unit]].append(value)
        return {unit: statistics.fmean(values) for unit, values in sorted(found.items())}

    def final(self, key):
        """The mean of a key's last values over the units, and its 95 % half-width."""
        return interval(self.values(lambda run: run.final(key)).values())

    def curve(self, key):
        """[(step, compute in petaflop or None, mean, half-width or None)] at the steps that
        every run has logged.
        """
        logged = {run.name: dict(run.points(key)) for run in self.runs}
        steps = sorted(set.intersection(*map(set, logged.values())))
        means = [
            interval(self.values(lambda run, at=step: logged[run.name][at]).values())
            for step in steps
        ]
        return [
            (step, self.runs[0].petaflop(step), *mean)
            for step, mean in zip(steps, means, strict=True)
        ]


def label(key):
    """A tracked key as people know it: `eval/fd_digits` is FD (digits)."""
    if key in studies_runs.LABELS:
        return studies_runs.LABELS[key]
    kind, _, extractor = key.partition("/")[2].partition("_")
    return f"{kind.upper()} ({extractor})" if extractor else kind.upper()


def option_text(value):
    """An option's value as people write it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def group_runs(runs, axes, reference=None):
    """The groups of runs, sorted by their settings: numbers rising; words too, but those of the
    reference first.
    """
    trainings = {run.options["seed"] for run in runs}
    unit = (
        "sample.seed"
        if len(trainings) == 1 and len({run.options["sample.seed"] for run in runs}) > 1
        else "seed"
    )
    members = defaultdict(list)
    for run in runs:
        members[tuple(run.options[axis] for axis in axes)].append(run)

    def place(values):
        return [
            (value != (reference or {}).get(axis), option_text(value))
            if isinstance(value, (str, tuple))
            else (False, value)
            for axis, value in zip(axes, values, strict=True)
        ]

    return [
        Group(dict(zip(axes, values, strict=True)), members[values], unit, row)
        for row, values in enumerate(sorted(members, key=place), 1)
    ]


def numeric_axes(groups):
    """The axes along which there is something to draw: three or more numbers, all else being
    equal.
    """

    def numeric(value):
        return isinstance(value, (int, float)) and not isinstance(value, bool)

    return [
        axis
        for axis in groups[0].setting
        if all(numeric(group.setting[axis]) for group in groups)
        and max(map(len, lines_along(groups, axis).values())) >= 3
    ]


def lines_along(groups, axis):
    """Groups that differ in a numeric axis alone, in its order: {the other options' values:
    [group, ...]}.
    """
    lines = defaultdict(list)
    for group in sorted(groups, key=lambda group: group.setting[axis]):
        lines[tuple(value for option, value in group.setting.items() if option != axis)].append(
            group
        )
    return dict(lines)


# statistics


def interval(values):
    """The mean of values and the half-width of its 95 % interval by Student's t; None for fewer
    than two values.
    """
    values = list(values)
    mean = statistics.fmean(values)
    n = len(values)
    return mean, t_critical(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def t_critical(freedom, among=1):
    """What Student's t must reach to be significant at 5 %, two-sided, as the first by Holm's
    rule `among` so many tests.
    """
    from scipy.stats import t  # half a second of start-up

    return float(t.isf(0.025 / among, freedom))


@dataclass(frozen=True)
class Difference:
    """By how much the metric of one group lies below another's: mean and 95 % half-width over
    shared seeds, and p.

    `wins` counts the seeds in which it does. p is of the paired t-test, corrected for the number of
    comparisons; half-width and p are None for fewer than `FEWEST` seeds.
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

    A paired test on the metric's own scale: pairs share data order, times and noise, and it asks
    for no equal spread.
    """
    ones, others = (group.values(lambda run: run.final(metric)) for group in (first, second))
    gaps = [others[unit] - ones[unit] for unit in ones if unit in others]
    if not gaps:
        return None
    if statistics.fmean(gaps) < 0:
        first, second, gaps = second, first, [-gap for gap in gaps]
    mean, half = interval(gaps)
    few = len(gaps) < studies_runs.MIN_SEEDS
    return Difference(
        first,
        second,
        mean,
        None if few else half,
        sum(gap > 0 for gap in gaps),
        len(gaps),
        None if few else paired_p(gaps),
    )


def paired_p(gaps):
    """The two-sided p of the paired t-test whose differences are `gaps`."""
    from scipy.stats import ttest_1samp

    if statistics.pstdev(gaps) == 0:
        return float(statistics.fmean(gaps) == 0)
    return float(ttest_1samp(gaps, 0).pvalue)


def holm(ps):
    """p-values corrected for their number (Holm 1979), which bounds the chance of any false
    alarm.
    """
    order = sorted(range(len(ps)), key=ps.__getitem__)
    scaled = [min(1.0, (len(ps) - rank) * ps[index]) for rank, index in enumerate(order)]
    corrected = dict(zip(order, itertools.accumulate(scaled, max), strict=True))
    return [corrected[index] for index in range(len(ps))]


def compared_pairs(groups, reference=None):
    """Which groups are compared: those that differ in one axis, since every comparison more costs
    certainty in the others.

    On a numeric axis they are neighbours; on one with more than `MANY` words one of them is the
    reference, a setting {axis: value}, if there is one. A group that finds no partner so is
    compared with all others.
    """
    chosen = []
    numeric = numeric_axes(groups)
    for first, second in itertools.combinations(groups, 2):
        differing = [axis for axis in first.setting if first.setting[axis] != second.setting[axis]]
        if len(differing) == 1 and (axis := differing[0]) not in numeric:
            many = len({group.setting[axis] for group in groups}) > studies_runs.ALL_PAIRS_UP_TO
            if not (many and reference) or reference[axis] in (
                first.setting[axis],
                second.setting[axis],
            ):
                chosen.append((first, second))
    for axis in numeric:
        chosen += [
            pair for line in lines_along(groups, axis).values() for pair in itertools.pairwise(line)
        ]
    met = {id(group) for pair in chosen for group in pair}
    chosen += [
        pair
        for pair in itertools.combinations(groups, 2)
        if any(id(group) not in met for group in pair)
    ]
    return chosen


def differences(groups, metric, reference=None):
    """The differences between groups in the final value of a metric, p corrected for their
    number.
    """
    found = [
        gap
        for first, second in compared_pairs(groups, reference)
        if (gap := difference(first, second, metric))
    ]
    corrected = iter(holm([gap.p for gap in found if gap.p is not None]))
    return [gap if gap.p is None else replace(gap, p=next(corrected)) for gap in found]


@dataclass(frozen=True)
class Comparison:
    """All runs, those that do not count with their fault; the others in groups; the metric that
    decides, and by how much.
    """

    runs: list
    axes: list
    groups: list
    metric: str
    gaps: list

    @property
    def counted(self):
        return [run for group in self.groups for run in group.runs]

    @property
    def protocol(self):
        """The parts of how the distances were measured, `VARIED` for one in which runs differ."""
        texts = [text for run in self.counted for text in run.protocols("eval/protocol")]
        ways = [compatibility.parse_protocol(text) for text in texts]
        merged = {}
        for way in ways:
            merged |= way
        for part, value in merged.items():
            if any(way.get(part) != value for way in ways):
                merged[part] = VARIED
        return merged

    @property
    def tested(self):
        """True where any two settings share the seeds that a test takes."""
        return any(gap.p is not None for gap in self.gaps)

    @property
    def visible(self):
        """The smallest differences that half of the comparisons would show: (as the clearest of
        all, alone, their number).

        Half of the median 95 % interval is what one test alone shows; Holm's rule asks more of the
        clearest of several. None where no comparison shows its noise.
        """
        shown = [gap for gap in self.gaps if gap.half]
        count = sum(gap.p is not None for gap in self.gaps)
        first = [
            gap.half * t_critical(gap.seeds - 1, count) / t_critical(gap.seeds - 1) for gap in shown
        ]
        return (
            (statistics.median(first), statistics.median(gap.half for gap in shown), count)
            if shown
            else None
        )

    @property
    def unlike(self):
        """The varied options under which a loss is not the same quantity: other noise levels,
        targets or images.
        """
        return [
            option
            for option in studies_runs.varied(self.counted)
            if option in studies_runs.LOSS_OPTIONS
        ]


def compare(runs, axes=None, wanted=None, reference=None):
    """Compare runs by a wanted metric, or by the one they have.

    `axes` are the options that vary on purpose, by default all; `reference` is the setting that
    others are measured by. Raises ValueError for runs that do not belong together, and where none
    is finished.
    """
    runs = studies_runs.mark_unfinished(runs)
    axes = studies_runs.varied(runs) if axes is None else list(axes)
    compatibility.check_same_options(runs, axes)
    runs = studies_runs.mark_repeats(runs, axes)
    whole = [run for run in runs if not run.fault]
    if whole:
        compatibility.check_same_protocol(whole, axes)
        runs = studies_runs.mark_unmeasured(runs, metric := studies_runs.main_metric(whole, wanted))
    counted = [run for run in runs if not run.fault]
    if not counted:
        faults = "; ".join(f"{run.name}: {run.fault}" for run in runs[:3])
        raise ValueError(
            f"none of {len(runs)} runs is finished ({faults}{' ...' * (len(runs) > 3)})"
        )
    found = Comparison(runs, axes, group_runs(counted, axes, reference), metric, [])
    alike = metric not in studies_runs.LOSSES or not found.unlike
    return replace(found, gaps=differences(found.groups, metric, reference)) if alike else found
