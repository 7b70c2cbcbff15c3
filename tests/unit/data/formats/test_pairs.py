"""Pairs: every shape of prompt and sides, and which odd row is refused for what."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from ruamel.yaml import YAML

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.formats.pairs import PAIRS
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PreferenceExample, RankingExample, assistant, user

Q, A, B = user("q"), assistant("a"), assistant("b")


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def read(row: dict[str, Any]) -> Any:
    return PAIRS.read(row, Reading())


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        {"prompt": Q, "chosen": A, "rejected": "b"},
        {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]},
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B]},
        {"instruction": "q", "chosen": "a", "rejected": "b"},
        {"prompt": None, "instruction": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": [A], "rejected": B},
        {"prompt": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
        {"prompt": [{"role": "human", "content": "q"}], "chosen": {"role": "model", "content": "a"}, "rejected": "b"},
        {"prompt": json.dumps([Q]), "chosen": json.dumps([A]), "rejected": json.dumps(B)},
        {"prompt": "q", "chosen": json.dumps([Q, A]), "rejected": json.dumps([Q, B])},
        {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"},
        {"prompt": "Human: q\n\nAssistant: ", "chosen": "a", "rejected": "b"},
    ],
)
def test_a_pair_is_read_in_every_shape(row: dict[str, Any]) -> None:
    assert read(row) == PreferenceExample([Q], [A], [B])


def test_a_pairs_prompt_may_have_many_turns_and_an_input() -> None:
    turns = [system("s"), user("1"), assistant("2"), user("3")]
    assert read({"prompt": turns, "chosen": [*turns, A], "rejected": [B]}).prompt == turns
    assert read({"instruction": "q", "input": "more", "chosen": "a", "rejected": "b"}).prompt == [user("q\nmore")]


def test_a_transcript_as_prompt_has_its_turns() -> None:
    prompt = "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3 \n\nAssistant:"
    example = read({"prompt": prompt, "chosen": "  a", "rejected": "b"})
    assert example.prompt == [user("1"), assistant("2"), user("3 ")]
    assert (example.chosen, example.rejected) == ([assistant(" a")], [B])


@pytest.mark.parametrize(
    "before",
    [
        [system("s"), Q],
        [user("1"), assistant("2"), Q],
        [system("s"), Q, assistant("2"), user("3")],
    ],
)
def test_conversations_that_hold_more_than_the_prompt_are_the_prompt(before: list[dict[str, str]]) -> None:
    for prompt in ("q", [Q]):
        row = {"prompt": prompt, "chosen": [*before, A], "rejected": [*before, B]}
        assert read(row) == PreferenceExample(before, [A], [B])


def test_a_system_field_stands_before_conversations_that_lack_it() -> None:
    example = read({"system": "s", "prompt": "q", "chosen": [Q, A], "rejected": [Q, B]})
    assert example.prompt == [system("s"), Q]


def test_scores_are_kept() -> None:
    example = read({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": "8.5", "rejected_score": 7})
    assert (example.chosen_score, example.rejected_score) == (8.5, 7.0)
    example = read({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": None, "rejected_score": ""})
    assert (example.chosen_score, example.rejected_score) == (None, None)


@pytest.mark.parametrize(
    ("fields", "scores"),
    [
        ({"margin": 1.5}, (1.5, 0.0)),
        ({"margin": 2}, (2.0, 0.0)),
        ({"margin": 2, "chosen_score": 4.0, "rejected_score": 1.0}, (4.0, 1.0)),
        ({"margin": "large"}, (None, None)),
        ({"margin": None}, (None, None)),
    ],
)
def test_a_margin_stands_for_two_scores(fields: dict[str, Any], scores: tuple[float | None, float | None]) -> None:
    example = read({"prompt": "q", "chosen": "a", "rejected": "b", **fields})
    assert (example.chosen_score, example.rejected_score) == scores


def test_answers_that_look_a_little_like_messages_stay_text() -> None:
    for text in ('{"answer": 5}', "[1, 2]", '[{"role": "admin", "name": "x"', " yes", "Hello", "\n\nno"):
        assert read({"prompt": "q", "chosen": text, "rejected": "b"}).chosen == [assistant(text)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "missing_field"),
        ({"rejected": ...}, "missing_field"),
        ({"prompt": ...}, "missing_field"),
        ({"prompt": None}, "missing_field"),
        ({"prompt": []}, "empty_prompt"),
        ({"prompt": [Q, A]}, "prompt_not_ending_with_user"),
        ({"prompt": [system("s")]}, "prompt_not_ending_with_user"),
        ({"prompt": 5}, "not_text"),
        ({"prompt": True}, "not_text"),
        ({"prompt": ["q"]}, "bad_message"),
        ({"prompt": [{"role": "narrator", "content": "q"}]}, "unknown_role"),
        ({"prompt": [{"content": "q"}]}, "unknown_role"),
        ({"prompt": [{"role": ["user"], "content": "q"}]}, "unknown_role"),
        ({"prompt": [{"role": "user", "content": [{"text": "q"}]}]}, "not_text"),
        ({"prompt": [{"role": "user"}]}, "not_text"),
        ({"prompt": {"full_text": "q"}}, "bad_message"),
        ({"chosen": []}, "not_one_answer"),
        ({"chosen": [A, Q, A]}, "diverges_early"),
        ({"chosen": [A, Q, A], "rejected": [A, user("other"), B]}, "diverges_early"),
        ({"chosen": [Q]}, "not_one_answer"),
        ({"chosen": [user("other"), A]}, "not_one_answer"),
        ({"chosen": [user("other"), A], "rejected": [user("other"), B]}, "not_one_answer"),
        ({"chosen": [Q, A, Q, A], "rejected": [Q, B, Q, B]}, "diverges_early"),
        ({"chosen": ["a"], "rejected": []}, "too_few_completions"),
        ({"chosen": ["a", 5]}, "bad_message"),
        ({"chosen": ["a"], "chosen_score": 1}, "bad_scores"),
        ({"chosen": ["a", "c"], "chosen_score": [1], "rejected_score": 0}, "bad_scores"),
        ({"chosen": ["a", "c"], "chosen_score": [1, "x"], "rejected_score": 0}, "not_a_number"),
        ({"chosen": 3}, "not_text"),
        ({"rejected": 3.5}, "not_text"),
        ({"chosen": {"role": "assistant", "content": "a", "tool_calls": [{"id": "x"}]}}, "bad_tool_call"),
        ({"chosen": "[{'role': 'assistant', 'content': 'a'}]"}, "not_json"),
        ({"system": "s", "prompt": [system("other"), Q]}, "two_systems"),
        ({"chosen_score": "good"}, "not_a_number"),
        ({"chosen_score": [1]}, "not_a_number"),
        ({"rejected_score": float("nan")}, "not_a_number"),
    ],
)
def test_an_odd_pair_is_refused(change: dict[str, Any], reason: str, reason_of: Callable[..., str]) -> None:
    row = {"prompt": [Q], "chosen": [A], "rejected": [B]} | change
    assert reason_of(PAIRS, {name: value for name, value in row.items() if value is not ...}) == reason


C = assistant("c")


@pytest.mark.parametrize(
    ("sides", "expected"),
    [
        ({"chosen": ["a"], "rejected": ["b"]}, PreferenceExample([Q], [A], [B])),
        ({"chosen": ["a"], "rejected": [B]}, PreferenceExample([Q], [A], [B])),
        ({"chosen": ["a"], "rejected": ["b", "c"]}, RankingExample([Q], [[A], [B], [C]], [1, 2, 2])),
        ({"chosen": "a", "rejected": ["b", "c"]}, RankingExample([Q], [[A], [B], [C]], [1, 2, 2])),
        ({"chosen": ["a", "b"], "rejected": "c"}, RankingExample([Q], [[A], [B], [C]], [1, 1, 2])),
        ({"chosen": [[Q, A]], "rejected": [[Q, B], [Q, C]]}, RankingExample([Q], [[A], [B], [C]], [1, 2, 2])),
        (
            {"chosen": ["a"], "rejected": ["b", "c"], "chosen_score": 9, "rejected_score": [2, "1"]},
            RankingExample([Q], [[A], [B], [C]], [1, 2, 2], [9, 2, 1]),
        ),
    ],
)
def test_of_lists_each_chosen_answer_is_paired_with_each_rejected_one(
    sides: dict[str, Any], expected: Any, auto: Callable[..., Any]
) -> None:
    for asked in ({"prompt": "q"}, {"conversations": [Q]}):
        assert auto({**asked, **sides}).only == expected
    assert "each chosen answer is better than each rejected one" in auto({"prompt": "q", **sides}).why


def test_the_answers_rejected_beside_a_conversation_may_be_several(auto: Callable[..., Any]) -> None:
    row = {"messages": [Q, A], "rejected_response": ["b", "c"]}
    assert auto(row).only == RankingExample([Q], [[A], [B], [C]], [1, 2, 2])


def test_details_hold_nothing_of_a_texts_content() -> None:
    with pytest.raises(RowProblem) as caught:
        read({"prompt": [user("secret"), assistant("secret")], "chosen": "secret", "rejected": "secret"})
    assert "secret" not in caught.value.detail


# --- by auto ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q", "response_j": "a", "response_k": "b"},
        {"query": "q", "better": "a", "worse": "b"},
        {"input": "q", "chosen": "a", "rejected": "b", "generations": ["a", "b"], "rating": [9, 8]},
        {"query": "q", "response": "a", "rejected_response": "b"},
        {"prompt": "q", "response": "a", "chosen": "a", "rejected": "b"},
        {"input": {"messages": [Q], "tools": []}, "preferred_output": [A], "non_preferred_output": [B]},
        {"prompt": "q", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]},
    ],
)
def test_pairs_are_known_by_other_names(row: dict[str, Any], auto: Callable[..., Any]) -> None:
    found = auto(row)
    assert (found.formats, found.only) == (["pairs"], PreferenceExample([Q], [A], [B]))


def test_an_input_beside_a_question_is_part_of_the_prompt(auto: Callable[..., Any]) -> None:
    row = {"context": "c", "question": "q", "chosen": "a", "rejected": "b"}
    assert auto(row).only.prompt == [user("q\nc")]
    assert auto(row, columns={"input": ""}).only.prompt == [Q]
    row = {"input": "q", "context": "c", "chosen": "a", "rejected": "b"}
    assert auto(row).only.prompt == [user("q\nc")]


def test_two_fields_that_both_ask_are_a_riddle(auto: Callable[..., Any]) -> None:
    row = {"question": "q", "instruction": "Answer it.", "chosen": "a", "rejected": "b"}
    with pytest.raises(UnknownFormatError, match="question and instruction may both be prompt"):
        auto(row)
    assert auto(row, columns={"prompt": "question"}).only.prompt == [Q]


def test_answers_that_repeat_the_prompt_are_a_riddle(auto: Callable[..., Any]) -> None:
    rows = [
        {"prompt": f"The sky {i} is", "chosen": f"The sky {i} is blue", "rejected": f"The sky {i} is"} for i in "123"
    ]
    with pytest.raises(UnknownFormatError, match="both answers begin with the whole prompt in every row; say format"):
        auto(*rows)
    assert auto(*rows, {"prompt": "q", "chosen": "a", "rejected": "b"}).formats == ["pairs"] * 4
    assert auto({"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi!"}).only.chosen == [assistant("Hi there")]


def test_whole_transcripts_beside_a_prompt_are_a_riddle(auto: Callable[..., Any]) -> None:
    sides = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    with pytest.raises(UnknownFormatError, match="say format: hh"):
        auto({"prompt": "q", **sides})


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "q", "response_a": "J", "response_b": "M", "chosen": "response_a", "rejected": "response_b"},
         "{first: response_a, second: response_b, label: 'chosen'}"),
        ({"prompt": "q", "response_a": "J", "response_b": "M", "better": "response_a", "worse": "response_b"},
         "{first: response_a, second: response_b, label: 'better'}"),
        ({"prompt": "q", "response_a": "J", "response_b": "M", "chosen": "A", "rejected": "b"},
         "{first: response_a, second: response_b, label: 'chosen'}"),
        ({"instruction": "q", "llama": "J", "gpt 4": "M", "chosen": "llama", "rejected": "gpt 4"},
         "{first: gpt 4, second: llama, label: 'chosen'}"),
        ({"x": "q", "model_1": "J", "model_2": "M", "chosen": "model_1", "rejected": "model_2"},
         "{first: model_1, second: model_2, label: 'chosen'}"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["preference", "sft"])
def test_sides_that_name_columns_are_no_answers(row: Any, said: str, kind: str, auto: Callable[..., Any]) -> None:
    with pytest.raises(UnknownFormatError, match=f"name columns in place of answers .*say columns: {re.escape(said)}"):
        auto(row, kind=kind)
    columns = YAML(typ="safe").load(said) | ({"prompt": "x"} if "x" in row else {})
    found = auto(row, kind=kind, columns=columns).only
    assert found.prompt == [user("q")]
    assert (found.completion if kind == "sft" else found.chosen) == [assistant("J")]


def test_sides_that_name_more_columns_than_two_cannot_be_mapped(auto: Callable[..., Any]) -> None:
    rows = [{"prompt": "q", "a1": "J", "b1": "M", "c1": "P", "chosen": c, "rejected": "c1"} for c in ("a1", "b1")]
    with pytest.raises(UnknownFormatError, match="more than two in all; write the answers themselves into them"):
        auto(*rows)
    some = [*rows, {**rows[0], "chosen": "J", "rejected": "M"}]
    assert auto(*some).formats == ["pairs"] * 3


@pytest.mark.parametrize(
    ("fields", "scores", "unread"),
    [
        ({"margin": "2.5"}, (2.5, 0.0), {}),
        ({"margin": ""}, (None, None), {}),
        ({"margin": "wide"}, (None, None), {"margin": 1}),
        ({"margin": [1]}, (None, None), {"margin": 1}),
        ({"margin": True}, (None, None), {"margin": 1}),
        ({"margin": 2, "chosen": ["a"]}, (None, None), {"margin": 1}),
    ],
)
def test_a_margin_is_read_as_a_number_or_named(
    fields: dict[str, Any], scores: tuple[Any, Any], unread: dict[str, int], auto: Callable[..., Any]
) -> None:
    for asked in ({"prompt": "q"}, {"messages": [user("q")]}):
        read = auto({**asked, "chosen": "a", "rejected": "b", **fields})
        assert ((read.only.chosen_score, read.only.rejected_score), read.unread) == (scores, unread)
