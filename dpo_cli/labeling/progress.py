"""How far a rater is, and whether more votes would tell more."""

from __future__ import annotations

import statistics
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from dpo_cli.statistics.intervals import wilson_interval

NARROW = 0.05
"""Half the width of the interval at which a rater is told that he may stop."""


@dataclass(frozen=True)
class Progress:
    """How far a rater is.

    Attributes:
        done: Votes that stand.
        left: Items that wait for him.
        pace_s: Median seconds of the last votes; None before the first.
        left_s: Seconds for what is left at that pace.
        half_width: Half the width of the 95% interval of what is measured; None where nothing is.
        may_stop: Whether it is narrow enough.
    """

    done: int
    left: int
    pace_s: float | None
    left_s: float | None
    half_width: float | None
    may_stop: bool


def progress_of(
    done: int, left: int, seconds: Collection[float], repeats: float, results: np.ndarray | None
) -> Progress:
    """How far a rater is.

    Args:
        done: Votes that stand.
        left: Items that wait for him.
        seconds: Of his last votes.
        repeats: Share of questions that come again.
        results: int [items, 3]: people's votes for the method, ties, and votes for the baseline; None where nobody is
            compared. An item is a trial, which the majority decides; one without is none.
    """
    pace = statistics.median(seconds) if seconds else None
    half_width = None
    if results is not None:
        lead = results[:, 0] - results[:, 2]
        if num := int(np.count_nonzero(lead)):
            low, high = wilson_interval(int(np.count_nonzero(lead > 0)), num)
            half_width = (high - low) / 2
    return Progress(
        done=done,
        left=left,
        pace_s=pace,
        left_s=None if pace is None else pace * left * (1 + repeats),
        half_width=half_width,
        may_stop=half_width is not None and half_width <= NARROW,
    )
