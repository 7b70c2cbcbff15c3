"""Preference data as instruction data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.schema import SftExample, assistant, user

Q, A, B = user("q"), assistant("a"), assistant("b")


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
        ({"instruction": "q", "output": ["a", "b"]}, "kwise"),
    ],
)
def test_the_preferred_answer_is_the_completion(row: dict[str, Any], name: str, auto: Callable[..., Any]) -> None:
    read = auto(row, kind="sft")
    assert (read.formats, read.only) == ([name], SftExample([Q], [A]))
    assert "preference data: the preferred answer is the completion" in read.why


@pytest.mark.parametrize(
    "row",
    [
        {"input": "q", "output_1": "b", "output_2": "a", "label": 0},
        {"prompt": "q", "completions": ["b", "a"], "scores": [False, False]},
    ],
)
def test_of_tied_answers_none_is_preferred(row: dict[str, Any], auto: Callable[..., Any]) -> None:
    assert auto(row, kind="sft").found[0].reason == "tie"


def test_instructions_come_before_preferences(auto: Callable[..., Any]) -> None:
    row = {"prompt": "q", "messages": [Q, A], "chosen": [Q, B], "rejected": [Q, A]}
    assert auto(row, kind="sft").only == SftExample([Q], [A])
    row = {"instruction": "q", "output": "a", "chosen": "b", "rejected": "c"}
    assert auto(row, kind="sft").only == SftExample([Q], [A])
