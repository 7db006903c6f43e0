"""Every option is checked, configs survive JSON, runs are named apart, and a mistake on the
command line is one line.
"""

import json
import os
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from ddpm import main
from ddpm.common import errors
from ddpm.config import check as config_check
from ddpm.config import defaults, flags
from ddpm.config import files as config_files
from ddpm.config.check import check
from ddpm.config.defaults import base, flatten, freeze
from ddpm.config.files import changed, from_json, to_json
from ddpm.experiment import build

ROOT = Path(__file__).parents[2]
FREE_TEXT = {
    "data.cache",
    "train.init_from",
    "train.resume_from",
    "sample.guide_checkpoint",
    "wandb.project",
    "wandb.entity",
    "wandb.name",
    "wandb.group",
}
# and pairs of numbers
WORDS = {
    "wandb.tags",
    "data.classes",
    "sample.classes",
    "evaluate.classes",
    "sample.guidance_interval",
}
KNOBS = flatten(base())
DURATION = "; write a number and one of steps, epochs, images, such as '500 steps'"
OF_KIND = {
    kind: {key: option for key, option in defaults.OPTIONS.items() if option.kind == kind}
    for kind in ("number", "numbers", "choice", "entry", "length")
}
RANGES = {key: (option.low, option.high) for key, option in OF_KIND["number"].items()}
CHOICES = {key: config_check.allowed(option) for key, option in OF_KIND["choice"].items()}
SPECS = {key: config_check.table(option.choices[-1]) for key, option in OF_KIND["entry"].items()}
INTEGER_TUPLES = {
    key: (option.low, option.high)
    for key, option in OF_KIND["numbers"].items()
    if type(option.low) is int
}
NUMBERS = {key for key, value in KNOBS.items() if type(value) in (int, float)}


def complaint(function, *arguments):
    """The one line of the ValueError that a call raises."""
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    line = str(caught.value)
    assert line and len(line.splitlines()) == 1
    return line


def with_options(**options):
    """base() with some options set, unchecked; `__` stands for the dot."""
    given = base()
    given.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in options.items()}
    )
    return given


def refusal(key, value):
    """What `check` says of one bad value."""
    return complaint(check, with_options(**{key: value}))


def test_the_defaults_pass_and_nobody_shares_them():
    check(base())
    base().train.batch_size = 3
    assert base().train.batch_size == KNOBS["train.batch_size"]


def test_a_new_config_has_the_sections_of_the_design_and_is_locked():
    assert set(base()) == {
        "seed",
        "data",
        "model",
        "diffusion",
        "train",
        "ema",
        "sample",
        "evaluate",
        "every",
        "wandb",
    }
    with pytest.raises(AttributeError, match='Did you mean "length"'):
        base().train.lenght = "5 steps"
    with pytest.raises(AttributeError):
        base().lenght = "5 steps"


def test_every_option_is_checked_in_one_way():
    """An option has a range, choices or a table, or is text that may be anything."""
    for key, option in defaults.OPTIONS.items():
        value = option.default
        kinds = {bool: {"flag"}, int: {"number"}, float: {"number"}}.get(
            type(value), {"choice", "entry", "length", "interval", "numbers", "text", "words"}
        )
        if key == "data.channels":
            kinds = {"choice"}
        if key == "sample.guidance_interval":
            kinds = {"levels"}
        if key in ("train.compile", "train.channels_last"):
            kinds = {"measured"}
        assert option.kind in kinds, key
        assert (option.low is not None) == (option.kind in ("number", "numbers")), key
        assert bool(option.choices) == (option.kind in ("choice", "entry", "measured")), key
        assert option.kind != "text" or key in FREE_TEXT, key
        assert option.kind != "words" or key in WORDS, key
    assert set(defaults.OPTIONS) == set(KNOBS)
    assert {*RANGES, "data.channels"} == NUMBERS


@pytest.mark.parametrize("key", RANGES)
def test_numbers_out_of_range(key):
    low, high = RANGES[key]
    kind = type(KNOBS[key])
    bad = [kind(low - 1), kind(high + 1)] + ([float("nan")] if kind is float else [])
    for value in bad if high < float("inf") else [kind(low - 1), float("nan")]:
        assert (
            refusal(key, value) == f"config.{key} is {value}; it must lie between {low} and {high}"
        )
    for value in (kind(low), kind(high)):
        given = with_options(**{key: value})
        try:
            check(given)
        except ValueError as error:  # a limit may contradict another option, but it is in range
            assert "must lie between" not in str(error)


@pytest.mark.parametrize("key", CHOICES)
def test_names_that_are_no_choice(key):
    allowed = ", ".join(map(str, CHOICES[key]))
    value = 2 if key == "data.channels" else "no such name"
    assert refusal(key, value) == f"unknown config.{key} {value!r}; choose one of {allowed}"
    for choice in CHOICES[key]:
        check(with_options(**{key: choice}))


@pytest.mark.parametrize("key", SPECS)
def test_specs(key):
    names = list(SPECS[key])
    assert (
        refusal(key, "no_such_name")
        == f"unknown config.{key} 'no_such_name'; choose one of {', '.join(names)}"
    )
    assert refusal(key, f"{names[0]}(tua=1)").startswith(
        f"config.{key} {names[0]!r} has no argument 'tua'; it "
    )
    assert refusal(key, "a b").startswith(f"config.{key}: cannot read 'a b'; write a name")
    assert refusal(key, "").startswith(f"config.{key}: cannot read ''; write a name")


