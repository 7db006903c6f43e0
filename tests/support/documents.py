"""What the documents tell a reader to type, and where they point to."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *ROOT.glob("*.md"),
    *(ROOT / name / "README.md" for name in ("configs", "ddpm", "experiments", "notebooks")),
    *sorted((ROOT / "docs").glob("*.md")),
]


def code_of(document):
    """Every line of code and every code span of a document."""
    text = document.read_text()
    for block in re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        yield from block.replace("\\\n", " ").splitlines()
    text = re.sub(r"^ *```\w*\n.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)
    for line in text.splitlines():
        if line.startswith("    "):
            yield line.strip()
        yield from re.findall(r"`([^`]+)`", line)


def commands():
    """(document, command, arguments) of each command of ours in the documents: `generate` of
    `python -m ddpm.generate ...` and of `ddpm generate ...`, or the path of a script.
    """
    for document in DOCUMENTS:
        for line in code_of(document):
            # of the script for Slurm: its ranks get the words that follow
            for part in re.split(r" && |; |\|\| ", line.replace('"$@"\' ranks', "")):
                start = re.search(
                    r"(?:\bpython -m ddpm\.|-m ddpm\.|^ddpm |\bpython (?=\w+/))", part
                )
                if start:
                    name, *arguments = shlex.split(part[start.end() :].rstrip("& "), comments=True)
                    if re.match("[a-z]", name):
                        yield document, name, arguments


def links():
    """(document, target) of each relative link and picture in the documents."""
    for document in DOCUMENTS:
        text = re.sub(r"^ *```.*?^ *```", "", document.read_text(), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"https?:", target):
                yield document, target


def anchors(document):
    """The anchors of a document's headings, as GitHub makes them."""
    for heading in re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE):
        yield re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
