"""Alpaca rows: what they become, and which odd row is refused for what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.instructions import ALPACA
from dpo_cli.data.schema import Messages, assistant, user


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
        ({"instruction": "q", "output": 5}, "not_text"),
        ({"instruction": ["q"], "output": "a"}, "not_text"),
        ({"instruction": "q", "input": 5, "output": "a"}, "not_text"),
        ({"instruction": "q", "system": [], "output": "a"}, "not_text"),
        ({"instruction": "q", "history": "Hi", "output": "a"}, "bad_history"),
        ({"instruction": "q", "history": {"a": "b"}, "output": "a"}, "bad_history"),
        ({"instruction": "q", "history": [["Hi"]], "output": "a"}, "bad_history"),
        ({"instruction": "q", "history": [["Hi", None]], "output": "a"}, "bad_history"),
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
