"""Train, draw from, measure and compare denoising diffusion models of images: `python -m ddpm.main --help`, README.md."""

import sys

if sys.argv[0] == "-m":  # `python -m ddpm.X`, which imports torch next: Ctrl-C ends it with one line, not a traceback
    from ddpm import interrupt

    interrupt.handle(interrupt.end_before_start)
