"""Watches loss and gradient norm: skips a step that is not finite and says when a training has
diverged.
"""

import math

import torch

FORGET = 0.998  # of the largest loss and norm, a step
YOUNG = 100  # steps in which nothing is usual yet, and that the mean loss is about


class StabilityMonitor:
    """Judges each step by its loss and its gradient's norm, on the device so that none waits; a
    checkpoint part.

    A step is skipped where one of them is not finite, or a spike: more than `spike` times the
    largest of late, which is half forgotten in 350 steps. What is skipped does not count as usual,
    so one spike hides no other, and a level that has risen for good is skipped on and on: then, or
    where the loss has crept up `spike` times in its geometric mean, `trouble` says so. `rollbacks`
    is how often the run has gone back to when all was well.
    """

    def __init__(self, spike, machine, rollbacks=0):
        self.spike = spike or math.inf
        self.rollbacks = rollbacks
        device = machine.device
        self.usual = torch.zeros(2, device=device)  # the largest loss and norm of late
        # of the loss's logarithm of late, and the lowest that it was
        self.mean, self.lowest = torch.zeros(2, device=device)
        self.learned, self.streak, self.well = torch.zeros(3, dtype=torch.long, device=device)
        # the last step that was skipped; `well`, the last at which all was well
        self.bad = torch.tensor(-1, device=device)

    def judge(self, step, loss, norm):
        """Whether a step is to be skipped, and whether as a spike, by scalars on the device that
        are the same on all ranks.
        """
        now = torch.stack([loss, norm])
        finite = now.isfinite().all()
        spike = finite & (self.learned >= YOUNG) & (now > self.spike * self.usual).any()
        skipped = spike | ~finite
        usual = torch.maximum(FORGET * self.usual, now)
        mean = torch.lerp(
            self.mean, loss.clamp(min=1e-30).log(), (1 / (self.learned + 1)).clamp(min=1 / YOUNG)
        )
        self.usual.copy_(torch.where(skipped, self.usual, usual))
        self.mean.copy_(torch.where(skipped, self.mean, mean))
        self.lowest.copy_(
            torch.where(self.learned < YOUNG / 4, self.mean, torch.minimum(self.lowest, self.mean))
        )
        self.learned += ~skipped
        self.streak.add_(2 * skipped - 1).clamp_(min=0)
        well = (self.streak == 0) & (self.mean - self.lowest <= math.log(self.spike) / 2)
        self.well.copy_(torch.where(well, step, self.well))
        self.bad.copy_(torch.where(skipped, step, self.bad))
        return skipped, spike

    def trouble(self, patience):
        """What is wrong with the run in words, or None; here the host waits."""
        if (streak := self.streak.item()) >= patience:
            return f"{streak} more steps were skipped than learned from"
        mean = self.mean.item()
        lowest = self.lowest.item()
        if mean - lowest > math.log(self.spike):
            return f"the loss has risen from {math.exp(lowest):.3g} to {math.exp(mean):.3g}"
        return None

    def state_dict(self):
        return {name: value for name, value in vars(self).items() if name != "spike"}

    def load_state_dict(self, state):
        """Take over a saved state, but for what a run that has just gone back knows better."""
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor):
                value.copy_(state[name])
