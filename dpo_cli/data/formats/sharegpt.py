"""Conversations with two answers: ``{"conversations": [turns], "chosen": turn, "rejected": turn}``.

A turn is ``{"from", "value"}`` or ``{"role", "content"}``; the conversation may begin with a
system turn and ends with the user's or a tool's. Without ``chosen``, its last answer is that:
``{"messages": [turns with an answer], "rejected_response": "..."}``.
"""

from __future__ import annotations

from dpo_cli.data.formats.base import Format, Reading, RowProblem
from dpo_cli.data.formats.content import check_prompt, is_conversation, last_role, read_messages, turns_in
from dpo_cli.data.formats.prompts import (
    CONTEXT_NAMES,
    CONVERSATION_NAMES,
    SCORE_ALTERNATIVES,
    SIDE_NAMES,
    read_answer,
    read_scores,
    read_sides,
    roles_of,
    with_context,
)
from dpo_cli.data.formats.sides import are_lists, lists_note, read_lists
from dpo_cli.data.schema import PreferenceExample, RankingExample, RawRow


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
    check_prompt(prompt)
    if are_lists(row):
        return read_lists(row, prompt, reading)
    return PreferenceExample(*read_sides(row, prompt, reading), *read_scores(row))


def _matches(row: RawRow) -> bool:
    turns = row["conversations"]
    turns = turns_in(turns) if isinstance(turns, str) else turns
    if not is_conversation(turns):
        return False
    # with an answer at its end it is another copy of what the other fields hold, unless it holds the chosen one
    return last_role(turns) != "assistant" or row.get("chosen") is None


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
    note=lambda row, reading: (
        lists_note(row, reading)
        if row.get("chosen") is not None
        else "the conversation's last answer is the chosen one"
    ),
    alternatives=SCORE_ALTERNATIVES,
)
