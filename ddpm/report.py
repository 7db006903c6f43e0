"""Results in words and tables: what is larger than the noise, the answer in a sentence, csv, markdown, plain text."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from ddpm import results
from ddpm.results import ASKED, FEWEST, FRECHET, KERNEL, LEARNED, LOSSES, PERFECT, RETIRED, Run, interval, keys, label


class Column(NamedTuple):
    """A number of each run: its name in the csv, its heading, how it is read, and the table it stands in, if any."""

    name: str
    heading: str
    number: Callable[[Run], float | None]
    table: str = ""
    spread: bool = True  # whether an interval over seeds says something


def columns(groups, parameters):
    """The columns that these groups can fill; `parameters` counts those of a run's network."""
    runs = [run for group in groups for run in group.runs]
    distances = keys(runs, FRECHET) + keys(runs, KERNEL)
    losses = [key for key in (*LOSSES, LEARNED) if key in keys(runs)]
    memory = "memory/vram_peak_gib" if "memory/vram_peak_gib" in keys(runs) else "memory/rss_gib"
    found = []
    for table, group in (("distances", distances), ("losses", losses)):
        for key in group:
            found.append(Column(key, label(key), lambda run, key=key: run.final(key), table))
            if key != LEARNED and any(len(run.points(key)) > 1 for run in runs):  # in the csv always, to be seen if it differs
                found.append(Column(f"best {key}", f"best {label(key)}", lambda run, key=key: run.best(key),
                                    table if flatters(runs, key) else ""))
    for key in keys(runs, "eval/.*"):
        if key not in distances and not key.endswith(RETIRED):
            known = key in results.LABELS and (key != ASKED or len({run.final(key) for run in runs}) > 1)
            shown, spread = "distances" if known else "", not key.endswith(PERFECT) and key != ASKED
            found.append(Column(key, label(key), lambda run, key=key: run.final(key), shown, spread))
    found += [
        Column("speed/images_per_second", "images/s", lambda run: run.median("speed/images_per_second"), "cost", False),
        Column(memory, "peak memory, GiB", lambda run: run.highest(memory), "cost", False),
        Column("parameters", "parameters", parameters, "cost", False),
        Column("progress/petaflop", "petaflop of training", lambda run: run.final("progress/petaflop"), "cost", False)]
    return [column for column in found if any(group.values(column.number) for group in groups)]


def flatters(runs, key):
    """True where the best value of a run is not its last."""
    return any(run.best(key) != run.final(key) for run in runs)


def csv(groups, columns):
    """A line for each group: its setting, its seeds, and each column with its interval; six digits, the same on any machine."""
    heads = [*groups[0].setting, "seeds"]
    for column in columns:
        heads += [column.name, *([f"{column.name} low", f"{column.name} high"] if column.spread else [])]
    lines = [heads]
    for group in groups:
        cells = [*map(results.shown, group.setting.values()), str(seeds(group))]
        for column in columns:
            values = group.values(column.number).values()
            mean, half = interval(values) if values else (None, None)
            cells.append(digits(mean))
            if column.spread:
                cells += ["", ""] if half is None else [digits(mean - half), digits(mean + half)]
        lines.append(cells)
    return "".join(",".join(map(quoted, line)) + "\n" for line in lines)


def quoted(cell):
    return '"' + cell.replace('"', '""') + '"' if re.search('[",\n]', cell) else cell


def digits(value):
    return "" if value is None else f"{value:.6g}"


def seeds(group):
    return len({run.knobs[group.unit] for run in group.runs})


def repeats(groups):
    """How many seeds the groups have, `5 seeds` or `4 to 5 seeds`."""
    counts = sorted({seeds(group) for group in groups})
    return f"{counts[0]}{f' to {counts[-1]}' if counts[1:] else ''} seed{'s' * (counts[-1] > 1)}"


def table(groups, columns):
    """Rows of words: the settings, the seeds, and the columns as mean ± half of the 95 % interval.

    Rows are numbered where figures call a setting by its row.
    """
    numbered = any(group.short != group.name for group in groups)
    rows = [["row"] * numbered + [axis.rpartition(".")[2] for axis in groups[0].setting] +
            ["seeds", *(column.heading for column in columns)]]
    for group in groups:
        rows.append([str(group.row)] * numbered + [*map(results.shown, group.setting.values()), str(seeds(group)),
                    *(cell(group.values(column.number).values(), column.spread) for column in columns)])
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
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown(rows):
    """The same for a README."""
    rows = [[word.replace("|", "\\|") for word in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]])


