"""A votes file: results are the method's whatever was shown first; problems name file, place and remedy."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_cli.core.errors import DataError
from dpo_cli.judging.votes import COLUMNS, read_votes
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
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "votes.parquet")
    assert read_votes(tmp_path / "votes.parquet") == [Vote("7", "3", "dpo", "sft", "judge", WIN)]


GOOD = "1,p,dpo,sft,a,A,dpo"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("2,p,dpo,sft,a,C,dpo", ("line 3", "vote must be A, B or tie, got C", "leave the row out")),
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
