"""What a run will need, before it starts: `python -m ddpm.plan --config=configs/cats128.py [--vram=8]`; no card is needed.

Memory is counted on the very training step, run on tensors without numbers; operations are counted on the network. Hours follow
from what the makers of cards publish and from --mfu, the share of it that is reached, which is a guess until it is measured:
a training tracks its own as `speed/mfu`.
"""

import contextlib
import math
from typing import NamedTuple

import torch
from absl import flags

from ddpm import assemble, build, clock, command, memory
from ddpm.cards import CARDS
from ddpm.config import changed
from ddpm.report import amount, plain

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GIB = memory.GIB
ASSUMED = 10_000  # images in the data, where these are not at hand and anything is counted in epochs


class Memory(NamedTuple):
    """How one arithmetic, with so many levels recomputed, takes memory: at the config's micro-batch, and at most on a card."""

    types: str
    checkpointing: str
    account: memory.Account
    most: int  # images at a time in the memory that was asked about; -1 where not even the weights fit


def memory_of(config, images, vram):
    """A `Memory` for each size of number, without and with activation checkpointing, on a card of `vram` bytes."""
    with torch.device("meta"):
        count = len(build.network(config).levels)
    for types, dtype in (("fp32", torch.float32), ("bf16, fp16", torch.bfloat16)):
        for name, levels in (("none", 0), ("all", count)):
            one, other = (assemble.account(config, dtype, n, levels) for n in (images, 2 * images))
            yield Memory(types, name, one, memory.most_images(one, images, other, 2 * images, vram))


def hours(images, flops, card, dtype, mfu, cards=1, batch_size=1, weights=0):
    """Hours for so many images on one card or several, and the images a second.

    Several exchange gradients of `weights` bytes after every step, around a ring (2 (n - 1) / n of them through each link), and
    nothing of that is taken to be hidden behind the computation.
    """
    step = batch_size / cards * flops / (mfu * card.peak(dtype)) + 2 * (cards - 1) / cards * weights / (card.link * 1e9)
    return images / batch_size * step / 3600, batch_size / step


