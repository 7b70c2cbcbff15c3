"""What a step on a round of rollouts minimizes: the clipped surrogate, and the value loss where there is a value head.

Legend: B groups, M tokens of all their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.losses.reinforcement import clipped_surrogate, clipped_value_loss
from dpo_cli.rlhf.rollouts import Rollouts
from dpo_cli.scoring.scorer import Scores, Statistics
from dpo_cli.training.protocols import GroupLosses

METRICS = (
    "objective/round",
    "objective/scores",
    "objective/kl",
    "objective/entropy",
    "objective/kl_coefficient",
    "policy/approxkl",
    "policy/clipfrac",
    "loss/policy",
    "loss/value",
    "val/ratio",
)


@dataclass
class PolicyGradient:
    """PPO's loss of a token, and its mean over the tokens of a step.

    Attributes:
        rollouts: The round.
        clip: How far a token's probability ratio may leave 1 before it no longer pays.
        value_clip: How far a value may move in a round, in units of the reward.
        value_coefficient: Weight of the value loss; 0 where there is no value head.
    """

    rollouts: Rollouts
    clip: float
    value_clip: float
    value_coefficient: float

    is_coupled = False
    statistics: Statistics = "none"
    metric_names: Sequence[str] = METRICS

    def weight(self, groups: Sequence[TokenGroup]) -> float:
        """The number of tokens."""
        return float(sum(sum(map(len, group.completions)) for group in groups))

    def losses(self, groups: Sequence[TokenGroup], scores: Scores, step: Sequence[TokenGroup]) -> GroupLosses:
        """Losses summed over the tokens of each group, and what is logged by the names that the field uses.

        ``policy/approxkl`` is the mean of (rho - 1) - log rho over tokens, an estimate of KL(pi_old || pi) that is
        never negative (Schulman 2020), ``val/ratio`` the mean of rho.
        """
        experience = [self.rollouts.experience(group) for group in groups]
        device = scores.logps_BK.device
        old_M, values_M, advantages_M, returns_M = (
            torch.cat([getattr(one, name) for one in experience]).to(device, non_blocking=True)
            for name in ("logps_M", "values_M", "advantages_M", "returns_M")
        )
        logps_M = scores.token_logps_M.double()
        log_ratios_M = (logps_M - old_M).detach()
        ratios_M = log_ratios_M.exp()
        policy_M = clipped_surrogate(logps_M, old_M, advantages_M, self.clip)
        value_M = torch.zeros_like(policy_M)
        if self.value_coefficient and scores.values_M is not None:
            value_M = clipped_value_loss(scores.values_M.double(), values_M, returns_M, self.value_clip)
        sizes = torch.tensor([sum(map(len, group.completions)) for group in groups], device=device)
        owners_M = torch.arange(len(groups), device=device).repeat_interleave(sizes, output_size=len(policy_M))

        def sums(of_tokens_M: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(groups), dtype=torch.float64, device=device).index_add(0, owners_M, of_tokens_M)

        a_token = len(step) / self.weight(step)  # sums of groups to means over the tokens of the step
        of_tokens = {
            "policy/approxkl": ratios_M - 1 - log_ratios_M,
            "policy/clipfrac": ((ratios_M - 1).abs() > self.clip).double(),
            "loss/policy": policy_M.detach(),
            "loss/value": value_M.detach(),
            "val/ratio": ratios_M,
        }
        of_groups = {
            "objective/round": [self.rollouts.round_number] * len(experience),
            "objective/scores": [one.reward for one in experience],
            "objective/kl": [one.kl for one in experience],
            "objective/entropy": [one.entropy for one in experience],
            "objective/kl_coefficient": [self.rollouts.kl_coefficient] * len(experience),
        }
        metrics = {name: torch.tensor(values, dtype=torch.float64).to(device) for name, values in of_groups.items()}
        metrics |= {name: sums(values) * a_token for name, values in of_tokens.items()}
        return GroupLosses(sums(policy_M + self.value_coefficient * value_M), metrics)
