"""What the training loop minimises: an objective function with the constants it needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.objectives.pairwise import PairwiseLoss, log_ratios
from dpo_cli.objectives.sft import negative_log_likelihood
from dpo_cli.scoring.scorer import Scores

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True)
class GroupLosses:
    """Losses of some groups, and what else is worth a mean over them.

    Attributes:
        losses_B: float64 [B], with gradient.
        metrics: Detached float64 [B] each, by the names TRL uses.
    """

    losses_B: torch.Tensor
    metrics: Mapping[str, torch.Tensor]


class Objective(Protocol):
    """What the training loop needs to know of an objective."""

    @property
    def metric_names(self) -> Sequence[str]:
        """Names of the metrics that come with the losses; known before anything is scored."""
        ...

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        """What the sum of the groups' losses is divided by."""
        ...

    def losses(self, groups: Sequence[TokenGroup], scores: Scores) -> GroupLosses:
        """The losses of groups that were scored."""
        ...


class SftObjective:
    """Negative log-likelihood a completion token, over the whole optimizer batch."""

    metric_names: Sequence[str] = ()

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        """The number of completion tokens."""
        return float(sum(len(group.completions[0]) for group in groups))

    def losses(self, groups: Sequence[TokenGroup], scores: Scores) -> GroupLosses:
        """Losses summed over tokens, nats."""
        return GroupLosses(negative_log_likelihood(scores.logps_BK), {})


class PairObjective:
    """A pairwise preference loss against cached reference log-probabilities, a mean over pairs.

    Args:
        loss: The loss, a pure function.
        beta: Scale of the implicit reward that is reported.
        reference: Reference log-probabilities (chosen, rejected) by row id, nats.
    """

    metric_names: Sequence[str] = PAIR_METRICS

    def __init__(self, loss: PairwiseLoss, beta: float, reference: Mapping[str, Sequence[float]]) -> None:
        self._loss = loss
        self._beta = beta
        self._reference = reference

    def reference_logps(self, groups: Sequence[TokenGroup], device: torch.device) -> torch.Tensor:
        """float64 [B, 2]."""
        return torch.tensor([self._reference[group.id] for group in groups], dtype=torch.float64, device=device)

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        """The number of pairs."""
        return float(len(groups))

    def losses(self, groups: Sequence[TokenGroup], scores: Scores) -> GroupLosses:
        """Losses and the metrics that TRL logs; an accuracy of a tie is one half."""
        reference = self.reference_logps(groups, scores.logps_BK.device)
        losses = self._loss(scores.logps_BK, reference, scores.num_tokens_BK)
        policy = scores.logps_BK.detach()
        rewards = self._beta * log_ratios(policy, reference)
        margins = rewards[:, 0] - rewards[:, 1]
        return GroupLosses(
            losses,
            {
                "rewards/chosen": rewards[:, 0],
                "rewards/rejected": rewards[:, 1],
                "rewards/margins": margins,
                "rewards/accuracies": (margins.sign() + 1) / 2,
                "logps/chosen": policy[:, 0],
                "logps/rejected": policy[:, 1],
            },
        )
