"""Copies the next batch to the GPU while the present one is used."""

import itertools

import torch


def fetched_ahead(batches, device):
    """Yield (images on the GPU, labels on the host), copied one batch ahead in another stream."""
    stream = torch.cuda.Stream(device)
    here = torch.cuda.current_stream(device)
    batches = iter(batches)

    def fetch():
        with torch.cuda.stream(stream):
            return [
                (images.to(device, non_blocking=True), labels)
                for images, labels in itertools.islice(batches, 1)
            ]

    coming = fetch()
    while coming:
        here.wait_stream(stream)
        images, labels = coming.pop()
        images.record_stream(here)  # or their memory would be reused too early
        coming = fetch()
        yield images, labels
