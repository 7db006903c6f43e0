"""Which numbers may stand in one table: the protocol of each evaluation, and what must agree."""

import re
from collections import Counter, defaultdict

from ddpm.studies import runs as studies_runs

# as evaluation.scorer writes it, of distances and of bits/dim: few parts are `.+`,
PROTOCOL_FORMS = [
    re.compile(text)
    for text in (
        # or a text that is nearly one would take hours
        r"(?P<extractor>[^;]+); (?P<samples>\d+) samples of the (?P<weights>[^;]+) weights in "
        r"(?P<arithmetic>\w+); "
        r"(?P<sampler>[^;]+), (?P<steps>\d+) steps, (?P<spacing>[^;]+?) spacing, seed "
        r"(?P<seed>\d+)(, guidance (?P<guidance>.+?))?"
        r"(, classes (?P<classes>.+?))?; against (?P<images>\d+) images (?P<data>\w+)"
        r"(, by (?P<kept>\d+) of them except for the Frechet distance)?",
        r"bits/dim of (?P<likelihood_images>[^,]+)(, given (?P<given>.+),)? under the "
        r"(?P<weights>[^,]+) weights, "
        r"by (?P<evaluations>\d+) evaluations",
    )
]
# parts in which numbers may differ where an option is an axis; other data or another extractor
# never compare
VARIED_BY = {
    "samples": {"evaluate.num_samples"},
    "weights": {"sample.ema"},
    "arithmetic": {"train.amp"},
    "sampler": {"evaluate.sampler"},
    "steps": {"evaluate.steps"},
    "spacing": {"evaluate.spacing", "sample.spacing"},
    "evaluations": {"evaluate.likelihood_evaluations"},
    "classes": {"data.class_labels", "evaluate.classes"},
    "given": {"data.class_labels"},
    "guidance": {"sample.guidance", "sample.guidance_interval", "sample.guide"},
}


def check_same_options(runs, axes):
    """Raise a ValueError that names a run, and the option in which it differs from the others of
    its config file, if no axis.
    """
    files = defaultdict(list)
    for run in runs:
        files[run.options.get(studies_runs.CONFIG_AXIS)].append(run)
    for alike in files.values():
        for option in studies_runs.varied(alike):
            if option not in axes:
                usual = Counter(run.options[option] for run in alike).most_common(1)[0][0]
                other = next(run for run in alike if run.options[option] != usual)
                raise ValueError(
                    f"{other.folder} is of another study: config.{option} is "
                    f"{other.options[option]!r} there and {usual!r} elsewhere; move it away"
                )


def parse_protocol(text):
    """The parts of an `eval/protocol`, {"extractor": "digits-e5b6c631", "samples": "1797", ...}."""
    matches = filter(None, (form.fullmatch(text) for form in PROTOCOL_FORMS))
    parts = next((match.groupdict() for match in matches), {"eval/protocol": text})
    return {part: value for part, value in parts.items() if value is not None}


def check_same_protocol(runs, axes):
    """Raise a ValueError that names the part and the runs where distances, or bits/dim, were made
    in different ways.

    What the axes vary may differ, and the seed.
    """
    for key in studies_runs.PROTOCOLS:
        check_same_parts(
            [(run.name, parse_protocol(text)) for run in runs for text in run.protocols(key)], axes
        )


def check_same_parts(ways, axes):
    """Raise a ValueError where the parts of (name, parts) differ, but for what the axes vary and
    the seed.
    """
    for part in dict.fromkeys(part for _, way in ways for part in way):
        found = defaultdict(list)
        for name, way in ways:
            found[way.get(part, "something else")].append(name)
        if len(found) > 1 and part != "seed" and not VARIED_BY.get(part, set()) & {*axes}:
            who = "; ".join(
                f"{value[:200]} in {names[0]}"
                + (f" and {len(names) - 1} more" if names[1:] else "")
                for value, names in found.items()
            )
            option = next(
                (
                    option
                    for option in sorted(VARIED_BY.get(part, ()))
                    if option.startswith("evaluate.")
                ),
                None,
            )
            remedy = f"give all runs the same config.{option}" if option else "leave runs out"
            raise ValueError(
                f"numbers made in different ways do not compare: {part} is {who}; {remedy}, or "
                f"measure their checkpoints in {studies_runs.MEASURE_STUDY}"
            )
