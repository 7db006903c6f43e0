"""Groups runs by setting, and compares the groups: intervals, paired t-tests, Holm's correction."""

import itertools
import math
import re
import statistics
from collections import Counter, defaultdict
from dataclasses import dataclass, replace

from ddpm.studies import compatibility
from ddpm.studies import runs as studies_runs

VARIED = "varied"
LONGEST_NAME = 60  # of a setting in a figure: letters that fit next to its dots


@dataclass(frozen=True)
class Group:
    """The runs of one setting."""

    setting: dict  # {axis: value}
    runs: list
    unit: str  # the option that repeats a setting
    row: int  # of the report's table, from 1

    @property
    def name(self):
        return ", ".join(self.labels) or "all runs"

    @property
    def short(self):
        """The name for a figure: the row of the table where the name is long."""
        return self.name if len(self.name) <= LONGEST_NAME else f"row {self.row}"

    @property
    def labels(self):
        """The setting in words: an option's name before each value that does not name itself."""
        leaves = Counter(axis.rpartition(".")[2] for axis in self.setting)
        words = []
        for axis, value in self.setting.items():
            leaf = axis.rpartition(".")[2]
            name = isinstance(value, str) and re.match(r"[a-z_]\w*($|\()", value)
            option = axis if leaves[leaf] > 1 else leaf
            alone = name or axis == studies_runs.CONFIG_AXIS
            words.append(option_text(value) if alone else f"{option} {option_text(value)}")
        return words

    def of_seed(self, seed):
        return [run for run in self.runs if run.options[self.unit] == seed]

    def values(self, number):
        """{unit: number(run)}, averaged over the runs of a unit, without None."""
        by_unit = defaultdict(list)
        for run in self.runs:
            value = number(run)
            if value is not None:
                by_unit[run.options[self.unit]].append(value)
        return {unit: statistics.fmean(values) for unit, values in sorted(by_unit.items())}

    def final(self, key):
        """The mean of a key's last values over the units, and its 95 % half-width."""
        return interval(self.values(lambda run: run.final(key)).values())

    def curve(self, key):
        """[(step, petaflop or None, mean, half-width or None)], at steps that all runs logged."""
        logged = {run.name: dict(run.points(key)) for run in self.runs}
        points = []
        for step in sorted(set.intersection(*map(set, logged.values()))):
            values = self.values(lambda run, at=step: logged[run.name][at])
            points.append((step, self.runs[0].petaflop(step), *interval(values.values())))
        return points


def runs_of(groups):
    return list(itertools.chain.from_iterable(group.runs for group in groups))


def label(key):
    """A tracked key as readers know it: `eval/fd_digits` is FD (digits)."""
    if key in studies_runs.LABELS:
        return studies_runs.LABELS[key]
    kind, _, extractor = key.partition("/")[2].partition("_")
    return f"{kind.upper()} ({extractor})" if extractor else kind.upper()


def option_text(value):
    """An option's value as users write it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


def group_runs(runs, axes, reference=None):
    """The groups of runs, sorted by setting: numbers rise, and the reference's words come first."""
    seeds, drawn = ({run.options[name] for run in runs} for name in studies_runs.UNITS)
    unit = "sample.seed" if len(seeds) == 1 and len(drawn) > 1 else "seed"
    members = defaultdict(list)
    for run in runs:
        members[tuple(run.options[axis] for axis in axes)].append(run)

    def place(values):
        places = []
        for axis, value in zip(axes, values, strict=True):
            is_word = isinstance(value, (str, tuple))
            first = (reference or {}).get(axis)
            places.append((value != first, option_text(value)) if is_word else (False, value))
        return places

    return [
        Group(dict(zip(axes, values, strict=True)), members[values], unit, row)
        for row, values in enumerate(sorted(members, key=place), 1)
    ]


def numeric_axes(groups):
    """The axes of numbers with three or more values between which only the axis differs."""
    axes = []
    for axis in groups[0].setting:
        values = [group.setting[axis] for group in groups]
        numeric = all(type(value) in (int, float) for value in values)
        if numeric and max(map(len, lines_along(groups, axis).values())) >= 3:
            axes.append(axis)
    return axes


def lines_along(groups, axis):
    """{the other options' values: groups that differ only in a numeric axis, in its order}."""
    lines = defaultdict(list)
    for group in sorted(groups, key=lambda group: group.setting[axis]):
        others = tuple(value for option, value in group.setting.items() if option != axis)
        lines[others].append(group)
    return dict(lines)


# statistics


def interval(values):
    """(Mean, half-width of its 95 % interval by Student's t or None for a single value)."""
    values = list(values)
    mean = statistics.fmean(values)
    n = len(values)
    return mean, t_critical(n - 1) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None


def t_critical(freedom, tests=1):
    """The |t| that is significant at 5 %, two-sided, for the clearest of `tests` by Holm's rule."""
    from scipy.stats import t  # half a second of start-up

    return float(t.isf(0.025 / tests, freedom))


@dataclass(frozen=True)
class Difference:
    """How far the metric of group `better` lies below that of `worse`, over the seeds they share.

    Half-width and p are None for fewer than MIN_SEEDS seeds.
    """

    better: Group
    worse: Group
    by: float  # the mean
    half: float | None  # of its 95 % interval
    wins: int  # seeds in which it is lower
    seeds: int
    p: float | None  # of the paired t-test, after Holm's correction

    @property
    def clear(self):
        """True where it is larger than the noise."""
        return self.p is not None and self.p < 0.05


