"""The house: import order, one home for a library, and rules that hold for every file."""

import ast
import io
import re
import shutil
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "ddpm"
COMMANDS = {
    "main",
    "generate",
    "sample",
    "evaluate",
    "plan",
    "doctor",
    "sweep",
    "compare",
    "dashboard",
    "convert",
}
HOMES = {
    "wandb": {"tracking.wandb", "studies.wandb_io", "dashboard"},
    "torch_fidelity": {"evaluation"},
    "diffusers": {"interop.diffusers"},
    "optuna": {"studies.search"},
    "wandb_workspaces": {"dashboard"},
    "torch.distributed": {"runtime", "training.network", "training.fsdp"},
    "ml_collections": {"config"},
    "matplotlib": {"studies.figures", "data.contact_sheet"},
    "scipy": {"studies.statistics", "evaluation.distances"},
    "streaming": {"data.shards"},
}
MODULES = sorted(PACKAGE.rglob("*.py"))

# word -> the word of the field; neither in names nor in strings, comments and documents.
# A rename that is done adds a line, here or, while other folders still have the word, below.
BANNED = {
    "knob": "option",
    "door": "command",
    "card": "GPU",
    "abandonable": "interruptible",
    "unlabelled": "unconditional",
    "wish": "stop request",
}
BANNED_IN = {  # folder of the package -> words, as above
    ("common", "diffusion", "models", "tracking"): {
        "anew": "again",
        "asked": "called, requested",
        "beside": "next to",
        "heard": "handled",
        "room": "module",
        "stretch": "stratum",
        "told": "conditioned on, given",
        "waist": "interface",
    },
}
# names only: they say nothing, and are words of plain text
VAGUE = {"asked", "found", "given", "kept", "made", "said", "told", "well", "whole"}
VAGUE_IN = ("common", "diffusion", "evaluation", "models", "runtime", "tracking")
# folders without dense code, see `dense_places`; a folder that is done is added
PLAIN = (
    "common",
    "diffusion",
    "evaluation",
    "models",
    "runtime",
    "sampling",
    "studies",
    "tracking",
)
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(PACKAGE.rglob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("configs/*.md")),
    ROOT / "experiments" / "README.md",
    *sorted(ROOT.glob("notebooks/*.md")),
]


def module_of(path):
    """The name of a file's module below `ddpm`, such as `data.decode`; a folder's own is the
    folder's.
    """
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path):
    """Every (line, dotted module) that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "ddpm" if node.level else node.module
            module = f"{base}.{node.module}" if node.level and node.module else base
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith("torch.distributed"):
            yield node.lineno, ast.unparse(node)


def words_of(text):
    """The words of a text or a name, lower case: `last_x0`, `LastStep` and `last step` alike."""
    parts = re.sub(r"([a-z])([A-Z])", r"\1 \2", text)
    return {word.lower() for word in re.findall(r"[A-Za-z]+", parts)}


def tokens_of(text):
    """The (line, words, is_name) of every name, string and comment of a module's text."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind in ("NAME", "STRING", "COMMENT", "FSTRING_MIDDLE"):
            yield token.start[0], words_of(token.string), kind == "NAME"


def banned_words(text, banned, vague=()):
    """One line per banned word in a module's text: where it stands and what to say instead."""
    plural = {f"{word}s": instead for word, instead in banned.items()}
    for line, words, is_name in tokens_of(text):
        for word in sorted(words & set(banned | plural)):
            yield f"{line}: {word!r}; say {(banned | plural)[word]}"
        if is_name:
            yield from (f"{line}: {word!r} says nothing" for word in sorted(words & set(vague)))


def dense_places(text):
    """One line for each place of a module's text that the rules of density forbid."""
    for node in ast.walk(ast.parse(text)):
        inside = {type(inner) for inner in ast.walk(node) if inner is not node}
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
            yield f"{node.lineno}: {node.name} has more than 60 lines"
        if isinstance(node, ast.IfExp) and ast.IfExp in inside:
            yield f"{node.lineno}: nested conditional expressions"
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            if len(node.generators) > 1:
                yield f"{node.lineno}: a comprehension with two loops"
            if ast.NamedExpr in inside:
                yield f"{node.lineno}: an assignment inside a comprehension"


