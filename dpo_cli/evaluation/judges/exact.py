"""A judge that knows the reward: the embedded world's."""

from __future__ import annotations

from dpo_cli.core.errors import DataError
from dpo_cli.data.world import Task, task_of


class WorldJudge:
    """Prefers the answer with the higher known reward; equal rewards are a tie."""

    def prefer(self, prompt: str, first: str, second: str) -> float:
        """1, 0.5 or 0.

        Raises:
            DataError: The prompt is not of the embedded world.
        """
        task = world_task(prompt)
        difference = task.reward(first) - task.reward(second)
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
