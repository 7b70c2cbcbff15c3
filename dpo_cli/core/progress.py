"""What a stage says while it works, as a protocol: the console prints it, tests record it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

Status = Literal["good", "warn", "bad", "plain"]
"""Of a line of a verdict: green, amber, red, or no judgment."""


class Meter(Protocol):
    """A piece of long work that is under way."""

    def advance(self, amount: int) -> None:
        """So much more of it is done."""
        ...

    def note(self, text: str) -> None:
        """Show a short text beside it, such as the current loss."""
        ...


class Reporter(Protocol):
    """Where a stage reports to."""

    def say(self, text: str) -> None:
        """One line the user should see."""
        ...

    def warn(self, text: str) -> None:
        """One line the user should act on or know of."""
        ...

    def meter(self, label: str, total: int, unit: str) -> AbstractContextManager[Meter]:
        """Open a piece of long work of ``total`` units."""
        ...

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Print a summary: one quantity and its value a row."""
        ...

    def verdict(self, headline: str, status: Status, rows: Sequence[tuple[Status, str, str]]) -> None:
        """Print a judgment: its sentence, and a row for each line: how it stands, its name and its value."""
        ...


class SilentReporter:
    """Says nothing: of processes that work together, one reports."""

    def say(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """Nothing."""

    def meter(self, label: str, total: int, unit: str) -> AbstractContextManager[Meter]:
        """A piece of work that nobody watches."""
        return nullcontext(_SilentMeter())

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Nothing."""

    def verdict(self, headline: str, status: Status, rows: Sequence[tuple[Status, str, str]]) -> None:
        """Nothing."""


class _SilentMeter:
    def advance(self, amount: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
