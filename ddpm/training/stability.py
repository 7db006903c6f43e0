"""Watches loss and gradient norm: skips steps that are not finite, and detects divergence."""

import math

import torch

FORGET = 0.998  # of the largest loss and norm, a step
YOUNG = 100  # steps before which no spike is detected; the mean loss is about as many
# attribute -> its key in a checkpoint
KEYS = {
    "rollbacks": "rollbacks",
    "recent_max": "usual",
    "mean_log_loss": "mean",
    "lowest_mean": "lowest",
    "num_good_steps": "learned",
    "skip_excess": "streak",
    "last_healthy_step": "well",
    "last_skipped_step": "bad",
}


class StabilityMonitor:
    """Judges each step by its loss and gradient norm, on the device; a checkpoint part.

    A step is skipped if one of them is not finite, or is a spike: more than `spike` times the
    recent maximum, which halves in 350 steps. Skipped steps do not enter the maximum, so one spike
    hides no other. `divergence_reason` reports a level that has risen for good, and a geometric
    mean of the loss that has risen `spike` times. `rollbacks` counts those of the training.
    """

    def __init__(self, spike, machine, rollbacks=0):
        self.spike = spike or math.inf
        self.rollbacks = rollbacks
        device = machine.device
        self.recent_max = torch.zeros(2, device=device)  # of loss and norm
        # of the loss's logarithm: the recent mean, and the lowest that it was
        self.mean_log_loss, self.lowest_mean = torch.zeros(2, device=device)
        zeros = torch.zeros(3, dtype=torch.long, device=device)
        self.num_good_steps, self.skip_excess, self.last_healthy_step = zeros
        self.last_skipped_step = torch.tensor(-1, device=device)

    def update(self, step, loss, norm):
        """Record loss and norm, scalars equal on all ranks; returns (skip the step, as a spike)."""
        now = torch.stack([loss, norm])
        finite = (now.abs() < math.inf).all()
        high = (now > self.spike * self.recent_max).any() & (self.num_good_steps >= YOUNG)
        spike = high & finite
        skipped = high | ~finite
        used = ~skipped
        largest = torch.maximum(FORGET * self.recent_max, now)
        weight = (self.num_good_steps + 1).reciprocal().clamp_(min=1 / YOUNG)
        mean = torch.lerp(self.mean_log_loss, loss.clamp(min=1e-30).log_(), weight)
        torch.where(used, largest, self.recent_max, out=self.recent_max)
        torch.where(used, mean, self.mean_log_loss, out=self.mean_log_loss)
        lowest = torch.minimum(self.lowest_mean, self.mean_log_loss)
        first = self.num_good_steps < YOUNG / 4
        torch.where(first, self.mean_log_loss, lowest, out=self.lowest_mean)
        self.num_good_steps += used
        self.skip_excess.add_(skipped).add_(used, alpha=-1).clamp_(min=0)
        risen = self.mean_log_loss - self.lowest_mean
        healthy = (self.skip_excess == 0) & (risen <= math.log(self.spike) / 2)
        self.last_healthy_step.masked_fill_(healthy, step)
        self.last_skipped_step.masked_fill_(skipped, step)
        return skipped, spike

    def divergence_reason(self, patience):
        """Why the training has diverged, or None; the host waits for the device here."""
        if (excess := self.skip_excess.item()) >= patience:
            return f"{excess} more steps were skipped than learned from"
        mean = self.mean_log_loss.item()
        lowest = self.lowest_mean.item()
        if mean - lowest > math.log(self.spike):
            return f"the loss has risen from {math.exp(lowest):.3g} to {math.exp(mean):.3g}"
        return None

    def state_dict(self):
        return {key: getattr(self, name) for name, key in KEYS.items()}

    def load_state_dict(self, state):
        """Take over a saved state, except that `rollbacks` never falls."""
        self.rollbacks = max(self.rollbacks, state["rollbacks"])
        for name, key in KEYS.items():
            if name != "rollbacks":
                getattr(self, name).copy_(state[key])
