"""Stands in for the interpreter in tests: a module, code or a file runs in a fork of
tests/support/launcher.py; it gets the signals, and its exit code is the one of this process. With
other options Python itself runs.

commands.python() copies this file as `python` next to the launcher's socket.
"""

import contextlib
import json
import os
import signal
import socket
import sys

PASSED_ON = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}


def read_number(lines):
    line = lines.readline()
    if not line:
        sys.exit("the launcher of the tests has ended")
    return int(line)


def main(words):
    environment = dict(os.environ)
    if words[:1] == ["-u"]:  # as torchrun starts its ranks
        words = words[1:]
        environment["PYTHONUNBUFFERED"] = "1"
    forked = words and (words[0] in ("-m", "-c") or words[0][0] != "-")
    if not forked or "PYTHONIOENCODING" in environment:  # which only a new interpreter reads
        os.execv(sys.executable, [sys.executable, *words])
    request = {
        "words": words,
        "cwd": os.getcwd(),
        "env": environment,
        "ignored": [number for number in PASSED_ON if signal.getsignal(number) is signal.SIG_IGN],
    }
    signal.pthread_sigmask(signal.SIG_BLOCK, PASSED_ON)
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(os.path.join(os.path.dirname(os.path.abspath(__file__)), "socket"))
    text = json.dumps(request).encode() + b"\n"
    sent = socket.send_fds(connection, [text], [0, 1, 2])
    connection.sendall(text[sent:])
    with connection.makefile() as lines:
        child = read_number(lines)

        def pass_on(number, _):
            with contextlib.suppress(ProcessLookupError):  # it has just ended
                os.kill(child, number)

        for number in PASSED_ON.difference(request["ignored"]):
            signal.signal(number, pass_on)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)
        code = read_number(lines)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
