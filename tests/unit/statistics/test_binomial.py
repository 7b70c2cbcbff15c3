"""Intervals of a share."""

from __future__ import annotations

import pytest

from dpo_cli.statistics.binomial import wilson_interval


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (5, 10, 0.23659, 0.76341),  # (0.5 +- sqrt(0.025 + z^2/400) z + z^2/20) / (1 + z^2/10)
        (81, 263, 0.25529, 0.36620),  # Newcombe 1998, table I
        (15, 148, 0.06240, 0.16050),
        (0, 20, 0.0, 0.16113),
        (1, 29, 0.00611, 0.17177),
        (20, 20, 0.83887, 1.0),
    ],
)
def test_wilson(count: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(count, total) == pytest.approx((low, high), abs=1e-4)


def test_wilson_of_nothing_says_nothing() -> None:
    assert wilson_interval(0, 0) == (0.0, 1.0)
