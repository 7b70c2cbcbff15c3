"""Pairs by where their prompt lies: every shape, where sides are cut, and which odd row is refused for what."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from ruamel.yaml import YAML

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.detect import UnknownFormatError
from dpo_cli.data.formats.pairs import HH, IMPLICIT, PAIRS, SHAREGPT
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import Messages, PreferenceExample, RankingExample, SftExample, assistant, user

# --- pairs -------------------------------------------------------------------------------------


Q, A, B = user("q"), assistant("a"), assistant("b")


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def read_pair(row: dict[str, Any]) -> Any:
    return PAIRS.read(row, Reading())


ASKED = {"from": "human", "value": "q"}
SAME_PAIR: dict[str, list[dict[str, Any]]] = {
    "pairs": [
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
        {"question": "q", "response_j": "a", "response_k": "b"},
        {"query": "q", "better": "a", "worse": "b"},
        {"input": "q", "chosen": "a", "rejected": "b", "generations": ["a", "b"], "rating": [9, 8]},
        {"query": "q", "response": "a", "rejected_response": "b"},
        {"prompt": "q", "response": "a", "chosen": "a", "rejected": "b"},
        {"input": {"messages": [Q], "tools": []}, "preferred_output": [A], "non_preferred_output": [B]},
        {"prompt": "q", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]},
    ],
    "sharegpt": [
        {"conversations": [ASKED], "chosen": {"from": "gpt", "value": "a"}, "rejected": {"from": "gpt", "value": "b"}},
        {"conversations": [ASKED], "chosen": "a", "rejected": "b"},
        {"conversations": [ASKED], "chosen": "a", "rejected": [Q, B]},
        {"conversations": json.dumps([ASKED]), "chosen": json.dumps(A), "rejected": json.dumps([Q, B])},
        {"conversations": [Q, A], "rejected": "b"},
        {"conversations": [Q, A], "chosen": None, "rejected": [B]},
        {"conversations": [Q, A], "rejected": [Q, B]},
        {"messages": [Q], "chosen": A, "rejected": B},
        {"conversation": [{"speaker": "human", "text": "q"}], "better": A, "worse": B},
        {"context": [{"from": "user", "content": "q"}], "chosen": [A], "rejected": [B]},
        {"messages": [Q, A], "rejected_response": "b"},
        {"messages": [Q, A], "rejected_messages": [Q, B]},
    ],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in SAME_PAIR.items() for row in rows])
def test_a_pair_is_read_in_every_shape(name: str, row: dict[str, Any], auto: Callable[..., Any]) -> None:
    found = auto(row)
    assert (found.formats, found.only) == ([name], PreferenceExample([Q], [A], [B]))


def test_a_transcript_as_prompt_has_its_turns() -> None:
    prompt = "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3 \n\nAssistant:"
    example = read_pair({"prompt": prompt, "chosen": "  a", "rejected": "b"})
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
        assert read_pair(row) == PreferenceExample(before, [A], [B])


def test_scores_are_kept() -> None:
    example = read_pair({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": "8.5", "rejected_score": 7})
    assert (example.chosen_score, example.rejected_score) == (8.5, 7.0)
    example = read_pair({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": None, "rejected_score": ""})
    assert (example.chosen_score, example.rejected_score) == (None, None)


def test_answers_that_look_a_little_like_messages_stay_text() -> None:
    for text in ('{"answer": 5}', "[1, 2]", '[{"role": "admin", "name": "x"', " yes", "Hello", "\n\nno"):
        assert read_pair({"prompt": "q", "chosen": text, "rejected": "b"}).chosen == [assistant(text)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "missing_field"),
        ({"rejected": ...}, "missing_field"),
        ({"prompt": ...}, "missing_field"),
        ({"prompt": None}, "missing_field"),
        ({"prompt": []}, "empty_prompt"),
        ({"prompt": [Q, A]}, "prompt_not_ending_with_user"),
        ({"prompt": 5}, "not_text"),
        ({"prompt": ["q"]}, "bad_message"),
        ({"prompt": [{"role": "narrator", "content": "q"}]}, "unknown_role"),
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
        read_pair({"prompt": [user("secret"), assistant("secret")], "chosen": "secret", "rejected": "secret"})
    assert "secret" not in caught.value.detail


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


# --- sharegpt ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": ...}, "missing_field"),
        ({"conversations": None}, "missing_field"),
        ({"chosen": ...}, "missing_field"),
        ({"rejected": ...}, "missing_field"),
        ({"conversations": [Q, A], "prompt": "q"}, "prompt_not_ending_with_user"),
        ({"conversations": "q"}, "bad_message"),
    ],
)
def test_an_odd_sharegpt_pair_is_refused(change: dict[str, Any], reason: str, reason_of: Callable[..., str]) -> None:
    row = {"conversations": [Q], "chosen": A, "rejected": B} | change
    assert reason_of(SHAREGPT, {name: value for name, value in row.items() if value is not ...}) == reason


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [(A, B), ([A], [B]), ("a", "b"), (json.dumps(A), B), ({"from": "gpt", "value": "a"}, "b")],
)
def test_a_third_answer_that_ends_the_conversation_is_left_out_and_named(
    chosen: Any, rejected: Any, auto: Callable[..., Any]
) -> None:
    """The same as preferences and as instructions, whatever that answer says."""
    for third in (assistant("c"), A):
        row = {"conversations": [Q, third], "chosen": chosen, "rejected": rejected}
        for kind, example in (("preference", PreferenceExample([Q], [A], [B])), ("sft", SftExample([Q], [A]))):
            read = auto(row, kind=kind)
            assert (read.only, read.formats, read.unread) == (example, ["sharegpt"], {"conversations.last answer": 1})
            assert "the conversation's last answer is left out" in read.why


def test_whole_conversations_and_other_prompts_beside_one_are_read_from_there(auto: Callable[..., Any]) -> None:
    whole = {"messages": [Q, A], "chosen": [Q, A], "rejected": [Q, B]}
    for row, fmt in (
        (whole, "implicit"),
        ({"prompt": "q", **whole}, "pairs"),
        ({**whole, "prompt": "q", "chosen": "a"}, "pairs"),
    ):
        for kind in ("preference", "sft"):
            read = auto(row, kind=kind)
            assert (read.formats, read.only.prompt, "messages" in read.unread) == ([fmt], [Q], True)


def test_a_conversation_beside_sides_that_fit_no_prompt_is_no_instruction(auto: Callable[..., Any]) -> None:
    row = {"messages": [Q, A], "chosen": [A, Q, A], "rejected": "b"}
    with pytest.raises(UnknownFormatError):
        auto(row, kind="sft")


# --- hh ----------------------------------------------------------------------------------------


def read_hh(chosen: str, rejected: str) -> Any:
    return HH.read({"chosen": chosen, "rejected": rejected}, Reading())


@pytest.mark.parametrize(
    ("opening", "prompt"),
    [
        ("\n\nHuman: q", [Q]),
        ("\n\nHuman: one\n\ntwo paragraphs", [user("one\n\ntwo paragraphs")]),
        ("\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3", [user("1"), assistant("2"), user("3")]),
        ("\n\nHuman:q", [Q]),
        ("System: be kind\n\nHuman: q", [system("be kind"), Q]),
        ("Be kind. System: on.\n\nHuman: q", [{"role": "system", "content": "Be kind. System: on."}, Q]),
        ("be kind\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3", [system("be kind"), user("1"), assistant("2"), user("3")]),
        ("\n\nHuman: is it 'Assistant: hi'?", [user("is it 'Assistant: hi'?")]),
    ],
)
def test_a_transcript_is_cut_at_its_last_common_answer(
    opening: str, prompt: Messages, auto: Callable[..., Any]
) -> None:
    """With an empty line before each turn or none, the prompt apart or with the answers."""
    example = PreferenceExample(prompt, [A], [B])
    whole = auto({"chosen": f"{opening}\n\nAssistant: a", "rejected": f"{opening}\n\nAssistant: b"})
    assert (whole.formats, whole.only) == (["hh"], example)
    assert auto({"prompt": f"{opening}\n\nAssistant:", "chosen": "a", "rejected": "b"}).only == example
    lines = opening.lstrip().replace("\n\nHuman", "\nHuman").replace("\n\nAssistant", "\nAssistant")
    single = auto({"chosen": f"{lines}\nAssistant: a", "rejected": f"{lines}\nAssistant: b"})
    assert (single.formats, single.only) == (["hh"], example)
    assert auto({"prompt": f"{lines}\nAssistant:", "chosen": "a", "rejected": "b"}).only == example


@pytest.mark.parametrize(("chosen", "rejected"), [("", " b"), (" yes", " yes, b"), (" a\n\nmore", " a\n\nless")])
def test_answers_that_share_their_beginning_stay_whole(chosen: str, rejected: str) -> None:
    opening = "\n\nHuman: q\n\nAssistant:"
    example = read_hh(opening + chosen, opening + rejected)
    assert example.prompt == [Q]
    assert example.chosen == [assistant(chosen.removeprefix(" "))]
    assert example.rejected == [assistant(rejected.removeprefix(" "))]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: q", "\n\nHuman: q", "bad_transcript"),
        ("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: r\n\nAssistant: a", "bad_transcript"),
        ("", "", "bad_transcript"),
        (
            "\n\nHuman: q\n\nAssistant: a\n\nHuman: r\n\nAssistant: c",
            "\n\nHuman: q\n\nAssistant: b\n\nHuman: r\n\nAssistant: c",
            "diverges_early",
        ),
        ("\n\nHuman: q\n\nAssistant: a\n\nHuman: r", "\n\nHuman: q\n\nAssistant: b", "diverges_early"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "empty_prompt"),
        (
            "\n\nHuman: q\n\nAssistant: x\n\nAssistant: a",
            "\n\nHuman: q\n\nAssistant: x\n\nAssistant: b",
            "prompt_not_ending_with_user",
        ),
    ],
)
def test_an_odd_transcript_is_refused(chosen: str, rejected: str, reason: str, reason_of: Callable[..., str]) -> None:
    assert reason_of(HH, {"chosen": chosen, "rejected": rejected}) == reason


def test_a_dialog_in_each_answer_makes_no_transcript_of_the_two(auto: Callable[..., Any]) -> None:
    read = auto(
        *[{"chosen": f"Write a {w}.\n\nHuman: x\n\nAssistant: y", "rejected": f"Write a {w}. No."} for w in "pq"]
    )
    assert read.formats == ["implicit", "implicit"]


# --- implicit ----------------------------------------------------------------------------------


def read_implicit(chosen: Any, rejected: Any, **row: Any) -> Any:
    return IMPLICIT.read({"chosen": chosen, "rejected": rejected, **row}, Reading())


def test_a_system_field_stands_before_the_prompt() -> None:
    assert read_implicit("The a", "The b", system="s").prompt == [system("s"), user("The")]
    assert read_implicit([Q, A], [Q, B], system="s").prompt == [system("s"), Q]
    assert read_implicit([system("s"), Q, A], [system("s"), Q, B], system="s").prompt == [system("s"), Q]


def test_a_prompt_that_both_texts_begin_with_is_cut_off() -> None:
    assert read_implicit("The sky is blue", "The sky is bright", prompt="The sky") == PreferenceExample(
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
