"""From token groups to rewards: a head on the hidden state at the last token.

Legend: B groups, K completions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.layout import LayoutName
from dpo_cli.scoring.scorer import Scorer, Statistics, extended


@dataclass(frozen=True)
class Rewards:
    """Rewards of some groups' completions.

    Attributes:
        rewards_BK: float64 [B, K]; only differences within a group mean anything.
    """

    rewards_BK: torch.Tensor


class RewardScorer:
    """Scores token groups with a reward model: r(prompt, completion) = head(hidden state at the last token).

    Args:
        scorer: Runs the model that the head stands on.
        head: [..., D] to [..., 1], float32 whatever the model computes in.
    """

    def __init__(self, scorer: Scorer, head: torch.nn.Module) -> None:
        self.scorer = scorer
        self._head = head
        self.device, self.config, self.compute_dtype = scorer.device, scorer.config, scorer.compute_dtype
        self.head_bytes = 0
        """There are no logits."""

    def num_tokens(self, group: TokenGroup) -> int:
        """Tokens of a group that go through the model, the last ones of the completions counted."""
        return self.scorer.num_tokens(extended(group))

    def split(self, groups: Sequence[TokenGroup], max_tokens: int) -> list[list[int]]:
        """Micro-batches of at most ``max_tokens`` tokens, the last ones of the completions counted, as indices."""
        return self.scorer.split([extended(group) for group in groups], max_tokens)

    def score(
        self, groups: Sequence[TokenGroup], layout: LayoutName | None = None, *, statistics: Statistics = "none"
    ) -> Rewards:
        """The rewards of all completions of some groups in one forward pass, with gradients; no statistics."""
        hidden_BKD = self.scorer.last_hidden(groups, layout).float()
        with torch.autocast(hidden_BKD.device.type, enabled=False):
            return Rewards(self._head(hidden_BKD).squeeze(-1).double())
