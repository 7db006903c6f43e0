"""Command lines of the commands: flags become configs, and a user's mistake becomes one line and an
exit code.
"""

import contextlib
import functools
import inspect
import math
import numbers
import os
import re
import select
import sys
import textwrap
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from ddpm.common import errors
from ddpm.common.files import expand_user
from ddpm.common.registry import spell, suggest
from ddpm.config import defaults
from ddpm.config.check import check, check_ranges, check_types
from ddpm.config.defaults import TYPES, base, flatten, freeze
from ddpm.config.files import to_json
from ddpm.runtime import signals

WIDTH = 100  # characters of a line of help
# flags
PATHS = ("checkpoint", "guide", "image", "inception_weights", "mask", "out", "runs", "workdir")


def define_config_flag():
    """The flag `--config=FILE[:VARIANT]`, with `--config.section.leaf=value` for each option of
    the file.
    """
    flags.DEFINE_boolean("print_config", False, "Print the config with all its options, and end.")
    return config_flags.DEFINE_config_file(
        "config", None, "Config file, such as configs/digits.py, or FILE.py:VARIANT."
    )


def define_overrides_flag():
    """Flags `--config.section.leaf=value` over the config that a checkpoint carries."""
    config_flags.DEFINE_config_dict(
        "config", base(), "Options in place of the checkpoint's, --config.evaluate.steps=10."
    )


def overrides():
    """What those flags say, `{"evaluate.steps": 10}`."""
    return config_flags.get_override_values(flags.FLAGS["config"])


# how a drawing is asked for, by flags and by arguments in Python: the option behind each, how it is
# defined, help
DRAWING = {
    "sampler": (
        "{section}.sampler",
        flags.DEFINE_string,
        "ddim, ddim(eta=1.0), ddpm(variance='large'), ...; by default the checkpoint's.",
    ),
    "steps": (
        "{section}.steps",
        flags.DEFINE_integer,
        "Steps of the sampler; by default the checkpoint's.",
    ),
    "spacing": (
        "{section}.spacing",
        flags.DEFINE_string,
        "Where its steps are: trailing, karras(rho=7.0), ...; by default the checkpoint's.",
    ),
    "ema": (
        "sample.ema",
        flags.DEFINE_float,
        "Averaged weights: a decay of config.ema, or a sigma_rel up to 0.288 made from snapshots.",
    ),
    "classes": (
        "{section}.classes",
        flags.DEFINE_list,
        "Classes to draw, names or numbers such as 3,5; empty for all.",
    ),
    "guidance": (
        "sample.guidance",
        flags.DEFINE_float,
        "Scale of the guidance, such as 2; 1 for none.",
    ),
    "guidance_interval": (
        "sample.guidance_interval",
        flags.DEFINE_list,
        "Noise levels sigma/alpha to guide between, such as 0.2,5; empty for all.",
    ),
    "guide": (
        "sample.guide_checkpoint",
        flags.DEFINE_string,
        "A weaker run or its file that guides, in place of the network without its label.",
    ),
    "seed": (
        "sample.seed",
        flags.DEFINE_integer,
        "Seed of the noise; by default the checkpoint's.",
    ),
    "batch_size": (
        "{section}.batch_size",
        flags.DEFINE_integer,
        "Images drawn at once; by default the checkpoint's.",
    ),
    "compile": (
        "sample.compile",
        flags.DEFINE_boolean,
        "Through torch.compile: for many images, as the first wait a minute or more.",
    ),
}
MEASURING = {  # the same for a measurement alone
    "num_samples": (
        "evaluate.num_samples",
        flags.DEFINE_integer,
        "Images drawn; by default the checkpoint's.",
    ),
    "extractor": (
        "evaluate.extractor",
        flags.DEFINE_string,
        "auto, digits, inception(weights='PATH') or none; by default the checkpoint's.",
    ),
    "likelihood": (
        "evaluate.likelihood",
        flags.DEFINE_string,
        "Bits/dim by bound, flow, both or none; by default the checkpoint's.",
    ),
    "source": (
        "data.source",
        flags.DEFINE_string,
        "The real images, where they lie elsewhere now: folder(path='data/cats'), ...",
    ),
}
SECTIONS = {"sample": DRAWING, "evaluate": DRAWING | MEASURING}
WEIGHTS = "inception_weights"  # a flag for an argument of evaluate.extractor
BEHIND = {}  # the flags of this command, by the options behind them


