"""The runs of a study, wherever they are, and the files that its report keeps of them."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import tempfile
from collections import defaultdict
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
    """Runs to compare and what is known of them; `absent` has a line for each run that is not
    there.
    """

    name: str
    question: str
    folders: list
    runs: list
    absent: list
    axes: list | None = None
    metric: str | None = None
    reference: dict | None = None
    out: Path | None = None
    again: str = ""  # how the report is made again


def read_below(parent):
    """The folders in a folder, the runs that they hold, and a line for each that holds none."""
    folders = sorted(path for path in Path(parent).iterdir() if path.is_dir())
    runs = []
    absent = []
    for folder in folders:
        try:
            runs.append(studies_runs.read_run(folder))
        except ValueError as error:
            absent.append(f"{folder.name}: {str(error).removeprefix(str(folder)).lstrip(' :/')}")
    return folders, runs, absent


def study_source(path, given=None, out=None):
    """The runs of a study, in a given folder or where they belong, and those missing from its grid
    by name.

    Raises ValueError where there are none.
    """
    wanted = study.read_study(path)
    home = wanted.path.with_suffix("")
    made = wanted.folder(given) if given else wanted.folder()
    parent = f" --runs={given}" if given and made.is_dir() else ""
    made = Path(given) if given and not parent else made  # the folder of its runs itself
    folder = made if given or made.is_dir() else home / "runs"
    folders, runs, absent = read_below(folder) if folder.is_dir() else ([], [], [])
    if not runs:
        raise ValueError(
            f"{made} has no runs yet; python -m ddpm.sweep {path} makes them, and "
            "--runs=ENTITY/PROJECT/SWEEP takes those of a W&B sweep"
        )
    points = (
        {wanted.run_name(point): point for point in wanted.grid()}
        if wanted.method == "grid"
        else {}
    )
    runs = (
        [with_config_file(wanted, points, run) for run in runs]
        if studies_runs.CONFIG_AXIS in wanted.axes
        else runs
    )
    more, runs = checkpoint_axes(wanted, runs) if "checkpoint" in wanted.varied else ([], runs)
    axes = wanted.axes + more
    absent += [
        f"{name}: no run"
        for name in missing_runs(wanted, points, runs)
        if name not in {folder.name for folder in folders}
    ]
    reference = setting_of(wanted, next(iter(points.values())), wanted.axes) if points else None
    for run in runs:
        if run.name == next(iter(points), None):
            reference |= {axis: run.options[axis] for axis in more}
    metric = wanted.metric[0] if wanted.metric and wanted.metric[1] == "minimize" else None
    question = " ".join(wanted.description.split()) or f"How do the runs of {wanted.name} compare?"
    measured = wanted.values("checkpoint") if "checkpoint" in wanted.parameters else []
    again = AGAIN.format(
        path=path,
        runs=parent,
        made=made if parent else f"runs/{wanted.name}",
        first=f" It measures {report.listed(measured)}, which must be trained first."
        if measured
        else "",
    )
    return Source(
        wanted.name,
        question,
        folders,
        runs,
        absent,
        axes,
        metric,
        reference,
        Path(out or home),
        again,
    )


AGAIN = """    python -m ddpm.sweep {path}{runs}
    python -m ddpm.compare {path}{runs}

The first command makes the runs in `{made}`; `--parallel=2` makes two at a time.{first} The second
writes this report from them or, where they are missing as in a fresh clone, from the copies below
`runs/` next to this file. `results.csv` comes out the same, byte for byte."""

AGAIN_FROM_KEPT = """    python -m ddpm.compare {out}/runs --out={out}

