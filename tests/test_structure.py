"""The architecture, read from the imports: floors point down only, and a library has one home."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ddpm"

FLOORS = {
    "doors": ["main", "generate", "sample", "evaluate", "plan", "compare", "convert", "sweep", "dashboard", "doctor",
              "__main__"],
    "assembly": ["build", "assemble", "train"],
    "craft": ["config", "command", "dialects", "study", "draw", "score", "step", "results", "report", "figures", "sheet"],
    "services": ["data", "pictures", "colour", "png", "likeness", "cache", "shards", "checkpoint", "tracking", "metrics"],
    "mathematics": ["diffusion", "models", "augment", "ema", "posthoc", "optim", "images"],
    "ground": ["spec", "rng", "dist", "sharded", "clock", "files", "memory", "room", "cards", "budget", "interrupt",
               "progress"],
}
HEIGHT = {room: height for height, rooms in enumerate(reversed(FLOORS.values())) for room in rooms}
GROUND, MATHEMATICS, SERVICES, CRAFT, ASSEMBLY, DOORS = range(6)
EXCEPTIONS = {("sample", "generate"): "a door may call generate's function"}

HOMES = {
    "wandb": {"tracking", "compare", "dashboard"},
    "torch_fidelity": {"metrics"},
    "diffusers": {"convert"},
    "optuna": {"sweep"},
    "wandb_workspaces": {"dashboard"},
    "torch.distributed": {"dist", "sharded"},
    "ml_collections": {"config", "command"},
    "matplotlib": {"figures"},
    "scipy": {"results"},
    "streaming": {"shards"},
}


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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


MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_down_only(path):
    room = room_of(path)
    assert room in HEIGHT, f"{room} has no floor: give it one in tests/test_structure.py and CONTRIBUTING.md"
    for line, module in imports_of(path):
        if not module.startswith("ddpm."):
            continue
        other = module.split(".")[1]
        if other == room or (room, other) in EXCEPTIONS:
            continue
        assert other in HEIGHT, f"{path.name}:{line} imports {module}, which has no floor"
        upward = HEIGHT[other] > HEIGHT[room]
        beside = HEIGHT[other] == HEIGHT[room] and HEIGHT[room] == DOORS
        assert not upward, f"{path.name}:{line} imports {other}, which is on a higher floor: data flows one way"
        assert not beside, f"{path.name}:{line}: a door never opens on another door ({other})"
        if HEIGHT[room] == SERVICES:
            allowed = other == "images" or HEIGHT[other] in (GROUND, SERVICES)
            assert allowed, f"{path.name}:{line}: services do not know the mathematics ({other})"
        if HEIGHT[room] == MATHEMATICS:
            assert other not in ("dist", "sharded"), f"{path.name}:{line}: the mathematics knows no ranks or devices"


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_a_library_has_one_home(path):
    for line, module in imports_of(path):
        for library, homes in HOMES.items():
            if module == library or module.startswith(library + "."):
                assert room_of(path) in homes, f"{path.name}:{line}: {library} lives only in {sorted(homes)}"


def test_the_rules_can_fail():
    """The reader of imports sees what the rules look for, wherever it stands."""
    source = PACKAGE.parent / "tests" / "test_structure.py"
    assert "ast" in [module for _, module in imports_of(source)]
    assert HEIGHT["spec"] == GROUND and HEIGHT["main"] == DOORS and HEIGHT["build"] == ASSEMBLY and HEIGHT["draw"] == CRAFT


def test_no_unsafe_loading_and_no_device_strings():
    for path in MODULES:
        text = path.read_text()
        for forbidden in ("weights_only=False", "pickle.load", ".cuda()", "[:, None, None, None]"):
            assert forbidden not in text, f"{path.name} has {forbidden}"


def test_one_module_opens_pictures():
    """Elsewhere PIL would open any format and believe any size."""
    for path in MODULES:
        calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        opens = [call for call in calls if call in ("Image.open", "PIL.Image.open", "plt.imread", "read_image", "imread")]
        assert bool(opens) == (room_of(path) == "pictures"), f"{path.name}: open it by ddpm.pictures"


def test_what_others_wrote_is_not_checked_by_assert():
    """`python -O` leaves every assert out; one inside a try is such a check."""
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Try):
                checks = [inner for part in node.body for inner in ast.walk(part) if isinstance(inner, ast.Assert)]
                assert not checks, f"{path.name}:{checks[0].lineno}"


def test_nothing_unpickles_or_runs_text():
    """Files of others are data: every call by which Python makes code or objects of them is missing, or told not to."""
    forbidden = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    for path in MODULES:
        for line, module in imports_of(path):
            assert module.partition(".")[0] not in forbidden, f"{path.name}:{line} imports {module}"
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                call, options = ast.unparse(node.func), {option.arg: ast.unparse(option.value) for option in node.keywords}
                where = f"{path.name}:{node.lineno}: {call}"
                assert call not in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load"), where
                assert not call.endswith((".extractall", ".unpack_archive", ".read_pickle")), where
                assert call != "torch.load" or options.get("weights_only") == "True", where
                assert options.get("allow_pickle", "False") == options.get("shell", "False") == "False", where


def test_the_linter_is_content():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", PACKAGE.parent], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
