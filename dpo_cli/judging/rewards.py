"""Judges that know the reward of an answer: the embedded world's, a rule that is checked exactly, or a reward model's.

A reward model's says p(first is better) = sigma(r_first - r_second), Bradley-Terry's probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dpo_cli.core.errors import DataError
from dpo_cli.core.evaluate_params import EvaluateParams
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.data.rules import RULES
from dpo_cli.data.schema import Messages, assistant
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.data.world import Task, task_of
from dpo_cli.judging.judge import Judgment, Question, one_by_one
from dpo_cli.models.project import Project
from dpo_cli.models.reward import reward_head
from dpo_cli.scoring.budget import TokenBudget, in_micro_batches
from dpo_cli.scoring.reward import RewardScorer


@dataclass(frozen=True)
class RewardJudge:
    """Prefers the answer with the higher reward; it has a verdict on all.

    Attributes:
        name: What the reward is called.
        reward: From prompt and answer, as questions have them, to its reward.
        is_exact: Whether it is known, 0 or 1, so that the higher one is better for certain; else
            :func:`preference` says how probable that is.
    """

    name: str
    reward: Callable[[str, str], float]
    is_exact: bool = True
    remedy = "set evaluate.judge to none"

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        """Judge questions.

        Raises:
            DataError: The reward is not known of a prompt.
        """
        return one_by_one(self._prefer, questions)

    def _prefer(self, prompt: str, a: str, b: str) -> float:
        first, second = self.reward(prompt, a), self.reward(prompt, b)
        if self.is_exact:
            return 0.5 if first == second else float(first > second)
        return preference(first, second)


def preference(first: float, second: float) -> float:
    """Bradley-Terry's probability that the answer with the first reward is better: sigma(first - second)."""
    return 1 / (1 + math.exp(second - first)) if second <= first else 1 - 1 / (1 + math.exp(first - second))


def known_reward(evaluate: EvaluateParams) -> RewardJudge | None:
    """The judge that section evaluate asks for, where it is one that knows the reward: ``world`` or ``rule``."""
    if evaluate.judge == "world":
        return RewardJudge("the embedded world's known reward", world_reward)
    if evaluate.judge == "rule":
        assert evaluate.rule is not None  # section evaluate is refused without it
        rule = RULES[evaluate.rule]
        return RewardJudge(f"the rule {evaluate.rule}: {rule.meaning}", rule.reward)
    return None


def world_reward(prompt: str, answer: str) -> float:
    """The embedded world's reward of an answer.

    Raises:
        DataError: The prompt is not of the embedded world.
    """
    return world_task(prompt).reward(answer)


def world_task(prompt: str) -> Task:
    """The task behind a prompt of the embedded world.

    Raises:
        DataError: There is none.
    """
    task = task_of(prompt)
    if task is None:
        raise DataError(
            f"evaluate.judge is world, but the held-out prompt {prompt[:60]!r} is not of the embedded world;"
            " set evaluate.judge to none"
        )
    return task


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
