"""A judge that is a reward model: p(first is better) = sigma(r_first - r_second), Bradley-Terry's probability."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.schema import Messages, assistant
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.judging.judge import Judgment, Question, one_by_one
from dpo_cli.models.adapters import reward_head
from dpo_cli.models.project import Project
from dpo_cli.scoring.budget import TokenBudget, in_micro_batches
from dpo_cli.scoring.scorer import RewardScorer


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

    @classmethod
    def load(cls, folder: Path, project: Project) -> RewardModel:
        """The reward model of a folder, on the frozen weights that it was trained on.

        Args:
            folder: What stage reward made; :func:`dpo_cli.models.adapters.check_reward_model` says whether it fits.
            project: What it was trained on.
        """
        model = project.reward_model(folder)
        return cls(RewardScorer(project.scorer(model)[0], reward_head(model)), project.encoder, project.budget())

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
        if not texts:
            return []
        encoding = self._encoder.encode(prompt, [[assistant(text)] for text in texts])
        answers = tuple(map(tuple, encoding.completions))
        return self.rewards([TokenGroup("one", "one", tuple(encoding.prompt), answers)])[0]


class KnownRewards:
    """A judge by the rewards of all answers that it will be asked about.

    Args:
        rewards: By prompt and answer, as questions have them.
    """

    remedy = "set evaluate.judge to none"

    def __init__(self, rewards: Mapping[tuple[str, str], float]) -> None:
        self._rewards = dict(rewards)

    def reward(self, prompt: str, answer: str) -> float:
        """The reward of an answer."""
        return self._rewards[prompt, answer]

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        """Judge questions; it has a verdict on all."""
        return one_by_one(lambda prompt, a, b: preference(self.reward(prompt, a), self.reward(prompt, b)), questions)


def preference(first: float, second: float) -> float:
    """Bradley-Terry's probability that the answer with the first reward is better: sigma(first - second)."""
    return 1 / (1 + math.exp(second - first)) if second <= first else 1 - 1 / (1 + math.exp(first - second))
