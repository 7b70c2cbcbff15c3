"""Judges that know the reward: the embedded world's, and rules that can be checked exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dpo_cli.core.errors import DataError
from dpo_cli.core.params import EvaluateParams
from dpo_cli.data.rules import RULES
from dpo_cli.data.world import Task, task_of
from dpo_cli.judging.judge import Judgment, Question, one_by_one


@dataclass(frozen=True)
class ExactJudge:
    """Prefers the answer with the higher known reward; equal rewards are a tie.

    Attributes:
        name: What the reward is called.
        reward: From prompt and answer to its reward, 0 or 1.
    """

    name: str
    reward: Callable[[str, str], float]
    remedy = "set evaluate.judge to none"

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        """Judge questions; it has a verdict on all.

        Raises:
            DataError: The reward is not known of a prompt.
        """
        return one_by_one(self._prefer, questions)

    def _prefer(self, prompt: str, a: str, b: str) -> float:
        """1, 0.5 or 0."""
        difference = self.reward(prompt, a) - self.reward(prompt, b)
        return 0.5 if difference == 0 else float(difference > 0)


def known_reward(evaluate: EvaluateParams) -> ExactJudge | None:
    """The judge that section evaluate asks for, where it is one that knows the reward: ``world`` or ``rule``."""
    if evaluate.judge == "world":
        return ExactJudge("the embedded world's known reward", world_reward)
    if evaluate.judge == "rule":
        assert evaluate.rule is not None  # section evaluate is refused without it
        rule = RULES[evaluate.rule]
        return ExactJudge(f"the rule {evaluate.rule}: {rule.meaning}", rule.reward)
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
