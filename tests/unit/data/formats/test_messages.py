"""Conversations as instruction data: which answers are examples, and which turns are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.content import ROLE_NAMES
from dpo_cli.data.formats.instructions import MESSAGES
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import SftExample, assistant, user

Q, A = user("q"), assistant("a")


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def call(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None, **fields}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [Q, A]},
        {"messages": [Q, {"role": "assistant", "content": "a", "name": "Ann"}]},
        {"messages": [Q, {"role": "assistant", "content": "a", "tool_calls": None}]},
        {"messages": [Q, {"role": "assistant", "content": "a", "weight": 1}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}, A]},
        {"messages": [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}, A]},
        {"messages": [{"role": "User", "content": "q"}, {"role": "ASSISTANT", "content": "a"}]},
        {"messages": json.dumps([Q, A])},
        {"messages": [Q, A], "prompt": "q", "prompt_id": "x"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {
            "conversations": [
                {"from": "human", "value": "q", "weight": 0},
                {"from": "gpt", "value": "a", "weight": None},
            ]
        },
        {"conversation": [{"speaker": "human", "text": "q"}, {"speaker": "agent", "text": "a"}]},
        {"messages": [{"from": "user", "content": "q"}, {"from": "assistant", "content": "a"}]},
    ],
)
def test_a_conversation_is_read_in_every_shape(row: dict[str, Any], auto: Callable[..., Any]) -> None:
    read = auto(row, kind="sft")
    assert (read.formats, read.only) == (["messages"], SftExample([Q], [A]))


@pytest.mark.parametrize(("name", "role"), ROLE_NAMES.items())
def test_roles_go_by_many_names(name: str, role: str) -> None:
    turns = [{"from": name, "value": "x"}, Q, A]
    example: Any = MESSAGES.read({"messages": turns}, Reading())
    assert example.prompt == [{"role": role, "content": "x"}, Q]


def test_a_source_may_name_more_roles(auto: Callable[..., Any]) -> None:
    row = {"conversations": [{"from": "asker", "value": "q"}, {"from": "bing", "value": "a"}]}
    read = auto(row, kind="sft", roles={"asker": "user", "bing": "assistant"})
    assert read.only == SftExample([Q], [A])


def test_typed_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "value": "two"}, " three"]
    example: Any = MESSAGES.read({"messages": [{"role": "user", "content": parts}, A]}, Reading())
    assert example.prompt == [user("one two three")]


def test_the_last_answer_is_the_example_with_all_before_it() -> None:
    turns = [system("s"), user("1"), assistant("2"), {"role": "tool", "content": "3"}, A]
    assert MESSAGES.read({"messages": turns}, Reading()) == SftExample(turns[:-1], [A])


def test_with_all_turns_every_answer_is_an_example() -> None:
    turns = [user("1"), assistant("2"), assistant("3"), user("4"), {**assistant("5"), "weight": 0}, user("6"), A]
    row = {"system": "s", "history": [["u", "v"]], "messages": turns}
    parts: Any = MESSAGES.read(row, Reading(turns="all"))
    found = dict(parts)
    before = [system("s"), user("u"), assistant("v")]
    plain = [user("1"), assistant("2"), assistant("3"), user("4"), assistant("5"), user("6")]
    assert found["messages[1]"] == SftExample([*before, user("1")], [assistant("2")])
    assert found["messages[6]"] == SftExample([*before, *plain], [A])
    assert {name: problem.reason for name, problem in found.items() if isinstance(problem, RowProblem)} == {
        "messages[2]": "prompt_not_ending_with_user",
        "messages[4]": "weight_zero",
    }


def test_a_system_prompt_is_there_once() -> None:
    row = {"system": "s", "messages": [system("s"), Q, A]}
    assert MESSAGES.read(row, Reading()) == SftExample([system("s"), Q], [A])
    row = {"system": "s", "messages": [Q, A]}
    assert MESSAGES.read(row, Reading()) == SftExample([system("s"), Q], [A])


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        (None, "missing_field"),
        ([], "no_answer"),
        ([Q], "no_answer"),
        ([Q, A, Q], "no_answer"),
        ([Q, A, {"role": "tool", "content": "x"}], "no_answer"),
        ([A], "empty_prompt"),
        ([system("s"), A], "prompt_not_ending_with_user"),
        ([Q, A, A], "prompt_not_ending_with_user"),
        ("q", "bad_message"),
        (5, "bad_message"),
        (["q", "a"], "bad_message"),
        ([{"content": "q"}, A], "unknown_role"),
        ([{"from": "function_call", "value": "{}"}, A], "bad_tool_call"),
        ([{"role": None, "content": "q"}, A], "unknown_role"),
        ([{"role": "user"}, A], "not_text"),
        ([{"role": "user", "content": None}, A], "not_text"),
        ([{"role": "user", "content": 5}, A], "not_text"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}, A], "not_text"),
        ([{"role": "user", "content": [{"text": "q"}]}, A], "not_text"),
        ([{"role": "user", "content": [{"type": "text", "text": None}]}, A], "not_text"),
        ([{"role": "user", "content": [5]}, A], "not_text"),
        ([Q, call(tool_calls=[{"id": "x"}]), {"role": "tool", "content": "r"}, A], "bad_tool_call"),
        ([{"role": "user", "content": "q", "images": ["a.png"]}, A], "media"),
        ([Q, {"role": "assistant", "content": "a", "weight": 0}], "weight_zero"),
        ([Q, {"role": "assistant", "content": "a", "loss_weight": 0.0}], "weight_zero"),
        ("[{'from': 'human', 'value': 'q'}]", "not_json"),
    ],
)
def test_an_odd_conversation_is_refused(turns: Any, reason: str, reason_of: Callable[..., str]) -> None:
    assert reason_of(MESSAGES, {"messages": turns}) == reason


def test_two_different_system_prompts_are_refused(reason_of: Callable[..., str]) -> None:
    assert reason_of(MESSAGES, {"system": "s", "messages": [system("other"), Q, A]}) == "two_systems"


def test_what_a_message_is_refused_for_says_where_it_stands_and_nothing_of_what_it_says() -> None:
    turns = [user("secret"), {"role": "narrator", "content": "secret"}]
    with pytest.raises(RowProblem, match=r"messages\[1\] has the role 'narrator'; .*; say in roles") as caught:
        MESSAGES.read({"messages": turns}, Reading())
    assert "secret" not in caught.value.detail
