"""What tuning cost or gained on other tasks: base, SFT and DPO answer the same items of lm-evaluation-harness.

All three see the same items, so each difference is taken item by item, and its interval is that of
the mean of these differences: what makes an item easy or hard for all of them falls out. Items of
a task are taken as independent, each a cluster of its own.

A difference is beyond doubt where its interval leaves out 0 and the two models differ on as many
items as it takes: of d items that differ, all d have the same sign by chance with probability
2 * 2^-d (the sign test), so with fewer than log2(2 / (1 - confidence)) of them, 6 at 95%, no
outcome could be told from chance, whatever a bootstrap of so few says.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_json, write_json_lines
from dpo_cli.core.errors import DataError, MachineError
from dpo_cli.core.manifest import DPO as DPO_MODEL
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.evaluation import BASE, DPO, SFT
from dpo_cli.statistics.intervals import Estimate, Sampling, with_interval

if TYPE_CHECKING:
    from dpo_cli.models.project import Project

_COMMAND = "capability"
MODELS = (BASE, SFT, DPO)
NAMES = {BASE: "base", SFT: "SFT", DPO: "DPO"}
STEPS = ((DPO, SFT), (SFT, BASE))
"""What is compared with what: each step of tuning with the model that it began from."""

Change = Literal["worse", "better", "not told apart"]


class TaskScores(NamedTuple):
    """What each model got on each item of a task.

    Attributes:
        metric: What is counted, such as ``acc``.
        items: Numbers of the items in the task's file, from 0, ascending.
        scores: By model, one an item.
    """

    task: str
    metric: str
    higher_is_better: bool
    items: list[int]
    scores: dict[str, list[float]]


class Difference(NamedTuple):
    """One model less another on the same items: the mean with its paired interval, and what it says of the first."""

    estimate: Estimate
    change: Change


class TaskResult(NamedTuple):
    """Means of a task by model, and differences by the two models of a step."""

    scores: TaskScores
    means: dict[str, float]
    differences: dict[tuple[str, str], Difference]
    sampling: Sampling


def pair_items(task: str, metric: str, higher_is_better: bool, found: Mapping[str, Mapping[int, float]]) -> TaskScores:
    """Put the models' scores of each item, found by model, side by side.

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


def summarize_task(scores: TaskScores, sampling: Sampling) -> TaskResult:
    """Means and paired differences of a task."""
    names = [str(item) for item in scores.items]
    differences = {}
    for ours, theirs in STEPS:
        values = [a - b for a, b in zip(scores.scores[ours], scores.scores[theirs], strict=True)]
        estimate = sampling.interval(values, names)
        num_differing = sum(value != 0 for value in values)
        change = _change(estimate, num_differing, scores.higher_is_better, sampling.confidence)
        differences[ours, theirs] = Difference(estimate, change)
    means = {model: math.fsum(values) / len(values) for model, values in scores.scores.items()}
    return TaskResult(scores, means, differences, sampling)


def _change(estimate: Estimate, num_differing: int, higher_is_better: bool, confidence: float) -> Change:
    told = 2.0 ** (1 - num_differing) <= 1 - confidence
    if not told or estimate.low <= 0 <= estimate.high:
        return "not told apart"
    return "better" if (estimate.low > 0) == higher_is_better else "worse"


def metrics_of(results: Sequence[TaskResult]) -> dict[str, Any]:
    """The figures as reports/capability/metrics.json holds them."""
    return {_COMMAND: {"tasks": {result.scores.task: _metrics_of_task(result) for result in results}}}


def _metrics_of_task(result: TaskResult) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "metric": result.scores.metric,
        "higher_is_better": result.scores.higher_is_better,
        "change": result.differences[DPO, SFT].change,
        "num_items": len(result.scores.items),
        **result.means,
    }
    for (ours, theirs), difference in result.differences.items():
        figures |= with_interval(f"{ours}_minus_{theirs}", difference.estimate)
    return figures


def rows_of(scores: TaskScores) -> list[dict[str, Any]]:
    """One row an item, as reports/capability/items.jsonl holds them."""
    columns = zip(*(scores.scores[model] for model in MODELS), strict=True)
    return [
        {"task": scores.task, "item": item, "metric": scores.metric, **dict(zip(MODELS, values, strict=True))}
        for item, values in zip(scores.items, columns, strict=True)
    ]


