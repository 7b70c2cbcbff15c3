"""Intervals by a bootstrap over prompts: rows of one prompt are not independent."""

from __future__ import annotations

from collections.abc import Sequence
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
    names, owners = np.unique(np.asarray(clusters), return_inverse=True)
    order = np.lexsort((np.asarray(values, dtype=np.float64), owners))
    data = np.asarray(values, dtype=np.float64)[order]
    sums = np.bincount(owners[order], weights=data, minlength=len(names))
    counts = np.bincount(owners, minlength=len(names)).astype(np.float64)
    rng = np.random.default_rng(seed)
    means = []
    step = max(1, _MAX_CELLS // len(names))
    for begin in range(0, draws, step):
        chosen = rng.integers(len(names), size=(min(step, draws - begin), len(names)))
        means.append(sums[chosen].sum(1) / counts[chosen].sum(1))
    tail = (1 - confidence) / 2
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return Estimate(float(sums.sum() / counts.sum()), float(low), float(high))
