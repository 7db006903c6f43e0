"""A study is one YAML file, a W&B sweep: what varies, how it is chosen, and the command of a run.

Parameters are named as flags: an option, `config.diffusion.beta_schedule`; the config file itself,
`config`; and for studies of ddpm.evaluate `checkpoint`, and `ema` for `config.sample.ema`. A point
is `{parameter: value}` with a value for each.
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
from ddpm.config import defaults, files
from ddpm.config.flags import config_of
from ddpm.studies.runs import MEASURE_STUDY

OPTIONS = defaults.flatten(defaults.base())
KEYS = ["method", "metric", "parameters", "command", "program", "name", "description", "project"]
KEYS += ["entity", "run_cap", "early_terminate"]
COMMAND = '["${env}", "${interpreter}", "-m", "ddpm.main", "--config=configs/digits.py", "${args}"]'
MACROS = ("${env}", "${interpreter}", "${program}", "${args}")  # those that our commands read
PROGRAMS = {"ddpm.main": "config", "ddpm.evaluate": "checkpoint"}  # the parameter that is no option
# vary only to show the noise; `archive.checkpoint_axes` finds what else tells checkpoints apart
REPEATS = ("config.seed", "config.sample.seed", "checkpoint")
# by program: options that decide how grids are drawn -> those that decide how runs are measured
DRAWN = {
    f"config.sample.{leaf}": f"config.evaluate.{leaf}" for leaf in ("sampler", "steps", "classes")
}
MEASURED_BY = {
    "ddpm.main": DRAWN
    | {"config.sample.spacing": "config.evaluate.spacing", "config.sample.ema": "config.ema.decay"},
    "ddpm.evaluate": DRAWN,
}
SHORT = {("ddpm.evaluate", "ema"): "config.sample.ema"}  # a flag that is an option
MAX_DEPTH = 50  # lists and maps within each other in a study's file
TRY_ALL_UP_TO = 200  # points of a grid checked before the first run; of a larger one, each value
MAX_POINTS = 10_000  # of a grid


@dataclass(frozen=True)
class Study:
    """The checked content of a study's file."""

    path: Path
    method: str  # grid, random, bayes
    parameters: dict  # name -> (distribution, its arguments)
    command: tuple  # words with W&B's macros
    program: str  # ddpm.main or ddpm.evaluate
    metric: tuple | None  # (name, minimize or maximize)
    description: str
    run_cap: int | None
    early_terminate: bool  # asks W&B's server to stop runs that look bad

    @property
    def name(self):
        return self.path.stem

    def folder(self, runs="runs"):
        """Where `ddpm.sweep` puts the runs."""
        return Path(runs, self.name)

    @property
    def varied(self):
        """The parameters with more than one value, sorted."""
        values = {name: self.values(name) for name in sorted(self.parameters)}
        return [name for name in values if values[name] is None or len(values[name]) > 1]

    @property
    def axes(self):
        """The options that are compared: those of varied parameters that do not repeat a run."""
        return [name.removeprefix("config.") for name in self.varied if name not in REPEATS]

    def values(self, name):
        """All values of a parameter; None where they are not countable."""
        kind, arguments = self.parameters[name]
        if kind == "int_uniform":
            return range(arguments["min"], arguments["max"] + 1)
        return [arguments["value"]] if kind == "constant" else arguments.get("values")

    def grid(self):
        """Every point in W&B's order: sorted names, the last varies fastest; raises ValueError."""
        lists = {name: self.values(name) for name in sorted(self.parameters)}
        for name, values in lists.items():
            if values is None:
                remedy = "for a grid give values, or whole numbers as min and max"
                raise ValueError(f"{name} has no end of values; {remedy}")
        if math.prod(map(len, lists.values())) > MAX_POINTS:
            remedy = "give fewer values, or use method random"
            raise ValueError(f"the grid has more than {MAX_POINTS} points; {remedy}")
        points = itertools.product(*lists.values())
        return [dict(zip(lists, point, strict=True)) for point in points]

    def draw(self, random):
        """A point drawn with a numpy Generator."""
        return {
            name: DISTRIBUTIONS[kind](random, **arguments)
            for name, (kind, arguments) in sorted(self.parameters.items())
        }

    def words(self, point):
        """A point as flags, in the order and form of W&B's agent."""
        return [f"--{name}={value}" for name, value in sorted(point.items())]

    def command_of(self, point):
        """The command of a point; the caller replaces `${env}` and `${interpreter}`."""
        at = self.command.index("${args}")
        return [*self.command[:at], *self.words(point), *self.command[at + 1 :]]

    def config(self, point):
        """The config that a point trains with, or base() with what it measures with; ValueError."""
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
        """A value as a word for a folder's name that no other value of the parameter has."""
        word = folder_word(name, value)
        values = self.parameters[name][1].get("values", [])
        if sum(folder_word(name, other) == word for other in values) > 1:
            word += f"-{zlib.crc32(str(value).encode()):08x}"
        return word

    def run_name(self, point):
        """The folder's name of a point, of the chosen values: `beta_schedule=cosine-seed=0`."""
        leaves = Counter(key.rpartition(".")[2] for key in OPTIONS)
        parts = []
        for name, value in sorted(point.items()):
            if self.parameters[name][0] == "constant":
                continue
            leaf = name.rpartition(".")[2]
            key = f"{leaf if leaves[leaf] == 1 else name.removeprefix('config.')}="
            parts.append(("" if name in PROGRAMS.values() else key) + self.label(name, value))
        full = "-".join(parts) or "run"
        return full if len(full) <= 120 else f"{full[:110]}-{zlib.crc32(full.encode()):08x}"

    def check(self):
        """Raise ValueError for a value that a run would refuse, for two points with one folder, and
        for a varied parameter that does not affect the measurement.
        """
        training = self.program == "ddpm.main"
        for name in self.varied:
            if decides := MEASURED_BY[self.program].get(name):
                once = f", or train once and vary it in {MEASURE_STUDY}" if training else ""
                fault = f"runs of {self.program} are measured by {decides}; vary that{once}"
                raise ValueError(f"{name} varies, and {fault}")
        points = self.grid() if self.method == "grid" else []
        for name, count in Counter(map(self.run_name, points)).items():
            if count > 1:
                raise ValueError(f"two points are both named {name}; is a value given twice?")
        for point in points if 0 < len(points) <= TRY_ALL_UP_TO else self.probes():
            self.config(point)

    def probes(self):
        """A few points that contain every listed value and both ends of every range."""
        drawn = self.draw(rng.generator(0, "probes"))
        tried = {}
        for name, (_, arguments) in self.parameters.items():
            ends = [type(drawn[name])(arguments[end]) for end in ("min", "max") if end in arguments]
            tried[name] = arguments.get("values") or [*ends, drawn[name]]
        return [
            {name: values[k % len(values)] for name, values in tried.items()}
            for k in range(max(map(len, tried.values())))
        ]


