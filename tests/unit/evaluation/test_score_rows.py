"""Rows of any file for ``dpo-cli score``: each with its place, whatever was left out before it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpo_cli.core.data_params import PreferenceSource
from dpo_cli.core.errors import DataError
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import PairTokenChecks, Params
from dpo_cli.data.chat import ChatEncoder
from dpo_cli.evaluation.score_rows import InputRows, read_rows


@pytest.fixture
def graph(tokenizer: Any) -> Any:
    return SimpleNamespace(encoder=ChatEncoder(tokenizer), max_length=100, policies=PairTokenChecks().model_dump())


def read(
    folder: Path, graph: Any, reporter: Any, rows: list[Any], params: Params | None = None, max_rows: int | None = None
) -> InputRows:
    path = folder / "rows.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    source = PreferenceSource(path=str(path), weight=0.01, split="train", pairs="adjacent")
    return read_rows([source], max_rows, params or Params(), graph, reporter)


def pair(number: int) -> dict[str, str]:
    return {"prompt": f"{number}?", "chosen": str(number), "rejected": "no"}


def ranking(number: int, *answers: str) -> dict[str, Any]:
    return {"prompt": f"color {number}?", "completions": list(answers), "ranks": list(range(1, len(answers) + 1))}


def test_every_row_has_its_number_over_many_blocks(tmp_path: Path, graph: Any, reporter: Any) -> None:
    rows = [pair(number) if number % 3 else ranking(number, "a", "b", "c") for number in range(2100)]
    rows[1500] = rows[7]
    found = read(tmp_path, graph, reporter, rows)
    assert [row.row for row in found.rows] == [number for number in range(2100) if number != 1500]
    for row in found.rows:
        assert row.prompt[0]["content"] == rows[row.row]["prompt"]
        assert row.is_pair == bool(row.row % 3)
        assert len(row.completions) == len(row.ranks) == len(row.tokens.completions) == (2 if row.row % 3 else 3)
    assert [(entry["row"], entry["reason"]) for entry in found.left_out] == [(1500, "duplicate")]
    assert (found.num_read, found.num_scored) == (2100, 2099)


def test_a_ranking_that_another_row_contradicts_is_left_out_and_the_others_keep_their_places(
    tmp_path: Path, graph: Any, reporter: Any
) -> None:
    rows = [ranking(0, "a", "b", "c"), ranking(1, "a", "b"), ranking(0, "b", "a"), ranking(2, "x", "y", "z")]
    found = read(tmp_path, graph, reporter, rows)
    assert [(row.row, len(row.ranks)) for row in found.rows] == [(1, 2), (3, 3)]
    assert {(entry["row"], entry["reason"]) for entry in found.left_out} == {
        (0, "contradiction"),
        (2, "contradiction"),
    }


def test_max_rows_and_checks_of_the_project(tmp_path: Path, graph: Any, reporter: Any) -> None:
    rows = [pair(number) for number in range(5)]
    found = read(tmp_path, graph, reporter, rows, max_rows=3)
    assert (found.num_read, len(found.stopped)) == (3, 1)
    strict = parse_params({"data": {"checks": {"longer_chosen": "drop"}}})
    long = {"prompt": "?", "chosen": "a longer one", "rejected": "no"}
    assert [entry["reason"] for entry in read(tmp_path, graph, reporter, [*rows, long], strict).left_out] == [
        "longer_chosen"
    ]
    with pytest.raises(DataError, match=r"data.checks.longer_chosen is error"):
        read(tmp_path, graph, reporter, [long], parse_params({"data": {"checks": {"longer_chosen": "error"}}}))


def test_a_check_of_tokens_whose_policy_is_error_stops(tmp_path: Path, graph: Any, reporter: Any) -> None:
    graph.policies["over_long"] = "error"
    rows = [pair(0), {**pair(1), "chosen": "1 2 3 " * 90}]
    with pytest.raises(DataError, match=r"1 rows fail the check over_long \(the first is row 1\)"):
        read(tmp_path, graph, reporter, rows)
