"""Win rates: which of two models' answers a judge prefers, asked in both orders, ties as one half.

A judge that favors a position favors each answer once, so that most of it cancels. What is left of it shows in
consistency and first_position_rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dpo_cli.core.errors import DataError
from dpo_cli.core.progress import Meter
from dpo_cli.judging.judge import Judge, Judgment, Question, from_half

MAX_INVALID_RATE = 0.05
"""Share of comparisons without a verdict above which there is no win rate: those that are left may be of one kind."""


@dataclass(frozen=True)
class Pair:
    """Answers of two models to a prompt."""

    prompt: str
    ours: str
    theirs: str


@dataclass(frozen=True)
class Comparison:
    """What a judge says of two answers in both orders.

    Attributes:
        ours_first: The judgment with our answer as A; None where the answers are identical and nobody was asked.
        theirs_first: The judgment with their answer as A.
    """

    ours_first: Judgment | None = None
    theirs_first: Judgment | None = None

    @property
    def is_valid(self) -> bool:
        """Whether both orders have a verdict, or the answers are identical."""
        return all(judgment is None or judgment.verdict != "invalid" for judgment in self._asked())

    @property
    def win(self) -> float | None:
        """Probability that ours is better, p = (p1 + 1 - p2) / 2; None without a verdict.

        Comparing theirs with ours gives exactly 1 - p.
        """
        if not self.is_valid:
            return None
        if self.ours_first is None or self.theirs_first is None:
            return 0.5
        return from_half((self.ours_first.p_a - self.theirs_first.p_a) / 2)

    @property
    def is_consistent(self) -> bool:
        """Whether both orders name the same winner, or none."""
        if self.ours_first is None or self.theirs_first is None:
            return True
        swapped = {"A": "B", "B": "A"}
        first, second = self.ours_first.verdict, self.theirs_first.verdict
        return first == swapped.get(second, second)

    def swapped(self) -> Comparison:
        """The same with ours and theirs changed."""
        return Comparison(self.theirs_first, self.ours_first)

    def _asked(self) -> tuple[Judgment | None, Judgment | None]:
        return self.ours_first, self.theirs_first


@dataclass(frozen=True)
class WinRateSummary:
    """Comparisons summed up.

    Attributes:
        win_rate: Mean probability that ours is better over the comparisons with a verdict, ties as one half.
        num_comparisons: All of them.
        num_identical: Those with identical answers, which are ties and were not asked.
        num_ties: Those at exactly one half, the identical ones among them.
        num_invalid: Those that lack a verdict in an order.
        invalid_rate: Their share of those that were asked.
        consistency: Share, of those asked with verdicts, in which both orders name the same winner or none;
            None where there are none.
        first_position_rate: Share, of the verdicts in them that name a winner, that name the answer that stands
            first; without bias 0.5; None where there are none.
    """

    win_rate: float
    num_comparisons: int
    num_identical: int
    num_ties: int
    num_invalid: int
    invalid_rate: float
    consistency: float | None
    first_position_rate: float | None


def compare(judge: Judge, prompt: str, ours: str, theirs: str) -> float:
    """Probability that ours is better, asked in both orders so that no position is favored.

    Raises:
        DataError: The judge has no verdict.
    """
    comparison = compare_all(judge, [Pair(prompt, ours, theirs)])[0]
    if comparison.win is None:
        raise DataError(f"the judge has no verdict on two answers to {prompt[:60]!r}; {judge.remedy}")
    return comparison.win


def compare_all(judge: Judge, pairs: Sequence[Pair], meter: Meter | None = None) -> list[Comparison]:
    """Compare many answers, each in both orders; identical ones are ties without asking.

    Args:
        judge: Who decides.
        pairs: What is compared.
        meter: Called with every judgment; :func:`num_questions` says how many there will be.
    """
    asked = [index for index, pair in enumerate(pairs) if pair.ours != pair.theirs]
    questions = []
    for pair in (pairs[index] for index in asked):
        questions += [Question(pair.prompt, pair.ours, pair.theirs), Question(pair.prompt, pair.theirs, pair.ours)]
    found: dict[int, Judgment] = {}
    for index, judgment in judge.judge(questions):
        found[index] = judgment
        if meter is not None:
            meter.advance(1)
    comparisons = [Comparison() for _ in pairs]
    for number, index in enumerate(asked):
        comparisons[index] = Comparison(found[2 * number], found[2 * number + 1])
    return comparisons


def num_questions(pairs: Iterable[Pair]) -> int:
    """How many judgments the pairs need."""
    return sum(2 for pair in pairs if pair.ours != pair.theirs)


def summarize(comparisons: Sequence[Comparison], remedy: str) -> WinRateSummary:
    """Sum up comparisons.

    Args:
        comparisons: At least one.
        remedy: The judge's, for the error.

    Raises:
        DataError: More than :data:`MAX_INVALID_RATE` of those that were asked, or all, have no verdict.
    """
    asked = [each for each in comparisons if each.ours_first is not None]
    valid = [each for each in asked if each.is_valid]
    num_invalid = len(asked) - len(valid)
    invalid_rate = num_invalid / len(asked) if asked else 0.0
    if invalid_rate > MAX_INVALID_RATE:
        raise DataError(
            f"the judge has no verdict in {num_invalid} of {len(asked)} comparisons ({invalid_rate:.1%}); more than"
            f" {MAX_INVALID_RATE:.0%} make no win rate; {remedy}"
        )
    wins = [each.win for each in comparisons if each.win is not None]
    verdicts = [judgment.verdict for each in valid for judgment in (each.ours_first, each.theirs_first) if judgment]
    winners = [verdict for verdict in verdicts if verdict != "tie"]
    return WinRateSummary(
        win_rate=from_half(math.fsum(win - 0.5 for win in wins) / len(wins)),
        num_comparisons=len(comparisons),
        num_identical=len(comparisons) - len(asked),
        num_ties=wins.count(0.5),
        num_invalid=num_invalid,
        invalid_rate=invalid_rate,
        consistency=sum(each.is_consistent for each in valid) / len(valid) if valid else None,
        first_position_rate=winners.count("A") / len(winners) if winners else None,
    )
