"""Tools, calls, reasoning and media: what stands beside a text reaches the template, or is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from dpo_cli.data.formats.content import read_calls, read_tools
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, SftExample, assistant, user

Q, A, B = user("q"), assistant("a"), assistant("b")
ADD = {"name": "add", "description": "Sum.", "parameters": {"type": "object", "properties": {"x": {"type": "number"}}}}
TOOL = {"type": "function", "function": ADD}
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"x": 2}}}]
CALLED = {"role": "assistant", "content": "", "tool_calls": orjson.dumps(CALL).decode()}
ASKED = {**Q, "tools": orjson.dumps([TOOL]).decode()}


@pytest.mark.parametrize(
    "tools", [[TOOL], [ADD], json.dumps([TOOL]), json.dumps([ADD]), [json.dumps(ADD)], ADD, [{"function": ADD}]]
)
def test_all_forms_of_tools_become_openais_list(tools: Any) -> None:
    assert json.loads(read_tools(tools) or "") == [TOOL]


@pytest.mark.parametrize("nothing", [None, "", [], {}, "[]", "null"])
def test_no_tools_are_none(nothing: Any) -> None:
    assert read_tools(nothing) is None


@pytest.mark.parametrize("odd", ["hammer", 5, ["search"], [{"type": "function"}], [{"name": 5}], [{"function": {}}]])
def test_what_is_no_list_of_tools_is_refused_with_a_way_out(odd: Any) -> None:
    with pytest.raises(RowProblem, match=r"columns: \{tools: ''\}") as caught:
        read_tools(odd)
    assert caught.value.reason == "bad_tools"


@pytest.mark.parametrize(
    "calls",
    [
        CALL,
        {"name": "add", "arguments": {"x": 2}},
        {"name": "add", "arguments": '{"x": 2}'},
        '{"name": "add", "parameters": {"x": 2}}',
        [{"function": {"name": "add", "arguments": '{ "x" : 2 }'}}],
    ],
)
def test_all_forms_of_calls_become_openais_list(calls: Any) -> None:
    assert json.loads(read_calls(calls, "here")) == CALL


def test_a_call_keeps_its_id_and_arguments_that_are_no_object() -> None:
    (call,) = json.loads(read_calls([{"id": "abc", "function": {"name": "add", "arguments": "x=2"}}], "here"))
    assert call == {"id": "abc", "type": "function", "function": {"name": "add", "arguments": "x=2"}}


ROWS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "messages of OpenAI": (
        "sft",
        {
            "messages": [Q, {"role": "assistant", "content": None, "tool_calls": CALL}, {"role": "tool", "content": "r",
             "tool_call_id": "c"}, A],
            "tools": [TOOL],
        },
        SftExample([ASKED, CALLED, {"role": "tool", "content": "r", "tool_call_id": "c"}], [A]),
    ),
    "messages of ShareGPT": (
        "sft",
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "function_call",
             "value": '{"name": "add", "arguments": {"x": 2}}'}, {"from": "observation", "value": "r"},
             {"from": "gpt", "value": "a"}],
            "tools": json.dumps([ADD]),
        },
        SftExample([ASKED, CALLED, {"role": "tool", "content": "r"}], [A]),
    ),
    "a call as the answer": (
        "sft",
        {"messages": [Q, {"role": "assistant", "content": "", "function_call": CALL[0]["function"]}]},
        SftExample([Q], [CALLED]),
    ),
    "OpenAI's preferences": (
        "preference",
        {
            "input": {"messages": [Q], "tools": [TOOL], "parallel_tool_calls": True},
            "preferred_output": [{"role": "assistant", "tool_calls": CALL}],
            "non_preferred_output": [B],
        },
        PreferenceExample([ASKED], [CALLED], [B]),
    ),
    "ShareGPT's preferences": (
        "preference",
        {"conversations": [Q], "chosen": A, "rejected": B, "tools": [ADD]},
        PreferenceExample([ASKED], [A], [B]),
    ),
    "pairs": (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b", "tools": [ADD]},
        PreferenceExample([ASKED], [A], [B]),
    ),
    "implicit pairs": (
        "preference",
        {"chosen": [Q, A], "rejected": [Q, B], "tools": [ADD]},
        PreferenceExample([ASKED], [A], [B]),
    ),
    "reasoning of a turn": (
        "sft",
        {"messages": [Q, {"role": "assistant", "reasoning_content": "sum", "content": "a"}]},
        SftExample([Q], [{**A, "reasoning_content": "sum"}]),
    ),
    "reasoning in a column": (
        "sft",
        {"prompt": "q", "thinking": "sum", "completion": "a"},
        SftExample([Q], [{**A, "reasoning_content": "sum"}]),
    ),
    "empty media": (
        "sft",
        {"prompt": "q", "completion": "a", "images": [{"path": None}], "video": None, "image": {"bytes": None}},
        SftExample([Q], [A]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "example"), ROWS.values(), ids=ROWS)
def test_what_stands_beside_the_text_is_read(kind: Any, row: Any, example: Any, auto: Callable[..., Any]) -> None:
    assert auto(row, kind=kind).found == [example]


def test_a_column_of_reasoning_is_told_and_can_be_left_out(auto: Callable[..., Any]) -> None:
    row = {"instruction": "q", "reasoning": "sum", "output": "a"}
    assert auto(row, kind="sft").why.endswith("'reasoning' is the reasoning before the answer")
    assert auto(row, kind="sft", columns={"reasoning": ""}).found == [SftExample([Q], [A])]


@pytest.mark.parametrize(
    "media",
    [{"images": ["a.png"]}, {"image": {"bytes": None, "path": "a.png"}}, {"audios": [b"x"]}, {"video_path": "a.mp4"}],
)
@pytest.mark.parametrize("row", [{"prompt": "<image>What?", "chosen": "a", "rejected": "b"}])
def test_text_with_media_beside_it_is_refused(row: Any, media: Any, auto: Callable[..., Any]) -> None:
    (problem,) = auto(row | media).found
    assert isinstance(problem, RowProblem)
    assert problem.reason == "media"
    assert repr(next(iter(media))) in problem.detail


@pytest.mark.parametrize(
    "row",
    [
        {"input": {"messages": [Q], "images": ["a.png"]}, "preferred_output": A, "non_preferred_output": B},
        {"conversation": [{"human": "q", "assistant": None, "image": "a.png"}], "chosen": "a", "rejected": "b"},
    ],
)
def test_media_in_an_object_of_the_prompt_is_refused(row: dict[str, Any], auto: Callable[..., Any]) -> None:
    assert [problem.reason for problem in auto(row).found] == ["media"]


# --- several turns ------------------------------------------------------------------------


def test_answers_that_go_on_for_several_turns_share_all_but_the_last(auto: Callable[..., Any]) -> None:
    expected = PreferenceExample([Q, A, user("r")], [A], [B])
    for row in (
        {"prompt": [Q], "chosen": [A, user("r"), A], "rejected": [A, user("r"), B]},
        {"conversations": [Q], "chosen": [A, user("r"), A], "rejected": [A, user("r"), B]},
    ):
        assert auto(row).found == [expected]


def test_of_several_turns_that_differ_the_first_counts_where_one_says_so(auto: Callable[..., Any]) -> None:
    row = {"prompt": [Q], "chosen": [CALLED, {"role": "tool", "content": "r"}, A], "rejected": [B]}
    (problem,) = auto(row).found
    assert problem.reason == "diverges_early"
    assert "say compare: first" in problem.detail
    assert auto(row, compare="first").found == [PreferenceExample([Q], [CALLED], [B])]
