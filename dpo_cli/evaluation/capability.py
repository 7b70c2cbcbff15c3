"""What tuning cost or gained on other tasks: base, SFT and DPO answer the same items.

All three see the same items, so each difference is taken item by item, and its interval is that of
the mean of these differences: what makes an item easy or hard for all of them falls out. Items of
a task are taken as independent, each a cluster of its own.

A difference is beyond doubt where its interval leaves out 0 and the two models differ on as many
items as it takes: of d items that differ, all d have the same sign by chance with probability
2 * 2^-d (the sign test), so with fewer than log2(2 / (1 - confidence)) of them, 6 at 95%, no
outcome could be told from chance, whatever a bootstrap of so few says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_cli.core.errors import DataError
from dpo_cli.statistics.bootstrap import Estimate, cluster_bootstrap

BASE, SFT, DPO = "base", "sft", "dpo"
MODELS = (BASE, SFT, DPO)
STEPS = ((DPO, SFT), (SFT, BASE))
"""What is compared with what: each step of tuning with the model that it began from."""

Change = Literal["worse", "better", "not told apart"]


@dataclass(frozen=True)
class TaskScores:
    """What each model got on each item of a task.

    Attributes:
        task: Its name.
        metric: What is counted, such as ``acc``.
        higher_is_better: Whether more of it is better.
        items: Numbers of the items in the task's file, from 0, ascending.
        scores: By model, one an item.
    """

    task: str
    metric: str
    higher_is_better: bool
    items: list[int]
    scores: dict[str, list[float]]


@dataclass(frozen=True)
class Difference:
    """One model less another on the same items.

    Attributes:
        estimate: Mean difference and its paired interval.
        num_differing: Items on which they differ.
        change: What it says of the first one.
    """

    estimate: Estimate
    num_differing: int
    change: Change


@dataclass(frozen=True)
class TaskResult:
    """Figures of a task.

    Attributes:
        task: Its name.
        metric: What is counted.
        num_items: Items that all models answered.
        higher_is_better: Whether more of it is better.
        means: By model.
        differences: By the two models of a step.
    """

    task: str
    metric: str
    num_items: int
    higher_is_better: bool
    means: dict[str, float]
    differences: dict[tuple[str, str], Difference]


def pair_items(task: str, metric: str, higher_is_better: bool, found: Mapping[str, Mapping[int, float]]) -> TaskScores:
    """Put the models' scores on the same items side by side.

    Args:
        task: Its name.
        metric: What is counted.
        higher_is_better: Whether more of it is better.
        found: By model, the score of each item.

    Raises:
        DataError: The models have scores of different items, or of none.
    """
    items = sorted(found[BASE])
    if any(sorted(found[model]) != items for model in MODELS):
        counts = ", ".join(f"{model} {len(found[model])}" for model in MODELS)
        raise DataError(
            f"task {task}: {metric} is there for different items of each model ({counts}), so they cannot be paired;"
            " name a metric that every item has"
        )
    if not items:
        raise DataError(f"task {task}: no item has the metric {metric}")
    return TaskScores(task, metric, higher_is_better, items, {m: [found[m][item] for item in items] for m in MODELS})


def summarize_task(scores: TaskScores, *, draws: int, confidence: float, seed: int) -> TaskResult:
    """Means and paired differences of a task.

    Args:
        scores: By model and item.
        draws: Bootstrap draws behind each interval.
        confidence: Coverage of the intervals.
        seed: Of the draws. The figures do not depend on the order of the items.
    """
    names = [str(item) for item in scores.items]
    differences = {}
    for ours, theirs in STEPS:
        values = [a - b for a, b in zip(scores.scores[ours], scores.scores[theirs], strict=True)]
        estimate = cluster_bootstrap(values, names, draws=draws, confidence=confidence, seed=seed)
        num_differing = sum(value != 0 for value in values)
        change = _change(estimate, num_differing, scores.higher_is_better, confidence)
        differences[ours, theirs] = Difference(estimate, num_differing, change)
    means = {model: math.fsum(values) / len(values) for model, values in scores.scores.items()}
    return TaskResult(scores.task, scores.metric, len(scores.items), scores.higher_is_better, means, differences)


def _change(estimate: Estimate, num_differing: int, higher_is_better: bool, confidence: float) -> Change:
    told = 2.0 ** (1 - num_differing) <= 1 - confidence
    if not told or estimate.low <= 0 <= estimate.high:
        return "not told apart"
    return "better" if (estimate.low > 0) == higher_is_better else "worse"


def metrics_of(results: Sequence[TaskResult]) -> dict[str, Any]:
    """The figures as reports/capability/metrics.json holds them."""
    return {"tasks": {result.task: _metrics_of_task(result) for result in results}}


def _metrics_of_task(result: TaskResult) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "metric": result.metric,
        "higher_is_better": result.higher_is_better,
        "change": result.differences[DPO, SFT].change,
        "num_items": result.num_items,
        **result.means,
    }
    for (ours, theirs), difference in result.differences.items():
        name = f"{ours}_minus_{theirs}"
        figures[name] = difference.estimate.value
        figures[f"{name}_ci"] = [difference.estimate.low, difference.estimate.high]
    return figures


def rows_of(scores: TaskScores) -> list[dict[str, Any]]:
    """One row an item, as reports/capability/items.jsonl holds them."""
    return [
        {
            "task": scores.task,
            "item": item,
            "metric": scores.metric,
            **{model: scores.scores[model][at] for model in MODELS},
        }
        for at, item in enumerate(scores.items)
    ]


NAMES = {BASE: "base", SFT: "SFT", DPO: "DPO"}


def in_words(results: Sequence[TaskResult]) -> list[str]:
    """Of each step of tuning, where it made the model worse beyond doubt, a line each, or that it did nowhere."""
    lines = []
    for ours, theirs in STEPS:
        step = f"{NAMES[ours]} is worse than {NAMES[theirs]}"
        worse = [result for result in results if result.differences[ours, theirs].change == "worse"]
        lines += [
            f"{step} on {result.task} beyond doubt: {result.metric} {result.means[theirs]:.3f} ->"
            f" {result.means[ours]:.3f}, on {result.num_items} items"
            for result in worse
        ]
        if not worse:
            lines.append(f"{step} on no task beyond doubt.")
    return lines
