"""Alpaca: ``{"instruction", "input", "output"}``, optionally with ``system`` and ``history``.

``input`` may be missing or empty; ``history`` is a list of [user, assistant] pairs, or
nothing, or an empty string. The prompt is the instruction with the input on a new line.
"""

from __future__ import annotations

from dpo_cli.data.formats.base import Format, Reading, text_field
from dpo_cli.data.formats.prompts import (
    CONTEXT_NAMES,
    PROMPT_NAMES,
    REASONING_NAMES,
    read_prompt,
    reasoning_note,
    with_reasoning,
)
from dpo_cli.data.formats.unpaired import unpaired_doubt
from dpo_cli.data.schema import RawRow, SftExample, assistant


def _read(row: RawRow, reading: Reading) -> SftExample:
    prompt = read_prompt({**row, "prompt": None} if "prompt" in row else row, reading)
    return SftExample(prompt, with_reasoning(row, [assistant(text_field(row, "output"))]))


ALPACA = Format(
    name="alpaca",
    fields="instruction and output",
    names={
        **{name: PROMPT_NAMES[name] for name in ("instruction", "input")},
        **CONTEXT_NAMES,
        **REASONING_NAMES,
        "output": ("response",),
    },
    needs=(("instruction", "output"),),
    read=_read,
    matches=lambda row: not isinstance(row["output"], list),
    note=reasoning_note,
    doubt=unpaired_doubt("alpaca"),
)
