"""Figures of a comparison, for print: axes with units, colours that colour-blind readers can tell
apart, and lines that differ in grey too.

Each function takes groups of runs (`ddpm.studies.statistics`) and returns a matplotlib figure;
`save` writes the same bytes every time.
"""

import contextlib
import csv
import itertools
import math

from PIL import Image

from ddpm.common.files import atomic_write
from ddpm.data import decode
from ddpm.studies.runs import MIN_SEEDS, NFE, TRAIN_LOSS, is_training
from ddpm.studies.statistics import label, lines_along, numeric_axes, runs_of

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"]  # Okabe and Ito 2008
COLOURS += ["#E69F00", "#000000", "#7F7F7F", "#882255", "#999933"]  # the last two: Tol 2021
DASHES = ["-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1, 1, 1))]
DASHES += [(0, (1, 3)), (0, (8, 3)), (0, (2, 2)), (0, (10, 2, 2, 2))]
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
    """Draw in the block with STYLE alone; raises ValueError where matplotlib is missing."""
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
    """Each key against steps and compute: the mean over seeds, its 95 % interval as a band."""
    compute = counts_compute(groups)
    rows = len(keys)
    figure, axes = canvas(rows, 1 + compute, height=0.5 + 1.9 * rows, sharex="col", sharey="row")
    unit = 1.0
    if compute:
        most = max(run.petaflop(run.rows[-1]["step"]) for run in runs_of(groups))
        unit = 1000.0 ** math.floor(math.log10(most) / 3)
    for row, key in zip(axes, keys, strict=True):
        means = []
        for number, group in enumerate(groups):
            points = group.curve(key)
            means += [point[2] for point in points]
            for column, axis in enumerate(row):
                x = [point[column] / (unit if column else 1) for point in points]
                draw_curve(axis, x, points, group, number)
        scale(row[0], "y", means)
        row[0].set_ylabel(label(key))
    label_panels(axes)
    axes[-1][0].set_xlabel("training steps")
    axes[-1][0].set_xlim(left=0)
    if compute:
        power = 15 + round(math.log10(unit))
        axes[-1][1].set_xlabel(f"training compute (10$^{{{power}}}$ operations)")
        axes[-1][1].set_xlim(left=0)
    handles, names = axes[0][0].get_legend_handles_labels()
    most = max(1, 110 // (8 + max(map(len, names))))
    columns = balanced_columns(len(names), most)
    figure.legend(handles, names, loc="outside upper center", ncols=columns)
    return figure


def draw_curve(axis, x, points, group, number):
    """One group's line at `x`, with a band where its seeds show the noise."""
    mean = [point[2] for point in points]
    marker = MARKERS[number % MAX_LINES] if len(x) < 12 else None
    axis.plot(x, mean, label=group.short, marker=marker, **line_style(number))
    if points and has_band(group):
        low = [point[2] - point[3] for point in points]
        high = [point[2] + point[3] for point in points]
        colour = COLOURS[number % MAX_LINES]
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def has_band(group):
    """True where a group has enough seeds for an interval; that of two is wider than the axis."""
    return len({run.options[group.unit] for run in group.runs}) >= MIN_SEEDS


def counts_compute(groups):
    """True where all runs have counted their operations."""
    return all(run.petaflop(1) is not None for run in runs_of(groups))


def label_panels(axes):
    """Name panels (a), (b) ..., where there are several."""
    panels = list(itertools.chain(*axes))
    for letter, axis in zip("abcdefgh", panels if len(panels) > 1 else [], strict=False):
        axis.set_title(f"({letter})", loc="left")


def scale(axis, which, values):
    """Make an axis logarithmic, with readable numbers, for positive values beyond a factor of 4."""
    if not values or min(values) <= 0 or max(values) <= 4 * min(values):
        return
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low = min(values)
    high = max(values)
    getattr(axis, f"set_{which}scale")("log")
    # limits by the means: an interval may reach to zero and below
    getattr(axis, f"set_{which}lim")(low / 1.3, high * 1.3)
    ticks = getattr(axis, f"{which}axis")
    labelled = (1, 2, 5) if high >= 10 * low else (1, 2, 3, 5, 7)
    ticks.set_major_locator(LogLocator(subs=labelled if high < 100 * low else (1,)))
    ticks.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks.set_minor_formatter(NullFormatter())


def balanced_columns(count, most):
    """The number of columns, at most `most`, that makes rows of `count` items equally long."""
    return math.ceil(count / math.ceil(count / most))


@style()
def settings(groups, metric):
    """The metric of each setting: a dot for each seed, with the mean and its 95 % interval."""
    figure, axes = canvas(height=0.8 + 0.3 * len(groups), width=0.7 * WIDTH)
    axis = axes[0][0]
    seeds = {"color": "#7F7F7F", "markersize": 2.5, "linestyle": "none", "label": "one seed"}
    means = {"color": COLOURS[0], "capsize": 2.5, "linestyle": "none"}
    means["label"] = "mean and 95 % interval"
    everything = []
    for place, group in enumerate(groups):
        values = list(group.values(lambda run: run.final(metric)).values())
        mean, half = group.final(metric)
        everything += values
        axis.plot(values, [place + 0.2] * len(values), "o", **seeds)
        axis.errorbar(mean, place - 0.1, xerr=half, fmt="o", **means)
        seeds["label"] = means["label"] = None  # one entry each in the legend
    axis.set_yticks(range(len(groups)), [group.short for group in groups])
    axis.set_ylim(len(groups) - 0.5, -0.5)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel(label(metric))
    scale(axis, "x", everything)
    figure.legend(loc="outside upper right", ncols=2)
    return figure


@style()
def metric_along(groups, metric, option):
    """The metric against a numeric axis: a line for each setting of the others, over seeds."""
    counted = counts_nfe(groups, option)

    def value_of(group):
        return group.final(NFE)[0] if counted else group.setting[option]

    figure, axes = canvas(width=0.7 * WIDTH, height=3)
    axis = axes[0][0]
    all_means = []
    values = sorted({value_of(group) for group in groups})
    at, kind = position(values)
    lines = list(itertools.islice(lines_along(groups, option).values(), MAX_LINES))
    for number, line in enumerate(lines):
        means, halves = zip(*(group.final(metric) for group in line), strict=True)
        all_means += means
        words = zip(line[0].setting, line[0].labels, strict=True)
        others = ", ".join(text for key, text in words if key != option)
        x = [at(value_of(group)) for group in line]
        x = offset_line(x, (number + 0.5) / len(lines) - 0.5, len(lines), kind)
        look = {"label": others, "marker": MARKERS[number % MAX_LINES], "capsize": 2.5}
        axis.errorbar(x, means, [half or 0 for half in halves], **look, **line_style(number))
    if kind != "linear":
        axis.set_xscale("log")
    if kind == "towards one":
        axis.invert_xaxis()
    axis.set_xticks([at(value) for value in values], spaced_labels(values, at, kind))
    axis.set_xticks([], minor=True)
    scale(axis, "y", all_means)
    axis.set_xlabel(EVALUATIONS if counted else AXES.get(option, option))
    axis.set_ylabel(label(metric))
    if len(groups[0].setting) > 1:
        axis.legend()
    return figure


def counts_nfe(groups, option):
    """True for an axis of sampler steps where all runs have counted their function evaluations."""
    return option in STEPS and all(run.final(NFE) for run in runs_of(groups))


STEPS = ("evaluate.steps", "sample.steps")
EVALUATIONS = "network evaluations per image"
AXES = dict.fromkeys(STEPS, "steps of the sampler") | {
    "ema.decay": "decay of the averaged weights, a step",
    "sample.ema": "sigma_rel or decay of the averaged weights",
    "train.learning_rate": "learning rate",
}


def position(values):
    """(Position of a value on an axis, its kind): log for positive values, in 1 - x towards one."""
    if 0.9 <= values[-1] < 1 and values[0] >= 0:
        return (lambda value: 1 - value), "towards one"
    return (lambda value: value), "log" if values[0] > 0 else "linear"


def offset_line(x, share, count, kind):
    """Shift the points of one of `count` lines by a share in [-0.5, 0.5], to separate intervals."""
    span = max(x) - min(x) if kind == "linear" else math.log(max(x) / min(x))
    shift = min(0.012 * count, 0.05) * span * share
    return [value + shift if kind == "linear" else value * math.exp(shift) for value in x]


def spaced_labels(values, at, kind):
    """Labels of values on an axis, empty where they would overlap the one before."""
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
    grids = []
    for group in groups:
        runs = group.of_seed(seed)
        grids += [(group.short, run.grid) for run in runs if run.grid]
    columns = balanced_columns(len(grids), 4)
    rows = math.ceil(len(grids) / columns)
    figure, axes = canvas(rows, columns, height=rows * (WIDTH / columns + 0.3))
    figure.get_layout_engine().set(h_pad=0.08)  # inches above the titles
    panels = list(itertools.chain(*axes))
    for axis in panels:
        axis.axis("off")
    for axis, (name, path) in zip(panels, grids, strict=False):
        axis.set_title(name)
        try:
            picture = decode.open_thumbnail(path, 2 * SHARP)
        except decode.UnreadableImage as refused:
            text = f"{path.name} is left out:\n{refused.fault}"
            axis.text(0.5, 0.5, text, ha="center", va="center")
            continue
        zoom = max(1, SHARP // max(picture.size))  # a whole factor, so that pixels keep one size
        size = zoom * picture.width, zoom * picture.height
        axis.imshow(picture.resize(size, Image.Resampling.NEAREST))
    return figure


@style()
def likelihood(text):
    """A variational bound's terms in likelihood.csv, each (Nichol and Dhariwal 2021, figure 2) and
    summed from pure noise down to t.
    """
    terms = list(csv.DictReader(text.splitlines()))
    # t counts from 1; the last term, the prior, is no step
    firsts = [int(term["first_t"]) + 1 for term in terms[:-1]]
    edges = [*firsts, int(terms[-2]["last_t"]) + 2]
    bits = [float(term["bits_per_dim"]) for term in terms]
    figure, axes = canvas(1, 2, height=2.8, sharex=True)
    label_panels(axes)
    ((each, summed),) = axes
    spans = zip(bits, itertools.pairwise(edges), strict=False)
    rates = [value / (end - first) for value, (first, end) in spans]
    each.stairs(rates, edges, baseline=None, color=COLOURS[0])
    x = "t, counted from 1"
    each.set(xscale="log", yscale="log", xlabel=x, ylabel="bits/dim for one step t")
    left = list(itertools.accumulate(reversed(bits)))[::-1]
    summed.plot(edges, left, **line_style(0))
    prior = f"prior, {bits[-1]:.2g}"
    summed.plot(edges[-1], bits[-1], MARKERS[0], color=COLOURS[1], label=prior)
    total = f"with reconstruction ({bits[0]:.2g}): {left[0]:.4g}"
    summed.plot(edges[0], left[0], MARKERS[1], color=COLOURS[2], label=total)
    summed.set(xscale="log", xlabel=x, ylabel="bits/dim from pure noise down to t")
    summed.legend()
    return figure


@style()
def save(figure, path):
    """Write a figure as a png or pdf that depends only on what it shows."""
    kind = path.suffix.removeprefix(".")
    with atomic_write(path) as part:
        figure.savefig(part, format=kind, metadata=dict.fromkeys(TIMELESS[kind]))


TIMELESS = {"png": ("Software",), "pdf": ("CreationDate", "Creator", "Producer")}  # left empty


def draw(comparison):
    """The figures of a comparison, [(file name, caption, figure)]; line drawings are named .pdf."""
    groups = comparison.groups
    few = groups
    best = ""
    if len(groups) > MAX_LINES:
        few = sorted(groups, key=lambda group: group.final(comparison.metric)[0])[:MAX_LINES]
        best = f" of the {len(few)} best settings of {len(groups)}"
    drawn = [*draw_metric(comparison), *draw_curves(comparison, few, best)]
    with_grids = [{run.options[group.unit] for run in group.runs if run.grid} for group in few]
    if shared := set.intersection(*with_grids):
        seed = min(shared)
        drawn.append(("samples.png", grid_caption(few, seed, best), samples(few, seed)))
    are_rows = any(group.short != group.name for group in groups)
    rows = " Rows are those of the first table." if are_rows else ""
    return [(name, caption + rows, figure) for name, caption, figure in drawn]


def draw_metric(comparison):
    """Yield a figure of the metric along each numeric axis, else one of all settings."""
    groups = comparison.groups
    metric = label(comparison.metric)
    axes = numeric_axes(groups)
    for option in axes:
        axis = EVALUATIONS if counts_nfe(groups, option) else f"`{option}`"
        apart = ", drawn side by side" * (len(groups[0].setting) > 1)
        caption = f"{metric} against {axis}: mean and 95 % interval over seeds{apart}."
        name = f"along_{option.rpartition('.')[2]}.pdf"
        yield name, caption, metric_along(groups, comparison.metric, option)
    if not axes:
        caption = f"{metric} of each setting: every seed, mean and 95 % interval."
        yield "settings.pdf", caption, settings(groups, comparison.metric)


def draw_curves(comparison, groups, best):
    """Yield the figure of the learning curves, if runs have logged more than one point."""
    keys = [
        key
        for key in dict.fromkeys((comparison.metric, "val/loss_ema", TRAIN_LOSS))
        if any(len(run.points(key)) > 1 for run in comparison.counted)
    ]
    if keys:
        band = "95 % interval as a band"
        if not all(map(has_band, groups)):
            band += f" from {MIN_SEEDS} seeds on"
        against = " and training compute (right)" * counts_compute(groups)
        caption = f"Learning curves{best} against steps{against}: mean over seeds, {band}."
        yield "curves.pdf", caption, curves(groups, keys)


def grid_caption(groups, seed, best):
    """The caption of grids side by side: how they were drawn."""
    runs = list(itertools.chain.from_iterable(group.of_seed(seed) for group in groups))
    options = runs[0].options
    step = int(runs[0].grid.stem.rpartition("_")[2])
    section = "sample" if is_training(runs) else "evaluate"
    spacing = "sample.spacing" if options["evaluate.spacing"] == "auto" else f"{section}.spacing"
    forms = {f"{section}.sampler": "{}", f"{section}.steps": "{} steps", spacing: "{} spacing"}
    shared = [key for key in forms if len({run.options[key] for run in runs}) == 1]
    how = ", ".join(forms[key].format(options[key]) for key in shared)
    images = f"images 0 to {options['sample.num_images'] - 1}"
    latents = f"{images} from the same latents (seed {options['sample.seed']})"
    shown = f"Samples{best}, seed {seed}, after {step} steps"
    return f"{shown}: {latents}, averaged weights, {how}."