# words


def said(gap, metric):
    """A difference in a sentence."""
    pair, few = f"{gap.better.name} from {gap.worse.name}", f"{gap.seeds} seed{'s' * (gap.seeds > 1)}"
    by = amount(gap.by, gap.half).partition(" ")[0]
    if gap.half is None:
        return f"cannot tell {pair}: {label(metric)} differs by {by}, and {few} show no noise ({FEWEST} are the fewest that do)"
    if gap.by == gap.half == 0:
        return f"cannot tell {pair}: the same in each of {few}"
    places = places_of(gap.half)
    span = f"{gap.by - gap.half:.{places}f} to {gap.by + gap.half:.{places}f}"
    if gap.clear:
        return (f"{gap.better.name} is better than {gap.worse.name}: {label(metric)} lower by {by} (95 % interval {span}) in "
                f"{gap.wins} of {gap.seeds} seeds, {p_of(gap.p)} after correction")
    if gap.by > gap.half:
        return (f"cannot tell {pair}: the difference {by} ({span}, {few}) does not outlast the correction for the number of "
                f"comparisons, {p_of(gap.p)}")
    return f"cannot tell {pair}: the difference {by} lies within the noise ({span}), {few}"


def p_of(p):
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def differences(found):
    """A sentence for each comparison that was made, or one for why there is none."""
    return [said(gap, found.metric) for gap in found.gaps] if any(gap.p is not None for gap in found.gaps) else [answer(found)]


def answer(found):
    """What a comparison says, in a sentence or two: the lowest setting, what it is better than, what it cannot be told from."""
    metric, groups = found.metric, found.groups
    enough = min(FEWEST, max(map(seeds, groups)))
    best = min((group for group in groups if seeds(group) >= enough), key=lambda group: group.final(metric)[0])
    reached = f"{label(metric)} {amount(*best.final(metric))}"
    lowest = f"{best.name} has the lowest mean, {reached}"
    over = f"{repeats(groups)} a setting"
    if len(groups) == 1:
        return f"There is one setting, so nothing to compare: {reached}, {over}."
    if metric in LOSSES and found.unlike:
        return (f"Cannot tell: no distance was measured, and the {label(metric)} is another quantity for each "
                f"{listed([f'`{knob}`' for knob in found.unlike])}.")
    if not any(gap.p is not None for gap in found.gaps):
        return f"Cannot tell: {over} do not show the noise ({FEWEST} are the fewest that do). {lowest}."
    beaten = [gap for gap in found.gaps if gap.clear and gap.better is best]
    close = [gap.worse.name if gap.better is best else gap.better.name
             for gap in found.gaps if not gap.clear and (gap.better is best or gap.worse is best)]
    others = [f"{gap.better.name} is better than {gap.worse.name}" for gap in found.gaps
              if gap.clear and gap.better is not best]
    more = f" Apart from that, {listed(others)}." if 0 < len(others) < 4 else ""
    if not beaten:
        told = f", but its difference from {listed(close)} is not larger than the noise" if close else ""
        return f"Cannot tell which is best: {lowest}{told} ({over}).{more}"
    weakest = max(beaten, key=lambda gap: gap.p)
    against = f"least certain against {weakest.worse.name}, " if beaten[1:] else ""
    better = f"better than {listed([gap.worse.name for gap in beaten])} ({against}{p_of(weakest.p)} after correction, {over})"
    if len(beaten) == len(groups) - 1:
        return f"{best.name} is best: {reached}, {better}."
    return f"{lowest}; it is {better}{f', and cannot be told from {listed(close)}' if close else ''}.{more}"


