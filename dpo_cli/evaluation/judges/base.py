"""The one protocol of all judges."""

from __future__ import annotations

from typing import Protocol


class Judge(Protocol):
    """Decides between two answers to a prompt."""

    def prefer(self, prompt: str, first: str, second: str) -> float:
        """Probability in [0, 1] that the first answer is better; 0.5 is a tie."""
        ...
