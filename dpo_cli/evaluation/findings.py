"""A line of the verdict."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_cli.core.progress import Status

FEWEST = 6
"""Prompts below which no rate is told from one half: five that all go one way come by chance in 6 of 100 cases."""


@dataclass(frozen=True)
class Finding:
    """One line of the verdict.

    Attributes:
        name: The quantity.
        value: Its value with interval and unit, as text.
        status: good, warn, bad, or plain where no judgment is made.
        meaning: What it says, in one sentence.
    """

    name: str
    value: str
    status: Status
    meaning: str


def percent(value: float) -> str:
    """A share as text."""
    return f"{100 * value:.1f}%"


def percent_interval(ci: tuple[float, float] | list[float] | None) -> str:
    """An interval of shares as text; empty where there is none."""
    return "" if ci is None else f"[{percent(ci[0])}, {percent(ci[1])}]"