def read_study(path):
    """The checked Study in a YAML file; raises ValueError, one line, for any mistake in it."""
    path = Path(path)
    example = "give another, such as experiments/schedules.yaml"
    if not path.is_file():
        raise ValueError(f"there is no study {path}; {example}")
    try:
        text = path.read_text()
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # by aliases, a few lines can expand to more than fits in memory
            if isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise ValueError(f"line {line} has an alias; write out what it stands for")
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise ValueError(f"nested too deeply for a study; {example}")
        study = parse_study(path, yaml.safe_load(text))
        study.check()
    except yaml.MarkedYAMLError as error:
        fault = f"line {error.problem_mark.line + 1} is not YAML: {error.problem}"
        raise ValueError(f"{path}, {fault}; correct the line, or use quotes") from None
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        remedy = f"save it as UTF-8, or {example}"
        raise ValueError(f"{path} is not text: {one_line(error)}; {remedy}") from None
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error)}") from None
    return study


def parse_study(path, content):
    """The Study in a file's content, its values unchecked; raises ValueError for a bad entry."""
    for key in content if isinstance(content, dict) else ():
        check_choice("key", key, KEYS)
    for key, kind in {"method": str, "parameters": dict, "command": list}.items():
        if not (isinstance(content, dict) and content.get(key) and isinstance(content[key], kind)):
            raise ValueError(
                f"{key} is missing or of another form; a study has method: grid, parameters: "
                f"{{NAME: {{values: [...]}}}} and command: {COMMAND}"
            )
    command, program = parse_command(content)
    cap = content.get("run_cap")
    if cap is not None and (type(cap) is not int or cap < 1):
        raise ValueError(f"run_cap is {cap!r}; it takes a whole number of runs, 1 or more")
    parameters = {}
    for short, entry in content["parameters"].items():
        name = SHORT.get((program, short), short)
        parameters[name] = parse_distribution(program, name, entry)
    return Study(
        path=path,
        method=check_choice("method", content["method"], ("grid", "random", "bayes")),
        parameters=parameters,
        command=command,
        program=program,
        metric=parse_metric(content),
        description=str(content.get("description", "")).strip(),
        run_cap=cap,
        early_terminate="early_terminate" in content,
    )


def parse_command(content):
    """(Words of the command, program); raises ValueError for a command that a sweep cannot run."""
    program = content.get("program")
    words = [program if word == "${program}" else word for word in content["command"]]
    words = tuple(map(str, words))
    for word in words:
        if word.startswith("${"):
            check_choice("macro in command", word, MACROS)
        if word.startswith("--workdir"):
            raise ValueError("command gives --workdir; leave it out, each run has its own folder")
    program = next((word for word in words if word in PROGRAMS), None)
    if program is None or words.count("${args}") != 1:
        form = f"with ${{args}} among its words, such as {COMMAND}"
        raise ValueError(f"command starts ddpm.main or ddpm.evaluate {form}")
    own = PROGRAMS[program]
    in_command = any(word.startswith(f"--{own}=") for word in words)
    if (own in content["parameters"]) == in_command:
        raise ValueError(f"{own} must be given once, as a parameter or in the command, --{own}=...")
    return words, program


