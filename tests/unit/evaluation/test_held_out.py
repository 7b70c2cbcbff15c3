"""Figures over held-out pairs, by hand."""

from __future__ import annotations

import math
import random

import pytest

from dpo_cli.evaluation.held_out import HeldOut, HeldOutPair, summarize_held_out


def summarize(pairs: list[HeldOutPair], beta: float = 0.5) -> HeldOut:
    return summarize_held_out(pairs, beta, draws=200, confidence=0.9, seed=0)


def pair(
    number: int,
    policy: tuple[float, float],
    reference: tuple[float, float],
    num_tokens: tuple[int, int] = (3, 3),
    group: str = "",
) -> HeldOutPair:
    return HeldOutPair(f"row-{number:03d}", group or f"prompt-{number}", policy, reference, num_tokens)


PAIRS = [
    pair(0, (-8.0, -12.0), (-10.0, -10.0), (5, 3)),  # delta 4: right, reference undecided, chosen longer
    pair(1, (-12.0, -9.0), (-10.0, -9.0), (3, 5)),  # delta -2: wrong, reference wrong, chosen shorter
    pair(2, (-5.0, -7.0), (-6.0, -8.0), (4, 4)),  # delta 0: a tie, reference right, equally long
    pair(3, (-5.0, -7.0), (-5.0, -6.0), (4, 2)),  # delta 1: right, reference right, chosen longer
]


def test_the_figures_are_means_over_pairs() -> None:
    found = summarize(PAIRS)
    assert found.margins == pytest.approx([2.0, -1.0, 0.0, 0.5])
    assert found.margin.value == pytest.approx(1.5 / 4)
    assert found.reward_accuracy.value == (1 + 0 + 0.5 + 1) / 4
    assert found.reference_accuracy == (0.5 + 0 + 1 + 1) / 4
    assert found.longer_accuracy == (1 + 0 + 0.5 + 1) / 4
    assert found.chosen_reward == pytest.approx(0.5 * (2 - 2 + 1 + 0) / 4)
    assert found.rejected_reward == pytest.approx(0.5 * (-2 + 0 + 1 - 1) / 4)
    assert (found.num_ties, found.num_pairs) == (1, 4)
    expected = sum(math.log1p(math.exp(-margin)) for margin in (2.0, -1.0, 0.0, 0.5)) / 4
    assert found.loss.value == pytest.approx(expected, rel=1e-12)


def test_the_rows_are_what_the_means_are_of() -> None:
    found = summarize(PAIRS[::-1])
    assert [row.id for row in found.rows] == [pair.id for pair in PAIRS]
    assert [row.group for row in found.rows] == [pair.group for pair in PAIRS]
    for name in ("margin", "loss", "chosen_reward", "rejected_reward"):
        mean = sum(getattr(row, name) for row in found.rows) / len(found.rows)
        expected = getattr(found, name)
        assert mean == pytest.approx(getattr(expected, "value", expected)), name


def test_nothing_depends_on_the_order_of_the_rows() -> None:
    rng = random.Random(0)
    pairs = [
        pair(
            i,
            (-30 * rng.random(), -30 * rng.random()),
            (-30 * rng.random(), -30 * rng.random()),
            (rng.randint(1, 9), rng.randint(1, 9)),
            group=f"prompt-{i % 11}",
        )
        for i in range(50)
    ]
    before = summarize(pairs)
    rng.shuffle(pairs)
    assert summarize(pairs) == before


def test_intervals_are_by_prompt() -> None:
    values = [((-8.0, -12.0), (-10.0, -10.0)), ((-12.0, -8.0), (-10.0, -10.0))] * 20
    apart = summarize([pair(i, *value) for i, value in enumerate(values)])
    together = summarize([pair(i, *value, group=f"prompt-{i % 4}") for i, value in enumerate(values)])
    assert apart.reward_accuracy.value == together.reward_accuracy.value == 0.5
    width = apart.reward_accuracy.high - apart.reward_accuracy.low
    assert together.reward_accuracy.high - together.reward_accuracy.low > 2 * width


def test_policy_equal_to_reference_is_all_ties() -> None:
    found = summarize([pair(i, (-5.0 - i, -7.0), (-5.0 - i, -7.0)) for i in range(6)])
    assert (found.reward_accuracy.value, found.num_ties) == (0.5, 6)
    assert found.loss.value == pytest.approx(math.log(2), rel=1e-12)
