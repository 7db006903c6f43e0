"""Copies the next batches to the device while the present one is computed."""

import itertools

import torch


def fetched_ahead(batches, device):
    """Yield (images on a GPU, labels on the host), the copies going beside what the GPU
    computes, one batch ahead.
    """
    beside = torch.cuda.Stream(device)
    here = torch.cuda.current_stream(device)
    batches = iter(batches)

    def fetch():
        with torch.cuda.stream(beside):
            return [
                (images.to(device, non_blocking=True), labels)
                for images, labels in itertools.islice(batches, 1)
            ]

    coming = fetch()
    while coming:
        here.wait_stream(beside)
        images, labels = coming.pop()
        images.record_stream(here)  # or their memory would be given away while they are in use
        coming = fetch()
        yield images, labels
