"""A judge that is a reward model: p(first is better) = sigma(r_first - r_second), Bradley-Terry's probability."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.schema import Messages, assistant, user
from dpo_cli.data.tokenise import TokenGroup
from dpo_cli.scoring.budget import TokenBudget, in_micro_batches
from dpo_cli.scoring.reward import RewardScorer


class RewardModel:
    """Rewards of answers. Only differences between answers to one prompt mean anything.

    Args:
        scorer: The reward model's forward pass, its model in eval mode.
        encoder: Messages to token ids.
        budget: Tokens of a micro-batch.
    """

    def __init__(self, scorer: RewardScorer, encoder: ChatEncoder, budget: TokenBudget) -> None:
        self._scorer = scorer
        self._encoder = encoder
        self._budget = budget

    @torch.no_grad()
    def rewards(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """The rewards of each group's answers, as token ids; groups may have any number of them, and differ in ids."""
        found: dict[str, list[float]] = {}
        with self._scorer.scorer:
            for batch, scores in in_micro_batches(groups, self._budget, self._scorer.split, self._scorer.score):
                found.update(zip((group.id for group in batch), scores.rewards_BK.tolist(), strict=True))
        return [found[group.id] for group in groups]

    def rewards_of_texts(self, prompt: Messages, texts: Sequence[str]) -> list[float]:
        """The rewards of some answers to a prompt, as texts."""
        tokens = tuple(self._encoder.encode_prompt(prompt))
        answers = tuple(tuple(self._encoder.encode_completion(prompt, [assistant(text)])) for text in texts)
        return self.rewards([TokenGroup("one", "one", tokens, answers)])[0] if texts else []

    def prefer(self, prompt: str, first: str, second: str) -> float:
        """Probability that the first of two answers to a user's message is the better one."""
        a, b = self.rewards_of_texts([user(prompt)], [first, second])
        return preference(a, b)


def preference(first: float, second: float) -> float:
    """Bradley-Terry's probability that the answer with the first reward is better: sigma(first - second)."""
    return 1 / (1 + math.exp(second - first)) if second <= first else 1 - 1 / (1 + math.exp(first - second))
