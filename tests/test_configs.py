"""Every config file trains at tiny size, every entry of every table runs, and contradictions are refused with the remedy."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from conftest import TINY, rows, run, tiny

from ddpm import build, config, data, images, spec
from ddpm.diffusion.process import VARIANCES
from ddpm.diffusion.schedules import SCHEDULES

FILES = sorted((Path(__file__).parents[1] / "configs").glob("*.py"))


def module_of(path):
    loader = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    return module


RECIPES = [(path, variant) for path in FILES for variant in (None, *getattr(module_of(path), "VARIANTS", {}))]


@pytest.mark.parametrize("path, variant", RECIPES, ids=lambda value: getattr(value, "stem", str(value)))
def test_every_config_trains_at_tiny_size(path, variant, tmp_path):
    given = module_of(path).get_config(variant)
    config.check(given)
    build.check(given)
    small = {key: value for key, value in TINY.items() if key not in ("model.channel_mult", "diffusion.timesteps")}
    levels = len(given.model.channel_mult)
    size = 32 if 32 % 2 ** (levels - 1) == 0 else 2**levels
    run(config.changed(given, small | {
        "data.source": "digits", "data.image_size": size, "model.attention_resolutions": (size // 2,), "data.num_workers": 0,
        "model.num_head_channels": 0, "train.batch_size": 4, "train.length": "2 steps", "every.evaluate": "0 steps"}), tmp_path)
    assert rows(tmp_path)[-1]["step"] == 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_unknown_variant_is_refused(path):
    with pytest.raises(ValueError, match="variant"):
        module_of(path).get_config("no_such_variant")


def test_the_readme_documents_every_entry_as_it_can_be_written():
    documented, knob = {}, ""
    for line in (Path(__file__).parents[1] / "README.md").read_text().partition("### What can be compared")[2].splitlines():
        if line.startswith("#"):
            break
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) == 4:
            knob = cells[0].strip("`") or knob
            documented.setdefault(knob, []).extend(re.findall(r"`([^`]+)`", cells[1]))
    for knob, table in config.SPECS.items():
        if knob in ("data.source", "evaluate.sampler"):  # described elsewhere; as sample.sampler
            continue
        for text in documented[knob]:
            spec.choose(knob, table, text)
        assert {spec.parse(text)[0] for text in documented[knob]} == set(table), knob
    assert set(documented["diffusion.variance"]) == set(VARIANCES)


def test_the_tables_are_whole():
    assert set(SCHEDULES) >= {"linear", "cosine", "quadratic", "sigmoid"}
    assert set(data.SOURCES) == {"digits", "folder", "torchvision"}
    assert set(images.FORMATS) == {"png", "jpg", "webp", "grid", "npz", "zip", "gif"}


@pytest.mark.parametrize("knobs, remedy", [
    (dict(data__image_size=20, model__attention_resolutions=(10,)), "digits are 8x8"),
    (dict(model__channel_mult=(1, 2, 2, 2, 2, 2, 2)), "cannot be halved"),
    (dict(model__attention_resolutions=(5,)), "5"),
    (dict(model__num_heads=3), "heads"),
    (dict(diffusion__beta_schedule="cosin"), r"did you mean 'cosine'\?"),
    (dict(train__gradient_accumulation_steps=3), "divisors of 8"),
    (dict(sample__steps=21), "sample.steps is 21 with only 20 timesteps; use 20 or fewer"),
    (dict(train__length="3 hours"), "could not be repeated"),
    (dict(data__source="folder(path='/no/such/folder')"), "/no/such/folder"),
])
def test_contradictions_are_refused_before_anything_is_written(knobs, remedy, tmp_path):
    with pytest.raises(ValueError, match=remedy) as caught:
        run(tiny(**knobs), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_the_paper_networks_have_their_size():
    def parameters(name):
        with torch.device("meta"):
            net = build.network(module_of(FILES[0].parent / f"{name}.py").get_config())
        return sum(parameter.numel() for parameter in net.parameters())

    assert parameters("ddpm_cifar10") == 35_746_307  # Ho et al. 2020
    assert parameters("cats128") == 200_321_475
