"""Two models' answers to the same prompts, judged: who is compared with whom, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dpo_cli.core.progress import Reporter
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.judge import Judge
from dpo_cli.judging.win_rate import Comparison, Pair, WinRateSummary, compare_all, num_questions, summarize
from dpo_cli.statistics.intervals import Estimate, Sampling

Answers = Mapping[str, Answer]
"""One model's answers by prompt id, or the data's by row id."""


@dataclass(frozen=True)
class ComparisonResult:
    """Two sets of answers to the same prompts, judged.

    Attributes:
        ours: The policy's answers.
        theirs: The opponent's.
        comparisons: By the id that both have.
        summary: Comparisons summed up.
        win_rate: With its interval, clustered by prompt.
    """

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
    """Judge all pairings, every different pair of answers once.

    Args:
        judge: Who decides.
        pairings: Ours and theirs, over ids; those that only one has are left out. A row's prompt is
            its cluster.
        reporter: Shows progress.
        command: Who asks, for messages.
        sampling: How intervals are drawn.

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
