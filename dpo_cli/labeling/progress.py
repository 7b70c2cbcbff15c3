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

    def figures(self) -> str:
        """In a line: votes, pace and time left."""
        parts = [f"{self.done} done", f"{self.left} to go"]
        if self.pace_s is not None:
            parts.append(f"{self.pace_s:.{1 if self.pace_s < 10 else 0}f} s a vote")
        if self.left_s and self.left:
            minutes = round(self.left_s / 60)
            hours = f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
            parts.append(f"{hours if minutes else '< 1 min'} left")
        return " · ".join(parts)

    def hint(self) -> str:
        """That he may stop; empty: he may not yet, or nobody knows."""
        if not self.may_stop or self.half_width is None:
            return ""
        width = f"{100 * self.half_width:.1f}"
        return f"You may stop: the result is known to ± {width} points, and more votes narrow that slowly."


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
