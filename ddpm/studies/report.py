"""Results in words and tables: what is larger than the noise, the answer in a sentence, csv,
markdown, plain text.
"""

from collections import Counter

from ddpm.common.registry import quantity
from ddpm.studies import runs as studies_runs
from ddpm.studies import statistics
from ddpm.studies import tables as layout
from ddpm.studies.runs import FEWEST, FRECHET, LEARNED, LOSSES, PERFECT, keys
from ddpm.studies.statistics import label

# words


def said(gap, metric):
    """A difference in a sentence."""
    pair = f"{gap.better.name} from {gap.worse.name}"
    few = quantity(gap.seeds, "seed")
    by = layout.amount(gap.by, gap.half).partition(" ")[0]
    if gap.half is None:
        return (
            f"cannot tell {pair}: {label(metric)} differs by {by}, and {few} show no noise "
            f"({FEWEST} are the fewest that do)"
        )
    if gap.by == gap.half == 0:
        return f"cannot tell {pair}: the same in each of {few}"
    places = layout.places_of(gap.half)
    span = f"{gap.by - gap.half:.{places}f} to {gap.by + gap.half:.{places}f}"
    if gap.clear:
        return (
            f"{gap.better.name} is better than {gap.worse.name}: {label(metric)} lower by {by} "
            f"(95 % interval {span}) in {gap.wins} of {gap.seeds} seeds, {p_of(gap.p)} after "
            "correction"
        )
    if gap.by > gap.half:
        return (
            f"cannot tell {pair}: the difference {by} ({span}, {few}) does not outlast the "
            f"correction for the number of comparisons, {p_of(gap.p)}"
        )
    return f"cannot tell {pair}: the difference {by} lies within the noise ({span}), {few}"


def p_of(p):
    return f"p = {p:.2g}" if p >= 0.001 else "p < 0.001"


def differences(found):
    """A sentence for each comparison that was made, or one for why there is none."""
    return (
        [said(gap, found.metric) for gap in found.gaps]
        if any(gap.p is not None for gap in found.gaps)
        else [answer(found)]
    )


def answer(found):
    """What a comparison says, in a sentence or two: the lowest setting, what it is better than,
    what it cannot be told from.
    """
    metric = found.metric
    groups = found.groups
    enough = min(FEWEST, max(map(layout.seeds, groups)))
    best = min(
        (group for group in groups if layout.seeds(group) >= enough),
        key=lambda group: group.final(metric)[0],
    )
    reached = f"{label(metric)} {layout.amount(*best.final(metric))}"
    lowest = f"{best.name} has the lowest mean, {reached}"
    over = f"{layout.repeats(groups)} a setting"
    if len(groups) == 1:
        return f"There is one setting, so nothing to compare: {reached}, {over}."
    if metric in LOSSES and found.unlike:
        return (
            f"Cannot tell: no distance was measured, and the {label(metric)} is another quantity "
            f"for each {listed([f'`{option}`' for option in found.unlike])}."
        )
    if not any(gap.p is not None for gap in found.gaps):
        return (
            f"Cannot tell: {over} do not show the noise ({FEWEST} are the fewest that do). "
            f"{lowest}."
        )
    beaten = [gap for gap in found.gaps if gap.clear and gap.better is best]
    close = [
        gap.worse.name if gap.better is best else gap.better.name
        for gap in found.gaps
        if not gap.clear and (gap.better is best or gap.worse is best)
    ]
    others = [
        f"{gap.better.name} is better than {gap.worse.name}"
        for gap in found.gaps
        if gap.clear and gap.better is not best
    ]
    more = f" Apart from that, {listed(others)}." if 0 < len(others) < 4 else ""
    if not beaten:
        told = (
            f", but its difference from {listed(close)} is not larger than the noise"
            if close
            else ""
        )
        return f"Cannot tell which is best: {lowest}{told} ({over}).{more}"
    weakest = max(beaten, key=lambda gap: gap.p)
    against = f"least certain against {weakest.worse.name}, " if beaten[1:] else ""
    better = (
        f"better than {listed([gap.worse.name for gap in beaten])} "
        f"({against}{p_of(weakest.p)} after correction, {over})"
    )
    if len(beaten) == len(groups) - 1:
        return f"{best.name} is best: {reached}, {better}."
    return (
        f"{lowest}; it is "
        f"{better}{f', and cannot be told from {listed(close)}' if close else ''}.{more}"
    )


