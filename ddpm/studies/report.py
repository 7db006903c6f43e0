"""The report of a comparison as markdown: answer, protocol, tables, verdicts and limits."""

from collections import Counter

from ddpm.common.registry import quantity
from ddpm.studies import runs as studies_runs
from ddpm.studies import statistics
from ddpm.studies import tables as layout
from ddpm.studies.runs import FRECHET, LOSSES, MIN_SEEDS, PERFECT, TRAIN_LOSS, keys
from ddpm.studies.statistics import label

# verdicts


def verdicts(comparison):
    """A table of all comparisons, heads first; the first setting of a row has the lower mean."""
    heads = ["setting", "compared with", f"{label(comparison.metric)} lower by", "95 % interval"]
    rows = [[*heads, "lower in", "p (Holm)", "verdict"]]
    for gap in comparison.gaps:
        by = layout.amount(gap.by, gap.half).partition(" ")[0]
        span = "-"
        if gap.half is not None:
            places = layout.places_of(gap.half)
            span = f"{gap.by - gap.half:.{places}f} to {gap.by + gap.half:.{places}f}"
        seeds = f"{gap.wins} of {quantity(gap.seeds, 'seed')}"
        rows.append([gap.better.name, gap.worse.name, by, span, seeds, p_of(gap.p), verdict(gap)])
    return rows


def verdict(gap):
    """`better`, or `cannot tell` with the reason where the interval does not show it."""
    if gap.half is None:
        return f"cannot tell: fewer than {MIN_SEEDS} seeds"
    if gap.by == gap.half == 0:
        return "cannot tell: equal in every seed"
    if gap.clear:
        return "better"
    return "cannot tell after the correction" if gap.by > gap.half else "cannot tell"


def p_of(p):
    """A p-value with two digits; `-` for None."""
    if p is None:
        return "-"
    return f"{p:.2g}" if p >= 0.001 else "< 0.001"


def answer(comparison):
    """The setting with the lowest mean, what it is better than, and what may be as good."""
    groups = comparison.groups
    metric = label(comparison.metric)
    if comparison.metric in LOSSES and comparison.unlike:
        unlike = f"a different quantity for each {listed_options(comparison.unlike)}"
        return f"Cannot tell: no distance was measured, and the {metric} is {unlike}."
    enough = min(MIN_SEEDS, max(map(layout.count_seeds, groups)))
    repeated = [group for group in groups if layout.count_seeds(group) >= enough]
    best = min(repeated, key=lambda group: group.final(comparison.metric)[0])
    reached = f"{metric} {layout.amount(*best.final(comparison.metric))}"
    over = f"{layout.seeds_in_words(groups)} per setting"
    if len(groups) == 1:
        return f"There is only one setting, so nothing is compared: {reached}, {over}."
    lowest = f"{best.name} has the lowest mean, {reached}"
    if not comparison.tested:
        few = f"Cannot tell: {over}, and the noise shows only from {MIN_SEEDS} seeds on."
        return f"{few} {lowest}."
    beaten = [gap.worse.name for gap in comparison.gaps if gap.clear and gap.better is best]
    close = []
    for gap in comparison.gaps:
        if not gap.clear and best in (gap.better, gap.worse):
            close.append(gap.worse.name if gap.better is best else gap.better.name)
    if len(beaten) == len(groups) - 1:
        return f"{best.name} is best: {reached}, better than {listed(beaten)} ({over})."
    parts = [f"it is better than {listed(beaten)}"] if beaten else []
    parts += [f"it cannot be told apart from {listed(close)}"] if close else []
    unclear = "" if beaten else "Cannot tell which is best: "
    return f"{unclear}{'; '.join([lowest, *parts])} ({over})."


def listed(words):
    """Words as a list in a sentence: `a, b and c`, or `a, b; and c, d` where they hold commas."""
    if len(words) == 1:
        return words[0]
    comma, last = ("; ", "; and ") if any("," in word for word in words) else (", ", " and ")
    return f"{comma.join(words[:-1])}{last}{words[-1]}"


def listed_options(options):
    return listed([f"`{option}`" for option in options])


# the report

