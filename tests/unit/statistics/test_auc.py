"""AUC: against counting all pairs, and intervals that know their clusters."""

from __future__ import annotations

import numpy as np
import pytest

from dpo_cli.statistics.auc import auc
from dpo_cli.statistics.intervals import Sampling, exact_interval

SAMPLING = Sampling(draws=500, confidence=0.95, seed=0)


def test_it_is_the_share_of_pairs_in_order_ties_as_one_half() -> None:
    rng = np.random.default_rng(0)
    values, kinds = rng.integers(0, 12, 200).astype(float), rng.random(200) < 0.3
    found = auc(values.tolist(), kinds.tolist(), [str(place) for place in range(200)], SAMPLING)
    pairs = [(a > b) + (a == b) / 2 for a in values[kinds] for b in values[~kinds]]
    assert found.value == pytest.approx(np.mean(pairs), abs=1e-12)
    assert found.low < found.value < found.high


def test_rows_of_one_prompt_count_once() -> None:
    rng = np.random.default_rng(1)
    values, kinds = rng.normal(size=120), np.arange(120) % 2 == 0
    names = [str(place) for place in range(120)]
    alone = auc(values.tolist(), kinds.tolist(), names, SAMPLING)
    four = auc(np.repeat(values, 4).tolist(), np.repeat(kinds, 4).tolist(), list(np.repeat(names, 4)), SAMPLING)
    assert four == alone  # four times as many rows, and not a bit surer
    # by the formula for independent rows (Hanley and McNeil 1982) the error is about 0.05
    assert alone.high - alone.low == pytest.approx(4 * 0.053, rel=0.25)


def test_few_prompts_on_a_side_are_counted_exactly() -> None:
    found = auc([3.0, 2.0, 1.0, 0.0], [True, True, False, False], ["a", "b", "c", "c"], SAMPLING)
    assert (found.value, found.low, found.high) == (1.0, *exact_interval(1, 1, 0.95))
