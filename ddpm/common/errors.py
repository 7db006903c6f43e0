"""Exit codes of the commands, and an exception as one line of text."""

import errno

DONE = 0
FAILED = 1
USAGE_ERROR = 2
DIVERGED = 3
INTERRUPTED = 75  # stopped on request; the same command continues
STOPPED = 130  # stopped on request by a command that starts again
NO_READER = 141  # the reader of stdout has gone, as a shell reports SIGPIPE

FULL = errno.ENOSPC, errno.EDQUOT  # the disk, or the user's quota, is full


def one_line_with_type(error, limit=200):
    """`"OSError: no space left"`: type (not of W&B's UsageError) and message on one line."""
    kind = "" if type(error).__name__ == "UsageError" else f"{type(error).__name__}: "
    return " ".join(f"{kind}{error}".split())[:limit]


def one_line(error):
    """The message of an exception on one line; an OSError names the file and the remedy."""
    if isinstance(error, OSError) and error.strerror:
        remedy = "free some space, or " if error.errno in FULL else ""
        return (
            f"cannot use {error.filename or 'the disk'}: {error.strerror}; {remedy}give "
            "another place"
        )
    message = error
    # str() of these is a repr; their argument may be another such error
    while isinstance(message, (AttributeError, KeyError)) and message.args:
        message = message.args[0]
    text = " ".join(str(message).split())
    return text if " " in text else f"{type(error).__name__} {text}".strip()
