"""Exponential moving average of a network's weights: the copy that samples are drawn from.

`shadow`: name -> tensor, named as in `model.state_dict()`; floating tensors are averaged in
float32, integer ones copied. It lives on the model's device: move the model first, and change its
weights in place from then on. It sees the plain network, never a compiled or DDP-wrapped one.
"""

import contextlib

import torch

SLICE = 2**22  # numbers that are swapped at once


class EMA:
    """shadow <- decay * shadow + (1 - decay) * weights, at every `update()` (Ho et al. 2020,
    appendix B).

    With `warmup` the decay of update n = 0, 1, ... is min(decay, (1 + n) / (10 + n)), so that a
    young average forgets the initial weights; with `rampup` its half-life is at most that share of
    n (Karras et al. 2022, EDM, code). `decay` may be a function of n (posthoc_ema.power_function).
    Raises ValueError for a number outside [0, 1).
    """

    def __init__(self, model, decay=0.9999, warmup=True, rampup=0.0):
        if not callable(decay) and not 0 <= decay < 1:
            raise ValueError(
                f"ema decay {decay} is outside [0, 1); use a number such as 0.9999, or 0 for no "
                "averaging"
            )
        self.model = model
        self.decay = decay
        self.warmup = warmup
        self.rampup = rampup
        self.updates = 0
        self._weights = None  # the raw weights by name, while the averaged ones are in the model
        self._pairs = None  # averages with their weights: state_dict() takes a millisecond
        state = model.state_dict()
        wrapped = [name for name in state if name.startswith("module.") or "_orig_mod." in name]
        assert not wrapped, f"EMA wants the plain network, not one with {wrapped[0]}"
        self.shadow = {
            name: value.to(torch.float32 if value.is_floating_point() else value.dtype, copy=True)
            for name, value in state.items()
        }

    def next_decay(self):
        """The decay of the next update."""
        n = self.updates
        if callable(self.decay):
            return self.decay(n)
        young = (1 + n) / (10 + n) if self.warmup else 1.0
        ramped = 0.5 ** (1 / max(self.rampup * n, 1e-9)) if self.rampup else 1.0
        return min(self.decay, young, ramped)

    @torch.no_grad()
    def update(self):
        """Add the model's weights to the average; raises RuntimeError while it is applied."""
        if self._weights is not None:
            raise RuntimeError("the averaged weights are applied; call restore() before update()")
        if self._pairs is None:
            self._pairs = self._averages_and_weights()
        floating, integer = self._pairs
        weights = [value.float() for value in floating[1]]  # the same tensors in float32
        torch._foreach_lerp_(floating[0], weights, 1 - self.next_decay())
        for average, value in zip(*integer, strict=True):
            average.copy_(value)
        self.updates += 1

    def _averages_and_weights(self):
        """The lists of floating averages and their weights, then of integer ones and theirs."""
        state = self.model.state_dict()
        pairs = [[[], []], [[], []]]
        for name, value in state.items():
            averages, weights = pairs[not value.is_floating_point()]
            averages.append(self.shadow[name])
            weights.append(value)
        return pairs

    @torch.no_grad()
    def apply_shadow(self):
        """Put the average into the model until `restore`; raises RuntimeError if it is there.

        Model and average swap values one tensor at a time, without a second copy of the weights
        and without moving a tensor: optimizers, CUDA graphs and sharded networks refer to them.
        Until `restore`, `shadow` is the model's tensors. Averages of one model are restored in
        reverse order. A failure changes nothing.
        """
        if self._weights is not None:
            raise RuntimeError("the averaged weights are applied already; call restore() first")
        averages = self.shadow
        self.shadow = dict(self.shadow)
        self._weights = {}
        try:
            for name, value in self.model.state_dict().items():
                if value.dtype == averages[name].dtype:
                    exchange(value, averages[name])
                    self._weights[name] = averages[name]
                    self.shadow[name] = value
                else:
                    # of a model in half precision, whose average has more digits than it can hold
                    self._weights[name] = value.clone()
                    value.copy_(averages[name])
        except BaseException:
            self.restore()
            raise

    @torch.no_grad()
    def restore(self):
        """Give the model its own weights back, bit for bit; RuntimeError if they are there."""
        if self._weights is None:
            raise RuntimeError(
                "the averaged weights are not applied; call apply_shadow() before restore()"
            )
        state = self.model.state_dict()
        while self._weights:  # one by one, so that a failure leaves the rest to be restored
            name, weight = next(iter(self._weights.items()))
            if weight.dtype == self.shadow[name].dtype:
                exchange(state[name], weight)
                self.shadow[name] = weight
            else:
                state[name].copy_(weight)
            del self._weights[name]
        self._weights = None

    @contextlib.contextmanager
    def averaged(self):
        """The context in which the model has the averaged weights; it can be nested."""
        if self._weights is not None:
            yield self.model
            return
        self.apply_shadow()
        try:
            yield self.model
        finally:
            self.restore()

    def state_dict(self):
        """The average itself, not a copy, and its number of updates."""
        return {"shadow": dict(self.shadow), "updates": self.updates}

    @torch.no_grad()
    def load_state_dict(self, state):
        """Copy a saved average into this one; raises ValueError for other names or shapes."""
        saved = state["shadow"]
        faults = [f"{name} is missing" for name in self.shadow if name not in saved]
        faults += [f"{name} is unknown" for name in saved if name not in self.shadow]
        for name, value in self.shadow.items():
            if name in saved and saved[name].shape != value.shape:
                faults.append(f"{name} is {tuple(saved[name].shape)}, not {tuple(value.shape)}")
        if faults:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise ValueError(
                f"the saved average is of another network: {'; '.join(faults[:3])}{more}; "
                "build the network from the checkpoint's own config"
            )
        for name, value in self.shadow.items():
            value.copy_(saved[name])
        self.updates = state["updates"]


def exchange(first, second):
    """Swap the values of two tensors, some rows at a time to save memory."""
    first, second = torch.atleast_1d(first, second)
    rows = max(SLICE * len(first) // max(first.numel(), 1), 1)
    for mine, theirs in zip(first.split(rows), second.split(rows), strict=True):
        copy = mine.clone()
        mine.copy_(theirs)
        theirs.copy_(copy)