writes this report from the copies of the runs; `results.csv` comes out the same, byte for byte."""


def setting_of(wanted, point, axes):
    """Where a study's point lies on some axes, {axis: value}, in the values that its runs have
    among their options.
    """
    options = defaults.flatten(wanted.config(point))
    return {
        axis: config_file_name(wanted, point[axis])
        if axis == studies_runs.CONFIG_AXIS
        else options[axis]
        for axis in axes
    }


def config_file_name(wanted, file):
    """What tells one config file of a study from the others: where all are one file, its
    variant, else the whole name.
    """
    if len({other.partition(":")[0] for other in wanted.values(studies_runs.CONFIG_AXIS)}) > 1:
        return wanted.label(studies_runs.CONFIG_AXIS, file)
    return file.partition(":")[2] or Path(file).stem


def with_config_file(wanted, points, run):
    """A run of a study that varies the config file, with that file's name among its options.

    It is told by the run's name, else by the config. Raises ValueError where no file of the study
    makes it.
    """
    file = points[run.name][studies_runs.CONFIG_AXIS] if run.name in points else None
    for candidate in wanted.values(studies_runs.CONFIG_AXIS) if file is None else ():
        point = {
            name: run.options[name.removeprefix("config.")]
            for name in wanted.parameters
            if name != studies_runs.CONFIG_AXIS
        }
        point = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in point.items()
        }
        given = defaults.flatten(wanted.config(point | {studies_runs.CONFIG_AXIS: candidate}))
        if all(
            run.options[option] == given[option]
            for option in given
            if studies_runs.is_related(option)
        ):
            file = candidate
    if file is None:
        raise ValueError(
            f"{run.folder} is of another study: no config file of this one makes its config; move "
            "it away"
        )
    return dataclasses.replace(
        run, options=run.options | {studies_runs.CONFIG_AXIS: config_file_name(wanted, file)}
    )


def checkpoint_axes(wanted, runs):
    """What tells the checkpoints of a study apart: a list of axes, and the runs with a value on
    each.

    Trainings differ in options, or in the seed alone, which is no axis; checkpoints of one training
    differ in the step, else in the file.
    """
    files = {run.name: checkpoint_of(wanted, run.name) for run in runs}
    known = [run for run in runs if files[run.name] and not run.fault]
    differing = studies_runs.varied(known) if known else []
    axes = [
        option
        for option in differing
        if studies_runs.is_related(option) and option not in wanted.axes
    ]
    trainings = defaultdict(list)
    for run in known:
        trainings[
            tuple(run.options[option] for option in (*wanted.axes, *axes, *studies_runs.UNITS))
        ].append(run)

    def suffices(values):
        return all(
            len({values[run.name] for run in alike}) == len({files[run.name] for run in alike})
            for alike in trainings.values()
        )

    if suffices(dict.fromkeys(files)):
        return axes, runs
    steps = {run.name: run.rows[-1]["step"] if run.rows else None for run in runs}
    names = {name: Path(file or name).name for name, file in files.items()}
    paths = {name: file or name for name, file in files.items()}
    axis, values = next(
        (axis, values)
        for axis, values in (("step", steps), ("checkpoint", names), ("checkpoint", paths))
        if suffices(values)
    )
    return [*axes, axis], [
        dataclasses.replace(run, options=run.options | {axis: values[run.name]}) for run in runs
    ]


def checkpoint_of(wanted, name):
    """The checkpoint that a run of a study measured, which its name begins with; None where it
    is none of the study's.
    """
    labels = {wanted.label("checkpoint", value): value for value in wanted.values("checkpoint")}
    return labels.get(
        max(
            (label for label in labels if f"{name}-".startswith(f"{label}-")), key=len, default=None
        )
    )


def missing_runs(wanted, points, runs):
    """The names of the points of a grid that have no run. Raises ValueError for a run that lies
    at no point.
    """
    known = [name.removeprefix("config.") for name in wanted.parameters]
    axes = [
        axis
        for axis in known
        if axis in wanted.axes or axis not in ("checkpoint", studies_runs.CONFIG_AXIS)
    ]
    places = {name: setting_of(wanted, point, axes) for name, point in points.items()}
    free = dict(places)
    for run in sorted(runs, key=lambda run: run.name not in places) if points else ():
        own = {axis: run.options[axis] for axis in axes}
        there = [places[run.name]] if run.name in places else list(places.values())
        for axis in axes:
            if own[axis] not in (values := sorted({place[axis] for place in there}, key=str)):
                raise ValueError(
                    f"{run.folder} is of another study: config.{axis} is {own[axis]!r} there, "
                    f"this one has {', '.join(map(repr, values))}; move it away"
                )
        name = (
            run.name
            if run.name in places
            else next((name for name in free if free[name] == own), None)
        )
        free.pop(name, None)
    return list(free)


def read_folders(folders):
    """The runs in these folders, or in the folders below them. Raises ValueError where one holds
    none.
    """
    found = []
    runs = []
    absent = []
    for folder in map(Path, folders):
        # of ddpm.sweep, beside the runs: runs/NAME/* means those
        if folder.name == "sweep.json" or folder.suffix == ".log":
            continue
        if not folder.is_dir():
            raise ValueError(f"there is no run folder {folder}")
        if (folder / "config.json").is_file() or not any(folder.glob("*/config.json")):
            found.append(folder)
            runs.append(studies_runs.read_run(folder))
        else:
            inside = read_below(folder)
            for all_of_them, some in zip((found, runs, absent), inside, strict=True):
                all_of_them += some
    names = [folder.name for folder in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two run folders are named {twice[0]}; give one of them another name")
    return found, sorted(runs, key=lambda run: run.name), sorted(absent)


def source_of(arguments, runs, out, downloads):
    """What the arguments name; runs of W&B are written into `downloads` first."""
    if arguments[0].endswith((".yaml", ".yml")):
        if len(arguments) > 1:
            raise ValueError(f"one study at a time; leave out {arguments[1]}")
        if runs and wandb_io.is_remote(runs):
            wandb_io.download(runs, downloads)
            runs = downloads
        return study_source(arguments[0], runs, out)
    if len(arguments) == 1 and wandb_io.is_remote(arguments[0]):
        wandb_io.download(arguments[0], downloads)
        found = read_below(downloads)
    else:
        found = read_folders(arguments)
    if not found[1]:
        raise ValueError(f"{arguments[0]} has no run that can be read ({'; '.join(found[2][:3])})")
    out = Path(out) if out else None
    again = AGAIN_FROM_KEPT.format(out=out)
    return Source(
        out.name if out else arguments[0],
        "How do these runs compare?",
        *found,
        out=out,
        again=again,
    )


@functools.cache
def network_parameters(shape):
    """The number of parameters of the network that these options describe."""
    described = config_files.changed(defaults.freeze(defaults.base()), dict(shape))
    with torch.device("meta"):
        net = build.network(described)
    return sum(parameter.numel() for parameter in net.parameters())


def parameters(run):
    """The number of parameters of a run's network."""
    return network_parameters(
        tuple(
            (option, value)
            for option, value in run.options.items()
            if option.startswith("model.") or option in SHAPES
        )
    )


