"""Names that carry arguments: `"sigmoid(tau=0.5)"` picks an entry of a table and sets its options.

Every axis of the bench (schedules, samplers, datasets, ...) is a literal dict of functions. The
options of an entry are its keyword-only arguments; what stands before them is filled in by the
caller. So one text can sit in a config field, on the command line or in a sweep, and is checked
against the function's own signature.
"""

import ast
import difflib
import functools
import inspect
import re

# what stands in a path for a byte that the locale's encoding does not know (PEP 383)
STRAY = re.compile("[\ud800-\udfff]")


def parse(text):
    """Split `"name(key=value, ...)"` into `(name, {key: value})`; values are Python literals.

    Raises ValueError for anything that is not a name with literal keyword arguments.
    """
    mistake = ValueError(
        f'cannot read {text!r}; write a name, or a name with arguments such as "name(key=0.5)"'
    )
    try:
        node = ast.parse(
            STRAY.sub(lambda byte: f"\\u{ord(byte[0]):04x}", str(text).strip()), mode="eval"
        ).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        # the last two: nested too deeply for the parser
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


def suggest(given, allowed):
    """`" (did you mean 'cosine'?)"` where one of the allowed names is close to the given one,
    else nothing.
    """
    close = difflib.get_close_matches(
        str(given), [name for name in allowed if isinstance(name, str)], n=1
    )
    return f" (did you mean {close[0]!r}?)" if close else ""


def quantity(number, thing, things=None):
    """So many things in words, `"1 image"` and `"1,200 images"`; `things` where the plural takes
    more than an s.
    """
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def check_choice(kind, given, allowed):
    """Return `given` if it is one of `allowed`; raises a ValueError that lists them otherwise."""
    if given not in allowed:
        raise ValueError(
            f"unknown {kind} {given!r}{suggest(given, allowed)}; choose one of "
            f"{', '.join(map(str, allowed))}"
        )
    return given


def resolve(kind, table, text):
    """Return the table's entry that `text` names, as a partial with its options set.

    Options are the entry's keyword-only parameters. Raises ValueError for an unknown name, an
    unknown or missing option, or a value of another type than the option's default.
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
