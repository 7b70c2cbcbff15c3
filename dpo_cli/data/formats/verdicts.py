"""Pairwise verdicts on K answers: a list over all pairs, or a matrix."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from dpo_cli.data.formats.base import number
from dpo_cli.data.problem import RowProblem, kind_of

_CLOSE = 1e-3


def read_verdicts(values: Any, num: int) -> list[tuple[int, int]]:
    """Decided pairs (better, worse) among ``num`` answers.

    Args:
        values: Verdicts on the pairs 1-2, 1-3, ..., 2-3, ...: 1 or 2 says which wins, 0 is a tie;
            or a matrix whose entry [i][j] says how often, or how likely, i beats j.
        num: How many answers there are.

    Raises:
        RowProblem: They are neither.
    """
    if not isinstance(values, list):
        raise RowProblem("bad_ranking", f"'preference' must be a list, got {kind_of(values)}")
    if len(values) == num and all(isinstance(line, list) and len(line) == num for line in values):
        return _read_matrix(values, num)
    pairs = list(combinations(range(num), 2))
    if len(values) != len(pairs) or not all(type(value) in (int, float) and value in (0, 1, 2) for value in values):
        raise RowProblem(
            "bad_ranking",
            f"'preference' must be a {num} by {num} matrix or {len(pairs)} verdicts that are 1, 2 or 0 (tie)",
        )
    return [(i, j) if value == 1 else (j, i) for (i, j), value in zip(pairs, values, strict=True) if value]


def _read_matrix(values: list[list[Any]], num: int) -> list[tuple[int, int]]:
    won: list[tuple[int, int]] = []
    for i, j in combinations(range(num), 2):
        mine, its = number(values[i][j], f"preference[{i}][{j}]"), number(values[j][i], f"preference[{j}][{i}]")
        # probabilities add up to one, log-odds to zero; half a matrix would be read wrongly
        if not (mine.is_integer() and its.is_integer()) and min(abs(mine + its - 1), abs(mine + its)) > _CLOSE:
            raise RowProblem(
                "bad_ranking", f"preference[{i}][{j}] and [{j}][{i}] must add up to 1 (or 0), got {mine + its:g}"
            )
        if mine != its:
            won.append((i, j) if mine > its else (j, i))
    return won
