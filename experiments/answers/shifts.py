"""Prompts out of distribution: of the embedded world's kinds, but with what no training prompt has."""

from __future__ import annotations

import random
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from dpo_cli.data.world import GRAMMAR, WORLD, Grammar, Task, draw_task, task_of

SHIFTS: Mapping[str, str] = {
    "wordings": "instructions in other words",
    "numbers": "numbers from 32 to 98; the training data has 2 to 30",
    "names": "names that are no word of the tokenizer",
    "roles": "friends' names for names, and second things for first ones",
    "shapes": "sentences of another build",
}
"""What is new, by the name of the shift in shifts.toml."""


def shifted_tasks(shift: str, number: int) -> list[Task]:
    """So many different tasks of a shift, the same ones every time, each of them new by :func:`is_new`."""
    return list(islice(_draw(shift), number))


def is_new(task: Task) -> bool:
    """Whether no training prompt can be this one: the world's grammar has no such prompt, or no such numbers."""
    numbers = [int(found) for found in re.findall(r"\d+", task.input)]
    return task_of(task.prompt) is None or (bool(numbers) and min(numbers) > GRAMMAR.numbers[1])


def _draw(shift: str) -> Iterator[Task]:
    grammar, rng = _grammars()[shift], random.Random(f"shift {shift}")
    seen: set[str] = set()
    while True:
        task = draw_task(rng, grammar)
        if is_new(task) and task.prompt not in seen:
            seen.add(task.prompt)
            yield task


def _grammars() -> dict[str, Grammar]:
    shifts = tomllib.loads(Path(__file__).with_name("shifts.toml").read_text(encoding="utf-8"))
    return {
        name: replace(
            Grammar.of(
                {lang: {**words, **shift.get("words", {}).get(lang, {})} for lang, words in WORLD["words"].items()},
                shift.get("groups") or [_reworded(group, shift) for group in WORLD["groups"]],
            ),
            numbers=tuple(shift.get("numbers", GRAMMAR.numbers)),
        )
        for name, shift in shifts.items()
    }


def _reworded(group: Mapping[str, Any], shift: Mapping[str, Any]) -> Mapping[str, Any]:
    return {**group, "instructions": shift.get("instructions", {}).get(group["kind"], group["instructions"])}
