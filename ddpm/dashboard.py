"""Save a W&B workspace that compares the runs of a project or a sweep: `python -m ddpm.dashboard
--project=ENTITY/PROJECT`.

Runs are grouped by the options that differ, and the seeds of a group form one line with its spread.
`--sweep=ID` shows the runs of one study only. Needs a login and `pip install -e '.[study]'`.
"""

# ruff: noqa: E402
# The command line is read above the imports of torch, which take a second.

from absl import flags

from ddpm.config import flags as config_flags

PROJECT = flags.DEFINE_string(
    "project", None, "PROJECT, or ENTITY/PROJECT for an entity not your own.", required=True
)
SWEEP = flags.DEFINE_string(
    "sweep", None, "Id of the sweep whose runs are shown; by default all runs of the project."
)
if __name__ == "__main__":
    config_flags.read_command_line()

import contextlib

from ddpm.common import errors
from ddpm.config import files
from ddpm.studies import runs as studies_runs

LOSS = ("train/loss", "val/loss", "val/loss_ema")
# shown until a run has logged one
DISTANCES = ("eval/fid", "eval/kid", "eval/fd_digits", "eval/kd_digits")
PICTURES = ("samples", "eval/nearest")
SPEED = (
    "speed/images_per_second",
    "speed/step_ms",
    "speed/loader_wait",
    "speed/noise_wait",
    "speed/mfu",
)
MEMORY = ("memory/vram_peak_gib", "memory/vram_reserved_gib", "memory/rss_gib")
STEP = "train/step"
COMPUTE = "progress/petaflop"
SEED = "config.seed"
AT_ONCE = 100  # runs or groups in a panel; W&B's default is 10


def main():
    """Save the workspace and print its URL; returns the exit code."""
    try:
        import wandb
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        package = (error.name or "wandb_workspaces").partition(".")[0].replace("_", "-")
        raise ValueError(f"{package} is missing; pip install -e '.[study]'") from None
    wandb.setup(wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        offline = (
            "runs that were logged offline: `wandb leet` shows them, `wandb sync` uploads them"
        )
        remedy = "use `wandb login`, or set WANDB_API_KEY"
        raise ValueError(f"not logged in to W&B; {remedy} ({offline})")
    entity, _, project = PROJECT.value.rpartition("/")
    with errors_of_wandb():
        api = wandb.Api()
        entity = entity or api.default_entity
        sweep = api.sweep(f"{entity}/{project}/{SWEEP.value}") if SWEEP.value else None
        filters = {"sweep": SWEEP.value} if sweep else None
        runs = list(api.runs(f"{entity}/{project}", filters=filters, lazy=False))
    saved = workspace(entity, project, sweep, runs)
    with errors_of_wandb():
        saved.save()
    print(saved.url)
    return errors.DONE


@contextlib.contextmanager
def errors_of_wandb():
    """Turn W&B's exceptions, of many types, into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"W&B: {errors.one_line(error)}") from error


def varied(sweep, runs):
    """The options except the seed that a sweep varies, or in which the runs' configs differ."""
    if sweep:
        axes = sweep.config["parameters"]
        names = {name for name, axis in axes.items() if len(axis.get("values", axis)) > 1}
        names -= {name for name, axis in axes.items() if "value" in axis}
    else:
        logged = set().union(*(run.config for run in runs))
        names = {name for name in logged if not files.is_free(name.removeprefix("config."))}
        names = {name for name in names if len({str(run.config.get(name)) for run in runs}) > 1}
    return sorted(names - {SEED})


def measured(runs):
    """The logged results of evaluations, [["eval/fid", "eval/fid_perfect"], ["eval/kid"]]."""
    logged = set()
    for run in runs:
        numbers = {key for key, value in run.summary_metrics.items() if type(value) in (int, float)}
        logged |= {key for key in numbers if key.startswith("eval/")}
    return [
        [key, *({f"{key}_perfect"} & logged)]
        for key in sorted(logged or DISTANCES)
        if not key.endswith((*studies_runs.PERFECT, studies_runs.OLD_FLOOR))
    ]


def plots(lines, x=STEP):
    """A line plot for each of `lines`, a key or a list of keys, with the spread over seeds."""
    from wandb_workspaces.reports.v2 import LinePlot

    lines = [[line] if isinstance(line, str) else line for line in lines]
    spread = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}
    return [
        LinePlot(title=keys[0], x=x, y=keys, max_runs_to_show=AT_ONCE, **spread) for keys in lines
    ]


def influences(axes, metric):
    """Panels that relate the options `axes` to `metric`."""
    import wandb_workspaces.reports.v2 as reports

    class Column(reports.ParallelCoordinatesPlotColumn):
        """A column for an option; the package would read the dots of its name as nesting."""

        def _to_model(self):
            model = super()._to_model()
            if isinstance(self.metric, reports.Config):
                model.accessor = f"config:{self.metric.name}.value"
            return model

    names = {name: name.removeprefix("config.") for name in [*axes, SEED]}
    columns = [Column(reports.Config(name), display_name=names[name]) for name in names]
    return [
        reports.ParameterImportancePlot(with_respect_to=metric),
        reports.ParallelCoordinatesPlot(columns=[*columns, Column(reports.SummaryMetric(metric))]),
        reports.BarPlot(title=metric, metrics=[metric], max_runs_to_show=AT_ONCE),
    ]


def workspace(entity, project, sweep, runs):
    """The unsaved workspace of a project, or of a sweep in it, as wandb-workspaces describes it."""
    import wandb_workspaces.workspaces as workspaces
    from wandb_workspaces import expr
    from wandb_workspaces.reports.v2 import MediaBrowser

    axes = varied(sweep, runs)
    distances = measured(runs)
    metric = (sweep and sweep.config.get("metric", {}).get("name")) or distances[0][0]
    # samples start from the same noise: steps across, runs down
    grid = {"grid_x_axis": "step", "grid_y_axis": "run"}
    sections = {
        f"What matters for {metric}": influences(axes, metric),
        "Loss": plots(LOSS),
        "Quality against steps": plots(distances),
        "Quality against compute (10^15 operations)": plots(distances, COMPUTE),
        "Samples": [MediaBrowser(title=key, media_keys=[key], **grid) for key in PICTURES],
        "Speed": plots(SPEED),
        "Memory": plots(MEMORY),
    }
    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=f"ddpm: {sweep.name if sweep else project}",
        sections=[
            workspaces.Section(name=name, panels=panels, is_open=True)
            for name, panels in sections.items()
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP, max_runs=AT_ONCE),
        runset_settings=workspaces.RunsetSettings(
            filters=[expr.Metric("Sweep") == sweep.id] if sweep else [],
            groupby=[expr.Config(f"{name}.value") for name in axes],
        ),
    )


if __name__ == "__main__":
    config_flags.run_command(main)
