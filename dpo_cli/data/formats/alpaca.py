"""Alpaca: ``{"instruction", "input", "output"}``, optionally with ``system`` and ``history``.

``input`` may be missing or empty; ``history`` is a list of [user, assistant] pairs, or
nothing, or an empty string. The prompt is the instruction with the input on a new line.
"""

from __future__ import annotations

from dpo_cli.data.formats.base import Format, RowProblem, has_all, optional_text, text_field
from dpo_cli.data.schema import Messages, RawRow, SftExample, assistant, user


def read_alpaca_prompt(row: RawRow) -> Messages:
    """The prompt of an Alpaca row: system, history, then instruction and input."""
    instruction, extra = text_field(row, "instruction"), optional_text(row, "input")
    return [*read_context(row), user(f"{instruction}\n{extra}" if extra.strip() else instruction)]


def read_context(row: RawRow) -> Messages:
    """What stands before the question in fields of its own: ``system`` and ``history``."""
    system = optional_text(row, "system")
    return [*([{"role": "system", "content": system}] if system else []), *_read_history(row)]


def _read_history(row: RawRow) -> Messages:
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowProblem("bad_history", f"'history' must be a list of pairs, got {type(history).__name__}")
    messages: Messages = []
    for index, turn in enumerate(history):
        if not (isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
            raise RowProblem("bad_history", f"history[{index}] must be a pair of texts")
        messages += [user(turn[0]), assistant(turn[1])]
    return messages


def _read(row: RawRow) -> SftExample:
    return SftExample(prompt=read_alpaca_prompt(row), completion=[assistant(text_field(row, "output"))])


ALPACA = Format(
    name="alpaca",
    fields="instruction and output",
    matches=lambda row: has_all(row, ("instruction", "output")),
    read=_read,
)