def trends(found):
    """The metric along each numeric axis, in the words of one sentence each; nothing where there
    are many lines.
    """
    for axis in statistics.numeric_axes(found.groups):
        lines = statistics.lines_along(found.groups, axis)
        if len(lines) > MOST_LINES:
            continue
        several = {}
        for line in lines.values():
            others = ", ".join(
                words
                for option, words in zip(line[0].setting, line[0].labels, strict=True)
                if option != axis
            )
            values = ", ".join(statistics.shown(group.setting[axis]) for group in line)
            means = " → ".join(
                layout.amount(*group.final(found.metric)).partition(" ")[0] for group in line
            )
            several.setdefault(values, []).append(f"{others} {means}".strip())
        for values, told in several.items():
            yield (
                f"{label(found.metric)} along {axis.rpartition('.')[2]} {values}: "
                f"{'; '.join(told)}."
            )


MOST_LINES = 4


def answer_and_trends(found):
    """All that a comparison says in short."""
    return " ".join([answer(found), *trends(found)])


def listed(words):
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


# the report


def protocol(found, record):
    """How the numbers were made, sentence by sentence."""
    options = found.counted[0].options
    groups = found.groups
    runs = found.counted
    repeated = (
        "of the training" if groups[0].unit == "seed" else "of the sampling, from one training,"
    )
    axes = listed([f"`{axis}`" for axis in found.axes] or ["nothing"])
    yield (
        f"{quantity(len(runs), 'run')}: {quantity(len(groups), 'setting')} of {axes}, "
        f"{layout.repeats(groups)} {repeated} each, by the commands below."
    )
    if studies_runs.is_training(runs):
        about = {
            "train.length": "{}",
            "train.batch_size": "of {} images",
            "data.source": "of {}",
            "data.image_size": "at {} pixels",
        }
        fixed = [form.format(options[key]) for key, form in about.items() if key not in found.axes]
        yield f"Trained for {' '.join(fixed)}."
    if ways := found.ways:
        last = {part: value for way in ways for part, value in way.items()}
        parts = {
            part: value if all(way.get(part) == value for way in ways) else "varied"
            for part, value in last.items()
        }
        yield f"Distances: {', '.join(f'{part} {value}' for part, value in parts.items())}."
    if ways := sorted({text for run in runs for text in run.made("eval/bits_per_dim_made")}):
        yield f"Likelihood: {listed(ways)}."
    if known := list(perfect(runs)):
        yield (
            f"A perfect generator would get {listed(known)} (± standard deviation of one "
            "evaluation) from so many samples."
        )
    where = [
        record["commit"] and f"Commit {record['commit']}",
        f"torch {record['torch']}",
        record["machine"],
    ]
    yield f"{', '.join(filter(None, where))}."


def code_of(runs):
    """By which code runs were made, {"0494cba": number of runs}, the most frequent first; {}
    where none of them recorded it.
    """
    counts = Counter(", then ".join(run.code) or "code that was not recorded" for run in runs)
    return dict(counts.most_common()) if any(run.code for run in runs) else {}


def mixed_code(runs):
    """A sentence that warns of runs which different code made: lines, mostly none."""
    if len(codes := code_of(runs)) > 1:
        made = listed([f"{code} ({quantity(count, 'run')})" for code, count in codes.items()])
        yield f"The runs were made by different code, so a difference may come from that: {made}."


def perfect(runs):
    """What a perfect generator gets, `FD (digits) 0.179 ± 0.058`, of each number for which all
    runs say the same.
    """
    for key in keys(runs, "eval/.*"):
        values = {tuple(run.final(f"{key}{end}") for end in PERFECT) for run in runs}
        if len(values) == 1 and None not in (only := values.pop()):
            yield f"{label(key)} {layout.amount(*only)}"


