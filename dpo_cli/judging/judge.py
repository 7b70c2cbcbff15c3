"""The one protocol of all judges: which of two answers to a prompt is better."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Verdict = Literal["A", "B", "tie", "invalid"]

OPTIONS = ("A", "B")
"""What a language model answers: its names for the two candidates."""
TIE_OPTION = "C"
"""What it answers where both are equally good, if its template offers that."""


@dataclass(frozen=True)
class Question:
    """Two answers to a prompt, in the order in which a judge sees them.

    Attributes:
        prompt: What was asked; a conversation as :func:`dpo_cli.judging.templates.transcript` writes it.
        a: The answer that stands first.
        b: The other one.
    """

    prompt: str
    a: str
    b: str


@dataclass(frozen=True)
class Judgment:
    """What a judge says to a question.

    Attributes:
        p_a: Probability in [0, 1] that A is the better answer, a tie counting as one half; 0.5 where invalid.
        verdict: ``A``, ``B`` or ``tie``; ``invalid``: the judge has none, and p_a counts nowhere.
    """

    p_a: float
    verdict: Verdict

    @classmethod
    def of(cls, p_a: float) -> Judgment:
        """The judgment of a judge that gives a probability: exactly 0.5 is a tie."""
        return cls(p_a, "tie" if p_a == 0.5 else "A" if p_a > 0.5 else "B")

    @classmethod
    def of_options(cls, logps: Sequence[float]) -> Judgment:
        """The soft verdict of a language model that must answer with one of the options.

        Args:
            logps: Log-probabilities of A, of B and, where it is offered, of a tie, nats; they need not sum to 1.

        Returns:
            p_a = P(A) + P(tie) / 2 among the options; the verdict is the most probable one.
        """
        largest = max(logps)
        a, b, *rest = (math.exp(logp - largest) for logp in logps)
        tie = sum(rest)
        p_a = from_half((a - b) / (2 * (a + b + tie)))
        if tie >= max(a, b) or a == b:
            return cls(p_a, "tie")
        return cls(p_a, "A" if a > b else "B")


INVALID = Judgment(0.5, "invalid")


class Judge(Protocol):
    """Decides between two answers."""

    @property
    def remedy(self) -> str:
        """What the user can do where it has no verdict on too many questions."""
        ...

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        """Judge questions, in batches or at once, whatever suits the judge.

        Yields:
            The index of a question and the judgment, as soon as it is made; every index once, in any order.
        """
        ...


class IdentifiedJudge(Judge, Protocol):
    """A judge whose judgments may be kept."""

    @property
    def identity(self) -> Mapping[str, Any]:
        """What a judgment depends on besides the question, as JSON."""
        ...


def one_by_one(
    prefer: Callable[[str, str, str], float], questions: Sequence[Question]
) -> Iterator[tuple[int, Judgment]]:
    """The judgments of a judge that is a function from prompt, A and B to the probability that A is better."""
    for index, question in enumerate(questions):
        yield index, Judgment.of(prefer(question.prompt, question.a, question.b))


def from_half(lead: float) -> float:
    """0.5 + lead for a lead in [-0.5, 0.5], rounded so that the leads d and -d give numbers that sum to exactly 1."""
    return 0.5 + lead if lead >= 0 else 1 - (0.5 - lead)
