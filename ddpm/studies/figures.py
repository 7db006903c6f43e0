"""Figures of a comparison, for print: axes with units, colours for colour-blind eyes, and lines
that differ in grey too.

Each function takes groups of runs (`ddpm.studies.statistics`) and returns a matplotlib figure;
`save` writes the same bytes every time, in pixels and, for what consists of lines, as a PDF too.
"""

import contextlib
import csv
import itertools
import math

from PIL import Image

from ddpm.common.files import atomic_write
from ddpm.data import decode
from ddpm.studies.runs import MIN_SEEDS, NFE, TRAIN_LOSS, is_training
from ddpm.studies.statistics import label, lines_along, numeric_axes

COLOURS = (  # Okabe and Ito 2008, and two of Tol 2021
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#E69F00",
    "#000000",
    "#7F7F7F",
    "#882255",
    "#999933",
)
DASHES = (
    "-",
    "--",
    "-.",
    ":",
    (0, (5, 1)),
    (0, (3, 1, 1, 1, 1, 1)),
    (0, (1, 3)),
    (0, (8, 3)),
    (0, (2, 2)),
    (0, (10, 2, 2, 2)),
)
MARKERS = "osD^vPX*hp"
MAX_LINES = len(COLOURS)  # lines or grids in one figure
STYLE = {
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.handlelength": 3,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "figure.constrained_layout.use": True,
    "savefig.dpi": 200,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "grid.linewidth": 0.5,
    "axes.axisbelow": True,
}
SHARP = 1200  # pixels
WIDTH = 7  # inches, the text of a page


