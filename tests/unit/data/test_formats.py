"""Each format: what its rows become, and which odd row is refused for what."""

from __future__ import annotations

from typing import Any

import pytest

from dpo_cli.data.formats import PREFERENCE_FORMATS, SFT_FORMATS
from dpo_cli.data.formats.alpaca import ALPACA
from dpo_cli.data.formats.base import Format, RowProblem
from dpo_cli.data.formats.hh import HH
from dpo_cli.data.formats.pairs import PAIRS
from dpo_cli.data.formats.sharegpt import SHAREGPT
from dpo_cli.data.schema import Messages, assistant, user


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def reason_of(reader: Format[Any], row: dict[str, Any]) -> str:
    with pytest.raises(RowProblem) as caught:
        reader.read(row)
    assert caught.value.detail
    return caught.value.reason


# --- alpaca -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add 1.", "input": "5 cats"}, [user("Add 1.\n5 cats")]),
        ({"instruction": "Add 1.", "input": ""}, [user("Add 1.")]),
        ({"instruction": "Add 1.", "input": " \n"}, [user("Add 1.")]),
        ({"instruction": "Add 1.", "input": None}, [user("Add 1.")]),
        ({"instruction": "Add 1."}, [user("Add 1.")]),
        ({"instruction": "Go.", "system": "Be kind."}, [system("Be kind."), user("Go.")]),
        ({"instruction": "Go.", "system": "", "history": None}, [user("Go.")]),
        ({"instruction": "Go.", "history": ""}, [user("Go.")]),
        ({"instruction": "Go.", "history": []}, [user("Go.")]),
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
    example = ALPACA.read(row | {"output": " 6 cats\n"})
    assert example.prompt == prompt
    assert example.completion == [assistant(" 6 cats\n")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"output": "a"}, "missing_field"),
        ({"instruction": "q"}, "missing_field"),
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
    ],
)
def test_an_odd_alpaca_row_is_refused(row: dict[str, Any], reason: str) -> None:
    assert reason_of(ALPACA, row) == reason


# --- pairs --------------------------------------------------------------------------------

Q, A, B = user("q"), assistant("a"), assistant("b")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [Q], "chosen": [A], "rejected": [B]},
        {"prompt": Q, "chosen": A, "rejected": "b"},
        {"prompt": [Q], "chosen": [Q, A], "rejected": [Q, B]},
        {"instruction": "q", "chosen": "a", "rejected": "b"},
        {"instruction": "q", "input": "", "chosen": [A], "rejected": B},
        {"prompt": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}, "rejected": "b"},
        {"prompt": [{"role": "human", "content": "q"}], "chosen": {"role": "model", "content": "a"}, "rejected": "b"},
    ],
)
def test_a_pair_is_read_in_every_shape(row: dict[str, Any]) -> None:
    example = PAIRS.read(row)
    assert (example.prompt, example.chosen, example.rejected) == ([Q], [A], [B])


def test_a_pairs_prompt_may_have_many_turns_and_an_input() -> None:
    turns = [system("s"), user("1"), assistant("2"), user("3")]
    assert PAIRS.read({"prompt": turns, "chosen": [*turns, A], "rejected": [B]}).prompt == turns
    assert PAIRS.read({"instruction": "q", "input": "more", "chosen": "a", "rejected": "b"}).prompt == [user("q\nmore")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen": None}, "missing_field"),
        ({"rejected": ...}, "missing_field"),
        ({"prompt": ...}, "missing_field"),
        ({"prompt": []}, "empty_prompt"),
        ({"prompt": [Q, A]}, "prompt_not_ending_with_user"),
        ({"prompt": [system("s")]}, "prompt_not_ending_with_user"),
        ({"prompt": 5}, "bad_message"),
        ({"prompt": ["q"]}, "bad_message"),
        ({"prompt": [{"role": "tool", "content": "q"}]}, "unknown_role"),
        ({"prompt": [{"content": "q"}]}, "unknown_role"),
        ({"prompt": [{"role": ["user"], "content": "q"}]}, "unknown_role"),
        ({"prompt": [{"role": "user", "content": [{"text": "q"}]}]}, "not_text"),
        ({"prompt": [{"role": "user"}]}, "not_text"),
        ({"chosen": []}, "not_one_answer"),
        ({"chosen": [A, Q, A]}, "not_one_answer"),
        ({"chosen": [Q]}, "not_one_answer"),
        ({"chosen": [user("other"), A]}, "not_one_answer"),
        ({"chosen": 3}, "bad_message"),
    ],
)
def test_an_odd_pair_is_refused(change: dict[str, Any], reason: str) -> None:
    row = {"prompt": [Q], "chosen": [A], "rejected": [B]} | change
    assert reason_of(PAIRS, {name: value for name, value in row.items() if value is not ...}) == reason


# --- sharegpt -----------------------------------------------------------------------------


