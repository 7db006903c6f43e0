"""A config as JSON: written, read (also files of earlier versions), compared with a run's, and
named.
"""

import inspect
import json
import os
import re
import shlex
import zlib
from operator import itemgetter
from pathlib import Path

from ddpm.common.files import atomic_write
from ddpm.common.registry import parse, spell, suggest
from ddpm.config import check, defaults

# What may change between two starts of one run: nothing here touches the numbers of a step.
FREE = (
    "train.length",
    "train.max_hours",
    "train.activation_checkpointing",
    "train.fully_shard",
    "every.",
    "wandb.",
    "evaluate.",
    "data.classes",
    "data.cache",
    "data.num_workers",
    "sample.batch_size",
    "sample.compile",
)


MEASURED = [key for key, option in defaults.OPTIONS.items() if option.kind == "measured"]
MICRO_BATCHES = "train.gradient_accumulation_steps"


FORMAT = 2  # of saved configs; those that do not say are of format 1


def to_json(config):
    """The config as JSON text that `from_json` reads back to an equal config."""
    return json.dumps({"format": FORMAT} | config.to_dict(), indent=2)


def from_json(text):
    """The frozen config that a run folder or a checkpoint carries; options it does not know yet
    take their defaults, or what they were before they were options.

    Names that meant something else in its format are translated. It is data and never run. Raises
    ValueError for what is not such a config.
    """
    from ddpm.common.safe_load import LONGEST

    try:
        saved = json.loads(text if len(text) <= LONGEST else "")
        version = saved.pop("format", 1)
        _ = saved.pop("code", None)
        options = {
            defaults.RENAMED_OPTIONS.get(key, key): value
            for key, value in defaults.flatten(saved).items()
        }
        _ = options.pop("", None)  # of those that are gone
    except (ValueError, AttributeError, TypeError, RecursionError):
        raise ValueError(
            "the saved config is not a JSON object; the file is damaged or not one of ours"
        ) from None
    if type(version) is not int or not 1 <= version <= FORMAT:
        raise ValueError(
            f"the saved config has the format {version!r}, and this version knows 1 to {FORMAT}; "
            "use the version of ddpm that wrote it"
        )
    for key, before, name, reused in defaults.RENAMED_VALUES:
        if (reused is None or version < reused) and isinstance(options.get(key), str):
            options[key] = re.sub(rf"^\s*{before}\b", name, options[key])
    config = defaults.base()
    known = defaults.flatten(config)
    arguments = {}
    for key, value in options.items():
        if key in defaults.RENAMED_OPTIONS.values() and key not in known:
            arguments[key] = value
            continue
        if key not in known:
            raise ValueError(
                f"the saved config has an option {key!r} that this version does not know"
                f"{suggest(key, list(known))}; use the version of ddpm that wrote it"
            )
        option = defaults.OPTIONS[key]
        kind = type(option.default)
        if (
            kind is tuple
            and isinstance(value, list)
            or kind is float
            and type(value) is int
            and abs(value) < 2**53
        ):
            value = kind(value)
        if type(value) not in option.types:
            raise ValueError(f"the saved config has {value!r} for {key}; it takes {option.takes}")
        config.update_from_flattened_dict({key: value})
    if "model.conventions" not in options:
        arguments = saved_conventions(config, arguments, version)
    named = {key: options[key] for key in map(option_of, arguments) if key in options}
    weights = arguments.get("evaluate.extractor(weights)")
    automatic = config.evaluate.extractor == "auto"
    if weights and automatic and parse(config.data.source)[0] != "digits":
        named["evaluate.extractor"] = "inception"
    config.update_from_flattened_dict(gather(named | arguments))
    return defaults.freeze(config)


def option_of(key):
    """The option of `option(argument)`."""
    return key.partition("(")[0]


