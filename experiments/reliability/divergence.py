"""Trainings that go wrong: what cannot be learned from is skipped, what is broken left behind,
and the hopeless stops.
"""

import numpy as np
import torch
from faults import Found, forked, rows, small, training

from ddpm.common.errors import DIVERGED, DONE
from ddpm.models.unet import UNet
from ddpm.training import weights as training_weights

SIMPLE = dict(
    train__length="170 steps",
    every__log="10 steps",
    every__save="20 steps",
    every__milestone="0 steps",
    every__sample="0 steps",
    every__validate="0 steps",
    model__channel_mult=(1,),
    model__attention_resolutions=(),
)
HOT = SIMPLE | dict(
    train__amp="fp16",
    train__learning_rate=1.0,
    train__length="44 steps",
    every__log="4 steps",
    every__save="4 steps",
    model__channel_mult=(1, 2),
    model__attention_resolutions=(8,),
)


def wrong_from(at, output, weights):
    """At the `at`-th batch that a network learns from, what it says is `output` times as large,
    its last `weights` times.
    """
    calls = []
    modules = torch.nn.modules.module

    def before(module, _):
        if isinstance(module, UNet) and module.training:
            calls.append(module)
            if len(calls) == at:
                with torch.no_grad():
                    torch._foreach_mul_([*module.head.parameters()], weights)

    def after(module, _, out):
        return (
            out * output
            if isinstance(module, UNet) and module.training and len(calls) == at
            else None
        )

    modules.register_module_forward_pre_hook(before)
    modules.register_module_forward_hook(after)


def one_bad_batch(rng):
    return small(**SIMPLE | dict(train__length="130 steps"), seed=some_seed(rng)), (
        int(rng.integers(102, 125)),
        1000,
        1,
    )


def broken_weights(rng):
    return small(**SIMPLE, seed=some_seed(rng)), (int(rng.integers(102, 115)), 1, 1000)


def some_seed(rng):
    return int(rng.integers(2**31))


def overflow(rng):
    return small(**HOT, train__warmup="60 steps", train__rollback=1e-3, seed=some_seed(rng)), None


def hopeless(rng):
    return small(**HOT, train__warmup="0 steps", seed=some_seed(rng)), None


KINDS = {  # and how it ends: exit code, rollbacks
    "one batch 1,000 times off": (one_bad_batch, DONE, 0),
    "weights 1,000 times off from a batch on": (broken_weights, DONE, 1),
    "a rate at which fp16 overflows, a thousandth of it after the rollback": (overflow, DONE, 1),
    "the same, half of it": (hopeless, DIVERGED, 1),
}


def in_turn(folder, times, seed):
    """The kinds, one after the other, each time with another seed and moment."""
    rng = np.random.default_rng(seed)
    lost = []
    ended = {}
    for number in range(times):
        kind = list(KINDS)[number % len(KINDS)]
        make, expected, rollbacks = KINDS[kind]
        (given, fault), run = make(rng), folder / f"run {number}"
        code = forked(
            lambda fault=fault, given=given, run=run: (
                fault and wrong_from(*fault),
                training(given, run)(),
            )[1],
            folder / "log",
        )
        written = rows(run)
        log = (run / "training.log").read_text()
        finite = code == DIVERGED or all(
            one.isfinite().all() for one in training_weights.load_weights(run)[3].values()
        )
        ok = code == expected and finite and written[-1]["train/rollbacks"] == rollbacks
        ok = (
            ok
            and ("diagnosis: step" in log) == (code == DIVERGED)
            and " steps were skipped: " in log
        )
        ended.setdefault(
            f"{kind}: exit code {code}, {written[-1]['train/rollbacks']} rollbacks", []
        ).append(number)
        lost += [] if ok else [f"run {number} ({kind}): exit code {code}, last row {written[-1]}"]
    return Found(
        times, lost, "; ".join(f"{how} ({len(numbers)} times)" for how, numbers in ended.items())
    )
