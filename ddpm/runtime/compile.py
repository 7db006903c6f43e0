"""torch.compile with a way back: what the compiler cannot do runs as it is."""

import time

import torch

from ddpm.common import errors
from ddpm.runtime.out_of_memory import ran_out

COMPILER = "inductor"  # torch's own
GRAPHS = 64  # that it makes of one network, at most
# on a GPU CUDA graphs, in which an answer is overwritten by the next
DRAWING = {"mode": "reduce-overhead"}


class Compiled:
    """A network net(x, t, y) asked often, without gradients: through torch.compile and, on a GPU,
    CUDA graphs.

    The first question takes the time of compiling it, which `say(text)` is told. Where that fails,
    and for batches of other `sizes`, each of which would take as long again, the plain network
    answers.
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
        begun = time.monotonic()
        try:
            out = self.fast(x, t, y).clone()
            if self.fresh:
                self.say(
                    f"the network was compiled for drawing in {time.monotonic() - begun:.0f} s"
                )
                self.fresh = False
            return out
        except Exception as error:  # a compiler has many
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


def through(net, how):
    """A network through torch.compile, which makes a graph for each size of batch.

    By default it makes one for all sizes from the second on, whose kernels are slower. Learning and
    drawing, with labels and without, share the limit of graphs, beyond which torch runs the plain
    network and says nothing.
    """
    torch._dynamo.config.recompile_limit = GRAPHS
    return torch.compile(
        net, backend=COMPILER, dynamic=False, **(how if COMPILER == "inductor" else {})
    )


def of_kernels(error):
    """Whether an exception is of the computation, as that memory runs out or CUDA fails, and not of
    the compiler.

    Kernels raise RuntimeError itself, where they raise no class below; compilers have classes of
    their own.
    """
    of_cuda = getattr(torch, "AcceleratorError", RuntimeError)  # of torch 2.8 on
    return ran_out(error) or type(error) in (RuntimeError, of_cuda)
