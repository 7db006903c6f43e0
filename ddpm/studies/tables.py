"""The tables of a report: columns, CSV and markdown."""

import csv as csv_format
import io
import math
from collections.abc import Callable
from typing import NamedTuple

from ddpm.common.registry import quantity
from ddpm.studies import runs as studies_runs
from ddpm.studies import statistics
from ddpm.studies.runs import LOSSES, NFE, PERFECT, TRAIN_LOSS, Run, keys
from ddpm.studies.statistics import interval, label


class Column(NamedTuple):
    """A number of each run: its name in results.csv, its heading, and the table that shows it."""

    name: str
    heading: str
    number: Callable[[Run], float | None]
    table: str = ""  # distances, losses or cost; empty for results.csv alone
    spread: bool = True  # whether an interval over seeds is meaningful


def columns(groups, parameters):
    """The columns that these groups can fill; `parameters(run)` counts those of its network."""
    runs = statistics.runs_of(groups)
    distances = keys(runs, studies_runs.FRECHET) + keys(runs, studies_runs.KERNEL)
    losses = [key for key in (*LOSSES, TRAIN_LOSS) if key in keys(runs)]
    listed = []
    for key in distances:
        listed += value_columns(runs, key, "distances")
    for key in losses:
        listed += value_columns(runs, key, "losses")
    for key in keys(runs, "eval/.*"):
        if key in distances or key.endswith(studies_runs.OLD_FLOOR):
            continue
        varies = key != NFE or len({run.final(key) for run in runs}) > 1
        table = "distances" if key in studies_runs.LABELS and varies else ""
        spread = not key.endswith(PERFECT) and key != NFE
        listed.append(Column(key, label(key), last_value(key), table, spread))
    memory = "memory/vram_peak_gib" if "memory/vram_peak_gib" in keys(runs) else "memory/rss_gib"
    speed = "speed/images_per_second"
    compute = "progress/petaflop"
    listed += [
        Column(speed, "images/s", lambda run: run.median(speed), "cost", False),
        Column(memory, "peak memory, GiB", lambda run: run.highest(memory), "cost", False),
        Column("parameters", "parameters", parameters, "cost", False),
        Column(compute, "petaflop of training", last_value(compute), "cost", False),
    ]
    return [column for column in listed if any(group.values(column.number) for group in groups)]


def last_value(key):
    return lambda run: run.final(key)


def value_columns(runs, key, table):
    """The columns of a key's last and best values; a table shows the best if they differ."""
    listed = [Column(key, label(key), last_value(key), table)]
    if key != TRAIN_LOSS and any(len(run.points(key)) > 1 for run in runs):
        shown = table if best_differs(runs, key) else ""
        listed.append(Column(f"best {key}", f"best {label(key)}", lambda run: run.best(key), shown))
    return listed


def best_differs(runs, key):
    """True where the best value of a run is not its last."""
    return any(run.best(key) != run.final(key) for run in runs)


def csv(groups, columns):
    """A line for each group: setting, seeds, each column with its interval, in six digits."""
    heads = [*groups[0].setting, "seeds"]
    for column in columns:
        ends = ("", " low", " high") if column.spread else ("",)
        heads += [column.name + end for end in ends]
    lines = [heads]
    for group in groups:
        cells = [*map(statistics.option_text, group.setting.values()), str(count_seeds(group))]
        for column in columns:
            values = group.values(column.number).values()
            mean, half = interval(values) if values else (None, None)
            low, high = (None, None) if half is None else (mean - half, mean + half)
            cells += map(digits, (mean, low, high) if column.spread else (mean,))
        lines.append(cells)
    text = io.StringIO()
    csv_format.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def digits(value):
    return "" if value is None else f"{value:.6g}"


def count_seeds(group):
    return len({run.options[group.unit] for run in group.runs})


def seeds_in_words(groups):
    """How many seeds the groups have, `5 seeds` or `4 to 5 seeds`."""
    counts = [count_seeds(group) for group in groups]
    fewest = "" if min(counts) == max(counts) else f"{min(counts)} to "
    return fewest + quantity(max(counts), "seed")


def table(groups, columns):
    """Rows of words, heads first: setting, seeds, columns as mean ± half of the 95 % interval."""
    numbered = any(group.short != group.name for group in groups)  # figures name rows by number
    axes = [axis.rpartition(".")[2] for axis in groups[0].setting]
    rows = [["row"] * numbered + axes + ["seeds", *(column.heading for column in columns)]]
    for group in groups:
        setting = list(map(statistics.option_text, group.setting.values()))
        cells = [cell(group.values(column.number).values(), column.spread) for column in columns]
        rows.append([str(group.row)] * numbered + setting + [str(count_seeds(group)), *cells])
    return rows


def cell(values, spread=True):
    """A mean with its interval, or `-` where there is no value."""
    if not values:
        return "-"
    mean, half = interval(values)
    return amount(mean, half if spread else None)


def amount(mean, half=None):
    """A number with as many digits as its uncertainty leaves it, `0.546 ± 0.031`."""
    if half:
        places = places_of(half)
        return f"{mean:,.{places}f} ± {half:,.{places}f}"
    return f"{mean:,.0f}" if abs(mean) >= 1000 else f"{mean:.3g}"


def places_of(half):
    """The decimal places that show two digits of an uncertainty."""
    return max(0, 1 - math.floor(math.log10(half))) if half else 3


def plain(rows):
    """A table for the terminal, with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [word.ljust(width) for word, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def markdown(rows):
    """A table in markdown."""
    heads, *body = [[word.replace("|", "\\|") for word in row] for row in rows]
    lines = [heads, ["---"] * len(heads), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
