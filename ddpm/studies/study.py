"""A study is one YAML file, a W&B sweep: what varies, how it is chosen, and the command that makes
a run of each choice.

Parameters are named as flags: an option, `config.diffusion.beta_schedule`; the config file itself,
`config`; and where the command starts ddpm.evaluate, `checkpoint`, and `ema` for
`config.sample.ema`. A point is `{parameter: value}` with a value for each.
"""

import inspect
import itertools
import math
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import yaml

from ddpm.common import rng
from ddpm.common.errors import one_line
from ddpm.common.registry import check_choice, suggest
from ddpm.config import check as config_check
from ddpm.config import defaults, files
from ddpm.config.flags import config_of
from ddpm.studies.runs import MEASURE_STUDY

OPTIONS = defaults.flatten(defaults.base())
KEYS = (
    "method",
    "metric",
    "parameters",
    "command",
    "program",
    "name",
    "description",
    "project",
    "entity",
    "run_cap",
    "early_terminate",
)
COMMAND = '["${env}", "${interpreter}", "-m", "ddpm.main", "--config=configs/digits.py", "${args}"]'
# W&B's other forms of ${args} are none that a command reads
MACROS = ("${env}", "${interpreter}", "${program}", "${args}")
# by the program: the parameter that is no option
PROGRAMS = {"ddpm.main": "config", "ddpm.evaluate": "checkpoint"}
# vary to show the noise; what else tells checkpoints apart,
REPEATS = ("config.seed", "config.sample.seed", "checkpoint")
# their runs know: `archive.checkpoint_axes`
# by program: parameters that decide how grids are drawn, and the one that decides how runs are
# measured
MEASURED_BY = {
    "ddpm.main": {
        f"config.sample.{leaf}": f"config.evaluate.{leaf}"
        for leaf in ("sampler", "steps", "spacing", "classes")
    }
    | {"config.sample.ema": "config.ema.decay"},
    "ddpm.evaluate": {
        f"config.sample.{leaf}": f"config.evaluate.{leaf}"
        for leaf in ("sampler", "steps", "classes")
    },
}
SHORT = {("ddpm.evaluate", "ema"): "config.sample.ema"}  # a flag that is an option
TRY_ALL_UP_TO = 200
# points of a grid: up to MANY each is tried before the first runs, beyond that each value
MAX_POINTS = 10_000


