"""Win rates: which of two models' answers a judge prefers, asked in both orders, ties as one half.

A judge that favors a position favors each answer once, so that most of it cancels. What is left of it shows in
consistency and first_position_rate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from dpo_cli.core.errors import DataError
from dpo_cli.core.progress import Meter, Reporter
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.judge import INVALID, Judge, Judgment, Question, from_half
from dpo_cli.statistics.intervals import Estimate, Sampling

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
        return INVALID not in (self.ours_first, self.theirs_first)

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


def compare_all(judge: Judge, pairs: Sequence[Pair], meter: Meter | None = None) -> list[Comparison]:
    """Compare many answers, each in both orders; identical ones are ties without asking.

    A meter is advanced by every judgment; :func:`num_questions` says how many there will be.
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
    """Sum up one comparison or more.

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


# --- models -------------------------------------------------------------------------------

Answers = Mapping[str, Answer]
"""One model's answers by prompt id, or the data's by row id."""


@dataclass(frozen=True)
class ComparisonResult:
    """The policy's and the opponent's answers, comparisons by the id that both have, and the rate by prompt."""

    ours: Answers
    theirs: Answers
    comparisons: Mapping[str, Comparison]
    summary: WinRateSummary
    win_rate: Estimate

    @property
    def wins(self) -> dict[str, float]:
        """Probability that ours is better, by id, where there is a verdict."""
        return {id: found.win for id, found in self.comparisons.items() if found.win is not None}

    @property
    def tie_rate(self) -> float:
        """Share of ties among the verdicts."""
        return self.summary.num_ties / len(self.wins)


def compare_models(
    judge: Judge,
    pairings: Sequence[tuple[Answers, Answers]],
    reporter: Reporter,
    command: str,
    sampling: Sampling,
) -> list[ComparisonResult]:
    """Judge all pairings of ours and theirs over the ids that both have, every different pair of answers once.

    Raises:
        DataError: The judge has no verdict on too many comparisons.
    """
    ids = [[id for id in ours if id in theirs] for ours, theirs in pairings]
    pairs = [
        [Pair(ours[id].asked, ours[id].text, theirs[id].text) for id in shared]
        for shared, (ours, theirs) in zip(ids, pairings, strict=True)
    ]
    different = list(dict.fromkeys(pair for some in pairs for pair in some))
    with reporter.meter(f"{command}: judging", num_questions(different), "judgments") as meter:
        found = dict(zip(different, compare_all(judge, different, meter), strict=True))
    results = []
    for shared, some, (ours, theirs) in zip(ids, pairs, pairings, strict=True):
        comparisons = {id: found[pair] for id, pair in zip(shared, some, strict=True)}
        summary = summarize(list(comparisons.values()), judge.remedy)
        wins = [(each.win, ours[id].group) for id, each in comparisons.items() if each.win is not None]
        win_rate = sampling.rate([win for win, _ in wins], [group for _, group in wins])
        results.append(ComparisonResult(ours, theirs, comparisons, summary, win_rate))
    return results


def paired_difference(first: ComparisonResult, second: ComparisonResult, sampling: Sampling) -> Estimate:
    """Win rate of the first result less that of the second over the ids that both have, with its paired interval.

    Raises:
        ValueError: They share no id with verdicts.
    """
    ours, theirs = first.wins, second.wins
    shared = [id for id in ours if id in theirs]
    if not shared:
        raise ValueError("the results share no prompt")
    prompts = [first.ours[id].group for id in shared]
    differences = [ours[id] - theirs[id] for id in shared]
    return sampling.interval(differences, prompts)
