"""Nonsense, in great variety: contradicting configs, and files with bytes changed. Each is used or
refused in one line.

hypothesis draws what is tried and makes what fails as small as it can; tests/test_fuzz.py keeps
what was found so.
"""

import contextlib
import inspect
import io
import json
import re
import tempfile
from pathlib import Path

import hypothesis
import numpy as np
import torch
from faults import Fault, Found
from hypothesis import strategies as st
from PIL import Image

from ddpm import data, main
from ddpm.common import errors
from ddpm.config import check, defaults, flags
from ddpm.config import files as config_files
from ddpm.data import decode
from ddpm.studies import archive, figures, study, tables
from ddpm.tracking import files
from ddpm.training import checkpoint
from ddpm.training import weights as training_weights
from support.runs import TINY, equal, run, tiny

HERE = Path(__file__).parent
REMEDY = re.compile(
    r"\b(use|give|choose|set|write|takes?|accepts?|must|needs|leave|train|begin|bring|knows|lower|put|delete|"
    r"mend|name|divide|such as|did you mean|another|predict|instead|shows)\b"
)

# configs

WORDS = st.sampled_from(
    [
        "",
        " ",
        "none",
        "None",
        "auto",
        "0",
        "-1",
        "cosine",
        "cosine(",
        "cosine()",
        "cosine(5)",
        "x" * 300,
        "ü",
        "a\nb",
        "nan",
        "digits(size=3)",
        "__import__('os')",
        "(1,2)",
        "{}",
        "1e999",
        "two steps",
        "-3 steps",
        "1 fortnight",
        "0 steps",
        "0.5 steps",
        "1e9 steps",
        "../../x",
        "/",
        "\x00",
    ]
)
# where any number within the range could take more than a fuzzer's second, those that do not
NUMBERS = {
    "data.image_size": [4, 8, 12, 16, 32],
    "data.num_workers": [0, 1],
    "model.model_channels": [1, 2, 3, 7, 8, 12, 16],
    "model.num_res_blocks": [1, 2],
    "model.num_heads": [1, 2, 3, 4],
    "model.num_head_channels": [0, 1, 2, 3, 4, 8],
    "diffusion.timesteps": [1, 2, 3, 10, 20, 1000],
    "train.batch_size": [1, 2, 3, 4, 7, 8, 16],
    "train.gradient_accumulation_steps": [1, 2, 3, 4, 8],
    "sample.steps": [1, 2, 3, 5, 20],
    "sample.num_images": [1, 2, 5],
    "sample.batch_size": [1, 2, 3, 64],
    "evaluate.num_samples": [0, 1, 2, 4, 5, 16],
    "evaluate.steps": [0, 1, 2, 3],
    "evaluate.batch_size": [1, 2, 3, 64],
}
TUPLES = {
    "data.background": st.lists(st.integers(-1, 256), max_size=4),
    "model.channel_mult": st.lists(st.integers(0, 3), max_size=4),
    "model.res_blocks_per_level": st.lists(st.integers(0, 2), max_size=3),
    "model.attention_resolutions": st.lists(
        st.sampled_from([0, 1, 2, 4, 7, 8, 16, 32]), max_size=3
    ),
    "ema.extra_decays": st.lists(st.floats(0, 1.1), max_size=2),
    "ema.sigma_rels": st.lists(st.sampled_from([0.05, 0.1, 0.5, 0.0]), max_size=2),
    "sample.guidance_interval": st.lists(st.floats(-1, 5), max_size=3),
    "wandb.tags": st.lists(st.sampled_from(["a", "b c", ""]), max_size=2),
    "data.classes": st.lists(st.sampled_from(["0", "1", "cat"]), max_size=2),
    "sample.classes": st.lists(st.sampled_from(["3", 3, "cat", 99, -1]), max_size=2),
    "evaluate.classes": st.lists(st.sampled_from(["3", 3, "cat", 99]), max_size=2),
}
OTHER = {  # options that name files, or decide how long it takes
    "train.length": st.sampled_from(["1 step", "2 steps", "9 images", "0.01 epochs", "0 steps"])
    | WORDS.filter(lambda text: "e9" not in text),
    "train.compile": st.just(False),
    "sample.compile": st.just(False),
    "wandb.mode": st.sampled_from(["disabled", "onlin", ""]),
    "evaluate.extractor": st.sampled_from(
        ["auto", "digits", "none", "incept", "inception(weights='nowhere.pth')"]
    ),
    # the fuzzer's own process grows old
    "train.max_hours": st.sampled_from([0.0, 24.0, -1.0, float("nan")]),
    "data.source": st.sampled_from(
        [
            "digits",
            "digits(x=1)",
            "folder",
            "folder(path='nowhere')",
            "folder(path=3)",
            "nowhere",
            "torchvision(name='MNIS')",
            "torchvision",
            "data/cats",
        ]
    ),
    "data.cache": st.sampled_from(["auto", "none", "cache", "/dev/null/x"]),
    "train.init_from": st.sampled_from(["", "nowhere", "/dev/null"]),
    "sample.guide_checkpoint": st.sampled_from(["", "nowhere"]),
}


