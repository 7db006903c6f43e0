"""The report of results.json: README.md and step.png, from its numbers alone."""

import json
from statistics import median
from textwrap import fill

from ddpm.studies import figures
from ddpm.studies.report import listed
from ddpm.studies.tables import markdown, plain

OURS = "ddpm"
EQUAL = "diffusers"
NEAREST = "denoising-diffusion-pytorch"
GIB = 2**30


def key(row):
    return row["task"], row["type"], row["way"]


def way(row):
    return ", ".join(filter(None, (row["type"], row["way"])))


def ratios(row, rows):
    """How many times as long as ours a row's image takes, in each round; the rounds alternate,
    so they are pairs.
    """
    ours = next(other for other in rows if other["contender"] == OURS and key(other) == key(row))
    pairs = zip(row["seconds"], ours["seconds"], strict=True)
    return [(theirs / row["batch"]) / (mine / ours["batch"]) for theirs, mine in pairs]


def spread(values, form="{:.2f}"):
    """The median, and least and most where there are several."""
    ends = f" ({form} to {form})".format(min(values), max(values)) if len(values) > 1 else ""
    return form.format(median(values)) + ends


def step_table(rows, made):
    table = [
        [
            "task",
            "by",
            "type",
            "batch",
            "parameters, M",
            "GFLOP an image",
            "ms a step",
            "images/s",
            "GFLOP/s",
            "time an image / ours",
            "peak, GiB",
            "start, s",
        ]
    ]
    peaks = made["peaks"]
    table[0][9:9] = ["MFU"] * bool(peaks)
    for row in rows:
        rate = row["batch"] / median(row["seconds"])
        mfu = [f"{rate * row['flops'] / peaks[row['type']]:.1%}"] if peaks else []
        table.append(
            [
                row["task"],
                row["contender"],
                way(row),
                str(row["batch"]),
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['flops'] / 1e9:.3g}",
                f"{1000 * median(row['seconds']):,.1f}",
                f"{rate:,.3g}",
                f"{rate * row['flops'] / 1e9:,.1f}",
                *mfu,
                spread(ratios(row, rows)),
                f"{row['peak_bytes'] / GIB:.2f}",
                f"{row['start_seconds']:.1f}",
            ]
        )
    return table


def terminal(rows):
    return plain(
        [
            [
                row["task"],
                row["contender"],
                way(row),
                f"{1000 * median(row['seconds']):,.1f} ms a step",
                f"{row['batch'] / median(row['seconds']):,.3g} images/s",
            ]
            for row in rows
        ]
    )


def stage_table(rows):
    names = list(rows[0]["seconds"])
    table = [["ms a step", *names, "sum"]]
    for row in rows:
        spent = [1000 * row["seconds"][name] for name in names]
        table.append([row["task"], *(f"{ms:,.1f}" for ms in spent), f"{sum(spent):,.1f}"])
    return table


def outside(row):
    """Milliseconds that a drawing spends outside the network, for each time it asks it, in each
    round.
    """
    return [
        1000 * (whole - inside) / row["evaluations"]
        for whole, inside in zip(row["seconds"], row["network_seconds"], strict=True)
    ]


def draw_table(rows):
    table = [
        ["by", "sampler", "evaluations", "ms in the network, each", "ms outside, each", "images/s"]
    ]
    for row in rows:
        inside = [1000 * spent / row["evaluations"] for spent in row["network_seconds"]]
        table.append(
            [
                row["contender"],
                row["sampler"],
                str(row["evaluations"]),
                f"{median(inside):.2f}",
                spread(outside(row), "{:.3f}"),
                f"{row['images'] / median(row['seconds']):.3g}",
            ]
        )
    return table


def answer(found, data):
    rows = found["steps"]
    words = []
    for name, network in ((EQUAL, "the same network"), (NEAREST, "its network that comes nearest")):
        theirs = [median(ratios(row, rows)) for row in rows if row["contender"] == name]
        each = [
            f"{median(ratios(row, rows)):.2f} ({row['task']})"
            for row in rows
            if row["contender"] == name and (len(theirs) < 4 or row["task"] == rows[-1]["task"])
        ]
        beyond = (
            "" if len(each) == len(theirs) else f", in all {min(theirs):.2f} to {max(theirs):.2f}"
        )
        words.append(
            f"with {network}, {name} takes {listed(each)} times as long as ours for an "
            f"image{beyond}"
        )
    most = max(median(outside(row)) for row in found["draws"] if row["contender"] == OURS)
    words.append(
        f"outside the network, a step of our drawing takes at most {most:.2f} ms (goal: under 1)"
    )
    if data:
        raw, numbers = (
            [row[key]["median"] for row in data]
            for key in ("times as many", "times as many, as numbers")
        )
        words.append(
            f"our cache of decoded images gives {min(raw):,.0f} to {max(raw):,.0f} times as many "
            f"images a second as torchvision's ImageFolder at its best, {min(numbers):,.0f} to "
            f"{max(numbers):,.0f} times where both make numbers of them (goal: 25)"
        )
    return ". ".join(word[0].upper() + word[1:] for word in words) + "."