def lint_imports(root):
    """Exit code and output of import-linter on the package in a folder; the contract is the one
    in pyproject.toml.
    """
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={"PYTHONPATH": str(root)}
    )
    return done.returncode, done.stdout + done.stderr


def check_types(root):
    """Exit code and output of mypy in a folder, for the files that its pyproject.toml names."""
    command = [sys.executable, "-m", "mypy", f"--cache-dir={ROOT / '.mypy_cache'}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_root_holds_the_commands_and_nothing_else():
    assert {path.stem for path in PACKAGE.glob("*.py")} == COMMANDS | {"__init__", "__main__"}


def test_the_map_names_every_module():
    text = (PACKAGE / "README.md").read_text()
    for path in MODULES:
        known = path.stem in text or path.stem in ("__init__", "__main__")
        assert known, f"{path.relative_to(PACKAGE)} is not in ddpm/README.md"


def test_imports_follow_the_order_of_the_folders():
    code, output = lint_imports(ROOT)
    assert code == 0, output


@pytest.mark.parametrize(
    "importer, imported",
    [
        ("diffusion/process.py", "ddpm.training.step"),
        ("models/unet.py", "ddpm.data.order"),
        ("plan.py", "ddpm.main"),
    ],
)
def test_the_contract_can_fail(tmp_path, importer, imported):
    shutil.copytree(
        PACKAGE, tmp_path / "ddpm", ignore=shutil.ignore_patterns("__pycache__", "assets")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    path = tmp_path / "ddpm" / importer
    path.write_text(f"{path.read_text()}\n\ndef late():\n    import {imported}\n")
    code, output = lint_imports(tmp_path)
    assert code == 1 and imported in output, output


def test_the_interfaces_have_their_types():
    code, output = check_types(ROOT)
    assert code == 0, output


BREAKS = [  # file, what stands in it, what breaks the interface
    ("diffusion/schedules.py", "def cosine(timesteps, *, s=0.008)", "def cosine(*, s=0.008)"),
    ("models/unet.py", "t: torch.Tensor,", "t: int,"),
    ("diffusion/denoiser.py", "    predict: str,", "    predict: int,"),
    ("diffusion/samplers.py", "def ddim(denoise, x, levels,", "def ddim(denoise, x,"),
    ("data/source.py", "def batch(self, indices", "def batch(self, first, indices"),
    ("tracking/tracker.py", "def log(self, step", "def log(self, first, step"),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """What mypy says of a copy of the package in which every interface of BREAKS is broken."""
    root = tmp_path_factory.mktemp("broken")
    leave = shutil.ignore_patterns("__pycache__", "assets")
    shutil.copytree(PACKAGE, root / "ddpm", ignore=leave)
    (root / "tests/support").mkdir(parents=True)
    shutil.copy(ROOT / "tests/support/interfaces.py", root / "tests/support")
    shutil.copy(ROOT / "pyproject.toml", root)
    for name, before, after in BREAKS:
        path = root / "ddpm" / name
        text = path.read_text()
        assert text.count(before) == 1, f"{name} has no {before!r}"
        path.write_text(text.replace(before, after))
    code, output = check_types(root)
    assert code == 1
    return output


@pytest.mark.parametrize(
    "provider", ["cosine", "unet.forward", '"predict"', "ddim", "images.batch", "tracker.log"]
)
def test_the_type_check_can_fail(broken, provider):
    text = (ROOT / "tests/support/interfaces.py").read_text().splitlines()
    wrong = [
        line + text[int(line.split(":")[1]) - 1]
        for line in broken.splitlines()
        if line.startswith("tests/support/interfaces.py:")
    ]
    assert any(provider in line for line in wrong), broken


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_a_library_has_one_home(path):
    module = module_of(path)
    for line, name in imports_of(path):
        for library, homes in HOMES.items():
            if name == library or name.startswith(library + "."):
                at_home = any(module == home or module.startswith(home + ".") for home in homes)
                assert at_home, f"{module}:{line}: {library} lives only in {sorted(homes)}"


def test_no_unsafe_loading_and_no_device_strings():
    for path in MODULES:
        text = path.read_text()
        for forbidden in ("weights_only=False", "pickle.load", ".cuda()", "[:, None, None, None]"):
            assert forbidden not in text, f"{path.name} has {forbidden}"


def test_one_module_opens_pictures():
    """Elsewhere PIL would open any format and believe any size."""
    for path in MODULES:
        calls = [
            ast.unparse(node.func)
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Call)
        ]
        opens = [
            call
            for call in calls
            if call in ("Image.open", "PIL.Image.open", "plt.imread", "read_image", "imread")
        ]
        assert bool(opens) == (module_of(path) == "data.decode"), (
            f"{path.name}: open it by ddpm.data.decode"
        )


def test_what_others_wrote_is_not_checked_by_assert():
    """`python -O` leaves every assert out; one inside a try is such a check."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Try):
                checks = [
                    inner
                    for part in node.body
                    for inner in ast.walk(part)
                    if isinstance(inner, ast.Assert)
                ]
                assert not checks, f"{path.name}:{checks[0].lineno}"


def test_nothing_unpickles_or_runs_text():
    """Files of others are data: every call by which Python makes code or objects of them is
    missing, or told not to.
    """
    forbidden = {
        "pickle",
        "_pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "joblib",
        "marshal",
        "shelve",
    }
    for path in MODULES:
        for line, module in imports_of(path):
            assert module.partition(".")[0] not in forbidden, f"{path.name}:{line} imports {module}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call = ast.unparse(node.func)
                options = {option.arg: ast.unparse(option.value) for option in node.keywords}
                where = f"{path.name}:{node.lineno}: {call}"
                assert call not in (
                    "eval",
                    "exec",
                    "compile",
                    "__import__",
                    "os.system",
                    "os.popen",
                    "yaml.load",
                ), where
                assert not call.endswith((".extractall", ".unpack_archive", ".read_pickle")), where
                assert call != "torch.load" or options.get("weights_only") == "True", where
                assert (
                    options.get("allow_pickle", "False") == options.get("shell", "False") == "False"
                ), where


def test_finished_folders_have_no_dense_code():
    for path in MODULES:
        if path.relative_to(PACKAGE).parts[0] in PLAIN:
            dense = list(dense_places(path.read_text()))
            assert not dense, f"{path.relative_to(ROOT)}: {dense}"


@pytest.mark.parametrize(
    "text",
    [
        "def f():\n" + "    pass\n" * 60,
        "x = 1 if a else 2 if b else 3",
        "[x for y in z for x in y]",
        "[y for x in z if (y := x)]",
    ],
)
def test_the_check_of_density_can_fail(text):
    assert len(list(dense_places(text))) == 1
    assert not list(dense_places("def f():\n" + "    pass\n" * 59 + "[1 if x else 2 for x in y]"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_modules_use_the_words_of_the_field(path):
    folder = path.relative_to(PACKAGE).parts[0]
    banned = dict(BANNED)
    for folders, words in BANNED_IN.items():
        banned |= words if folder in folders else {}
    vague = VAGUE if folder in VAGUE_IN else ()
    wrong = list(banned_words(path.read_text(), banned, vague))
    assert not wrong, f"{path.relative_to(ROOT)}: {wrong}"


def test_documents_use_the_words_of_the_field():
    banned = set(BANNED).union(*BANNED_IN.values())
    for path in DOCUMENTS:
        wrong = words_of(path.read_text()) & {*banned, *(f"{word}s" for word in banned)}
        assert not wrong, f"{path.relative_to(ROOT)}: {wrong}"


@pytest.mark.parametrize(
    "text",
    ["num_cards = 1", "class LastCard: pass", "x = 'a card'", "# cards", "f'{x} card'", "said = 1"],
)
def test_the_check_of_words_can_fail(text):
    assert list(banned_words(text, BANNED, VAGUE))
    assert not list(banned_words("discard = 'placard, well said'", BANNED, VAGUE))


def test_the_linter_is_content():
    for check in (["check"], ["format", "--check"]):
        command = [sys.executable, "-m", "ruff", *check, PACKAGE.parent]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
