"""The same digits, the same clock: our recipe and denoising-diffusion-pytorch's. `python
experiments/time_to_quality/run.py`.

About 45 minutes on two otherwise idle CPU cores, a process of one thread on each. Writes
results.csv and made.json, and from them README.md and curves.pdf, curves.png; `--report` does the
latter alone, `--ancestral` adds the peer's own T-step sampler at its last point (an hour), `--toy`
does all in seconds at a size that says nothing, in a folder of its own. Needs `pip install -e
'.[bench]'`.
"""

import argparse
import csv
import json
import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from os import devnull
from pathlib import Path
from statistics import mean
from textwrap import fill
from typing import NamedTuple

import torch
from PIL import Image

from ddpm.config import defaults, files
from ddpm.evaluation import distances, extractors
from ddpm.evaluation import reference as evaluation_reference
from ddpm.experiment import build
from ddpm.experiment import trainer as experiment_trainer
from ddpm.runtime import device
from ddpm.sampling.draw import concatenate
from ddpm.studies import figures
from ddpm.studies.archive import commit, this_machine
from ddpm.studies.report import listed
from ddpm.studies.tables import amount, markdown
from ddpm.training.trainer import train

HERE = Path(__file__).parent
OURS = "ddpm"
PEER = "denoising-diffusion-pytorch"
GOAL = 10  # times less CPU time than the peer
NEEDED = ("denoising_diffusion_pytorch", "diffusers", "matplotlib")
QUIET = {
    "wandb.mode": "disabled",
    **{f"every.{name}": "0 steps" for name in ("sample", "validate", "evaluate")},
}


class Size(NamedTuple):
    """How much is done."""

    options: dict  # of our config
    lengths: tuple  # steps of our runs, each a whole one
    whole: int  # steps of the recipe as shipped, for the first seed
    seeds: tuple
    dim: int  # and dim_mults: the peer's network
    dim_mults: tuple
    points: tuple  # CPU seconds at which the peer is looked at
    # (evaluations, eta) of the peer's DDIM, the first at every point, all at the last
    samplers: tuple
    samples: int


FULL = Size(
    {},
    (200, 300, 400, 600, 800),
    2400,
    (0, 1, 2),
    32,
    (1, 2, 2),
    (120, 240, 480),
    ((25, 0.0), (50, 0.0)),
    1000,
)
TOY = Size(
    {
        "model.model_channels": 8,
        "model.channel_mult": (1, 2),
        "train.warmup": "1 steps",
        "evaluate.steps": 2,
    },
    (2, 4),
    6,
    (0, 1),
    8,
    (1, 2),
    (0.1, 0.2),
    ((2, 0.0), (2, 1.0)),
    16,
)


def ours(size, seed, steps):
    """Our recipe in a length of its own, as shipped but for that: its row of the table."""
    found = spec_from_file_location("digits", HERE.parents[1] / "configs" / "digits.py")
    found.loader.exec_module(module := module_from_spec(found))
    given = files.changed(
        defaults.freeze(module.get_config()),
        QUIET
        | size.options
        | {
            "seed": seed,
            "train.length": f"{steps} steps",
            "train.learning_rate_decay": f"cosine(length='{steps} steps')",
            "evaluate.num_samples": size.samples,
        },
    )
    with tempfile.TemporaryDirectory() as folder, quiet():
        made = experiment_trainer.build_trainer(given, folder, device.start(given.train.amp))
        begun = time.process_time()
        train(made)
        spent = time.process_time() - begun
        made.tracker.close()
        drawing = build.evaluation_recipe(given, build.dataset(given))
        with made.step.ema.averaged():
            drawn = concatenate(made.evaluation.draw(range(size.samples), drawing))
    return row(
        OURS,
        seed,
        steps,
        steps * given.train.batch_size,
        spent,
        drawing.sampler,
        drawing.steps,
        drawn,
    )