SHAPES = (  # options outside of the section `model` that give the network its size
    "data.image_size",
    "data.channels",
    "data.class_labels",
    "data.classes",
    "data.augment",
    "diffusion.variance",
    "diffusion.self_condition",
)


def provenance(out, runs, given=None):
    """Where the runs come from: as they or a report of the very same runs recorded it, else as
    it is here and now.
    """
    digest = hashlib.sha256()
    for path in [run.folder / name for run in runs for name in ("config.json", "metrics.jsonl")]:
        digest.update(
            f"{path.parent.name}/{path.name}\n".encode()
            + (path.read_bytes() if path.is_file() else b"")
        )
    code = "; ".join(report.code_of([run for run in runs if not run.fault]))
    made = {
        "commit": code or commit(),
        "torch": version("torch"),
        "machine": this_machine(),
        "runs": digest.hexdigest(),
    }
    # the report that kept the runs, if one did, and the one that is written
    for home in (runs[0].folder.parent.parent, out):
        # none yet, or damaged
        with contextlib.suppress(OSError, ValueError, RecursionError, KeyError, TypeError):
            kept = json.loads((home / "made.json").read_text())
            made = {key: str(kept[key]) for key in made} if kept["runs"] == made["runs"] else made
    return made | ({"machine": given} if given else {})


