"""HH transcripts: where they are cut, and which odd one is refused for what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dpo_cli.data.formats.base import Reading
from dpo_cli.data.formats.pairs import HH
from dpo_cli.data.schema import Messages, PreferenceExample, assistant, user

Q, A, B = user("q"), assistant("a"), assistant("b")
S = {"role": "system", "content": "be kind"}


def read(chosen: str, rejected: str) -> Any:
    return HH.read({"chosen": chosen, "rejected": rejected}, Reading())


@pytest.mark.parametrize(
    ("opening", "prompt"),
    [
        ("\n\nHuman: q", [Q]),
        ("\n\nHuman: one\n\ntwo paragraphs", [user("one\n\ntwo paragraphs")]),
        ("\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3", [user("1"), assistant("2"), user("3")]),
        ("\n\nHuman:q", [Q]),
        ("System: be kind\n\nHuman: q", [S, Q]),
        ("Be kind. System: on.\n\nHuman: q", [{"role": "system", "content": "Be kind. System: on."}, Q]),
        ("be kind\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3", [S, user("1"), assistant("2"), user("3")]),
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
    example = read(opening + chosen, opening + rejected)
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


def test_a_transcript_must_be_text(reason_of: Callable[..., str]) -> None:
    assert reason_of(HH, {"chosen": "\n\nHuman: q\n\nAssistant: a"}) == "missing_field"
    assert reason_of(HH, {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": None}) == "not_text"


def test_a_transcript_without_empty_lines_before_it_is_read_where_it_is_detected(auto: Callable[..., Any]) -> None:
    read = auto({"chosen": "Human: q\n\nAssistant: a", "rejected": "Human: q\n\nAssistant: b"})
    assert (read.formats, read.only) == (["hh"], PreferenceExample([Q], [A], [B]))


def test_a_prompt_and_answers_cut_off_it_read_as_the_whole_transcripts_do(auto: Callable[..., Any]) -> None:
    opening = "\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3 \n\nAssistant:"
    whole = auto({"chosen": f"{opening} a", "rejected": f"{opening} b"})
    parts = auto({"prompt": opening, "chosen": " a", "rejected": " b"})
    assert (whole.formats, parts.formats) == (["hh"], ["pairs"])
    assert whole.only == parts.only


def test_a_dialog_in_each_answer_makes_no_transcript_of_the_two(auto: Callable[..., Any]) -> None:
    read = auto(
        *[{"chosen": f"Write a {w}.\n\nHuman: x\n\nAssistant: y", "rejected": f"Write a {w}. No."} for w in "pq"]
    )
    assert read.formats == ["implicit", "implicit"]
