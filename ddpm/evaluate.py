"""Measure a checkpoint: `python -m ddpm.evaluate --checkpoint=RUN_OR_FILE`, the numbers that a training logs.

`--workdir=DIR` keeps them as a run of their own, tracked like a training: so a sweep can vary sampler and steps.
"""

import os
from pathlib import Path

from absl import flags

from ddpm import build, command, config, figures
from ddpm.draw import joined
from ddpm.files import held
from ddpm.score import keep
from ddpm.train import show

KNOBS = {"likelihood": "evaluate.likelihood", "num_samples": "evaluate.num_samples", "extractor": "evaluate.extractor",
         "inception_weights": "evaluate.inception_weights", "source": "data.source"}


def evaluate(checkpoint_path, device=None, workdir=None, **knobs):
    """Draw images from a run folder or checkpoint file and measure them against its data; returns {"eval/fid": ...}.

    `knobs` as in `{"evaluate.num_samples": 5000}` take the place of the checkpoint's own; `workdir` is a folder that becomes a
    run with config.json, metrics.jsonl, a grid of the first `sample.num_images` that are measured, the nearest training images
    and, where the bound is measured, likelihood.csv and its picture. Raises ValueError, one line, for a missing checkpoint,
    data or extractor, for nothing to measure, for a folder that holds something else, and for a sample.spacing that would not
    be used.
    """
    made = build.load(checkpoint_path, device, **knobs)
    if knobs.get("sample.spacing") and knobs.get("evaluate.spacing") is None and made.config.evaluate.spacing != "auto":
        raise ValueError(f"sample.spacing is given, and {made.name} is measured in evaluate.spacing "
                         f"{made.config.evaluate.spacing!r}; give evaluate.spacing={knobs['sample.spacing']!r} in its place")
    if workdir is None:
        return measure(made)[0]
    with held(workdir):
        config.check_measures(made.config, workdir)
        numbers, pictures, files = measure(made, made.config.sample.num_images)
        tracker = build.tracker(made.config, workdir, made.machine, 0, made.step)
        tracker.log(made.step, numbers)
        show(workdir, tracker, made.step, pictures)
        if made.machine.main:
            keep(workdir, files)
            picture(workdir, files)
        tracker.close()
    return numbers


def picture(workdir, files):
    """Draw the terms of the bound, if they were measured, beside their csv; without matplotlib that is told, and no more."""
    for name, text in files.items():
        try:
            figures.save(figures.likelihood(text), Path(workdir, name).with_suffix(".png"))
        except ValueError as error:
            print(f"{name} is not drawn: {error}")


def measure(made, shown=0):
    """Numbers and pictures of what a checkpoint draws, of which the first are `shown`; numbers and files of the likelihood."""
    images = build.dataset(made.config)
    score, likelihood = (build.scorer(made.config, images, made.machine),
                         build.likelihood(made.config, made.net, images, made.machine))
    if not (how := "; ".join(filter(None, [score.made, likelihood.made]))):
        raise ValueError("nothing to measure: evaluate.extractor and evaluate.likelihood are both none; set one of them")
    print("\n".join([f"measuring {made.name}: {how}", *build.remarks(made.config, "evaluate"), *score.notes]))
    draw = build.drawer(made.config, made.net, made.machine)
    (numbers, pictures), (bits, files) = score(draw), likelihood()
    if numbers and shown:
        pictures["samples"] = made.machine.gather(joined(draw(range(shown), score.recipe)))
    return numbers | bits, pictures, files


def main():
    """Measure what the flags say and print a line for each number; returns the exit code."""
    given = flags.FLAGS
    knobs = command.sample_knobs("evaluate") | {knob: given[flag].value for flag, knob in KNOBS.items()} | command.overrides()
    workdir = given.workdir
    if workdir is None and os.environ.get("WANDB_SWEEP_ID"):
        workdir = config.default_workdir(f"{Path(given.checkpoint).stem}-measured", command.overrides())
    for name, value in evaluate(given.checkpoint, given.device, workdir, **knobs).items():
        print(f"{name:28} {value:.4f}" if isinstance(value, float) else f"{name:28} {value}")
    return command.DONE


if __name__ == "__main__":
    command.define_checkpoint_flags()
    command.define_overrides_flag()
    flags.DEFINE_integer("num_samples", None, "Images drawn; by default the checkpoint's.", lower_bound=4)
    flags.DEFINE_string("extractor", None, "auto, digits, inception or none; by default the checkpoint's.")
    flags.DEFINE_string("likelihood", None, "Bits/dim by bound, flow, both or none; by default the checkpoint's.")
    flags.DEFINE_string("inception_weights", None, "Path of torch-fidelity's Inception weights; by default the checkpoint's.")
    flags.DEFINE_string("source", None, "The real images, where they lie elsewhere now: folder(path='data/cats'), ...")
    flags.DEFINE_string("workdir", None, "Folder that becomes a run with these numbers; by default they are only printed.")
    flags.adopt_module_key_flags(command)
    command.run_door(main)
