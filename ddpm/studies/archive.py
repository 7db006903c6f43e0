"""Collects the runs to compare, writes their report, and archives what the report is made from."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path

import torch

from ddpm.common.files import atomic_folder, atomic_write
from ddpm.common.registry import quantity
from ddpm.config import defaults
from ddpm.config import files as config_files
from ddpm.experiment import build
from ddpm.studies import figures, report, statistics, study, tables, wandb_io
from ddpm.studies import runs as studies_runs
from ddpm.tracking.tracker import commit


@dataclasses.dataclass
class Source:
    """Runs to compare; `absent` has a line for each run that is missing or cannot be read."""

    name: str
    question: str
    folders: list
    runs: list
    absent: list
    axes: list | None = None
    metric: str | None = None
    reference: dict | None = None  # the setting that others are compared with
    out: Path | None = None
    again: str = ""  # how to make the report again


def read_below(parent):
    """(Folders in a folder, the runs that they hold, a line for each that holds none)."""
    folders = sorted(path for path in Path(parent).iterdir() if path.is_dir())
    runs = []
    absent = []
    for folder in folders:
        try:
            runs.append(studies_runs.read_run(folder))
        except ValueError as error:
            absent.append(f"{folder.name}: {str(error).removeprefix(str(folder)).lstrip(' :/')}")
    return folders, runs, absent


def study_source(path, runs=None, out=None):
    """The Source of a study; raises ValueError where it has no runs.

    They are those in the folder `runs` or its subfolder of the study's name, by default runs/NAME,
    else the archive of the report.
    """
    wanted = study.read_study(path)
    home = wanted.path.with_suffix("")
    expected, option, folder = runs_folder(wanted, runs, home)
    folders, runs, absent = read_below(folder) if folder.is_dir() else ([], [], [])
    if not runs:
        remedy = f"python -m ddpm.sweep {path} makes them"
        remote = "--runs=ENTITY/PROJECT/SWEEP takes those of a W&B sweep"
        raise ValueError(f"{expected} has no runs yet; {remedy}, and {remote}")
    grid = wanted.grid() if wanted.method == "grid" else []
    points = {wanted.run_name(point): point for point in grid}
    if studies_runs.CONFIG_AXIS in wanted.axes:
        runs = [with_config_file(wanted, points, run) for run in runs]
    more = []
    if "checkpoint" in wanted.varied:
        more, runs = checkpoint_axes(wanted, runs)
    known = {folder.name for folder in folders}
    lacking = [name for name in missing_runs(wanted, points, runs) if name not in known]
    reference = None
    if points:
        first, point = next(iter(points.items()))
        reference = setting_of(wanted, point, wanted.axes)
        for run in runs:
            if run.name == first:
                reference |= {axis: run.options[axis] for axis in more}
    minimized = wanted.metric and wanted.metric[1] == "minimize"
    return Source(
        wanted.name,
        " ".join(wanted.description.split()) or f"How do the runs of {wanted.name} compare?",
        folders,
        runs,
        absent + [f"{name}: no run" for name in lacking],
        wanted.axes + more,
        wanted.metric[0] if minimized else None,
        reference,
        Path(out or home),
        how_again(wanted, path, option, expected),
    )


def runs_folder(wanted, runs, home):
    """(Where a study's runs belong, the option that says so, the folder to read them from)."""
    folder = wanted.folder(runs) if runs else wanted.folder()
    if runs and not folder.is_dir():  # the folder of the runs itself
        return Path(runs), "", Path(runs)
    option = f" --runs={runs}" if runs else ""
    return folder, option, folder if folder.is_dir() else home / "runs"


def how_again(wanted, path, option, folder):
    """How to make the runs and the report of a study again, as markdown."""
    first = ""
    if "checkpoint" in wanted.parameters:
        checkpoints = report.listed(wanted.values("checkpoint"))
        first = f" It measures {checkpoints}, which must be trained first."
    shown = folder if option else f"runs/{wanted.name}"
    return AGAIN.format(path=path, runs=option, home=shown, first=first)


AGAIN = """    python -m ddpm.sweep {path}{runs}
    python -m ddpm.compare {path}{runs}

The first command makes the runs in `{home}`; `--parallel=2` makes two at a time.{first} The second
writes this report from them or, where they are missing as in a fresh clone, from the copies below
`runs/` next to this file. `results.csv` comes out the same, byte for byte."""

AGAIN_FROM_COPIES = """    python -m ddpm.compare {out}/runs --out={out}

writes this report from the copies of the runs; `results.csv` comes out the same, byte for byte."""


def setting_of(wanted, point, axes):
    """The setting {axis: value} of a study's point, in the values of its runs' options."""
    options = defaults.flatten(wanted.config(point))
    if studies_runs.CONFIG_AXIS in axes:
        file = point[studies_runs.CONFIG_AXIS]
        options[studies_runs.CONFIG_AXIS] = config_file_name(wanted, file)
    return {axis: options[axis] for axis in axes}


def config_file_name(wanted, file):
    """A short name of a study's config file: its variant where all are of one file."""
    if len({other.partition(":")[0] for other in wanted.values(studies_runs.CONFIG_AXIS)}) > 1:
        return wanted.label(studies_runs.CONFIG_AXIS, file)
    return file.partition(":")[2] or Path(file).stem


def with_config_file(wanted, points, run):
    """A run of a study that varies the config file, with that file's name among its options.

    The run's name tells it, else its config. Raises ValueError where no file of the study fits.
    """
    axis = studies_runs.CONFIG_AXIS
    file = points[run.name][axis] if run.name in points else None
    for candidate in wanted.values(axis) if file is None else ():
        point = {axis: candidate}
        for name in wanted.parameters.keys() - {axis}:
            value = run.options[name.removeprefix("config.")]
            point[name] = list(value) if isinstance(value, tuple) else value
        options = defaults.flatten(wanted.config(point))
        related = filter(studies_runs.is_related, options)
        if all(run.options[option] == options[option] for option in related):
            file = candidate
    if file is None:
        fault = "no config file of this one makes its config"
        raise ValueError(f"{run.folder} is of another study: {fault}; move it away")
    return run.with_options({axis: config_file_name(wanted, file)})


def checkpoint_axes(wanted, runs):
    """(Axes that tell the checkpoints of a study apart, the runs with a value on each).

    Trainings differ in options, or only in the seed, which is no axis; checkpoints of one training
    differ in the step, else in the file.
    """
    files = {run.name: checkpoint_of(wanted, run.name) for run in runs}
    known = [run for run in runs if files[run.name] and not run.fault]
    axes = filter(studies_runs.is_related, studies_runs.varied(known))
    axes = [option for option in axes if option not in wanted.axes]
    trainings = defaultdict(list)
    for run in known:
        options = (*wanted.axes, *axes, *studies_runs.UNITS)
        trainings[tuple(run.options[option] for option in options)].append(run.name)

    def count(names, labels):
        return len({labels[name] for name in names})

    def suffices(labels):
        return all(count(names, labels) == count(names, files) for names in trainings.values())

    if suffices(dict.fromkeys(files)):
        return axes, runs
    steps = {run.name: run.rows[-1]["step"] if run.rows else None for run in runs}
    names = {name: Path(file or name).name for name, file in files.items()}
    paths = {name: file or name for name, file in files.items()}
    choices = (("step", steps), ("checkpoint", names), ("checkpoint", paths))
    axis, values = next(choice for choice in choices if suffices(choice[1]))
    return [*axes, axis], [run.with_options({axis: values[run.name]}) for run in runs]


def checkpoint_of(wanted, name):
    """The checkpoint of a study with which the name of a run begins; None where there is none."""
    labels = {wanted.label("checkpoint", value): value for value in wanted.values("checkpoint")}
    fitting = [label for label in labels if f"{name}-".startswith(f"{label}-")]
    return labels[max(fitting, key=len)] if fitting else None


def missing_runs(wanted, points, runs):
    """The names of a grid's points that have no run; raises ValueError for a run at no point."""
    if not points:
        return []
    known = [name.removeprefix("config.") for name in wanted.parameters]
    files = ("checkpoint", studies_runs.CONFIG_AXIS)
    axes = [axis for axis in known if axis in wanted.axes or axis not in files]
    places = {name: setting_of(wanted, point, axes) for name, point in points.items()}
    free = dict(places)
    for run in sorted(runs, key=lambda run: run.name not in places):
        own = {axis: run.options[axis] for axis in axes}
        there = [places[run.name]] if run.name in places else list(places.values())
        for axis in axes:
            values = sorted({place[axis] for place in there}, key=str)
            if own[axis] not in values:
                fault = f"config.{axis} is {own[axis]!r} there"
                here = ", ".join(map(repr, values))
                raise ValueError(
                    f"{run.folder} is of another study: {fault}, this one has {here}; move it away"
                )
        same = [name for name in free if free[name] == own]
        free.pop(run.name if run.name in places else next(iter(same), None), None)
    return list(free)


def read_folders(folders):
    """As `read_below`, of folders that are runs or hold runs; ValueError for one without a run."""
    paths, runs, absent = [], [], []
    for folder in map(Path, folders):
        # ddpm.sweep writes these next to the runs, and runs/NAME/* has them too
        if folder.name == "sweep.json" or folder.suffix == ".log":
            continue
        if not folder.is_dir():
            raise ValueError(f"there is no run folder {folder}")
        if (folder / "config.json").is_file() or not any(folder.glob("*/config.json")):
            inside = [folder], [studies_runs.read_run(folder)], []
        else:
            inside = read_below(folder)
        paths += inside[0]
        runs += inside[1]
        absent += inside[2]
    name, count = Counter(path.name for path in paths).most_common(1)[0] if paths else ("", 0)
    if count > 1:
        raise ValueError(f"two run folders are named {name}; give one of them another name")
    return paths, sorted(runs, key=lambda run: run.name), sorted(absent)


def source_of(arguments, runs, out, downloads):
    """The Source that the arguments name; runs of W&B are written into `downloads` first."""
    if arguments[0].endswith((".yaml", ".yml")):
        if len(arguments) > 1:
            raise ValueError(f"one study at a time; leave out {arguments[1]}")
        if runs and wandb_io.is_remote(runs):
            wandb_io.download(runs, downloads)
            runs = downloads
        return study_source(arguments[0], runs, out)
    if len(arguments) == 1 and wandb_io.is_remote(arguments[0]):
        wandb_io.download(arguments[0], downloads)
        parts = read_below(downloads)
    else:
        parts = read_folders(arguments)
    if not parts[1]:
        raise ValueError(f"{arguments[0]} has no run that can be read ({'; '.join(parts[2][:3])})")
    out = Path(out) if out else None
    again = AGAIN_FROM_COPIES.format(out=out)
    name = out.name if out else arguments[0]
    return Source(name, "How do these runs compare?", *parts, out=out, again=again)


@functools.cache
def network_parameters(shape):
    """The number of parameters of the network that options ((name, value), ...) describe."""
    described = config_files.changed(defaults.freeze(defaults.base()), dict(shape))
    with torch.device("meta"):
        net = build.network(described)
    return sum(parameter.numel() for parameter in net.parameters())


def parameters(run):
    """The number of parameters of a run's network."""
    options = run.options.items()
    return network_parameters(tuple(item for item in options if item[0].startswith(SHAPES)))


# sections and options that give the network its size
SHAPES = ("model.", "data.image_size", "data.channels", "data.class_labels", "data.classes")
SHAPES += ("data.augment", "diffusion.variance", "diffusion.self_condition")


def provenance(out, runs, machine=None):
    """Commit, torch version and machine as archived with these runs, else of this process."""
    digest = hashlib.sha256()
    for run in runs:
        for name in ("config.json", "metrics.jsonl"):
            path = run.folder / name
            digest.update(f"{run.folder.name}/{name}\n".encode())
            digest.update(path.read_bytes() if path.is_file() else b"")
    code = "; ".join(report.code_of([run for run in runs if not run.fault]))
    record = {
        "commit": code or commit(),
        "torch": version("torch"),
        "machine": this_machine(),
        "runs": digest.hexdigest(),
    }
    # the report that archived these runs, and the report that is written
    for home in (runs[0].folder.parent.parent, out):
        # missing or damaged
        with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            archived = json.loads((home / "made.json").read_text())
            if archived["runs"] == record["runs"]:
                record = {key: str(archived[key]) for key in record}
    return record | ({"machine": machine} if machine else {})


def this_machine():
    """The class of this machine."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{os.cpu_count()} CPU cores"


def archive_runs(folders, out):
    """Copy each run's config, metrics and last grid to `out`/runs."""
    with atomic_folder(out / "runs") as part:
        for folder in folders:
            copy = part / folder.name
            copy.mkdir()
            (copy / "metrics.jsonl").touch()
            grids = sorted(folder.glob("samples/step_*.png"))[-1:]
            for path in (folder / "config.json", folder / "metrics.jsonl", *grids):
                if path.is_file():
                    target = copy / path.relative_to(folder)
                    target.parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, target)


