"""What a number of wins says of a rate, and what a number of prompts can show.

The test of power is the two-sided sign test against one half: ties are dropped, so the number of prompts is that of
prompts with a winner. Figures are exact sums of the binomial distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # it imports this
    from dpo_cli.statistics.bootstrap import Estimate


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


# --- power ----------------------------------------------------------------------------------


def win_rate_power(win_rate: float, num_prompts: int, level: float = 0.05) -> float:
    """Probability that the sign test finds a true win rate to differ from one half.

    A true 55% is found with 256 prompts in 32% of cases, with 1000 in 88%.

    Args:
        win_rate: The true one, in [0, 1].
        num_prompts: Prompts with a winner.
        level: Of the two-sided test.

    Returns:
        In [0, 1]; at one half no more than the level. 0 where there are too few prompts for any result to count.
    """
    needed = _critical_wins(num_prompts, level)
    if needed is None:
        return 0.0
    # lost by so much, too: the test has two sides
    return at_least(needed, num_prompts, win_rate) + at_least(needed, num_prompts, 1 - win_rate)


def detectable_win_rate(num_prompts: int, power: float = 0.8, level: float = 0.05) -> float | None:
    """The least true win rate above one half that the sign test finds with a given probability.

    Args:
        num_prompts: Prompts with a winner.
        power: Probability to find it.
        level: Of the two-sided test.

    Returns:
        In (0.5, 1]; None where there are too few prompts for any result to count.
    """
    if _critical_wins(num_prompts, level) is None:
        return None
    low, high = 0.5, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if win_rate_power(middle, num_prompts, level) >= power else (middle, high)
    return high


def detectable_of_interval(estimate: Estimate, confidence: float, power: float = 0.8) -> float | None:
    """The least true win rate above one half whose interval leaves out one half with a given probability.

    0.5 + (z_confidence + z_power) s, with the standard error s = (high - low) / (2 z_confidence) of the interval at
    hand: a normal approximation, which serves soft verdicts and ties, too.

    Args:
        estimate: A win rate with its interval.
        confidence: Coverage of the interval.
        power: Probability to find it.

    Returns:
        In [0.5, 1]; None where that is beyond 1, or there is no interval.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    found = 0.5 + (z + NormalDist().inv_cdf(power)) * (estimate.high - estimate.low) / (2 * z)
    return found if found <= 1 else None


def _critical_wins(num_prompts: int, level: float) -> int | None:
    """The fewest wins that a fair coin reaches in no more than level / 2 of cases; None where there are none."""
    tail = np.cumsum(binomial(num_prompts, 0.5)[::-1])[::-1]
    found = np.flatnonzero(tail <= level / 2)
    return int(found[0]) if len(found) else None
