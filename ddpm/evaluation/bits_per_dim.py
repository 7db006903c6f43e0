"""Bits per dimension of held-out images, by the variational bound or the probability flow."""

import math
from itertools import pairwise

import torch

from ddpm.common import pixels, rng
from ddpm.common.progress import Progress
from ddpm.diffusion import likelihood
from ddpm.runtime.device import exact


class Likelihood:
    """Measures bits per dimension of the images at `indices`, `by` bound, flow or both.

    `whose` (training, held-out) and `weights` name images and weights in the protocol; `labels`
    are those of all images, for a class-conditional network. An image takes `evaluations` network
    evaluations: for the bound at one t in each of as many ranges of t, for the flow in steps of
    Karras spacing. Always float32, since terms at low noise are small differences. Each image has
    its own noise, the same for every seed, so that runs compare.
    """

    def __init__(
        self,
        dataset,
        indices,
        whose,
        model,
        by,
        evaluations,
        batch_size,
        weights,
        machine,
        labels=None,
    ):
        self.dataset = dataset
        self.indices = indices
        self.model = model
        self.batch_size = batch_size
        self.machine = machine
        self.labels = labels
        self.by = by
        process = model.process
        self.edges = likelihood.timestep_strata(process, evaluations)
        self.levels = process.levels(min(evaluations // 4 + 1, process.timesteps), "karras")[:-1]
        self.protocol = (
            f"bits/dim of {len(indices)} {whose} images of {dataset.fingerprint[:12]}"
            f"{'' if labels is None else ', given their labels,'} under the {weights} weights, by "
            f"{evaluations} evaluations"
        )

    @exact()
    def __call__(self):
        """Measure; returns (numbers, {"likelihood.csv": terms over t}), the same on every rank."""
        self.model.net.eval()
        # network evaluations of an image
        times = {"bound": len(self.edges) - 1, "flow": 4 * (len(self.levels) - 1)}
        terms_of = {name: self.mean(getattr(self, name), times[name]) for name in self.by}
        numbers = {}
        files = {}
        if "bound" in terms_of:
            terms = prior, reconstruction, *kl = terms_of["bound"].tolist()
            numbers = {
                "eval/bits_per_dim": sum(terms),
                "eval/bits_per_dim_prior": prior,
                "eval/bits_per_dim_kl": sum(kl),
                "eval/bits_per_dim_reconstruction": reconstruction,
            }
            files = {"likelihood.csv": self.curve(prior, [reconstruction, *kl])}
        if "flow" in terms_of:
            numbers["eval/bits_per_dim_flow"] = terms_of["flow"].item()
        return numbers | {"eval/bits_per_dim_protocol": self.protocol}, files

    def bound(self, x0, batch):
        """The terms of the bound of images x0 at the indices `batch`: prior, reconstruction and
        kl, [b, 1 + ranges of t].
        """

        def u(k):
            return self.machine.to_device(rng.uniform(0, "likelihood time", k, batch))

        def noise(k):
            return self.noise("noise", k, batch, x0)

        terms = likelihood.bound(self.model, x0, self.edges, u, noise, self.y(batch))
        return torch.column_stack([terms.prior, terms.reconstruction, terms.kl])

    def flow(self, x0, batch):
        """The bits per dimension under the probability flow [b, 1]."""
        u = torch.special.ndtr(self.noise("pixel", 0, batch, x0))
        probe = self.noise("probe", 0, batch, x0).sign()
        return torch.column_stack(
            [likelihood.flow_bits(self.model, x0, self.levels, u, probe, self.y(batch))]
        )

    def y(self, batch):
        """The labels of the images at the indices `batch`, or None."""
        return (
            None
            if self.labels is None
            else self.machine.to_device(torch.tensor([self.labels[index] for index in batch]))
        )

    def noise(self, purpose, k, batch, like):
        return self.machine.to_device(
            rng.normal(0, f"likelihood {purpose}", k, batch, like.shape[1:])
        )

    def mean(self, measure, times):
        """The mean [columns] of `measure(x0, indices) -> [b, columns]` over all images.

        `times` is the number of network evaluations per image.
        """

        def of(batch):
            return (
                measure(pixels.encode(self.machine.to_device(self.dataset.batch(batch))), batch)
                .double()
                .cpu()
            )

        own = self.indices[self.machine.rank_slice(len(self.indices))]
        results = []
        with Progress(
            "measuring bits/dim", len(own), self.batch_size, times, shown=self.machine.main
        ) as shown:
            hooks = [
                self.model.net.register_forward_pre_hook(lambda *_: self.machine.stop.check()),
                self.model.net.register_forward_hook(shown.evaluated),
            ]
            try:
                for batch, bits in self.machine.room.in_batches(
                    "measuring bits/dim of", own, self.batch_size, of
                ):
                    results.append(bits)
                    shown.finished(len(batch))
            finally:
                for hook in hooks:
                    hook.remove()
        return self.machine.gather(torch.cat(results or [torch.empty(0)])).mean(0)

    def curve(self, prior, terms):
        """The terms as csv, from the pixels to pure noise, each with its range of t and the log SNR
        in its middle.
        """
        ends = [
            *((first, end - 1) for first, end in pairwise(self.edges)),
            (self.edges[-1] - 1,) * 2,
        ]
        names = ["reconstruction", *["kl"] * (len(terms) - 1), "prior"]
        lines = ["term,first_t,last_t,log_snr,bits_per_dim"]
        for name, (first, last), bits in zip(names, ends, [*terms, prior], strict=True):
            log_snr = -2 * math.log(self.model.process.level((first + last) // 2).ratio)
            lines.append(f"{name},{first},{last},{log_snr:.6g},{bits:.6g}")
        return "\n".join(lines) + "\n"
