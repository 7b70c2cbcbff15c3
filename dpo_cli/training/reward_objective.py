"""The objective of a reward model, as the training loop sees it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.losses.ranking import Ties, plackett_luce_nll
from dpo_cli.scoring.reward import Rewards
from dpo_cli.scoring.scorer import Statistics
from dpo_cli.training.objective import REWARD_METRICS, TAU, GroupLosses, ranking_metrics, reward_metrics


class RewardObjective:
    """-log P of the ranking under the rewards themselves, a mean over groups.

    With two answers it is Bradley-Terry's -log sigma(r_w - r_l) (Rafailov et al. 2023, eq. 2), with more
    Plackett-Luce's (eq. 18). Rewards are fixed up to a constant a prompt; they are logged less their mean over the
    group.

    Args:
        ranks: Ranks of each group's answers by row id, ascending; left out: two answers, the better one first.
        ties: What tied answers are (:func:`~dpo_cli.losses.ranking.plackett_luce_nll`).
    """

    is_coupled = False
    statistics: Statistics = "none"

    def __init__(self, ranks: Mapping[str, Sequence[int]] | None = None, ties: Ties = "average") -> None:
        self._ranks = ranks
        self._ties: Ties = ties
        self.metric_names: Sequence[str] = REWARD_METRICS if ranks is None else (*REWARD_METRICS, TAU)

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        """The number of groups."""
        return float(len(groups))

    def losses(self, groups: Sequence[TokenGroup], scores: Rewards, step: Sequence[TokenGroup]) -> GroupLosses:
        """Losses and metrics by DPO's names; with rankings, as there, the accuracy is over all their pairs."""
        rewards = scores.rewards_BK
        ranks = torch.tensor([[1, 2] if self._ranks is None else list(self._ranks[group.id]) for group in groups])
        losses = plackett_luce_nll(rewards, ranks, self._ties)
        detached = rewards.detach()
        metrics = reward_metrics(detached - detached.mean(1, keepdim=True))
        if self._ranks is not None:
            metrics |= ranking_metrics(detached, ranks)
        return GroupLosses(losses, metrics)
