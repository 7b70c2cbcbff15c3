"""Calibration of sigma(margin), Bradley-Terry's probability that the chosen answer is the better one.

A margin is the difference of two rewards, chosen minus rejected, in nats. The model prefers the
answer with the higher reward with probability sigma(|margin|); it is right where that one is the
chosen one, a tie counting one half.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_cli.statistics.intervals import Estimate, Sampling

NUM_BINS = 10
"""Bins of the preferred answer's probability, equal parts of [1/2, 1]."""

_MAX_STEPS = 200


@dataclass(frozen=True)
class Bin:
    """Pairs whose preferred answer has a probability within a range.

    Attributes:
        low, high: The range.
        num_pairs: How many.
        probability: Mean probability of the preferred answers.
        accuracy: How often the preferred answer is the chosen one.
    """

    low: float
    high: float
    num_pairs: int
    probability: float
    accuracy: Estimate


def calibration_error(
    margins: np.ndarray, clusters: Sequence[str], sampling: Sampling, num_bins: int = NUM_BINS
) -> Estimate:
    """Expected calibration error of the preferred answer's probability sigma(|margin|).

    sum_b n_b / n |accuracy_b - probability_b| over the bins. Its interval leans upwards: noise never lowers it.

    Args:
        margins: [pairs], nats, at least one.
        clusters: The pair's prompt.
        sampling: How the interval is drawn.
        num_bins: Bins.

    Source: Guo et al. 2017, On calibration of modern neural networks, equation 3.
    """
    probability, bins = _binned(margins, num_bins)
    gaps = np.eye(num_bins)[bins] * (half_ties(margins) - probability)[:, None]
    return sampling.of_sums(lambda sums, counts: np.abs(sums).sum(1) / counts, gaps, clusters)


def reliability_table(
    margins: np.ndarray, clusters: Sequence[str], sampling: Sampling, num_bins: int = NUM_BINS
) -> list[Bin]:
    """The bins that hold a pair, ascending; arguments as those of :func:`calibration_error`."""
    probability, bins = _binned(margins, num_bins)
    right, owners = half_ties(margins), np.asarray(clusters)
    table = []
    for number in sorted(set(bins.tolist())):
        inside = bins == number
        accuracy = sampling.rate(right[inside].tolist(), owners[inside].tolist())
        low, high = (0.5 + end / (2 * num_bins) for end in (number, number + 1))
        table.append(Bin(low, high, int(inside.sum()), float(probability[inside].mean()), accuracy))
    return table


def fit_temperature(margins: np.ndarray) -> float:
    """The T > 0 at which sigma(margin / T) has the least log-loss: above 1 the margins are too sure, below 1 too shy.

    The mean of log(1 + exp(-a margin)) is convex in a = 1 / T; its slope is bisected.

    Args:
        margins: [pairs], nats, at least one.

    Returns:
        T; 0 where every margin but ties is positive, so that no sureness is too much; infinity where the margins
        point the wrong way on average or all are 0, so that a coin does better.

    Source: Guo et al. 2017, section 4.2, temperature scaling, for two classes.
    """
    margins = np.asarray(margins, dtype=np.float64)
    if margins.mean() <= 0:
        return math.inf
    if margins.min() >= 0:
        return 0.0

    def rises(a: float) -> bool:
        return float((margins * np.exp(-np.logaddexp(0, a * margins))).mean()) < 0

    low, high = 0.0, 1 / float(np.abs(margins).max())
    while not rises(high):
        low, high = high, 2 * high
    for _ in range(_MAX_STEPS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if rises(middle) else (middle, high)
    return 1 / high


def half_ties(differences: np.ndarray) -> np.ndarray:
    """1 where positive, 0 where negative, 1/2 where zero."""
    return (np.sign(differences) + 1) / 2


def _binned(margins: np.ndarray, num_bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the preferred answers, and the bin of each."""
    probability = 1 / (1 + np.exp(-np.abs(margins)))
    return probability, np.clip(((probability - 0.5) * 2 * num_bins).astype(int), 0, num_bins - 1)
