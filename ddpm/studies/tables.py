"""The tables of a report: columns, CSV and markdown."""

import csv as csv_format
import io
import math
from collections.abc import Callable
from typing import NamedTuple

from ddpm.common.registry import quantity
from ddpm.studies import runs as studies_runs
from ddpm.studies import statistics
from ddpm.studies.runs import (
    FRECHET,
    KERNEL,
    LOSSES,
    NFE,
    OLD_FLOOR,
    PERFECT,
    TRAIN_LOSS,
    Run,
    keys,
)
from ddpm.studies.statistics import interval, label


class Column(NamedTuple):
    """A number of each run: its name in the csv, its heading, how it is read, and the table it
    stands in, if any.
    """

    name: str
    heading: str
    number: Callable[[Run], float | None]
    table: str = ""
    spread: bool = True  # whether an interval over seeds says something


def columns(groups, parameters):
    """The columns that these groups can fill; `parameters` counts those of a run's network."""
    runs = [run for group in groups for run in group.runs]
    distances = keys(runs, FRECHET) + keys(runs, KERNEL)
    losses = [key for key in (*LOSSES, TRAIN_LOSS) if key in keys(runs)]
    memory = "memory/vram_peak_gib" if "memory/vram_peak_gib" in keys(runs) else "memory/rss_gib"
    found = []
    for table, group in (("distances", distances), ("losses", losses)):
        for key in group:
            found.append(Column(key, label(key), lambda run, key=key: run.final(key), table))
            # in the csv always, to be seen if it differs
            if key != TRAIN_LOSS and any(len(run.points(key)) > 1 for run in runs):
                found.append(
                    Column(
                        f"best {key}",
                        f"best {label(key)}",
                        lambda run, key=key: run.best(key),
                        table if best_differs(runs, key) else "",
                    )
                )
    for key in keys(runs, "eval/.*"):
        if key not in distances and not key.endswith(OLD_FLOOR):
            known = key in studies_runs.LABELS and (
                key != NFE or len({run.final(key) for run in runs}) > 1
            )
            shown = "distances" if known else ""
            spread = not key.endswith(PERFECT) and key != NFE
            found.append(
                Column(key, label(key), lambda run, key=key: run.final(key), shown, spread)
            )
    found += [
        Column(
            "speed/images_per_second",
            "images/s",
            lambda run: run.median("speed/images_per_second"),
            "cost",
            False,
        ),
        Column(memory, "peak memory, GiB", lambda run: run.highest(memory), "cost", False),
        Column("parameters", "parameters", parameters, "cost", False),
        Column(
            "progress/petaflop",
            "petaflop of training",
            lambda run: run.final("progress/petaflop"),
            "cost",
            False,
        ),
    ]
    return [column for column in found if any(group.values(column.number) for group in groups)]


def best_differs(runs, key):
    """True where the best value of a run is not its last."""
    return any(run.best(key) != run.final(key) for run in runs)


def csv(groups, columns):
    """A line for each group: its setting, its seeds, and each column with its interval; six
    digits, the same on any machine.
    """
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
    counts = sorted({count_seeds(group) for group in groups})
    return f"{f'{counts[0]} to ' if counts[1:] else ''}{quantity(counts[-1], 'seed')}"


def table(groups, columns):
    """Rows of words: the settings, the seeds, and the columns as mean ± half of the 95 % interval.

    Rows are numbered where figures call a setting by its row.
    """
    numbered = any(group.short != group.name for group in groups)
    rows = [
        ["row"] * numbered
        + [axis.rpartition(".")[2] for axis in groups[0].setting]
        + ["seeds", *(column.heading for column in columns)]
    ]
    for group in groups:
        rows.append(
            [str(group.row)] * numbered
            + [
                *map(statistics.option_text, group.setting.values()),
                str(count_seeds(group)),
                *(cell(group.values(column.number).values(), column.spread) for column in columns),
            ]
        )
    return rows


def cell(values, spread=True):
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
    """A table for the terminal, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def markdown(rows):
    """The same for a README."""
    rows = [[word.replace("|", "\\|") for word in row] for row in rows]
    return "\n".join(
        "| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    )
