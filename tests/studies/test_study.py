"""Studies: what a sweep file says, in W&B's own words, and one line for whatever is wrong in it."""

import math
from pathlib import Path

import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

from ddpm.common import rng
from ddpm.studies.study import DISTRIBUTIONS, read_study

ROOT = Path(__file__).parents[2]
TRAIN = [
    "${env}",
    "${interpreter}",
    "-m",
    "ddpm.main",
    f"--config={ROOT}/configs/digits.py",
    "${args}",
]
MEASURE = ["${env}", "${interpreter}", "-m", "ddpm.evaluate", "${args}"]


@pytest.fixture
def study(tmp_path):
    """Read a study from parameters and other keys."""

    def make(parameters, **said):
        path = tmp_path / "asked.yaml"
        path.write_text(
            yaml.safe_dump({"method": "grid", "command": TRAIN, "parameters": parameters} | said)
        )
        return read_study(path)

    return make


@pytest.fixture
def here(monkeypatch):
    monkeypatch.chdir(ROOT)  # where the committed studies are run


@pytest.mark.parametrize(
    "name, axes, seeds, runs",
    [
        ("schedules", ["diffusion.beta_schedule"], 5, 20),
        ("architectures", ["config"], 3, 18),
        ("ema", ["ema.decay"], 3, 12),
        ("samplers", ["evaluate.sampler", "evaluate.steps"], 3, 24),
    ],
)
def test_committed_studies(here, name, axes, seeds, runs):
    study = read_study(f"experiments/{name}.yaml")
    assert (study.name, study.axes, len(study.grid())) == (name, axes, runs)
    assert len(study.values("checkpoint" if name == "samplers" else "config.seed")) == seeds
    assert study.description and study.metric == ("eval/fd_digits", "minimize")


def test_samplers_measures_runs_of_schedules(here):
    schedules = read_study("experiments/schedules.yaml")
    samplers = read_study("experiments/samplers.yaml")
    folders = {str(schedules.folder() / schedules.run_name(point)) for point in schedules.grid()}
    assert set(samplers.values("checkpoint")) <= folders


def test_words_are_those_of_wandbs_agent(study):
    asked = study(
        {
            "config.seed": {"values": [0, 1]},
            "config.model.channel_mult": {"values": [[1, 2], [1, 2, 4]]},
            "config.ema.decay": {"value": 0.5},
            "config.data.flip": {"value": True},
            "config.train.length": {"value": "2 steps"},
        }
    )
    for point in asked.grid():
        sent = create_sweep_command_args(
            {"args": {name: {"value": value} for name, value in point.items()}}
        )
        assert asked.words(point) == sent["args"]
        assert asked.command_of(point) == [*TRAIN[:-1], *sent["args"]]
        assert asked.config(point).model.channel_mult == tuple(point["config.model.channel_mult"])


def test_the_grid_varies_its_last_name_fastest(study):
    asked = study(
        {
            "config.seed": {"min": 0, "max": 1},
            "config.ema.decay": {"values": [0.9, 0.5]},
            "config.model.dropout": {"value": 0.1},
        }
    )
    names = ["decay=0.9-seed=0", "decay=0.9-seed=1", "decay=0.5-seed=0", "decay=0.5-seed=1"]
    assert [asked.run_name(point) for point in asked.grid()] == names
    assert asked.axes == ["ema.decay"]


def test_names_of_folders_tell_points_apart(study):
    asked = study(
        {
            "config.evaluate.sampler": {"values": ["ddim(eta=0.5)", "ddim (eta=0.5)"]},
            "config.evaluate.steps": {"values": [5, 10]},
        }
    )
    names = [asked.run_name(point) for point in asked.grid()]
    assert len(set(names)) == 4 and names[0].startswith("evaluate.sampler=ddim_eta=0.5-")
    assert names[0].endswith("-evaluate.steps=5")
    long = study({"config.wandb.group": {"values": ["a" * 200, "a" * 201]}})
    assert (
        len({long.run_name(point) for point in long.grid()}) == 2
        and len(long.run_name(long.grid()[0])) < 128
    )


def test_a_config_file_can_be_a_parameter(study, here):
    asked = study(
        {
            "config": {"values": ["configs/digits.py", "configs/digits.py:deep"]},
            "config.seed": {"value": 3},
        },
        command=[word for word in TRAIN if not word.startswith("--config")],
    )
    small, deep = asked.grid()
    # absl wants it so
    assert asked.command_of(deep)[-2:] == ["--config=configs/digits.py:deep", "--config.seed=3"]
    assert [asked.run_name(point) for point in asked.grid()] == ["digits", "digits-deep"]
    assert (
        asked.config(deep).model.num_res_blocks == 2 * asked.config(small).model.num_res_blocks == 2
    )


def test_a_study_can_measure(study):
    asked = study(
        {
            "checkpoint": {"values": ["runs/a/x", "runs/b/x"]},
            "config.evaluate.steps": {"values": [5, 10]},
        },
        command=MEASURE,
    )
    assert asked.program == "ddpm.evaluate" and asked.axes == ["evaluate.steps"]
    assert asked.config(asked.grid()[1]).evaluate.steps == 10
    assert len({asked.run_name(point) for point in asked.grid()}) == 4


