"""What a number of prompts can show: the power of a win rate, and the least effect that it would find.

The test is the two-sided sign test against one half: ties are dropped, so the number of prompts is
that of prompts with a winner. Figures are exact sums of the binomial distribution.
"""

from __future__ import annotations

from statistics import NormalDist

import numpy as np

from dpo_cli.statistics.binomial import at_least, binomial
from dpo_cli.statistics.bootstrap import Estimate


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