@figures.style()
def picture(found):
    """Left the time of an image against ours, right where the time of our step goes."""
    figure, ((left, right),) = figures.canvas(1, 2, height=2.2)
    plain_rows = [
        row for row in found["steps"] if not row["way"] and row["type"] == found["steps"][0]["type"]
    ]
    names = list(dict.fromkeys(row["contender"] for row in plain_rows))
    tasks = list(dict.fromkeys(row["task"] for row in plain_rows))
    for number, name in enumerate(names):
        heights = [
            median(ratios(row, found["steps"])) for row in plain_rows if row["contender"] == name
        ]
        left.bar(
            [place + 0.27 * (number - 1) for place in range(len(tasks))],
            heights,
            0.25,
            label=name,
            color=figures.COLOURS[number],
        )
    left.set_xticks(range(len(tasks)), [task.replace(" ", "\n") for task in tasks])
    left.set_ylabel("time of an image / ours")
    figure.legend(loc="outside upper left", ncols=len(names))
    base = [0.0] * len(found["stages"])
    for number, stage in enumerate(found["stages"][0]["seconds"]):
        share = [
            100 * row["seconds"][stage] / sum(row["seconds"].values()) for row in found["stages"]
        ]
        right.bar(
            [row["task"].replace(" ", "\n") for row in found["stages"]],
            share,
            0.5,
            base,
            label=stage,
            color=figures.COLOURS[number],
        )
        base = [low + more for low, more in zip(base, share, strict=True)]
    right.set_ylabel("share of our step, %")
    right.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def data_of(folder):
    """What data.py found, or nothing if it was not run: {"commit": str, "machine": versions and
    cores, "rows": list}.
    """
    path = folder / "data.json"
    return json.loads(path.read_text()) if path.is_file() else {"rows": []}


def times(found):
    """A ratio that data.py found, with its least and most."""
    return f"{found['median']:.1f} ({found['least']:.1f} to {found['most']:.1f})"


def data_part(found):
    if not found["rows"]:
        return ""
    table = [
        [
            "photos",
            "as, px",
            "ours, images/s",
            "the best ImageFolder, images/s",
            "ours / its",
            "ours as numbers / its",
            "decoding once, s",
        ]
    ]
    for row in found["rows"]:
        rates = row["images a second"]
        best = row["best of theirs"]
        table.append(
            [
                f"{row['count']} of {row['photos']}",
                str(row["size"]),
                f"{rates['map']:,.0f}",
                f"{rates[best]:,.0f} ({best.partition(', ')[2]})",
                times(row["times as many"]),
                times(row["times as many, as numbers"]),
                f"{row['seconds']['decode']:.1f}",
            ]
        )
    machine = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    at = f"at commit {found['commit']}" if "commit" in found else "at a commit that was not kept"
    return TEXT_DATA.format(table=markdown(table), machine=machine, at=at)


def host_part(folder):
    """The section on host.json, or nothing where host.py was not run."""
    path = folder / "host.json"
    if not path.is_file():
        return ""
    found = json.loads(path.read_text())
    rows = {(row["structure"], row["tree"]): row for row in found["rows"]}
    table = [["ms a step", "modules", "tensors", "at", "host", "forward", "backward", "the rest"]]
    for (structure, tree), row in rows.items():
        stages = ("step", "forward", "backward", "the rest")
        each = [f"{row['ms'][stage]:.2f}" for stage in stages]
        counts = str(row["modules"]), str(row["tensors"])
        table.append([structure, *counts, found["commits"][tree], *each])
    shares = [
        f"{rows[structure, 'now']['ms']['step'] / row['ms']['step']:.2f} ({structure})"
        for (structure, tree), row in rows.items()
        if tree == "before"
    ]
    change = ""
    if shares:
        change = f"\n\nThe later commit takes {listed(shares)} of the time of the earlier."
    return TEXT_HOST.format(table=markdown(table), change=change, **found)


