"""The notebooks run from a clone, hold no logic of their own, and are committed as they ran.

`python tests/test_notebooks.py [01_noise_schedules ...]` runs them in full, or all of them, and
writes them anew.
"""

import ast
import re
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
KEPT = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}  # of the metadata
# the package, and what shows pictures
LIBRARIES = {"ddpm", "matplotlib", "torch", "IPython", "PIL", "os", "pathlib"}

# What the first code cell sets while a test runs a notebook, FOLDER to one of the test's; other
# notebooks run as they are.
SHORT = {
    "02_train_and_sample": {"LENGTH": "6 steps", "MEASURED": 16, "FOLDER": "", "WANDB": "disabled"}
}


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(notebook, folder, values=None):
    """Run a notebook in place in a fresh kernel of this Python, started in `folder`; an error in a
    cell is raised here.

    `values` take the place of all the values that the first code cell sets.
    """
    if values:
        first = code(notebook)[0]
        names = [line.targets[0].id for line in ast.parse(first.source).body]
        assert names == list(values), (
            f"the first code cell sets {names}, and the test {list(values)}"
        )
        first.source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    # whatever kernels the machine has
    own = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    NotebookClient(
        notebook,
        km=own,
        timeout=3600,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    return notebook


def texts(notebook):
    """What the cells print and show, apart from pictures."""
    outputs = [
        output for cell in code(notebook) for output in cell.outputs if not is_picture(output)
    ]
    return [output.get("text") or output.data.get("text/markdown", "") for output in outputs]


def is_picture(output):
    return "image/png" in output.get("data", {})


def pictures(notebook):
    """How many pictures each cell shows."""
    return [sum(map(is_picture, cell.outputs)) for cell in code(notebook)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    values = SHORT.get(path.stem, {})
    values = values | {"FOLDER": str(tmp_path / "run")} if "FOLDER" in values else {}
    committed = read(path)
    fresh = execute(read(path), tmp_path, values)
    assert pictures(fresh) == pictures(committed)
    if not values:
        assert texts(fresh) == texts(committed), (
            "the outputs are of another version; write them anew, as above"
        )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_committed_as_it_ran(path):
    notebook = read(path)
    cells = code(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), (
        "run it from top to bottom"
    )
    for cell, shown in zip(cells, pictures(notebook), strict=True):
        assert not [
            output
            for output in cell.outputs
            if output.output_type == "error" or output.get("name") == "stderr"
        ]
        drawn = cell.source.count("plt.show()") + bool(
            re.match(r"figures\.\w+\(", cell.source.splitlines()[-1])
        )
        assert shown == drawn, f"a figure is missing below {cell.source[:60]!r}"
    assert any(pictures(notebook))
    assert notebook.metadata == KEPT and not any(cell.metadata for cell in notebook.cells), (
        "metadata of someone's editor"
    )
    assert not re.search(r"/(home|root|tmp|work|Users)/", "".join(texts(notebook))), (
        "paths of someone's machine"
    )
    assert path.stat().st_size < 1e6, "too large to be read in a browser; fewer or smaller figures"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_thin(path):
    for node in ast.walk(ast.parse("\n".join(cell.source for cell in code(read(path))))):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            assert node.end_lineno - node.lineno < 4, f"{node.name} belongs into the package"
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {name.split(".")[0] for name in names} <= LIBRARIES, (
            f"{names}: computing belongs into the package"
        )


def write(path):
    """Run a notebook in full and put it in its place, without what tells the machine apart."""
    notebook = execute(read(path), path.parent)
    notebook.metadata = KEPT
    for cell in notebook.cells:
        cell.metadata = {}
        for output in cell.get("outputs", []):
            if "text" in output:
                output.text = re.sub(
                    r"\S*ipykernel_launcher\.py.*? \(",
                    "notebook (",
                    output.text.replace(f"{ROOT}/", ""),
                )
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in [path for path in NOTEBOOKS if path.stem in sys.argv[1:]] or NOTEBOOKS:
        write(path)
        sys.stdout.write(f"wrote {path}\n")
