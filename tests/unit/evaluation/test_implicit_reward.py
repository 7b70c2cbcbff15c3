"""Accuracy and margin of pairs and rankings by their implicit reward."""

from __future__ import annotations

import itertools
import random

import pytest

from dpo_cli.evaluation.implicit_reward import RankedAnswers, agreements, summarize_rewards


def ranked(ranks: tuple[int, ...], rewards: tuple[float, ...], group: str = "g") -> RankedAnswers:
    return RankedAnswers(group, ranks, rewards, tuple(-value for value in rewards), tuple(range(1, len(ranks) + 1)))


def test_a_pair_is_right_wrong_or_a_tie() -> None:
    rows = [ranked((1, 2), rewards) for rewards in ((2.0, 1.0), (1.0, 2.5), (1.0, 1.0))]
    found = agreements(rows)
    assert [one.accuracy for one in found] == [1, 0, 0.5]
    assert [one.margin for one in found] == [1, -1.5, 0]
    assert [one.outcome for one in found] == ["right", "wrong", "tie"]
    assert [one.num_ties for one in found] == [0, 0, 1]
    assert [one.reference_accuracy for one in found] == [0, 1, 0.5]
    assert [one.longer_accuracy for one in found] == [0, 0, 0], "the second answer is the longer one"


def test_rankings_of_any_size_agree_with_counting() -> None:
    rng = random.Random(0)
    rows = []
    for number in range(60):
        size = rng.randint(2, 6)
        ranks = (*sorted(rng.randint(1, 3) for _ in range(size - 1)), 4)
        rows.append(ranked(ranks, tuple(float(rng.randint(0, 3)) for _ in range(size)), f"g{number % 7}"))
    for row, found in zip(rows, agreements(rows), strict=True):
        pairs = [
            (better, worse)
            for (a, better), (b, worse) in itertools.product(zip(row.ranks, row.rewards, strict=True), repeat=2)
            if a < b
        ]
        scores = [1.0 if better > worse else 0.5 if better == worse else 0.0 for better, worse in pairs]
        assert found.num_compared == len(pairs)
        assert found.num_ties == scores.count(0.5)
        assert found.accuracy == pytest.approx(sum(scores) / len(scores))
        assert found.margin == pytest.approx(sum(better - worse for better, worse in pairs) / len(pairs))
        expected = "wrong" if 0.0 in scores else "tie" if 0.5 in scores else "right"
        assert found.outcome == expected


def test_every_row_counts_once_and_intervals_are_clustered_by_prompt() -> None:
    rows = [ranked((1, 2), (1.0, 0.0), "a"), ranked((1, 2), (0.0, 1.0), "b"), ranked((1, 2, 3), (3.0, 2.0, 1.0), "b")]
    summary = summarize_rewards(rows, agreements(rows), draws=200, confidence=0.9, seed=0)
    assert summary.accuracy.value == pytest.approx(2 / 3)
    assert (summary.num_rows, summary.num_prompts, summary.num_compared, summary.num_ties) == (3, 2, 5, 0)
    assert summary.accuracy.low <= summary.accuracy.value <= summary.accuracy.high
