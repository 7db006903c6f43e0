"""The plan's images a second beside published trainings: `python experiments/plan/run.py`.

A minute on one CPU core, without a GPU. Writes results.json and README.md.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from ddpm import plan
from ddpm.config.files import changed
from ddpm.config.flags import config_of
from ddpm.experiment import memory
from ddpm.runtime.gpus import GPUS
from ddpm.studies.archive import commit, this_machine
from ddpm.studies.tables import markdown

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "configs"
DAY = 86400
EDM = "NVlabs/edm at 0a2ff34, README.md"
FFHQ = {
    "data.image_size": 64,
    "model.channel_mult": (1, 2, 2, 2),
    "model.dropout": 0.05,
    "train.batch_size": 256,
}


class Published(NamedTuple):
    """A training with a network of this project whose speed is known."""

    name: str
    config: str
    options: dict  # of the config
    gpu: str
    kind: str
    num_gpus: int
    images: int  # on each GPU at a time
    rate: float  # images a second on each GPU
    source: str


PUBLISHED = [
    Published(
        "EDM, ImageNet 64, ADM",
        "adm_imagenet64",
        {"train.batch_size": 4096},
        "A100",
        "fp16",
        32,
        128,
        2500e6 / (13 * DAY * 32),
        f"{EDM}: 2,500 million images in about 13 days on 32 A100",
    ),
    Published(
        "EDM, CIFAR-10, DDPM++",
        "edm_cifar10",
        {},
        "V100",
        "fp32",
        8,
        64,
        200e6 / (2 * DAY * 8),
        f"{EDM}: 200 million images in about 2 days on 8 V100",
    ),
    Published(
        "EDM, FFHQ 64, DDPM++",
        "edm_cifar10",
        FFHQ,
        "V100",
        "fp32",
        8,
        32,
        200e6 / (4 * DAY * 8),
        f"{EDM}: 200 million images in about 4 days on 8 V100",
    ),
    Published(
        "fast-DiT, DiT-XL/2, recomputed",
        "dit_xl_2",
        {"train.activation_checkpointing": "all", "train.batch_size": 128},
        "A100",
        "fp16",
        1,
        128,
        0.84 * 128,
        "chuanyangjin/fast-DiT at 0d14a15, README.md: 0.84 steps a second of 128 images on an A100",
    ),
]


def estimated(run):
    """The plan's images a second on each GPU, {at the least, at the most, compiled} of a run."""
    config = config_of([f"--config={CONFIGS / run.config}.py"])[0]
    config, _ = plan.with_classes(config, 1000)
    parts = run_parts(config, run)
    config = changed(config, run.options | {"train.gradient_accumulation_steps": parts})
    training = plan.training_of(config)
    levels = 99 if config.train.activation_checkpointing == "all" else 0
    dtype = torch.float32 if run.kind == "fp32" else torch.bfloat16
    accounts = [memory.estimate(config, dtype, n * run.images, levels) for n in (1, 2)]
    types = "fp32" if run.kind == "fp32" else "bf16, fp16"
    variant = plan.Memory(types, "all" if levels else "none", accounts, run.images, 0)
    found = {}
    for way, values in WAYS.items():
        one = training._replace(config=changed(config, values))
        slow, fast = plan.rates(one, [variant], GPUS[run.gpu], run.kind, run.num_gpus)
        found[way] = {"slow": slow / run.num_gpus, "fast": fast / run.num_gpus}
    peak = GPUS[run.gpu].peak(plan.DTYPES[run.kind])
    return {"published": run.rate, "mfu": run.rate * training.flops.training / peak, **found}


def run_parts(config, run):
    """The micro-batches in which each GPU computes its share of the batch."""
    batch_size = run.options.get("train.batch_size", config.train.batch_size)
    return batch_size // run.num_gpus // run.images


WAYS = {
    "eager": {"train.compile": False, "train.channels_last": False},
    "compiled": {"train.compile": True, "train.channels_last": True},
}


def row(run, result):
    """The row of a published training in the report."""
    slow, fast = (result["eager"][each] for each in ("slow", "fast"))
    return [
        run.name,
        f"{run.num_gpus} {run.gpu}, {run.kind}",
        f"{result['published']:.1f}",
        f"{result['mfu']:.2f}",
        f"{slow:.1f} to {fast:.1f}",
        f"{result['compiled']['fast']:.1f}",
        f"{fast / result['published']:.2f}",
    ]


HEADS = ["training", "GPUs", "published", "its MFU", "plan, eager", "plan, compiled", "ratio"]


def report(results):
    """The text of README.md."""
    rows = [row(run, results["trainings"][run.name]) for run in PUBLISHED]
    half, single = (
        [float(each[-1]) for each, run in zip(rows, PUBLISHED, strict=True) if run.kind == kind]
        for kind in ("fp16", "fp32")
    )
    sources = "\n".join(f"- {run.name}: {run.source}." for run in PUBLISHED)
    return f"""# The plan beside published trainings

**Question.** How far are the images a second that `python -m ddpm.plan` estimates from those of published trainings of the
same networks?

**Answer.** In half precision on an A100, published trainings took {min(half):.1f} to {max(half):.1f} times as long as estimated without compiler.
In float32 on a V100 they were {1 / max(single):.1f} times as fast as estimated. The assumption of 40 % of the peak, which the plan
made before, gave {results["before"]} the published images a second.

{markdown([HEADS, *rows])}

Images a second on each GPU; the plan's range is with the exchange of gradients after and during the backward pass, and the
ratio is that of its upper end to the published number. Published times are rounded to days and include evaluation and
saving. That EDM's ImageNet training had 128 images on a GPU at a time is assumed. DiT learns 32 x 32 pixels here, and latents
of that size there. By our count of operations the two trainings in float32 exceed the peak of a V100. A likely reason, not
verified, is that cuDNN computes 3 x 3 convolutions by Winograd's method, with down to 1 / 2.25 of the multiplications
(Lavin & Gray, arXiv 1509.09308). The plan does not count on it, as `train.amp=auto` takes fp16 there.

{sources}

Assumptions of the estimate: convolutions and matrix products reach {plan.REACHED:.0%} of the peak, other kernels
{plan.STREAMED:.0%} of the bandwidth, and the compiler leaves {plan.FUSED:.0%} of the bytes of those. Nothing was fitted to this table.

`python experiments/plan/run.py`, commit {results["commit"]}, {results["machine"]}, torch {results["torch"]}.
"""


def main():
    """Estimate all and write the report."""
    trainings = {run.name: estimated(run) for run in PUBLISHED}
    before = [f"{0.4 / each['mfu']:.1f}" for each in trainings.values()]
    results = {
        "trainings": trainings,
        "before": ", ".join(before[:-1]) + f" and {before[-1]} times",
        "commit": commit(),
        "machine": this_machine(),
        "torch": torch.__version__,
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "README.md").write_text(report(results))


if __name__ == "__main__":
    main()
