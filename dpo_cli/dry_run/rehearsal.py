"""``dpo-cli plan --measure``: one real step on the longest rows, and some usual ones, in a process of its own."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import Params
from dpo_cli.core.progress import SilentReporter
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.dry_run.plan import Task
from dpo_cli.dry_run.tasks import Subject, other_subject, project_subject
from dpo_cli.models.adapters import add_adapter
from dpo_cli.models.device import Machine, prepare_machine, token_budget
from dpo_cli.models.load import keep_weights_unpacked, load_model, quiet_libraries
from dpo_cli.models.project import Workplace
from dpo_cli.models.shapes import random_model
from dpo_cli.models.trials import say
from dpo_cli.training.bench import Case, measure_reference, measure_training

_USUAL_TOKENS = 4
"""Micro-batches that are timed."""


def rehearse(subject: Subject, params: Params) -> None:
    """Say of each training what its largest micro-batch takes, and how fast usual ones are."""
    machine = prepare_machine(params.runtime, embedded=params.model.name == "embedded" and subject.shape is None)
    for task in subject.tasks:
        model = add_adapter(_load(subject, task, machine), task.lora, task.settings.seed)
        keep_weights_unpacked(model)
        work = Workplace("plan", SilentReporter(), params.runtime, machine)
        scorer, _ = work.scorer(model)
        budget = token_budget(params.runtime, machine.device)
        size = task.settings.batch_size
        with scorer:
            usual = _usual(task.groups, _USUAL_TOKENS * budget, scorer)
            timed = measure_training(Case(model, scorer, usual, min(size, len(usual)), work, 1))
            passed = measure_reference(Case(model, scorer, usual, size, work, 1))
            longest = _longest(task.groups, budget, scorer)
            largest = measure_training(Case(model, scorer, longest, len(longest), work, 1))
        found = {
            "peak_bytes": largest["peak_bytes"],
            "largest_seconds": largest["seconds"],
            "tokens_per_s": timed["packed_tokens_per_s"],
            "reference_tokens_per_s": passed["packed_tokens_per_s"],
            "recompute": largest["recompute"],
            "max_tokens_per_microbatch": largest["max_tokens_per_microbatch"],
            "layout": scorer.layout,
        }
        say(**{task.stage: found})
        del model, scorer


def _load(subject: Subject, task: Task, machine: Machine) -> Any:
    if subject.folder is None:
        return random_model(str(subject.shape), machine, task.quantization)
    return load_model(subject.folder, machine, quantization=task.quantization)


def _longest(groups: Sequence[TokenGroup], budget: int, scorer: Any) -> list[TokenGroup]:
    """The longest groups, as many as go through at once."""
    ordered = sorted(groups, key=scorer.num_tokens, reverse=True)
    return _up_to(ordered, budget, scorer)


def _usual(groups: Sequence[TokenGroup], num_tokens: int, scorer: Any) -> list[TokenGroup]:
    """Groups from all over the data, of so many tokens together."""
    spread = groups[:: max(1, len(groups) // 1000)]
    return _up_to(spread, num_tokens, scorer)


def _up_to(groups: Sequence[TokenGroup], num_tokens: int, scorer: Any) -> list[TokenGroup]:
    found: list[TokenGroup] = []
    total = 0
    for group in groups:
        total += scorer.num_tokens(group)
        if found and total > num_tokens:
            break
        found.append(group)
    return found


def _main(asked: dict[str, Any]) -> None:
    quiet_libraries()
    params = parse_params(asked["params"])
    if asked["shape"] is None and asked["folder"] is None:
        subject = project_subject(params)
    else:
        folder = Path(asked["folder"]) if asked["folder"] else None
        subject = other_subject(asked["shape"], folder, asked["regime"], asked["num_pairs"], params)
    rehearse(subject, params)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
