"""Power of a win rate, exact, against counting and simulation; intervals of a share."""

from __future__ import annotations

import math
from math import comb

import numpy as np
import pytest

from dpo_cli.statistics.binomial import (
    detectable_of_interval,
    detectable_win_rate,
    wilson_interval,
    win_rate_power,
)
from dpo_cli.statistics.bootstrap import Estimate


def test_it_is_what_counting_gives() -> None:
    """Of 20 prompts 15 wins or more come in 21700 of 2^20 cases (2.07%), 14 or more in 5.8%."""
    above = [sum(comb(20, wins) for wins in range(least, 21)) / 2**20 for least in (15, 14)]
    assert above[0] <= 0.025 < above[1]
    expected = sum(comb(20, wins) * 0.7**wins * 0.3 ** (20 - wins) for wins in range(21) if wins >= 15 or wins <= 5)
    assert win_rate_power(0.7, 20) == pytest.approx(expected, rel=1e-12)
    assert win_rate_power(0.5, 20) == pytest.approx(2 * above[0], rel=1e-12)
    assert win_rate_power(1.0, 20) == 1


@pytest.mark.parametrize("num_prompts", [6, 50, 256, 1000, 20_000])
def test_the_least_effect_is_found_with_the_power_asked_for(num_prompts: int) -> None:
    found = detectable_win_rate(num_prompts)
    assert found is not None
    assert win_rate_power(found, num_prompts) == pytest.approx(0.8, abs=1e-6)


def test_five_prompts_show_nothing() -> None:
    """Even 5 of 5 wins come by chance in 2 of 32 cases."""
    assert win_rate_power(0.99, 5) == 0
    assert detectable_win_rate(5) is None


@pytest.mark.parametrize(("num_prompts", "share_of_ties"), [(256, 0.0), (1000, 0.0), (400, 0.4)])
def test_a_detectable_win_rate_is_found_four_times_in_five(num_prompts: int, share_of_ties: float) -> None:
    """Wins, ties and losses are drawn at the rate that an interval says it would find; then it mostly does."""
    rng = np.random.default_rng(0)

    def draw(rate: float) -> np.ndarray:
        lead = (rate - 0.5) / (1 - share_of_ties)
        decided = rng.random(num_prompts) < 0.5 + lead
        return np.where(rng.random(num_prompts) < share_of_ties, 0.5, decided)

    def interval(values: np.ndarray) -> Estimate:
        error = 1.96 * values.std() / math.sqrt(num_prompts)
        return Estimate(values.mean(), values.mean() - error, values.mean() + error)

    rate = detectable_of_interval(interval(draw(0.5)), 0.95)
    assert rate is not None
    found = np.mean([interval(draw(rate)).low > 0.5 for _ in range(2000)])
    assert 0.76 < found < 0.86


def test_too_wide_an_interval_finds_nothing() -> None:
    assert detectable_of_interval(Estimate(0.5, 0.0, 1.0), 0.95) is None
    assert detectable_of_interval(Estimate(0.5, math.nan, math.nan), 0.95) is None
    assert detectable_of_interval(Estimate(0.5, 0.5, 0.5), 0.95) == 0.5


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    [
        (5, 10, 0.23659, 0.76341),  # (0.5 +- sqrt(0.025 + z^2/400) z + z^2/20) / (1 + z^2/10)
        (81, 263, 0.25529, 0.36620),  # Newcombe 1998, table I
        (15, 148, 0.06240, 0.16050),
        (0, 20, 0.0, 0.16113),
        (1, 29, 0.00611, 0.17177),
        (20, 20, 0.83887, 1.0),
        (0, 0, 0.0, 1.0),
    ],
)
def test_wilson(count: int, total: int, low: float, high: float) -> None:
    assert wilson_interval(count, total) == pytest.approx((low, high), abs=1e-4)