@dataclass(frozen=True)
class Study:
    """What a study's file says, checked."""

    path: Path
    method: str  # grid, random, bayes
    parameters: dict  # name -> (distribution, its arguments)
    command: tuple  # words with W&B's macros
    program: str  # ddpm.main or ddpm.evaluate
    metric: tuple | None  # (name, minimize or maximize)
    description: str
    run_cap: int | None
    early_terminate: bool  # W&B's server is to stop runs that look bad

    @property
    def name(self):
        return self.path.stem

    def folder(self, runs="runs"):
        """Where `ddpm.sweep` puts the runs."""
        return Path(runs, self.name)

    @property
    def varied(self):
        """The parameters that have more than one value, sorted."""
        return [
            name
            for name in sorted(self.parameters)
            if self.values(name) is None or len(self.values(name)) > 1
        ]

    @property
    def axes(self):
        """What is compared: the parameters that vary, as options (`diffusion.beta_schedule`), but
        for those that repeat a run.
        """
        return [name.removeprefix("config.") for name in self.varied if name not in REPEATS]

    def values(self, name):
        """All values that a parameter can have, None where they cannot be counted."""
        kind, arguments = self.parameters[name]
        if kind == "int_uniform":
            return range(arguments["min"], arguments["max"] + 1)
        return [arguments["value"]] if kind == "constant" else arguments.get("values")

    def grid(self):
        """Every point in W&B's order: by sorted names, the last varying fastest; raises
        ValueError where they have no end.
        """
        lists = {name: self.values(name) for name in sorted(self.parameters)}
        for name in lists:
            if lists[name] is None:
                raise ValueError(
                    f"{name} has no end of values; for a grid give values, or whole numbers as "
                    "min and max"
                )
        if math.prod(map(len, lists.values())) > MAX_POINTS:
            raise ValueError(
                f"the grid has more than {MAX_POINTS} points; give fewer values, or use method "
                "random"
            )
        return [
            dict(zip(lists, point, strict=True)) for point in itertools.product(*lists.values())
        ]

    def draw(self, random):
        """A point drawn with a numpy Generator."""
        return {
            name: DISTRIBUTIONS[kind](random, **arguments)
            for name, (kind, arguments) in sorted(self.parameters.items())
        }

    def words(self, point):
        """A point as flags, in the order and form in which W&B's agent writes them."""
        return [f"--{name}={value}" for name, value in sorted(point.items())]

    def command_of(self, point):
        """The command of a point, `${env}` and `${interpreter}` left to who runs it."""
        at = self.command.index("${args}")
        return [*self.command[:at], *self.words(point), *self.command[at + 1 :]]

    def config(self, point):
        """The config that a point trains, or base() with what it measures with; raises
        ValueError where it cannot run.
        """
        if self.program == "ddpm.main":
            words = self.command_of(point)
            return config_of(words[words.index(self.program) + 1 :])[0]
        options = {
            name.removeprefix("config."): tuple(value) if isinstance(value, list) else value
            for name, value in point.items()
            if name != "checkpoint"
        }
        return files.changed(defaults.freeze(defaults.base()), options)

    def label(self, name, value):
        """A value as a word that a folder's name can hold, and that no other value of the
        parameter has.
        """
        alike = [
            other
            for other in self.parameters[name][1].get("values", [])
            if folder_word(name, other) == folder_word(name, value)
        ]
        return folder_word(name, value) + (
            f"-{zlib.crc32(str(value).encode()):08x}" if len(alike) > 1 else ""
        )

    def run_name(self, point):
        """The name of a point's folder: what was chosen, `beta_schedule=cosine-seed=0`."""
        leaves = Counter(key.rpartition(".")[2] for key in OPTIONS)
        parts = []
        for name, value in sorted(point.items()):
            option = name.removeprefix("config.")
            leaf = name.rpartition(".")[2]
            key = "" if name in PROGRAMS.values() else f"{leaf if leaves[leaf] == 1 else option}="
            parts += (
                [] if self.parameters[name][0] == "constant" else [key + self.label(name, value)]
            )
        whole = "-".join(parts) or "run"
        return whole if len(whole) <= 120 else f"{whole[:110]}-{zlib.crc32(whole.encode()):08x}"

    def check(self):
        """Raise a ValueError for a value that a run would refuse, for two points that would share a
        folder, and for a parameter that varies and does not decide how the runs are measured.
        """
        for name in self.varied:
            if decides := MEASURED_BY[self.program].get(name):
                once = (
                    f", or train once and vary it in {MEASURE_STUDY}"
                    if self.program == "ddpm.main"
                    else ""
                )
                raise ValueError(
                    f"{name} varies, and runs of {self.program} are measured by {decides}; vary "
                    f"that{once}"
                )
        points = self.grid() if self.method == "grid" else []
        names = Counter(map(self.run_name, points))
        for name in names:
            if names[name] > 1:
                raise ValueError(f"two points are both named {name}; is a value given twice?")
        for point in points if 0 < len(points) <= TRY_ALL_UP_TO else self.probes():
            self.config(point)

    def probes(self):
        """A few points with every listed value and the ends of every range among them."""
        drawn = self.draw(rng.generator(0, "probes"))
        tried = {}
        for name, (_, arguments) in self.parameters.items():
            ends = [type(drawn[name])(arguments[end]) for end in ("min", "max") if end in arguments]
            tried[name] = arguments.get("values") or [*ends, drawn[name]]
        return [
            {name: some[k % len(some)] for name, some in tried.items()}
            for k in range(max(map(len, tried.values())))
        ]


class NoAliasLoader(yaml.SafeLoader):
    """YAML in which everything stands once: by aliases (`*name`) a few lines can unfold to more
    than the memory holds.
    """

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ValueError(
                f"line {self.peek_event().start_mark.line + 1} has an alias; write out what it "
                "stands for"
            )
        return super().compose_node(parent, index)