def write(found, folder):
    """Write the report of results into a folder."""
    figures.save(picture(found), folder / "step.png")
    made = found["made"]
    first = found["draws"][0]
    data = data_of(folder)
    (folder / "README.md").write_text(
        TEXT.format(
            answer=fill(f"**Answer.** {answer(found, data['rows'])}", 128),
            steps=markdown(step_table(found["steps"], made)),
            stages=markdown(stage_table(found["stages"])),
            host=host_part(folder),
            draws=markdown(draw_table(found["draws"])),
            data=data_part(data),
            rounds=len(found["steps"][0]["seconds"]),
            images=first["images"],
            evaluations=first["steps"],
            smallest=first["task"],
            waits=GPU_WAITS if made["gpu"] else "",
            missing="" if made["gpu"] else NO_GPU,
            **made
            | {
                "versions": ", ".join(
                    f"{name} {number}" for name, number in made["versions"].items()
                )
            },
        )
    )


NO_GPU = """ No GPU was at hand: the same command measures bf16 and fp16, compiled steps and the share of a GPU's peak
on one."""

GPU_WAITS = """ The host waits for the GPU around each stage and each call of
the network, so what would overlap is counted twice."""

TEXT = """# Throughput: a training step and a drawing, beside two others

**Question.** How fast are a training step and a drawing of ours beside diffusers and denoising-diffusion-pytorch, each in its
own loop?

{answer}

![Time of an image against ours, and the stages of our step](step.png)

## The training step

{steps}

Milliseconds are the median of {rounds} rounds; behind the median of the ratio stand the least and the most of the rounds.
GFLOP/s are images a second times the operations of an image, forward and backward: what can be compared where networks differ.

Stages of our step, in the mean; *the rest* is flips, times and noise drawn by address, pixels to numbers, and meters.{waits}

{stages}
{host}
## Drawing

{images} images of the task {smallest} in {evaluations} steps, with the networks as above; the first drawing of each warmed up.
*Outside* is the whole drawing less the calls of the network, timed within it.

{draws}
{data}
## Protocol

All contenders of a task are in one process and take turns (A B C A B C ...), in {clock}, on the same pixels from memory; a
drawing begins at noise and ends in pixels on the host.

- **ddpm**: the step that `assemble.run` makes of the shipped config, with its flips, dropout, clipping, EMA and meters.
- **diffusers**: `UNet2DModel` with our weights, through `ddpm.convert` (the same parameters and operations, which is checked),
  in the loop of its `train_unconditional.py --use_ema` with that script's settings: `DDPMScheduler.add_noise`, AdamW, clipping
  at 1, a cosine rate, `EMAModel`, the loss read at every step. Of accelerate only autocast and loss scaling.
- **denoising-diffusion-pytorch**: `Trainer.train` itself, with its defaults (`GaussianDiffusion`, Adam, EMA every 10 steps,
  accelerate), but for the batch size, and with images in memory in place of its loader. Its `Unet` has other blocks (linear
  attention at every level, RMS norm), so `dim` and `dim_mults` were chosen for the nearest parameters and operations, at a
  width that vectors of 16 divide.
- Peak and start: memory and seconds for building the training (compiling it, where that is done) and two steps. On a CPU the
  memory is the sum of torch's allocations, as its profiler has them.

**What this does not show.** Steps with a loader beside them: images lie in memory here. Several GPUs.{missing}

By `python experiments/throughput/run.py` at commit {commit}, {versions}, {machine}, CPU threads: {threads}.
"""

TEXT_HOST = """
## Host time of a step

The time until the call of a step returns, on next to no arithmetic: the network of a config with 8 channels, one image of
8 x 8 pixels, float32, eager. A GPU's host pays this at every step, and the GPU waits for it where it computes less.

{table}{change}

CPU milliseconds of one thread, the least of {steps} steps in processes that took turns; each stage's least, so they need not add up.

By `python experiments/throughput/host.py`, torch {torch}, {cores} CPU cores.
"""

TEXT_DATA = """
## Data

Photos of JPEG, read in batches of 64 in random order: from our cache, uint8, and as float32 *numbers* as ImageFolder gives
them, which resizes and crops; its best number of workers counts.

{table}

By `python experiments/throughput/data.py` {at}, {machine}; it says more of how.
"""
