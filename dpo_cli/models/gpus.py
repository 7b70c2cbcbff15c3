"""GPUs by name, as their makers' data sheets and architecture papers describe them."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU on paper.

    Attributes:
        tflops: Dense products of 16-bit numbers with float32 sums, 10^12 operations a second: bfloat16, or float16
            where there is none. On GeForce cards from Ampere on it is twice the data sheet's float32 rate.
        bandwidth: Of its memory, GB/s.
        memory_gib: Its memory, GiB.
        capability: CUDA's compute capability.
        pattern: What the driver calls it, without the maker, as a regular expression.
    """

    tflops: float
    bandwidth: float
    memory_gib: int
    capability: tuple[int, int]
    pattern: str


def _geforce(name: str) -> str:
    return rf"GeForce {name}"


GPUS: dict[str, Gpu] = {
    "t4": Gpu(65.0, 320, 16, (7, 5), r"(Tesla )?T4"),
    "rtx-2080-ti": Gpu(53.8, 616, 11, (7, 5), _geforce("RTX 2080 Ti")),
    "rtx-3060": Gpu(25.5, 360, 12, (8, 6), _geforce("RTX 3060")),
    "rtx-3070": Gpu(40.6, 448, 8, (8, 6), _geforce("RTX 3070")),
    "rtx-3080": Gpu(59.5, 760, 10, (8, 6), _geforce("RTX 3080")),
    "rtx-3090": Gpu(71.0, 936, 24, (8, 6), _geforce("RTX 3090")),
    "rtx-4060-ti": Gpu(44.1, 288, 16, (8, 9), _geforce("RTX 4060 Ti")),
    "rtx-4070": Gpu(58.3, 504, 12, (8, 9), _geforce("RTX 4070")),
    "rtx-4070-ti": Gpu(80.2, 504, 12, (8, 9), _geforce("RTX 4070 Ti")),
    "rtx-4080": Gpu(97.5, 717, 16, (8, 9), _geforce("RTX 4080")),
    "rtx-4090": Gpu(165.2, 1008, 24, (8, 9), _geforce("RTX 4090")),
    "rtx-5090": Gpu(209.5, 1792, 32, (12, 0), _geforce("RTX 5090")),
    "a100": Gpu(312.0, 2039, 80, (8, 0), r"A100.*80GB.*"),
    "a100-40gb": Gpu(312.0, 1555, 40, (8, 0), r"A100.*40GB.*"),
    "h100-pcie": Gpu(756.0, 2000, 80, (9, 0), r"H100 PCIe"),
    "h100-sxm": Gpu(989.4, 3350, 80, (9, 0), r"H100 80GB HBM3"),
    "h200": Gpu(989.4, 4800, 141, (9, 0), r"H200"),
}
"""By the names that ``dpo-cli bench --card`` takes. Laptops' chips are left out: the laptop sets their speed."""


def gpu_called(name: str) -> Gpu | None:
    """The GPU that the driver calls so, such as ``NVIDIA GeForce RTX 4090``; None where it is not known.

    The whole name counts: the laptop's chip, a Ti and a SUPER are other GPUs.
    """
    own = name.removeprefix("NVIDIA ").strip()
    return next((gpu for gpu in GPUS.values() if re.fullmatch(gpu.pattern, own)), None)
