"""How well a number tells two kinds of rows apart: the area under the ROC curve, with its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_cli.statistics.intervals import FEW_PROMPTS, Estimate, Sampling, exact_interval


def auc(values: Sequence[float], is_positive: Sequence[bool], clusters: Sequence[str], sampling: Sampling) -> Estimate:
    """Probability that a positive row has a greater value than a negative one, equal ones as one half.

    Over all pairs of a positive and a negative row. The interval is a bootstrap of clusters; where these are fewer than
    :data:`~dpo_cli.statistics.intervals.FEW_PROMPTS` on a side, or all pairs agree, it is exact instead, with as many
    trials as the side with fewer clusters has.

    Args:
        values: One a row.
        is_positive: The row's kind; of each there is one.
        clusters: The row's prompt.
        sampling: How the interval is drawn.

    Source: Hanley and McNeil 1982, The meaning and use of the area under a ROC curve.
    """
    positive = np.asarray(is_positive)
    names, owners = np.unique(np.asarray(clusters), return_inverse=True)
    levels = np.unique(np.asarray(values, dtype=np.float64), return_inverse=True)[1]
    order = np.argsort(levels, kind="stable")
    starts = np.flatnonzero(np.diff(levels[order], prepend=-1))

    def of_weights(weights: np.ndarray) -> np.ndarray:
        rows = weights[:, owners[order]].astype(np.float64)
        above, below = (np.add.reduceat(rows * kind[order], starts, axis=1) for kind in (positive, ~positive))
        lower = np.cumsum(below, axis=1) - below / 2
        pairs = above.sum(1) * below.sum(1)
        return np.divide((above * lower).sum(1), pairs, out=np.full(len(pairs), np.nan), where=pairs > 0)

    value = float(of_weights(np.ones((1, len(names))))[0])
    fewest = min(len(set(owners[kind].tolist())) for kind in (positive, ~positive))
    if fewest < FEW_PROMPTS or value in (0, 1):
        return Estimate(value, *exact_interval(fewest * value, fewest, sampling.confidence))
    return sampling.of_draws(value, np.concatenate([*map(of_weights, sampling.weights(len(names)))]))
