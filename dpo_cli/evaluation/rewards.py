"""What rewards say of pairs and rankings: those of a reward model, or the implicit one, r = beta log(pi / pi_ref).

A pair is a ranking of two. An answer is compared with each that it ranks above: right where its reward is higher, one
half where the two are equal. All figures are means over rows, so that a ranking of many answers counts as much as a
pair; intervals are clustered by prompt. Rewards are fixed up to a constant a prompt, so only differences are read.

Legend: B rows, K answers.

Source: Rafailov et al. 2023, section 5.1.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dpo_cli.losses.pairwise import Pairs, sigmoid
from dpo_cli.losses.ranking import kendall_tau
from dpo_cli.statistics.calibration import calibration_error, half_ties, reliability_table
from dpo_cli.statistics.intervals import Estimate, Sampling, with_interval

_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class ScoredGroup:
    """A prompt's answers with their rewards, best first; of a pair, the chosen one and the rejected one.

    Attributes:
        id: The row's id.
        group: The prompt's id.
        rewards: Of each answer, nats.
        num_tokens: Of each answer.
        ranks: From 1, ascending; equal is tied.
        policy: log pi of each answer, nats; of an implicit reward alone.
        reference: log pi_ref of each answer, likewise.
    """

    id: str
    group: str
    rewards: tuple[float, ...]
    num_tokens: tuple[int, ...]
    ranks: tuple[int, ...] = (1, 2)
    policy: tuple[float, ...] = ()
    reference: tuple[float, ...] = ()

    @property
    def margin(self) -> float:
        """The chosen answer's reward less the rejected one's, nats."""
        return self.rewards[0] - self.rewards[1]

    @classmethod
    def implicit(
        cls,
        place: tuple[str, str],
        policy: Sequence[float],
        reference: Sequence[float],
        num_tokens: Sequence[int],
        beta: float,
        ranks: tuple[int, ...] = (1, 2),
    ) -> ScoredGroup:
        """Answers to the prompt of a place (row's id, prompt's id) with their implicit rewards."""
        rewards = tuple(beta * (ours - theirs) for ours, theirs in zip(policy, reference, strict=True))
        return cls(*place, rewards, tuple(num_tokens), ranks, tuple(policy), tuple(reference))


def pair_losses(pairs: Sequence[ScoredGroup], beta: float) -> list[float]:
    """-log sigma(margin) of each pair by its implicit reward, whatever the training loss was."""
    policy, reference = (
        torch.tensor([getattr(pair, name) for pair in pairs], dtype=torch.float64) for name in ("policy", "reference")
    )
    return sigmoid(Pairs(policy, reference, torch.tensor([pair.num_tokens for pair in pairs])), beta).tolist()


# --- a reward model -------------------------------------------------------------------------


def reward_metrics(pairs: Sequence[ScoredGroup], sampling: Sampling) -> dict[str, Any]:
    """Figures of a reward model over held-out pairs, at least one, each with its interval (``_ci``).

    Returns:
        ``accuracy``; ``log_loss``, the mean of -log sigma(margin), nats, ln 2 where nothing is known; ``ece``, the
        expected calibration error (Guo et al. 2017) of sigma(|margin|), whose interval leans upwards, since noise never
        lowers it; ``margin``; ``longer_accuracy``, that of taking the longer answer: a baseline that reads nothing; the
        accuracy where the chosen answer is ``longer``, ``as_long`` and ``shorter``, as far as there are such pairs; and
        ``reliability``, the bins that hold a pair, ascending.
    """
    rows = sorted(pairs, key=lambda pair: pair.id)
    clusters = np.array([pair.group for pair in rows])
    names = clusters.tolist()
    margins = np.array([pair.margin for pair in rows], dtype=np.float64)
    longer = np.array([pair.num_tokens[0] - pair.num_tokens[1] for pair in rows])
    right = half_ties(margins)
    metrics = {
        **with_interval("accuracy", sampling.rate(right.tolist(), names)),
        **with_interval("log_loss", sampling.interval(np.logaddexp(0.0, -margins).tolist(), names)),
        **with_interval("ece", calibration_error(margins, names, sampling)),
        **with_interval("margin", sampling.interval(margins.tolist(), names)),
        **with_interval("longer_accuracy", sampling.rate(half_ties(longer).tolist(), names)),
    }
    for name, where in (("longer", longer > 0), ("as_long", longer == 0), ("shorter", longer < 0)):
        metrics[f"num_chosen_{name}"] = int(where.sum())
        if where.any():
            found = sampling.rate(right[where].tolist(), clusters[where].tolist())
            metrics |= with_interval(f"accuracy_chosen_{name}", found)
    metrics["reliability"] = [
        {
            "probability_from": cell.low,
            "probability_to": cell.high,
            "num_pairs": cell.num_pairs,
            "probability": cell.probability,
            **with_interval("accuracy", cell.accuracy),
        }
        for cell in reliability_table(margins, names, sampling)
    ]
    return metrics | {
        "num_ties": int((margins == 0).sum()),
        "num_eval_pairs": len(rows),
        "num_eval_prompts": len(set(names)),
    }


# --- any rows -------------------------------------------------------------------------------


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
    """Figures over rows, pairs and rankings: sums of the counts, means over rows of the rest."""

    num_rows: int
    num_prompts: int
    num_compared: int
    num_ties: int
    accuracy: Estimate
    margin: Estimate
    reference_accuracy: float
    longer_accuracy: float


def agreements(rows: Sequence[ScoredGroup]) -> list[Agreement]:
    """How each row's implicit rewards agree with its ranks."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_size[len(row.ranks)].append(index)
    found: dict[int, Agreement] = {}
    for indices in by_size.values():
        for begin in range(0, len(indices), _ROWS_AT_ONCE):
            portion = indices[begin : begin + _ROWS_AT_ONCE]
            found.update(zip(portion, _agreements([rows[index] for index in portion]), strict=True))
    return [found[index] for index in range(len(rows))]


def _agreements(rows: Sequence[ScoredGroup]) -> list[Agreement]:
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


def summarize_agreements(rows: Sequence[ScoredGroup], found: Sequence[Agreement], sampling: Sampling) -> RewardSummary:
    """Figures over rows, at least one, of what :func:`agreements` says of each; intervals are clustered by prompt."""
    clusters = [row.group for row in rows]
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
