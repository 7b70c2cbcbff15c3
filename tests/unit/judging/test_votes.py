"""Votes: results are the method's whatever was shown first; problems name file, place and remedy; votes as a judge."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from dpo_cli.core.errors import DataError
from dpo_cli.judging.judge import INVALID, Judgment, Question
from dpo_cli.judging.votes import COLUMNS, VotesJudge, item_id, rating_sheet, read_votes
from dpo_cli.judging.win_rate import Pair, compare_all, summarize
from dpo_cli.statistics.agreement import LOSS, TIE, WIN, Vote

HEADER = ",".join(COLUMNS)


def read(folder: Path, *rows: str, header: str = HEADER) -> list[Vote]:
    file = folder / "votes.csv"
    file.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return read_votes(file)


@pytest.mark.parametrize(
    ("vote", "a_is", "result"),
    [
        ("A", "dpo", WIN),
        ("B", "dpo", LOSS),
        ("A", "sft", LOSS),
        ("B", "sft", WIN),
        ("tie", "dpo", TIE),
        ("tie", "sft", TIE),
    ],
)
def test_a_result_is_the_methods_whatever_was_shown_first(vote: str, a_is: str, result: int, tmp_path: Path) -> None:
    [found] = read(tmp_path, f"1,p,dpo,sft,human:anna,{vote},{a_is}")
    assert found == Vote("1", "p", "dpo", "sft", "human:anna", result)
    assert found.kind == "human"


def test_parquet_with_numbers_for_ids(tmp_path: Path) -> None:
    row = dict(zip(COLUMNS, (7, 3, "dpo", "sft", "judge", "A", "dpo"), strict=True))
    pl.DataFrame([row]).write_parquet(tmp_path / "votes.parquet")
    assert read_votes(tmp_path / "votes.parquet") == [Vote("7", "3", "dpo", "sft", "judge", WIN)]


GOOD = "1,p,dpo,sft,a,A,dpo"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("2,p,dpo,sft,a,C,dpo", ("line 3", "vote must be A, B, tie or both bad, got C", "leave the row out")),
        ("2,p,dpo,sft,a,A,ppo", ("line 3", "a_is must be dpo or sft, got ppo", "shown as A")),
        ("1,p,dpo,sft,a,B,dpo", ("line 3", "a voted on item 1 of dpo already, in line 2", "keep one")),
        ("1,q,dpo,sft,b,B,dpo", ("line 3", "item 1 of dpo has prompt q, but p in line 2", "prompt_id")),
        ("2,p,dpo,dpo,a,A,dpo", ("line 3", "method and baseline are both dpo", "name the two")),
        ("2,,dpo,sft,a,A,dpo", ("line 3", "prompt_id is empty", "fill in")),
        ("2,p,dpo,sft,:a,A,dpo", ("line 3", "rater must be a kind", "human:anna")),
    ],
)
def test_a_row_that_makes_no_sense(row: str, words: tuple[str, ...], tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, GOOD, row)
    [problem] = caught.value.problems
    for word in (f"{tmp_path}/votes.csv", *words):
        assert word in problem


def test_a_missing_column_names_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column a_is, got .*; rename a_was"):
        read(tmp_path, GOOD, header=HEADER.replace("a_is", "a_was"))
    with pytest.raises(DataError, match="no column rater, got .*; a votes file has item_id, prompt_id"):
        read(tmp_path, GOOD, header=HEADER.replace("rater", "x"))


def test_all_problems_in_one_go_but_no_flood(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, *(f"{i},p,dpo,sft,a,x,dpo" for i in range(20)))
    assert len(caught.value.problems) == 9
    assert caught.value.problems[-1].endswith("12 more such problems")


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.csv is missing; name a file with the columns item_id"):
        read_votes(tmp_path / "none.csv")


# --- as a judge ---------------------------------------------------------------------------

ITEM = item_id("why", "because", "no idea")


def votes(*results: int, kind: str = "human") -> list[Vote]:
    """Votes on ITEM."""
    return [Vote(ITEM, "p", "dpo", "sft", f"{kind}:{number}", result) for number, result in enumerate(results)]


def test_share_and_majority() -> None:
    said = votes(WIN, WIN, LOSS, TIE)
    pair = Pair("why", "because", "no idea")
    mixed = [*said, *votes(LOSS, LOSS, LOSS, kind="S")]
    for some, rule, kind, win in (
        (said, "share", None, 0.625),
        (said, "majority", None, 1.0),
        (said[1:3], "majority", None, 0.5),
        (said[2:], "majority", None, 0.0),
        (mixed, "majority", None, 0.0),
        (mixed, "majority", "human", 1.0),
    ):
        [found] = compare_all(VotesJudge(some, rule, "dpo", "sft", kind), [pair])  # type: ignore[arg-type]
        assert found.win == win


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
