"""How far one rater's votes on pairs can be relied on: preference for a position, and agreement with himself.

The order of the answers is drawn, so a rater who looks at the answers alone picks the first one as often as the second.
Some pairs come again the other way round; a rater who picks the same answer again is consistent, one who picks the same
place is not. If each of his votes is the wrong one with probability e, whatever the pair, two of them agree with
probability c = (1 - e)^2 + e^2, so that e = (1 - sqrt(2c - 1)) / 2. Intervals are by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from dpo_cli.statistics.agreement import TIE
from dpo_cli.statistics.intervals import Estimate, Sampling


class ShownVote(NamedTuple):
    """One vote on a pair, with where its answers stood.

    Attributes:
        rater: Who voted.
        item: The pair of answers.
        prompt: Their prompt.
        result: Win, tie or loss of the item's method (:mod:`dpo_cli.statistics.agreement`).
        chose_first: Whether the answer that was shown first was chosen; None for a tie.
        is_repeat: Whether the pair had been shown to the rater before, the other way round.
    """

    rater: str
    item: str
    prompt: str
    result: int
    chose_first: bool | None
    is_repeat: bool


class RaterQuality(NamedTuple):
    """Figures of one rater.

    Attributes:
        num_votes: Votes on pairs, repeats among them.
        num_ties: Ties among these.
        num_repeats: Pairs that came again.
        position_bias: Share of the first answers that were chosen less that of the second ones, in [-1, 1]: 0 where the
            place counts for nothing; None where all are ties.
        consistency: Share of repeats that were voted on as before, half where one vote alone is a tie; None without.
        noise: Probability that a vote is the wrong one, in [0, 0.5], from repeats without a tie; None without.
    """

    rater: str
    num_votes: int
    num_ties: int
    num_repeats: int
    position_bias: Estimate | None
    consistency: Estimate | None
    noise: Estimate | None


def rater_quality(votes: Sequence[ShownVote], sampling: Sampling) -> list[RaterQuality]:
    """Figures of each rater, in the order of their first votes."""
    by_rater: dict[str, list[ShownVote]] = {}
    for vote in votes:
        by_rater.setdefault(vote.rater, []).append(vote)
    return [_quality(rater, mine, sampling) for rater, mine in by_rater.items()]


def _quality(rater: str, votes: Sequence[ShownVote], sampling: Sampling) -> RaterQuality:
    decided = [vote for vote in votes if vote.chose_first is not None]
    before = {vote.item: vote.result for vote in votes if not vote.is_repeat}
    pairs = [(before[vote.item], vote) for vote in votes if vote.is_repeat and vote.item in before]
    clear = [(first, vote) for first, vote in pairs if TIE not in (first, vote.result)]
    bias = consistency = noise = None
    if decided:
        first = sampling.rate([float(bool(vote.chose_first)) for vote in decided], [vote.prompt for vote in decided])
        bias = Estimate(*(2 * share - 1 for share in vars(first).values()))
    if pairs:
        consistency = sampling.rate(
            [1 - abs(first - vote.result) / 2 for first, vote in pairs], [vote.prompt for _, vote in pairs]
        )
    if clear:
        same = sampling.rate([float(first == vote.result) for first, vote in clear], [vote.prompt for _, vote in clear])
        noise = Estimate(noise_of(same.value), noise_of(same.high), noise_of(same.low))
    num_ties = sum(vote.result == TIE for vote in votes)
    return RaterQuality(rater, len(votes), num_ties, len(pairs), bias, consistency, noise)


def noise_of(consistency: float) -> float:
    """The probability of a wrong vote behind a share of equal pairs of votes; 0.5 where that is below one half."""
    return (1 - math.sqrt(max(0.0, 2 * consistency - 1))) / 2