def trends(found):
    """The metric along each numeric axis, in the words of one sentence each; nothing where there are many lines."""
    for axis in results.numeric_axes(found.groups):
        lines = results.lines_along(found.groups, axis)
        if len(lines) > MOST_LINES:
            continue
        several = {}
        for line in lines.values():
            others = ", ".join(words for knob, words in zip(line[0].setting, line[0].labels, strict=True) if knob != axis)
            values = ", ".join(results.shown(group.setting[axis]) for group in line)
            means = " → ".join(amount(*group.final(found.metric)).partition(" ")[0] for group in line)
            several.setdefault(values, []).append(f"{others} {means}".strip())
        for values, told in several.items():
            yield f"{label(found.metric)} along {axis.rpartition('.')[2]} {values}: {'; '.join(told)}."


MOST_LINES = 4


def answer_and_trends(found):
    """All that a comparison says in short."""
    return " ".join([answer(found), *trends(found)])


def listed(words):
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# the report


def protocol(found, record):
    """How the numbers were made, sentence by sentence."""
    knobs, groups, runs = found.counted[0].knobs, found.groups, found.counted
    repeated = "of the training" if groups[0].unit == "seed" else "of the sampling, from one training,"
    yield (f"{len(runs)} runs: {len(groups)} settings of {listed([f'`{axis}`' for axis in found.axes] or ['nothing'])}, "
           f"{repeats(groups)} {repeated} each, by the commands below.")
    if results.is_training(runs):
        about = {"train.length": "{}", "train.batch_size": "of {} images", "data.source": "of {}",
                 "data.image_size": "at {} pixels"}
        yield f"Trained for {' '.join(form.format(knobs[key]) for key, form in about.items() if key not in found.axes)}."
    if ways := found.ways:
        last = {part: value for way in ways for part, value in way.items()}
        parts = {part: value if all(way.get(part) == value for way in ways) else "varied" for part, value in last.items()}
        yield f"Distances: {', '.join(f'{part} {value}' for part, value in parts.items())}."
    if ways := sorted({text for run in runs for text in run.made("eval/bits_per_dim_made")}):
        yield f"Likelihood: {listed(ways)}."
    if known := list(perfect(runs)):
        yield f"A perfect generator would get {listed(known)} (± standard deviation of one evaluation) from so many samples."
    where = [record["commit"] and f"Commit {record['commit']}", f"torch {record['torch']}", record["machine"]]
    yield f"{', '.join(filter(None, where))}."


def code_of(runs):
    """By which code runs were made, {"0494cba": number of runs}, the most frequent first; {} where none of them recorded it."""
    counts = Counter(", then ".join(run.code) or "code that was not recorded" for run in runs)
    return dict(counts.most_common()) if any(run.code for run in runs) else {}


def mixed_code(runs):
    """A sentence that warns of runs which different code made: lines, mostly none."""
    if len(codes := code_of(runs)) > 1:
        made = listed([f"{code} ({count} run{'s' if count > 1 else ''})" for code, count in codes.items()])
        yield f"The runs were made by different code, so a difference may come from that: {made}."


def perfect(runs):
    """What a perfect generator gets, `FD (digits) 0.179 ± 0.058`, of each number for which all runs say the same."""
    for key in keys(runs, "eval/.*"):
        values = {tuple(run.final(f"{key}{end}") for end in PERFECT) for run in runs}
        if len(values) == 1 and None not in (only := values.pop()):
            yield f"{label(key)} {amount(*only)}"