def names_of(section):
    """The options behind the names by which a command and its function know them: `{"steps":
    "sample.steps"}`.
    """
    return {
        name: option.format(section=section) for name, (option, _, _) in SECTIONS[section].items()
    }


def define_checkpoint_flags(section):
    """The flags of the commands that begin at a checkpoint; `section` of its config says how
    they draw.
    """
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Run folder, or a .pt or .safetensors file in one; by default the newest in runs/.",
    )
    flags.DEFINE_string("device", None, "cpu, cuda or cuda:1; by default the GPU if there is one.")
    for name, (_, define, words) in SECTIONS[section].items():
        define(name, None, words)
    if section == "evaluate":
        flags.DEFINE_string(
            WEIGHTS, None, "PATH, which is short for --extractor=\"inception(weights='PATH')\"."
        )
    BEHIND.update({option: name for name, option in names_of(section).items()})


def drawing():
    """The flags of DRAWING and MEASURING that the command line gives, by name."""
    names = [name for name in (*BEHIND.values(), WEIGHTS) if name in flags.FLAGS]
    values = {name: flags.FLAGS[name].value for name in names}
    return {name: value for name, value in values.items() if value is not None}


def options(given, section):
    """What a command or its function is given by name, `{"steps": 5}`, as options of the config,
    `{"sample.steps": 5}`.

    Names are those of SECTIONS or an option's own, `sample.steps` or `config.sample.steps`. None
    leaves an option as it is. Raises ValueError for another name, and for a value of another type.
    """
    names = names_of(section)
    known = flatten(base())
    found = {}
    if section == "evaluate" and given.get(WEIGHTS):
        given = given | {"extractor": spell("inception", {"weights": str(given[WEIGHTS])})}
    given = {name: value for name, value in given.items() if name != WEIGHTS}
    for name, value in given.items():
        option = names.get(name, name.removeprefix("config."))
        # the training's own seed is config.seed
        if option not in known or option == name and "." not in name:
            near = defaults.moved(name) or suggest(name, [*names, *known])
            raise ValueError(
                f"there is no option {name!r}{near}; there are {', '.join(names)}, and those of "
                "base() in ddpm/config/defaults.py by their full names, such as "
                f"**{{'diffusion.clip': False}}"
            )
        if value is not None:
            found[option] = as_option(name, option, value)
    return found


def as_option(name, option, value):
    """A value in the type that an option has, as the flag of that name would read it; raises
    ValueError where it cannot be.
    """
    kind = type(defaults.OPTIONS[option].default)
    if kind is tuple and type(value) is str:
        value = value.split(",") if value else ()
    if kind is tuple:
        value = tuple(value) if isinstance(value, (list, tuple, range)) else (value,)
    if option == "sample.guidance_interval":
        # of a word that is no number, which the config's check tells
        with contextlib.suppress(ValueError):
            value = tuple(map(float, value))
    if kind is float and type(value) is int:
        value = float(value)
    if kind is str and isinstance(value, Path):
        value = str(value)
    if type(value) not in defaults.OPTIONS[option].types:
        raise ValueError(f"{name} is {value!r}; it takes {defaults.OPTIONS[option].takes}")
    return value


def as_typed(message):
    """A message in which options that this command has a flag for are called by that, `--steps`,
    unless typed by full name.
    """
    full = " ".join(sys.argv)
    for option, flag in BEHIND.items():
        if f"config.{option}=" not in full:
            message = re.sub(
                rf"(?<![\w.-])(--)?(config\.)?{re.escape(option)}(?![\w.])", f"--{flag}", message
            )
    return message


def also_called(**names):
    """A decorator for a function whose arguments have earlier names too:
    `@also_called(output_dir="out")`.
    """

    def wrap(function):
        @functools.wraps(function)
        def called(*arguments, **given):
            return function(
                *arguments, **{names.get(name, name): value for name, value in given.items()}
            )

        return called

    return wrap


def check_count(num_images):
    """Raise a ValueError for a number of images that cannot be drawn."""
    if not isinstance(num_images, numbers.Integral) or num_images < 1:
        raise ValueError(f"num_images is {num_images!r}; it takes a whole number, 1 or more")


FLAG_TYPES = {
    "string": "text",
    "int": "whole number",
    "float": "number",
    "bool": "true or false",
    "multi string": "text",
    "comma separated list of strings": "words with commas between",
}