@pytest.mark.parametrize(
    "key, value, line",
    [
        ("sample.sampler", "ddim(eta=2.0)", "eta 2.0 is out of range"),
        (
            "evaluate.sampler",
            "ddpm(variance='smal')",
            "unknown variance 'smal' (did you mean 'small'?); choose one of small",
        ),
        (
            "train.learning_rate_decay",
            "cosine(length='ten steps')",
            "cannot read the duration 'ten steps'",
        ),
        (
            "train.learning_rate_decay",
            "cosine(length=10)",
            "cannot read the duration 10; write a number and one of steps",
        ),
        (
            "train.learning_rate_decay",
            "linear(length='10 minutes')",
            "cannot read the duration '10 minutes'",
        ),
        (
            "train.learning_rate_decay",
            "linear(length='0 steps')",
            "learning-rate decay has length 0; use 1 step or more",
        ),
        (
            "train.learning_rate_decay",
            "cosine(length='9 steps', floor=2.0)",
            "learning-rate decay has floor 2.0; use a fraction",
        ),
    ],
)
def test_arguments_are_refused_before_the_training_and_not_when_they_are_first_used(
    key, value, line
):
    assert refusal(key, value).startswith(f"config.{key}: {line}")


def test_needed_arguments():
    assert refusal("train.learning_rate_decay", "cosine") == (
        "config.train.learning_rate_decay 'cosine' needs length; write cosine(length=...)"
    )
    assert (
        refusal("data.source", "folder")
        == "config.data.source 'folder' needs path; write folder(path=...)"
    )
    check(with_options(train__learning_rate_decay="cosine(length='0.5 epochs', floor=0.1)"))


@pytest.mark.parametrize("key", OF_KIND["length"])
def test_lengths(key):
    for text in ("", "ten steps", "5 parsecs", "-5 steps"):
        assert refusal(key, text) == f"config.{key}: cannot read the duration {text!r}{DURATION}"
    assert refusal(key, "10 minutes").endswith("(a length in minutes could not be repeated)")
    for text in ("1 step", "0.5 epochs", "2e6 images"):
        check(with_options(**{key: text}))


def test_a_training_has_a_length_and_needs_no_warmup():
    assert refusal("train.length", "0 epochs").startswith(
        "config.train.length is '0 epochs'; it takes more than nothing"
    )
    check(with_options(train__warmup="0 steps"))
    # a warm-up may be longer than the run
    check(with_options(train__length="12 steps", train__warmup="500 steps"))


@pytest.mark.parametrize("key", [key for key in KNOBS if key.startswith("every.")])
def test_intervals(key):
    for text in ("", "often", "10 steps,", "5 parsecs, 10 steps"):
        line = refusal(key, text)
        assert (
            line.startswith(f"config.{key}: cannot read the duration ")
            and "hours, such as '500 steps'" in line
        )
    for text in ("0 steps", "1000 steps, 10 minutes", "1.5 epochs"):
        check(with_options(**{key: text}, evaluate__num_samples=1000))


@pytest.mark.parametrize("key", INTEGER_TUPLES)
def test_tuples_of_whole_numbers(key):
    low, high = INTEGER_TUPLES[key]
    for value in (
        (low - 1, 1, 1),
        (1, 1, high + 1),
        (1, 1, 2.0),
        (1, 1, "2"),
        (1, 1, True),
        ((1, 2), 1, 1),
    ):
        assert refusal(key, value) == (
            f"config.{key} is {value}; it takes whole numbers between {low} and {high}, such as "
            "(1, 2, 2)"
        )


def test_tuples_of_the_wrong_length():
    assert "takes red, green and blue" in refusal("data.background", (255, 255))
    assert refusal("model.channel_mult", ()).startswith("config.model.channel_mult is empty; ")
    check(with_options(model__attention_resolutions=()))


def test_tags_are_words():
    check(with_options(wandb__tags=("cats", "small")))
    assert (
        refusal("wandb.tags", ("cats", 5))
        == "config.wandb.tags is ('cats', 5); it takes words, such as ('cats', 'small')"
    )


@pytest.mark.parametrize(
    "key, value",
    [(key, None) for key in KNOBS]
    + [(key, True) for key, value in KNOBS.items() if type(value) is int],
)
def test_what_ml_collections_lets_through_is_of_the_wrong_type_still(key, value):
    measured = key in ("train.compile", "train.channels_last")
    takes = "auto, True or False" if measured else defaults.TYPES[type(KNOBS[key])]
    assert refusal(key, value) == f"config.{key} is {value}; it takes {takes}"


def test_contradicting_fields():
    assert complaint(
        check, with_options(train__batch_size=64, train__gradient_accumulation_steps=5)
    ) == (
        "config.train.batch_size 64 cannot be cut into 5 equal micro-batches; choose "
        "gradient_accumulation_steps among the divisors of 64"
    )
    for section in ("sample", "evaluate"):
        other = {"sample": "evaluate", "evaluate": "sample"}[section]
        given = with_options(
            **{"diffusion.timesteps": 20, f"{section}.steps": 21, f"{other}.steps": 20}
        )
        assert complaint(check, given) == (
            f"config.{section}.steps is 21 with only 20 timesteps; use 20 or fewer"
        )


# JSON


def odd():
    """A config in which every option is unlike its default and hard on JSON where it can be."""
    given = with_options(
        seed=2**63 - 1,
        data__source="folder(path='data/\"cats\"\\n é')",
        data__flip=True,
        data__background=(0, 1, 2),
        model__channel_mult=(1,),
        model__attention_resolutions=(),
        train__learning_rate=1 / 3,
        train__gradient_clip=2,
        ema__decay=1e-300,
        wandb__tags=("a, b", "é"),
        wandb__group="two\nlines",
    )
    check(given)
    return given


