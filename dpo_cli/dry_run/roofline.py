"""How long counted work takes on a GPU at the least, by its data sheet (Williams et al. 2009): a prediction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from dpo_cli.models.gpus import Gpu
from dpo_cli.scoring.recompute import Recompute

REACHED_SHARE = 0.85
"""Share of the data sheet's operations and bandwidth that large products and copies are taken to reach."""
KERNEL_S = 4e-6
"""Seconds that even the smallest kernel is taken to need on the device."""
HOST_S: dict[Recompute, float] = {"none": 25e-6, "elementwise": 55e-6, "layers": 37e-6}
"""Seconds of Python and PyTorch that the host is taken to need for a kernel: what a layer took on one core of a server
without a GPU, divided by its kernels. By what is computed again, since PyTorch asks at each operation there.
"""


@dataclass(frozen=True)
class Prediction:
    """Seconds of counted work.

    Attributes:
        by_kind: Seconds on the device, by kind of kernel.
        host_s: Seconds on the host, which works ahead of the device as far as it can.
    """

    by_kind: dict[str, float]
    host_s: float

    @property
    def device_s(self) -> float:
        """Seconds on the device."""
        return sum(self.by_kind.values())

    @property
    def seconds(self) -> float:
        """Whichever is slower."""
        return max(self.device_s, self.host_s)


def predict(launches: Iterable[tuple[str, int, int]], gpu: Gpu, recompute: Recompute = "none") -> Prediction:
    """Each kernel takes as long as its operations or its bytes do.

    Args:
        launches: Kind, bytes and operations of each kernel.
        gpu: Where they run.
        recompute: What the backward pass computes again.
    """
    operations_a_second = REACHED_SHARE * gpu.tflops * 1e12
    bytes_a_second = REACHED_SHARE * gpu.bandwidth * 1e9
    by_kind: dict[str, float] = defaultdict(float)
    number = 0
    for kind, moved, flops in launches:
        by_kind[kind] += max(flops / operations_a_second, moved / bytes_a_second, KERNEL_S)
        number += 1
    return Prediction(dict(by_kind), number * HOST_S[recompute])
