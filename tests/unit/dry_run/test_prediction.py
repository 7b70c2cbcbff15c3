"""The roofline by hand."""

from __future__ import annotations

import pytest

from dpo_cli.dry_run.prediction import HOST_S, KERNEL_S, REACHED_SHARE, predict
from dpo_cli.models.device import Gpu

GPU = Gpu(100.0, 1000, 24, (8, 9), "")


def test_a_kernel_takes_as_long_as_its_operations_or_its_bytes() -> None:
    """10^14 operations at 100 TFLOP/s and 10^12 bytes at 1000 GB/s take a second each, at the share that is reached."""
    whole = 1 / REACHED_SHARE
    found = predict([("products", 10**9, 10**14), ("elementwise", 10**12, 0), ("elementwise", 10, 0)], GPU)
    assert found.by_kind == pytest.approx({"products": whole, "elementwise": whole + KERNEL_S})
    assert found.seconds == found.device_s == pytest.approx(2 * whole + KERNEL_S)


def test_many_small_kernels_are_bound_by_the_host() -> None:
    found = predict([("elementwise", 10, 0)] * 1000, GPU)
    assert found.seconds == pytest.approx(1000 * HOST_S["none"])
    assert found.device_s < found.host_s