def number(low, high):
    """Numbers within and without a range, and its ends."""
    inside = st.floats(low, min(high, 1e6), allow_nan=False)
    return inside | st.sampled_from(
        [low, high, low - 1, high * 2 + 1, float("nan"), float("inf"), -0.0, 1e-320]
    )


def spec_of(table):
    """Names of a table's entries, with arguments that they have, right and wrong."""

    def arguments(name):
        parameters = [
            p.name
            for p in inspect.signature(
                getattr(table[name], "func", table[name])
            ).parameters.values()
            if p.kind is p.KEYWORD_ONLY
        ]
        value = st.sampled_from(
            [0, 1, 2, 3, 8, 0.5, -1, 1.0, 10.0, True, None, "x", "'2 steps'", "(2,1)", "1e400"]
        )
        some = st.dictionaries(st.sampled_from(parameters or ["nothing"]), value, max_size=2)
        return some.map(
            lambda given: (
                name + (f"({', '.join(f'{k}={v}' for k, v in given.items())})" if given else "")
            )
        )

    return st.sampled_from(list(table)).flatmap(arguments)


def values(key, default):
    """What an option is set to."""
    if key in OTHER:
        return OTHER[key]
    if key in TUPLES:
        return TUPLES[key].map(tuple)
    option = defaults.OPTIONS[key]
    if option.kind == "choice":
        allowed = st.sampled_from(check.allowed(option))
        return allowed | WORDS if type(default) is str else allowed
    if option.kind == "entry":
        table = check.table(option.choices[-1])
        return st.sampled_from(list(table)) | spec_of(table) | WORDS
    if type(default) is bool:
        return st.booleans()
    if key in NUMBERS:
        return st.sampled_from(
            [*NUMBERS[key], *NUMBERS[key], option.low - 1, option.high + 1, 10**30]
        )
    if type(default) is int:
        return st.integers(option.low, option.high) | st.sampled_from(
            [option.low - 1, option.high + 1]
        )
    if type(default) is float:
        return number(option.low, option.high)
    if key.startswith("every."):
        return (
            st.sampled_from(
                ["1 step", "2 steps", "0 steps", "1 second", "1 epoch, 1 minute", "auto"]
            )
            | WORDS
        )
    return WORDS


DEFAULTS = defaults.flatten(defaults.base())
CONFIGS = st.lists(st.sampled_from(sorted(DEFAULTS)), min_size=1, max_size=6, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: values(key, DEFAULTS[key]) for key in keys})
)
FILE = f"""from ddpm.config import base


def get_config():
    config = base()
    config.update_from_flattened_dict({TINY | {"train.length": "2 steps", "train.warmup": "1 steps"}!r})
    return config
"""


def train_or_refuse(options, folder):
    """Give a config to the command that trains: True where it trained, False where it was refused
    in one line with a remedy.
    """
    (folder / "tiny.py").write_text(FILE)
    words = [
        f"--config={folder / 'tiny.py'}",
        *(f"--config.{key}={value}" for key, value in options.items()),
    ]
    with (
        contextlib.chdir(folder) if hasattr(contextlib, "chdir") else contextlib.nullcontext(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()) as said,
    ):
        try:
            given, _, _ = flags.config_of(words)
            code = main.train_experiment(given, folder / "run")
        except (ValueError, OSError) as error:
            return not one_line_with_remedy(errors.one_line(error))
    assert code in (errors.DONE, errors.DIVERGED), f"exit code {code}: {said.getvalue()[-2000:]}"
    assert code == errors.DIVERGED or (folder / "run" / "final.safetensors").is_file()
    return True


def one_line_with_remedy(text):
    """True, if it is; fails otherwise."""
    assert "\n" not in text and "Traceback" not in text and 10 < len(text) < 700, text
    assert REMEDY.search(text), f"no remedy in: {text}"
    return True


# files

EDITS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "repeat", "zero", "drop"]),
        st.floats(0, 1),
        st.integers(0, 255),
    ),
    min_size=1,
    max_size=6,
)
HEAD = st.sampled_from([1.0, 0.1, 0.01])  # of the file: where its headers are, damage says more