@contextlib.contextmanager
def style():
    """What is drawn inside looks the same whatever matplotlib is set to; raises ValueError where
    it is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ValueError("matplotlib is missing; pip install -e '.[study]'") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def canvas(rows=1, columns=1, width=WIDTH, height=2.6, **shared):
    """A figure and its axes [rows][columns]."""
    from matplotlib.figure import Figure  # no pyplot: no windows

    figure = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def line_style(number):
    return {"color": COLOURS[number % MAX_LINES], "linestyle": DASHES[number % MAX_LINES]}


@style()
def curves(groups, keys):
    """Each key against the steps and against training compute: the mean over seeds, its 95 %
    interval as a band.
    """
    compute = counts_compute(groups)
    figure, axes = canvas(
        len(keys), 1 + compute, height=0.5 + 1.9 * len(keys), sharex="col", sharey="row"
    )
    unit = 1.0
    if compute:
        most = max(run.petaflop(run.rows[-1]["step"]) for group in groups for run in group.runs)
        unit = 1000.0 ** math.floor(math.log10(most) / 3)
    for row, key in zip(axes, keys, strict=True):
        means = []
        for number, group in enumerate(groups):
            points = group.curve(key)
            mean = [point[2] for point in points]
            means += mean
            for column, axis in enumerate(row):
                x = [point[column] / (unit if column else 1) for point in points]
                axis.plot(
                    x,
                    mean,
                    label=group.short,
                    marker=MARKERS[number % MAX_LINES] if len(x) < 12 else None,
                    **line_style(number),
                )
                if points and has_band(group):
                    low, high = (
                        [point[2] + side * point[3] for point in points] for side in (-1, 1)
                    )
                    axis.fill_between(
                        x, low, high, color=COLOURS[number % MAX_LINES], alpha=0.15, linewidth=0
                    )
        scale(row[0], "y", means)
        row[0].set_ylabel(label(key))
    label_panels(axes)
    axes[-1][0].set_xlabel("training steps")
    axes[-1][0].set_xlim(left=0)
    if compute:
        axes[-1][1].set_xlabel(
            f"training compute (10$^{{{15 + round(math.log10(unit))}}}$ operations)"
        )
        axes[-1][1].set_xlim(left=0)
    handles, names = axes[0][0].get_legend_handles_labels()
    most = max(1, 110 // (8 + max(map(len, names))))
    figure.legend(
        handles, names, loc="outside upper center", ncols=balanced_columns(len(names), most)
    )
    return figure


def has_band(group):
    """True where a group has the seeds that an interval takes: that of two would be wider than
    the axis, and cross itself.
    """
    return len({run.options[group.unit] for run in group.runs}) >= MIN_SEEDS


def counts_compute(groups):
    """True where all runs have counted their operations."""
    return all(run.petaflop(1) is not None for group in groups for run in group.runs)


def label_panels(axes):
    """Name panels (a), (b) ..., where there are several."""
    panels = list(itertools.chain(*axes))
    for letter, axis in zip("abcdefgh", panels if len(panels) > 1 else [], strict=False):
        axis.set_title(f"({letter})", loc="left")


def scale(axis, which, values):
    """Show positive values that span more than a factor of 4 on a logarithmic axis, with numbers
    that people read.
    """
    if not values or min(values) <= 0 or max(values) <= 4 * min(values):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low = min(values)
    high = max(values)
    getattr(axis, f"set_{which}scale")("log")
    # the means; an interval may reach to zero and below
    getattr(axis, f"set_{which}lim")(low / 1.3, high * 1.3)
    ticks = getattr(axis, f"{which}axis")
    labelled = (1, 2, 3, 5, 7) if high < 10 * low else (1, 2, 5) if high < 100 * low else (1,)
    ticks.set_major_locator(LogLocator(subs=labelled))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def balanced_columns(count, most):
    """The number of columns, at most `most`, that leaves the rows of `count` things about
    equally long.
    """
    return math.ceil(count / math.ceil(count / most))


@style()
def settings(groups, metric):
    """The metric of each setting: a dot for each seed, the mean and its 95 % interval beside
    them.
    """
    figure, axes = canvas(height=0.8 + 0.3 * len(groups), width=0.7 * WIDTH)
    axis = axes[0][0]
    everything = []
    for place, group in enumerate(groups):
        values, (mean, half) = (
            list(group.values(lambda run: run.final(metric)).values()),
            group.final(metric),
        )
        everything += values
        axis.plot(
            values,
            [place + 0.2] * len(values),
            "o",
            color="#7F7F7F",
            markersize=2.5,
            linestyle="none",
            label=None if place else "one seed",
        )
        axis.errorbar(
            mean,
            place - 0.1,
            xerr=half,
            fmt="o",
            color=COLOURS[0],
            capsize=2.5,
            linestyle="none",
            label=None if place else "mean and 95 % interval",
        )
    axis.set_yticks(range(len(groups)), [group.short for group in groups])
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(label(metric))
    scale(axis, "x", everything)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


@style()
def along(groups, metric, option):
    """The metric against a numeric axis, a line for each setting of the other axes: mean and 95
    % interval over seeds.
    """
    counted = counts_nfe(groups, option)

    def place(group):
        """Where a group lies: for steps, at its network evaluations, if all have counted them."""
        return group.final(NFE)[0] if counted else group.setting[option]

    figure, axes = canvas(width=0.7 * WIDTH, height=3)
    axis = axes[0][0]
    means = []
    values = sorted({place(group) for group in groups})
    at, kind = position(values)
    lines = list(itertools.islice(lines_along(groups, option).values(), MAX_LINES))
    for number, line in enumerate(lines):
        points = [group.final(metric) for group in line]
        means += [mean for mean, _ in points]
        others = ", ".join(
            words
            for key, words in zip(line[0].setting, line[0].labels, strict=True)
            if key != option
        )
        x = offset_line(
            [at(place(group)) for group in line],
            (number + 0.5) / len(lines) - 0.5,
            len(lines),
            kind,
        )
        axis.errorbar(
            x,
            [mean for mean, _ in points],
            [half or 0 for _, half in points],
            label=others,
            marker=MARKERS[number % MAX_LINES],
            capsize=2.5,
            **line_style(number),
        )
    if kind != "linear":
        axis.set_xscale("log")
    if kind == "towards one":
        axis.invert_xaxis()
    axis.set_xticks([at(value) for value in values], spaced_labels(values, at, kind))
    axis.set_xticks([], minor=True)
    scale(axis, "y", means)
    axis.set_xlabel(EVALUATIONS if counted else AXES.get(option, option))
    axis.set_ylabel(label(metric))
    if len(groups[0].setting) > 1:
        axis.legend()
    return figure


def counts_nfe(groups, option):
    """Whether a numeric axis is one of steps, of which all runs have counted the network
    evaluations.
    """
    return option in STEPS and all(run.final(NFE) for group in groups for run in group.runs)


STEPS = ("evaluate.steps", "sample.steps")
EVALUATIONS = "network evaluations an image"
AXES = dict.fromkeys(STEPS, "steps of the sampler") | {
    "ema.decay": "decay of the averaged weights, a step",
    "sample.ema": "sigma_rel or decay of the averaged weights",
    "train.learning_rate": "learning rate",
}


def position(values):
    """Where values lie on an axis, and its kind: logarithmic where they are positive, in 1 - x
    where they approach one.
    """
    if values[-1] < 1 and values[-1] >= 0.9 and values[0] >= 0:
        return (lambda value: 1 - value), "towards one"
    return (lambda value: value), "log" if values[0] > 0 else "linear"


def offset_line(x, share, count, kind):
    """Move the points of one of `count` lines to the side, from -0.5 to 0.5, so that their
    intervals can be told apart.
    """
    span = max(x) - min(x) if kind == "linear" else math.log(max(x) / min(x))
    shift = min(0.012 * count, 0.05) * span * share
    return [value + shift if kind == "linear" else value * math.exp(shift) for value in x]


def spaced_labels(values, at, kind):
    """Labels of values on an axis, empty where they would run into the one before."""
    places = [at(value) if kind == "linear" else math.log(at(value)) for value in values]
    labels = []
    end = -math.inf
    for value, place in zip(values, places, strict=True):
        words = f"{value:.4g}"
        share = abs(place - places[0]) / abs(places[-1] - places[0])
        half = 0.0075 * len(words)  # of the axis
        labels.append(words if share - half >= end else "")
        end = share + half if labels[-1] else end
    return labels


@style()
def samples(groups, seed):
    """The last grids of one seed, side by side."""
    grids = [
        (group.short, run.grid)
        for group in groups
        for run in group.runs
        if run.options[group.unit] == seed and run.grid
    ]
    columns = balanced_columns(len(grids), 4)
    rows = math.ceil(len(grids) / columns)
    figure, axes = canvas(rows, columns, height=rows * (WIDTH / columns + 0.3))
    figure.get_layout_engine().set(h_pad=0.08)  # inches above the titles
    for axis in itertools.chain(*axes):
        axis.axis("off")
    for axis, (name, path) in zip(itertools.chain(*axes), grids, strict=False):
        axis.set_title(name)
        try:
            picture = decode.open_thumbnail(path, 2 * SHARP)
        except decode.UnreadableImage as refused:
            axis.text(
                0.5, 0.5, f"{path.name} is left out:\n{refused.fault}", ha="center", va="center"
            )
            continue
        zoom = max(1, SHARP // max(picture.size))  # whole pixels first, so that all keep one size
        axis.imshow(
            picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST)
        )
    return figure


@style()
def likelihood(text):
    """The terms of a variational bound, as likelihood.csv has them: for each step t (Nichol and
    Dhariwal 2021, figure 2), and their sum from pure noise down to t.
    """
    terms = list(csv.DictReader(text.splitlines()))
    # t counted from 1; prior is no step
    spans = [(int(term["first_t"]) + 1, int(term["last_t"]) + 2) for term in terms[:-1]]
    bits = [float(term["bits_per_dim"]) for term in terms]
    edges = [first for first, _ in spans] + [spans[-1][1]]
    figure, axes = canvas(1, 2, height=2.8, sharex=True)
    label_panels(axes)
    ((each, summed),) = axes
    each.stairs(
        [value / (end - first) for value, (first, end) in zip(bits, spans, strict=False)],
        edges,
        baseline=None,
        color=COLOURS[0],
    )
    each.set(
        xscale="log", yscale="log", xlabel="t, counted from 1", ylabel="bits/dim for one step t"
    )
    left = list(itertools.accumulate(reversed(bits)))[::-1]
    summed.plot(edges, left, **line_style(0))
    summed.plot(edges[-1], bits[-1], MARKERS[0], color=COLOURS[1], label=f"prior, {bits[-1]:.2g}")
    summed.plot(
        edges[0],
        left[0],
        MARKERS[1],
        color=COLOURS[2],
        label=f"with reconstruction ({bits[0]:.2g}): {left[0]:.4g}",
    )
    summed.set(
        xscale="log", xlabel="t, counted from 1", ylabel="bits/dim from pure noise down to t"
    )
    summed.legend()
    return figure


@style()
def save(figure, path):
    """Write a figure as a png or pdf that depends on nothing but what it shows."""
    kind = path.suffix.removeprefix(".")
    with atomic_write(path) as part:
        figure.savefig(part, format=kind, metadata=dict.fromkeys(TIMELESS[kind]))


# what would differ from day to day
TIMELESS = {"png": ("Software",), "pdf": ("CreationDate", "Creator", "Producer")}


def draw(found):
    """The figures of a comparison: [(file name, caption, figure)]; those whose name ends in .pdf
    are drawn in lines.
    """
    metric = found.metric
    drawn = found.groups
    few = (
        drawn
        if len(drawn) <= MAX_LINES
        else sorted(drawn, key=lambda group: group.final(metric)[0])[:MAX_LINES]
    )
    best = f" of the {len(few)} best settings of {len(drawn)}" if few is not drawn else ""
    named = label(metric)
    made = []
    for option in numeric_axes(drawn):
        leaf = option.rpartition(".")[2]
        several = len(drawn[0].setting) > 1
        axis = EVALUATIONS if counts_nfe(drawn, option) else f"`{option}`"
        made.append(
            (
                f"along_{leaf}.pdf",
                f"{named} against {axis}: mean and 95 % interval over seeds"
                f"{', drawn side by side' * several}.",
                along(drawn, metric, option),
            )
        )
    if not made:
        made.append(
            (
                "settings.pdf",
                f"{named} of each setting: every seed, mean and 95 % interval.",
                settings(drawn, metric),
            )
        )
    curved = [
        key
        for key in dict.fromkeys((metric, "val/loss_ema", TRAIN_LOSS))
        if any(len(run.points(key)) > 1 for run in found.counted)
    ]
    if curved:
        band = (
            "95 % interval as a band"
            if all(map(has_band, few))
            else f"95 % interval as a band from {MIN_SEEDS} seeds on"
        )
        against = " and training compute (right)" if counts_compute(few) else ""
        made.append(
            (
                "curves.pdf",
                f"Learning curves{best} against steps{against}: mean over seeds, {band}.",
                curves(few, curved),
            )
        )
    shared = set.intersection(
        *({run.options[group.unit] for run in group.runs if run.grid} for group in few)
    )
    if shared:
        made.append(
            ("samples.png", grid_caption(few, min(shared), best), samples(few, min(shared)))
        )
    rows = (
        " Rows are those of the first table."
        if any(group.short != group.name for group in drawn)
        else ""
    )
    return [(name, caption + rows, figure) for name, caption, figure in made]


def grid_caption(groups, seed, best):
    """How the grids were made that stand side by side."""
    runs = [run for group in groups for run in group.runs if run.options[group.unit] == seed]
    options = runs[0].options
    step = int(runs[0].grid.stem.rpartition("_")[2])
    section = "sample" if is_training(runs) else "evaluate"
    spacing = "sample.spacing" if options["evaluate.spacing"] == "auto" else f"{section}.spacing"
    forms = {f"{section}.sampler": "{}", f"{section}.steps": "{} steps", spacing: "{} spacing"}
    how = [
        form.format(options[key])
        for key, form in forms.items()
        if len({run.options[key] for run in runs}) == 1
    ]
    latents = (
        f"images 0 to {options['sample.num_images'] - 1} from the same latents (seed "
        f"{options['sample.seed']})"
    )
    return (
        f"Samples{best}, seed {seed}, after {step} steps: {latents}, averaged weights, "
        f"{', '.join(how)}."
    )
