"""The capability table: what tuning did to tasks that it was not meant to change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_cli.core.progress import Status
from dpo_cli.report.shades import signed

_STATUS: Mapping[str, Status] = {"better": "good", "worse": "bad", "not told apart": "plain"}


@dataclass(frozen=True)
class TaskRow:
    """A task.

    Attributes:
        name: The task.
        metric: What is measured.
        num_items: How many questions.
        values: Of the base, SFT and tuned model.
        difference: Tuned less SFT.
        interval: Its interval.
        status: good or bad where the tuned model is better or worse beyond doubt, else plain.
    """

    name: str
    metric: str
    num_items: str
    values: list[str]
    difference: str
    interval: str
    status: Status


def capability_rows(capability: Mapping[str, Any] | None) -> list[TaskRow]:
    """A row a task, in the order of the file."""
    return [_row(name, task) for name, task in (capability or {}).get("tasks", {}).items()]


def _row(name: str, task: Mapping[str, Any]) -> TaskRow:
    low, high = (math.nan if end is None else end for end in task["dpo_minus_sft_ci"])
    return TaskRow(
        name,
        task["metric"],
        f"{task['num_items']:,}",
        ["\N{EN DASH}" if task.get(model) is None else f"{task[model]:.3f}" for model in ("base", "sft", "dpo")],
        signed(task["dpo_minus_sft"], 3),
        f"[{signed(low, 3)}, {signed(high, 3)}]" if math.isfinite(high - low) else "",
        _STATUS[task["change"]],
    )