def read_study(path):
    """The study in a file; raises ValueError, one line, for whatever is wrong in it."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"there is no study {path}; give one of experiments/, such as "
            "experiments/schedules.yaml"
        )
    try:
        study = parse_study(path, NoAliasLoader(path.read_text()).get_single_data())
        study.check()
    except RecursionError:
        raise ValueError(
            f"{path} is nested too deeply for a study; give another, such as "
            "experiments/schedules.yaml"
        ) from None
    except yaml.MarkedYAMLError as error:
        raise ValueError(
            f"{path}, line {error.problem_mark.line + 1}: {error.problem}; this is no YAML: mend "
            "the line, or quote what stands there"
        ) from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{path} is no text: {one_line(error)}; save it as UTF-8, or give another"
        ) from None
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    return study


def parse_study(path, given):
    """The Study that a file's content says, its values not yet checked; raises ValueError for
    what says none.
    """
    for key in given if isinstance(given, dict) else ():
        check_choice("key", key, KEYS)
    for key, kind in {"method": str, "parameters": dict, "command": list}.items():
        if not (isinstance(given, dict) and given.get(key) and isinstance(given[key], kind)):
            raise ValueError(
                f"{key} is missing or of another form; a study has method: grid, parameters: "
                f"{{NAME: {{values: [...]}}}} and command: {COMMAND}"
            )
    command = [
        given.get("program", word) if word == "${program}" else word for word in given["command"]
    ]
    for word in command:
        if str(word).startswith("${"):
            check_choice("macro in command", word, MACROS)
        if str(word).startswith("--workdir"):
            raise ValueError(
                "command gives --workdir; leave it out, since each run has a folder of its own"
            )
    program = next((word for word in command if word in PROGRAMS), None)
    if program is None or command.count("${args}") != 1:
        raise ValueError(
            f"command starts ddpm.main or ddpm.evaluate with ${{args}} among its words, such as "
            f"{COMMAND}"
        )
    own = PROGRAMS[program]
    if (own in given["parameters"]) == any(
        word.startswith(f"--{own}=") for word in map(str, command)
    ):
        raise ValueError(f"{own} must be given once, as a parameter or in the command, --{own}=...")
    metric = given.get("metric", {} if given["method"] == "bayes" else None)
    if metric is not None:
        if not isinstance(metric, dict) or "name" not in metric or metric.keys() - {"name", "goal"}:
            raise ValueError(
                "metric is missing or of another form; write metric: {name: eval/fid, goal: "
                "minimize}"
            )
        metric = (
            str(metric["name"]),
            check_choice("goal", metric.get("goal", "minimize"), ("minimize", "maximize")),
        )
    cap = given.get("run_cap")
    if cap is not None and (type(cap) is not int or cap < 1):
        raise ValueError(f"run_cap is {cap!r}; it takes a whole number of runs, 1 or more")
    return Study(
        path,
        check_choice("method", given["method"], ("grid", "random", "bayes")),
        {
            SHORT.get((program, name), name): parse_distribution(
                program, SHORT.get((program, name), name), said
            )
            for name, said in given["parameters"].items()
        },
        tuple(map(str, command)),
        program,
        metric,
        str(given.get("description", "")).strip(),
        cap,
        "early_terminate" in given,
    )


def parse_distribution(program, name, said):
    """(Distribution, its arguments) of a parameter from what the file says of it; raises
    ValueError for what is none.
    """
    known = [PROGRAMS[program], *(f"config.{key}" for key in OPTIONS)]
    if isinstance(said, dict) and "parameters" in said:
        raise ValueError(
            f"{name} holds nested parameters, which reach a run as one word; write "
            "config.SECTION.OPTION in full"
        )
    if name not in known:
        raise ValueError(
            f"unknown parameter {name!r}{suggest(name, known)}; {program} takes "
            f"{PROGRAMS[program]} and config.SECTION.OPTION; base() in ddpm/config/defaults.py "
            "shows them all"
        )
    if not isinstance(said, dict):
        raise ValueError(
            f"{name} is {said!r}; write {{value: ...}}, {{values: [...]}} or {{min: ..., max: ...}}"
        )
    whole = all(type(said.get(end)) is int for end in ("min", "max"))
    inferred = (
        "constant"
        if "value" in said
        else "categorical"
        if "values" in said
        else "int_uniform"
        if whole
        else "uniform"
    )
    kind = check_choice(
        f"distribution of {name}", said.get("distribution", inferred), list(DISTRIBUTIONS)
    )
    arguments = {key: value for key, value in said.items() if key != "distribution"}
    try:
        inspect.signature(DISTRIBUTIONS[kind]).bind(None, **arguments)
    except TypeError as error:
        raise ValueError(
            f"{name} is {kind}: {error}; write {{value: ...}}, {{values: [...]}} or "
            "{min: ..., max: ...}"
        ) from None
    for key, value in arguments.items():
        if key in ("values", "probabilities") and not (isinstance(value, list) and value):
            raise ValueError(f"{key} of {name} is {value!r}; it takes a list such as [1, 2]")
        if key in ("min", "max", "mu", "sigma", "q") and type(value) not in (int, float):
            raise ValueError(
                f"{key} of {name} is {value!r}; it takes a number, and YAML's need a point: 1.0e-4"
            )
    try:
        drawn = DISTRIBUTIONS[kind](rng.generator(0, "probes"), **arguments)
        if not arguments.get("min", 0) < arguments.get("max", 1):  # nor is anything below NaN
            raise ValueError("min is not below max")
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{name} cannot be drawn from {kind} of {arguments}: {error}") from None
    for value in arguments.get("values", [drawn]):
        check_type(name, value)
    return kind, arguments


def check_type(name, value):
    """Raise a ValueError for a value of another type than the parameter takes, as YAML makes
    them unasked.
    """
    default = OPTIONS.get(name.removeprefix("config."), "")
    takes = {bool: bool, int: int, float: (int, float), str: str, tuple: (list, str)}[type(default)]
    if not isinstance(value, takes) or isinstance(value, bool) != isinstance(default, bool):
        hint = {
            bool: "; YAML reads unquoted on, off, yes, no as True and False: quote it",
            str: "; YAML's numbers need a point, as in 1.0e-4",
        }.get(type(value), "")
        raise ValueError(f"{name} is {value!r}; it takes {config_check.KINDS[type(default)]}{hint}")


def folder_word(name, value):
    """A value without what a folder's name cannot hold; of a config file or a checkpoint, its
    own name.
    """
    if name == "config":
        path, _, variant = value.partition(":")
        value = f"{Path(path).stem}-{variant}"
    return re.sub(
        r"[^\w.=+-]+", "_", Path(value).name if name == "checkpoint" else str(value), flags=re.ASCII
    ).strip("_-")


def quantize(value, q):
    """The multiple of `q` nearest to a value, a whole number if `q` is."""
    return round(value / q) * q if isinstance(q, int) else float(f"{round(value / q) * q:.12g}")


def log_uniform(random, low, high):
    return math.exp(random.uniform(math.log(low), math.log(high)))


DISTRIBUTIONS = {  # W&B's names and defaults
    "constant": lambda random, *, value: value,
    "categorical": lambda random, *, values, probabilities=None: values[
        random.choice(len(values), p=probabilities)
    ],
    "categorical_w_probabilities": lambda random, *, values, probabilities: values[
        random.choice(len(values), p=probabilities)
    ],
    "int_uniform": lambda random, *, min, max: int(random.integers(min, max, endpoint=True)),
    "uniform": lambda random, *, min, max: random.uniform(min, max),
    "q_uniform": lambda random, *, min, max, q=1: quantize(random.uniform(min, max), q),
    "log_uniform_values": lambda random, *, min, max: log_uniform(random, min, max),
    "q_log_uniform_values": lambda random, *, min, max, q=1: quantize(
        log_uniform(random, min, max), q
    ),
    "normal": lambda random, *, mu=0.0, sigma=1.0: random.normal(mu, sigma),
    "q_normal": lambda random, *, mu=0.0, sigma=1.0, q=1: quantize(random.normal(mu, sigma), q),
    "log_normal": lambda random, *, mu=0.0, sigma=1.0: math.exp(random.normal(mu, sigma)),
    "q_log_normal": lambda random, *, mu=0.0, sigma=1.0, q=1: quantize(
        math.exp(random.normal(mu, sigma)), q
    ),
}