def limits(found):
    """What a comparison does not show, sentence by sentence, from its facts."""
    knobs = found.counted[0].knobs
    if found.visible:
        first, alone, count = found.visible
        yield (f"{repeats(found.groups)} a setting: a difference in {label(found.metric)} below about {first:.2g} would mostly "
               "have stayed unseen." + (
                   f" That counts the correction for {count} comparisons as it is for the clearest of them; each one after it "
                   f"needs less, and a single comparison, uncorrected, {alone:.2g}." if count > 1 else ""))
    else:
        yield (f"{repeats(found.groups)} a setting do not show the noise, so no difference can be believed; {FEWEST} are the "
               "fewest that do.")
    yield from mixed_code(found.counted)
    if found.groups[0].unit != "seed":
        yield "All numbers are of one training: another seed of it may order the settings otherwise."
    about = {"data.source": "data set ({})", "data.image_size": "size ({} pixels)", "train.length": "length of training ({})"}
    if fixed := [form.format(knobs[key]) for key, form in about.items() if key not in found.axes]:
        yield f"One {listed(fixed)}: elsewhere the settings may come in another order."
    if ways := found.ways:
        how = {"samples": "{} samples", "sampler": "{}", "steps": "{} steps", "spacing": "{} spacing",
               "guidance": "guidance {}"}
        alike = [form.format(ways[0][part]) for part, form in how.items()
                 if part in ways[0] and all(way.get(part) == ways[0][part] for way in ways)]
        yield f"One way of drawing ({', '.join(alike)}): drawn otherwise the settings may come in another order."
        if len({way.get("seed") for way in ways}) == 1:
            yield (f"One seed of the sampling ({ways[0].get('seed')}): the intervals, over trainings, do not include sampling "
                   "noise.")
    yield "One recipe for all settings: learning rate and the like were not tuned for each, which favours those they suit."
    if found.unlike:
        yield (f"Losses under different {listed([f'`{knob}`' for knob in found.unlike])} are different quantities: they show "
               "the course of a training, not which is better.")
    if flatters(found.counted, found.metric):
        yield ("Best values are the lowest of several measurements of a run, so they flatter; answer and differences are about "
               "the last values.")
    if keys(found.counted, r"eval/fd_\w+"):
        yield f"{label(keys(found.counted, FRECHET)[0])} is not FID, and compares only with itself."
    if keys(found.counted, "speed/.*"):
        yield ("images/s and peak memory are as measured beside whatever else the machines did, other runs of the study too: "
               "they do not tell the settings apart.")


METHOD = """By paired t-tests over the shared seeds in the last values, with p-values corrected for the number of comparisons
(Holm). They are made on the metric's own scale: a paired test asks for no equal spread, and its interval is in the metric's
units. Settings are compared that differ in one axis; along a numeric axis neighbours, and where an axis has more than four
names each with the first."""


def picture(name, caption):
    """A picture with its caption; where it is a PDF, drawn in lines, the png beside it is shown and the PDF linked."""
    linked = f" ([PDF]({name}))" * name.endswith(".pdf")
    return f"![{caption}]({name.removesuffix('.pdf') + '.png' if linked else name})\n\n*{caption}*{linked}"


INTERVALS = """Mean ± half of the 95 % interval over seeds (Student's t), each by itself: which settings differ is told
below, by pairs of runs of one seed and corrected for the number of comparisons, and not by whether intervals overlap."""

MEANINGS = {
    LEARNED: "training loss: the mean over the last logged steps, of images, times and noise drawn there; the validation loss, "
             "of fixed ones, rises above it where a network overfits.",
    "eval/copying": "copying: the probability that a drawn image lies nearer to a training image than a held-out one does, 0.5 "
                    "for a perfect generator and 1 for one that copies.",
    "eval/copies": "copies: the share of drawn images that lie nearer to a training image than all but one in twenty of the "
                   "held-out ones do, about 0.05 for a perfect generator."}
NO_COPIES = "copies: not measured, as fewer than 19 images are held out."


def readme(title, question, found, columns, pictures, record, left_out, again):
    """The report: question, answer, protocol, result, uncertainty, what was left out and not shown, and how to repeat it."""

    def bullets(lines):
        return "\n".join(f"- {line}" for line in lines)

    tables = [[column for column in columns if column.table == name] for name in ("distances", "losses", "cost")]
    tables = [markdown(table(found.groups, some)) for some in tables if some and [some[0].name] != ["parameters"]]
    names = [column.name for column in columns]
    meanings = [words for key, words in MEANINGS.items() if key in names]
    if "eval/copying" in names and "eval/copies" not in names:
        meanings.append(NO_COPIES)
    if any(column.name.startswith("best ") and not column.table for column in columns):
        meanings.append("best values: where none is shown, a run's best is its last; results.csv has them.")
    return "\n\n".join([
        f"# {title}", f"**Question.** {question}", f"**Answer.** {answer_and_trends(found)}",
        f"**Protocol.** {' '.join(protocol(found, record))}",
        "## Result", *tables, INTERVALS, *([bullets(meanings)] if meanings else []),
        *(picture(name, caption) for name, caption in pictures),
        "## Which differences are larger than the noise", bullets(differences(found)), METHOD,
        *(["## Left out", "In no average and no figure:", bullets(left_out)] if left_out else []),
        "## What this does not show", bullets(limits(found)), "## Again", again]) + "\n"
