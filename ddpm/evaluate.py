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
    flags.DEFINE_string(
        "workdir",
        None,
        "Folder that becomes a run with these numbers; by default they are only printed.",
    )
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
    """Draw images from a run folder or checkpoint file and measure them against its data; returns
    {"eval/fid": ...}.

    The newest run of runs/ is taken where none is given. `options` are those of `python -m
    ddpm.evaluate --help` by the same names, `num_samples=5000`, or any by its full name,
    `**{"diffusion.clip": False}`; `workdir` is a folder that becomes a run with config.json,
    metrics.jsonl, a grid of the first `sample.num_images` that are measured, the nearest training
    images and, where the bound is measured, likelihood.csv and its picture. Raises ValueError, one
    line, for a missing checkpoint, data or extractor, for nothing to measure, for a folder that
    holds something else, and for a sample.spacing that would not be used.
    """
    options = config_flags.options(options, "evaluate")
    made = load.load(checkpoint, device, **options)
    if (
        options.get("sample.spacing")
        and options.get("evaluate.spacing") is None
        and made.config.evaluate.spacing != "auto"
    ):
        raise ValueError(
            f"sample.spacing is given, and {made.name} is measured in evaluate.spacing "
            f"{made.config.evaluate.spacing!r}; give "
            f"evaluate.spacing={options['sample.spacing']!r} in its place"
        )
    if workdir is None:
        numbers, _, _ = measure(made, checkpoint)
        print(
            "".join(
                f"{line}\n"
                for line in copying_warning(numbers, "--workdir=DIR keeps a picture that shows it")
            ),
            end="",
        )
        return numbers
    wandb.check(dict(made.config.wandb))
    with lock_folder(workdir):
        config_files.check_measures(made.config, workdir)
        numbers, pictures, files = measure(made, checkpoint, made.config.sample.num_images)
        tracker = build.tracker(made.config, workdir, made.machine, 0, made.step)
        tracker.log(made.step, numbers)
        show(workdir, tracker, made.step, pictures)
        for line in copying_warning(
            numbers, f"look at {grid_file(workdir, 'eval/nearest', made.step)}"
        ):
            tracker.say(line)
        if made.machine.main:
            write_texts(workdir, files)
            picture(workdir, files)
        tracker.close()
    return numbers


def picture(workdir, files):
    """Draw the terms of the bound, if they were measured, beside their csv; without matplotlib
    that is told, and no more.
    """
    for name, text in files.items():
        try:
            figures.save(figures.likelihood(text), Path(workdir, name).with_suffix(".png"))
        except ValueError as error:
            print(f"{name} is not drawn: {error}")


def measure(made, run_or_file, shown=0):
    """Numbers and pictures of what a checkpoint draws, of which the first are `shown`; numbers
    and files of the likelihood.
    """
    images = build.dataset(made.config)
    score = drawing.scorer(made.config, images, made.machine)
    likelihood = drawing.likelihood(made.config, made.net, images, made.machine)
    if not (how := "; ".join(filter(None, [score.protocol, likelihood.protocol]))):
        raise ValueError(
            "nothing to measure: evaluate.extractor and evaluate.likelihood are both none; set "
            "one of them"
        )
    # by name, for people
    how = re.sub(f"(of )?{images.fingerprint[:12]}", lambda _: f"of {made.config.data.source}", how)
    notes = [
        *map(config_flags.as_typed, remarks.sampling_remarks(made.config, "evaluate")),
        *score.notes,
        *build.other_data(made.config, images, run_or_file),
    ]
    print("\n".join([f"measuring {made.name}: {how}", *notes]), flush=True)
    draw = drawing.drawer(made.config, made.net, made.machine)
    (numbers, pictures), (bits, files) = score(draw), likelihood()
    if numbers and shown:
        pictures["samples"] = made.machine.gather(concatenate(draw(range(shown), score.recipe)))
    return numbers | bits, pictures, files


def four_digits(value):
    """A number for people: `0.2617`, `88.70`, `6.123e-10`."""
    return (
        f"{value:.4f}" if value == 0 or 0.1 <= abs(value) < 1 else f"{value:#.4g}".removesuffix(".")
    )


def main():
    """Measure what the flags say and print a line for each number; returns the exit code."""
    given = flags.FLAGS
    workdir = flags.FLAGS.workdir
    if workdir is None and os.environ.get("WANDB_SWEEP_ID"):
        path = Path(given.checkpoint or training_checkpoint.newest_run())
        workdir = config_files.default_workdir(f"{path.stem}-measured", config_flags.overrides())
    others = {f"config.{option}": value for option, value in config_flags.overrides().items()}
    numbers = evaluate(given.checkpoint, given.device, workdir, **config_flags.drawing(), **others)
    print(
        plain(
            [
                [name, four_digits(value) if isinstance(value, float) else str(value)]
                for name, value in numbers.items()
            ]
        )
    )
    return errors.DONE


if __name__ == "__main__":
    config_flags.run_command(main)
