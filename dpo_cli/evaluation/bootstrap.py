"""Intervals by a bootstrap over prompts: rows of one prompt are not independent."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

_MAX_CELLS = 4_000_000


@dataclass(frozen=True)
class Estimate:
    """A mean with its interval.

    Attributes:
        value: The mean over rows.
        low: Lower end of the interval.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def cluster_bootstrap(
    values: Sequence[float], clusters: Sequence[str], *, draws: int, confidence: float, seed: int
) -> Estimate:
    """The mean of values and its percentile interval, clusters drawn with replacement.

    Args:
        values: One value a row.
        clusters: The row's cluster: its prompt.
        draws: Bootstrap draws.
        confidence: Coverage of the interval.
        seed: Of the draws. The result does not depend on the order of the rows.

    Source: Cameron, Gelbach and Miller 2008, the pairs cluster bootstrap.
    """
    columns = np.asarray(values, dtype=np.float64)[:, None]
    return cluster_bootstrap_of(
        lambda sums, counts: sums[:, 0] / counts, columns, clusters, draws=draws, confidence=confidence, seed=seed
    )


def cluster_bootstrap_of(
    statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
    columns: np.ndarray,
    clusters: Sequence[str],
    *,
    draws: int,
    confidence: float,
    seed: int,
) -> Estimate:
    """A statistic of sums over rows, and its percentile interval, clusters drawn with replacement.

    Args:
        statistic: From sums [draws, columns] and numbers of rows [draws] to the statistic [draws].
        columns: float64 [rows, columns], what is summed.
        clusters: The row's cluster: its prompt.
        draws: Bootstrap draws.
        confidence: Coverage of the interval.
        seed: Of the draws. The result does not depend on the order of the rows.
    """
    names, owners = np.unique(np.asarray(clusters), return_inverse=True)
    order = np.lexsort((*columns.T[::-1], owners))
    owners = owners[order]
    sums = np.stack([np.bincount(owners, weights=column, minlength=len(names)) for column in columns[order].T], axis=-1)
    counts = np.bincount(owners, minlength=len(names)).astype(np.float64)
    rng = np.random.default_rng(seed)
    found = []
    step = max(1, _MAX_CELLS // len(names))
    for begin in range(0, draws, step):
        chosen = rng.integers(len(names), size=(min(step, draws - begin), len(names)))
        drawn = np.stack([column[chosen].sum(1) for column in sums.T], axis=-1)
        found.append(statistic(drawn, counts[chosen].sum(1)))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(found), [tail, 1 - tail])
    (value,) = statistic(sums.sum(0, keepdims=True), counts.sum(keepdims=True))
    return Estimate(float(value), float(low), float(high))
