"""Save a W&B workspace that compares the runs of a project or a sweep: `python -m ddpm.dashboard
--project=ENTITY/PROJECT`.

Grouped by what varies, the seeds in one line with their spread; with `--sweep=ID` for the runs of
one study only. Needs a login, and `pip install -e '.[study]'`.
"""

import contextlib

from absl import flags

from ddpm.common import errors
from ddpm.config import files
from ddpm.config import flags as config_flags
from ddpm.studies import runs as studies_runs

PROJECT = flags.DEFINE_string(
    "project", None, "PROJECT, or ENTITY/PROJECT where it is not the login's own.", required=True
)
SWEEP = flags.DEFINE_string(
    "sweep", None, "Id of the sweep whose runs are shown; by default all of the project."
)

LOSS = ("train/loss", "val/loss", "val/loss_ema")
# until a run has logged others
DISTANCES = ("eval/fid", "eval/kid", "eval/fd_digits", "eval/kd_digits")
PICTURES = ("samples", "eval/nearest")
SPEED = ("speed/images_per_second", "speed/step_ms", "speed/loader_wait", "speed/mfu")
MEMORY = ("memory/vram_peak_gib", "memory/vram_reserved_gib", "memory/rss_gib")
STEP = "train/step"
COMPUTE = "progress/petaflop"
SEED = "config.seed"
AT_ONCE = 100  # runs or groups in a panel; W&B's default is 10


def main():
    """Save the workspace and print its address; returns the exit code."""
    try:
        import wandb
        import wandb_workspaces.workspaces  # noqa: F401
    except ImportError as error:
        package = (error.name or "wandb_workspaces").partition(".")[0].replace("_", "-")
        raise ValueError(f"{package} is missing; pip install -e '.[study]'") from None
    wandb.setup(wandb.Settings(silent=True))
    if not wandb.login(prompt=False, verify=False):
        raise ValueError(
            "not logged in to W&B; use `wandb login`, or set WANDB_API_KEY "
            "(runs that were logged offline: `wandb leet` shows them, `wandb sync` uploads them)"
        )
    entity, _, project = PROJECT.value.rpartition("/")
    with in_one_line():
        api = wandb.Api()
        entity = entity or api.default_entity
        sweep = api.sweep(f"{entity}/{project}/{SWEEP.value}") if SWEEP.value else None
        runs = list(
            api.runs(
                f"{entity}/{project}", filters={"sweep": SWEEP.value} if sweep else None, lazy=False
            )
        )
    made = workspace(entity, project, sweep, runs)
    with in_one_line():
        made.save()
    print(made.url)
    return errors.DONE


@contextlib.contextmanager
def in_one_line():
    """W&B has many exceptions for a server that does not answer, or has no such project or
    sweep.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"W&B: {errors.one_line(error)}") from error


def varied(sweep, runs):
    """The names of the columns that differ between the runs, the seed apart: a sweep's
    parameters, or what the configs show.
    """
    if sweep:
        given = sweep.config["parameters"].items()
        names = [
            name
            for name, axis in given
            if "value" not in axis and len(axis.get("values", axis)) > 1
        ]
    else:
        columns = {
            name
            for run in runs
            for name in run.config
            if not files.is_free(name.removeprefix("config."))
        }
        names = [name for name in columns if len({str(run.config.get(name)) for run in runs}) > 1]
    return sorted(name for name in names if name != SEED)


def measured(runs):
    """What evaluations measured, beside what a perfect generator gets: [["eval/fid",
    "eval/fid_perfect"], ["eval/kid"]].
    """
    logged = {
        key
        for run in runs
        for key, value in run.summary_metrics.items()
        if key.startswith("eval/") and isinstance(value, (int, float))
    }
    return [
        [key, *({f"{key}_perfect"} & logged)]
        for key in sorted(logged or DISTANCES)
        if not key.endswith((*studies_runs.PERFECT, studies_runs.OLD_FLOOR))
    ]


def workspace(entity, project, sweep, runs):
    """The workspace as wandb-workspaces describes it, not saved yet."""
    import wandb_workspaces.reports.v2 as reports
    import wandb_workspaces.workspaces as workspaces
    from wandb_workspaces import expr

    class Column(reports.ParallelCoordinatesPlotColumn):
        """An option in parallel coordinates; the package takes the dots in our names for nested
        dicts.
        """

        def _to_model(self):
            model = super()._to_model()
            if isinstance(self.metric, reports.Config):
                model.accessor = f"config:{self.metric.name}.value"
            return model

    def plots(lines, x=STEP):
        lines = [[line] if isinstance(line, str) else line for line in lines]
        # over the seeds of a group
        spread = {"groupby_aggfunc": "mean", "groupby_rangefunc": "stderr"}
        return [
            reports.LinePlot(title=keys[0], x=x, y=keys, max_runs_to_show=AT_ONCE, **spread)
            for keys in lines
        ]

    axes = varied(sweep, runs)
    distances = measured(runs)
    metric = (sweep and sweep.config.get("metric", {}).get("name")) or distances[0][0]
    columns = [
        Column(reports.Config(name), display_name=name.removeprefix("config."))
        for name in [*axes, SEED]
    ]
    # the same latents every time: time across, runs below each other
    grid = {"grid_x_axis": "step", "grid_y_axis": "run"}
    sections = {
        f"What matters for {metric}": [
            reports.ParameterImportancePlot(with_respect_to=metric),
            reports.ParallelCoordinatesPlot(
                columns=[*columns, Column(reports.SummaryMetric(metric))]
            ),
            reports.BarPlot(title=metric, metrics=[metric], max_runs_to_show=AT_ONCE),
        ],
        "Loss": plots(LOSS),
        "Quality against steps": plots(distances),
        "Quality against compute (10^15 operations)": plots(distances, COMPUTE),
        "Samples": [reports.MediaBrowser(title=key, media_keys=[key], **grid) for key in PICTURES],
        "Speed": plots(SPEED),
        "Memory": plots(MEMORY),
    }
    only = [expr.Metric("Sweep") == sweep.id] if sweep else []
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
            filters=only, groupby=[expr.Config(f"{name}.value") for name in axes]
        ),
    )


if __name__ == "__main__":
    config_flags.run_command(main)