FIXED = {  # options that limit a result, and how they are written
    "data.source": "data set {}",
    "data.image_size": "{} pixels",
    "train.length": "training for {}",
    "train.batch_size": "batches of {} images",
}
DRAWING = {  # parts of the protocol that limit a result
    "samples": "{} samples",
    "sampler": "sampler {}",
    "steps": "{} steps",
    "spacing": "{} spacing",
    "guidance": "guidance {}",
}


def fixed(comparison):
    """The options of FIXED that no axis varies, in words."""
    options = comparison.counted[0].options
    return [form.format(options[key]) for key, form in FIXED.items() if key not in comparison.axes]


def protocol(comparison, record):
    """Yield sentences on how the numbers were measured."""
    runs = comparison.counted
    repeated = "of the training"
    if comparison.groups[0].unit != "seed":
        repeated = "of the sampling, from one training,"
    axes = listed_options(comparison.axes or ["nothing"])
    settings = f"{quantity(len(comparison.groups), 'setting')} of {axes}"
    seeds = layout.seeds_in_words(comparison.groups)
    yield f"{quantity(len(runs), 'run')}: {settings}, {seeds} {repeated} each."
    if studies_runs.is_training(runs) and fixed(comparison):
        yield f"Fixed: {', '.join(fixed(comparison))}."
    if parts := comparison.protocol:
        yield f"Distances: {', '.join(f'{part} {value}' for part, value in parts.items())}."
    likelihoods = studies_runs.protocols_of(runs, "eval/bits_per_dim_protocol")
    if likelihoods:
        yield f"Likelihood: {listed(sorted({text for _, text in likelihoods}))}."
    if known := list(perfect(runs)):
        known = f"{listed(known)} (± standard deviation of one evaluation)"
        yield f"A perfect generator would get {known} from as many samples."
    commit = f"Commit {record['commit']}, " if record["commit"] else ""
    yield f"{commit}torch {record['torch']}, {record['machine']}."


def code_of(runs):
    """{"0494cba": number of runs}, the most frequent commit first; {} where none is recorded."""
    counts = Counter(", then ".join(run.code) or "code that was not recorded" for run in runs)
    return dict(counts.most_common()) if any(run.code for run in runs) else {}


def mixed_code(runs):
    """Yield a warning where different code made the runs."""
    if len(codes := code_of(runs)) > 1:
        codes = listed([f"{code} ({quantity(count, 'run')})" for code, count in codes.items()])
        yield f"The runs were made by different code, so a difference may come from that: {codes}."


def perfect(runs):
    """Yield a perfect generator's `FD (digits) 0.179 ± 0.058`, where all runs agree on it."""
    for key in keys(runs, "eval/.*"):
        values = {tuple(run.final(f"{key}{end}") for end in PERFECT) for run in runs}
        if len(values) == 1 and None not in (only := values.pop()):
            yield f"{label(key)} {layout.amount(*only)}"


def limits(comparison):
    """Yield sentences on what a comparison does not show."""
    metric = label(comparison.metric)
    seeds = f"{layout.seeds_in_words(comparison.groups)} per setting"
    if not comparison.visible:
        yield f"Smallest visible difference: unknown with {seeds}; tests need {MIN_SEEDS} seeds."
    else:
        first, alone, count = comparison.visible
        several = f" (for the clearest of {count} comparisons; {alone:.2g} for a single one)"
        smallest = f"{metric} below about {first:.2g}{several if count > 1 else ''}"
        most = f"with {seeds}, most studies miss a difference in {smallest}"
        yield f"Smallest visible difference: {most}."
    yield from mixed_code(comparison.counted)
    if comparison.groups[0].unit != "seed":
        yield "All numbers come from one training: another seed may order the settings differently."
    parts = comparison.protocol
    same = {part: value for part, value in parts.items() if value != statistics.VARIED}
    drawn = [form.format(same[part]) for part, form in DRAWING.items() if part in same]
    if conditions := ", ".join(fixed(comparison) + drawn):
        yield f"Conditions: {conditions}. Under others the settings may come in another order."
    if "seed" in same:
        seed = f"all samples have seed {same['seed']}"
        yield f"Sampling noise: {seed}, so the intervals over trainings do not include it."
    yield "Tuning: all settings share one recipe, which favours those that it suits."
    if comparison.unlike:
        yield (
            f"Losses under different {listed_options(comparison.unlike)} are different quantities: "
            "they show the course of a training, and do not say which setting is better."
        )
    if layout.best_differs(comparison.counted, comparison.metric):
        yield (
            "Best values are the lowest of several measurements of a run, so they flatter; the "
            "verdicts compare last values."
        )
    if keys(comparison.counted, r"eval/fd_\w+"):
        distance = label(keys(comparison.counted, FRECHET)[0])
        yield f"{distance} is not FID and compares only with itself."
    if keys(comparison.counted, "speed/.*"):
        yield (
            "images/s and peak memory depend on what else the machines ran, so they do not "
            "distinguish the settings."
        )


