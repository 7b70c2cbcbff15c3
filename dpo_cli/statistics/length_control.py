"""The win rate that would be left if both answers were as long: logit p = theta + phi tanh(dlen / sd).

Judges like long answers. Outcomes are regressed on the difference of lengths, and LC =
sigma(theta) is the win probability where it is 0. It is not AlpacaEval's length-controlled win rate,
which fits the difficulty of each prompt and all models together: call it offline LC.

Source: the length term of Dubois et al. 2024, Length-controlled AlpacaEval, alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_cli.statistics.bootstrap import Estimate, cluster_weights, percentile_interval, rate_interval

_MAX_STEPS = 100
_TOLERANCE = 1e-9
_LONGEST_STEP = 2.0

ALL_AS_LONG = "all answers are as long as their opponents, so it is the win rate itself"
SAME_DIFFERENCE = "all length differences are the same, so their effect cannot be told from the models'"
SEPARABLE = "the length difference, or no loss or no win at all, tells the outcomes apart, so the fit is infinite"


@dataclass(frozen=True)
class LengthControlled:
    """A win rate with and without the advantage of length.

    Attributes:
        win_rate: Mean outcome.
        controlled: LC = sigma(theta); None where there is no such fit. Its interval is NaN where more than a few of
            the draws have none.
        length_effect: phi, logits: what an answer gains that is longer by far more than sd; 0 without a fit.
        scale: sd of the length differences, in their unit.
        why: What is special; empty where nothing is.
    """

    win_rate: Estimate
    controlled: Estimate | None
    length_effect: float
    scale: float
    why: str = ""


def control_length(
    outcomes: Sequence[float],
    length_differences: Sequence[float],
    prompts: Sequence[str],
    *,
    draws: int,
    confidence: float,
    seed: int,
) -> LengthControlled:
    """The win rate at equal length, with its interval by prompt.

    sd is that of all the data in each draw, too: it is the unit of length.

    Args:
        outcomes: In [0, 1], how far ours is better, one a row; 0.5 is a tie.
        length_differences: Ours minus theirs, tokens or any other unit.
        prompts: The row's prompt.
        draws: Bootstrap draws.
        confidence: Coverage of the intervals.
        seed: Of the draws. The result does not depend on the order of the rows.

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
    win_rate = rate_interval(y.tolist(), names[owners].tolist(), draws=draws, confidence=confidence, seed=seed)
    scale = 0.0 if (lengths == lengths[0]).all() else float(lengths.std())
    if scale == 0:
        if lengths[0] == 0:
            return LengthControlled(win_rate, win_rate, 0.0, 0.0, ALL_AS_LONG)
        return LengthControlled(win_rate, None, 0.0, 0.0, SAME_DIFFERENCE)
    x = np.tanh(lengths / scale)
    theta, phi = fit_length(y, x, np.ones((1, len(y))))[0]
    if np.isnan(theta):
        return LengthControlled(win_rate, None, 0.0, scale, SEPARABLE)
    found = [
        _sigma(fit_length(y, x, weights[:, owners].astype(np.float64))[:, 0])
        for weights in cluster_weights(len(names), draws=draws, seed=seed)
    ]
    low, high = percentile_interval(np.concatenate(found), confidence)
    return LengthControlled(win_rate, Estimate(float(_sigma(theta)), low, high), float(phi), scale)


def fit_length(outcomes: np.ndarray, lengths: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted logistic regressions of soft outcomes on a constant and one variable, by Newton's method.

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
        if longest.max() < _TOLERANCE:
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


def _sigma(logit: float | np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # of NaN
        return np.exp(-np.logaddexp(0, -np.asarray(logit)))
