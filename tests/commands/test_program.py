"""The program `ddpm` and the version of the package."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ddpm
from ddpm import __main__ as program

ROOT = Path(__file__).parents[2]


def program_output(*words):
    """(exit code, output) of `python -m ddpm WORDS`; there is no line on stderr."""
    command = [sys.executable, "-m", "ddpm", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr
    return done.returncode, done.stdout


def test_the_program_lists_its_commands():
    code, output = program_output()
    listed = re.findall(r"^  ddpm (\w+) +(\S.+)$", output, re.MULTILINE)
    assert code == 0 and [name for name, _ in listed] == list(program.COMMANDS)
    assert all(len(words) > 10 for _, words in listed)
    runnable = {
        path.stem for path in (ROOT / "ddpm").glob("*.py") if "run_command(" in path.read_text()
    }
    assert set(program.COMMANDS.values()) == runnable
    assert "train" in ddpm.__doc__ and "python -m ddpm" in ddpm.__doc__


def test_train_is_the_module_main():
    code, output = program_output("train", "--help")
    assert code == 0 and "python -m ddpm.main" in output and "--workdir" in output


@pytest.mark.parametrize("name, module", program.COMMANDS.items())
def test_a_command_runs_its_module_with_its_flags(name, module, monkeypatch):
    """As `python -m ddpm.MODULE` does, which tests of the modules start."""
    calls = []
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/ddpm", name, "--seed=1", "x"])
    monkeypatch.setattr(program.signals, "handle", lambda handler: calls.append(handler))
    monkeypatch.setattr(
        program.runpy, "run_module", lambda *words, **options: calls.append((words, options))
    )
    monkeypatch.setattr(sys, "orig_argv", ["python", *sys.argv])
    program.main()
    assert sys.orig_argv == ["python", "-m", f"ddpm.{module}", "--seed=1", "x"]
    assert calls == [
        program.signals.end_before_start,  # Ctrl-C before torch is imported is one line
        ((f"ddpm.{module}",), {"run_name": "__main__", "alter_sys": True}),
    ]
    assert sys.argv == [str(ROOT / "ddpm" / f"{module}.py"), "--seed=1", "x"]


def test_an_unknown_command_is_one_line_and_code_2(monkeypatch, capsys):
    monkeypatch.setattr(program.signals, "handle", lambda handler: None)
    monkeypatch.setattr(sys, "argv", ["ddpm", "main"])
    assert program.main() == 2
    assert capsys.readouterr().err == (
        "error: unknown command 'main' (did you mean 'train'?); choose one of "
        f"{', '.join(program.COMMANDS)}\n"
    )


def test_the_version_is_the_same_everywhere(monkeypatch, capsys):
    monkeypatch.setattr(program.signals, "handle", lambda handler: None)
    monkeypatch.setattr(sys, "argv", ["ddpm", "--version"])
    assert program.main() == 0 and capsys.readouterr().out == f"ddpm {ddpm.__version__}\n"
    assert f"\nversion: {ddpm.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    releases = re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert releases[0] == ddpm.__version__
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == [ddpm.__version__], done.stderr
