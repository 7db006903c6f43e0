"""The loss on held-out images, always on the same noise."""

import torch

from ddpm.common import pixels, rng
from ddpm.data import order as data_order


class Validation:
    """The mean loss on a fixed set of (image, t, noise): `loss()` is that of the network's weights.

    `labels` are those of all images of the dataset, for a network that learns them. The times are
    spread evenly over 0 .. T-1 in a fixed order; all seeds share the set, so that runs compare.
    """

    def __init__(
        self, dataset, indices, net, diffusion, machine, batch_size, labels=None, most=1024
    ):
        indices = data_order.evenly_spaced(indices, most)
        order = rng.permutation(0, "validation time", 0, len(indices))
        self.times = torch.from_numpy(
            (order + 0.5) * diffusion.process.timesteps / max(len(indices), 1)
        ).long()
        self.dataset = dataset
        self.indices = indices
        self.net = net
        self.labels = None if labels is None else torch.tensor([labels[index] for index in indices])
        self.diffusion = diffusion
        self.machine = machine
        self.batch_size = batch_size

    @torch.no_grad()
    def loss(self):
        self.net.eval()
        total = torch.zeros(2, dtype=torch.float64)
        mine = range(len(self.indices))[self.machine.rank_slice(len(self.indices))]
        for places, loss in self.machine.room.in_batches(
            "validating", mine, self.batch_size, self._loss_of
        ):
            total += torch.stack([loss, torch.tensor(len(places), dtype=torch.float64)])
        loss, count = self.machine.gather(total[None]).sum(0).tolist()
        return loss / count

    def _loss_of(self, places):
        """The sum of the losses of the images at these places, float64 on the host."""
        x0 = pixels.encode(
            self.machine.to_device(self.dataset.batch([self.indices[place] for place in places]))
        )
        noise = rng.normal(0, "validation noise", 0, places, x0.shape[1:])
        y = None if self.labels is None else self.machine.to_device(self.labels[list(places)])
        losses = self.diffusion.losses(
            x0, self.machine.to_device(self.times[list(places)]), self.machine.to_device(noise), y
        )
        return losses.double().sum().cpu()