def write_report(source, comparison, columns, machine=None):
    """Write the report and return its files' names; ValueError before it overwrites other runs."""
    out = source.out
    if (out / "runs").exists() and not (out / "made.json").exists():
        raise ValueError(f"{out} holds runs that no report keeps; give another --out")
    drawn = figures.draw(comparison)
    record = provenance(out, comparison.runs, machine)
    pictures = [(name, caption) for name, caption, _ in drawn]
    texts = {
        "README.md": report.readme(
            source, comparison, columns, pictures, record, left_out(source, comparison)
        ),
        "results.csv": tables.csv(comparison.groups, columns),
        "made.json": json.dumps(record, indent=2) + "\n",
    }
    for name, text in texts.items():
        with atomic_write(out / name) as part:
            part.write_text(text)
    files = []
    for name, _, figure in drawn:
        for suffix in {".png", Path(name).suffix}:
            files.append(str(Path(name).with_suffix(suffix)))
            figures.save(figure, out / files[-1])
    archive_runs(source.folders, out)
    return [*texts, *sorted(files)]


def left_out(source, comparison):
    """A line for each run that is in no average."""
    return source.absent + [f"{run.name}: {run.fault}" for run in comparison.runs if run.fault]


def compare(*arguments, runs=None, out=None, machine=None):
    """Compare what the arguments name, print the result and write the report; returns the
    `statistics.Comparison`.

    `runs` is where the runs of a study are, a folder or a W&B path, `out` the folder of the report,
    `machine` the class of machine that made the runs. Raises ValueError before it writes anything.
    """
    with tempfile.TemporaryDirectory() as downloads:
        source = source_of(arguments, runs, out, downloads)
        comparison = statistics.compare(source.runs, source.axes, source.metric, source.reference)
        columns = tables.columns(comparison.groups, parameters)
        files = write_report(source, comparison, columns, machine) if source.out else []
    main = ("val/loss_ema", comparison.metric, f"best {comparison.metric}")
    shown = [column for column in columns if column.table]
    shown = [
        column
        for column in shown
        if column.name in main or not column.name.startswith(("best ", "val/"))
    ]
    settings = quantity(len(comparison.groups), "setting")
    print(f"{source.name}: {quantity(len(comparison.counted), 'run')} in {settings}\n")
    print(tables.plain(tables.table(comparison.groups, shown)))
    if comparison.tested:
        print("", tables.plain(report.verdicts(comparison)), sep="\n")
    lines = [f"left out: {line}" for line in left_out(source, comparison)]
    lines += [*report.mixed_code(comparison.counted), f"\nAnswer: {report.answer(comparison)}"]
    print(*lines, sep="\n")
    written = f"{source.out}: {', '.join(files)}"
    print(written if files else "nothing is written; --out=DIR writes a report")
    return comparison
