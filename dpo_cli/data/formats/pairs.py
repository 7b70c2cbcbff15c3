"""Pairs: ``{"prompt", "chosen", "rejected"}``, each a text or a list of messages.

In place of ``prompt`` a row may have ``instruction`` and ``input`` as in Alpaca.
"""

from __future__ import annotations

from typing import Any

from dpo_cli.data.formats.alpaca import read_alpaca_prompt, read_context
from dpo_cli.data.formats.base import Format, RowProblem, check_answer, check_prompt, has_all, read_messages
from dpo_cli.data.schema import Messages, PreferenceExample, RawRow, assistant, user


def _read_prompt(row: RawRow) -> Messages:
    if "prompt" not in row:
        return read_alpaca_prompt(row)
    value = row["prompt"]
    before = read_context(row)
    return (
        [*before, user(value)] if isinstance(value, str) else [*before, *check_prompt(read_messages(value, "prompt"))]
    )


def _read_answer(row: RawRow, name: str, prompt: Messages) -> Messages:
    value: Any = row.get(name)
    if isinstance(value, str):
        return [assistant(value)]
    if value is None:
        raise RowProblem("missing_field", f"has no {name!r}")
    messages = read_messages(value, name)
    if messages[: len(prompt)] == prompt:  # the whole conversation, prompt included
        messages = messages[len(prompt) :]
    return check_answer(messages, name)


def _read(row: RawRow) -> PreferenceExample:
    prompt = _read_prompt(row)
    return PreferenceExample(prompt, _read_answer(row, "chosen", prompt), _read_answer(row, "rejected", prompt))


PAIRS = Format(
    name="pairs",
    fields="prompt (or instruction), chosen and rejected",
    matches=lambda row: has_all(row, ("chosen", "rejected")) and ("prompt" in row or "instruction" in row),
    read=_read,
)
