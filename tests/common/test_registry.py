"""Names with arguments: the messages word for word, hostile texts, and checks against the
functions' own signatures.
"""

import pytest

from ddpm.common import registry

HINT = 'write a name, or a name with arguments such as "name(key=0.5)"'


def linear(timesteps):
    return ("linear", timesteps)


def cosine(timesteps, *, s=0.008):
    return ("cosine", timesteps, s)


def sigmoid(timesteps, *, start=-3.0, end=3.0, tau=1.0):
    return ("sigmoid", timesteps, start, end, tau)


def folder(size, *, path, only=None, limit=10, flip=False, colour=(0, 0, 0), mode="fast"):
    return (size, path, only, limit, flip, colour, mode)


SCHEDULES = {"linear": linear, "cosine": cosine, "quadratic": linear, "sigmoid": sigmoid}
SOURCES = {"folder": folder}


def complaint(function, *arguments):
    """The one line of the ValueError that a call raises."""
    with pytest.raises(ValueError) as caught:
        function(*arguments)
    line = str(caught.value)
    assert len(line.splitlines()) == 1 and type(caught.value) is ValueError
    return line


def test_the_messages_of_the_design():
    assert complaint(registry.resolve, "schedule", SCHEDULES, "cosin") == (
        "unknown schedule 'cosin' (did you mean 'cosine'?); choose one of linear, cosine, "
        "quadratic, sigmoid"
    )
    assert complaint(registry.resolve, "schedule", SCHEDULES, "sigmoid(tua=0.5)") == (
        "schedule 'sigmoid' has no argument 'tua'; it accepts start, end, tau"
    )


@pytest.mark.parametrize(
    "text, meaning",
    [
        ("cosine", ("cosine", {})),
        ("  cosine  ", ("cosine", {})),
        ("cosine()", ("cosine", {})),
        ("sigmoid(tau=0.5)", ("sigmoid", {"tau": 0.5})),
        ("sigmoid( start = -3.0 , tau=1e-3 )", ("sigmoid", {"start": -3.0, "tau": 1e-3})),
        (
            "f(a=(1, 2), b='x, y(z)', c=True, d=None, e=[1])",
            ("f", {"a": (1, 2), "b": "x, y(z)", "c": True, "d": None, "e": [1]}),
        ),
        (r"folder(path='data/my cats/é')", ("folder", {"path": "data/my cats/é"})),
    ],
)
def test_parse(text, meaning):
    assert registry.parse(text) == meaning


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os')",
        "f(x=__import__('os'))",
        "f(x=g(1))",
        "f(g(x=1))",
        "f()()",
        "os.system(x=1)",
        "f(1)",
        "f(1, x=2)",
        "f(*x)",
        "f(**{'x': 1})",
        "f(x=1, x=2)",
        "f(x=y)",
        "f(x=1 if 1 else 2)",
        "f(x=lambda: 0)",
        "f(x=9**9)",
        "f(x=f'{1}')",
        "f(x={[]: 1})",
        "f(x",
        "f)",
        "a b",
        "a; b",
        "a\nb",
        "x = 1",
        "(yield)",
        "",
        "   ",
        "a\0b",
        "f(x='\0')",
        "\ud800",
        "1",
        "'cosine'",
        "[]",
        "f(x=" + "9" * 5000 + ")",
    ],
    ids=lambda text: ascii(text)[:30],
)
def test_what_is_not_a_name_with_literal_arguments_is_never_run(text):
    assert complaint(registry.parse, text) == f"cannot read {text!r}; {HINT}"


@pytest.mark.parametrize(
    "text",
    [
        "(" * 10_000,
        "(" * 10_000 + "a" + ")" * 10_000,
        "f(x=" + "[" * 10_000 + "]" * 10_000 + ")",
        "f(x=" + "-" * 100_000 + "1)",
        "f" + "()" * 50_000,
        "a" + ".b" * 100_000,
        "f(x=" + "1+" * 100_000 + "1j)",
        "not " * 100_000 + "a",
    ],
    ids=lambda text: text[:8],
)
def test_deep_nesting_is_refused_like_any_other_text(text):
    assert complaint(registry.parse, text).startswith("cannot read")


@pytest.mark.parametrize(
    "given", [None, 3, 0.5, True, ("cosine",), b"cosine", {"name": "cosine"}], ids=repr
)
def test_what_is_not_text_is_refused(given):
    assert complaint(registry.parse, given) == f"cannot read {given!r}; {HINT}"


def test_choose_sets_the_options_and_leaves_the_rest_to_the_caller():
    assert registry.resolve("schedule", SCHEDULES, "linear")(10) == ("linear", 10)
    assert registry.resolve("schedule", SCHEDULES, "sigmoid(tau=0.5, start=-2.0)")(10) == (
        "sigmoid",
        10,
        -2.0,
        3.0,
        0.5,
    )
    assert registry.resolve("source", SOURCES, "folder(path='x', flip=True, colour=(1, 2, 3))")(
        8
    ) == (8, "x", None, 10, True, (1, 2, 3), "fast")


def test_whole_numbers_serve_for_floats_and_bools_for_nothing_else():
    assert registry.resolve("schedule", SCHEDULES, "sigmoid(tau=2)")(10)[-1] == 2
    assert complaint(registry.resolve, "schedule", SCHEDULES, "sigmoid(tau=True)") == (
        "schedule 'sigmoid' takes tau as float, such as 1.0; got True"
    )
    assert complaint(registry.resolve, "source", SOURCES, "folder(path='x', limit=True)") == (
        "source 'folder' takes limit as int, such as 10; got True"
    )


@pytest.mark.parametrize(
    "argument, wanted",
    [
        ("limit=2.0", "int, such as 10; got 2.0"),
        ("limit='2'", "int, such as 10; got '2'"),
        ("flip=1", "bool, such as False; got 1"),
        ("mode=1", "str, such as 'fast'; got 1"),
        ("mode=None", "str, such as 'fast'; got None"),
        ("colour=[1, 2, 3]", "tuple, such as (0, 0, 0); got [1, 2, 3]"),
    ],
)
def test_a_value_has_the_type_of_the_default(argument, wanted):
    line = complaint(registry.resolve, "source", SOURCES, f"folder(path='x', {argument})")
    assert line == f"source 'folder' takes {argument.split('=')[0]} as {wanted}"


def test_a_default_of_none_says_nothing_about_the_type():
    for value in ("'cats'", "3", "None", "(1,)"):
        registry.resolve("source", SOURCES, f"folder(path='x', only={value})")


def test_missing_and_unknown_options():
    assert (
        complaint(registry.resolve, "source", SOURCES, "folder")
        == "source 'folder' needs path; write folder(path=...)"
    )
    assert complaint(registry.resolve, "schedule", SCHEDULES, "linear(tau=1.0)") == (
        "schedule 'linear' has no argument 'tau'; it takes none"
    )
    # what stands before the options belongs to the caller
    assert complaint(registry.resolve, "schedule", SCHEDULES, "cosine(timesteps=5)") == (
        "schedule 'cosine' has no argument 'timesteps'; it accepts s"
    )


def test_check_choice_and_suggest():
    assert registry.check_choice("mode", "online", ("online", "offline")) == "online"
    assert (
        complaint(registry.check_choice, "size", 2, (1, 3, 4))
        == "unknown size 2; choose one of 1, 3, 4"
    )
    assert registry.suggest("ofline", ["online", "offline"]) == " (did you mean 'offline'?)"
    assert registry.suggest("zzz", ["online", "offline"]) == ""
