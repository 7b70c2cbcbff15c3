"""Pairwise verdicts: lists and matrices, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_cli.data.formats.rankings import read_verdicts
from dpo_cli.data.problem import RowProblem


@pytest.mark.parametrize(
    ("values", "num", "decided"),
    [
        # the pairs are 1-2, 1-3, 2-3
        ([1, 1, 1], 3, [(0, 1), (0, 2), (1, 2)]),
        ([2, 2, 2], 3, [(1, 0), (2, 0), (2, 1)]),
        ([1, 2, 0], 3, [(0, 1), (2, 0)]),
        ([0, 0, 0], 3, []),
        ([1, 2, 1], 3, [(0, 1), (2, 0), (1, 2)]),  # 1 > 2 > 3 > 1
        ([1.0, 0.0, 2.0], 3, [(0, 1), (2, 1)]),
        ([2], 2, [(1, 0)]),
        # 1-2, 1-3, 1-4, 2-3, 2-4, 3-4
        ([1, 1, 2, 1, 2, 0], 4, [(0, 1), (0, 2), (3, 0), (1, 2), (3, 1)]),
        # wins counted
        ([[0, 3, 1], [2, 0, 1], [1, 4, 0]], 3, [(0, 1), (2, 1)]),
        ([[0, 1], [0, 0]], 2, [(0, 1)]),
        ([[None, True], [False, None]], 2, [(0, 1)]),
        # probabilities, and log-odds
        ([[0.5, 0.7, 0.5], [0.3, 0.5, 0.9], [0.5, 0.1, 0.5]], 3, [(0, 1), (1, 2)]),
        ([[0, -1.5], [1.5, 0]], 2, [(1, 0)]),
        ([["", "0.2"], ["0.8", ""]], 2, [(1, 0)]),
    ],
)
def test_verdicts_decide_pairs(values: Any, num: int, decided: list[tuple[int, int]]) -> None:
    assert read_verdicts(values, num) == decided


@pytest.mark.parametrize(
    ("values", "num", "reason"),
    [
        (1, 2, "bad_ranking"),
        ("1", 2, "bad_ranking"),
        (None, 2, "bad_ranking"),
        ([], 2, "bad_ranking"),
        ([1, 1], 3, "bad_ranking"),
        ([1, 1, 1, 1], 3, "bad_ranking"),
        ([1, 3, 1], 3, "bad_ranking"),
        ([1, -1, 1], 3, "bad_ranking"),
        ([1, None, 1], 3, "bad_ranking"),
        ([True, False, True], 3, "bad_ranking"),
        (["1", "2", "0"], 3, "bad_ranking"),
        ([[0, 1], [0]], 2, "bad_ranking"),
        ([[0, 1, 0], [0, 0, 0]], 2, "bad_ranking"),
        ([[0, None], [1, 0]], 2, "not_a_number"),
        ([[0, 0.7], [0, 0]], 2, "bad_ranking"),  # half a matrix
        ([[0, 0.7], [0.7, 0]], 2, "bad_ranking"),
    ],
)
def test_odd_verdicts_are_refused(values: Any, num: int, reason: str) -> None:
    with pytest.raises(RowProblem) as caught:
        read_verdicts(values, num)
    assert caught.value.reason == reason
