"""Instructions in every shape, what is refused for what, and preferred answers as instructions."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.formats.instructions import ALPACA, MESSAGES, PROMPT_COMPLETION
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, SftExample, assistant, user

Q, A, B = user("q"), assistant("a"), assistant("b")


# --- alpaca ------------------------------------------------------------------------------------


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add 1.", "input": "5 cats"}, [user("Add 1.\n5 cats")]),
        ({"instruction": "Add 1 to 5 cats.", "input": "5 cats"}, [user("Add 1 to 5 cats.\n5 cats")]),
        ({"instruction": "", "input": "5 cats"}, [user("5 cats")]),
        ({"instruction": "Add 1.", "input": ""}, [user("Add 1.")]),
        ({"instruction": "Add 1.", "input": " \n"}, [user("Add 1.")]),
        ({"instruction": "Add 1.", "input": None}, [user("Add 1.")]),
        ({"instruction": "Add 1."}, [user("Add 1.")]),
        ({"instruction": "Add 1.", "prompt": "Below is an instruction ..."}, [user("Add 1.")]),
        ({"instruction": "Go.", "system": "Be kind."}, [system("Be kind."), user("Go.")]),
        ({"instruction": "Go.", "system": "", "history": None}, [user("Go.")]),
        ({"instruction": "Go.", "history": ""}, [user("Go.")]),
        ({"instruction": "Go.", "history": []}, [user("Go.")]),
        ({"instruction": "Go.", "history": '[["Hi", "Hello"]]'}, [user("Hi"), assistant("Hello"), user("Go.")]),
        (
            {"instruction": "Go.", "history": [user("Hi"), {"role": "gpt", "content": "Hello"}]},
            [user("Hi"), assistant("Hello"), user("Go.")],
        ),
        (
            {"instruction": "Go.", "input": "on", "system": "Be kind.", "history": [["Hi", "Hello"], ["a", ""]]},
            [
                system("Be kind."),
                user("Hi"),
                assistant("Hello"),
                user("a"),
                assistant(""),
                user("Go.\non"),
            ],
        ),
    ],
)
def test_an_alpaca_row_becomes_a_prompt_and_an_answer(row: dict[str, Any], prompt: Messages) -> None:
    example: Any = ALPACA.read(row | {"output": " 6 cats\n"}, Reading())
    assert example.prompt == prompt
    assert example.completion == [assistant(" 6 cats\n")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"output": "a"}, "missing_field"),
        ({"instruction": "q"}, "missing_field"),
        ({"instruction": None, "output": "a"}, "not_text"),
        ({"instruction": "q", "output": None}, "not_text"),
        ({"instruction": ["q"], "output": "a"}, "not_text"),
        ({"instruction": "q", "input": 5, "output": "a"}, "not_text"),
        ({"instruction": "q", "system": [], "output": "a"}, "not_text"),
        ({"instruction": "q", "history": "Hi", "output": "a"}, "bad_history"),
        ({"instruction": "q", "history": {"a": "b"}, "output": "a"}, "bad_history"),
        ({"instruction": "q", "history": [["Hi"]], "output": "a"}, "bad_history"),
        ({"instruction": "q", "history": ["Hi", "Hello"], "output": "a"}, "bad_history"),
        ({"instruction": "q", "history": [user("Hi")], "output": "a"}, "bad_history"),
        ({"instruction": "q", "history": [{"a": "b"}], "output": "a"}, "unknown_role"),
    ],
)
def test_an_odd_alpaca_row_is_refused(row: dict[str, Any], reason: str, reason_of: Callable[..., str]) -> None:
    assert reason_of(ALPACA, row) == reason


@pytest.mark.parametrize(
    ("row", "format_name", "prompt"),
    [
        ({"instruction": "q", "output": "a"}, "alpaca", "q"),
        ({"instruction": "q", "response": "a"}, "alpaca", "q"),
        ({"instruction": "q", "context": "c", "response": "a", "category": "open"}, "alpaca", "q\nc"),
        ({"instruction": "q", "input": "c", "output": "a", "prompt": "Below is q with c"}, "alpaca", "q\nc"),
        ({"instruction": "q", "input": "c", "output": "o", "chosen": "a", "rejected": "b"}, "pairs", "q\nc"),
        ({"instruction": "q", "input": "c", "output": "o", "chosen": "a", "rejected": None}, "alpaca", "q\nc"),
        ({"instruction": "q", "answer": "a"}, "prompt_completion", "q"),
    ],
)
def test_instructions_are_known_by_other_names(
    row: dict[str, Any], format_name: str, prompt: str, auto: Callable[..., Any]
) -> None:
    read = auto(row, kind="sft")
    assert (read.formats, read.only.prompt) == ([format_name], [user(prompt)])


# --- prompt_completion -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a"},
        {"prompt": [Q], "completion": [A]},
        {"prompt": [Q], "completion": [Q, A]},
        {"prompt": json.dumps([Q]), "completion": json.dumps(A)},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "completion": " a"},
        {"question": "q", "answer": "a"},
        {"query": "q", "response": "a"},
        {"input": "q", "output": "a"},
        {"kind": "k", "input": "q", "target": "a"},
        {"input": {"messages": [Q]}, "output": [A]},
    ],
)
def test_a_prompt_and_its_completion_are_read_in_every_shape(row: dict[str, Any], auto: Callable[..., Any]) -> None:
    read = auto(row, kind="sft")
    assert (read.formats, read.only) == (["prompt_completion"], SftExample([Q], [A]))


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"question": "q", "context": "c", "answer": "a"}, "q\nc"),
        ({"prompt": "q", "input": "c", "completion": "a"}, "q\nc"),
        ({"prompt": "Read c. q", "input": "c", "completion": "a"}, "Read c. q"),
        ({"prompt": "Below is i with c", "instruction": "i", "input": "c", "completion": "a"}, "Below is i with c"),
        ({"prompt": "q", "input": None, "completion": "a"}, "q"),
        ({"prompt": "", "input": "c", "completion": "a"}, "c"),
        ({"prompt": '["a", "b"', "completion": "a"}, '["a", "b"'),
        ({"prompt": '{"role": "x"}, complete this', "completion": "a"}, '{"role": "x"}, complete this'),
        ({"prompt": '[{"name": "Ann", "age": 5}]', "completion": "a"}, '[{"name": "Ann", "age": 5}]'),
        ({"prompt": "Human: q", "completion": "a"}, "Human: q"),
    ],
)
def test_a_prompt_keeps_its_text_and_what_stands_beside_it(row: dict[str, Any], prompt: str, auto: Any) -> None:
    assert auto(row, kind="sft").only.prompt == [user(prompt)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q"}, "missing_field"),
        ({"completion": "a"}, "missing_field"),
        ({"prompt": None, "completion": "a"}, "missing_field"),
        ({"prompt": "q", "completion": None}, "missing_field"),
        ({"prompt": "q", "completion": 5}, "not_text"),
        ({"prompt": '["q", "r"]', "completion": "a"}, "not_text"),
        ({"prompt": {"id": 5, "full_text": "q"}, "completion": "a"}, "bad_message"),
        ({"prompt": {"messages": "q"}, "completion": "a"}, "bad_message"),
        ({"prompt": "[{'role': 'user', 'content': 'q'}]", "completion": "a"}, "not_json"),
        ({"prompt": "q", "completion": "[{'content': 'a', 'role': 'assistant'}]"}, "not_json"),
        ({"prompt": [Q], "input": "c", "completion": "a"}, "two_prompts"),
        ({"prompt": "q", "input": 5, "completion": "a"}, "not_text"),
    ],
)
def test_an_odd_prompt_or_completion_is_refused(
    row: dict[str, Any], reason: str, reason_of: Callable[..., str]
) -> None:
    assert reason_of(PROMPT_COMPLETION, row) == reason


SINGLE = [{"prompt": "q", "completion": "a"}, {"instruction": "q", "output": "a"}, {"messages": [Q, A]}]


@pytest.mark.parametrize("label", [True, False, 1, 0, "true", "False", 1.0, -1, "yes"])
@pytest.mark.parametrize("row", SINGLE)
def test_single_answers_with_a_verdict_are_no_instructions(row: dict[str, Any], label: Any, auto: Any) -> None:
    for name in (
        "label", "kto_tag", "is_safe", "is_response_safe", "thumbs", "thumbsUp", "helpful", "correct", "is-accepted",
        "Upvoted", "feedback", "human_verdict", "passes", "toxic",
    ):  # fmt: skip
        with pytest.raises(UnknownFormatError, match=f"{name} calls single answers good or bad.*say format: "):
            auto(row | {name: label}, kind="sft")


@pytest.mark.parametrize(
    ("said", "name"),
    [
        ({"mark": ["good", "bad"]}, "mark"),
        ({"vote": ["thumbs up", "thumbs-down"]}, "vote"),
        ({"emoji": ["\U0001f44d", "\U0001f44e"]}, "emoji"),
        ({"thumbs": ["up", "down"]}, "thumbs"),
        ({"state": ["accepted", "rejected"]}, "state"),
        ({"feedback": ["positive", "negative"]}, "feedback"),
        ({"rating": [0, 1]}, "rating"),
        ({"vote": [-1]}, "vote"),
        ({"score": [False]}, "score"),
        ({"response_in_style": [True, False]}, "response_in_style"),
        ({"meta": [{"is_correct": False}]}, "meta.is_correct"),
    ],
)
def test_what_is_a_verdict_is_told_by_name_or_values(said: dict[str, list[Any]], name: str, auto: Any) -> None:
    ((key, values),) = said.items()
    for row in SINGLE:
        with pytest.raises(UnknownFormatError, match=f"but {name} calls single answers good or bad"):
            auto(*[row | {key: value} for value in values], kind="sft")


def test_a_turn_may_hold_the_verdict_on_itself(auto: Callable[..., Any]) -> None:
    with pytest.raises(UnknownFormatError, match="but messages.liked calls single answers good or bad"):
        auto({"messages": [Q, {**A, "liked": False}]}, kind="sft")


@pytest.mark.parametrize(
    "said",
    [
        {"label": ["sports", "1", None]},
        {"label": ["positive", "negative"]},
        {"is_english": [True, False]},
        {"redacted": [False]},
        {"rating": [1, 2, 5]},
        {"score": [1]},
        {"rank": [0, 1]},
        {"side": ["right", "wrong"]},
        {"difficulty": ["good-natured"]},
    ],
)
def test_a_column_that_is_no_verdict_does_no_harm(said: dict[str, list[Any]], auto: Callable[..., Any]) -> None:
    ((key, values),) = said.items()
    for row in SINGLE:
        found = auto(*[row | {key: value} for value in values], kind="sft").found
        assert found == [SftExample([Q], [A])] * len(values)


def test_an_answer_may_be_a_word_that_calls_others_good(auto: Callable[..., Any]) -> None:
    rows = [{"question": "q", "answer": answer} for answer in ("correct", "incorrect")]
    assert [found.completion[0]["content"] for found in auto(*rows, kind="sft").found] == ["correct", "incorrect"]


# --- messages ----------------------------------------------------------------------------------


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


def test_a_source_may_name_more_roles(auto: Callable[..., Any]) -> None:
    row = {"conversations": [{"from": "asker", "value": "q"}, {"from": "bing", "value": "a"}]}
    read = auto(row, kind="sft", roles={"asker": "user", "bing": "assistant"})
    assert read.only == SftExample([Q], [A])


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
        ([{"role": None, "content": "q"}, A], "unknown_role"),
        ([{"role": "user"}, A], "not_text"),
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


def test_what_a_message_is_refused_for_says_where_it_stands_and_nothing_of_what_it_says() -> None:
    turns = [user("secret"), {"role": "narrator", "content": "secret"}]
    with pytest.raises(RowProblem, match=r"messages\[1\] has the role 'narrator'; .*; say in roles") as caught:
        MESSAGES.read({"messages": turns}, Reading())
    assert "secret" not in caught.value.detail


# --- preferred ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, "pairs"),
        ({"conversations": [Q], "chosen": A, "rejected": B}, "sharegpt"),
        ({"messages": [Q], "chosen": "a", "rejected": "b"}, "sharegpt"),
        ({"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, "hh"),
        ({"chosen": [Q, A], "rejected": [Q, B]}, "implicit"),
        ({"input": "q", "output_1": "b", "output_2": "a", "label": 2}, "two_outputs"),
        ({"prompt": "q", "completions": ["b", "a"], "scores": [1, 2]}, "kwise"),
        ({"instruction": "q", "output": ["b", "a"], "ranks": [2, 1]}, "kwise"),
        ({"prompt": "q", "chosen": ["a"], "rejected": ["b", "c"]}, "pairs"),
    ],
)
def test_the_preferred_answer_is_the_completion(row: dict[str, Any], name: str, auto: Callable[..., Any]) -> None:
    read = auto(row, kind="sft")
    assert (read.formats, read.only) == ([name], SftExample([Q], [A]))
    assert "preference data: the preferred answer is the completion" in read.why


@pytest.mark.parametrize(
    "row",
    [
        {"input": "q", "output_1": "b", "output_2": "a", "label": "tie"},
        {"prompt": "q", "completions": ["b", "a"], "scores": [False, False]},
    ],
)
def test_of_tied_answers_none_is_preferred(row: dict[str, Any], auto: Callable[..., Any]) -> None:
    assert auto(row, kind="sft").found[0].reason == "tie"


def test_only_the_preferred_answer_becomes_an_instruction(auto: Callable[..., Any]) -> None:
    row = {"prompt": "q", "messages": [Q, B], "chosen": [Q, A], "rejected": [Q, B]}
    assert auto(row, kind="sft").only == SftExample([Q], [A])
    row = {"instruction": "q", "output": "b", "chosen": "a", "rejected": "b"}
    assert auto(row, kind="sft").only == SftExample([Q], [A])


def test_labels_say_which_answer_becomes_an_instruction(auto: Callable[..., Any]) -> None:
    rows = [{"prompt": "q", "response 1": "a", "response 2": "b", "label": label} for label in (0, 1, 2)]
    with pytest.raises(UnknownFormatError, match="nothing says which output a number means"):
        auto(*rows, kind="sft")
    found = auto(*rows, kind="sft", labels={"0": "first", "1": "second", "2": "tie"}).found
    assert found[:2] == [SftExample([Q], [A]), SftExample([Q], [B])]
    assert found[2].reason == "tie"
