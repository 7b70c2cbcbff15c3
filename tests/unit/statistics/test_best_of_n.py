"""Best-of-N against every subset and against simulation; the ideal frontier against a known optimum."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from dpo_cli.statistics.best_of_n import best_of_n, best_of_n_kl_bound, ideal_frontier


def by_enumeration(choosing: list[float], reported: list[float], number: int) -> float:
    """The mean over all subsets of what the best reports; of several best ones, their mean."""
    found = []
    for subset in combinations(range(len(choosing)), number):
        most = max(choosing[i] for i in subset)
        best = [reported[i] for i in subset if choosing[i] == most]
        found.append(sum(best) / len(best))
    return sum(found) / len(found)


@pytest.mark.parametrize(
    "choosing",
    [[0.3, -1.0, 2.5, 0.1, 7.0, -3.0, 0.2], [1, 0, 1, 1, 0, 2, 2], [5.0] * 7],
    ids=["distinct", "tied", "all tied"],
)
def test_best_of_n_is_the_mean_over_all_subsets(choosing: list[float]) -> None:
    reported = [0.5, 3.0, -2.0, 1.25, 0.0, 9.0, 4.0]
    found = best_of_n(np.array([choosing, choosing]), np.array([reported, choosing]), range(1, 8))
    expected = [[by_enumeration(choosing, row, number) for number in range(1, 8)] for row in (reported, choosing)]
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=1e-13)


def test_best_of_n_is_unbiased_and_stable_at_128() -> None:
    """Of uniform rewards the best of N has the mean N / (N + 1); M = 1000 where C(M, N) has no float64."""
    numbers = [1, 2, 16, 128]
    rewards = np.random.default_rng(0).random((400, 1000))
    found = best_of_n(rewards, rewards, numbers)
    errors = found.std(0, ddof=1) / math.sqrt(len(found))
    expected = np.array([number / (number + 1) for number in numbers])
    assert (np.abs(found.mean(0) - expected) < 3 * errors).all()
    np.testing.assert_allclose(best_of_n(np.zeros((1, 1000)), np.ones((1, 1000)), numbers), 1, rtol=1e-12)
    with pytest.raises(ValueError, match=r"needs N in 1 \.\.\. 1000, the samples of a prompt, got \[1001\]"):
        best_of_n(rewards, rewards, [1001])


def test_the_kl_of_best_of_n_is_its_bound_without_ties_and_below_with_them() -> None:
    """Of V equally likely answers the best of N is the i-th with (i^N - (i - 1)^N) / V^N."""
    numbers = [1, 2, 4, 128]
    bound = best_of_n_kl_bound(numbers)
    for number, most in zip(numbers, bound, strict=True):
        for num_answers, tolerance in ((4, math.inf), (20_000, 1e-3)):
            chances = np.diff((np.arange(num_answers + 1) / num_answers) ** number)
            kept = chances[chances > 0]
            kl = float((kept * np.log(num_answers * kept)).sum())
            assert kl <= most + 1e-12
            assert most - kl < tolerance
    assert bound[0] == 0


def test_the_ideal_frontier_is_that_of_the_optimal_policy() -> None:
    """An answer of 4 is sampled as often as the reference has it, so that the weighted sums are those of pi*."""
    reference, rewards = np.array([0.5, 0.25, 0.2, 0.05]), np.array([0.0, 1.0, -1.0, 3.0])
    betas = [1e-3, 0.5, 1.0, 100.0]
    samples = np.repeat(rewards, np.round(1000 * reference).astype(int))
    found = ideal_frontier(samples[None], betas)
    for place, beta in enumerate(betas):
        optimal = reference * np.exp((rewards - 3) / beta)
        optimal /= optimal.sum()
        kl = sum(p * math.log(p / q) for p, q in zip(optimal, reference, strict=True) if p)
        assert found.rewards_PB[0, place] == pytest.approx(optimal @ rewards, rel=1e-12)
        assert found.kls_PB[0, place] == pytest.approx(kl, rel=1e-9)
        assert found.effective_samples_PB[0, place] == pytest.approx(1000 / (optimal**2 / reference).sum())


def test_the_ideal_frontier_is_estimated_from_drawn_samples_and_says_where_it_cannot() -> None:
    """Rewards of the reference are N(0, 1): at beta pi* has reward 1 / beta and KL 1 / (2 beta^2)."""
    rewards = np.random.default_rng(1).normal(size=(200, 500))
    found = ideal_frontier(rewards, [2.0, 1.0, 0.1])
    assert found.valid_B.tolist() == [True, True, False]
    assert found.rewards_PB.mean(0)[:2] == pytest.approx([0.5, 1.0], abs=0.03)
    assert found.kls_PB.mean(0)[:2] == pytest.approx([0.125, 0.5], abs=0.03)
    assert (found.kls_PB <= math.log(500) + 1e-12).all()
    with pytest.raises(ValueError, match="beta must be > 0"):
        ideal_frontier(rewards, [0.0])
    with pytest.raises(ValueError, match="not finite"):
        ideal_frontier(np.array([[0.0, math.nan]]), [1.0])