def mutated(content, edits, head=1.0):
    """Bytes with some of them changed, each edit at a share of the first `head` of the file."""
    content = bytearray(content)
    for kind, where, value in edits:
        at = int(where * head * len(content))
        if kind == "flip" and at < len(content):
            content[at] ^= 1 << value % 8
        elif kind == "zero":
            content[at : at + value] = bytes(len(content[at : at + value]))
        elif kind == "insert":
            content[at:at] = bytes([value]) * (value % 9 + 1)
        elif kind == "repeat":
            content[at:at] = content[at : at + value]
        elif kind == "drop":
            del content[at : at + value]
        elif kind == "cut":
            del content[at:]
    return bytes(content)


def picture(suffix):
    """A small real file of a format."""
    pixels = np.random.default_rng(0).integers(0, 256, (24, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    more = (
        {"save_all": True, "append_images": [image.rotate(90)]}
        if suffix in (".gif", ".webp")
        else {}
    )
    image.convert("P" if suffix == ".gif" else "RGB").save(
        file, Image.registered_extensions()[suffix], **more
    )
    return file.getvalue()


def image(suffix, edits, head, folder):
    """A damaged image in a folder of good ones is learned from or left out with a note, and
    given alone it is refused.
    """
    name = f"x{suffix}"
    for number in range(3):
        (folder / f"{number}.png").write_bytes(PICTURES[".png"])
    (folder / name).write_bytes(mutated(PICTURES[suffix], edits, head))
    source = data.open_source(f"folder(path={str(folder)!r})", 16)
    assert len(source) in (3, 4) and all(
        source[index].shape == (3, 16, 16) for index in range(len(source))
    )
    assert len(source) == 4 or any(name in note for note in source.notes), source.notes
    try:
        decode.open_picture(folder / name, 16, 3)
        return True
    except ValueError as error:
        return not one_line_with_remedy(errors.one_line(error))


def rows(edits, folder):
    """CorruptFile rows of metrics.jsonl: those that are whole are kept, none is past the step, and
    the next can be written.
    """
    (folder / "metrics.jsonl").write_bytes(mutated(ROWS, edits))
    sink = files.Rows(folder / "metrics.jsonl", 30)
    sink.write(31, {"train/loss": 1.0}, {})
    sink.close(0, False)
    *kept, last = [
        json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert last == 31 and max(kept, default=0) <= 30 and sink.last == (kept[-1] if kept else None)
    return len(kept) == 6


def compared(edits, said, folder):
    """CorruptFile rows, or rows that say nonsense, among the runs of `ddpm.compare`: it reads them,
    or leaves out what it names.
    """
    lines = [json.dumps(row | said.get(at, {})) for at, row in enumerate(CURVE)]
    for name, seed, content in (
        ("whole", 0, "\n".join(map(json.dumps, CURVE)) + "\n"),
        ("other", 1, "\n".join(lines) + "\n"),
    ):
        config_files.write(tiny(seed=seed), folder / name)
        (folder / name / "metrics.jsonl").write_bytes(
            mutated(content.encode(), edits if seed else [])
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            found = archive.compare(str(folder))
    except ValueError as error:
        return not one_line_with_remedy(errors.one_line(error))
    tables.csv(found.groups, tables.columns(found.groups, archive.parameters))
    figures.draw(found) if not edits else None  # half a second
    return len(found.counted) == 2


def yaml(edits, folder):
    """A damaged study is read, or refused in one line."""
    (folder / "study.yaml").write_bytes(mutated(STUDY, edits))
    try:
        study.read_study(folder / "study.yaml")
        return True
    except ValueError as error:
        return not one_line_with_remedy(errors.one_line(error))


def saved(edits, folder):
    """A run folder with a damaged config.json is refused in one line, unless it still says the
    same.
    """
    (folder / "config.json").write_bytes(mutated(CONFIG, edits))
    try:
        config_files.check_continues(tiny(), folder)
        return True
    except ValueError as error:
        return not one_line_with_remedy(errors.one_line(error))


def weights(suffix, edits, head, folder):
    """A damaged file of weights is refused in one line, or damaged where it says nothing: its
    weights are what they were.
    """
    path = folder / f"step_00000002{suffix}"
    path.write_bytes(mutated(trained()[suffix], edits, head))
    try:
        _, step, text, found = training_weights.load_weights(path)
    except ValueError as error:
        return not one_line_with_remedy(errors.one_line(error))
    path.write_bytes(trained()[suffix])
    _, *whole, weights = training_weights.load_weights(path)
    assert whole == [step, text] and equal(found, weights), "other weights were read"
    return True


PICTURES = {suffix: picture(suffix) for suffix in (".png", ".jpg", ".gif", ".bmp", ".tif", ".webp")}
ROWS = "".join(
    json.dumps({"step": step, "train/loss": 0.5, "eval/protocol": "ddim"}) + "\n"
    for step in range(5, 31, 5)
).encode()
CURVE = [
    {
        "step": step,
        "train/loss": 0.5,
        "val/loss": 0.4,
        "eval/fid": 30 - step,
        "eval/protocol": "a",
        "progress/epoch": step / 9,
        "progress/images": step * 8,
        "progress/petaflop": step / 9,
    }
    for step in (4, 8, 12)
]
NONSENSE = st.dictionaries(
    st.sampled_from(sorted(CURVE[0])),
    st.sampled_from(
        [
            None,
            True,
            "x",
            "",
            [],
            {},
            {"a": 1},
            0,
            -1,
            5,
            12,
            2**53,
            10**400,
            1e308,
            -1e308,
            1e-320,
            float("nan"),
            float("-inf"),
            "a; 1 samples of the b weights in c; " + "d, 1 steps, " * 2000,
        ]
    ),
    max_size=3,
)
STUDY = (HERE.parent / "schedules.yaml").read_bytes()
CONFIG = config_files.to_json(tiny()).encode()
TRAINED = {}


def trained():
    """The bytes of a small training's files of weights, by suffix."""
    if not TRAINED:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            run(tiny(train__length="2 steps"), Path(folder))
            TRAINED[".pt"] = checkpoint.checkpoints(folder)[-1][1].read_bytes()
            TRAINED[".safetensors"] = Path(folder, "final.safetensors").read_bytes()
    return TRAINED


KINDS = {  # name -> (strategy of the arguments, f(*arguments, folder) -> whether it was used)
    "configs": (st.tuples(CONFIGS), train_or_refuse),
    "images": (st.tuples(st.sampled_from(list(PICTURES)), EDITS, HEAD), image),
    "rows": (st.tuples(EDITS), rows),
    "compared rows": (
        st.tuples(EDITS | st.just([]), st.dictionaries(st.integers(0, 2), NONSENSE, max_size=2)),
        compared,
    ),
    "studies": (st.tuples(EDITS), yaml),
    "saved configs": (st.tuples(EDITS), saved),
    "weights": (st.tuples(st.sampled_from([".pt", ".safetensors"]), EDITS, HEAD), weights),
}


def fuzz(kind):
    """A fault: so many examples of a kind; a failure is told with the smallest example that
    shows it.
    """
    strategy, attempt = KINDS[kind]

    def do(folder, times, seed):
        used = []

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=times,
            deadline=None,
            database=None,
            print_blob=False,
            report_multiple_bugs=False,
            suppress_health_check=list(hypothesis.HealthCheck),
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
        )
        @hypothesis.given(strategy)
        def one(arguments):
            with tempfile.TemporaryDirectory(dir=folder) as place:
                try:
                    used.append(attempt(*arguments, Path(place)))
                except Exception as error:
                    error.add_note(f"given {arguments!r}") if hasattr(error, "add_note") else None
                    raise

        lost = []
        torn = torch.random.get_rng_state()
        try:
            one()
        except Exception as error:
            notes = " ".join(getattr(error, "__notes__", []))
            lost.append(" ".join(f"{type(error).__name__}: {error} {notes}".split())[:2000])
        torch.random.set_rng_state(torn)
        return Found(
            len(used), lost, f"{sum(used)} were used, {len(used) - sum(used)} refused or left out"
        )

    return do


ONE_LINE = "it is used, or refused in one line that says what to do"
FAULTS = {  # the short form is tests/test_fuzz.py
    "nonsense in configs": Fault(
        fuzz("configs"),
        "up to six options at once, each right, wrong or contradicting, drawn by hypothesis",
        "two steps are trained, or one line says what to do",
        1000,
        0,
    ),
    "mutated images": Fault(
        fuzz("images"),
        "bytes of real PNG, JPEG, GIF, BMP, TIFF and WebP files changed, in a folder and alone",
        "it is learned from, or left out with a note, and alone it is used or refused in one line",
        5000,
        0,
    ),
    "mutated rows": Fault(
        fuzz("rows"),
        "bytes of metrics.jsonl changed",
        "rows that are whole stay, others go, and the next is whole",
        5000,
        0,
    ),
    "nonsense in rows": Fault(
        fuzz("compared rows"),
        "bytes of metrics.jsonl changed, or its values by nonsense, in a run that is compared",
        "ddpm.compare reads it, or leaves it out with a line",
        1000,
        0,
    ),
    "mutated studies": Fault(fuzz("studies"), "bytes of a study's YAML changed", ONE_LINE, 3000, 0),
    "mutated configs": Fault(
        fuzz("saved configs"), "bytes of a run's config.json changed", ONE_LINE, 3000, 0
    ),
    "mutated weights": Fault(
        fuzz("weights"),
        "bytes of checkpoints and exported weights changed",
        "one line refuses it, or all that is read is what was written",
        3000,
        0,
    ),
}
