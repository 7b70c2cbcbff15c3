"""Prompt and completion: ``{"prompt", "completion"}``, each a text or a list of messages."""

from __future__ import annotations

from typing import Any

from dpo_cli.data.formats.base import Format, Reading, says_something
from dpo_cli.data.formats.content import REASONING_KEYS, is_conversation
from dpo_cli.data.formats.prompts import (
    PROMPT_ALTERNATIVES,
    PROMPT_NAMES,
    REASONING_NAMES,
    read_answer,
    read_prompt,
    reasoning_note,
    with_reasoning,
)
from dpo_cli.data.formats.unpaired import unpaired_doubt
from dpo_cli.data.schema import RawRow, SftExample


def _read(row: RawRow, reading: Reading) -> SftExample:
    prompt = read_prompt(row, reading)
    return SftExample(prompt, with_reasoning(row, read_answer(row, "completion", prompt, reading)))


def _unread(row: RawRow) -> list[tuple[str, str]]:
    """The field of reasoning, where the answer has its own."""
    answer = row.get("completion")
    last = answer[-1] if isinstance(answer, list) and answer else answer
    has_own = isinstance(last, dict) and any(last.get(key) for key in REASONING_KEYS)
    return [("reasoning", "")] if has_own and says_something(row.get("reasoning")) else []


def _matches(row: RawRow) -> bool:
    completion: Any = row["completion"]
    return not isinstance(completion, list) or is_conversation(completion)


PROMPT_COMPLETION = Format(
    name="prompt_completion",
    fields="prompt and completion",
    names={**PROMPT_NAMES, **REASONING_NAMES, "completion": ("answer", "response", "output", "target")},
    needs=(("prompt", "completion"), ("instruction", "completion")),
    read=_read,
    matches=_matches,
    note=reasoning_note,
    doubt=unpaired_doubt("prompt_completion"),
    alternatives=PROMPT_ALTERNATIVES,
    leaves=("reasoning",),
    unread=_unread,
)
