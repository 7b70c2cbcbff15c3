"""Votes on a chat: what is kept is what the readers of votes take for one, once, and can be taken back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from dpo_cli.core.errors import DataError
from dpo_cli.data.schema import user
from dpo_cli.data.votes import BOTH_BAD, TIED, A, B
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.votes import read_rows, read_votes
from dpo_cli.labeling.chat_votes import ChatVotes
from dpo_cli.statistics.agreement import LOSS, TIE, WIN

ANNA = "human:anna"


def pair(prompt: str, sft: str = "worse", dpo: str = "better") -> tuple[tuple[str, Answer], tuple[str, Answer]]:
    messages = [user(prompt)]
    return ("sft", Answer.of_text(prompt, messages, sft)), ("dpo", Answer.of_text(prompt, messages, dpo))


def test_votes_mean_what_was_meant_and_a_later_one_on_the_same_answers_stands(tmp_path: Path) -> None:
    with ChatVotes(tmp_path, ANNA) as votes:
        for prompt, vote in (("1", A), ("2", B), ("3", TIED), ("4", BOTH_BAD), ("1", B)):
            votes.keep(vote, pair(prompt), 1.5)
        assert votes.num_votes == 4
    with ChatVotes(tmp_path, ANNA) as votes:  # another day
        votes.keep(A, pair("2"), 2.0)
        assert votes.num_votes == 1
    found = {row["prompt"][0]["content"]: row for _, row in read_rows(tmp_path / "anna.jsonl")}
    results = {vote.prompt: vote.result for vote in read_votes(tmp_path / "anna.jsonl")}
    assert [results[found[prompt]["prompt_id"]] for prompt in "1234"] == [WIN, LOSS, TIE, TIE]
    row = found["1"]
    assert (row["method"], row["baseline"], row["a_is"], row["drawn"]) == ("dpo", "sft", "sft", "chat")
    assert [completion[0]["content"] for completion in row["completions"]] == ["worse", "better"]


def test_what_was_taken_back_does_not_stand_and_can_be_voted_on_again(tmp_path: Path) -> None:
    with ChatVotes(tmp_path, ANNA) as votes:
        assert not votes.undo()
        votes.keep(A, pair("1"), 1.0)
        votes.keep(A, pair("2"), 1.0)
        assert votes.undo()
        assert votes.num_votes == 1
    with ChatVotes(tmp_path, ANNA) as votes:
        votes.keep(B, pair("2"), 1.0)
        assert votes.undo()
        assert not votes.undo()
        votes.keep(B, pair("2"), 1.0)
    assert [vote.result for vote in read_votes(tmp_path / "anna.jsonl")] == [LOSS, WIN]


def test_answers_that_are_alike_or_cut_off_are_not_voted_on(tmp_path: Path) -> None:
    with ChatVotes(tmp_path, ANNA) as votes:
        with pytest.raises(DataError, match="both answers are alike"):
            votes.keep(A, pair("1", "same", "same"), 1.0)
        first, (name, answer) = pair("1")
        with pytest.raises(DataError, match="the answer of dpo was cut off"):
            votes.keep(A, (first, (name, replace(answer, finished=False))), 1.0)
        assert votes.num_votes == 0
