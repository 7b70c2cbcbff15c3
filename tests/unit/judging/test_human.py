"""Human votes as a judge: known by the answers, whatever order is asked."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from dpo_cli.core.errors import DataError
from dpo_cli.judging.human import VotesJudge, item_id, rating_sheet
from dpo_cli.judging.judge import INVALID, Judgment, Question
from dpo_cli.judging.votes import read_votes
from dpo_cli.judging.win_rate import Pair, compare, compare_all, summarize
from dpo_cli.statistics.agreement import LOSS, TIE, WIN, Vote

ITEM = item_id("why", "because", "no idea")


def votes(*results: int, kind: str = "human") -> list[Vote]:
    """Votes on ITEM."""
    return [Vote(ITEM, "p", "dpo", "sft", f"{kind}:{number}", result) for number, result in enumerate(results)]


def test_share_and_majority() -> None:
    said = votes(WIN, WIN, LOSS, TIE)
    pair = ("why", "because", "no idea")
    assert compare(VotesJudge(said, "share", "dpo", "sft"), *pair) == 0.625
    assert compare(VotesJudge(said, "majority", "dpo", "sft"), *pair) == 1.0
    assert compare(VotesJudge(said[1:3], "majority", "dpo", "sft"), *pair) == 0.5
    assert compare(VotesJudge(said[2:], "majority", "dpo", "sft"), *pair) == 0.0
    mixed = [*said, *votes(LOSS, LOSS, LOSS, kind="S")]
    assert compare(VotesJudge(mixed, "majority", "dpo", "sft"), *pair) == 0.0
    assert compare(VotesJudge(mixed, "majority", "dpo", "sft", "human"), *pair) == 1.0


def test_the_order_of_asking_changes_nothing() -> None:
    judge = VotesJudge(votes(WIN, LOSS, WIN), "share", "dpo", "sft")
    found = dict(judge.judge([Question("why", "because", "no idea"), Question("why", "no idea", "because")]))
    assert found[0].p_a == pytest.approx(2 / 3)
    assert found[0].p_a + found[1].p_a == 1
    assert (found[0].verdict, found[1].verdict) == ("A", "B")


def test_votes_on_other_answers_or_models_count_for_nothing() -> None:
    said = votes(WIN)
    judge = VotesJudge(said, "share", "dpo", "sft")
    asked = [Question("why", "because", "no clue"), Question("who", "because", "no idea")]
    assert [judgment for _, judgment in judge.judge(asked)] == [INVALID, INVALID]
    other = VotesJudge(said, "share", "ppo", "sft")
    assert list(other.judge([Question("why", "because", "no idea")])) == [(0, INVALID)]
    comparisons = compare_all(judge, [Pair("why", "because", "no idea"), Pair("who", "because", "no idea")])
    with pytest.raises(DataError, match=r"no verdict in 1 of 2 comparisons \(50.0%\).*collect votes on these answers"):
        summarize(comparisons, judge.remedy)


def test_a_filled_in_rating_sheet_is_a_file_of_votes(tmp_path: Path) -> None:
    rows = [(f"p{n}", f"prompt {n}", "good", "bad") for n in range(40)] + [("same", "prompt", "x", "x")]
    sheet = rating_sheet(rows, "dpo", "sft", "human:ann")
    assert len(sheet) == 40
    shown_first = [row["a_is"] for row in sheet]
    assert 10 < shown_first.count("dpo") < 30
    for row in sheet:
        assert (row["a"], row["b"]) == (("good", "bad") if row["a_is"] == "dpo" else ("bad", "good"))
        row["vote"] = "A" if row["a"] == "good" else "B"
    path = tmp_path / "votes.parquet"
    pl.DataFrame(sheet).write_parquet(path)
    judge = VotesJudge(read_votes(path), "share", "dpo", "sft")
    found = compare_all(judge, [Pair(*row[1:]) for row in rows])
    assert [each.win for each in found] == [1.0] * 40 + [0.5]
    assert Judgment.of(1.0) == found[0].ours_first