@pytest.mark.parametrize("make", [base, odd])
@pytest.mark.parametrize("form", [lambda given: given, freeze], ids=["open", "frozen"])
def test_json_round_trip(make, form):
    given = form(make())
    back = from_json(to_json(given))
    assert isinstance(back, FrozenConfigDict) and back == freeze(given)
    before = flatten(given)
    after = flatten(back)
    assert before == after and list(before) == list(after)
    assert [type(value) for value in before.values()] == [type(value) for value in after.values()]
    assert from_json(to_json(back)) == back and to_json(back) == to_json(given)
    check(back)


def test_a_saved_config_of_an_older_version_takes_the_defaults():
    saved = json.loads(to_json(base()))
    del saved["sample"]["spacing"], saved["wandb"]
    saved["train"]["batch_size"] = 7
    assert from_json(json.dumps(saved)) == freeze(with_options(train__batch_size=7))


@pytest.mark.parametrize(
    "said, name",
    [
        ({}, "sigmoid_eps(bias=1.0)"),
        ({"format": 1}, "sigmoid_eps(bias=1.0)"),
        ({"format": 2}, "sigmoid(bias=1.0)"),
    ],
)
def test_a_name_means_what_it_meant_in_the_format_of_a_saved_config(said, name):
    """`sigmoid` was a weighting without the derivative of the log-SNR before there was a format."""
    saved = said | {
        "diffusion": {"weighting": "sigmoid(bias=1.0)", "beta_schedule": "sigmoid(tau=0.5)"}
    }
    back = from_json(json.dumps(saved))
    assert back.diffusion.weighting == name and back.diffusion.beta_schedule == "sigmoid(tau=0.5)"
    assert from_json(to_json(back)) == back
    for other in ("sigmoid_eps", "p2"):
        assert (
            from_json(json.dumps(said | {"diffusion": {"weighting": other}})).diffusion.weighting
            == other
        )


@pytest.mark.parametrize("said", [{}, {"format": 1}, {"format": 2}])
def test_a_renamed_value_goes_on_in_saved_configs_and_is_explained_in_given_ones(said):
    for old, new in (
        ("unet_mp", "unet_edm2"),
        (" unet_mp ( )", "unet_edm2 ( )"),
        ("dit(width=32)", "dit(width=32)"),
    ):
        back = from_json(json.dumps(said | {"model": {"name": old}, "wandb": {"group": "unet_mp"}}))
        assert back.model.name == new and back.wandb.group == "unet_mp"
        check(back)
    for old in ("unet_mp", "unet_mp()"):
        assert complaint(check, with_options(model__name=old)) == (
            f"config.model.name is {old!r}, which is called 'unet_edm2' now; write "
            "--config.model.name=unet_edm2"
        )


def saved_before():
    """A config.json of the version with 106 options, most of those that moved unlike default."""
    return (ROOT / "tests/golden/options_before_moving.json").read_text()


MOVED_TO = {  # the options of that file that moved
    "data.background": (1, 2, 3),
    "model.conventions": "openai(norm_num_groups=2, augmentation_place='after')",
    "train.spike_threshold": 20.0,
    "ema.extra_decays": (0.999,),
    "ema.sigma_rels": (0.05, 0.1),
    "sample.guide_checkpoint": "",
    "evaluate.extractor": "inception(weights='weights.pth')",
    "evaluate.likelihood": "both(images=8, nfe=16)",
}


def test_options_of_earlier_versions_are_read_where_they_are_now():
    back = from_json(saved_before())
    check(back)
    options = flatten(back)
    assert {key: options[key] for key in MOVED_TO} == MOVED_TO
    assert from_json(to_json(back)) == back
    flat = flatten(json.loads(saved_before()))  # as W&B has it
    assert flat["data.matte"] == [1, 2, 3] and from_json(json.dumps(flat)) == back


def test_every_option_that_moved_is_one_that_is_gone_and_goes_to_one_that_is_there():
    for key, now in defaults.RENAMED_OPTIONS.items():
        if not now:
            assert key not in defaults.OPTIONS and defaults.moved(key) == " (it was removed)"
            continue
        option = config_files.option_of(now)
        assert key not in defaults.OPTIONS and option in defaults.OPTIONS, key
        note = defaults.moved(key)
        assert note == defaults.moved(f"config.{key}") and option in note
        if now != option:
            entries = config_check.table(defaults.OPTIONS[option].choices[-1]).values()
            argument = now.rstrip(")").partition("(")[2]
            assert any(argument in config_files.usual_arguments(entry) for entry in entries), key
    assert defaults.moved("data.matte") == " (it is data.background now)"
    assert defaults.moved("model.norm_eps") == (
        " (it is an argument now: model.conventions='NAME(norm_eps=...)')"
    )


@pytest.mark.parametrize(
    "model, conventions",
    [
        ({}, "ho"),
        ({"norm_num_groups": 32}, "ho(norm_num_groups=32)"),
        # what ADM's recipe and improved DDPM's saved; padding has no effect with resblock_updown
        (
            {"freq_shift": 0, "norm_eps": 1e-5, "initialization": "torch"},
            "openai(downsample_padding=0)",
        ),
        (
            {"freq_shift": 0, "norm_eps": 1e-5, "initialization": "torch", "resblock_updown": True},
            "openai",
        ),
        (
            {"freq_shift": 0, "norm_eps": 1e-5, "initialization": "torch", "downsample_padding": 1},
            "openai",
        ),
        ({"freq_shift": 0}, "ho(freq_shift=0)"),
        ({"norm_eps": 0.001, "downsample_padding": 1}, "ho(downsample_padding=1, norm_eps=0.001)"),
    ],
)
def test_the_conventions_of_a_saved_config_have_the_fewest_arguments(model, conventions):
    """So that a run goes on by the command that has the code's name alone."""
    usual = {
        "augmentation_place": "before",
        "downsample_padding": 0,
        "freq_shift": 1,
        "initialization": "glorot",
        "noise_embedding": "auto",
        "norm_eps": 1e-6,
        "norm_num_groups": 0,
    }
    back = from_json(json.dumps({"format": 2, "model": usual | model}))
    assert back.model.conventions == conventions
    check(back)
    assert build.conventions(back) == usual | {
        key: value for key, value in model.items() if key != "resblock_updown"
    } | ({"downsample_padding": 1} if "resblock_updown" in model else {})
    assert from_json(to_json(back)) == back


