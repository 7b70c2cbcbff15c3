"""Conversations with two answers: ``{"conversations": [turns], "chosen": turn, "rejected": turn}``.

A turn is ``{"from", "value"}`` or ``{"role", "content"}``; the conversation may begin with a
system turn and ends with the user's or a tool's. Without ``chosen``, its last answer is that:
``{"messages": [turns with an answer], "rejected_response": "..."}``. Beside both sides, which are an answer each, its
last answer is left out.
"""

from __future__ import annotations

from typing import Any

from dpo_cli.data.formats.base import Format, Reading, says_something
from dpo_cli.data.formats.content import check_prompt, is_conversation, is_turn, last_role, read_messages, turns_in
from dpo_cli.data.formats.hh import are_transcripts
from dpo_cli.data.formats.prompts import (
    CONTEXT_NAMES,
    CONVERSATION_NAMES,
    PROMPT_NAMES,
    SCORE_ALTERNATIVES,
    SIDE_NAMES,
    read_answer,
    read_scores,
    read_sides,
    roles_of,
    with_context,
)
from dpo_cli.data.formats.sides import are_lists, lists_note, read_lists, unread_margin
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, RankingExample, RawRow

_PROMPTS = ("prompt", "instruction", *PROMPT_NAMES["prompt"], *PROMPT_NAMES["input"])
"""Fields that hold the prompt where they are there."""


def _read(row: RawRow, reading: Reading) -> PreferenceExample | RankingExample:
    if row.get("conversations") is None:
        raise RowProblem("missing_field", "has no 'conversations'")
    turns = read_messages(row["conversations"], "conversations", roles_of(reading))
    prompt = with_context(row, turns, reading)
    if row.get("chosen") is None and prompt and prompt[-1]["role"] == "assistant":
        prompt, chosen = check_prompt(prompt[:-1]), prompt[-1:]
        if are_lists(row):
            return read_lists({**row, "chosen": chosen}, prompt, reading)
        return PreferenceExample(prompt, chosen, read_answer(row, "rejected", prompt, reading), *read_scores(row))
    prompt = check_prompt(prompt[:-1] if _has_third_answer(row) else prompt)
    if are_lists(row):
        return read_lists(row, prompt, reading)
    return PreferenceExample(*read_sides(row, prompt, reading), *read_scores(row))


def _matches(row: RawRow) -> bool:
    turns = _turns(row)
    if not is_conversation(turns):
        return False
    # with an answer at its end it is another copy of what the other fields hold, unless it alone has the prompt
    return last_role(turns) != "assistant" or row.get("chosen") is None or _has_third_answer(row)


def _has_third_answer(row: RawRow) -> bool:
    """Whether the conversation ends with an answer, though it is the prompt of the two sides, an answer each."""
    turns = _turns(row)
    return (
        is_conversation(turns)
        and last_role(turns) == "assistant"
        and all(_is_answer(row.get(name)) for name in ("chosen", "rejected"))
        and not are_transcripts(row)
        and not any(says_something(row.get(name)) for name in _PROMPTS)
    )


def _is_answer(side: Any) -> bool:
    side = turns_in(side) or side if isinstance(side, str) else side
    return isinstance(side, str) or (
        is_turn(side) if isinstance(side, dict) else is_conversation(side) and not side[1:]
    )


def _turns(row: RawRow) -> Any:
    turns = row.get("conversations")
    return turns_in(turns) if isinstance(turns, str) else turns


def _note(row: RawRow, reading: Reading) -> str:
    if row.get("chosen") is None:
        return "the conversation's last answer is the chosen one"
    if _has_third_answer(row):
        return "the conversation's last answer is left out, for chosen and rejected are the answers"
    return lists_note(row, reading)


def _unread(row: RawRow) -> list[tuple[str, str]]:
    return [*unread_margin(row), *([("conversations", "last answer")] if _has_third_answer(row) else [])]


SHAREGPT = Format(
    name="sharegpt",
    fields="conversations (or messages) and two answers, chosen and rejected",
    names={
        "conversations": (*CONVERSATION_NAMES, "context"),
        **CONTEXT_NAMES,
        **SIDE_NAMES,
        "rejected": (*SIDE_NAMES["rejected"], "rejected_messages"),
    },
    needs=(("conversations", "chosen", "rejected"), ("conversations", "rejected")),
    read=_read,
    matches=_matches,
    note=_note,
    alternatives=SCORE_ALTERNATIVES,
    leaves=("conversations", "margin"),
    unread=_unread,
)