def test_a_sharegpt_pair_is_read() -> None:
    example = SHAREGPT.read(
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "1"},
                {"from": "gpt", "value": "2"},
                {"from": "human", "value": "3"},
            ],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"role": "assistant", "content": "b"},
        }
    )
    assert example.prompt == [system("s"), user("1"), assistant("2"), user("3")]
    assert (example.chosen, example.rejected) == ([A], [B])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"conversations": ...}, "missing_field"),
        ({"chosen": ...}, "missing_field"),
        ({"rejected": ...}, "missing_field"),
        ({"conversations": []}, "empty_prompt"),
        ({"conversations": [Q, A]}, "prompt_not_ending_with_user"),
        ({"conversations": "q"}, "bad_message"),
        ({"conversations": [{"from": "function_call", "value": "q"}]}, "unknown_role"),
        ({"chosen": Q}, "not_one_answer"),
        ({"chosen": "a"}, "bad_message"),
        ({"rejected": {"from": "gpt"}}, "not_text"),
    ],
)
def test_an_odd_sharegpt_pair_is_refused(change: dict[str, Any], reason: str) -> None:
    row = {"conversations": [Q], "chosen": A, "rejected": B} | change
    assert reason_of(SHAREGPT, {name: value for name, value in row.items() if value is not ...}) == reason


# --- hh -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opening", "prompt"),
    [
        ("\n\nHuman: q", [Q]),
        ("\n\nHuman: one\n\ntwo paragraphs", [user("one\n\ntwo paragraphs")]),
        ("\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3", [user("1"), assistant("2"), user("3")]),
        ("\n\nHuman:q", [Q]),
        ("\n\nHuman: is it 'Assistant: hi'?", [user("is it 'Assistant: hi'?")]),
    ],
)
def test_a_transcript_is_cut_at_its_last_common_answer(opening: str, prompt: Messages) -> None:
    example = HH.read({"chosen": f"{opening}\n\nAssistant: a", "rejected": f"{opening}\n\nAssistant: b"})
    assert (example.prompt, example.chosen, example.rejected) == (prompt, [A], [B])


@pytest.mark.parametrize(("chosen", "rejected"), [("", " b"), (" yes", " yes, b"), (" a\n\nmore", " a\n\nless")])
def test_answers_that_share_their_beginning_stay_whole(chosen: str, rejected: str) -> None:
    opening = "\n\nHuman: q\n\nAssistant:"
    example = HH.read({"chosen": opening + chosen, "rejected": opening + rejected})
    assert example.prompt == [Q]
    assert example.chosen == [assistant(chosen.removeprefix(" "))]
    assert example.rejected == [assistant(rejected.removeprefix(" "))]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        ("\n\nHuman: q", "\n\nHuman: q", "bad_transcript"),
        ("\n\nHuman: q\n\nAssistant: a", "\n\nHuman: r\n\nAssistant: a", "bad_transcript"),
        ("text\n\nHuman: q\n\nAssistant: a", "text\n\nHuman: q\n\nAssistant: b", "bad_transcript"),
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
def test_an_odd_transcript_is_refused(chosen: str, rejected: str, reason: str) -> None:
    assert reason_of(HH, {"chosen": chosen, "rejected": rejected}) == reason


def test_a_transcript_must_be_text() -> None:
    assert reason_of(HH, {"chosen": "\n\nHuman: q\n\nAssistant: a"}) == "missing_field"
    assert reason_of(HH, {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": None}) == "not_text"


def test_a_transcript_without_empty_lines_before_it_is_read_where_it_is_detected() -> None:
    row = {"chosen": "Human: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b"}
    assert HH.matches(row)
    assert HH.read(row).prompt == [Q]


# --- detection ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, ["pairs"]),
        ({"instruction": "q", "chosen": "a", "rejected": "b"}, ["pairs"]),
        ({"conversations": [], "chosen": {}, "rejected": {}}, ["sharegpt"]),
        ({"chosen": "\n\nHuman: q", "rejected": "\n\nHuman: q"}, ["hh"]),
        ({"chosen": "a", "rejected": "b"}, []),
        ({"prompt": "q", "chosen": "a"}, []),
        ({"instruction": "q", "output": "a"}, []),
    ],
)
def test_a_preference_row_looks_like_its_own_format_alone(row: dict[str, Any], names: list[str]) -> None:
    assert [reader.name for reader in PREFERENCE_FORMATS if reader.matches(row)] == names


def test_an_instruction_row_looks_like_alpaca() -> None:
    assert [reader.name for reader in SFT_FORMATS if reader.matches({"instruction": "q", "output": "a"})] == ["alpaca"]
    assert not ALPACA.matches({"prompt": "q", "output": "a"})


def test_details_hold_nothing_of_a_texts_content() -> None:
    with pytest.raises(RowProblem) as caught:
        PAIRS.read({"prompt": [user("secret"), assistant("secret")], "chosen": "secret", "rejected": "secret"})
    assert "secret" not in caught.value.detail


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    ],
)
def test_system_and_history_in_fields_of_their_own_are_part_of_the_prompt(row: dict[str, Any]) -> None:
    row = {**row, "system": "s", "history": [["u", "v"]]}
    reader = next(reader for reader in PREFERENCE_FORMATS if reader.matches(row))
    assert [message["content"] for message in reader.read(row).prompt] == ["s", "u", "v", "q"]