@pytest.mark.parametrize(
    "source, extractor, weights, now",
    [
        ("digits", "auto", "", "auto"),
        ("digits", "auto", "a.pth", "auto"),
        ("folder(path='cats')", "auto", "", "auto"),
        ("folder(path='cats')", "auto", "a.pth", "inception(weights='a.pth')"),
        ("folder(path='cats')", "none", "a.pth", "none"),
        ("digits", "inception", "", "inception"),
        ("digits", "inception", "a.pth", "inception(weights='a.pth')"),
        ("digits", "digits", "a.pth", "digits"),
    ],
)
def test_the_weights_of_a_saved_extractor_are_its_argument(source, extractor, weights, now):
    saved = {
        "data": {"source": source},
        "evaluate": {"extractor": extractor, "inception_weights": weights},
    }
    assert from_json(json.dumps(saved)).evaluate.extractor == now


@pytest.mark.parametrize(
    "given, likelihood",
    [
        ({}, "none"),
        ({"likelihood": "none", "likelihood_images": 5}, "none"),
        ({"likelihood": "bound"}, "bound"),
        ({"likelihood": "flow", "likelihood_images": 256, "likelihood_evaluations": 100}, "flow"),
        ({"likelihood": "both", "likelihood_evaluations": 40}, "both(nfe=40)"),
    ],
)
def test_the_counts_of_a_saved_likelihood_are_its_arguments(given, likelihood):
    assert from_json(json.dumps({"evaluate": given})).evaluate.likelihood == likelihood


@pytest.mark.parametrize(
    "value, line",
    [
        ("bound(images=0)", "images is 0; it must lie between 1 and 10000000"),
        ("both(nfe=3)", "nfe is 3; it must lie between 4 and 10000"),
    ],
)
def test_counts_of_the_likelihood_out_of_range(value, line):
    assert refusal("evaluate.likelihood", value) == f"config.evaluate.likelihood: {line}"


@pytest.mark.parametrize(
    "value, line",
    [
        ("ho(freq_shift=2)", "freq_shift is 2; it must lie between 0 and 1"),
        ("openai(downsample_padding=-1)", "downsample_padding is -1; it must lie between 0 and 1"),
        ("ho(norm_eps=1.5)", "norm_eps is 1.5; it must lie between 0 and 1"),
        ("ho(norm_num_groups=1025)", "norm_num_groups is 1025; it must lie between 0 and 1024"),
        ("ho(initialization='he')", "unknown initialization 'he'; choose one of glorot, torch"),
        ("ho(augmentation_place='in')", "unknown augmentation_place 'in'; choose one of before"),
        ("ho(noise_embedding='cos')", "unknown noise_embedding 'cos'; choose one of auto, sines"),
    ],
)
def test_conventions_out_of_range(value, line):
    assert refusal("model.conventions", value).startswith(f"config.model.conventions: {line}")


@pytest.mark.parametrize("version", [0, 3, "2", 2.0, True, None, {"a": 1}])
def test_a_saved_config_of_an_unknown_format(version):
    assert complaint(from_json, json.dumps({"format": version, "seed": 3})) == (
        f"the saved config has the format {version!r}, and this version knows 1 to 2; use the "
        "version of ddpm that wrote it"
    )