def in_words(results: Sequence[TaskResult]) -> list[str]:
    """Of each step of tuning, where it made the model worse beyond doubt, a line each, or that it did nowhere."""
    lines = []
    for ours, theirs in STEPS:
        step = f"{NAMES[ours]} is worse than {NAMES[theirs]}"
        worse = [result for result in results if result.differences[ours, theirs].change == "worse"]
        lines += [
            f"{step} on {result.scores.task} beyond doubt: {result.scores.metric} {result.means[theirs]:.3f} ->"
            f" {result.means[ours]:.3f}, on {len(result.scores.items)} items"
            for result in worse
        ]
        if not worse:
            lines.append(f"{step} on no task beyond doubt.")
    return lines


# --- measuring ------------------------------------------------------------------------------


def refuse_without_harness() -> None:
    """Refuse to go on where the extra is not installed.

    Raises:
        MachineError: With how to install it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise MachineError(
            "capability needs lm-evaluation-harness, which is not installed; run: pip install 'dpo-cli[lm-eval]', or in"
            " a clone: pip install --constraint constraints.txt --editable '.[lm-eval]'"
        )


def measure_capability(
    folder: Path, names: Sequence[str], limit: int | None, params: Params, reporter: Reporter
) -> list[TaskResult]:
    """Let base, SFT and DPO answer a folder of tasks, and write reports/capability.

    Args:
        folder: YAML files of lm-evaluation-harness with local data.
        names: Tasks, groups or tags; none: all tasks.
        limit: The first so many items of each; None: all.
        params: All settings.
        reporter: Shows progress.

    Raises:
        MachineError: The harness is not installed, or the model cannot be loaded.
        DataError: The folder has no task, or one that cannot be read or compared.
        ParamsError: A name is unknown.
        StaleArtifactError: A model is missing, damaged, or of another graph.
    """
    refuse_without_harness()
    from dpo_cli.evaluation.harness import answer_items, load_tasks, measure_requests
    from dpo_cli.models.load import context_length, quiet_libraries
    from dpo_cli.models.project import open_project

    quiet_libraries()
    tasks = load_tasks(folder, names)
    project = open_project(params, reporter, _COMMAND)
    DPO_MODEL.check({"graph": project.identity})
    context = context_length(project.base)
    requests = {task.name: measure_requests(task, project.tokenizer, context, limit) for task in tasks}
    for name, asked in requests.items():
        if asked.num_too_long:
            reporter.warn(
                f"{_COMMAND}: {asked.num_too_long} of {asked.num} requests of task {name} are longer than {context}"
                " tokens, the model's context, and lose their beginning"
            )
    scores: dict[str, dict[str, dict[int, float]]] = {task.name: {} for task in tasks}

    def ask(name: str, model: Any) -> None:
        for task in tasks:
            label = f"{_COMMAND}: {NAMES[name]} on {task.name}"
            scores[task.name][name] = answer_items(model, task, requests[task.name], project, label=label, limit=limit)

    settings = params.evaluate
    sampling = Sampling(settings.bootstrap_draws, settings.confidence, settings.seed)
    with stage_scratch(_COMMAND, "run"):
        _ask_all(project, ask)
        paired = [pair_items(task.name, task.metric, task.higher_is_better, scores[task.name]) for task in tasks]
        results = [summarize_task(one, sampling) for one in paired]
        write_json_lines(paths.report_dir(_COMMAND) / "items.jsonl", (row for one in paired for row in rows_of(one)))
        write_json(paths.metrics_file(_COMMAND), metrics_of(results))
    return results


def _ask_all(project: Project, ask: Callable[[str, Any], None]) -> None:
    """Base, SFT and DPO in turn, on one set of weights; base has its own where SFT trained all of them."""
    from dpo_cli.models.device import release_memory

    pair = project.pair()
    ask(SFT, pair.use_reference())
    ask(DPO, pair.use_policy())
    if project.sft.method != "full":
        ask(BASE, pair.use_frozen())
        return
    del pair
    release_memory()
    ask(BASE, project.whole_model(project.base))
