"""Two logistic regressions of outcomes by Newton's method: strengths of models, and the win rate at equal length.

Bradley-Terry: P(i beats j) = sigma(s_i - s_j). The likelihood depends on the outcomes by the wins of each model over
each other one alone, a tie being half a win for both: it is convex and fixed up to a constant, so one model, the
anchor, is 0.

Length: logit p = theta + phi tanh(dlen / sd). Judges like long answers. LC = sigma(theta) is the win probability where
the difference of lengths is 0. It is not AlpacaEval's length-controlled win rate, which fits the difficulty of each
prompt and all models together: call it offline LC.

Source: Bradley and Terry 1952; the length term of Dubois et al. 2024, Length-controlled AlpacaEval, alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_cli.statistics.intervals import Estimate, Sampling

_MAX_STEPS = 100
_TOLERANCE = 1e-10
_LENGTH_TOLERANCE = 1e-9
_LONGEST_STEP = 2.0

ALL_AS_LONG = "all answers are as long as their opponents, so it is the win rate itself"
SAME_DIFFERENCE = "all length differences are the same, so their effect cannot be told from the models'"
SEPARABLE = "the length difference, or no loss or no win at all, tells the outcomes apart, so the fit is infinite"


def _sigma(logit: float | np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of NaN
        return np.exp(-np.logaddexp(0, -np.asarray(logit)))


# --- strengths ------------------------------------------------------------------------------


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


def fit_strengths(outcomes: Sequence[Outcome], anchor: str, sampling: Sampling) -> dict[str, Estimate]:
    """Strengths of all models by name, logits, with intervals by prompt: that of the difference from the anchor.

    Draws in which the strengths are infinite are left out; where they are more than a few, there is no interval.

    Args:
        outcomes: Comparisons, none of a model with itself, in any order.
        anchor: The model whose strength is 0.
        sampling: How intervals are drawn.

    Raises:
        ValueError: The anchor is no model of them, an outcome is not in [0, 1] or of a model with itself, or the
            strengths are infinite: the models fall in two parts of which one never wins against the other (Ford 1957).
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
    for row in sorted(
        range(len(outcomes)), key=lambda row: (outcomes[row].first, outcomes[row].second, outcomes[row].win)
    ):
        each = outcomes[row]
        i, j = number[each.first], number[each.second]
        by_prompt[owners[row], i, j] += each.win
        by_prompt[owners[row], j, i] += 1 - each.win
    wins = by_prompt.sum(0)
    reach = _reach(wins)
    if not reach.all():
        raise ValueError(_why_infinite(reach, models))
    base = number[anchor]
    fitted = bradley_terry(wins[None], base)[0]
    drawn = np.concatenate(
        [
            bradley_terry((weights @ by_prompt.reshape(len(prompts), -1)).reshape(-1, size, size), base)
            for weights in sampling.weights(len(prompts))
        ]
    )
    return {
        name: sampling.of_draws(float(fitted[i] - fitted[base]), drawn[:, i] - drawn[:, base])
        for i, name in enumerate(models)
    }