def test_a_run_of_before_goes_on_under_the_new_name_alone(tmp_path):
    old = json.loads(to_json(with_options(diffusion__weighting="sigmoid")))
    del old["format"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert complaint(
        config_files.check_continues, with_options(diffusion__weighting="sigmoid"), tmp_path
    ) == (
        f"{tmp_path} holds a run with another config (diffusion.weighting: 'sigmoid_eps' there, "
        "'sigmoid' here); give another --workdir or, to continue it, add "
        "--config.diffusion.weighting=sigmoid_eps"
    )
    config_files.check_continues(with_options(diffusion__weighting="sigmoid_eps"), tmp_path)
    with pytest.raises(ValueError, match="holds another run"):
        config_files.check_measures(with_options(diffusion__weighting="sigmoid"), tmp_path)
    config_files.check_measures(with_options(diffusion__weighting="sigmoid_eps"), tmp_path)


@pytest.mark.parametrize(
    "text",
    ["", "{", "not json", "[]", "3", "null", '"text"', "[" * 100_000, '{"train": ' * 100_000],
)
def test_what_is_no_json_object(text):
    assert (
        complaint(from_json, text)
        == "the saved config is not a JSON object; the file is damaged or not one of ours"
    )


@pytest.mark.parametrize(
    "option, line",
    [
        (
            {"train": {"lenght": "5 steps"}},
            "option 'train.lenght' that this version does not know (did you mean 'train.length'?)",
        ),
        ({"train": 5}, "option 'train' that this version does not know"),
        (
            {"train": {"length": {"steps": 5}}},
            "option 'train.length.steps' that this version does not know",
        ),
        ({"__class__": {"x": 1}}, "option '__class__.x' that this version does not know"),
    ],
)
def test_a_saved_config_with_an_unknown_option(option, line):
    assert complaint(from_json, json.dumps(option)).startswith(f"the saved config has an {line}")


@pytest.mark.parametrize(
    "option, line",
    [
        ({"train": {"batch_size": "64"}}, "'64' for train.batch_size; it takes a whole number"),
        ({"train": {"batch_size": 64.0}}, "64.0 for train.batch_size; it takes a whole number"),
        ({"train": {"batch_size": True}}, "True for train.batch_size; it takes a whole number"),
        ({"train": {"learning_rate": "1e-3"}}, "'1e-3' for train.learning_rate; it takes a number"),
        ({"train": {"length": 5}}, "5 for train.length; it takes text"),
        ({"train": {"length": ["5 steps"]}}, "['5 steps'] for train.length; it takes text"),
        ({"data": {"flip": 1}}, "1 for data.flip; it takes True or False"),
        (
            {"model": {"channel_mult": 1}},
            "1 for model.channel_mult; it takes a tuple such as (1, 2)",
        ),
        ({"seed": None}, "None for seed; it takes a whole number"),
    ],
)
def test_a_saved_config_with_a_value_of_another_type(option, line):
    assert complaint(from_json, json.dumps(option)) == f"the saved config has {line}"


def test_a_whole_number_serves_for_a_number():
    back = from_json('{"train": {"gradient_clip": 2}}')
    assert back.train.gradient_clip == 2.0 and type(back.train.gradient_clip) is float


def test_changed():
    given = freeze(base())
    other = changed(given, {"sample.steps": 25, "sample.seed": None, "model.channel_mult": (1, 2)})
    assert (
        isinstance(other, FrozenConfigDict)
        and other.sample.steps == 25
        and other.model.channel_mult == (1, 2)
    )
    assert other.sample.seed == given.sample.seed and given == freeze(base())
    assert complaint(changed, given, {"sample.steps": 2000}).startswith(
        "config.sample.steps is 2000 with only 1000 timesteps"
    )
    # a programmer's mistake: flags offer only what is there
    with pytest.raises((AttributeError, KeyError)):
        changed(given, {"sample.stepps": 5})


def test_tracked_is_flat_and_has_the_names_of_the_flags():
    shown = config_files.tracked(freeze(odd()))
    assert shown["config.train.learning_rate"] == 1 / 3 and shown["config.wandb.tags"] == [
        "a, b",
        "é",
    ]
    assert set(shown) == {f"config.{key}" for key in KNOBS} | {"config.format"}
    assert json.loads(json.dumps(shown)) == shown
    saved = json.dumps({key.removeprefix("config."): value for key, value in shown.items()})
    assert from_json(saved) == freeze(odd())  # as runs come back from W&B


# continuing a run


@pytest.mark.parametrize("key", KNOBS)
def test_what_is_free_is_what_touches_no_number_of_a_step(key):
    free = key in (
        "train.length",
        "train.max_hours",
        "train.activation_checkpointing",
        "train.fully_shard",
        "data.classes",
        "data.cache",
        "data.num_workers",
        "sample.batch_size",
        "sample.compile",
    ) or key.split(".")[0] in ("every", "wandb", "evaluate")
    assert config_files.is_free(key) == free


def test_contradictions_name_the_options():
    saved = freeze(base())
    assert config_files.contradictions(saved, freeze(base())) == []
    free = with_options(
        train__length="9 steps", every__log="1 step", wandb__mode="offline", data__num_workers=3
    )
    assert config_files.contradictions(saved, free) == []
    given = with_options(train__length="9 steps", train__batch_size=32, model__channel_mult=(1, 2))
    assert config_files.contradictions(saved, given) == [
        "model.channel_mult: (1, 2, 2) there, (1, 2) here",
        "train.batch_size: 64 there, 32 here",
    ]


def test_check_continues(tmp_path):
    folder = tmp_path / "run"
    config_files.check_continues(base(), folder)  # nothing there yet
    config_files.write(base(), folder)
    assert (folder / "config.json").read_text() == to_json(base()) + "\n"
    config_files.check_continues(with_options(train__length="9 steps"), folder)
    assert complaint(config_files.check_continues, with_options(train__batch_size=32), folder) == (
        f"{folder} holds a run with another config (train.batch_size: 64 there, 32 here); give "
        "another --workdir or, to continue it, add --config.train.batch_size=64"
    )
    (folder / "config.json").write_text("{")
    assert complaint(config_files.check_continues, base(), folder).startswith(
        f"{folder / 'config.json'}: the saved config is not "
    )


# names of runs


@pytest.mark.parametrize(
    "file, overrides, name",
    [
        ("configs/digits.py", {}, "digits"),
        ("/somewhere/else/digits.py", {}, "digits"),
        ("configs/cats128.py:small", {}, "cats128-small"),
        ("configs/digits.py", {"seed": 3, "sample.seed": 4}, "digits-sample.seed=4-seed=3"),
        (
            "configs/digits.py",
            {"diffusion.timesteps": 50, "model.dropout": 0.1},
            "digits-timesteps=50-dropout=0.1",
        ),
        (
            "configs/digits.py",
            {"model.dropout": 0.1, "diffusion.timesteps": 50},
            "digits-timesteps=50-dropout=0.1",
        ),
        (
            "configs/digits.py",
            {"train.batch_size": 8, "sample.batch_size": 4},
            "digits-train.batch_size=8",
        ),
        ("configs/digits.py", {"train.learning_rate": 1e-5}, "digits-learning_rate=1e-05"),
        ("configs/digits.py", {"model.channel_mult": (1, 2, 4)}, "digits-channel_mult=1_2_4"),
        (
            "configs/digits.py",
            {"data.flip": True, "diffusion.predict": "v"},
            "digits-flip=True-predict=v",
        ),
        (
            "configs/digits.py",
            {"train.length": "9 steps", "every.log": "1 step", "wandb.group": "x y"},
            "digits",
        ),
    ],
)
def test_run_names(file, overrides, name):
    assert config_files.run_name(file, overrides) == name


DIFFERENT = [
    {},
    {"seed": 1},
    {"sample.seed": 1},
    {"seed": 11},
    {"seed": 1, "sample.seed": 1},
    {"model.channel_mult": (1, 2)},
    {"model.channel_mult": (12,)},
    {"model.channel_mult": (1, 2, 2)},
    {"model.attention_resolutions": ()},
    {"train.learning_rate": 0.1},
    {"train.learning_rate": 0.01},
    {"train.learning_rate": 1e-10},
    {"train.init_from": ""},
    {"data.source": "digits"},
    {"data.source": "digits()"},
    {"data.source": "folder(path='a')"},
    {"data.source": "folder(path='a ')"},
    {"data.source": "folder(path='a_b')"},
    {"data.source": "folder(path='a/b')"},
    {"data.source": "folder(path='ä')"},
    {"data.source": "folder(path='猫')"},
    {"data.source": "folder(path='犬')"},
    {"data.source": "folder(path='a b')"},
    {"data.source": "folder_path_a_b"},
    {"data.source": "_digits"},
    {"data.source": "digits-flip=True"},
    {"data.source": "digits", "data.flip": True},
    {"data.source": "digits-flip", "data.flip": True},
    {"data.source": "a\nb"},
    {"train.init_from": "runs/a"},
    {"train.init_from": "runs_a"},
    {"train.init_from": "../etc"},
    {"train.init_from": "x" * 500},
    {"train.init_from": "x" * 501},
    {"train.init_from": "x" * 110},
    {"train.init_from": "é" * 500},
    {"diffusion.beta_schedule": "sigmoid(tau=0.5)"},
    {"diffusion.beta_schedule": "sigmoid(tau=-0.5)"},
    {"diffusion.beta_schedule": "sigmoid(tau=0.5, start=-3.0)"},
    {"diffusion.beta_schedule": "sigmoid(start=-3.0, tau=0.5)"},
]


def test_two_overrides_never_give_one_name_and_every_name_is_a_folders():
    names = [config_files.run_name("configs/digits.py", overrides) for overrides in DIFFERENT]
    for (one, name), (other, same) in combinations(zip(DIFFERENT, names, strict=True), 2):
        assert name != same, (one, other)
    for name in names:
        assert (
            name.isascii()
            and "/" not in name
            and " " not in name
            and name.startswith("digits")
            and len(name) <= 120
        )
    assert names == [
        config_files.run_name("configs/digits.py", overrides) for overrides in DIFFERENT
    ]


def test_variants_that_look_alike_are_told_apart():
    names = {
        config_files.run_name(f"configs/x.py:{variant}", {})
        for variant in ("a_b", "a b", "a/b", "a:b")
    }
    assert len(names) == 4


def test_a_free_option_changes_no_name_even_of_a_hashed_one():
    """Or a longer length would begin a new run instead of prolonging the old one."""
    overrides = {"data.source": "folder(path='data/my cats')"}
    assert config_files.run_name("x.py", overrides) == config_files.run_name(
        "x.py", overrides | {"train.length": "9 steps"}
    )


def test_default_workdir(monkeypatch):
    monkeypatch.delenv("WANDB_SWEEP_ID", raising=False)
    # set by hand: the same command still means the same run
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    assert config_files.default_workdir("configs/digits.py", {"data.flip": True}) == Path(
        "runs/digits-flip=True"
    )
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep7")
    assert config_files.default_workdir("configs/digits.py", {"data.flip": True}) == Path(
        "runs/digits-flip=True-abc123"
    )
    monkeypatch.delenv("WANDB_RUN_ID")
    assert config_files.default_workdir("configs/digits.py", {}) == Path("runs/digits")


def test_variants():
    variants = {"small": {"model.model_channels": 8}, "odd": {"model.no_such_knob": 1}}
    assert defaults.with_variant(base(), None, variants) == base()
    assert defaults.with_variant(base(), "small", variants).model.model_channels == 8
    assert complaint(defaults.with_variant, base(), "smal", variants) == (
        "unknown variant 'smal' (did you mean 'small'?); choose one of small, odd"
    )
    assert (
        complaint(defaults.with_variant, base(), "small", {})
        == "this config file has no variants; leave out ':small'"
    )
    with pytest.raises((AttributeError, KeyError)):
        defaults.with_variant(base(), "odd", variants)


# the command line

FILES = {  # config files that people write
    "syntax.py": "def get_config(variant=None):\n    return (\n",
    "nothing.py": "x = 1\n",
    "forgot.py": "def get_config(variant=None):\n    config = 5\n",
    "undefined.py": "def get_config(variant=None):\n    return foo\n",
    "opens.py": "def get_config(variant=None):\n    open('/')\n",
    "imports.py": "import no_such_library\n",
    "typo.py": "from ddpm.config import base\n\n\ndef get_config(variant=None):\n    config = "
    "base()\n"
    "    config.train.lenght = '5 steps'\n    return config\n",
    "moved.py": "from ddpm.config import base\n\n\ndef get_config(variant=None):\n    config = "
    "base()\n"
    "    config.data.matte = (0, 0, 0)\n    return config\n",
    "wrong_type.py": "from ddpm.config import base\n\n\ndef get_config(variant=None):\n    config "
    "= base()\n"
    "    config.train.batch_size = '64'\n    return config\n",
    "none.py": "from ddpm.config import base\n\n\ndef get_config(variant=None):\n    config = "
    "base()\n"
    "    config.train.gradient_clip = None\n    return config\n",
    "plain.py": "from ddpm.config import base\n\n\ndef get_config():\n    return base()\n",
    "not_base.py": "def get_config(variant=None):\n    return {'train': {'length': '5 steps'}}\n",
    "more.py": "from ddpm.config import base\n\n\ndef get_config(variant=None):\n    config = "
    "base()\n"
    "    with config.unlocked():\n        config.train.colour = 'red'\n    return config\n",
}
DIGITS = f"--config={ROOT}/configs/digits.py"
MISTAKES = [  # the arguments, and what the one line says; (file) is a file of FILES
    ([], "no config given; write --config=configs/digits.py, or another of configs/"),
    (["--config="], "no config given; write --config=configs/digits.py"),
    (["--config=no_such.py"], "there is no config file no_such.py in /"),
    (
        [f"--config={ROOT}/configs"],
        f"there is no config file {ROOT}/configs; configs/ is in the clone",
    ),
    (["--config=(syntax.py)"], "'(' was never closed (syntax.py, line 2)"),
    (
        ["--config=(nothing.py)"],
        "the config file has no function get_config; configs/digits.py shows one",
    ),
    (
        ["--config=(forgot.py)"],
        "get_config of (forgot.py) returns no config; end it with `return config`",
    ),
    (["--config=(undefined.py)"], "(undefined.py), line 2: name 'foo' is not defined"),
    (["--config=(opens.py)"], "(opens.py): cannot use /: Is a directory"),
    (["--config=(imports.py)"], "(imports.py), line 1: No module named 'no_such_library'"),
    (["--config=(typo.py)"], '(typo.py), line 6: Key "lenght" does not exist'),
    (["--config=(typo.py)"], 'Did you mean "length" instead of "lenght"?'),
    (
        ["--config=(wrong_type.py)"],
        "(wrong_type.py), line 6: batch_size cannot be '64'; it takes a whole number",
    ),
    (["--config=(none.py)"], "config.train.gradient_clip is None; it takes a number"),
    (
        ["--config=(plain.py):foo"],
        "the config file takes no variant; leave out what follows ':', or write ",
    ),
    (
        ["--config=(not_base.py)"],
        "(not_base.py) lacks data.augment; begin get_config with `config = base()`",
    ),
    (
        ["--config=(more.py)"],
        "(more.py) has an unknown option train.colour; begin get_config with `config = base()`",
    ),
    (
        [f"--config={ROOT}/configs/edm_cifar10.py:foo"],
        "this config file has no variants; leave out ':foo'",
    ),
    (
        [f"--config={ROOT}/configs/cats128.py:smal"],
        "unknown variant 'smal' (did you mean 'small'?); choose one of small, ",
    ),
    (
        [DIGITS, "--config.train.lenght=5 steps"],
        "there is no option config.train.lenght (did you mean 'train.length'?); ",
    ),
    (
        [DIGITS, "--config.trian.length=5 steps"],
        "there is no option config.trian.length (did you mean 'train.length'?); ",
    ),
    (
        [DIGITS, "--config.nonsense=5"],
        "there is no option config.nonsense; base() in ddpm/config/defaults.py shows them all",
    ),
    (
        [DIGITS, "--config.data.matte=(0,0,0)"],
        "there is no option config.data.matte (it is data.background now); base() in ",
    ),
    (["--config=(moved.py)"], '(moved.py), line 6: Key "matte" does not exist (it is data.ba'),
    (
        [DIGITS, "--config.train=5"],
        "config.train is a section; set one of its options, such as --config.train.",
    ),
    (
        [DIGITS, "--config.train.batch_size=64.5"],
        "config.train.batch_size is '64.5'; it takes a whole number",
    ),
    ([DIGITS, "--config.train.batch_size=1e3"], " '1e3'; it takes a whole number"),
    ([DIGITS, "--config.train.batch_size="], " ''; it takes a whole number"),
    ([DIGITS, "--config.train.batch_size"], "Missing value for flag --config.train.batch_size"),
    (
        [DIGITS, "--config.train.learning_rate=fast"],
        "config.train.learning_rate is 'fast'; it takes a number",
    ),
    (
        [DIGITS, "--config.train.learning_rate=nan"],
        "config.train.learning_rate is nan; it must lie between 0 and 1",
    ),
    ([DIGITS, "--config.data.flip=maybe"], "config.data.flip is 'maybe'; it takes True or False"),
    (
        [DIGITS, "--config.data.source=data/cats"],
        """for a folder of images write "folder(path='data/cats')"\n""",
    ),
    ([DIGITS, "--config.model.channel_mult=(1,2"], "; it takes a tuple such as (1, 2)"),
    (
        [DIGITS, "--config.model.channel_mult=(1,2.5)"],
        "config.model.channel_mult is (1, 2.5); it takes whole numbers between ",
    ),
    (
        [DIGITS, "--config.seed=-1"],
        "config.seed is -1; it must lie between 0 and 9223372036854775807",
    ),
    (
        [DIGITS, "--config.diffusion.beta_schedule=cosin"],
        "unknown config.diffusion.beta_schedule 'cosin' (did you mean 'cosine'?); choose one of ",
    ),
    (
        [DIGITS, "--config.diffusion.beta_schedule=sigmoid(tua=1.0)"],
        "config.diffusion.beta_schedule 'sigmoid' has no argument 'tua'; it accepts start, end, tau",
    ),
    (
        [DIGITS, "--config.diffusion.beta_schedule=sigmoid(tau=0.0)"],
        "does not add noise at every step; choose other arguments",
    ),
    (
        [DIGITS, "--config.diffusion.beta_schedule=__import__('os')"],
        "config.diffusion.beta_schedule: cannot read",
    ),
    (
        [DIGITS, "--config.sample.sampler=ddim(eta=2.0)"],
        "config.sample.sampler: eta 2.0 is out of range",
    ),
    ([DIGITS, "--config.data.channels=2"], "unknown config.data.channels 2; choose one of 1, 3, 4"),
    ([DIGITS, "stray"], "did not expect 'stray'; flags are written --name=value"),
    ([DIGITS, "--config.seed", "1", "2"], "did not expect '2'; flags are written --name=value"),
    (
        [DIGITS, "--wrkdir=x"],
        "there is no flag --wrkdir (did you mean --workdir?); --help shows them all",
    ),
    ([DIGITS, "--wxyz=1"], "there is no flag --wxyz; --help shows them all"),
    (
        ["--config.seed=1", DIGITS],
        "--config.x=... without --config=FILE before it; write --config=configs/digits.py",
    ),
    (
        [DIGITS, "--config.train.gradient_accumulation_steps=5"],
        "config.train.batch_size 32 cannot be cut into 5 equal "
        "micro-batches; choose gradient_accumulation_steps among the divisors of 32",
    ),
    (
        [DIGITS, "--config.sample.steps=2000"],
        "config.sample.steps is 2000 with only 1000 timesteps; use 1000 or fewer",
    ),
    (
        [DIGITS, "--config.data.image_size=30"],
        "image_size 30 cannot be halved 2 times; use 28 or 32, or a shorter channel_mult",
    ),
    (
        [DIGITS, "--config.train.length=ten steps"],
        "config.train.length: cannot read the duration 'ten steps'" + DURATION,
    ),
    (
        [DIGITS, "--config.train.length=10 minutes"],
        "config.train.length: cannot read the duration '10 minutes'"
        + DURATION
        + " (a length in minutes could not be repeated)",
    ),
    (
        [DIGITS, "--config.every.log=often"],
        "config.every.log: cannot read the duration 'often'; write a number and one of ",
    ),
    (
        [DIGITS, "--config.data.source=folder(path='no/such')"],
        "no/such' does not exist; put images there, or give the path of a folder that holds images: "
        "--config.data.source=",
    ),
    ([DIGITS, "--config.train.init_from=no/such"], "no/such is neither a file nor a run folder"),
    ([DIGITS, f"--workdir={__file__}/run"], "a file is in the way; choose another place"),
]


def meet(cases):
    """Run the command on each command line of `cases`, each in a fork of this process, which has
    paid for the imports already.
    """
    answers = []
    for arguments in cases:
        read, write = zip(os.pipe(), os.pipe(), strict=True)
        child = os.fork()
        if not child:
            for end, number in zip(write, (1, 2), strict=True):
                os.dup2(end, number)
            sys.argv = ["ddpm/main.py", *arguments]
            code = 99
            try:
                flags.read_command_line()
                flags.run_command(main.main)
            except SystemExit as leaving:
                code = leaving.code or 0
            finally:
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
        for end in write:
            os.close(end)
        # far less than a pipe holds, so one after the other
        out, err = (open(end, closefd=True).read() for end in read)
        answers.append([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), out, err])
    print(json.dumps(answers))


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """(exit code, stdout, stderr) for each of MISTAKES, the folder of the config files, and what
    the commands left behind.
    """
    files = tmp_path_factory.mktemp("files")
    cwd = tmp_path_factory.mktemp("cwd")
    for name, text in FILES.items():
        (files / name).write_text(text)
    cases = [[within(argument, files) for argument in arguments] for arguments, _ in MISTAKES]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "WANDB_MODE": "disabled"}
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(cases),
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), files, sorted(path.name for path in cwd.iterdir())


