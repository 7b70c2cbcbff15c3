"""Conversations with two answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.formats.pairs import SHAREGPT
from dpo_cli.data.schema import PreferenceExample, SftExample, assistant, user

Q, A, B = user("q"), assistant("a"), assistant("b")
ASKED = {"from": "human", "value": "q"}


def test_a_sharegpt_pair_is_read() -> None:
    example: Any = SHAREGPT.read(
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "1"},
                {"from": "gpt", "value": "2"},
                {"from": "human", "value": "3"},
            ],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"role": "assistant", "content": "b"},
        },
        Reading(),
    )
    assert example.prompt == [{"role": "system", "content": "s"}, user("1"), assistant("2"), user("3")]
    assert (example.chosen, example.rejected) == ([A], [B])


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [ASKED], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"conversations": [ASKED], "chosen": "a", "rejected": "b"},
        {"conversations": ASKED, "chosen": "a", "rejected": [Q, B]},
        {"conversations": json.dumps([ASKED]), "chosen": json.dumps(A), "rejected": json.dumps([Q, B])},
        {"conversations": [Q, A], "rejected": "b"},
        {"conversations": [Q, A], "chosen": None, "rejected": [B]},
        {"conversations": [Q, A], "rejected": [Q, B]},
    ],
)
def test_the_answers_come_in_many_shapes(row: dict[str, Any]) -> None:
    assert SHAREGPT.read(row, Reading()) == PreferenceExample([Q], [A], [B])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [Q], "chosen": A, "rejected": B},
        {"conversation": [{"speaker": "human", "text": "q"}], "better": A, "worse": B},
        {"context": [{"from": "user", "content": "q"}], "chosen": [A], "rejected": [B]},
        {"messages": [Q, A], "rejected_response": "b"},
        {"messages": [Q, A], "rejected_messages": [Q, B]},
    ],
)
def test_conversations_are_known_by_other_names(row: dict[str, Any], auto: Callable[..., Any]) -> None:
    read = auto(row)
    assert (read.formats, read.only) == (["sharegpt"], PreferenceExample([Q], [A], [B]))


def test_a_chosen_answer_that_ends_the_conversation_is_told(auto: Callable[..., Any]) -> None:
    assert "the conversation's last answer is the chosen one" in auto({"messages": [Q, A], "rejected": "b"}).why
    assert "last answer" not in auto({"messages": [Q], "chosen": "a", "rejected": "b"}).why


def test_a_tools_turn_may_end_the_conversation() -> None:
    turns = [Q, assistant("Let me see."), {"role": "tool", "content": "22"}]
    example: Any = SHAREGPT.read({"conversations": turns, "chosen": A, "rejected": B}, Reading())
    assert example.prompt == turns


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": ...}, "missing_field"),
        ({"conversations": None}, "missing_field"),
        ({"chosen": ...}, "missing_field"),
        ({"rejected": ...}, "missing_field"),
        ({"conversations": []}, "empty_prompt"),
        ({"conversations": [Q, A], "prompt": "q"}, "prompt_not_ending_with_user"),
        ({"conversations": "q"}, "bad_message"),
        ({"conversations": ["q"]}, "bad_message"),
        ({"conversations": [{"from": "function_call", "value": "q"}]}, "bad_tool_call"),
        ({"chosen": Q}, "not_one_answer"),
        ({"chosen": 5}, "not_text"),
        ({"rejected": {"from": "gpt"}}, "not_text"),
    ],
)
def test_an_odd_sharegpt_pair_is_refused(change: dict[str, Any], reason: str, reason_of: Callable[..., str]) -> None:
    row = {"conversations": [Q], "chosen": A, "rejected": B} | change
    assert reason_of(SHAREGPT, {name: value for name, value in row.items() if value is not ...}) == reason


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [(A, B), ([A], [B]), ("a", "b"), (json.dumps(A), B), ({"from": "gpt", "value": "a"}, "b")],
)
def test_a_third_answer_that_ends_the_conversation_is_left_out_and_named(
    chosen: Any, rejected: Any, auto: Callable[..., Any]
) -> None:
    """The same as preferences and as instructions, whatever that answer says."""
    for third in (assistant("c"), A):
        row = {"conversations": [Q, third], "chosen": chosen, "rejected": rejected}
        for kind, example in (("preference", PreferenceExample([Q], [A], [B])), ("sft", SftExample([Q], [A]))):
            read = auto(row, kind=kind)
            assert (read.only, read.formats, read.unread) == (example, ["sharegpt"], {"conversations.last answer": 1})
            assert "the conversation's last answer is left out" in read.why


def test_whole_conversations_and_other_prompts_beside_one_are_read_from_there(auto: Callable[..., Any]) -> None:
    whole = {"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}
    for row, fmt in (
        (whole, "implicit"),
        ({"prompt": "q", **whole}, "pairs"),
        ({**whole, "prompt": "q", "chosen": "a"}, "pairs"),
    ):
        for kind in ("preference", "sft"):
            read = auto(row, kind=kind)
            assert (read.formats, read.only.prompt, "messages" in read.unread) == ([fmt], [Q], True)


def test_a_conversation_beside_sides_that_fit_no_prompt_is_no_instruction(auto: Callable[..., Any]) -> None:
    row = {"messages": [Q, A], "chosen": [A, Q, A], "rejected": "b"}
    with pytest.raises(UnknownFormatError):
        auto(row, kind="sft")
