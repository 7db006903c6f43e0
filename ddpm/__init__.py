"""A research workbench for denoising diffusion models of images: train, draw, measure and compare.

Commands are started as `python -m ddpm.NAME`; `python -m ddpm` lists them. From Python, `ddpm.main.train_experiment` trains,
`ddpm.generate.generate_images` and `edit_images` draw, `ddpm.evaluate.evaluate` measures, and `ddpm.compare.compare` compares.
"""

import sys

if sys.argv[0] == "-m":  # `python -m ddpm.X`, which imports torch next: Ctrl-C ends it with one line, not a traceback
    from ddpm import interrupt

    interrupt.handle(interrupt.end_before_start)
