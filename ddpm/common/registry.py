"""Names with arguments: `"sigmoid(tau=0.5)"` picks an entry of a table and sets its arguments.

Schedules, samplers, datasets and so on are literal dicts of functions. The arguments that the text
may set are the keyword-only ones; the caller passes the others. One string thus serves as a config
value, flag or sweep value, checked against the signature of the function.
"""

import ast
import difflib
import functools
import inspect
import re

# surrogates in a path, for bytes outside the locale's encoding (PEP 383)
STRAY = re.compile("[\ud800-\udfff]")


def parse(text):
    """Parse `"name(key=value, ...)"`, values Python literals, into `(name, {key: value})`.

    Raises ValueError for any other text.
    """
    mistake = ValueError(
        f'cannot read {text!r}; write a name, or a name with arguments such as "name(key=0.5)"'
    )
    try:
        node = ast.parse(
            STRAY.sub(lambda byte: f"\\u{ord(byte[0]):04x}", str(text).strip()), mode="eval"
        ).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # the last two: nested too deeply
        raise mistake from None
    if isinstance(node, ast.Name):
        return node.id, {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args):
        raise mistake
    try:
        arguments = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
    except (ValueError, TypeError):
        raise mistake from None
    if None in arguments or len(arguments) < len(node.keywords):  # **unpacked, or a key given twice
        raise mistake
    return node.func.id, arguments


def spell(name, arguments):
    """The text that `parse` reads as a name and its arguments."""
    words = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return f"{name}({words})" if arguments else name


def suggest(name, allowed):
    """`" (did you mean 'cosine'?)"` if an allowed name is similar, else ""."""
    names = [candidate for candidate in allowed if isinstance(candidate, str)]
    close = difflib.get_close_matches(str(name), names, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def quantity(number, thing, things=None):
    """`"1 image"`, `"1,200 images"`; `things` is an irregular plural."""
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def check_choice(kind, value, allowed):
    """Return `value` if it is one of `allowed`; raises a ValueError that lists them otherwise."""
    if value not in allowed:
        raise ValueError(
            f"unknown {kind} {value!r}{suggest(value, allowed)}; choose one of "
            f"{', '.join(map(str, allowed))}"
        )
    return value


def resolve(kind, table, text):
    """Return the entry of `table` that `text` names, as a partial with its arguments set.

    Raises ValueError for an unknown name, or a wrong, missing or mistyped argument.
    """
    name, arguments = parse(text)
    entry = table[check_choice(kind, name, list(table))]
    parameters = inspect.signature(entry).parameters.values()
    options = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    for key, value in arguments.items():
        if key not in options:
            accepts = f"it accepts {', '.join(options)}" if options else "it takes none"
            raise ValueError(f"{kind} {name!r} has no argument {key!r}; {accepts}")
        default = options[key]
        known = default is not inspect.Parameter.empty and default is not None
        number = isinstance(value, int) and not isinstance(value, bool) and type(default) is float
        if known and not number and type(value) is not type(default):
            raise ValueError(
                f"{kind} {name!r} takes {key} as {type(default).__name__}, such as {default!r}; "
                f"got {value!r}"
            )
    missing = [
        key
        for key, default in options.items()
        if default is inspect.Parameter.empty and key not in arguments
    ]
    if missing:
        example = ", ".join(f"{key}=..." for key in missing)
        raise ValueError(f"{kind} {name!r} needs {', '.join(missing)}; write {name}({example})")
    return functools.partial(entry, **arguments)
