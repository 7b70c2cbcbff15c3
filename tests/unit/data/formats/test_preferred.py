"""Preference data as instruction data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.formats.detect import UnknownFormatError
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
