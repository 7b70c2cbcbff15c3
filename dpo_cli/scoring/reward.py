"""From token groups to rewards: a scalar head on the hidden state at each completion's last token.

Legend: B groups, K completions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.layout import LayoutName
from dpo_cli.scoring.scorer import Scorer, Statistics


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

    Attributes:
        scorer: The same.
    """

    def __init__(self, scorer: Scorer, head: torch.nn.Module) -> None:
        self.scorer = scorer
        self._head = head

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.scorer.device

    @property
    def config(self) -> Any:
        """The text model's configuration."""
        return self.scorer.config

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products."""
        return self.scorer.compute_dtype

    @property
    def head_bytes(self) -> int:
        """0: there are no logits."""
        return 0

    def num_tokens(self, group: TokenGroup) -> int:
        """Tokens of a group that go through the model, the last ones of the completions counted."""
        return self.scorer.num_tokens(_longer(group))

    def split(self, groups: Sequence[TokenGroup], max_tokens: int) -> list[list[int]]:
        """Micro-batches of at most ``max_tokens`` tokens, the last ones of the completions counted, as indices."""
        return self.scorer.split([_longer(group) for group in groups], max_tokens)

    def score(
        self, groups: Sequence[TokenGroup], layout: LayoutName | None = None, *, statistics: Statistics = "none"
    ) -> Rewards:
        """The rewards of all completions of some groups in one forward pass, with gradients.

        Args:
            groups: Groups with one number of completions.
            layout: Another layout than the scorer's.
            statistics: ``none``: without logits there are no distributions to look at.
        """
        hidden_BKD = self.scorer.last_hidden(groups, layout).float()
        with torch.autocast(hidden_BKD.device.type, enabled=False):
            return Rewards(self._head(hidden_BKD).squeeze(-1).double())


def _longer(group: TokenGroup) -> TokenGroup:
    return TokenGroup(group.id, group.group, group.prompt, tuple((*tokens, 0) for tokens in group.completions))