def bradley_terry(wins: np.ndarray, anchor: int) -> np.ndarray:
    """Maximum-likelihood strengths.

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
    connected = _reach(wins).all((-1, -2))
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


def _reach(wins: np.ndarray) -> np.ndarray:
    """Which model reaches which by wins, bool [..., M, M]: the strengths are finite where each reaches each."""
    size = wins.shape[-1]
    reach = (wins > 0) | np.eye(size, dtype=bool)
    for _ in range(max(1, size.bit_length())):
        reach = (reach.astype(np.int64) @ reach.astype(np.int64)) > 0
    return reach


def _why_infinite(reach: np.ndarray, models: Sequence[str]) -> str:
    below = next(row for row in reach if not row.all())
    weak = [name for name, reached in zip(models, below, strict=True) if reached]
    strong = [name for name, reached in zip(models, below, strict=True) if not reached]
    return (
        f"strengths are infinite: {', '.join(weak)} never won against {', '.join(strong)}, directly or through others;"
        " compare on more prompts, or leave models out"
    )


# --- length ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthControlled:
    """A win rate without the advantage of length.

    Attributes:
        controlled: LC = sigma(theta); None where there is no such fit. Its interval is NaN where more than a few of
            the draws have none.
        length_effect: phi, logits: what an answer gains that is longer by far more than sd; 0 without a fit.
        scale: sd of the length differences, in their unit.
        why: What is special; empty where nothing is.
    """

    controlled: Estimate | None
    length_effect: float
    scale: float
    why: str = ""


def control_length(
    outcomes: Sequence[float], length_differences: Sequence[float], prompts: Sequence[str], sampling: Sampling
) -> LengthControlled:
    """The win rate at equal length, with its interval by prompt.

    sd is that of all the data in each draw, too: it is the unit of length.

    Args:
        outcomes: In [0, 1], how far ours is better, one a row; 0.5 is a tie.
        length_differences: Ours minus theirs, tokens or any other unit.
        prompts: The row's prompt.
        sampling: How the interval is drawn.

    Raises:
        ValueError: There are no rows, their numbers differ, or a value is not in its range.
    """
    if not len(outcomes) == len(length_differences) == len(prompts) or not len(outcomes):
        raise ValueError("outcomes, length differences and prompts must be as many, one at the least")
    order = sorted(range(len(outcomes)), key=lambda row: (prompts[row], length_differences[row], outcomes[row]))
    y = np.array([outcomes[row] for row in order], dtype=np.float64)
    lengths = np.array([length_differences[row] for row in order], dtype=np.float64)
    if not ((y >= 0) & (y <= 1)).all() or not np.isfinite(lengths).all():
        raise ValueError("outcomes must be in [0, 1] and length differences finite")
    names, owners = np.unique(np.array([prompts[row] for row in order]), return_inverse=True)
    if (lengths == lengths[0]).all():
        if lengths[0] == 0:
            return LengthControlled(sampling.rate(y.tolist(), names[owners].tolist()), 0.0, 0.0, ALL_AS_LONG)
        return LengthControlled(None, 0.0, 0.0, SAME_DIFFERENCE)
    scale = float(lengths.std())
    x = np.tanh(lengths / scale)
    theta, phi = fit_length(y, x, np.ones((1, len(y))))[0]
    if np.isnan(theta):
        return LengthControlled(None, 0.0, scale, SEPARABLE)
    found = [
        _sigma(fit_length(y, x, weights[:, owners].astype(np.float64))[:, 0])
        for weights in sampling.weights(len(names))
    ]
    controlled = sampling.of_draws(float(_sigma(theta)), np.concatenate(found))
    return LengthControlled(controlled, float(phi), scale)


def fit_length(outcomes: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted logistic regressions of soft outcomes on a constant and one variable.

    Maximizes sum_i w_i (y_i log p_i + (1 - y_i) log(1 - p_i)) with p_i = sigma(theta + phi x_i): concave. It has a
    finite maximum if wins and losses overlap in x (Albert and Anderson 1984); a soft outcome is both in part.

    Args:
        outcomes: y [rows] in [0, 1].
        lengths: x [rows].
        weights: w [draws, rows], 0 or more.

    Returns:
        float64 [draws, 2], theta and phi, logits; NaN where there is no finite maximum.
    """
    finite = _overlap(outcomes, lengths, weights)
    weights = np.where(finite[:, None], weights, 1.0)
    found = np.zeros((len(weights), 2))
    for _ in range(_MAX_STEPS):
        p = _sigma(found[:, :1] + found[:, 1:] * lengths)
        residual = weights * (outcomes - p)
        curvature = weights * p * (1 - p)
        g0, g1 = residual.sum(-1), residual @ lengths
        h00, h01, h11 = curvature.sum(-1), curvature @ lengths, curvature @ lengths**2
        determinant = np.maximum(h00 * h11 - h01**2, np.finfo(np.float64).tiny)
        step = np.stack([h11 * g0 - h01 * g1, h00 * g1 - h01 * g0], axis=-1) / determinant[:, None]
        step[~finite] = 0
        longest = np.abs(step).max(-1, keepdims=True)
        found += step * np.minimum(1, _LONGEST_STEP / np.maximum(longest, _LONGEST_STEP))
        if longest.max() < _LENGTH_TOLERANCE:
            break
    found[~finite] = np.nan
    return found


def _overlap(outcomes: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Whether some win lies below some loss in x, and some loss below some win, bool [draws]."""
    there = weights > 0
    wins, losses = there & (outcomes > 0), there & (outcomes < 1)
    lowest_win = np.where(wins, lengths, np.inf).min(-1)
    highest_win = np.where(wins, lengths, -np.inf).max(-1)
    lowest_loss = np.where(losses, lengths, np.inf).min(-1)
    highest_loss = np.where(losses, lengths, -np.inf).max(-1)
    return (lowest_win < highest_loss) & (lowest_loss < highest_win)
