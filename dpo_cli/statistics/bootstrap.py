"""Intervals by prompt, since rows of one are not independent: a bootstrap, or exact where that knows too little."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpo_cli.statistics.binomial import exact_interval

FEW_PROMPTS = 30
"""Prompts below which a bootstrap of a rate is too narrow: with 2 that were both won it would be 100% to 100%."""
_MAX_CELLS = 4_000_000

MAX_UNDEFINED = 0.05
"""Share of draws in which a statistic may be undefined; with more it has no interval."""


@dataclass(frozen=True)
class Estimate:
    """A mean, or another statistic, with its interval.

    Attributes:
        value: The mean over rows.
        low: Lower end of the interval; NaN where there is none.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def ends(estimate: Estimate) -> list[float] | None:
    """The interval as JSON; None where it has none."""
    return None if math.isnan(estimate.low) else [estimate.low, estimate.high]


@dataclass(frozen=True)
class Sampling:
    """How the intervals of an evaluation are drawn: keyword arguments of the functions below.

    Attributes:
        draws: Bootstrap draws.
        confidence: Coverage of the intervals.
        seed: Of the draws.
    """

    draws: int
    confidence: float
    seed: int

    @property
    def keywords(self) -> dict[str, Any]:
        """For ``**``."""
        return dict(vars(self))

    def interval(self, values: Sequence[float], clusters: Sequence[str]) -> Estimate:
        """A mean with its interval."""
        return cluster_bootstrap(values, clusters, **self.keywords)

    def rate(self, values: Sequence[float], clusters: Sequence[str]) -> Estimate:
        """A rate with its interval."""
        return rate_interval(values, clusters, **self.keywords)


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

    Returns:
        An interval without width where there is one cluster, since that says nothing of others, or where all are equal.

    Source: Cameron, Gelbach and Miller 2008, the pairs cluster bootstrap.
    """
    columns = np.asarray(values, dtype=np.float64)[:, None]
    return cluster_bootstrap_of(
        lambda sums, counts: sums[:, 0] / counts, columns, clusters, draws=draws, confidence=confidence, seed=seed
    )


def rate_interval(
    values: Sequence[float], clusters: Sequence[str], *, draws: int, confidence: float, seed: int
) -> Estimate:
    """The mean of values in [0, 1] and its interval: by bootstrap, or exact where that knows too little.

    That is with fewer than :data:`FEW_PROMPTS` clusters, or where all or none were won. Then each cluster counts as one
    trial; arguments as those of :func:`cluster_bootstrap`.
    """
    estimate = cluster_bootstrap(values, clusters, draws=draws, confidence=confidence, seed=seed)
    number = len(set(clusters))
    if number >= FEW_PROMPTS and 0 < estimate.value < 1:
        return estimate
    return Estimate(estimate.value, *exact_interval(number * estimate.value, number, confidence))


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
        statistic: From sums [draws, columns] and numbers of rows [draws] to the statistic [draws]; NaN where it is
            undefined.
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
    found = []
    for chosen in _draw(len(names), draws, seed):
        drawn = np.stack([column[chosen].sum(1) for column in sums.T], axis=-1)
        found.append(statistic(drawn, counts[chosen].sum(1)))
    low, high = percentile_interval(np.concatenate(found), confidence)
    (value,) = statistic(sums.sum(0, keepdims=True), counts.sum(keepdims=True))
    return Estimate(float(value), low, high)


def cluster_weights(num_clusters: int, *, draws: int, seed: int) -> Iterator[np.ndarray]:
    """How often each cluster is drawn, for statistics that are no function of sums.

    Args:
        num_clusters: At least one.
        draws: Bootstrap draws.
        seed: Of the draws: the same ones as in :func:`cluster_bootstrap_of`.

    Yields:
        int64 [some draws, clusters]; each row sums to num_clusters.
    """
    for chosen in _draw(num_clusters, draws, seed):
        cells = chosen + num_clusters * np.arange(len(chosen))[:, None]
        yield np.bincount(cells.ravel(), minlength=chosen.size).reshape(chosen.shape)


def percentile_interval(found: np.ndarray, confidence: float) -> tuple[float, float]:
    """The interval of a statistic's draws [draws]; undefined ones (NaN) are left out.

    With more than :data:`MAX_UNDEFINED` of them undefined both ends are NaN: what is left would be
    a selection.
    """
    defined = found[~np.isnan(found)]
    if len(defined) < (1 - MAX_UNDEFINED) * len(found):
        return math.nan, math.nan
    tail = (1 - confidence) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return float(low), float(high)


def _draw(num_clusters: int, draws: int, seed: int) -> Iterator[np.ndarray]:
    """Drawn clusters, int64 [some draws, clusters]: as many draws at a time as memory is meant for."""
    rng = np.random.default_rng(seed)
    step = max(1, _MAX_CELLS // num_clusters)
    for begin in range(0, draws, step):
        yield rng.integers(num_clusters, size=(min(step, draws - begin), num_clusters))
