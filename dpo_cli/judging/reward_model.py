"""A reward model: p(first is better) = sigma(r_first - r_second), Bradley-Terry's probability."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.schema import Messages, assistant
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.heads import reward_head
from dpo_cli.models.project import Project
from dpo_cli.scoring.budget import TokenBudget, in_micro_batches
from dpo_cli.scoring.reward_scorer import RewardScorer


@dataclass(frozen=True)
class RewardModel:
    """Rewards of answers, by a model in eval mode. Only differences between answers to one prompt mean anything."""

    scorer: RewardScorer
    encoder: ChatEncoder
    budget: TokenBudget

    @classmethod
    def load(cls, folder: Path, project: Project) -> RewardModel:
        """The reward model that stage reward made in a folder, on the frozen weights that it was trained on."""
        model = project.reward_model(folder)
        return cls(RewardScorer(project.scorer(model)[0], reward_head(model)), project.encoder, project.budget())

    @torch.no_grad()
    def rewards(self, groups: Sequence[TokenGroup]) -> list[list[float]]:
        """The rewards of each group's answers, as token ids; groups may have any number of them, and differ in ids."""
        found: dict[str, list[float]] = {}
        with self.scorer.scorer:
            for batch, scores in in_micro_batches(groups, self.budget, self.scorer.split, self.scorer.score):
                found.update(zip((group.id for group in batch), scores.rewards_BK.tolist(), strict=True))
        return [found[group.id] for group in groups]

    def rewards_of_texts(self, prompt: Messages, texts: Sequence[str]) -> list[float]:
        """The rewards of some answers to a prompt, as texts."""
        if not texts:
            return []
        return self.rewards([text_group(self.encoder, "one", prompt, texts)])[0]


def text_group(encoder: ChatEncoder, name: str, prompt: Messages, texts: Sequence[str]) -> TokenGroup:
    """A prompt with some answers, as token ids."""
    encoding = encoder.encode(prompt, [[assistant(text)] for text in texts])
    return TokenGroup(name, name, tuple(encoding.prompt), tuple(map(tuple, encoding.completions)))