def gather(options):
    """Options in which `{"model.conventions(norm_eps)": 1e-5}` are texts of their entries,
    `{"model.conventions": "ho(norm_eps=1e-05)"}`.

    An entry named among the options keeps its name, else the one with the fewest arguments is
    taken. Arguments that an entry has anyway, or does not take, are left out.
    """
    gathered = {key: value for key, value in options.items() if "(" not in key}
    for option in {option_of(key) for key in options if "(" in key}:
        arguments = {
            key.rstrip(")").partition("(")[2]: value
            for key, value in options.items()
            if key.startswith(f"{option}(")
        }
        table = check.table(defaults.OPTIONS[option].choices[-1])
        texts = []
        for name in [gathered[option]] if option in gathered else table:
            usual = usual_arguments(table[name]) if name in table else {}
            differing = {
                key: arguments[key] for key in usual if arguments.get(key, usual[key]) != usual[key]
            }
            texts.append((len(differing), spell(name, differing)))
        _, gathered[option] = min(texts, key=itemgetter(0))
    return gathered


def usual_arguments(entry):
    """The arguments of a table's entry that a text may set, with their defaults."""
    parameters = inspect.signature(entry).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def saved_conventions(config, arguments, version):
    """The arguments of model.conventions that a config saved as options of their own, in a format;
    what was no option yet is as it was before.

    Where the 32 groups of an old format are what 0 comes to, and where padding does nothing, they
    are as configs are written now, so that a run goes on by the same command.
    """
    groups = "model.conventions(norm_num_groups)"
    arguments = {key: meaning(config) for key, meaning in BEFORE.items()} | arguments
    if version < 2 and arguments[groups] == 32 and has_32_groups(config):
        arguments[groups] = 0
    if config.model.resblock_updown:
        arguments.pop("model.conventions(downsample_padding)", None)
    return arguments


def has_32_groups(config):
    """Whether norms have 32 groups anyway: in wide U-Nets, and in networks without group norms."""
    from ddpm.models.layers import norm_groups

    model = config.model
    wide = (
        bool(model.channel_mult)
        and norm_groups(min(model.channel_mult) * model.model_channels) == 32
    )
    return wide or parse(model.name)[0] != "unet"


BEFORE = {  # what a convention was before it was an option, where that is not its default
    "model.conventions(augmentation_place)": lambda config: (
        "after" if config.data.augment else "before"
    ),
    "model.conventions(norm_num_groups)": lambda config: 32,
    "model.conventions(noise_embedding)": lambda config: (
        "sines"
        if parse(config.model.name)[0] == "unet_edm2"
        and parse(config.diffusion.predict)[0] == "edm"
        else "auto"
    ),
}


def read(path):
    """The frozen config in a file such as a run folder's config.json; raises ValueError as
    `from_json` does.
    """
    from ddpm.common.safe_load import LONGEST

    with open(path) as file:
        return from_json(file.read(LONGEST + 1))


def changed(config, options):
    """A frozen copy with other values for some options, `{"sample.steps": 25}`; None leaves an
    option as it is.

    Raises ValueError where the result cannot be run.
    """
    copy = defaults.base()
    copy.update_from_flattened_dict(
        defaults.flatten(config)
        | {key: value for key, value in options.items() if value is not None}
    )
    check.check(copy)
    return defaults.freeze(copy)


def tracked(config):
    """The config as W&B shows it: flat, under the names that a sweep's parameters have, and with
    its format.
    """
    options = {"format": FORMAT} | defaults.flatten(config)
    return {
        f"config.{key}": list(value) if isinstance(value, tuple) else value
        for key, value in options.items()
    }


COMMIT = re.compile(r"[0-9a-f]{7,40}( with changes [0-9a-f]{8})?")  # as `tracker.commit` tells it


def write(config, folder, code=None):
    """Save the config as the run folder's config.json, with the commits of the code that ran it,
    where they are known.
    """
    saved = json.loads(to_json(config)) | ({"code": code} if code else {})
    with atomic_write(Path(folder, "config.json")) as part:
        part.write_text(json.dumps(saved, indent=2) + "\n")


def code_in(folder):
    """The commits that a run folder's config.json records, in the order in which they ran; ()
    where it records none.
    """
    try:
        recorded = json.loads(Path(folder, "config.json").read_text()).get("code", ())
        return tuple(one for one in recorded if COMMIT.fullmatch(one))
    except (OSError, ValueError, AttributeError, TypeError, RecursionError):
        return ()


