"""Signs of degeneration in answers: how much they repeat themselves, and how few different things they say."""

from __future__ import annotations

from collections.abc import Sequence


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of an answer's n-grams that stood in it before; 0 where it is shorter than n tokens.

    Source: Welleck et al. 2019, Neural text generation with unlikelihood training, section 6.1 (seq-rep-n).
    """
    grams = _grams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[Sequence[int]], n: int = 2) -> float | None:
    """Different n-grams over all n-grams of all answers; None where none is so long.

    It falls with the number of tokens, so only figures over as many prompts and like lengths compare.

    Source: Li et al. 2016, A diversity-promoting objective function, section 5 (distinct-n).
    """
    grams = [gram for tokens in answers for gram in _grams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else None


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[begin : begin + n]) for begin in range(len(tokens) - n + 1)]
