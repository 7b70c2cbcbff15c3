"""Prompt and completion: by many names, as text or messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.formats.instructions import PROMPT_COMPLETION
from dpo_cli.data.schema import SftExample, assistant, user

Q, A = user("q"), assistant("a")


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


def test_a_completion_that_is_json_stays_as_it_is() -> None:
    for text in ('{"name": "Ann"}', '[{"role": "Ann"}', "[1, 2]", " a", "Human: a"):
        example: Any = PROMPT_COMPLETION.read({"prompt": "q", "completion": text}, Reading())
        assert example.completion == [assistant(text)]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q"}, "missing_field"),
        ({"completion": "a"}, "missing_field"),
        ({"prompt": None, "completion": "a"}, "missing_field"),
        ({"prompt": "q", "completion": None}, "missing_field"),
        ({"prompt": 5, "completion": "a"}, "not_text"),
        ({"prompt": "q", "completion": 5}, "not_text"),
        ({"prompt": "q", "completion": True}, "not_text"),
        ({"prompt": '["q", "r"]', "completion": "a"}, "not_text"),
        ({"prompt": {"id": 5, "full_text": "q"}, "completion": "a"}, "bad_message"),
        ({"prompt": {"messages": "q"}, "completion": "a"}, "bad_message"),
        ({"prompt": "[{'role': 'user', 'content': 'q'}]", "completion": "a"}, "not_json"),
        ({"prompt": "q", "completion": "[{'content': 'a', 'role': 'assistant'}]"}, "not_json"),
        ({"prompt": [Q], "input": "c", "completion": "a"}, "two_prompts"),
        ({"prompt": "q", "input": 5, "completion": "a"}, "not_text"),
        ({"prompt": [], "completion": "a"}, "empty_prompt"),
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
