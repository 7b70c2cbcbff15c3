"""What tuning cost on other tasks, item by item, through lm-evaluation-harness."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_json, write_json_lines
from dpo_cli.core.errors import MachineError
from dpo_cli.core.manifest import DPO as DPO_MODEL
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.evaluation.capability import (
    BASE,
    DPO,
    NAMES,
    SFT,
    TaskResult,
    metrics_of,
    pair_items,
    rows_of,
    summarize_task,
)

if TYPE_CHECKING:
    from dpo_cli.models.project import Project

_COMMAND = "capability"


@dataclass(frozen=True)
class Capability:
    """What the tasks say.

    Attributes:
        results: By task.
        draws: Bootstrap draws behind each interval.
        confidence: Coverage of the intervals.
    """

    results: list[TaskResult]
    draws: int
    confidence: float


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
) -> Capability:
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
    project = open_project(params, reporter, "capability")
    DPO_MODEL.check({"graph": project.identity})
    context = context_length(project.base)
    requests = {task.name: measure_requests(task, project.tokenizer, context, limit) for task in tasks}
    for name, asked in requests.items():
        if asked.num_too_long:
            reporter.warn(
                f"{_COMMAND}: {asked.num_too_long} of {asked.count} requests of task {name} are longer than {context}"
                " tokens, the model's context, and lose their beginning"
            )
    scores: dict[str, dict[str, dict[int, float]]] = {task.name: {} for task in tasks}

    def ask(name: str, model: Any) -> None:
        for task in tasks:
            scores[task.name][name] = answer_items(
                model,
                task,
                requests[task.name],
                project,
                label=f"{_COMMAND}: {NAMES[name]} on {task.name}",
                limit=limit,
            )

    with stage_scratch(_COMMAND, "run"):
        _ask_all(project, ask)
        settings = params.evaluate
        paired = [pair_items(task.name, task.metric, task.higher_is_better, scores[task.name]) for task in tasks]
        results = [
            summarize_task(one, draws=settings.bootstrap_draws, confidence=settings.confidence, seed=settings.seed)
            for one in paired
        ]
        write_json_lines(paths.report_dir(_COMMAND) / "items.jsonl", (row for one in paired for row in rows_of(one)))
        found = Capability(results, settings.bootstrap_draws, settings.confidence)
        write_json(paths.metrics_file(_COMMAND), as_json(found))
    return found


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


def as_json(found: Capability) -> dict[str, Any]:
    """The figures as reports/capability/metrics.json holds them."""
    return {_COMMAND: metrics_of(found.results)}
