"""Optimizers and learning rates.

Optimizers are torch's fused ones. They read two attributes, scalar float32 tensors on the weights'
device: with `found_inf` 1.0 a step changes neither weights nor state, without waiting for the host;
gradients are divided by `grad_scale`. A learning rate is a function of the step, without state.
"""

import math

import torch


def _fused(optimizer, parameters, learning_rate, betas, eps, weight_decay):
    """The fused kind of an optimizer of torch; raises ValueError for an option out of its range."""
    options = {"learning_rate": learning_rate, "eps": eps, "weight_decay": weight_decay}
    for name, number in options.items():
        if not 0 <= number < math.inf:
            raise ValueError(f"{name} is {number}; use a finite number from 0 up")
    if len(betas) != 2 or not all(
        isinstance(beta, (int, float)) and 0 <= beta < 1 for beta in betas
    ):
        raise ValueError(f"betas are {betas}; use two numbers in [0, 1), such as (0.9, 0.999)")
    betas = tuple(map(float, betas))
    return optimizer(parameters, learning_rate, betas, eps, weight_decay, fused=True)


def adamw(parameters, learning_rate, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
    """AdamW (Loshchilov and Hutter 2019), decoupled weight decay; ValueError if out of range."""
    return _fused(torch.optim.AdamW, parameters, learning_rate, betas, eps, weight_decay)


def adam(parameters, learning_rate, *, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    """Adam (Kingma and Ba 2015), with weight decay in the gradient; ValueError if out of range."""
    return _fused(torch.optim.Adam, parameters, learning_rate, betas, eps, weight_decay)


OPTIMIZERS = {
    "adamw": adamw,
    "adam": adam,
}


def _check_length(length):
    """Raise ValueError for a length that is not a positive, finite number."""
    if not 0 < length < math.inf:
        raise ValueError(f"learning-rate decay has length {length}; use 1 step or more")


def _fall(step, length, floor, curve):
    """From 1 at step 0 to `floor` at `length` and after, along `curve`, which falls from 1 to 0."""
    _check_length(length)
    if not 0 <= floor <= 1:
        raise ValueError(
            f"learning-rate decay has floor {floor}; use a fraction of the learning rate from 0 "
            "to 1"
        )
    return floor + (1 - floor) * curve(min(step / length, 1.0))


def constant(step):
    """The factor 1 at every step."""
    return 1.0


def cosine(step, *, length, floor=0.0):
    """Half a cosine from 1 to `floor` over `length` steps (SGDR, Loshchilov 2017, eq. 5)."""
    return _fall(step, length, floor, lambda u: 0.5 * (1 + math.cos(math.pi * u)))


def linear(step, *, length, floor=0.0):
    """A straight line from 1 to `floor`, a fraction, over `length` steps, then `floor`."""
    return _fall(step, length, floor, lambda u: 1 - u)


def inverse_sqrt(step, *, length):
    """1 for `length` steps, then sqrt(length / step) (Karras et al. 2024, EDM2): for any length."""
    _check_length(length)
    return math.sqrt(length / max(step, length))


DECAYS = {
    "constant": constant,
    "cosine": cosine,
    "linear": linear,
    "inverse_sqrt": inverse_sqrt,
}


def learning_rate(step, base, warmup_steps, decay):
    """The rate of step 0, 1, ...: a line up to `base` over `warmup_steps`, times `decay(step)`."""
    return base * min(1.0, (step + 1) / max(warmup_steps, 1)) * decay(step)