METHOD = """Each verdict is a paired t-test on the last values over shared seeds, with p-values
corrected for the number of comparisons (Holm): `better` means p < 0.05, and `cannot tell after the
correction` that p < 0.05 for this comparison alone. Settings that differ in one axis are compared:
neighbours along a numeric axis, and each with the first where an axis has more than four names. The
tests run on the metric's own scale, so intervals are in its units."""

INTERVALS = """Mean ± half of the 95 % interval over seeds (Student's t) of each setting alone.
Whether two settings differ is decided by the paired tests below; overlapping intervals do not
decide it."""

MEANINGS = {
    TRAIN_LOSS: "training loss: the mean over the last logged steps, on images, times and noise "
    "drawn there; the validation loss, on fixed ones, rises above it where a network overfits.",
    "eval/copying": "copying: the probability that a drawn image lies nearer to a training image "
    "than a held-out one does; 0.5 for a perfect generator, 1 for one that copies.",
    "eval/copies": "copies: the share of drawn images that lie nearer to a training image than all "
    "but one in twenty of the held-out images do; 0.05 for a perfect generator, and lower with few "
    "held-out images.",
}
NO_COPIES = "copies: not measured, because fewer than 19 images are held out."
NO_BEST = "best values: where none is shown, a run's best is its last; results.csv has them."


def picture(name, caption):
    """A figure with its caption; of a PDF the png next to it is shown, and the PDF linked."""
    linked = f" ([PDF]({name}))" * name.endswith(".pdf")
    shown = name.removesuffix(".pdf") + ".png" if linked else name
    return f"![{caption}]({shown})\n\n*{caption}*{linked}"


def bullets(lines):
    return "\n".join(f"- {line}" for line in lines)


def meanings(columns):
    """Notes on the columns that need one."""
    names = [column.name for column in columns]
    notes = [words for key, words in MEANINGS.items() if key in names]
    if "eval/copying" in names and "eval/copies" not in names:
        notes.append(NO_COPIES)
    if any(column.name.startswith("best ") and not column.table for column in columns):
        notes.append(NO_BEST)
    return notes


def readme(source, comparison, columns, pictures, record, left_out):
    """The report on an `archive.Source` as markdown.

    `columns` are those of `tables.columns`, `pictures` pairs (file name, caption), `record` what
    `archive.provenance` returns, `left_out` lines on runs that do not count.
    """
    sections = [
        f"# {source.name}",
        f"**Question.** {source.question}",
        f"**Answer.** {answer(comparison)}",
        f"**Protocol.** {' '.join(protocol(comparison, record))}",
        "## Result",
    ]
    for name in ("distances", "losses", "cost"):
        some = [column for column in columns if column.table == name]
        if some and some[0].name != "parameters":
            sections.append(layout.markdown(layout.table(comparison.groups, some)))
    sections.append(INTERVALS)
    if notes := meanings(columns):
        sections.append(bullets(notes))
    sections += [picture(name, caption) for name, caption in pictures]
    tested = [layout.markdown(verdicts(comparison)), METHOD]
    sections += ["## Differences", *(tested if comparison.tested else ["None is tested."])]
    if left_out:
        sections += ["## Left out", "In no average and no figure:", bullets(left_out)]
    sections += [
        "## What this does not show",
        bullets(limits(comparison)),
        "## Again",
        source.again,
    ]
    return "\n\n".join(sections) + "\n"