def help_text(module, everything=False):
    """What `--help` shows of the command in a module: what it is for and its options; with all
    options of the config too.
    """
    wrap = functools.partial(
        textwrap.wrap, width=WIDTH, break_on_hyphens=False, break_long_words=False
    )
    key = {flag.name: flag for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])}
    for paragraph in (module.__doc__ or "").strip().split("\n\n"):
        yield from (*wrap(paragraph), "")
    yield "options, each with the type that it takes and its default:"
    for name, flag in sorted(key.items()):
        if name == "config" and flag.default is not None:  # one that holds options alone
            continue
        kind = FLAG_TYPES.get(flag.flag_type(), "FILE or FILE:VARIANT")
        default = "" if flag.default in (None, [], "") else f", default {flag.default}".lower()
        # absl adds a sentence to what may be repeated
        about = " ".join(flag.help.partition(";\n")[0].split())
        yield from wrap(
            f"--{name}  ({kind}{default})  {about}", initial_indent="  ", subsequent_indent=" " * 6
        )
    sets = (
        "--config.section.leaf=value sets any option of the config"
        if "config" in key
        else "Trainings have a config"
    )
    shown = (
        ", and --print_config the config as it would be trained" if "print_config" in key else ""
    )
    yield from (
        "",
        *wrap(
            f"{sets}. base() in ddpm/config/defaults.py has all its options, with defaults, units "
            f"and choices: --helpfull shows it{shown}."
        ),
    )
    if everything:
        yield from ("", inspect.getsource(defaults).partition("\n\ndef base")[0])


def show_help(argv):
    """Print the help and end the process, where the command line asks for it."""
    if asked := [
        word
        for word in argv[1:]
        if re.fullmatch(r"--?(help|helpshort|helpfull|helpxml|h|\?)(=true)?", word)
    ]:
        print("\n".join(help_text(sys.modules["__main__"], everything="helpfull" in asked[0])))
        sys.exit(errors.DONE)


def read_flags(argv, values=flags.FLAGS, takes=None):
    """Read a command's command line into absl's flags, refuse what it does not say clearly, and
    return [program, *arguments].

    `takes` says what arguments without a flag are, for a command that has them. Raises ValueError
    for a mistake in the command line, or in the config file that it names.
    """
    check_options_exist(argv)
    logging.set_verbosity(logging.ERROR)  # ml_collections warns of what is refused below
    try:
        rest = values(argv)
    except Exception as error:  # whatever the config file raises is its author's to mend
        raise ValueError(explained(error)) from error
    for name in [name for name in PATHS if name in values and values[name].value]:
        given = values[name].value  # no shell reads the ~ in --out=~/samples
        values[name].value = (
            [str(expand_user(path)) for path in given]
            if isinstance(given, list)
            else str(expand_user(given))
        )
    for name in values:
        if (
            isinstance(value := values[name].value, float)
            and not math.isfinite(value)
            and not name.startswith("config.")
        ):
            raise ValueError(f"flag --{name}={value}: give a finite number")
    if len(rest) > 1 and not takes:
        raise ValueError(f"did not expect {rest[1]!r}; flags are written --name=value")
    flag = values["config"] if "config" in values else None  # noqa: SIM401 (absl has no get)
    named = flag is not None and not flag.using_default_value
    if takes and len(rest) == 1 and not named:
        raise ValueError(f"nothing given; write {takes}")
    # no config, or options over that of a checkpoint
    if flag is None or flag.default is not None or takes and not named:
        return rest
    if flag.using_default_value or not flag.config_filename:
        raise ValueError(
            "no config given; write --config=configs/digits.py, or another of configs/"
        )
    path = Path(flag.config_filename.partition(":")[0])
    if not path.is_file():
        raise ValueError(no_config_file(path))
    try:
        options = set(flatten(flag.value))
        known = set(flatten(base()))
    except AttributeError:
        raise ValueError(
            f"get_config of {path} returns no config; end it with `return config`"
        ) from None
    except OSError as error:  # kept back by ml_collections until the config is looked at
        raise ValueError(f"{path}: {errors.one_line(error.__cause__ or error)}") from error
    if options != known:
        fault = (
            f"lacks {min(known - options)}"
            if known - options
            else f"has an unknown option {min(options - known)}"
        )
        raise ValueError(f"{path} {fault}; begin get_config with `config = base()`")
    check_types(flatten(flag.value))
    check_ranges(flatten(flag.value))
    return rest


def check_options_exist(argv):
    """Raise a ValueError for the first `--config.section.leaf` that is no option."""
    known = list(flatten(base()))
    for argument in argv[1:]:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in known:
            inside = [key for key in known if key.startswith(match[1] + ".")]
            if inside:
                raise ValueError(
                    f"config.{match[1]} is a section; set one of its options, such as "
                    f"--config.{inside[0]}"
                )
            raise ValueError(
                f"there is no option config.{match[1]}"
                f"{defaults.moved(match[1]) or suggest(match[1], known)}; base() in "
                "ddpm/config/defaults.py shows them all"
            )


