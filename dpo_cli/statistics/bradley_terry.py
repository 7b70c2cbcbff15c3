"""Strengths of more than two models from pairwise outcomes, by Bradley-Terry.

P(i beats j) = sigma(s_i - s_j). The likelihood depends on the outcomes by the wins of each model
over each other one alone, a tie being half a win for both: it is a logistic regression, convex,
and fixed up to a constant, so one model, the anchor, is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_cli.statistics.bootstrap import Estimate, cluster_weights, percentile_interval

_MAX_STEPS = 100
_TOLERANCE = 1e-10
_LONGEST_STEP = 2.0


@dataclass(frozen=True)
class Outcome:
    """A comparison of two models' answers to a prompt.

    Attributes:
        prompt: The prompt's id.
        first: A model.
        second: Another one.
        win: In [0, 1], how far the first is better; 0.5 is a tie.
    """

    prompt: str
    first: str
    second: str
    win: float


@dataclass(frozen=True)
class Strengths:
    """What pairwise outcomes say of models.

    Attributes:
        anchor: The model whose strength is 0.
        strengths: By model, logits; the interval is that of the difference from the anchor.
        win_probability: By model and other model, sigma of the difference of their strengths.
        num_outcomes: Comparisons.
        num_prompts: Different prompts in them.
    """

    anchor: str
    strengths: dict[str, Estimate]
    win_probability: dict[tuple[str, str], Estimate]
    num_outcomes: int
    num_prompts: int


def fit_strengths(outcomes: Sequence[Outcome], anchor: str, *, draws: int, confidence: float, seed: int) -> Strengths:
    """Strengths of all models with intervals by prompt.

    Draws in which the strengths are infinite are left out; where they are more than a few, there is no interval.

    Args:
        outcomes: Comparisons, none of a model with itself.
        anchor: The model whose strength is 0.
        draws: Bootstrap draws.
        confidence: Coverage of the intervals.
        seed: Of the draws. The result does not depend on the order of the outcomes.

    Raises:
        ValueError: The anchor is no model of them, an outcome is not in [0, 1] or of a model with itself, or the
            strengths are infinite: the models fall in two parts of which one never wins against the other.

    Source: Bradley and Terry 1952; existence as in Ford 1957.
    """
    models = sorted({name for each in outcomes for name in (each.first, each.second)})
    if anchor not in models:
        raise ValueError(f"the anchor {anchor} is none of the models {', '.join(models)}")
    if any(each.first == each.second or not 0 <= each.win <= 1 for each in outcomes):
        raise ValueError("an outcome needs two different models and a value in [0, 1]")
    number = {name: index for index, name in enumerate(models)}
    size = len(models)
    prompts, owners = np.unique([each.prompt for each in outcomes], return_inverse=True)
    by_prompt = np.zeros((len(prompts), size, size))
    order = sorted(range(len(outcomes)), key=lambda row: (outcomes[row].first, outcomes[row].second, outcomes[row].win))
    for row in order:
        each = outcomes[row]
        i, j = number[each.first], number[each.second]
        by_prompt[owners[row], i, j] += each.win
        by_prompt[owners[row], j, i] += 1 - each.win
    wins = by_prompt.sum(0)
    if not _is_connected(wins[None])[0]:
        raise ValueError(_why_infinite(wins, models))
    base = number[anchor]
    fitted = bradley_terry(wins[None], base)[0]
    drawn = np.concatenate(
        [
            bradley_terry((weights @ by_prompt.reshape(len(prompts), -1)).reshape(-1, size, size), base)
            for weights in cluster_weights(len(prompts), draws=draws, seed=seed)
        ]
    )

    def difference(i: int, j: int) -> Estimate:
        return Estimate(float(fitted[i] - fitted[j]), *percentile_interval(drawn[:, i] - drawn[:, j], confidence))

    differences = {(i, j): difference(i, j) for i in range(size) for j in range(size)}
    return Strengths(
        anchor=anchor,
        strengths={name: differences[index, base] for index, name in enumerate(models)},
        win_probability={
            (models[i], models[j]): Estimate(*(float(_sigma(end)) for end in (each.value, each.low, each.high)))
            for (i, j), each in differences.items()
            if i != j
        },
        num_outcomes=len(outcomes),
        num_prompts=len(prompts),
    )


def bradley_terry(wins: np.ndarray, anchor: int) -> np.ndarray:
    """Maximum-likelihood strengths by Newton's method.

    Maximizes sum_ij w_ij log sigma(s_i - s_j). Gradient: g_i = sum_j w_ij - n_ij p_ij with n = w + w^T; Hessian: the
    Laplacian of the graph with weights n_ij p_ij (1 - p_ij).

    Args:
        wins: [draws, M, M], wins of the first model over the second, ties half; the diagonal is 0.
        anchor: Which of the M models is 0.

    Returns:
        float64 [draws, M], logits; NaN where they are infinite.
    """
    wins = np.asarray(wins, dtype=np.float64)
    num_draws, size, _ = wins.shape
    free = [index for index in range(size) if index != anchor]
    games = wins + wins.transpose(0, 2, 1)
    strengths = np.zeros((num_draws, size))
    connected = _is_connected(wins)
    for _ in range(_MAX_STEPS):
        p = _sigma(strengths[:, :, None] - strengths[:, None, :])
        gradient = (wins - games * p).sum(-1)
        weights = games * p * (1 - p)
        hessian = np.eye(size) * weights.sum(-1)[:, :, None] - weights
        hessian[~connected] = np.eye(size)
        step = np.linalg.solve(hessian[:, free][:, :, free], gradient[:, free, None])[..., 0]
        step[~connected] = 0
        longest = np.abs(step).max(-1, keepdims=True, initial=0)
        strengths[:, free] += step * np.minimum(1, _LONGEST_STEP / np.maximum(longest, _LONGEST_STEP))
        if longest.max(initial=0) < _TOLERANCE:
            break
    strengths[~connected] = np.nan
    return strengths


def _is_connected(wins: np.ndarray) -> np.ndarray:
    """Whether each model reaches each other one by wins, bool [draws]: then the strengths are finite (Ford 1957)."""
    size = wins.shape[-1]
    reach = (wins > 0) | np.eye(size, dtype=bool)
    for _ in range(max(1, size.bit_length())):
        reach = (reach.astype(np.int64) @ reach.astype(np.int64)) > 0
    return np.asarray(reach.all((-1, -2)))


def _why_infinite(wins: np.ndarray, models: Sequence[str]) -> str:
    size = len(models)
    reach = (wins > 0) | np.eye(size, dtype=bool)
    for _ in range(size):
        reach = (reach.astype(np.int64) @ reach.astype(np.int64)) > 0
    below = next(row for row in reach if not row.all())
    weak = [name for name, reached in zip(models, below, strict=True) if reached]
    strong = [name for name, reached in zip(models, below, strict=True) if not reached]
    return (
        f"strengths are infinite: {', '.join(weak)} never won against {', '.join(strong)}, directly or through others;"
        " compare on more prompts, or leave models out"
    )


def _sigma(logit: float | np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of NaN
        return np.exp(-np.logaddexp(0, -np.asarray(logit)))