def limits(found):
    """What a comparison does not show, sentence by sentence, from its facts."""
    options = found.counted[0].options
    if found.visible:
        first, alone, count = found.visible
        yield (
            f"{layout.repeats(found.groups)} a setting: a difference in {label(found.metric)} "
            f"below about {first:.2g} would mostly have stayed unseen."
            + (
                f" That counts the correction for {count} comparisons as it is for the clearest "
                "of them; each one after it needs less, and a single comparison, uncorrected, "
                f"{alone:.2g}."
                if count > 1
                else ""
            )
        )
    else:
        yield (
            f"{layout.repeats(found.groups)} a setting do not show the noise, so no difference "
            f"can be believed; {FEWEST} are the fewest that do."
        )
    yield from mixed_code(found.counted)
    if found.groups[0].unit != "seed":
        yield (
            "All numbers are of one training: another seed of it may order the settings otherwise."
        )
    about = {
        "data.source": "data set ({})",
        "data.image_size": "size ({} pixels)",
        "train.length": "length of training ({})",
    }
    if fixed := [form.format(options[key]) for key, form in about.items() if key not in found.axes]:
        yield f"One {listed(fixed)}: elsewhere the settings may come in another order."
    if ways := found.ways:
        how = {
            "samples": "{} samples",
            "sampler": "{}",
            "steps": "{} steps",
            "spacing": "{} spacing",
            "guidance": "guidance {}",
        }
        alike = [
            form.format(ways[0][part])
            for part, form in how.items()
            if part in ways[0] and all(way.get(part) == ways[0][part] for way in ways)
        ]
        yield (
            f"One way of drawing ({', '.join(alike)}): drawn otherwise the settings may come in "
            "another order."
        )
        if len({way.get("seed") for way in ways}) == 1:
            yield (
                f"One seed of the sampling ({ways[0].get('seed')}): the intervals, over "
                "trainings, do not include sampling noise."
            )
    yield (
        "One recipe for all settings: learning rate and the like were not tuned for each, which "
        "favours those they suit."
    )
    if found.unlike:
        yield (
            f"Losses under different {listed([f'`{option}`' for option in found.unlike])} are "
            "different quantities: they show the course of a training, not which is better."
        )
    if layout.flatters(found.counted, found.metric):
        yield (
            "Best values are the lowest of several measurements of a run, so they flatter; answer "
            "and differences are about the last values."
        )
    if keys(found.counted, r"eval/fd_\w+"):
        yield f"{label(keys(found.counted, FRECHET)[0])} is not FID, and compares only with itself."
    if keys(found.counted, "speed/.*"):
        yield (
            "images/s and peak memory are as measured beside whatever else the machines did, "
            "other runs of the study too: they do not tell the settings apart."
        )


METHOD = """By paired t-tests over the shared seeds in the last values, with p-values corrected for the number of comparisons
(Holm). They are made on the metric's own scale: a paired test asks for no equal spread, and its interval is in the metric's
units. Settings are compared that differ in one axis; along a numeric axis neighbours, and where an axis has more than four
names each with the first."""  # noqa: E501


def picture(name, caption):
    """A picture with its caption; where it is a PDF, drawn in lines, the png beside it is shown
    and the PDF linked.
    """
    linked = f" ([PDF]({name}))" * name.endswith(".pdf")
    shown = name.removesuffix(".pdf") + ".png" if linked else name
    return f"![{caption}]({shown})\n\n*{caption}*{linked}"


INTERVALS = """Mean ± half of the 95 % interval over seeds (Student's t), each by itself: which settings differ is told
below, by pairs of runs of one seed and corrected for the number of comparisons, and not by whether intervals overlap."""  # noqa: E501

MEANINGS = {
    LEARNED: "training loss: the mean over the last logged steps, of images, times and noise "
    "drawn there; the validation loss, of fixed ones, rises above it where a network "
    "overfits.",
    "eval/copying": "copying: the probability that a drawn image lies nearer to a training image "
    "than a held-out one does, 0.5 for a perfect generator and 1 for one that "
    "copies.",
    "eval/copies": "copies: the share of drawn images that lie nearer to a training image than "
    "all but one in twenty of the held-out ones do, about 0.05 for a perfect "
    "generator.",
}
NO_COPIES = "copies: not measured, as fewer than 19 images are held out."


def readme(title, question, found, columns, pictures, record, left_out, again):
    """The report: question, answer, protocol, result, uncertainty, what was left out and not
    shown, and how to repeat it.
    """

    def bullets(lines):
        return "\n".join(f"- {line}" for line in lines)

    tables = [
        [column for column in columns if column.table == name]
        for name in ("distances", "losses", "cost")
    ]
    tables = [
        layout.markdown(layout.table(found.groups, some))
        for some in tables
        if some and [some[0].name] != ["parameters"]
    ]
    names = [column.name for column in columns]
    meanings = [words for key, words in MEANINGS.items() if key in names]
    if "eval/copying" in names and "eval/copies" not in names:
        meanings.append(NO_COPIES)
    if any(column.name.startswith("best ") and not column.table for column in columns):
        meanings.append(
            "best values: where none is shown, a run's best is its last; results.csv has them."
        )
    return (
        "\n\n".join(
            [
                f"# {title}",
                f"**Question.** {question}",
                f"**Answer.** {answer_and_trends(found)}",
                f"**Protocol.** {' '.join(protocol(found, record))}",
                "## Result",
                *tables,
                INTERVALS,
                *([bullets(meanings)] if meanings else []),
                *(picture(name, caption) for name, caption in pictures),
                "## Which differences are larger than the noise",
                bullets(differences(found)),
                METHOD,
                *(
                    ["## Left out", "In no average and no figure:", bullets(left_out)]
                    if left_out
                    else []
                ),
                "## What this does not show",
                bullets(limits(found)),
                "## Again",
                again,
            ]
        )
        + "\n"
    )
