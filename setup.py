"""Packaging of `ddpm`: its requirements, and the program `ddpm` of ddpm/__main__.py."""

import re
from pathlib import Path

from setuptools import find_packages, setup

INIT = Path(__file__).with_name("ddpm") / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', INIT.read_text(), re.MULTILINE)[1]

STUDY = [  # to run, compare and show studies
    "matplotlib>=3.8",
    "optuna>=4.0",
    "pyyaml>=6.0",
    "scipy>=1.11.1",
    "wandb-workspaces>=0.4.8",
]

BENCH = [  # what the benchmarks stand beside
    "accelerate>=1.0",
    "denoising-diffusion-pytorch>=2.1",
    "diffusers>=0.32",
    "matplotlib>=3.8",
]

setup(
    name="ddpm",
    version=VERSION,
    description="An experiment-tracked workbench for denoising diffusion models of images",
    python_requires=">=3.10",
    packages=find_packages(include=["ddpm", "ddpm.*"]),
    package_data={"ddpm.evaluation": ["assets/*"]},
    entry_points={"console_scripts": ["ddpm = ddpm.__main__:main"]},
    install_requires=[
        "torch>=2.7",
        "torchvision>=0.22",
        "numpy>=1.26",
        "pillow>=10.1",
        "einops>=0.8",
        "ml-collections>=1.0",
        "absl-py>=2.1",
        "wandb>=0.31",
        "torch-fidelity>=0.4.0",
        "safetensors>=0.5",
        "scikit-learn>=1.4",
        "tqdm>=4.66",
    ],
    extras_require={
        "study": STUDY,
        "streaming": [
            "mosaicml-streaming>=0.13,<0.14"
        ],  # not for the tests: it holds numpy and huggingface_hub back
        "bench": BENCH,
        "test": [
            *STUDY,
            *BENCH,
            "pytest>=8",
            "pytest-xdist>=3.8",
            "hypothesis>=6.100",
            "import-linter>=2.0",
            "ruff>=0.9",
            "mypy>=1.10",
            "nbclient>=0.10",
            "ipykernel>=6.0.2",
        ],
    },
)