@pytest.mark.parametrize(
    "leaf, values",
    [
        ("sampler", ["heun", "unipc"]),
        ("steps", [3, 7]),
        ("spacing", ["trailing", "leading"]),
        ("ema", [0.1, 0.2]),
    ],
)
def test_what_decides_grids_alone_is_no_axis(study, leaf, values):
    """A training is measured by its section `evaluate`; a study of ddpm.evaluate may vary the
    average and the spacing.
    """
    checkpoint = {"checkpoint": {"values": ["runs/a/x", "runs/b/x"]}}
    with pytest.raises(
        ValueError,
        match=f"asked.yaml: config.sample.{leaf} varies, .* or train once .* as experiments/sampl",
    ):
        study({f"config.sample.{leaf}": {"values": values}})
    study({f"config.sample.{leaf}": {"value": values[0]}})
    if leaf in ("spacing", "ema"):
        assert study(
            checkpoint | {f"config.sample.{leaf}": {"values": values}}, command=MEASURE
        ).axes == [f"sample.{leaf}"]
    else:
        assert study({f"config.evaluate.{leaf}": {"values": values}}).axes == [f"evaluate.{leaf}"]
        with pytest.raises(
            ValueError,
            match=f"runs of ddpm.evaluate are measured by config.evaluate.{leaf}; vary that$",
        ):
            study(checkpoint | {f"config.sample.{leaf}": {"values": values}}, command=MEASURE)


MISTAKES = {  # what is wrong, and what the line about it says
    "name": (
        {"config.diffusion.beta_shedule": {"value": "cosine"}},
        "did you mean 'config.diffusion.beta_schedule'",
    ),
    "no prefix": (
        {"diffusion.beta_schedule": {"value": "cosine"}},
        "did you mean 'config.diffusion.beta_schedule'",
    ),
    "nested": ({"model": {"parameters": {"dropout": {"value": 0.1}}}}, "nested parameters"),
    "choice": (
        {"config.diffusion.beta_schedule": {"values": ["cosine", "cosin"]}},
        "did you mean 'cosine'",
    ),
    "text for a number": (
        {"config.train.learning_rate": {"values": ["1e-4"]}},
        "is '1e-4'; it takes a number; YAML's numbers",
    ),
    "off": (
        {"config.train.amp": {"values": [False, "bf16"]}},
        "is False; it takes text; YAML reads unquoted on, off",
    ),
    "null": (
        {"config.seed": {"values": [0, None]}},
        "config.seed is None; it takes a whole number",
    ),
    "float for int": (
        {"config.train.batch_size": {"values": [64.0]}},
        "is 64.0; it takes a whole number",
    ),
    "drawn float for int": (
        {"config.train.batch_size": {"min": 8.0, "max": 64.0}},
        "it takes a whole number",
    ),
    "list of no tuple": ({"config.seed": {"values": [[1, 2]]}}, "config.seed is [1, 2]"),
    "out of range": (
        {"config.ema.decay": {"values": [0.9, 2]}},
        "config.ema.decay is 2.0; it must lie between",
    ),
    "together": (
        {
            "config.train.batch_size": {"values": [64, 6]},
            "config.train.gradient_accumulation_steps": {"values": [1, 4]},
        },
        "batch_size 6 cannot be cut into 4",
    ),
    "twice": ({"config.seed": {"values": [0, 1, 0]}}, "two points are both named seed=0"),
    "twice as text": (
        {"config.diffusion.predict": {"values": ["v", "v"]}},
        "is a value given twice",
    ),
    "no end": (
        {"config.ema.decay": {"min": 0.5, "max": 0.9}},
        "config.ema.decay has no end of values",
    ),
    "too many": ({"config.seed": {"min": 0, "max": 10**12}}, "the grid has more than 10000 points"),
    "distribution": (
        {"config.ema.decay": {"distribution": "beta", "a": 1}},
        "unknown distribution of config.ema.decay 'beta'",
    ),
    "argument": (
        {"config.ema.decay": {"distribution": "uniform", "min": 0.5}},
        "missing a required argument: 'max'",
    ),
    "empty range": ({"config.seed": {"min": 2, "max": 1}}, "cannot be drawn from int_uniform"),
    "no definition": ({"config.seed": 3}, "config.seed is 3; write {value: ...}"),
    "values": ({"config.seed": {"values": 3}}, "values of config.seed is 3; it takes a list"),
    "config file": (
        {"config": {"value": "configs/nowhere.py"}},
        "there is no config file configs/nowhere.py",
    ),
}


@pytest.mark.parametrize("parameters, said", MISTAKES.values(), ids=list(MISTAKES))
def test_mistakes_in_parameters_are_one_line(study, parameters, said):
    with pytest.raises(ValueError) as error:
        study(
            parameters,
            command=[
                word
                for word in TRAIN
                if "config" not in parameters or not word.startswith("--config")
            ],
        )
    assert (
        said in str(error.value)
        and "asked.yaml" in str(error.value)
        and "\n" not in str(error.value)
    )


