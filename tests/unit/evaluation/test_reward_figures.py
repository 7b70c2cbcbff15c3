"""Figures of a reward model: accuracy, log-loss, calibration, and what length alone would give."""

from __future__ import annotations

import math
import random

import pytest

from dpo_cli.evaluation.reward_figures import RewardedPair, RewardFigures, summarize_rewards


def pair(number: int, chosen: float, rejected: float, lengths: tuple[int, int] = (5, 5)) -> RewardedPair:
    return RewardedPair(f"row-{number:05d}", f"prompt-{number // 2}", (chosen, rejected), lengths)


def figures(pairs: list[RewardedPair]) -> RewardFigures:
    return summarize_rewards(pairs, draws=500, confidence=0.95, seed=0)


def test_the_figures_of_four_pairs() -> None:
    found = figures([pair(0, 2, 0, (6, 5)), pair(1, 0, 1, (4, 5)), pair(2, 3, 3), pair(3, 1, -1, (9, 2))])
    assert found.accuracy.value == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    losses = [math.log1p(math.exp(-margin)) for margin in (2, -1, 0, 2)]
    assert found.log_loss.value == pytest.approx(sum(losses) / 4)
    assert found.margin.value == pytest.approx(3 / 4)
    assert found.longer_accuracy.value == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert {name: count for name, (count, _) in found.by_length.items()} == {"longer": 2, "as_long": 1, "shorter": 1}
    accuracies = [estimate.value for _, estimate in found.by_length.values() if estimate is not None]
    assert accuracies == [1.0, 0.5, 0.0]
    assert (found.num_ties, found.num_pairs, found.num_prompts) == (1, 4, 2)
    # the bins of a tie, of 1 and of 2: |accuracy - probability| by their shares
    gaps = [abs(0.5 - 0.5), abs(0 - _sigma(1)), abs(1 - _sigma(2))]
    assert found.ece.value == pytest.approx((gaps[0] + gaps[1] + 2 * gaps[2]) / 4)
    assert [(cell.num_pairs, round(cell.accuracy.value, 6)) for cell in found.reliability] == [(1, 0.5), (1, 0), (2, 1)]
    assert [cell.probability for cell in found.reliability] == pytest.approx([0.5, _sigma(1), _sigma(2)])
    assert all(cell.low <= cell.probability <= cell.high for cell in found.reliability)


def test_no_pair_of_a_kind_has_no_figure_of_it() -> None:
    assert figures([pair(0, 1, 0)]).by_length["longer"] == (0, None)


def test_only_differences_count_and_no_order_of_rows() -> None:
    rng = random.Random(0)
    pairs = [pair(number, rng.gauss(1, 2), rng.gauss(0, 2)) for number in range(60)]
    moved = [
        RewardedPair(each.id, each.group, (each.rewards[0] + 512.0, each.rewards[1] + 512.0), each.num_tokens)
        for each in pairs
    ]
    first, second = figures(pairs), figures(moved[::-1])
    assert second.accuracy == first.accuracy
    assert second.log_loss.value == pytest.approx(first.log_loss.value)
    assert second.ece.value == pytest.approx(first.ece.value)


def test_a_true_model_is_calibrated_and_one_that_is_too_sure_is_not() -> None:
    """Labels drawn from Bradley-Terry of the rewards themselves, then of half of them."""
    rng = random.Random(1)
    true, boastful = [], []
    for number in range(6000):
        first, second = rng.gauss(0, 1.5), rng.gauss(0, 1.5)
        if rng.random() > _sigma(first - second):
            first, second = second, first
        true.append(pair(number, first, second))
        boastful.append(pair(number, 3 * first, 3 * second))
    assert figures(true).ece.value < 0.02
    found = figures(boastful)
    assert found.ece.value > 0.1
    assert found.ece.low <= found.ece.value <= found.ece.high
    assert found.accuracy == figures(true).accuracy
    assert found.log_loss.low > figures(true).log_loss.high


def test_rewards_of_any_size_overflow_nothing() -> None:
    found = figures([pair(0, 1e6, 0), pair(1, 0, 1e6)])
    assert found.log_loss.value == pytest.approx(5e5)
    assert found.accuracy.value == 0.5


def _sigma(margin: float) -> float:
    return 1 / (1 + math.exp(-margin))
