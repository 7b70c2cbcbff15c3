"""What the policies of a seed answer, at each temperature, and whether it is good.

Rewards are known: 1 for the good answer, which is the data's chosen one, and 0 for any other. What was measured is
stored, so an experiment that was killed goes on where it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from dpo_cli.core import paths
from dpo_cli.core.artifacts import atomic_path, digest_json, write_text
from dpo_cli.core.load_params import load_params
from dpo_cli.core.manifest import BASE, REFERENCE, REWARD, SFT
from dpo_cli.core.progress import Reporter
from dpo_cli.data import world
from dpo_cli.data.schema import user
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.data.world import Task
from dpo_cli.evaluation.generation import PromptTokens
from dpo_cli.evaluation.models import EvaluatedModel, adapter_models
from dpo_cli.evaluation.steps import Steps
from dpo_cli.judging.known_reward import world_task
from dpo_cli.judging.reward_model import RewardModel
from dpo_cli.models.project import Project, open_project
from dpo_cli.statistics.best_of_n import best_of_n
from experiments.answers.shifts import SHIFTS, shifted_tasks
from experiments.cells import held_out_prompts
from experiments.projects import run_stage

HELD_OUT = "held-out"
"""The prompts of the held-out pairs, which are like those of training."""
VERSION = 1
PARAMS = Path(__file__).resolve().parents[2] / "params.yaml"
"""Those of the repository, which is the embedded project."""


def prepare(grid: Mapping[str, Any], reporter: Reporter) -> None:
    """Make the embedded project in the working directory, up to its reward model; what is done is left as it is.

    Args:
        grid: ``set`` are settings besides those of the repository's params.yaml, and ``rows`` how many rows of each
            data file, where not all.
        reporter: Shows progress.

    Raises:
        Interrupted: The user asked to stop; what was done is kept.
    """
    shutil.copyfile(PARAMS, paths.PARAMS)
    params = load_params(paths.PARAMS, [f"{name}={value}" for name, value in grid.get("set", {}).items()])
    for name, rows in (("instructions", world.instruction_rows), ("preferences", world.preference_rows)):
        path, number = paths.RAW / f"{name}.json", grid.get("rows", {}).get(name)
        if not path.exists():
            write_text(path, json.dumps(rows(0) if number is None else rows(0, number), ensure_ascii=False))
    for stage, made in (
        ("base", paths.BASE / BASE.name),
        ("convert_sft", paths.SFT_DATA),
        ("convert_preferences", paths.PREFERENCE_DATA),
        ("sft", paths.SFT_MODEL / SFT.name),
        ("precompute_ref", paths.REFERENCE / REFERENCE.name),
        ("reward", paths.REWARD_MODEL / REWARD.name),
    ):
        if not made.exists():
            run_stage(stage, params, reporter)


def measure(seed: int, grid: Mapping[str, Any], adapters: Mapping[str, Path], out: Path, reporter: Reporter) -> None:
    """Write the mean reward of each method's answers to each prompt at each temperature.

    Args:
        seed: Of sampling.
        grid: Which temperatures, how many prompts of each shift, how many samples for Best-of-N.
        adapters: By method; the SFT model is measured, too, and Best-of-N of its samples by the learned reward.
        out: A table with ``prompts``, ``method``, ``temperature``, ``prompt_id`` and ``reward``.
        reporter: Shows progress.

    Raises:
        Interrupted: The user asked to stop; what was sampled is kept.
    """
    params = load_params(paths.PARAMS, [f"evaluate.seed={seed}"])
    project = open_project(params, reporter, "answers")
    asked = {HELD_OUT: held_out(project)}
    asked |= {shift: shifted(project, shift, grid["shift_prompts"]) for shift in SHIFTS}
    opened = {method: adapter_models(project, folder) for method, folder in adapters.items()}
    models = {"sft": next(iter(opened.values())).reference} | {name: each.policy for name, each in opened.items()}
    made_of = [project.made_of(), REWARD.read().files, {name: model.digest for name, model in models.items()}]
    key = digest_json([VERSION, seed, {**grid, "seeds": 0}, {name: len(each) for name, each in asked.items()}, made_of])
    if out.is_file() and pl.read_parquet_metadata(out).get("key") == key:
        reporter.say(f"{out.name}: done before")
        return
    steps = Steps(project, params.evaluate, paths.scratch_root() / f"answers-{seed}")
    rows: list[dict[str, Any]] = []
    for method, model in models.items():
        for name, prompts in asked.items():
            for temperature in grid["temperatures" if name == HELD_OUT else "shift_temperatures"]:
                answers = steps.answers(model, [each.prompt for each in prompts], float(temperature))
                rewards = [each.task.reward(answers[each.prompt.id].text) for each in prompts]
                rows += [_row(name, method, temperature, *pair) for pair in zip(prompts, rewards, strict=True)]
        if method != "sft":
            opened[method].close()
    rows += _best_of_n(steps, models["sft"], asked[HELD_OUT], grid)
    with atomic_path(out) as temporary:
        pl.DataFrame(rows).write_parquet(temporary, metadata={"key": key})


@dataclass(frozen=True)
class Asked:
    """A prompt and its task."""

    prompt: PromptTokens
    task: Task


def held_out(project: Project) -> list[Asked]:
    """The held-out prompts of the project."""
    return [Asked(prompt, world_task(prompt.messages[-1]["content"])) for prompt in held_out_prompts(project)]


def shifted(project: Project, shift: str, number: int) -> list[Asked]:
    """Prompts of a shift."""
    found = []
    for place, task in enumerate(shifted_tasks(shift, number)):
        messages = [user(task.prompt)]
        tokens = tuple(project.encoder.encode_prompt(messages))
        found.append(Asked(PromptTokens(f"{shift}-{place}", tokens, messages), task))
    return found


def _best_of_n(
    steps: Steps, sft: EvaluatedModel, asked: Sequence[Asked], grid: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The expected reward of the best of N samples by the learned reward, at each temperature above 0."""
    number, sizes = grid["samples"], grid["numbers"]
    learned = RewardModel.load(paths.REWARD_MODEL, steps.project)
    copies = [
        PromptTokens(f"{each.prompt.id}-{k}", each.prompt.tokens, each.prompt.messages)
        for each in asked
        for k in range(number)
    ]
    for temperature in filter(None, grid["temperatures"]):
        answers = steps.answers(sft, copies, float(temperature))
        mine = [[answers[f"{each.prompt.id}-{k}"] for k in range(number)] for each in asked]
        known = [[each.task.reward(one.text) for one in some] for each, some in zip(asked, mine, strict=True)]
        groups = [
            TokenGroup(each.prompt.id, each.prompt.id, each.prompt.tokens, tuple(one.tokens for one in some))
            for each, some in zip(asked, mine, strict=True)
        ]
        best_PN = best_of_n(np.array(learned.rewards(groups)), np.array(known), sizes)
        for each, rewards in zip(asked, best_PN, strict=True):
            for size, reward in zip(sizes, rewards, strict=True):
                yield _row(HELD_OUT, f"best-of-{size}", temperature, each, reward)


def _row(prompts: str, method: str, temperature: float, asked: Asked, reward: float) -> dict[str, Any]:
    return {
        "prompts": prompts,
        "method": method,
        "temperature": float(temperature),
        "prompt_id": asked.prompt.id,
        "reward": float(reward),
    }