def plan(config, vram, mfu, cards):
    """Yield the plan as lines. Raises ValueError, one line, for a config that cannot be run."""
    build.check(config)
    section, images = config.train, config.train.batch_size // config.train.gradient_accumulation_steps
    with torch.device("meta"):
        weights = sum(one.numel() for one in build.network(config).parameters())
    asked, shape = build.operations(config), "x".join(map(str, build.image_shape(config)[::-1]))
    flops = asked.training
    yield (f"{config.model.name}: {weights:,} parameters, images {shape}, {flops / 1e9:,.4g} GFLOP an image, forward and "
           "backward\n")

    yield (f"memory of a training step on one card, GiB, {images} images at a time (a batch of {section.batch_size} in "
           f"{section.gradient_accumulation_steps} parts); most images at a time on a card of {vram:g} GiB")
    sharded = None
    with contextlib.suppress(ValueError):  # of a network that cannot be
        sharded = changed(config, {"train.fully_shard": True, "train.compile": False, "train.channels_last": False})
    rows = [["type", "checkpointing", "weights", "EMA", "optimizer", "gradients", "activations", "workspace", "sum",
             "card has", "most images", f"of {cards} sharded"]]
    for found in memory_of(config, images, vram * GIB):
        each = sharded and f"{memory.with_margin(assemble.on_each(sharded, found.account, cards)) / GIB:.2f}"
        parts = (*found.account.parts, found.account.total, memory.with_margin(found.account.total))
        rows.append([found.types, found.checkpointing, *(f"{part / GIB:.2f}" for part in parts), str(max(found.most, 0)),
                     each or "cannot be"])
        if found.checkpointing == "none":
            fewest = next((parts for parts in range(1, section.gradient_accumulation_steps)
                           if section.batch_size % parts == 0 and section.batch_size // parts <= found.most), None)
    yield (plain(rows) + "\n'gradients' are those that live at the peak: none at the end of the forward pass of a batch in one "
           "part;\n'card has' is the sum, a tenth and half a GiB: kernels' own workspace and gaps are not counted;\n"
           f"the last column is what each of {cards} cards has by train.fully_shard, {images} images at a time on each\n")
    if fewest:
        yield f"faster in bf16 or fp16 on such a card, in fewer parts: --config.train.gradient_accumulation_steps={fewest}\n"

    total, size, among = length(config)
    evaluated = build.evaluated(config, size, asked)
    yield (f"time, if a card reaches {mfu:.0%} of what its maker publishes (--mfu): {section.length} are "
           f"{total * section.batch_size:,} images{among}")
    equal = cards * section.gradient_accumulation_steps
    together = math.ceil(section.batch_size / equal) * equal
    rows = [["card", "GiB", "type", "images/s", "hours", f"images/s, {cards} cards", "hours", "an evaluation, minutes"]]
    for name, card in CARDS.items():
        kind = chosen(section.amp, card)
        rates = [hours(total * section.batch_size, flops, card, DTYPES[kind], mfu, n, batch, 4 * weights)
                 for n, batch in ((1, section.batch_size), (cards, together))]
        minutes = evaluated.operations / (mfu * card.peak(DTYPES[kind])) / 60
        rows.append([name, str(card.gib), kind, *(words for spent, rate in rates for words in (amount(rate), brief(spent))),
                     brief(minutes)])
    yield plain(rows)
    if together != section.batch_size:
        yield (f"on {cards} cards a batch of {section.batch_size} cannot be cut into {cards} ranks x "
               f"{section.gradient_accumulation_steps} parts: those columns are for --config.train.batch_size={together}")
    yield (f"{evaluated.words}\nan evaluation of {evaluated.config.evaluate.num_samples:,} images costs as much as training on "
           f"{evaluated.operations / flops:,.0f}\n")

    if remarks := assemble.length_remarks(config, size):
        yield "\n".join(remarks) + "\n"

    file = 4 * weights / GIB
    state = file * (4 + len(config.ema.more) + len(config.ema.profiles))
    yield (f"disk, GiB: {state:.2f} a checkpoint, of which two are kept, beside best and final of {file:.2f} each: "
           f"{2 * state + 2 * file:.2f}, and {state:.2f} more while one is written; {math.prod(build.image_shape(config)):,} "
           "bytes for each decoded image of a folder (data.cache)" +
           (f", {size * math.prod(build.image_shape(config)) / GIB:.2f} in all" if size else ""))
    if config.ema.profiles:
        count, rhythm = len(config.ema.profiles), config.every.snapshot
        times, each = clock.Every(rhythm, section.batch_size, size).times(total), file / 2 * count
        yield (f"and a snapshot of {count} averages in half precision (every.snapshot={rhythm}) {each:.2f}" +
               ("" if times is None else f", {times} of them {times * each:.2f}"))


def brief(time):
    return amount(time) if time >= 0.01 else "< 0.01"


def chosen(amp, card):
    """The arithmetic of a run on a card, as `train.amp` says."""
    if amp == "auto":
        return "bf16" if card.bf16 else "fp16"
    return "fp32" if amp == "off" else amp


def length(config):
    """(steps, images, words): the length of the training; the data's images, where anything is counted in epochs, else 0.

    Where they are not at hand there are taken to be ASSUMED, which the words say.
    """
    section, size, words = config.train, 0, ""
    counted = section.length, section.warmup, section.learning_rate_decay, *config.every.values()
    if any("epoch" in text for text in counted):
        try:
            size = len(build.split(config, build.dataset(config))[0])
            words = f", of {size:,} in the data"
        except ValueError as error:
            size, words = ASSUMED, f", as if there were {ASSUMED:,} in the data ({error})"
    return clock.steps_of(section.length, section.batch_size, size), size, words


def main():
    """Print the plan of the config that the flags name; returns the exit code."""
    given, _, _ = command.given_config()
    if given.data.class_labels and not given.data.classes:
        given = changed(given, {"data.classes": build.class_names(given, build.dataset(given))})
    for lines in plan(given, flags.FLAGS.vram, flags.FLAGS.mfu, flags.FLAGS.cards):
        print(lines, flush=True)
    return command.DONE


if __name__ == "__main__":
    command.define_config_flag()
    flags.DEFINE_float("vram", 8.0, "Memory of the card that is asked about, in GiB.", lower_bound=0.1)
    flags.DEFINE_float("mfu", 0.4, "Share of a card's published peak that is reached.", lower_bound=0.001, upper_bound=1.0)
    flags.DEFINE_integer("cards", 8, "How many cards the last columns of the hours are for.", lower_bound=1)
    flags.adopt_module_key_flags(command)
    command.run_door(main)
