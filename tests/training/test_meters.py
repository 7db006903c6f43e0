"""What meters hold and add at once has the sums of adding each micro-batch at its step."""

import torch

from ddpm.runtime import device
from ddpm.training.meters import HELD, Meters


def course(count):
    """`count` steps of two micro-batches of different sizes: ((t, losses) of each, norm, skipped,
    spike).
    """
    generator = torch.Generator().manual_seed(0)
    for step in range(count):
        batches = [
            (torch.randint(1000, (n,), generator=generator), torch.rand(n, generator=generator))
            for n in (16, 5 + step % 3)
        ]
        spike = torch.tensor(step % 7 == 3)
        skipped = torch.tensor(step % 5 == 2) | spike
        norm = torch.tensor(float("nan")) if step % 5 == 2 else torch.rand((), generator=generator)
        yield batches, norm, skipped, spike


def added(meters, steps, each):
    """The state of meters after a course, read after each step or only at the end."""
    for batches, *step in course(steps):
        for t, losses in batches:
            meters.add_losses(t, losses)
        meters.add_step(*step)
        if each:
            meters.sum_up()
    return {name: total.clone() for name, total in meters.state_dict().items()}


def test_sums_at_once_are_those_of_each_step_to_the_bit():
    steps = 2 * HELD + 3
    held, at_once = (added(Meters(1000, device.start()), steps, each) for each in (False, True))
    assert held.keys() == at_once.keys()
    assert all(torch.equal(held[name], at_once[name]) for name in held)
    sums, since, counts = torch.zeros(4), torch.zeros(2), torch.zeros(4)
    for batches, norm, skipped, spike in course(steps):
        for t, losses in batches:
            sums.index_add_(0, t * 4 // 1000, losses)
            since += torch.stack([losses, torch.ones_like(losses)]).sum(1)
        norm = torch.zeros(()) if skipped else norm
        counts += torch.stack([torch.ones(()), norm, skipped, spike])
    assert torch.equal(held["loss"], sums) and torch.equal(held["since"], since)
    assert torch.equal(held["steps"], counts)


def test_losses_of_a_step_that_is_done_again_are_forgotten():
    meters, same = (Meters(1000, device.start()) for _ in range(2))
    ((batches, *step),) = course(1)
    for t, losses in batches:
        meters.add_losses(t, losses)
        same.add_losses(t, losses)
    meters.add_losses(*batches[0])
    meters.forget(len(batches))
    for each in (meters, same):
        each.add_step(*step)
    assert meters.read() == same.read()