def parse_metric(content):
    """(Name, goal) of the metric, None where the study has none; bayes needs one."""
    metric = content.get("metric", {} if content["method"] == "bayes" else None)
    if metric is None:
        return None
    if not isinstance(metric, dict) or "name" not in metric or metric.keys() - {"name", "goal"}:
        remedy = "write metric: {name: eval/fid, goal: minimize}"
        raise ValueError(f"metric is missing or of another form; {remedy}")
    goal = check_choice("goal", metric.get("goal", "minimize"), ("minimize", "maximize"))
    return str(metric["name"]), goal


def parse_distribution(program, name, entry):
    """(Distribution, its arguments) of a parameter's entry; raises ValueError for a mistake."""
    known = [PROGRAMS[program], *(f"config.{key}" for key in OPTIONS)]
    forms = "{value: ...}, {values: [...]} or {min: ..., max: ...}"
    if isinstance(entry, dict) and "parameters" in entry:
        fault = "holds nested parameters, which reach a run as one word"
        raise ValueError(f"{name} {fault}; write config.SECTION.OPTION in full")
    if name not in known:
        takes = f"{program} takes {PROGRAMS[program]} and config.SECTION.OPTION"
        note = defaults.moved(name) or suggest(name, known)
        hint = f"{takes}; base() in ddpm/config/defaults.py shows them all"
        raise ValueError(f"unknown parameter {name!r}{note}; {hint}")
    if not isinstance(entry, dict):
        raise ValueError(f"{name} is {entry!r}; write {forms}")
    kind = entry.get("distribution", usual_distribution(entry))
    kind = check_choice(f"distribution of {name}", kind, list(DISTRIBUTIONS))
    arguments = {key: value for key, value in entry.items() if key != "distribution"}
    try:
        inspect.signature(DISTRIBUTIONS[kind]).bind(None, **arguments)
    except TypeError as error:
        raise ValueError(f"{name} is {kind}: {error}; write {forms}") from None
    for key, value in arguments.items():
        if key in ("values", "probabilities") and not (isinstance(value, list) and value):
            raise ValueError(f"{key} of {name} is {value!r}; it takes a list such as [1, 2]")
        if key in ("min", "max", "mu", "sigma", "q") and type(value) not in (int, float):
            takes = "it takes a number; YAML's need a point: 1.0e-4"
            raise ValueError(f"{key} of {name} is {value!r}; {takes}")
    try:
        drawn = DISTRIBUTIONS[kind](rng.generator(0, "probes"), **arguments)
        if not arguments.get("min", 0) < arguments.get("max", 1):  # False for NaN too
            raise ValueError("min is not below max")
    except (ValueError, ArithmeticError) as error:
        raise ValueError(f"{name} cannot be drawn from {kind} of {arguments}: {error}") from None
    for value in arguments.get("values", [drawn]):
        check_type(name, value)
    return kind, arguments


def usual_distribution(entry):
    """The distribution of an entry that names none, as W&B infers it."""
    if "value" in entry:
        return "constant"
    if "values" in entry:
        return "categorical"
    integers = type(entry.get("min")) is type(entry.get("max")) is int
    return "int_uniform" if integers else "uniform"


def check_type(name, value):
    """Raise a ValueError for a value of another type than the parameter takes."""
    default = OPTIONS.get(name.removeprefix("config."), "")
    option = defaults.OPTIONS.get(name.removeprefix("config."))
    if option and option.kind == "measured" and isinstance(value, option.types):
        return
    takes = {bool: bool, int: int, float: (int, float), str: str, tuple: (list, str)}[type(default)]
    if not isinstance(value, takes) or isinstance(value, bool) != isinstance(default, bool):
        hint = {
            bool: "; YAML reads unquoted on, off, yes, no as True and False: quote it",
            str: "; YAML's numbers need a point, as in 1.0e-4",
        }.get(type(value), "")
        raise ValueError(f"{name} is {value!r}; it takes {defaults.TYPES[type(default)]}{hint}")


def folder_word(name, value):
    """A value in letters that a folder's name can hold; a config file or checkpoint by its name."""
    if name == "config":
        path, _, variant = value.partition(":")
        value = f"{Path(path).stem}-{variant}"
    if name == "checkpoint":
        value = Path(value).name
    return re.sub(r"[^\w.=+-]+", "_", str(value), flags=re.ASCII).strip("_-")


def quantize(value, q):
    """The multiple of `q` nearest to a value, an integer where `q` is one."""
    return round(value / q) * q if isinstance(q, int) else float(f"{round(value / q) * q:.12g}")


def categorical(random, *, values, probabilities=None):
    return values[random.choice(len(values), p=probabilities)]


def log_uniform(random, low, high):
    return math.exp(random.uniform(math.log(low), math.log(high)))


DISTRIBUTIONS = {  # W&B's names and defaults
    "constant": lambda random, *, value: value,
    "categorical": categorical,
    "categorical_w_probabilities": categorical,
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