def this_machine():
    """The class of this machine."""
    return (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    )


def archive_runs(folders, out):
    """Copy what the report is made from to `out`/runs: each run's config, metrics and last grid."""
    with atomic_folder(out / "runs") as part:
        for folder in folders:
            copy = part / folder.name
            copy.mkdir()
            (copy / "metrics.jsonl").touch()
            for path in (
                folder / "config.json",
                folder / "metrics.jsonl",
                *sorted(folder.glob("samples/step_*.png"))[-1:],
            ):
                if path.is_file():
                    (copy / path.relative_to(folder)).parent.mkdir(exist_ok=True)
                    shutil.copyfile(path, copy / path.relative_to(folder))


def write_report(source, found, columns, machine=None):
    """Write the report; returns the names of its files. Raises ValueError before it writes over
    what is not a report's.
    """
    out = source.out
    if (out / "runs").exists() and not (out / "made.json").exists():
        raise ValueError(f"{out} holds runs that no report keeps; give another --out")
    drawn = figures.draw(found)
    made = provenance(out, found.runs, machine)
    pictures = [(name, caption) for name, caption, _ in drawn]
    files = [
        (Path(name).with_suffix(kind), figure)
        for name, _, figure in drawn
        for kind in {".png", Path(name).suffix}
    ]
    texts = {
        "README.md": report.readme(
            source.name,
            source.question,
            found,
            columns,
            pictures,
            made,
            left_out(source, found),
            source.again,
        ),
        "results.csv": tables.csv(found.groups, columns),
        "made.json": json.dumps(made, indent=2) + "\n",
    }
    for name, text in texts.items():
        with atomic_write(out / name) as part:
            part.write_text(text)
    for name, figure in files:
        figures.save(figure, out / name)
    archive_runs(source.folders, out)
    return [*texts, *sorted(str(name) for name, _ in files)]


def left_out(source, found):
    """A line for each run that is in no average."""
    return source.absent + [f"{run.name}: {run.fault}" for run in found.runs if run.fault]


def compare(*arguments, runs=None, out=None, machine=None):
    """Compare what the arguments name, print the result and write the report; returns the
    `statistics.Comparison`.

    `runs` is where the runs of a study lie, a folder or a W&B path, `out` the folder of the report,
    `machine` the class of machine that ran them. Raises ValueError, one line, where there is
    nothing to compare or what there is does not belong together; then nothing is written.
    """
    with tempfile.TemporaryDirectory() as downloads:
        source = source_of(arguments, runs, out, downloads)
        found = statistics.compare(source.runs, source.axes, source.metric, source.reference)
        columns = tables.columns(found.groups, parameters)
        files = write_report(source, found, columns, machine) if source.out else []
    chief = ("val/loss_ema", found.metric, f"best {found.metric}")
    shown = [
        column
        for column in columns
        if column.table and (column.name in chief or not column.name.startswith(("best ", "val/")))
    ]
    print(
        f"{source.name}: {quantity(len(found.counted), 'run')} in "
        f"{quantity(len(found.groups), 'setting')}\n"
    )
    print(tables.plain(tables.table(found.groups, shown)))
    if found.tested:
        print("", tables.plain(report.verdicts(found)), sep="\n")
    for line in left_out(source, found):
        print(f"left out: {line}")
    print(*report.mixed_code(found.counted), f"\nAnswer: {report.answer(found)}", sep="\n")
    print(
        f"{source.out}: {', '.join(files)}"
        if files
        else "nothing is written; --out=DIR writes a report"
    )
    return found
