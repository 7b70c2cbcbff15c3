"""Exact sums of the binomial distribution, and what so many wins say of a rate."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np


def binomial(number: int, rate: float) -> np.ndarray:
    """Probabilities of 0 .. number wins, float64 [number + 1]."""
    if rate in (0, 1):
        return np.eye(number + 1)[round(rate) * number]
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, number + 1)))])
    wins = np.arange(number + 1)
    logs = factorials[-1] - factorials - factorials[::-1] + wins * math.log(rate) + wins[::-1] * math.log1p(-rate)
    return np.exp(logs)


def at_least(wins: int, number: int, rate: float) -> float:
    """Probability of so many wins or more."""
    return float(binomial(number, rate)[wins:].sum())


def exact_interval(wins: float, number: int, confidence: float) -> tuple[float, float]:
    """The interval of a rate after so many wins, which covers it at least as often as it says.

    Args:
        wins: In [0, number]; where ties of one half make it no whole number, the ends are those of the next ones
            outwards.
        number: Independent trials, at least one.
        confidence: Coverage.

    Source: Clopper and Pearson 1934.
    """
    tail = (1 - confidence) / 2
    fewest, most = math.floor(wins + 1e-9), math.ceil(wins - 1e-9)
    low = _rate_at(lambda rate: at_least(fewest, number, rate), tail) if fewest else 0.0
    high = 1 - _rate_at(lambda rate: at_least(number - most, number, rate), tail) if most < number else 1.0
    return low, high


def _rate_at(probability: Callable[[float], float], level: float) -> float:
    """The rate in [0, 1] at which a rising probability reaches a level."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return (low + high) / 2


_Z_95 = 1.959963984540054


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): of ``count`` in ``total`` independent draws."""
    if not total:
        return 0.0, 1.0
    share, squared = count / total, _Z_95**2
    middle = share + squared / (2 * total)
    reach = _Z_95 * math.sqrt(share * (1 - share) / total + squared / (4 * total**2))
    scale = 1 + squared / total
    low, high = (middle - reach) / scale, (middle + reach) / scale
    return (0.0 if count == 0 else low), (1.0 if count == total else high)