@contextmanager
def quiet():
    """What is printed inside goes nowhere."""
    with open(devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def peer(size, folder, points):
    """Train the peer and leave its averaged weights at each of the points: [(path, steps, CPU
    seconds)].
    """
    from denoising_diffusion_pytorch import GaussianDiffusion, Trainer

    torch.manual_seed(0)
    diffusion = GaussianDiffusion(network(size), image_size=16)
    with quiet():
        trainer = Trainer(
            diffusion,
            folder / "digits",
            train_num_steps=0,
            augment_horizontal_flip=False,
            calculate_fid=False,
            save_and_sample_every=10**9,
            results_folder=folder / "results",
        )
        spent = 0.0
        kept = []
        for point in points:
            while spent < point:
                begun = time.process_time()
                trainer.train_num_steps += 1 if size is TOY else 20
                trainer.train()
                spent += time.process_time() - begun
            kept.append((folder / f"{point}.pt", trainer.step, spent))
            torch.save(trainer.ema.ema_model.state_dict(), kept[-1][0])
    return kept


def network(size):
    from denoising_diffusion_pytorch import Unet

    return Unet(size.dim, dim_mults=size.dim_mults, channels=1)


def peer_drawn(size, path, steps, spent, evaluations, eta):
    """The row of what the peer draws with weights that it left: by its DDIM, or in all T steps
    by its own sampler.
    """
    from denoising_diffusion_pytorch import GaussianDiffusion

    diffusion = GaussianDiffusion(
        network(size), image_size=16, sampling_timesteps=evaluations, ddim_sampling_eta=eta
    )
    diffusion.load_state_dict(torch.load(path, weights_only=True))
    torch.manual_seed(0)
    with quiet():
        drawn = [
            diffusion.eval().sample(min(250, size.samples - start))
            for start in range(0, size.samples, 250)
        ]
    pixels = (torch.cat(drawn) * 255).round().clamp(0, 255).to(torch.uint8)
    name = f"ddim(eta={eta:g})" if diffusion.is_ddim_sampling else "ancestral"
    return row(PEER, 0, steps, 16 * steps, spent, name, diffusion.sampling_timesteps, pixels)


def row(recipe, seed, steps, images, spent, sampler, evaluations, drawn):
    """A line of results.csv; the distance is the same measure for all."""
    extractor, reference = measure()
    distance = distances.frechet(
        extractors.extract(extractor, drawn.split(256)), reference.features
    )
    return {
        "recipe": recipe,
        "seed": seed,
        "steps": steps,
        "images": images,
        "cpu_seconds": round(spent, 2),
        "sampler": sampler,
        "evaluations": evaluations,
        "samples": len(drawn),
        "fd_digits": round(distance, 4),
    }


def measure():
    """The extractor of the digits and the metrics.Reference of all of them."""
    given = defaults.freeze(defaults.base())
    extractor = build.extractor(given, device.start("off"))
    return extractor, evaluation_reference.reference(extractor, build.dataset(given))


def work(job):
    """One job of a process: a function's name and its arguments."""
    torch.set_num_threads(1)
    name, *arguments = job
    return JOBS[name](*arguments)


JOBS = {"ours": ours, "peer": peer, "peer_drawn": peer_drawn}


def everything(size, folder, run, ancestral):
    """All rows; `run` maps jobs to what they return."""
    write_digits(folder / "digits")
    jobs = [("ours", size, seed, steps) for steps in size.lengths[::-1] for seed in size.seeds]
    kept, *rows = run(
        work,
        [("peer", size, folder, size.points), ("ours", size, size.seeds[0], size.whole), *jobs],
    )
    samplers = [*size.samplers, *([(None, 0.0)] if ancestral else [])]
    looks = [
        ("peer_drawn", size, *left, *sampler)
        for left in kept
        for sampler in (samplers if left is kept[-1] else samplers[:1])
    ]
    return sorted(
        [*rows, *run(work, looks)], key=lambda row: (row["recipe"], row["steps"], row["seed"])
    )


def write_digits(folder):
    """The digits that our recipe learns from, those not held out, as files."""
    given = defaults.freeze(defaults.base())
    images = build.dataset(given)
    folder.mkdir(parents=True)
    for index in build.split(given, images)[0]:
        Image.fromarray(images[int(index)][0].numpy()).save(folder / f"{index:04d}.png")


def how(size):
    """What the report says of how it was made."""
    extractor, reference = measure()
    perfect, deviation = distances.fid_of_reference_resample(reference, size.samples)
    given = defaults.freeze(defaults.base())
    return {
        "commit": commit(),
        "machine": this_machine(),
        "perfect": [round(perfect, 4), round(deviation, 4)],
        "extractor": extractor.name,
        "learned": len(build.split(given, build.dataset(given))[0]),
        "digits": len(reference.features),
        "dim": size.dim,
        "dim_mults": list(size.dim_mults),
        "whole": size.whole,
        "parameters": sum(weight.numel() for weight in network(size).parameters()),
        "versions": {name: version(name) for name in ("torch", PEER, "diffusers")},
    }


# the report


def series(rows):
    """Our runs by their steps, and the peer's best row at each of its points."""
    found = {OURS: {}, PEER: {}}
    for one in sorted(rows, key=lambda one: one["steps"]):
        found[one["recipe"]].setdefault(one["steps"], []).append(one)
    return found[OURS], {
        steps: min(looks, key=lambda one: one["fd_digits"]) for steps, looks in found[PEER].items()
    }


def averaged(runs, key):
    return mean(one[key] for one in runs)


def answer(rows, made):
    mine, theirs = series(rows)
    last = theirs[max(theirs)]
    goal = last["cpu_seconds"] / GOAL
    whole = made["whole"]
    text = (
        f"After {last['cpu_seconds']:.0f} CPU seconds {PEER} is at FD (digits) "
        f"{last['fd_digits']:.2f} ({last['sampler']}, {last['evaluations']} evaluations). "
    )
    passed = [
        steps
        for steps, runs in mine.items()
        if all(one["fd_digits"] <= last["fd_digits"] for one in runs)
    ]
    if passed:
        steps = passed[0]
        runs = mine[passed[0]]
        spent = averaged(runs, "cpu_seconds")
        seeds = f"each of {len(runs)} seeds" if len(runs) > 1 else "its one seed"
        text += (
            f"Our default is nearer in {seeds} after {spent:.0f} CPU seconds, {steps} steps "
            f"({averaged(runs, 'fd_digits'):.2f}): 1 / {last['cpu_seconds'] / spent:.1f} of the "
            f"time, where the goal is 1 / {GOAL} ({goal:.0f} s). "
        )
    else:
        text += "Our default was at no length nearer in every seed. "
    full = mine[whole]
    return text + (
        f"The recipe as shipped, {whole} steps, ends after {averaged(full, 'cpu_seconds'):.0f} "
        f"CPU seconds at {averaged(full, 'fd_digits'):.2f}; a perfect generator would get "
        f"{amount(*made['perfect'])} (± standard deviation of one evaluation)."
    )


@figures.style()
def curves(rows, made):
    """The distance against CPU seconds."""
    from matplotlib.ticker import LogLocator

    mine, theirs = series(rows)
    figure, ((axis,),) = figures.canvas(width=4.5, height=3)
    axis.plot(
        [one["cpu_seconds"] for one in theirs.values()],
        [one["fd_digits"] for one in theirs.values()],
        marker=figures.MARKERS[1],
        label="denoising-diffusion-pytorch, one run",
        **figures.line_style(1),
    )
    axis.plot(
        *([averaged(runs, key) for runs in mine.values()] for key in ("cpu_seconds", "fd_digits")),
        label=f"{OURS}, mean of runs of each length",
        **figures.line_style(0),
    )
    every = [one for runs in mine.values() for one in runs]
    axis.plot(
        [one["cpu_seconds"] for one in every],
        [one["fd_digits"] for one in every],
        figures.MARKERS[0],
        label=f"{OURS}, each run",
        color=figures.COLOURS[0],
        fillstyle="none",
        linestyle="none",
    )
    axis.axhline(
        made["perfect"][0], color="grey", linewidth=0.8, linestyle=":", label="perfect generator"
    )
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="CPU seconds of training, one thread",
        ylabel="FD (digits)",
    )
    axis.minorticks_off()
    for each in (axis.xaxis, axis.yaxis):
        each.set_major_locator(LogLocator(subs=(1, 2, 5)))
        each.set_major_formatter("{x:g}")
    axis.legend()
    return figure