def explained(error):
    """What an error of flag parsing says: with the line, if the config file raised it, and with
    the type an option takes.
    """
    causes = [error]
    while causes[-1].__context__:
        causes.append(causes[-1].__context__)
    for cause in causes:
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if frame.name in ("get_config", "<module>"):
                return f"{frame.filename}, line {frame.lineno}: {plainly(errors.one_line(cause))}"
    if "get_config() takes 0 positional arguments" in str(causes[-1]):
        return (
            "the config file takes no variant; leave out what follows ':', or write `def "
            "get_config(variant=None)`"
        )
    # what ml_collections puts around a whole traceback
    if "Error whilst parsing config file" in str(error):
        return errors.one_line(causes[-1])
    option = re.search(r"Unknown command line flag 'config\.(.*?)'", str(error))
    if option and "config" not in flags.FLAGS:
        remedy = (
            f"write --{BEHIND[option[1]]}="
            if option[1] in BEHIND
            else "--help shows the flags that it has"
        )
        return f"this command takes no --config.{option[1]}; {remedy}"
    if option or "before a value for --config" in str(error):
        return (
            "--config.x=... without --config=FILE before it; write --config=configs/digits.py, "
            "or another of configs/, first"
        )
    if unknown := re.search(
        r"Unknown command line flag '(.*?)'(?:\. Did you mean: (.*) \?)?", str(error), re.DOTALL
    ):
        meant = f" (did you mean --{unknown[2]}?)" if unknown[2] else ""
        return f"there is no flag --{unknown[1]}{meant}; --help shows them all"
    if missing := re.match(r"flag --(\w+)=None: .* must have a value", str(error)):
        return f"no {missing[1]} given; write --{missing[1]}=..."
    if missing := re.search(
        r"(?s)Failed loading config file.*No such file or directory: '(.*?)'", str(error)
    ):
        return no_config_file(missing[1])
    if "has no attribute 'get_config'" in str(error):
        return "the config file has no function get_config; configs/digits.py shows one"
    option = re.match(r"flag --(config\.)?([\w.]+)=([^:]*): ", str(error))
    if option and option[1]:
        return (
            f"config.{option[2]} is {option[3]!r}; it takes "
            f"{TYPES[type(flatten(base())[option[2]])]}"
        )
    if option and option[2] in flags.FLAGS:
        return f"--{option[2]} is {option[3]!r}; it takes {flag_values(flags.FLAGS[option[2]])}"
    return errors.one_line(error)


def flag_values(flag):
    """The values that an absl flag takes, in words: `a whole number from 1 to 4096`."""
    kinds = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    kind = kinds.get(flag.flag_type(), "text")
    low = getattr(flag.parser, "lower_bound", None)
    high = getattr(flag.parser, "upper_bound", None)
    if low is None:
        return kind
    return f"{kind}, {low} or more" if high is None else f"{kind} from {low} to {high}"


def no_config_file(path):
    place = "" if os.path.isabs(path) else f" in {os.getcwd()}"
    return (
        f"there is no config file {path}{place}; configs/ is in the clone of the repository: run "
        "there, or write the whole path of a config file"
    )


def plainly(said):
    """What ml_collections says of an option that a config file sets, without its own words."""
    if field := re.match(
        r"Could not override field '(\w+)'.*?\. (.*) is of original type .* "
        r"to type <class '(\w+)'>",
        said,
    ):
        kinds = {kind.__name__: words for kind, words in TYPES.items()}
        return f"{field[1]} cannot be {field[2]!r}; it takes {kinds.get(field[3], field[3])}"
    names = {key.rpartition(".")[2]: key for key in defaults.RENAMED_OPTIONS}
    key = re.search(r'Key "(\w+)" does not exist', said)
    now = defaults.moved(names[key[1]]) if key and key[1] in names else ""
    return re.sub(
        r" and cannot be added.*?\.( Other fields present: .*?\}\S*)?(?= Did you mean|$)",
        f"{now}; base() in ddpm/config/defaults.py shows every option.",
        said,
    )


def given_config(values=flags.FLAGS):
    """What `--config` says: (frozen config, file name, overrides); raises ValueError for a
    config that cannot be run.
    """
    flag = values["config"]
    check(flag.value)
    return (
        freeze(flag.value),
        config_flags.get_config_filename(flag),
        config_flags.get_override_values(flag),
    )


