"""Cards people have: what their makers publish of memory, arithmetic and links, for plans and for `speed/mfu`."""

from typing import NamedTuple

import torch


class Card(NamedTuple):
    """`gib` of memory; 10^12 operations a second at most, dense and summed in float32: `half` of bf16 (or fp16), `single` of
    float32 as TF32 where it has that; `link` GB/s between cards, each way.
    """

    gib: float
    half: float
    single: float
    link: float
    bf16: bool = True

    def peak(self, dtype):
        """Operations a second, at most, where networks compute in `dtype`."""
        return 1e12 * (self.single if dtype == torch.float32 else self.half)


def card_of(name):
    """The card of a device's name as torch has it, `NVIDIA H200`; None for one that is not in the table."""
    words = name.replace("-", " ").split()
    found = [card for card in CARDS if all(word in words for word in card.split())]
    return CARDS[max(found, key=len)] if found and not OTHERS & set(words) else None


OTHERS = {"Ti", "SUPER", "Laptop", "D", "NVL"}  # of the same number, and other speed

CARDS = {  # from the makers' data sheets
    "T4": Card(16, 65, 8.1, 16, bf16=False),
    "V100": Card(16, 125, 15.7, 150, bf16=False),
    "RTX 3060": Card(12, 25.5, 12.7, 16),
    "RTX 3070": Card(8, 40.6, 20.3, 16),
    "RTX 3090": Card(24, 71, 35.6, 16),
    "RTX 4060": Card(8, 30.2, 15.1, 16),
    "RTX 4090": Card(24, 165.2, 82.6, 32),
    "L4": Card(24, 121, 60, 32),
    "A100": Card(80, 312, 156, 300),
    "H100 PCIe": Card(80, 756, 378, 64),
    "H100": Card(80, 989, 494, 450),
    "H200": Card(141, 989, 494, 450),
}
