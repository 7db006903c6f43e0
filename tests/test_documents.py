"""What the documents name exists: commands, configs and their options, scripts, links."""

import ast
import re

import pytest

from ddpm.config.check import check
from ddpm.config.defaults import base, flatten
from ddpm.config.flags import config_of
from support.documents import DOCUMENTS, ROOT, anchors, code_of, commands, links

OPTION = r"(?:data|model|diffusion|train|ema|sample|evaluate|every|wandb)\.[a-z_]+"
EXAMPLES = ("dogs.py", "FILE", "...")  # configs that the reader writes


def name_of(document):
    return document.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document):
    for source, target in links():
        if source == document:
            path, _, anchor = target.partition("#")
            place = (document.parent / path).resolve() if path else document
            assert place.exists(), target
            assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_options_exist(document):
    options = flatten(base())
    for code in code_of(document):
        for option in re.findall(rf"(?:^|--config\.)({OPTION})(?=[ =`]|$)", code):
            assert option in options or option.endswith((".py", ".md")), code


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_exist(document):
    """Those of the package by their path in it, others by that in the repository."""
    for code in code_of(document):
        for path in re.findall(r"^(?:ddpm/)?(\w+/[a-z_0-9]+\.py)$", code):
            assert (ROOT / "ddpm" / path).is_file() or (ROOT / path).is_file(), path


def test_the_map_names_files_where_they_are():
    folder = ""
    for line in (ROOT / "ddpm" / "README.md").read_text().splitlines():
        if line.startswith(("    ├── ", "    └── ")) and line.split()[1].endswith("/"):
            folder = line.split()[1]
        for path in re.findall(r"[├└]── ((?:\w+\.py ?)+)", line):
            for name in path.split():
                place = ROOT / "ddpm" / (folder if line.startswith("    │   ") else "") / name
                assert place.is_file(), place


def test_commands_can_be_given():
    """Configs with their overrides can be trained, and files of the repository are there."""
    seen = set()
    for document, name, arguments in commands():
        seen.add(name)
        if name.endswith(".py"):
            script = (ROOT / name).read_text()
            for argument in arguments:
                flag = argument.partition("=")[0]
                assert not flag.startswith("--") or f'"{flag}"' in script, (document, argument)
            continue
        assert (ROOT / "ddpm" / f"{'main' if name == 'train' else name}.py").is_file(), document
        config = [argument for argument in arguments if re.match(r"--config[.=]", argument)]
        if config and config[0].startswith("--config=") and not config[0].endswith(EXAMPLES):
            file, *overrides = config
            config_of([file.replace("=", f"={ROOT}/", 1), *overrides])
        elif config and config[0].startswith("--config."):
            given = base()
            with given.unlocked():
                for override in config:
                    assert override[9:].partition("=")[0] in flatten(base()), (document, override)
            check(given)
        for argument in arguments:
            if re.match(r"(configs|experiments|tests|notebooks)/", argument):
                assert (ROOT / argument).exists(), (document, argument)
    assert {"main", "train", "generate", "sample", "evaluate", "plan", "doctor", "convert"} <= seen
    assert {"sweep", "compare", "dashboard"} <= seen
    assert {name for name in seen if name.endswith(".py")}


def test_messages_are_quoted_as_they_are_written():
    """Those of the table in docs/troubleshooting.md, whose `...` stands for names."""
    texts = [
        node.value
        for path in sorted((ROOT / "ddpm").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    rows = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    quoted = [
        part
        for row in rows
        for quote in re.findall(r'^\|[^|]*"([^"]+)"', row)
        for part in quote.split(" ... ")
    ]
    assert len(quoted) > 7
    # the system's own, from errno
    for part in set(quoted) - {"No space left on device"}:
        assert any(part in text for text in texts), part


def test_the_two_commands_of_the_start_have_their_form():
    """`.ci/run` looks for the second one."""
    lines = (ROOT / "README.md").read_text().splitlines()
    assert "    pip install -e . && python -m ddpm.main --config=configs/digits.py" in lines
    assert [line for line in lines if re.match(r"    pip install .*pytest", line)] == [
        "    pip install -e '.[test]' && python -m pytest"
    ]
    assert len(lines) <= 210