def within(text, folder):
    """The text with each (file) of FILES in its folder."""
    for name in FILES:
        text = text.replace(f"({name})", str(folder / name))
    return text


@pytest.mark.parametrize(
    "place",
    range(len(MISTAKES)),
    ids=lambda place: " ".join(MISTAKES[place][0]).replace(str(ROOT), ""),
)
def test_a_mistake_is_one_line_and_exit_code_2(place, answers):
    said, files, _ = answers
    code, out, err = said[place]
    assert code == errors.USAGE_ERROR, err
    assert err.startswith("error: ") and err.endswith("\n") and len(err.splitlines()) == 1, err
    assert within(MISTAKES[place][1], files) in err
    assert "Traceback" not in err + out


def test_mistakes_leave_nothing_behind(answers):
    assert answers[2] == []


def test_the_command_itself(tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "ddpm.main"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert (
        done.stderr
        == "error: no config given; write --config=configs/digits.py, or another of configs/\n"
    )


def test_configs_are_locked_dicts_until_they_are_frozen():
    assert isinstance(base(), ConfigDict) and base().is_locked
    with pytest.raises(AttributeError):
        freeze(base()).train.batch_size = 3


if __name__ == "__main__":
    meet(json.load(sys.stdin))


@pytest.mark.parametrize(
    "changes, groups",
    [
        ({"model.model_channels": 192}, 0),
        ({"model.model_channels": 64}, 32),
        ({"model.model_channels": 128}, 0),
        ({"model.model_channels": 64, "model.channel_mult": (2, 4)}, 0),
        ({"model.name": "dit"}, 0),
        ({"model.name": "unet_edm2"}, 0),
    ],
)
def test_groups_of_a_config_from_before_make_the_same_network(changes, groups):
    """Files of format 1 say 32 groups, or are older than the option; a run goes on by the same
    command where 0 is the same.
    """
    options = defaults.flatten(config_files.changed(defaults.freeze(defaults.base()), changes)) | {
        "model.norm_num_groups": 32
    }
    del options["model.conventions"]
    nested = {}
    for key, value in options.items():
        section, _, leaf = key.rpartition(".")
        (nested.setdefault(section, {}) if section else nested)[leaf] = value
    for lacking in (False, True):
        if lacking:
            del nested["model"]["norm_num_groups"]
        for form in ({}, {"format": 1}):
            back = config_files.from_json(json.dumps(form | nested))
            assert build.conventions(back)["norm_num_groups"] == groups
    nested["model"]["norm_num_groups"] = 32
    back = config_files.from_json(json.dumps({"format": 2} | nested))
    assert build.conventions(back)["norm_num_groups"] == 32
