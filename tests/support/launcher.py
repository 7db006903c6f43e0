"""Starts commands by forking a process that has the libraries already: `python -m ddpm.NAME`
without the seconds that importing torch and wandb takes. The package itself is imported anew in
each child.

Reads a request as a line of JSON, {"module", "flags", "cwd", "env", "out", "err"}, and answers with
the exit code on a line.
"""

import json
import os
import runpy
import sys


def become(request):
    """Turn this process into the one that `python -m MODULE FLAGS` would start."""
    streams = {0: os.devnull, 1: request["out"], 2: request["err"]}
    for number, path in streams.items():
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    sys.path[0] = request["cwd"]
    sys.orig_argv = [sys.executable, "-m", request["module"], *request["flags"]]
    sys.argv = ["-m", *request["flags"]]
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)


def serve():
    requests = os.fdopen(os.dup(0))
    answers = os.fdopen(os.dup(1), "w")
    for line in requests:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            requests.close()
            answers.close()
            return become(request)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(code, file=answers, flush=True)


if __name__ == "__main__":
    import absl.app  # noqa: F401 (the libraries that the commands import)
    import einops  # noqa: F401
    import ml_collections.config_flags  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import torchvision  # noqa: F401
    import wandb  # noqa: F401

    serve()