def difference(first, second, metric):
    """The Difference of two groups, p not yet corrected; None where they share no seed.

    The test is paired, on the metric's own scale: runs of one seed share data order, times and
    noise, and no equal spread is assumed.
    """
    ones, others = (group.values(lambda run: run.final(metric)) for group in (first, second))
    gaps = [others[unit] - ones[unit] for unit in ones if unit in others]
    if not gaps:
        return None
    if statistics.fmean(gaps) < 0:
        first, second = second, first
        gaps = [-gap for gap in gaps]
    mean, half = interval(gaps)
    p = paired_p(gaps) if len(gaps) >= studies_runs.MIN_SEEDS else None
    half = half if p is not None else None
    return Difference(first, second, mean, half, sum(gap > 0 for gap in gaps), len(gaps), p)


def paired_p(gaps):
    """The two-sided p of the paired t-test whose differences are `gaps`."""
    from scipy.stats import ttest_1samp

    if statistics.pstdev(gaps) == 0:
        return float(statistics.fmean(gaps) == 0)
    return float(ttest_1samp(gaps, 0).pvalue)


def holm(ps):
    """p-values corrected for their number, to bound the chance of any false alarm (Holm 1979)."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    scaled = [min(1.0, (len(ps) - rank) * ps[index]) for rank, index in enumerate(order)]
    corrected = dict(zip(order, itertools.accumulate(scaled, max), strict=True))
    return [corrected[index] for index in range(len(ps))]


def compared_pairs(groups, reference=None):
    """The pairs of groups to compare: few, since each comparison makes the others less certain.

    They differ in one axis. Along a numeric axis they are neighbours; on an axis of more than
    ALL_PAIRS_UP_TO words one is the reference {axis: value}, if there is one. A group without a
    partner is compared with all others.
    """
    numeric = numeric_axes(groups)
    pairs = []
    for first, second in itertools.combinations(groups, 2):
        differing = [axis for axis in first.setting if first.setting[axis] != second.setting[axis]]
        if len(differing) != 1 or differing[0] in numeric:
            continue
        axis = differing[0]
        many = len({group.setting[axis] for group in groups}) > studies_runs.ALL_PAIRS_UP_TO
        values = first.setting[axis], second.setting[axis]
        if not (many and reference) or reference[axis] in values:
            pairs.append((first, second))
    for axis in numeric:
        for line in lines_along(groups, axis).values():
            pairs += itertools.pairwise(line)
    paired = set(map(id, itertools.chain.from_iterable(pairs)))
    for pair in itertools.combinations(groups, 2):
        if any(id(group) not in paired for group in pair):
            pairs.append(pair)
    return pairs


def differences(groups, metric, reference=None):
    """The Differences between groups in the final value of a metric, p corrected."""
    pairs = compared_pairs(groups, reference)
    gaps = [difference(first, second, metric) for first, second in pairs]
    gaps = [gap for gap in gaps if gap]
    corrected = iter(holm([gap.p for gap in gaps if gap.p is not None]))
    return [gap if gap.p is None else replace(gap, p=next(corrected)) for gap in gaps]


@dataclass(frozen=True)
class Comparison:
    """A comparison of runs in one metric."""

    runs: list  # with a fault where they do not count
    axes: list
    groups: list  # of the runs that count
    metric: str
    gaps: list  # the Differences in it

    @property
    def counted(self):
        return runs_of(self.groups)

    @property
    def protocol(self):
        """The parts of how the distances were measured, `VARIED` for one in which runs differ."""
        named = studies_runs.protocols_of(self.counted, "eval/protocol")
        ways = [compatibility.parse_protocol(text) for _, text in named]
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
        """(Smallest difference that half of the comparisons would show after correction for the
        clearest of all, the same alone, number of comparisons); None where none shows its noise.
        """
        tested = [gap for gap in self.gaps if gap.half]
        if not tested:
            return None
        count = sum(gap.p is not None for gap in self.gaps)
        first = [
            gap.half * t_critical(gap.seeds - 1, count) / t_critical(gap.seeds - 1)
            for gap in tested
        ]
        return statistics.median(first), statistics.median(gap.half for gap in tested), count

    @property
    def unlike(self):
        """The varied options under which a loss is not the same quantity."""
        options = studies_runs.varied(self.counted)
        return [option for option in options if option in studies_runs.LOSS_OPTIONS]


def compare(runs, axes=None, wanted=None, reference=None):
    """The Comparison of runs by a wanted metric, else by the one they have.

    `axes` are the options that vary on purpose, by default all; `reference` is the setting that
    others are compared with. Raises ValueError for runs of several studies, and where none counts.
    """
    runs = studies_runs.mark_unfinished(runs)
    axes = studies_runs.varied(runs) if axes is None else list(axes)
    compatibility.check_same_options(runs, axes)
    runs = studies_runs.mark_repeats(runs, axes)
    complete = [run for run in runs if not run.fault]
    if complete:
        compatibility.check_same_protocol(complete, axes)
        metric = studies_runs.main_metric(complete, wanted)
        runs = studies_runs.mark_unmeasured(runs, metric)
    counted = [run for run in runs if not run.fault]
    if not counted:
        faults = "; ".join(f"{run.name}: {run.fault}" for run in runs[:3])
        faults += " ..." * (len(runs) > 3)
        raise ValueError(f"none of {len(runs)} runs is finished ({faults})")
    comparison = Comparison(runs, axes, group_runs(counted, axes, reference), metric, [])
    if metric in studies_runs.LOSSES and comparison.unlike:
        return comparison
    return replace(comparison, gaps=differences(comparison.groups, metric, reference))