SEED = {"config.seed": {"values": [0]}}


@pytest.mark.parametrize(
    "said, line",
    [
        ({"methd": "grid"}, "unknown key 'methd' (did you mean 'method'?)"),
        ({"method": "gird"}, "unknown method 'gird' (did you mean 'grid'?)"),
        ({"parameters": {}}, "parameters is missing"),
        (
            {"command": ["python", "train.py", "${args}"]},
            "command starts ddpm.main or ddpm.evaluate",
        ),
        ({"command": TRAIN[:-1]}, "with ${args} among its words"),
        (
            {"command": [*TRAIN[:-1], "${args_no_hyphens}"]},
            "unknown macro in command '${args_no_hyphens}'",
        ),
        ({"command": [*TRAIN, "--workdir=runs/x"]}, "leave it out"),
        (
            {"command": [word for word in TRAIN if not word.startswith("--config")]},
            "config must be given once",
        ),
        ({"method": "bayes"}, "metric is missing"),
        ({"metric": {"name": "val/loss", "goal": "min"}}, "unknown goal 'min'"),
        ({"run_cap": 0}, "run_cap is 0"),
    ],
)
def test_mistakes_around_them_are_one_line(study, said, line):
    with pytest.raises(ValueError) as error:
        study(**{"parameters": SEED} | said)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="there is no study"):
        read_study(tmp_path / "nowhere.yaml")
    wrong = {
        "method: [grid\nparameters: {": "asked.yaml, line 2",
        "a word": "method is missing",
        "": "method is missing",
    }
    for text, said in wrong.items():
        (tmp_path / "asked.yaml").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_study(tmp_path / "asked.yaml")


def test_a_file_that_would_fill_the_memory(tmp_path):
    """Words that are ten words each, ten times over; and what would nest deeper than Python can
    go.
    """
    lines = [
        "description:",
        "  - &a0 lol",
        *(f"  - &a{k} [{', '.join([f'*a{k - 1}'] * 10)}]" for k in range(1, 20)),
    ]
    for text, said in {
        "\n".join(lines): "asked.yaml: line 3 has an alias; write out",
        "a: &b [*b]": "line 1 has an alias",
        "[" * 100_000: "nested too deeply",
        '{"a":' * 100_000: "nested too deeply",
    }.items():
        (tmp_path / "asked.yaml").write_text(text)
        with pytest.raises(ValueError, match=said) as error:
            read_study(tmp_path / "asked.yaml")
        assert "\n" not in str(error.value)


def test_a_large_grid_tries_every_value(study):
    parameters = {
        "config.seed": {"min": 0, "max": 999},
        "config.diffusion.predict": {"values": ["v", "eps"]},
    }
    assert len(study(parameters).grid()) == 2000
    parameters["config.diffusion.predict"]["values"].append("epsilon")
    with pytest.raises(ValueError, match="unknown config.diffusion.predict 'epsilon'"):
        study(parameters)


SPANS = {"min": 0.5, "max": 8.0}
MEAN = {  # of each distribution under the arguments beside it, in closed form
    "constant": ({"value": 3}, 3),
    "categorical": ({"values": [0, 1, 5]}, 2),
    "categorical_w_probabilities": ({"values": [0, 1], "probabilities": [0.25, 0.75]}, 0.75),
    "int_uniform": ({"min": 1, "max": 4}, 2.5),
    "uniform": (SPANS, 4.25),
    "q_uniform": (SPANS | {"q": 0.5}, 4.25),
    "log_uniform_values": (SPANS, 7.5 / math.log(16)),
    "q_log_uniform_values": (SPANS | {"q": 0.01}, 7.5 / math.log(16)),
    "normal": ({"mu": 2.0, "sigma": 3.0}, 2),
    "q_normal": ({"mu": 2.0, "sigma": 3.0, "q": 2}, 2),
    "log_normal": ({"mu": 0.5, "sigma": 0.5}, math.exp(0.625)),
    "q_log_normal": ({"mu": 0.5, "sigma": 0.5, "q": 0.01}, math.exp(0.625)),
}


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_draws_have_the_mean_of_their_distribution(kind):
    arguments, mean = MEAN[kind]
    random = rng.generator(0, "test")
    drawn = [DISTRIBUTIONS[kind](random, **arguments) for _ in range(4000)]
    spread = (sum((value - mean) ** 2 for value in drawn) / len(drawn)) ** 0.5
    # 4 standard errors
    assert abs(sum(drawn) / len(drawn) - mean) <= 4 * spread / math.sqrt(len(drawn))
    if "min" in arguments:
        assert arguments["min"] <= min(drawn) and max(drawn) <= arguments["max"]
    if "q" in arguments:
        assert all(
            abs(value / arguments["q"] - round(value / arguments["q"])) < 1e-6 for value in drawn
        )
    # numpy's own print as np.float64(...) in a flag
    assert {type(value) for value in drawn} <= {int, float}
