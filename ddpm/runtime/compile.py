"""torch.compile that falls back to the plain network where the compiler fails."""

import gc
import time

import torch

from ddpm.common import errors
from ddpm.runtime.out_of_memory import ran_out

COMPILER = "inductor"  # torch's own
GRAPHS = 64  # at most, of one network
# CUDA graphs on a GPU, whose output the next call overwrites
DRAWING = {"mode": "reduce-overhead"}


class Compiled:
    """Inference wrapper of a network net(x, t, y): torch.compile, with CUDA graphs on a GPU.

    The first call compiles; `say(text)` gets the time. The plain network runs batches of a size
    that is not in `sizes`, and all of them if compiling fails.
    """

    def __init__(self, net, sizes, say=print):
        self.net = net
        self.sizes = sizes
        self.say = say
        self.fast = through(net, DRAWING)
        self.fresh = True

    def __call__(self, x, t, y=None):
        if self.fast is None or len(x) not in self.sizes:
            return self.net(x, t, y)
        start = time.monotonic()
        try:
            out = self.fast(x, t, y).clone()
            if self.fresh:
                seconds = time.monotonic() - start
                self.say(f"the network was compiled for drawing in {seconds:.0f} s")
                self.fresh = False
            return out
        except Exception as error:  # compilers raise many types
            if of_kernels(error):
                raise
            self.say(
                "drawing with the plain network, as torch.compile failed: "
                f"{errors.one_line_with_type(error)}"
            )
            self.fast = None
            return self.net(x, t, y)

    def eval(self):
        self.net.eval()

    def release(self):
        """Drop the compiled network and the memory of its CUDA graphs; the next call compiles it.

        What is compiled for training stays. Inductor's cache on disk makes the next time shorter.
        """
        if self.fast is not None:
            torch._dynamo.reset_code(self.fast.__wrapped__.__code__)
            self.fast = through(self.net, DRAWING)
            self.fresh = True
            gc.collect()  # graphs are in reference cycles


def through(net, how):
    """Compile a network, or a function of one, with options `how`, one graph per batch size.

    One graph for all sizes, torch's default, has slower kernels. Beyond GRAPHS, torch silently runs
    the network uncompiled.
    """
    torch._dynamo.config.recompile_limit = GRAPHS

    def network(*inputs, **conditions):
        return net(*inputs, **conditions)

    # torch keeps, counts and searches graphs by code object: one for each network
    network.__code__ = network.__code__.replace()
    return torch.compile(
        network, backend=COMPILER, dynamic=False, **(how if COMPILER == "inductor" else {})
    )


def of_kernels(error):
    """Whether a kernel raised an exception, not the compiler, which raises its own types."""
    of_cuda = getattr(torch, "AcceleratorError", RuntimeError)  # from torch 2.8 on
    return ran_out(error) or type(error) in (RuntimeError, of_cuda)
