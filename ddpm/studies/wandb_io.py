"""A study's runs from a W&B server: sweeps and groups, downloaded as run folders."""

import json
import re
from pathlib import Path

from ddpm.common import errors
from ddpm.config import files


def is_remote(path):
    """True for what can only be a W&B project or sweep."""
    return bool(not Path(path).exists() and WANDB_PATH.fullmatch(path))


def download(path, folder):
    """Write the runs of a W&B project or sweep below a folder; raises ValueError if none."""
    import wandb  # a second of start-up

    try:
        api = wandb.Api()
        runs = api.sweep(path).runs if path.count("/") == 2 else api.runs(path)
        for run in runs:
            name = re.sub("[^A-Za-z0-9_.=+-]+", "_", run.name).removesuffix(f"-{run.id}")
            write_run_folder(run, Path(folder, f"{name}-{run.id}"))
    except Exception as error:  # W&B has many for a server that does not answer properly
        fault = f"cannot be read from W&B: {errors.one_line(error)[:200]}"
        raise ValueError(f"{path} is no folder here and {fault}") from None
    if not any(Path(folder).glob("*/config.json")):
        raise ValueError(f"{path} has no runs of ddpm yet")


def write_run_folder(run, folder):
    """Write a run of W&B's API as a run folder, without config.json if it is not one of ddpm."""
    folder.mkdir()
    keys = [key for key in run.config if key.startswith("config.")]
    if options := {key.removeprefix("config."): run.config[key] for key in keys}:
        text = json.dumps(options)
        try:
            files.write(files.from_json(text), folder, run.config.get("code"))
        except ValueError:  # `runs.read_run` reports it, as of any other damaged run
            (folder / "config.json").write_text(text)
    grid = step = None
    with open(folder / "metrics.jsonl", "w") as file:
        for row in run.scan_history():
            keys = [key for key in row if not (key.startswith("_") or isinstance(row[key], dict))]
            numbers = {key: row[key] for key in keys}
            if "train/step" in numbers:
                file.write(json.dumps({"step": numbers.pop("train/step"), **numbers}) + "\n")
                if isinstance(picture := row.get("samples"), dict):
                    grid = str(picture.get("path"))
                    step = row["train/step"]
    if grid and not (PICTURE.fullmatch(grid) and isinstance(step, int)):
        print(f"left out: the samples of {folder.name}, which W&B does not keep at {grid!r}")
        grid = None
    for picture in run.files([grid]) if grid else ():  # empty where the upload is missing
        picture.download(folder)
        (folder / "samples").mkdir()
        (folder / grid).rename(folder / "samples" / f"step_{step:08d}.png")


PICTURE = re.compile(r"media/images/\w[\w.-]*")  # where W&B stores logged images
WANDB_PATH = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")  # entity/project, entity/project/sweep
