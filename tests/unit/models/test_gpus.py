"""GPUs by the names that their driver gives them."""

from __future__ import annotations

import pytest

from dpo_cli.models.device import GPUS, gpu_called


@pytest.mark.parametrize(
    ("name", "card"),
    [
        ("NVIDIA GeForce RTX 3060", "rtx-3060"),
        ("NVIDIA GeForce RTX 4070", "rtx-4070"),
        ("NVIDIA GeForce RTX 4070 Ti", "rtx-4070-ti"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("Tesla T4", "t4"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
    ],
)
def test_a_gpu_is_known_by_its_whole_name(name: str, card: str) -> None:
    assert gpu_called(name) is GPUS[card]


@pytest.mark.parametrize(
    "name",
    ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4070 Ti SUPER", "NVIDIA H100 NVL", "CPU, 2 threads"],
)
def test_another_chip_of_a_like_name_is_not_taken_for_it(name: str) -> None:
    assert gpu_called(name) is None
