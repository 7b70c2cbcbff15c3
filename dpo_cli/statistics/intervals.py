"""Intervals by prompt, since rows of one are not independent: a bootstrap, or exact where that knows too little.

Exact figures are sums of the binomial distribution. So is the power of a win rate: that of the two-sided sign test
against one half, in which ties are dropped, so that the number of prompts is that of prompts with a winner.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

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

    def of_runs(self, values: Sequence[np.ndarray], *, same_prompts: bool) -> Estimate:
        """The mean over runs, such as seeds, and prompts, by a hierarchical bootstrap: runs are drawn, then prompts.

        For a paired difference of two lists of runs give the differences by prompt. With few runs the interval is too
        narrow: of the variance between runs it sees (runs - 1) / runs. The draws depend on the order of values.

        Args:
            values: Of each run float64 [prompts], one value a prompt.
            same_prompts: Whether each place is one prompt in all runs. Then a draw has the same prompts in every run:
                drawn anew in each, they would count as more prompts than there are.

        Raises:
            ValueError: There is no value, or runs of the same prompts have different numbers of them.

        Source: Davison and Hinkley 1997, section 3.8; with the same prompts Owen 2007, the pigeonhole bootstrap.
        """
        numbers = {len(each) for each in values}
        if not numbers or 0 in numbers or (same_prompts and len(numbers) > 1):
            raise ValueError(f"runs need prompts, and the same ones if they say so; got {[*map(len, values)]} of them")
        runs = np.concatenate(list(self._draw(len(values), stream=1)))
        found = np.zeros(self.draws)
        for place, drawn in enumerate(runs.T):
            stream = 2 if same_prompts else 2 + place
            for run, each in enumerate(values):
                means = np.concatenate([each[chosen].mean(1) for chosen in self._draw(len(each), stream)])
                found += np.where(drawn == run, means, 0) / len(values)
        return self.of_draws(float(np.mean([each.mean() for each in values])), found)

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

    def _draw(self, num_clusters: int, stream: int = 0) -> Iterator[np.ndarray]:
        """Drawn clusters, int64 [some draws, clusters]: as many draws at a time as memory is meant for."""
        rng = np.random.default_rng([self.seed, stream] if stream else self.seed)
        step = max(1, _MAX_CELLS // num_clusters)
        for begin in range(0, self.draws, step):
            yield rng.integers(num_clusters, size=(min(step, self.draws - begin), num_clusters))


# --- exact ----------------------------------------------------------------------------------


def binomial(number: int, rate: float) -> np.ndarray:
    """Probabilities of 0 .. number wins, float64 [number + 1]."""
    if rate in (0, 1):
        return np.eye(number + 1)[round(rate) * number]
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, number + 1)))])
    wins = np.arange(number + 1)
    logs = factorials[-1] - factorials - factorials[::-1] + wins * math.log(rate) + wins[::-1] * math.log1p(-rate)
    return np.exp(logs)


def at_least(wins: int, number: int, rate: float) -> float:
    """Probability of so many wins or more."""
    return float(binomial(number, rate)[wins:].sum())


def exact_interval(wins: float, number: int, confidence: float) -> tuple[float, float]:
    """The interval of a rate after so many wins, which covers it at least as often as it says.

    Args:
        wins: In [0, number]; where ties of one half make it no whole number, the ends are those of the next ones
            outwards.
        number: Independent trials, at least one.
        confidence: Coverage.

    Source: Clopper and Pearson 1934.
    """
    tail = (1 - confidence) / 2
    fewest, most = math.floor(wins + 1e-9), math.ceil(wins - 1e-9)
    low = _rate_at(lambda rate: at_least(fewest, number, rate), tail) if fewest else 0.0
    high = 1 - _rate_at(lambda rate: at_least(number - most, number, rate), tail) if most < number else 1.0
    return low, high


def _rate_at(probability: Callable[[float], float], level: float) -> float:
    """The rate in [0, 1] at which a rising probability reaches a level."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < level else (low, middle)
    return (low + high) / 2


_Z_95 = 1.959963984540054


def wilson_interval(count: int, total: int) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927): of ``count`` in ``total`` independent draws."""
    if not total:
        return 0.0, 1.0
    share, squared = count / total, _Z_95**2
    middle = share + squared / (2 * total)
    reach = _Z_95 * math.sqrt(share * (1 - share) / total + squared / (4 * total**2))
    scale = 1 + squared / total
    low, high = (middle - reach) / scale, (middle + reach) / scale
    return (0.0 if count == 0 else low), (1.0 if count == total else high)


# --- power ----------------------------------------------------------------------------------


def win_rate_power(win_rate: float, num_prompts: int, level: float = 0.05) -> float:
    """Probability that the sign test finds a true win rate to differ from one half.

    A true 55% is found with 256 prompts in 32% of cases, with 1000 in 88%.

    Args:
        win_rate: The true one, in [0, 1].
        num_prompts: Prompts with a winner.
        level: Of the two-sided test.

    Returns:
        In [0, 1]; at one half no more than the level. 0 where there are too few prompts for any result to count.
    """
    needed = _critical_wins(num_prompts, level)
    if needed is None:
        return 0.0
    # lost by so much, too: the test has two sides
    return at_least(needed, num_prompts, win_rate) + at_least(needed, num_prompts, 1 - win_rate)


def detectable_win_rate(num_prompts: int, power: float = 0.8, level: float = 0.05) -> float | None:
    """The least true win rate above one half that the sign test finds with a given probability.

    Args:
        num_prompts: Prompts with a winner.
        power: Probability to find it.
        level: Of the two-sided test.

    Returns:
        In (0.5, 1]; None where there are too few prompts for any result to count.
    """
    if _critical_wins(num_prompts, level) is None:
        return None
    low, high = 0.5, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if win_rate_power(middle, num_prompts, level) >= power else (middle, high)
    return high


def detectable_of_interval(estimate: Estimate, confidence: float, power: float = 0.8) -> float | None:
    """The least true win rate above one half whose interval leaves out one half with a given probability.

    0.5 + (z_confidence + z_power) s, with the standard error s = (high - low) / (2 z_confidence) of the interval at
    hand: a normal approximation, which serves soft verdicts and ties, too.

    Args:
        estimate: A win rate with its interval.
        confidence: Coverage of the interval.
        power: Probability to find it.

    Returns:
        In [0.5, 1]; None where that is beyond 1, or there is no interval.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    found = 0.5 + (z + NormalDist().inv_cdf(power)) * (estimate.high - estimate.low) / (2 * z)
    return found if found <= 1 else None


def _critical_wins(num_prompts: int, level: float) -> int | None:
    """The fewest wins that a fair coin reaches in no more than level / 2 of cases; None where there are none."""
    tail = np.cumsum(binomial(num_prompts, 0.5)[::-1])[::-1]
    found = np.flatnonzero(tail <= level / 2)
    return int(found[0]) if len(found) else None
