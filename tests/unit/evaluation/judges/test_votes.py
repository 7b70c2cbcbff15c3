"""Human votes as a judge: known by the answers, whatever the raters saw as A."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_cli.core.errors import DataError
from dpo_cli.evaluation.judges.base import INVALID, Judgment, Question
from dpo_cli.evaluation.judges.votes import Vote, VotesJudge, item_id, rating_sheet, read_votes
from dpo_cli.evaluation.win_rate import Pair, compare, compare_all, summarise

COLUMNS = ("item_id", "prompt_id", "method", "baseline", "rater", "vote", "a_is")
ITEM = item_id("why", "because", "no idea")


def write(path: Path, rows: Sequence[Sequence[Any]]) -> Path:
    if path.suffix == ".parquet":
        pl.DataFrame([dict(zip(COLUMNS, row, strict=True)) for row in rows]).write_parquet(path)
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    return path


def votes(*said: tuple[str, str]) -> list[Vote]:
    """Votes on ITEM: what was said, and who was shown as A."""
    return [Vote(ITEM, "p", "dpo", "sft", f"r{n}", vote, a_is) for n, (vote, a_is) in enumerate(said)]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["votes.csv", "votes.parquet"])
def test_a_file_is_read_with_either_way_to_say_who_was_a(tmp_path: Path, name: str) -> None:
    rows = [
        (7, "p", "dpo", "sft", 1, "A", "method"),
        (7, "p", "dpo", "sft", 2, "b", "baseline"),
        (7, "p", "dpo", "sft", 3, "A", "sft"),
        (8, "q", "dpo", "sft", 1, "Tie", "dpo"),
    ]
    found = read_votes(write(tmp_path / name, rows))
    assert [vote.for_method for vote in found] == [1.0, 1.0, 0.0, 0.5]
    assert found[1] == Vote("7", "p", "dpo", "sft", "2", "B", "sft")


def test_every_bad_row_is_named_at_once(tmp_path: Path) -> None:
    good = ("7", "p", "dpo", "sft", "1", "A", "method")
    rows = [
        good,
        ("7", "p", "dpo", "sft", "2", "both", "method"),
        ("7", "p", "dpo", "sft", "3", "A", "ppo"),
        ("", "p", "dpo", "sft", "", "A", "method"),
        ("7", "p", "dpo", "dpo", "5", "A", "method"),
        good,
    ]
    path = write(tmp_path / "votes.csv", rows)
    with pytest.raises(DataError) as caught:
        read_votes(path)
    assert caught.value.problems == [
        f"{path}, line 3: vote must be A, B or tie, got 'both'",
        f"{path}, line 4: a_is must be method, baseline, dpo or sft, got 'ppo'",
        f"{path}, line 5: item_id, rater must not be empty",
        f"{path}, line 6: method and baseline must differ, got 'dpo' twice",
        f"{path}, line 7: '1' has voted on '7' already; keep one of the votes",
    ]
    write(path, [("7", "p", "dpo", "sft", str(n), "x", "method") for n in range(100)])
    with pytest.raises(DataError, match="80 more rows like these"):
        read_votes(path)


def test_a_file_that_is_missing_or_holds_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"votes.csv is missing"):
        read_votes(tmp_path / "votes.csv")
    (tmp_path / "other.json").write_text('["x"]\n', encoding="utf-8")
    with pytest.raises(DataError, match="must have the columns item_id, prompt_id"):
        read_votes(tmp_path / "other.json")


def test_share_and_majority() -> None:
    said = votes(("A", "dpo"), ("A", "dpo"), ("A", "sft"), ("tie", "sft"))
    pair = ("why", "because", "no idea")
    assert compare(VotesJudge(said, "share", "dpo", "sft"), *pair) == 0.625
    assert compare(VotesJudge(said, "majority", "dpo", "sft"), *pair) == 1.0
    assert compare(VotesJudge(said[1:3], "majority", "dpo", "sft"), *pair) == 0.5
    assert compare(VotesJudge(said[2:], "majority", "dpo", "sft"), *pair) == 0.0


def test_the_order_of_asking_changes_nothing() -> None:
    judge = VotesJudge(votes(("A", "dpo"), ("B", "dpo"), ("B", "sft")), "share", "dpo", "sft")
    found = dict(judge.judge([Question("why", "because", "no idea"), Question("why", "no idea", "because")]))
    assert found[0].p_a == pytest.approx(2 / 3)
    assert found[0].p_a + found[1].p_a == 1
    assert (found[0].verdict, found[1].verdict) == ("A", "B")


def test_votes_on_other_answers_or_models_count_for_nothing() -> None:
    said = votes(("A", "dpo"))
    judge = VotesJudge(said, "share", "dpo", "sft")
    asked = [Question("why", "because", "no clue"), Question("who", "because", "no idea")]
    assert [judgment for _, judgment in judge.judge(asked)] == [INVALID, INVALID]
    other = VotesJudge(said, "share", "ppo", "sft")
    assert list(other.judge([Question("why", "because", "no idea")])) == [(0, INVALID)]
    comparisons = compare_all(judge, [Pair("why", "because", "no idea"), Pair("who", "because", "no idea")])
    with pytest.raises(DataError, match=r"no verdict in 1 of 2 comparisons \(50.0%\).*collect votes on these answers"):
        summarise(comparisons, judge.remedy)


def test_a_filled_in_rating_sheet_is_a_file_of_votes(tmp_path: Path) -> None:
    rows = [(f"p{n}", f"prompt {n}", "good", "bad") for n in range(40)] + [("same", "prompt", "x", "x")]
    sheet = rating_sheet(rows, "dpo", "sft", "ann")
    assert len(sheet) == 40
    shown_first = [row["a_is"] for row in sheet]
    assert 10 < shown_first.count("method") < 30
    for row in sheet:
        assert (row["a"], row["b"]) == (("good", "bad") if row["a_is"] == "method" else ("bad", "good"))
        row["vote"] = "A" if row["a"] == "good" else "B"
    path = tmp_path / "votes.parquet"
    pl.DataFrame(sheet).write_parquet(path)
    judge = VotesJudge(read_votes(path), "share", "dpo", "sft")
    found = compare_all(judge, [Pair(*row[1:]) for row in rows])
    assert [each.win for each in found] == [1.0] * 40 + [0.5]
    assert Judgment.of(1.0) == found[0].ours_first