def table(rows):
    lines = [
        [
            "recipe",
            "seed",
            "steps",
            "images",
            "CPU seconds",
            "drawn by",
            "evaluations",
            "FD (digits)",
        ]
    ]
    for one in rows:
        lines.append(
            [
                one["recipe"],
                str(one["seed"]),
                f"{one['steps']:,}",
                f"{one['images']:,}",
                f"{one['cpu_seconds']:.0f}",
                one["sampler"],
                str(one["evaluations"]),
                amount(one["fd_digits"]),
            ]
        )
    return markdown(lines)


def report(folder):
    """Write README.md and the figures from results.csv and made.json."""
    made = json.loads((folder / "made.json").read_text())
    kinds = {"recipe": str, "sampler": str, "cpu_seconds": float, "fd_digits": float}
    with (folder / "results.csv").open() as lines:
        rows = [
            {key: kinds.get(key, int)(value) for key, value in line.items()}
            for line in csv.DictReader(lines)
        ]
    for kind in ("pdf", "png"):
        figures.save(curves(rows, made), folder / f"curves.{kind}")
    lengths, _ = series(rows)
    ancestral = any(one["sampler"] == "ancestral" for one in rows)
    (folder / "README.md").write_text(
        TEXT.format(
            answer=fill(f"**Answer.** {answer(rows, made)}", 128),
            table=table(rows),
            samples=rows[0]["samples"],
            lengths=", ".join(str(steps) for steps in lengths),
            unmeasured="" if ancestral else NO_ANCESTRAL,
            **{"beside": ""}
            | made
            | {
                "versions": ", ".join(
                    f"{name} {number}" for name, number in made["versions"].items()
                ),
                "parameters": f"{made['parameters']:,}",
            },
        )
    )


