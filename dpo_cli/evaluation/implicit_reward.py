"""What the implicit reward says of pairs and rankings: r = beta log(pi / pi_ref) (Rafailov et al. 2023, section 5.1).

A pair is a ranking of two. An answer is compared with each that it ranks above: right where its
reward is higher, one half where the two are equal. All figures are means over rows, so that a
ranking of many answers counts as much as a pair; intervals are clustered by prompt.

Legend: B rows, K answers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dpo_cli.losses.ranking import kendall_tau
from dpo_cli.statistics.bootstrap import Estimate, Sampling

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class RankedAnswers:
    """A prompt's answers, scored; best first.

    Attributes:
        group: The prompt's id.
        ranks: From 1, ascending; equal is tied. A pair has 1 and 2.
        rewards: beta log(pi / pi_ref) of each answer, nats.
        reference: log pi_ref of each answer, nats.
        num_tokens: Tokens of each answer.
    """

    group: str
    ranks: tuple[int, ...]
    rewards: tuple[float, ...]
    reference: tuple[float, ...]
    num_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Agreement:
    """How the rewards of one row agree with its ranks.

    Attributes:
        accuracy: Share of the compared pairs of answers in the right order, ties as one half: (Kendall's tau + 1) / 2.
        margin: Mean over them of the better one's reward less the other's, nats.
        num_compared: Pairs of answers whose ranks differ.
        num_ties: Those of them with equal rewards.
        reference_accuracy: The same as ``accuracy`` of the reference's log-probabilities alone.
        longer_accuracy: The same of the lengths in tokens: a baseline that reads nothing.
    """

    accuracy: float
    margin: float
    num_compared: int
    num_ties: int
    reference_accuracy: float
    longer_accuracy: float

    @property
    def outcome(self) -> str:
        """``right``: all are in the right order; ``tie``: none is in the wrong one; else ``wrong``."""
        if self.accuracy == 1:
            return "right"
        return "tie" if round(2 * self.num_compared * (1 - self.accuracy)) == self.num_ties else "wrong"


@dataclass(frozen=True)
class RewardSummary:
    """Figures over rows.

    Attributes:
        num_rows: Pairs and rankings.
        num_prompts: Different prompts in them.
        num_compared: Pairs of answers compared.
        num_ties: Those of them with equal rewards.
        accuracy: Mean over rows, with its interval.
        margin: Likewise, nats.
        reference_accuracy: Mean over rows.
        longer_accuracy: Mean over rows.
    """

    num_rows: int
    num_prompts: int
    num_compared: int
    num_ties: int
    accuracy: Estimate
    margin: Estimate
    reference_accuracy: float
    longer_accuracy: float


def agreements(rows: Sequence[RankedAnswers]) -> list[Agreement]:
    """How each row's rewards agree with its ranks."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_size[len(row.ranks)].append(index)
    found: dict[int, Agreement] = {}
    for indices in by_size.values():
        for begin in range(0, len(indices), _ROWS_AT_ONCE):
            portion = indices[begin : begin + _ROWS_AT_ONCE]
            found.update(zip(portion, _agreements([rows[index] for index in portion]), strict=True))
    return [found[index] for index in range(len(rows))]


def _agreements(rows: Sequence[RankedAnswers]) -> list[Agreement]:
    """Of rows with one number of answers."""
    ranks_BK = torch.tensor([row.ranks for row in rows])
    rewards_BK = torch.tensor([row.rewards for row in rows], dtype=torch.float64)
    better_BKK = ranks_BK[:, :, None] < ranks_BK[:, None, :]
    gaps_BKK = rewards_BK[:, :, None] - rewards_BK[:, None, :]
    num_compared_B = better_BKK.sum((1, 2))
    columns = (
        _share_right(rewards_BK, ranks_BK),
        ((gaps_BKK * better_BKK).sum((1, 2)) / num_compared_B).tolist(),
        num_compared_B.tolist(),
        (better_BKK & (gaps_BKK == 0)).sum((1, 2)).tolist(),
        _share_right(torch.tensor([row.reference for row in rows], dtype=torch.float64), ranks_BK),
        _share_right(torch.tensor([row.num_tokens for row in rows]), ranks_BK),
    )
    return [Agreement(*values) for values in zip(*columns, strict=True)]


def _share_right(values_BK: torch.Tensor, ranks_BK: torch.Tensor) -> list[float]:
    return ((kendall_tau(values_BK, ranks_BK) + 1) / 2).tolist()


def summarize_rewards(
    rows: Sequence[RankedAnswers], found: Sequence[Agreement], *, draws: int, confidence: float, seed: int
) -> RewardSummary:
    """Figures over rows, with intervals clustered by prompt.

    Args:
        rows: At least one row.
        found: What :func:`agreements` says of each.
        draws: Bootstrap draws.
        confidence: Coverage of the intervals.
        seed: Of the draws.
    """
    clusters = [row.group for row in rows]

    sampling = Sampling(draws, confidence, seed)
    return RewardSummary(
        num_rows=len(rows),
        num_prompts=len(set(clusters)),
        num_compared=sum(one.num_compared for one in found),
        num_ties=sum(one.num_ties for one in found),
        accuracy=sampling.rate([one.accuracy for one in found], clusters),
        margin=sampling.interval([one.margin for one in found], clusters),
        reference_accuracy=float(np.mean([one.reference_accuracy for one in found])),
        longer_accuracy=float(np.mean([one.longer_accuracy for one in found])),
    )
