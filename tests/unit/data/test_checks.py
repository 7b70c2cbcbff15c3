"""What makes a row unfit, whatever its format."""

from __future__ import annotations

import pytest

from dpo_cli.data.checks import check_preference, check_sft
from dpo_cli.data.schema import PreferenceExample, SftExample, assistant, user


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected", "reason"),
    [
        ("q", "a", "b", None),
        (" \n", "a", "b", "empty_prompt"),
        ("q", "", "b", "empty_chosen"),
        ("q", "a", "\t", "empty_rejected"),
        ("q", "a", "a", "equal_sides"),
        ("q", "a", " a\n", "equal_sides"),
        ("q", "a", "A", None),
        ("q", "q", "b", None),
    ],
)
def test_a_pair(prompt: str, chosen: str, rejected: str, reason: str | None) -> None:
    assert check_preference(PreferenceExample([user(prompt)], [assistant(chosen)], [assistant(rejected)])) == reason


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [("q", "a", None), ("", "a", "empty_prompt"), ("q", " ", "empty_completion"), ("q", "q", None)],
)
def test_an_instruction(prompt: str, completion: str, reason: str | None) -> None:
    assert check_sft(SftExample([user(prompt)], [assistant(completion)])) == reason


def test_a_prompt_with_text_in_any_turn_is_not_empty() -> None:
    assert check_sft(SftExample([user("hi"), assistant(""), user("")], [assistant("a")])) is None
