"""A run records the code that trains it, whatever tree its command is given in, and reports go
by that.
"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from ddpm.config import defaults, files
from ddpm.studies import runs
from ddpm.studies.archive import compare
from ddpm.tracking import tracker
from support.commands import python
from support.runs import DONE, run, tiny, written

PACKAGE = Path(tracker.__file__).parents[1]


def git(folder, *words):
    return subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
        cwd=folder,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


def commit_of(folder, **environment):
    """What the package in a folder says its commit is, for a command given in another
    repository.
    """
    elsewhere = folder.with_name("elsewhere")
    if not elsewhere.exists():
        elsewhere.mkdir()
        git(elsewhere, "init", "-q")
        git(elsewhere, "commit", "-q", "--allow-empty", "-m", "another project's")
    code = (
        f"import sys; sys.path.insert(0, {str(folder)!r}); from ddpm.tracking import tracker; "
        "print(tracker.commit())"
    )
    return subprocess.run(
        [python(), "-c", code],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        check=True,
        env={"GIT_DIR": str(elsewhere / ".git"), "PATH": "/usr/bin:/bin"},
    ).stdout.strip()


def test_the_commit_is_that_of_the_package_s_tree(tmp_path):
    """Not of the command's, also where git's environment names that; changes are told, and told
    apart.
    """
    tree = tmp_path / "tree"
    shutil.copytree(PACKAGE, tree / "ddpm", ignore=shutil.ignore_patterns("__pycache__"))
    assert commit_of(tree) == ""  # no repository at all
    git(tree, "init", "-q")
    Path(tree, ".gitignore").write_text("ddpm\n__pycache__\n")
    git(tree, "add", ".gitignore")
    git(tree, "commit", "-q", "-m", "as an environment in somebody's project")
    assert commit_of(tree) == ""
    git(tree, "add", "-f", "ddpm/tracking", "ddpm/common", "ddpm/__init__.py")
    git(tree, "commit", "-q", "-m", "code")
    head = git(tree, "rev-parse", "--short=7", "HEAD")
    assert commit_of(tree) == head
    changed = []
    for line in ("# one\n", "# other\n"):
        Path(tree, "ddpm", "common", "files.py").write_text(
            (PACKAGE / "common" / "files.py").read_text() + line
        )
        changed.append(commit_of(tree))
    assert all(
        files.COMMIT.fullmatch(one) and one.startswith(f"{head} with changes ") for one in changed
    )
    assert len(set(changed)) == 2


def test_a_run_records_every_code_that_trained_it(tmp_path, monkeypatch):
    """In the log's first line, in config.json and in W&B's config; one that goes on, also in a
    new folder, adds to it.
    """
    folder = tmp_path / "run"
    elsewhere = tmp_path / "elsewhere"
    given = dict(every__evaluate="0 steps", every__validate="0 steps", every__sample="0 steps")
    monkeypatch.setattr(tracker, "commit", lambda: "0494cba")
    assert run(tiny(**given, train__length="2 steps", wandb__mode="offline"), folder)
    assert (
        (folder / "training.log").read_text().partition("\n")[0].endswith("ddpm at commit 0494cba)")
    )
    assert files.code_in(folder) == ("0494cba",) and files.read(folder / "config.json").seed == 0
    assert b"0494cba" in next(folder.glob("wandb/offline-run-*/run-*.wandb")).read_bytes()
    assert run(tiny(**given, train__length="3 steps"), folder) and files.code_in(folder) == (
        "0494cba",
    )
    monkeypatch.setattr(tracker, "commit", lambda: "76423dd with changes 01234567")
    assert run(tiny(**given, train__length="4 steps", train__resume_from=str(folder)), elsewhere)
    assert runs.read_run(elsewhere).code == ("0494cba", "76423dd with changes 01234567")
    monkeypatch.setattr(tracker, "commit", lambda: "")  # no git: what was recorded stays
    assert (
        run(tiny(**given, train__length="5 steps"), elsewhere)
        and len(files.code_in(elsewhere)) == 2
    )


@pytest.mark.parametrize("code", ['"0494cba"', "[1, {}]", '["a\\nb"]', '["x"]', "null", "{}", "7"])
def test_what_is_no_record_of_code_is_none(code, tmp_path):
    """A config.json may be anybody's: its words reach reports."""
    Path(tmp_path, "config.json").write_text(
        files.to_json(defaults.base())[:-1] + f', "code": {code}}}'
    )
    assert files.code_in(tmp_path) == () and files.read(
        tmp_path / "config.json"
    ) == defaults.freeze(defaults.base())


def test_a_report_goes_by_what_runs_recorded(tmp_path, monkeypatch, capsys):
    """One commit is the report's, whatever the tree is now; several are told; runs of before are
    as they were.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddpm.studies.archive.commit", lambda: "fffffff")
    code = {}

    def report(*recorded):
        folders = []
        for seed, commits in enumerate(recorded):
            name = f"{len(code)}-{seed}"
            written(tmp_path, name, {"seed": seed}, [DONE | {"val/loss_ema": 0.5 + seed / 100}])
            files.write(tiny(seed=seed), tmp_path / name, commits)
            folders.append(name)
        out = tmp_path / f"report{len(code)}"
        code[out] = recorded
        compare(*folders, out=out)
        said = capsys.readouterr().out
        return (
            json.loads((out / "made.json").read_text())["commit"],
            (out / "README.md").read_text(),
            said,
        )

    made, text, said = report(None, None)
    assert made == "fffffff" and "different code" not in text + said
    made, text, said = report(["0494cba"], ["0494cba"])
    assert (
        made == "0494cba"
        and "Commit 0494cba, torch" in text
        and "different code" not in text + said
    )
    made, text, said = report(["0494cba"], ["0494cba", "76423dd"], ["0494cba"], None)
    assert made == "0494cba; 0494cba, then 76423dd; code that was not recorded"
    for words in (text, said):
        assert (
            "by different code, so a difference may come from that: 0494cba (2 runs); 0494cba, "
            "then 76423dd (1 run); and code that was not recorded (1 run)"
        ) in words
