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


def with_interval(name: str, estimate: Estimate) -> dict[str, Any]:
    """An estimate as metrics have it: ``name`` and ``name_ci``, None where it has no interval."""
    return {name: estimate.value, f"{name}_ci": ends(estimate)}


@dataclass(frozen=True)
class Sampling:
    """How intervals are drawn. Nothing depends on the order of the rows.

    Attributes:
        draws: Bootstrap draws.
        confidence: Coverage of the intervals.
        seed: Of the draws.
    """

    draws: int
    confidence: float
    seed: int

    def interval(self, values: Sequence[float], clusters: Sequence[str]) -> Estimate:
        """The mean of values, one a row, and its percentile interval; clusters are drawn with replacement.

        Returns:
            An interval without width where there is one cluster, since that says nothing of others, or where all are
            equal.

        Source: Cameron, Gelbach and Miller 2008, the pairs cluster bootstrap.
        """
        columns = np.asarray(values, dtype=np.float64)[:, None]
        return self.of_sums(lambda sums, counts: sums[:, 0] / counts, columns, clusters)

    def rate(self, values: Sequence[float], clusters: Sequence[str]) -> Estimate:
        """The mean of values in [0, 1] and its interval: by bootstrap, or exact where that knows too little.

        That is with fewer than :data:`FEW_PROMPTS` clusters, or where all or none were won. Then each cluster counts as
        one trial.
        """
        estimate = self.interval(values, clusters)
        number = len(set(clusters))
        if number >= FEW_PROMPTS and 0 < estimate.value < 1:
            return estimate
        return Estimate(estimate.value, *exact_interval(number * estimate.value, number, self.confidence))

    def of_sums(
        self,
        statistic: Callable[[np.ndarray, np.ndarray], np.ndarray],
        columns: np.ndarray,
        clusters: Sequence[str],
    ) -> Estimate:
        """A statistic of sums over rows, and its percentile interval, clusters drawn with replacement.

        Args:
            statistic: From sums [draws, columns] and numbers of rows [draws] to the statistic [draws]; NaN where it is
                undefined.
            columns: float64 [rows, columns], what is summed.
            clusters: The row's cluster: its prompt.
        """
        names, owners = np.unique(np.asarray(clusters), return_inverse=True)
        order = np.lexsort((*columns.T[::-1], owners))
        owners = owners[order]
        sums = np.stack(
            [np.bincount(owners, weights=column, minlength=len(names)) for column in columns[order].T], axis=-1
        )
        counts = np.bincount(owners, minlength=len(names)).astype(np.float64)
        found = []
        for chosen in self._draw(len(names)):
            drawn = np.stack([column[chosen].sum(1) for column in sums.T], axis=-1)
            found.append(statistic(drawn, counts[chosen].sum(1)))
        (value,) = statistic(sums.sum(0, keepdims=True), counts.sum(keepdims=True))
        return self.of_draws(float(value), np.concatenate(found))

    def weights(self, num_clusters: int) -> Iterator[np.ndarray]:
        """How often each cluster is drawn, for statistics that are no function of sums: the same draws.

        Yields:
            int64 [some draws, clusters]; each row sums to num_clusters.
        """
        for chosen in self._draw(num_clusters):
            cells = chosen + num_clusters * np.arange(len(chosen))[:, None]
            yield np.bincount(cells.ravel(), minlength=chosen.size).reshape(chosen.shape)

    def of_draws(self, value: float, found: np.ndarray) -> Estimate:
        """A statistic with the percentile interval of its draws [draws]; undefined ones (NaN) are left out.

        With more than :data:`MAX_UNDEFINED` of them undefined both ends are NaN: what is left would be a selection.
        """
        defined = found[~np.isnan(found)]
        if len(defined) < (1 - MAX_UNDEFINED) * len(found):
            return Estimate(value, math.nan, math.nan)
        tail = (1 - self.confidence) / 2
        low, high = np.quantile(defined, [tail, 1 - tail])
        return Estimate(value, float(low), float(high))

    def _draw(self, num_clusters: int) -> Iterator[np.ndarray]:
        """Drawn clusters, int64 [some draws, clusters]: as many draws at a time as memory is meant for."""
        rng = np.random.default_rng(self.seed)
        step = max(1, _MAX_CELLS // num_clusters)
        for begin in range(0, self.draws, step):
            yield rng.integers(num_clusters, size=(min(step, self.draws - begin), num_clusters))
