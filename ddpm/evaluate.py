"""Measure a checkpoint: `python -m ddpm.evaluate --checkpoint=RUN_OR_FILE`, the numbers that a
training logs.

`--workdir=DIR` keeps them as a run of their own, tracked like a training: so a sweep can vary
sampler and steps.
"""

# ruff: noqa: E402
# The command line is read above the imports of torch, which take a second.

from absl import flags

from ddpm.config import flags as config_flags

if __name__ == "__main__":
    config_flags.define_checkpoint_flags("evaluate")
    config_flags.define_overrides_flag()
    flags.DEFINE_alias("num_images", "num_samples")
    HELP = "Folder that becomes a run with these numbers; by default they are only printed."
    flags.DEFINE_string("workdir", None, HELP)
    flags.adopt_module_key_flags(config_flags)
    config_flags.read_command_line()

import os
import re
from pathlib import Path

from ddpm.common import errors
from ddpm.common.files import lock_folder
from ddpm.config import files as config_files
from ddpm.evaluation.scorer import copying_warning, write_texts
from ddpm.experiment import build, drawing, load, remarks
from ddpm.sampling.draw import concatenate
from ddpm.studies import figures
from ddpm.studies.tables import plain
from ddpm.tracking import wandb
from ddpm.training import checkpoint as training_checkpoint
from ddpm.training.trainer import grid_file, show


@config_flags.also_called(checkpoint_path="checkpoint", num_images="num_samples")
def evaluate(checkpoint=None, device=None, workdir=None, **options):
    """Draw images from a run folder or checkpoint file, by default the newest run of runs/, and
    measure them against its data; returns {"eval/fid": ...}.

    `options` are the flags of `python -m ddpm.evaluate`, `num_samples=5000`, or any option,
    `**{"diffusion.clip": False}`; `workdir` is a folder that becomes a run with config.json,
    metrics.jsonl, a grid of the first `sample.num_images` that are measured, the nearest training
    images and, where the bound is measured, likelihood.csv and its picture. Raises ValueError for
    a missing checkpoint, data or extractor, for nothing to measure, for a folder that holds
    something else, and for a sample.spacing that would not be used.
    """
    options = config_flags.options(options, "evaluate")
    loaded = load.load(checkpoint, device, **options)
    config = loaded.config
    spacing = options.get("sample.spacing")
    own = config.evaluate.spacing
    if spacing and options.get("evaluate.spacing") is None and own != "auto":
        fault = f"{loaded.name} is measured in evaluate.spacing {own!r}"
        remedy = f"give evaluate.spacing={spacing!r} in its place"
        raise ValueError(f"sample.spacing is given, and {fault}; {remedy}")
    if workdir is None:
        numbers, _, _ = measure(loaded, checkpoint)
        for line in copying_warning(numbers, "--workdir=DIR keeps a picture that shows it"):
            print(line)
        return numbers
    wandb.check(dict(config.wandb))
    with lock_folder(workdir):
        config_files.check_measures(config, workdir)
        numbers, pictures, files = measure(loaded, checkpoint, config.sample.num_images)
        tracker = build.tracker(config, workdir, loaded.machine, 0, loaded.step)
        tracker.log(loaded.step, numbers)
        show(workdir, tracker, loaded.step, pictures)
        nearest = grid_file(workdir, "eval/nearest", loaded.step)
        for line in copying_warning(numbers, f"look at {nearest}"):
            tracker.say(line)
        if loaded.machine.main:
            write_texts(workdir, files)
            picture(workdir, files)
        tracker.close()
    return numbers


def picture(workdir, files):
    """Draw the terms of the bound, if they were measured, next to their csv."""
    for name, text in files.items():
        try:
            figures.save(figures.likelihood(text), Path(workdir, name).with_suffix(".png"))
        except ValueError as error:  # matplotlib is missing
            print(f"{name} is not drawn: {error}")


def measure(loaded, run_or_file, shown=0):
    """(Numbers, pictures, files of the likelihood) of a `load.Loaded`.

    The pictures include the first `shown` images that it draws.
    """
    config = loaded.config
    images = build.dataset(config)
    score = drawing.scorer(config, images, loaded.machine)
    likelihood = drawing.likelihood(config, loaded.net, images, loaded.machine)
    protocol = "; ".join(filter(None, [score.protocol, likelihood.protocol]))
    if not protocol:
        fault = "evaluate.extractor and evaluate.likelihood are both none; set one of them"
        raise ValueError(f"nothing to measure: {fault}")
    # by name, for people
    source = f"of {config.data.source}"
    protocol = re.sub(f"(of )?{images.fingerprint[:12]}", lambda _: source, protocol)
    lines = remarks.sampling_remarks(config, "evaluate")
    notes = [*map(config_flags.as_typed, lines), *score.notes]
    notes += build.other_data(config, images, run_or_file)
    print("\n".join([f"measuring {loaded.name}: {protocol}", *notes]), flush=True)
    draw = drawing.drawer(config, loaded.net, loaded.machine)
    numbers, pictures = score(draw)
    bits, files = likelihood()
    if numbers and shown:
        pictures["samples"] = loaded.machine.gather(concatenate(draw(range(shown), score.recipe)))
    return numbers | bits, pictures, files


def four_digits(value):
    """A value for people: `0.2617`, `88.70`, `6.123e-10`; other than floats as they are."""
    if not isinstance(value, float):
        return str(value)
    if value == 0 or 0.1 <= abs(value) < 1:
        return f"{value:.4f}"
    return f"{value:#.4g}".removesuffix(".")


def main():
    """Measure what the flags say and print a line for each number; returns the exit code."""
    given = flags.FLAGS
    workdir = flags.FLAGS.workdir
    if workdir is None and os.environ.get("WANDB_SWEEP_ID"):
        path = Path(given.checkpoint or training_checkpoint.newest_run())
        workdir = config_files.default_workdir(f"{path.stem}-measured", config_flags.overrides())
    others = {f"config.{option}": value for option, value in config_flags.overrides().items()}
    numbers = evaluate(given.checkpoint, given.device, workdir, **config_flags.drawing(), **others)
    print(plain([[name, four_digits(value)] for name, value in numbers.items()]))
    return errors.DONE


if __name__ == "__main__":
    config_flags.run_command(main)
