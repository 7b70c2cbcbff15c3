"""A judge that knows the reward: the embedded world's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dpo_cli.core.errors import DataError
from dpo_cli.data.world import Task, task_of
from dpo_cli.evaluation.judges.base import Judgment, Question, one_by_one


class WorldJudge:
    """Prefers the answer with the higher known reward; equal rewards are a tie."""

    remedy = "set evaluate.judge to none"

    def reward(self, prompt: str, answer: str) -> float:
        """The known reward of an answer.

        Raises:
            DataError: The prompt is not of the embedded world.
        """
        return world_task(prompt).reward(answer)

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        """Judge questions; it has a verdict on all.

        Raises:
            DataError: The prompt is not of the embedded world.
        """
        return one_by_one(_prefer, questions)


def _prefer(prompt: str, a: str, b: str) -> float:
    """1, 0.5 or 0."""
    task = world_task(prompt)
    difference = task.reward(a) - task.reward(b)
    return 0.5 if difference == 0 else float(difference > 0)


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