def config_of(words):
    """The same for a command line that is not this process's, `["--config=configs/digits.py",
    "--config.seed=1"]`.
    """
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=["", *words])
    read_flags(["", *words], values)
    return given_config(values)


def fail(code, message):
    """End the process with one line, which may quote anything; of the ranks on a machine the
    first one says it.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message[:2000]}", file=sys.stderr)
    sys.exit(code)


def interrupted(error):
    """End the process after KeyboardInterrupt with one line: what it says of the work that is
    kept, if anything.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        goes_on = signals.interrupted_code() == errors.INTERRUPTED
        kept = str(error) or (
            "the same command goes on" if goes_on else "no half-written file is left"
        )
        signals.tell(f"interrupted: {kept}")
    sys.exit(signals.interrupted_code())


def open_streams():
    """Let what is printed go nowhere where the process was started with a closed stream, and let
    any name be printed.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        # in its place the next file that is opened would get its number, 0, 1 or 2
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
    # a name may be of bytes that its encoding does not know
    sys.stdout.reconfigure(errors="backslashreplace")


def stdout_has_no_reader():
    """True where the process that read stdout has gone, as after `| head -1`."""
    watch = select.poll()
    watch.register(1, 0)  # an empty mask reports errors alone
    return bool(watch.poll(0))


def flush_stdout():
    """Write what stdout holds, or drop it if that fails: Python would complain at its end."""
    try:
        sys.stdout.flush()
    except OSError:  # nobody reads, or the disk is full
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def name_a_home():
    """Give a process that has no home folder one, as containers do: W&B, torch and matplotlib
    cannot do without.
    """
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = "/"


COMMAND_LINE = []  # [program, *arguments without a flag], once it is read


def read_command_line(takes=None):
    """Read this process's command line, and answer `--help` or end with a line for a mistake in it.

    Commands call it above their other imports, as torch takes a second. `takes` says what arguments
    without a flag are, for a command that has them.
    """
    open_streams()
    name_a_home()
    try:
        show_help(sys.argv)
        COMMAND_LINE[:] = read_flags(sys.argv, takes=takes)
    except (ValueError, BrokenPipeError) as error:
        end_with_mistake(error)
    finally:
        flush_stdout()


def end_with_mistake(error):
    """End the process with one line for a user's mistake; quietly where nobody reads stdout."""
    if isinstance(error, BrokenPipeError) and stdout_has_no_reader():
        sys.exit(errors.NO_READER)
    if os.environ.get("DDPM_TRACEBACK"):
        traceback.print_exc()
    fail(errors.USAGE_ERROR, as_typed(errors.one_line(error)))


def run_command(main):
    """Run a command whose command line is read: `main()`, or `main(arguments)` if it takes any; its
    return value is the exit code.

    A user's mistake (ValueError, or a place that cannot be read or written) is one line and exit
    code 2; DDPM_TRACEBACK=1 shows where it was raised. Memory that runs out is one line and exit
    code 1. So is Ctrl-C or SIGTERM, whose code is 130, or 75 where the same command goes on; a
    second one ends the process at once. Where the reader of stdout goes away, as `head` does, the
    command ends without a word. Warnings of the package are lines on stderr.
    """

    def run(argv):
        from ddpm.runtime.out_of_memory import BatchDoesNotFit, ran_out
        from ddpm.tracking.tracker import WARNINGS

        WARNINGS.attach()
        try:
            code = errors.DONE
            if "print_config" in flags.FLAGS and flags.FLAGS.print_config:
                print(to_json(given_config()[0]))
            else:
                code = main(argv[1:]) if inspect.signature(main).parameters else main()
            sys.stdout.flush()  # fails here, not after the exit code, if the disk is full
            return code
        except (ValueError, OSError) as error:
            end_with_mistake(error)
        except Exception as error:
            if not ran_out(error):
                raise
            what = (
                errors.one_line(error)
                if isinstance(error, BatchDoesNotFit)
                else f"out of memory ({errors.one_line(error)[:200]})"
            )
            other = ", or give --device=cpu" if "device" in flags.FLAGS else ""
            fail(errors.FAILED, f"{what}; end other programs that use the same memory{other}")

    with signals.interruptible():
        try:
            app.run(run, flags_parser=lambda _: COMMAND_LINE)
        except KeyboardInterrupt as error:
            interrupted(error)
        finally:
            flush_stdout()
