"""The config files of the repository, as modules."""

import importlib.util
from pathlib import Path

FILES = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def module_of(path):
    loader = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return module
