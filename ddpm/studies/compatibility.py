"""Checks that numbers may stand in one table: the same protocol, and options that agree."""

import itertools
import re
from collections import Counter, defaultdict

from ddpm.studies import runs as studies_runs

# as evaluation.scorer and bits_per_dim write it; few parts are `.+`, which takes hours on a text
# that nearly matches
PROTOCOL_FORMS = [
    re.compile(
        r"(?P<extractor>[^;]+); (?P<samples>\d+) samples of the (?P<weights>[^;]+) weights in "
        r"(?P<arithmetic>\w+); (?P<sampler>[^;]+), (?P<steps>\d+) steps, (?P<spacing>[^;]+?) "
        r"spacing, seed (?P<seed>\d+)(, guidance (?P<guidance>.+?))?(, classes (?P<classes>.+?))?; "
        r"against (?P<images>\d+) images (?P<data>\w+)"
        r"(, by (?P<kept>\d+) of them except for the Frechet distance)?"
    ),
    re.compile(
        r"bits/dim of (?P<likelihood_images>[^,]+)(, given (?P<given>.+),)? under the "
        r"(?P<weights>[^,]+) weights, by (?P<evaluations>\d+) evaluations"
    ),
]
# part of a protocol -> options that, as an axis, let it differ; data and extractor never do
VARIED_BY = {
    "samples": {"evaluate.num_samples"},
    "weights": {"sample.ema"},
    "arithmetic": {"train.amp"},
    "sampler": {"evaluate.sampler"},
    "steps": {"evaluate.steps"},
    "spacing": {"evaluate.spacing", "sample.spacing"},
    "evaluations": {"evaluate.likelihood"},
    "classes": {"data.class_labels", "evaluate.classes"},
    "given": {"data.class_labels"},
    "guidance": {"sample.guidance", "sample.guidance_interval", "sample.guide_checkpoint"},
}


def check_same_options(runs, axes):
    """Raise ValueError where a run differs from others of its config file in more than the axes."""
    files = defaultdict(list)
    for run in runs:
        files[run.options.get(studies_runs.CONFIG_AXIS)].append(run)
    for alike in files.values():
        for option in studies_runs.varied(alike):
            if option not in axes:
                usual = Counter(run.options[option] for run in alike).most_common(1)[0][0]
                other = next(run for run in alike if run.options[option] != usual)
                values = f"{other.options[option]!r} there and {usual!r} elsewhere"
                fault = f"config.{option} is {values}"
                raise ValueError(f"{other.folder} is of another study: {fault}; move it away")


def parse_protocol(text):
    """The parts of an `eval/protocol`, {"extractor": "digits-e5b6c631", "samples": "1797", ...}."""
    for form in PROTOCOL_FORMS:
        if match := form.fullmatch(text):
            return {part: value for part, value in match.groupdict().items() if value is not None}
    return {"eval/protocol": text}


def check_same_protocol(runs, axes):
    """Raise ValueError where protocols of runs differ in more than the axes and the seed."""
    for key in studies_runs.PROTOCOLS:
        named = studies_runs.protocols_of(runs, key)
        check_same_parts([(name, parse_protocol(text)) for name, text in named], axes)


def check_same_parts(protocols, axes):
    """Raise ValueError where the parts in pairs (name, parts) differ in more than axes and seed."""
    for part in dict.fromkeys(itertools.chain.from_iterable(parts for _, parts in protocols)):
        names = defaultdict(list)
        for name, parts in protocols:
            names[parts.get(part, "something else")].append(name)
        options = VARIED_BY.get(part, set())
        if len(names) == 1 or part == "seed" or options & {*axes}:
            continue
        values = []
        for value, (first, *more) in names.items():
            others = f" and {len(more)} more" if more else ""
            values.append(f"{value[:200]} in {first}{others}")
        remedies = sorted(option for option in options if option.startswith("evaluate."))
        remedy = f"give all runs the same config.{remedies[0]}" if remedies else "leave runs out"
        raise ValueError(
            f"numbers made in different ways do not compare: {part} is {'; '.join(values)}; "
            f"{remedy}, or measure their checkpoints in {studies_runs.MEASURE_STUDY}"
        )
