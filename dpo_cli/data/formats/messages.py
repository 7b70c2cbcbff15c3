"""Conversations: ``{"messages": [turns]}`` or ``{"conversations": [turns]}``.

A turn is ``{"role", "content"}`` (OpenAI) or ``{"from", "value"}`` (ShareGPT).
A conversation is one example: its last answer, with all that stands before it as the prompt.
With ``turns: all`` every answer is an example. What follows the last answer is an error.
Answers whose ``weight`` (or ``loss_weight``) is 0 are not to be learnt: they are no examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_cli.data.formats.base import Format, Part, Reading
from dpo_cli.data.formats.content import check_prompt, is_conversation, last_role, read_messages, turn_by_turn, turns_in
from dpo_cli.data.formats.prompts import CONTEXT_NAMES, CONVERSATION_NAMES, roles_of, with_context
from dpo_cli.data.formats.unpaired import unpaired_doubt
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, RawRow, SftExample

_WEIGHTS = ("weight", "loss_weight")


def _read(row: RawRow, reading: Reading) -> SftExample | Iterator[Part[SftExample]]:
    turns: Any = row.get("messages")
    if turns is None:
        raise RowProblem("missing_field", "has no 'messages'")
    if isinstance(turns, str):
        turns = turns_in(turns) or turns
    own = read_messages(turns, "messages", roles_of(reading))
    turns = turn_by_turn(turns) if isinstance(turns, list) else [turns]
    if not own or own[-1]["role"] != "assistant":
        last = f"a turn of the {own[-1]['role']}" if own else "nothing"
        raise RowProblem("no_answer", f"the conversation must end with an answer, it ends with {last}")
    messages = with_context(row, own, reading)
    start = len(messages) - len(own)
    if reading.turns == "last":
        return _answer_at(messages, len(messages) - 1, turns[-1])
    answers = [index for index, message in enumerate(own) if message["role"] == "assistant"]
    return ((f"messages[{index}]", _part_at(messages, start + index, turns[index])) for index in answers)


def _answer_at(messages: Messages, index: int, turn: Any) -> SftExample:
    if any(turn.get(name) == 0 for name in _WEIGHTS):
        raise RowProblem("weight_zero", "the answer has the weight 0: it is not to be learnt")
    return SftExample(check_prompt(messages[:index]), [messages[index]])


def _part_at(messages: Messages, index: int, turn: Any) -> SftExample | RowProblem:
    try:
        return _answer_at(messages, index, turn)
    except RowProblem as problem:
        return problem


def _matches(row: RawRow) -> bool:
    turns = row["messages"]
    turns = turns_in(turns) if isinstance(turns, str) else turns
    if not is_conversation(turns):
        return False
    # a conversation that ends with a question has its answers in other fields; beside a rejected answer the last one
    # may be any
    role = last_role(turns)
    if all(isinstance(row.get(name), str | list | dict) and row[name] for name in ("chosen", "rejected")):
        return False
    return role == "assistant" or (role is None and "chosen" not in row)


MESSAGES = Format(
    name="messages",
    fields="messages (or conversations)",
    names={
        "messages": CONVERSATION_NAMES,
        **CONTEXT_NAMES,
    },
    needs=(("messages",),),
    read=_read,
    matches=_matches,
    note=lambda row, reading: "the tools beside them go to the chat template" if row.get("tools") else "",
    doubt=unpaired_doubt("messages"),
    of_a_turn=_WEIGHTS,
)