def check_continues(config, folder):
    """Raise a ValueError that names the options in which a config contradicts the run that the
    folder holds already.
    """
    path = Path(folder, "config.json")
    if path.is_file():
        try:
            saved = read(path)
        except ValueError as error:
            raise ValueError(
                f"{path}: {error}; give another --workdir, or delete it to continue with this "
                "config"
            ) from None
        differing = contradictions(saved, config)
        if differing:
            keys = contradicted(saved, config)
            same = f"add {as_flags(saved, keys)}" if len(keys) <= 3 else "give the same config"
            raise ValueError(
                f"{folder} holds a run with another config ({'; '.join(differing)}); "
                f"give another --workdir or, to continue it, {same}"
            )


def check_resumes(config, saved, path):
    """Raise a ValueError that names the options in which a config contradicts the run that a new
    folder continues.
    """
    begun = changed(
        config,
        {key: defaults.flatten(saved)[key] for key in ("train.init_from", "train.resume_from")},
    )
    if differing := contradictions(saved, begun):
        raise ValueError(
            f"{path} is of a run with another config ({'; '.join(differing)}); to continue it, add "
            f"{as_flags(saved, contradicted(saved, begun))}; to change that, start from its "
            "weights alone with train.init_from"
        )


def check_measures(config, folder):
    """Raise a ValueError where a folder that is to keep a measurement holds another one, or a
    training.
    """
    path = Path(folder, "config.json")
    try:
        another = path.exists() and defaults.flatten(read(path)) != defaults.flatten(config)
    except ValueError:  # of a damaged one
        another = True
    if another or Path(folder, "checkpoints").exists():
        raise ValueError(f"{folder} holds another run; give another --workdir")


def is_free(key):
    """True for an option that may change between two starts of one run."""
    return any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)


def with_measured(config, saved):
    """A config in which what is measured where options are `auto` has the values of a saved one.

    These are the options, and fewer micro-batches.
    """
    old = defaults.flatten(saved)
    new = defaults.flatten(config)
    options = {key: old[key] for key in MEASURED if new[key] == "auto"}
    if options and new[MICRO_BATCHES] % old[MICRO_BATCHES] == 0:
        options[MICRO_BATCHES] = old[MICRO_BATCHES]
    return changed(config, options) if options else config


def contradicted(saved, given):
    """The options in which `given` differs from the config of the run it wants to continue, which
    knows where it began.
    """
    old = defaults.flatten(saved)
    new = defaults.flatten(with_measured(given, saved))
    return [
        key
        for key in new
        if not is_free(key)
        and key != defaults.PLACE
        and old[key] != new[key]
        and (key, new[key]) != ("train.resume_from", "")
    ]


def contradictions(saved, given):
    """Lines naming the options in which `given` differs from the config of the run it wants to
    continue.
    """
    old = defaults.flatten(saved)
    new = defaults.flatten(given)
    return [f"{key}: {old[key]!r} there, {new[key]!r} here" for key in contradicted(saved, given)]


def as_flags(config, keys):
    """The words of a command line that set some options to what a config has."""
    options = defaults.flatten(config)
    return shlex.join(f"--config.{key}={options[key]}" for key in keys)


def run_name(file, overrides):
    """A run's name from its config file (`configs/cats128.py:small`) and the options set on the
    command line.

    What a folder's name cannot hold becomes `_`, or is cut; a checksum then keeps two runs from
    sharing a name.
    """
    path, _, variant = str(file).partition(":")
    leaves = [key.rpartition(".")[2] for key in defaults.flatten(defaults.base())]
    given = [(key, value) for key, value in sorted(overrides.items()) if not is_free(key)]
    parts = [Path(path).stem + (f"-{variant}" if variant else "")]
    whole = True
    for key, value in given:
        leaf = key.rpartition(".")[2]
        word = re.sub(r"[^\w.+-]+", "_", str(value), flags=re.ASCII).strip("_")
        # numbers and tuples stay told apart
        whole = whole and (word == value or not isinstance(value, str))
        parts.append(f"{leaf if leaves.count(leaf) == 1 else key}={word}")
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(parts), flags=re.ASCII)
    if whole and name == "-".join(parts) and len(name) <= 120:
        return name
    return f"{name[:110]}-{zlib.crc32(repr((parts[0], given)).encode()):08x}"


def default_workdir(file, overrides):
    """`runs/NAME`; inside a W&B agent NAME ends with the agent's run id, so that a repeated
    sweep is a new run.
    """
    run_id = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    return Path("runs") / (run_name(file, overrides) + (f"-{run_id}" if run_id else ""))
