"""What is logged beside the losses of groups: rewards, log-probabilities, and means over tokens, as TRL names them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.losses.ranking import kendall_tau
from dpo_cli.scoring.scorer import Scores
from dpo_cli.training.history import TOKEN_METRICS

REWARD_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/ties",
    "gradient_weight",
)
PAIR_METRICS = (
    *REWARD_METRICS,
    "logps/chosen",
    "logps/rejected",
    *TOKEN_METRICS,
)
TAU = "rewards/kendall_tau"
KL = "kl"


def values_of(
    table: Mapping[str, float] | Mapping[str, Sequence[float]], groups: Sequence[TokenGroup], device: torch.device
) -> torch.Tensor:
    """float64 [B] or [B, K], the values of some groups; no copy is waited for, as it stands behind a whole forward."""
    values = torch.tensor([table[group.id] for group in groups], dtype=torch.float64)
    return values.to(device, non_blocking=True)


def token_means(scores: Scores, step: Sequence[TokenGroup]) -> dict[str, torch.Tensor]:
    """Means over tokens, as sums of each group whose mean over the step's groups they are; float64 [B] each.

    The entropy, nats, is over the tokens of all answers; the accuracy, how often no token was likelier, over those
    of the first.
    """
    if scores.statistics is None:
        return {}
    lengths_BK = scores.num_tokens_BK
    lengths, total = lengths_BK.flatten(), len(scores.token_logps_M)
    owners = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths, output_size=total)
    values = torch.stack([scores.statistics.entropies_N, scores.statistics.is_likeliest_N]).double()
    sums = torch.zeros(2, len(lengths), dtype=torch.float64, device=lengths.device).index_add(1, owners, values)
    entropies_BK, right_BK = sums.view(2, *lengths_BK.shape)
    num_tokens = sum(map(len, (completion for group in step for completion in group.completions)))
    num_first = sum(len(group.completions[0]) for group in step)
    return {
        "entropy": entropies_BK.sum(1) * (len(step) / num_tokens),
        "mean_token_accuracy": right_BK[:, 0] * (len(step) / num_first),
    }


def pair_metrics(rewards_BK: torch.Tensor, policy_BK: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is logged of the first and the last answer of each group."""
    return {
        **reward_metrics(rewards_BK),
        "logps/chosen": policy_BK[:, 0],
        "logps/rejected": policy_BK[:, -1],
    }


def reward_metrics(rewards_BK: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is logged of the rewards of the first and the last answer of each group.

    The gradient weight is sigma(r_l - r_w), by which DPO's gradient weighs a pair (Rafailov et al. 2023, section 4).
    """
    margins = rewards_BK[:, 0] - rewards_BK[:, -1]
    return {
        "rewards/chosen": rewards_BK[:, 0],
        "rewards/rejected": rewards_BK[:, -1],
        "rewards/margins": margins,
        "rewards/accuracies": (margins.sign() + 1) / 2,
        "rewards/ties": (margins == 0).double(),
        "gradient_weight": (-margins).sigmoid(),
    }


def ranking_metrics(rewards_BK: torch.Tensor, ranks_BK: torch.Tensor) -> dict[str, torch.Tensor]:
    """Kendall's tau and, as the accuracy, the share of pairs of a ranking that the rewards order alike."""
    ranks_BK = ranks_BK.to(rewards_BK.device, non_blocking=True)
    tau = kendall_tau(rewards_BK, ranks_BK).nan_to_num(0.0)  # of one tie: neither right nor wrong
    return {TAU: tau, "rewards/accuracies": (tau + 1) / 2}