NO_ANCESTRAL = """ The peer's own sampler
takes all 1,000 steps, an hour for a point of this table (`--ancestral`), so it is not here."""

TEXT = """# Time to quality: the digits against denoising-diffusion-pytorch

**Question.** How many CPU seconds does our default recipe need for the distance that denoising-diffusion-pytorch's default has
after eight CPU minutes?

{answer}

![FD against CPU seconds](curves.png)

{table}

**Protocol.** Both learn from the same {learned:,} digits at 16x16 and are measured alike: {samples} images of the averaged
weights against all {digits:,} digits, FD (digits) by `{extractor}`. CPU seconds are those of the training process, on one
thread; loading libraries, measuring, and the processes that read the peer's images do not count. Two processes ran at a
time{beside}.

- **ddpm**: `configs/digits.py`. Its learning rate falls over the length of the run, so a point at another time is another run,
  whole and with the rate falling over its own length ({lengths} steps); nothing else is changed, but that nothing is drawn or
  validated on the way. Drawn by the config's own sampler.
- **denoising-diffusion-pytorch**: `Trainer` and `GaussianDiffusion` with all their defaults (batch 16, Adam at 1e-4, EMA 0.995
  every 10 steps, 1,000 levels, v, sigmoid schedule), but for `augment_horizontal_flip=False`: mirrored digits could only harm
  it. One run, looked at on its way, as its rate is constant. `Unet(dim={dim}, dim_mults={dim_mults})`, {parameters} parameters:
  the nearest to our 1,191,233 at a width that vectors of 16 divide. Drawn by its DDIM; at the last point in several ways, of
  which the best counts.

**What this does not show.** More than one run of the peer; a peer tuned for eight minutes; anything but digits.{unmeasured}

By `python experiments/time_to_quality/run.py` at commit {commit}, {versions}, {machine}.
"""


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    either = parser.add_mutually_exclusive_group()
    either.add_argument(
        "--toy",
        action="store_true",
        help="seconds instead of minutes, and figures that say nothing",
    )
    either.add_argument(
        "--report", action="store_true", help="write the report of results.csv anew"
    )
    parser.add_argument(
        "--ancestral",
        action="store_true",
        help="draw the peer's last point by its own sampler too: an hour",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder for the results and the report, else this one; of --toy a new one",
    )
    given = parser.parse_args(arguments)
    if not given.report and (missing := [name for name in NEEDED if not find_spec(name)]):
        parser.error(f"there is no {listed(missing)}; pip install -e '.[bench]'")
    out = given.out or (Path(tempfile.mkdtemp(prefix="ddpm-toy-")) if given.toy else HERE)
    if given.report and not (out / "results.csv").is_file():
        parser.error(f"there is no results.csv in {out}; measure first, without --report")
    if not given.report:
        out.mkdir(parents=True, exist_ok=True)
        size = TOY if given.toy else FULL
        made = how(size)
        print(
            ", ".join(f"{name} {number}" for name, number in made["versions"].items()),
            "on",
            made["machine"],
            flush=True,
        )
        with tempfile.TemporaryDirectory() as folder:
            rows = everything(
                size, Path(folder), in_this_process if given.toy else two_at_a_time, given.ancestral
            )
        with (out / "results.csv").open("w", newline="") as lines:
            writer = csv.DictWriter(lines, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        (out / "made.json").write_text(json.dumps(made, indent=1) + "\n")
    try:
        report(out)
    except (ValueError, LookupError, TypeError, FileNotFoundError) as error:
        parser.error(
            f"no report can be made of results.csv and made.json in {out}: "
            f"{type(error).__name__}: {error}"
        )
    print(f"the report is {out / 'README.md'}")


def in_this_process(work, jobs):
    return [work(job) for job in jobs]


def two_at_a_time(work, jobs):
    """What jobs return, in their order; each has a process of its own."""
    begun = time.monotonic()
    found = []
    with ProcessPoolExecutor(
        2, multiprocessing.get_context("spawn"), max_tasks_per_child=1
    ) as pool:
        for job, returned in zip(jobs, pool.map(work, jobs), strict=True):
            print(f"{time.monotonic() - begun:6.0f} s  {job[0]}: {returned}", flush=True)
            found.append(returned)
    return found


if __name__ == "__main__":
    main()
