"""Exit codes of the commands, and one line for an exception."""

import errno

STOPPED = 130
# exit codes of a command that is interrupted; the second where the same command goes on
GOES_ON = 75


def one_line_with_type(problem):
    """An exception in one line, with its type but for W&B's UsageError, whose words say it all."""
    kind = [] if type(problem).__name__ == "UsageError" else [f"{type(problem).__name__}:"]
    return " ".join([*kind, *str(problem).strip().splitlines()[:1]])


FULL = errno.ENOSPC, errno.EDQUOT  # what a full disk is called
DONE = 0
FAILED = 1
USAGE_ERROR = 2
DIVERGED = 3
NO_READER = 141  # the reader of stdout has gone, as a shell reports SIGPIPE
INTERRUPTED = GOES_ON


def one_line(error):
    """What an exception says, on one line and without its type where it speaks for itself."""
    if isinstance(error, OSError) and error.strerror:
        remedy = "free some space, or " if error.errno in FULL else ""
        return (
            f"cannot use {error.filename or 'the disk'}: {error.strerror}; {remedy}give "
            "another place"
        )
    said = error
    # whose text is a repr, or another such error
    while isinstance(said, (AttributeError, KeyError)) and said.args:
        said = said.args[0]
    text = " ".join(str(said).split())
    return text if " " in text else f"{type(error).__name__} {text}".strip()
