"""Pairs whose prompt is the beginning of both sides."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.formats.pairs import IMPLICIT
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, assistant, user

Q, A, B = user("q"), assistant("a"), assistant("b")
TYPED = {"role": "user", "content": [{"type": "text", "value": "q"}], "loss_weight": 0.0}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def read(chosen: Any, rejected: Any, **row: Any) -> Any:
    return IMPLICIT.read({"chosen": chosen, "rejected": rejected, **row}, Reading())


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("The sky is blue.", "The sky is black.", "The sky is"),
        ("The sky is blue.", "The sky is", "The sky is"),
        ("The sky is", "The sky is blue.", "The sky is"),
        ("Q: 2 + 3?\nA: 5", "Q: 2 + 3?\nA: 6", "Q: 2 + 3?\nA:"),
        ("天空是蓝色", "天空是绿色", "天空是"),
    ],
)
def test_texts_are_cut_behind_the_last_word_they_share(chosen: str, rejected: str, prompt: str) -> None:
    sides = [assistant(text.removeprefix(prompt)) for text in (chosen, rejected)]
    assert read(chosen, rejected) == PreferenceExample([user(prompt)], [sides[0]], [sides[1]])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([Q, A], [Q, B]),
        (json.dumps([Q, A]), json.dumps([Q, B])),
        (
            [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            [{"from": "human", "value": "q"}, {"from": "gpt", "value": "b"}],
        ),
        ([TYPED, A], [TYPED, {**B, "loss_weight": 1.0}]),
    ],
)
def test_conversations_are_cut_behind_the_last_message_they_share(one: Any, other: Any) -> None:
    assert read(one, other, chosen_score="2", rejected_score=1) == PreferenceExample([Q], [A], [B], 2.0, 1.0)


def test_the_last_message_is_an_answer_even_where_both_are_equal() -> None:
    turns = [system("s"), user("1"), assistant("2"), user("3")]
    assert read([*turns, A], [*turns, A]) == PreferenceExample(turns, [A], [A])


def test_a_system_field_stands_before_the_prompt() -> None:
    assert read("The a", "The b", system="s").prompt == [system("s"), user("The")]
    assert read([Q, A], [Q, B], system="s").prompt == [system("s"), Q]
    assert read([system("s"), Q, A], [system("s"), Q, B], system="s").prompt == [system("s"), Q]


def test_a_prompt_that_both_texts_begin_with_is_cut_off() -> None:
    assert read("The sky is blue", "The sky is bright", prompt="The sky") == PreferenceExample(
        [user("The sky")], [assistant(" is blue")], [assistant(" is bright")]
    )


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (None, "a", "missing_field"),
        ("a", None, "missing_field"),
        ("Yes", "No", "no_common_prompt"),
        ("Yes", "Yesterday", "no_common_prompt"),
        (" a", " b", "no_common_prompt"),
        ("", "", "no_common_prompt"),
        ("a", [Q, A], "not_text"),
        (5, "a", "not_text"),
        (5, [Q, A], "not_text"),
        ([A], [B], "no_common_prompt"),
        ([], [], "no_common_prompt"),
        ([Q, A], [user("r"), B], "no_common_prompt"),
        ([Q, A, Q, A], [Q, B, Q, B], "diverges_early"),
        ([Q, A], [Q, B, Q, B], "diverges_early"),
        ([Q, Q], [Q, B], "not_one_answer"),
        ([A, A], [A, B], "prompt_not_ending_with_user"),
        ("[{'role': 'user', 'content': 'q'}, 1]", "[{'role': 'user', 'content': 'q'}, 2]", "not_json"),
    ],
)
def test_an_odd_implicit_pair_is_refused(
    chosen: Any, rejected: Any, reason: str, reason_of: Callable[..., str]
) -> None:
    assert reason_of(IMPLICIT, {"chosen": chosen, "rejected": rejected}) == reason


def test_texts_that_do_not_begin_with_their_prompt_are_refused(reason_of: Callable[..., str]) -> None:
    assert reason_of(IMPLICIT, {"prompt": "q", "chosen": "The a", "rejected": "The b"}) == "no_common_prompt"


# --- by auto ------------------------------------------------------------------------------


def test_texts_without_any_other_field_are_implicit(auto: Callable[..., Any]) -> None:
    rows = [{"chosen": "The sky is blue", "rejected": "The sky is green", "source": "zen", "id": i} for i in range(3)]
    found = auto(*rows)
    assert found.formats == ["implicit"] * 3
    assert found.why.endswith("texts are cut behind the last word they share")


@pytest.mark.parametrize("name", ["post", "user_prompt", "text"])
def test_a_field_that_may_be_the_prompt_makes_texts_a_riddle(name: str, auto: Callable[..., Any]) -> None:
    row = {name: "What is the sky?", "chosen": "The sky is blue", "rejected": "The sky is green"}
    with pytest.raises(UnknownFormatError, match=f"{name} may be it; say in columns"):
        auto(row)
    assert auto(row, columns={"prompt": name}).only.chosen == [assistant("The sky is blue")]


def test_texts_that_mostly_share_nothing_are_a_riddle(auto: Callable[..., Any]) -> None:
    rows = [{"chosen": "Yes", "rejected": "No"}] * 2 + [{"chosen": "The a", "rejected": "The b"}]
    with pytest.raises(UnknownFormatError, match="in 2 of 3 rows the two sides share no first word"):
        auto(*rows)


def test_a_pair_that_lacks_its_prompt_is_not_read_as_implicit(auto: Callable[..., Any]) -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    found = auto(pair, pair, {"chosen": "The a", "rejected": "The b"})
    assert found.formats == ["pairs"] * 2
    assert found.found[2].reason == "missing_field"
    assert "1 of them fit no format and are read as pairs" in found.why
    found = auto(pair, pair, {"chosen": [Q, A], "rejected": [Q, B]})
    assert found.formats == ["pairs", "pairs", "implicit"]


@pytest.mark.parametrize("prompt", [{"conversations": []}, {"messages": "hello"}, {"question": 5}, {"context": "c"}])
def test_a_broken_prompt_does_not_make_texts_implicit(prompt: dict[str, Any], auto: Callable[..., Any]) -> None:
    with pytest.raises((UnknownFormatError, RowProblem)):
        _ = auto({**prompt, "chosen": "The a", "rejected": "The b"}).only
