"""Starts Python programs by forking a process that has the libraries already, without the seconds
that importing torch, wandb and scikit-learn takes. The package itself is imported again in each
child.

`python launcher.py SOCKET STANDIN` listens at a Unix socket for tests/support/standin.py, which is
the interpreter that the children know, and prints a line when it is ready. A connection sends the
file descriptors of stdin, stdout and stderr and a line of JSON, {"words", "cwd", "env",
"ignored"}. The answer is a line with the child's process id, and a line with its exit code when it
ends. A child is killed when its connection closes, and all end with stdin.
"""

import atexit
import contextlib
import io
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import weakref

OWN_PATH = list(sys.path[1:])


def become(request, streams, standin):
    """Turn this process into the one that `python WORDS` would start, to its end."""
    for number, handle in enumerate(streams):
        os.dup2(handle, number)
        os.close(handle)
    for number in request["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False  # the launcher's temporary folders stay for the other children
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    open_streams()
    folders = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = [request["cwd"], *filter(None, folders), *OWN_PATH]
    sys.executable = standin
    sys.orig_argv = [standin, *request["words"]]
    try:
        run_program(*request["words"])
        code = 0
    except SystemExit as ending:
        code = ending.code or 0
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except OSError:
        code = 120  # as Python ends
    # Python would free every object first, for seconds, as each shared page is copied
    os._exit(code)


def run_program(first, *others):
    """Run `-m MODULE`, `-c CODE` or a file with its arguments."""
    if first == "-m":
        module, *flags = others
        sys.argv = ["-m", *flags]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    elif first == "-c":
        code, *flags = others
        sys.argv = ["-c", *flags]
        exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))
    else:
        sys.path[0] = os.path.dirname(os.path.abspath(first))
        sys.argv = [first, *others]
        runpy.run_path(first, run_name="__main__")


def open_streams():
    """sys.stdin, stdout and stderr with buffers as a new interpreter chooses them."""
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    out = open(1, "wb", closefd=False, buffering=0 if unbuffered else -1)
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(
        out, line_buffering=os.isatty(1), write_through=unbuffered
    )
    sys.stderr = sys.__stderr__ = open(
        2, "w", closefd=False, buffering=1, errors="backslashreplace"
    )


def read_request(connection):
    """The request and the three file descriptors of a connection."""
    text, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    while not text.endswith(b"\n"):
        text += connection.recv(1 << 20)
    return json.loads(text), streams


def serve(path, standin):
    """Fork a child for each connection until stdin closes; in a child, become the command."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    ended, wake = socket.socketpair()
    wake.setblocking(False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake.fileno())
    selector = selectors.DefaultSelector()
    for waited in (listener, ended, sys.stdin):
        selector.register(waited, selectors.EVENT_READ)
    children = {}  # {process id: connection}
    print("ready", flush=True)
    while sys.stdin in selector.get_map():
        ready = [key.fileobj for key, _ in selector.select()]
        # those that go come before those that begin, which may need their locks
        for waited in sorted(ready, key=lambda waited: waited is listener):
            if waited is listener:
                connection = listener.accept()[0]
                request, streams = read_request(connection)
                if (child := os.fork()) == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for other in (selector, listener, ended, wake, connection, *children.values()):
                        other.close()
                    become(request, streams, standin)
                for handle in streams:
                    os.close(handle)
                children[child] = connection
                selector.register(connection, selectors.EVENT_READ)
                send(connection, child)
            elif waited is ended:
                ended.recv(1 << 10)
                answer_ended(children, selector)
            else:  # a connection or stdin closes
                for child, connection in children.items():
                    if waited in (connection, sys.stdin):
                        os.kill(child, signal.SIGKILL)
                        os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
                selector.unregister(waited)


def answer_ended(children, selector):
    """Send the exit codes of the children that have ended, and forget them."""
    for child, connection in list(children.items()):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            send(connection, os.waitstatus_to_exitcode(status))
            if connection in selector.get_map():
                selector.unregister(connection)
            connection.close()
            del children[child]


def send(connection, number):
    """Write a line to a connection, whose other end may have gone."""
    with contextlib.suppress(OSError):
        connection.sendall(f"{number}\n".encode())


if __name__ == "__main__":
    import absl.app  # noqa: F401 (the libraries that the commands import)
    import einops  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import ml_collections.config_flags  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import requests  # noqa: F401
    import safetensors.torch  # noqa: F401
    import sklearn.datasets  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401
    from wandb.sdk.artifacts.artifact import Artifact
    from wandb.sdk.data_types import _private as media

    for folder in (Artifact._TMP_DIR, media.MEDIA_TMP):
        atexit.unregister(folder.cleanup)  # each child would remove what all share
    serve(*sys.argv[1:])
