"""Conversion: every row is written once or accounted for, whatever the block, the process or the order."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_cli.core.data_params import DataChecks, PreferenceSource, SftSource, Source
from dpo_cli.core.errors import DataError, MachineError
from dpo_cli.data import convert as convert_module
from dpo_cli.data import workers as workers_module
from dpo_cli.data.account import SPLITS, Conversion, account_rows, metrics_of, unread_of, warnings_of
from dpo_cli.data.convert import convert
from dpo_cli.data.plan import Treatment
from dpo_cli.data.reading import files, json_text
from dpo_cli.data.schema import (
    PREFERENCE_SCHEMA,
    RANKING_SCHEMA,
    assistant,
    from_table,
    is_plain,
    split_position,
    user,
)

FRACTION = 0.3
POLICIES = DataChecks().model_dump()


def pair(number: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"question {number}", "chosen": "yes", "rejected": "no"} | changes


def pairs(stop: int, start: int = 0) -> list[dict[str, Any]]:
    return [pair(number) for number in range(start, stop)]


class Converted:
    """An account, the tables and the rejects of a conversion."""

    def __init__(self, report: Conversion, folder: Path, rejects: Path) -> None:
        self.report = report
        self.folder = folder
        self.tables = {split: pl.read_parquet(folder / f"{split}.parquet", glob=False) for split in SPLITS}
        self.rows = [row for split in SPLITS for row in self.tables[split].to_dicts()]
        self.rejects = [json.loads(line) for line in rejects.read_text(encoding="utf-8").splitlines()]
        self.reasons = [reject["reason"] for reject in self.rejects]

    def texts(self, column: str = "prompt") -> list[str]:
        return [row[column][0]["content"] for row in self.rows]


Run = Callable[..., Converted]


@pytest.fixture(autouse=True)
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run() -> Run:
    """Convert rows, or sources, with settings."""
    number = 0

    def run_convert(
        rows: Sequence[Any] | None = None,
        sources: Sequence[Source] | None = None,
        policies: dict[str, str] | None = None,
        fraction: float = FRACTION,
        workers: int = 1,
        **settings: Any,
    ) -> Converted:
        nonlocal number
        number += 1
        folder = Path(f"run {number} [x]")  # brackets are no pattern
        (folder / "out").mkdir(parents=True)
        (folder / "work").mkdir()
        if sources is None:
            Path("rows.json").write_text(json.dumps(rows), encoding="utf-8")
            sources = [PreferenceSource(path="rows.json", **settings)]
        report = convert(
            sources,
            Treatment(POLICIES | (policies or {}), fraction),
            folder / "work",
            folder / "out",
            folder / "rejects.jsonl",
            workers=workers,
        )
        return Converted(report, folder / "out", folder / "rejects.jsonl")

    return run_convert


def columns_of(schema: pa.Schema) -> pl.Schema:
    """The columns of a canonical table, as polars reads them."""
    table = pl.from_arrow(schema.empty_table())
    assert isinstance(table, pl.DataFrame)
    return table.schema


def lines_file(name: str, rows: Sequence[Any]) -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


# --- where rows go ------------------------------------------------------------------------


def test_rows_are_written_to_the_side_of_their_prompt(run: Run) -> None:
    done = run(pairs(50))
    assert (done.report.num_read, done.report.num_used, sum(done.report.num_written.values())) == (50, 50, 50)
    assert (done.rejects, done.report.num_rejected_rows) == ([], 0)
    for split, table in done.tables.items():
        assert table.columns == PREFERENCE_SCHEMA.names
        assert table.height == done.report.num_written[split] > 0
        assert {split_position(prompt) < FRACTION for prompt in table["prompt"].to_list()} == {split == "eval"}
    assert sorted(done.texts()) == sorted(f"question {number}" for number in range(50))


def test_what_is_written_has_the_canonical_types(run: Run) -> None:
    done = run([pair(number, chosen_score=0.5) for number in range(50)])
    assert done.tables["train"].schema == done.tables["eval"].schema == columns_of(PREFERENCE_SCHEMA)
    assert {row["chosen_score"] for row in done.rows} == {0.5}
    assert {row["rejected_score"] for row in done.rows} == {None}
    assert {row["source"] for row in done.rows} == {"rows.json"}


def test_tools_calls_and_reasoning_have_columns_where_a_row_has_them(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with and without them make one table, whose plain rows keep their ids."""
    monkeypatch.setattr(convert_module, "_RECORDS_A_BLOCK", 10)
    rows = pairs(60)
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    thought = {"role": "assistant", "content": "yes", "reasoning_content": "why"}
    extra = [
        pair(100, tools=[{"name": "f"}]),
        pair(101, chosen=[called]),
        pair(102, chosen=[thought]),
        {"prompt": "q", "completions": ["a", [thought]], "scores": [1, 2], "tools": [{"name": "f"}]},
    ]
    plain, full = run(rows), run([*rows, *extra])
    assert plain.tables["train"].columns == PREFERENCE_SCHEMA.names
    assert full.tables["train"].columns == [*PREFERENCE_SCHEMA.names, "tools"]
    found = {row["id"]: from_table(row) for row in full.rows}
    assert {row["id"] for row in plain.rows} == {
        row["id"] for row in found.values() if is_plain(row["prompt"], row["chosen"])
    }
    by_prompt = {row["prompt"][0]["content"]: row for row in found.values()}
    tools = '[{"type":"function","function":{"name":"f"}}]'
    assert by_prompt["question 100"]["prompt"] == [{**user("question 100"), "tools": tools}]
    assert by_prompt["question 101"]["chosen"][0]["tool_calls"] == (
        '[{"type":"function","function":{"name":"f","arguments":{}}}]'
    )
    assert by_prompt["question 102"]["chosen"] == by_prompt["q"]["chosen"] == [thought]
    assert by_prompt["q"]["prompt"] == [{**user("q"), "tools": tools}]
    (ranking,) = rankings_of(full)
    assert from_table(ranking)["completions"][0] == [thought]


def test_converting_twice_gives_the_same_bytes(run: Run) -> None:
    one, two = (run(pairs(50)) for _ in range(2))
    for split in SPLITS:
        assert (one.folder / f"{split}.parquet").read_bytes() == (two.folder / f"{split}.parquet").read_bytes()


def odd_rows() -> list[Any]:
    rows: list[Any] = [pair(number % 400, chosen=f"yes {number % 7}") for number in range(600)]
    rows += [pair(3, chosen="no", rejected="yes 3"), pair(900, chosen=""), "text", {"prompt": "q"}]
    rows += [pair(number, source="web", note="rare" if number % 9 == 0 else "") for number in range(1000, 1040)]
    random.Random(0).shuffle(rows)
    return rows


@pytest.mark.parametrize(("block", "workers"), [(200, 1), (5000, 1), (1 << 20, 1), (5000, 2)])
def test_neither_blocks_nor_processes_change_the_result(
    run: Run, monkeypatch: pytest.MonkeyPatch, block: int, workers: int
) -> None:
    path = lines_file("rows.jsonl", odd_rows())
    whole = run(sources=[PreferenceSource(path=path)])
    monkeypatch.setattr(json_text, "BLOCK", block)
    monkeypatch.setattr(convert_module, "_BYTES_WORTH_A_POOL", 0 if workers > 1 else 1 << 40)
    monkeypatch.setattr(convert_module, "_ROWS_A_GROUP", 50)
    parts = run(sources=[PreferenceSource(path=path)], workers=workers)
    assert parts.rows == whole.rows
    assert parts.rejects == whole.rejects
    assert {**vars(parts.report), "blocks": []} == {**vars(whole.report), "blocks": []}


# --- what is not read ---------------------------------------------------------------------


def test_columns_that_nobody_reads_are_counted_by_file(run: Run) -> None:
    rows = [pair(number, id=number, note="" if number else "n") for number in range(30)]
    first = PreferenceSource(path=lines_file("a.jsonl", [*rows, {"prompt": "q", "id": 9}]))
    second = PreferenceSource(path=lines_file("b.jsonl", pairs(80, 50)))
    report = run(sources=[first, second]).report
    assert [account.unread for account in report.files] == [{"id": 30, "note": 1}, {}]
    assert report.files[0].unread_text() == "id (all rows); note (1 row)"  # of those that are read
    assert unread_of(report) == [{"file": first.path, "columns": {"id": 30, "note": 1}}]
    assert metrics_of(report)["num_unread_columns"] == 2
    assert [value for name, value in account_rows(report, None) if name == "not read"] == [
        "id (all rows); note (1 row)"
    ]


def test_unread_columns_take_one_line_however_many_there_are(run: Run) -> None:
    rows = [pair(number, **{f"key {number}": 1}, **({"a,b\x1b": 2} if number < 2 else {})) for number in range(1100)]
    account = run(rows).report.files[0]
    assert account.unread_text().startswith(r"'a,b\x1b' (2 rows); key 0, key 1, ")
    assert account.unread_text().endswith(" (1 row each); and more than 980 more")
    assert len(account.unread) == 1000


# --- chat templates in texts ---------------------------------------------------------------


def rendered(number: int) -> dict[str, Any]:
    prompt = f"<|im_start|>user\nquestion {number}<|im_end|>\n<|im_start|>assistant\n"
    return {"prompt": prompt, "chosen": "yes<|im_end|>", "rejected": "no"}


def test_texts_that_a_template_made_are_named_and_unwrap_takes_them_apart(run: Run) -> None:
    rows = [rendered(number) for number in range(30)]
    done = run([*rows, *pairs(60, 40)])
    assert dict(done.report.files[0].rendered) == {"ChatML": 30}
    (warning,) = warnings_of(done.report)
    assert warning == (
        "rows.json: 30 of 50 rows hold conversations that a chat template (ChatML) has rendered,"
        " and the model's own template will be put around them; unwrap: true in the source's settings makes messages of"
        " them"
    )
    bare = run(rows, unwrap=True)
    assert sorted(bare.texts()) == sorted(f"question {number}" for number in range(30))
    assert {row["chosen"][0]["content"] for row in bare.rows} == {"yes"}
    assert warnings_of(bare.report) == []
    assert ("taken apart", "30 rows of rendered conversations: ChatML 30") in account_rows(bare.report, None)


def test_unwrap_is_advised_only_where_it_takes_rows_apart(run: Run) -> None:
    """In a user's turn it does; not in one that says its answer, too, and no longer where it is on already."""
    turns = [{**rendered(number), "prompt": [user(rendered(number)["prompt"])]} for number in range(40)]
    assert dict(run(turns).report.files[0].rendered) == {"ChatML": 40}
    assert run(turns, unwrap=True).texts() == run([rendered(number) for number in range(40)], unwrap=True).texts()
    others = [
        {**row, "prompt": [user(f"{row['prompt'][0]['content']}yes<|im_end|>"), assistant("x"), user("r")]}
        for row in turns
    ]
    read = "\n\nHuman: question {}\n\nAssistant: a list:\nHuman: "
    transcripts = [{"chosen": f"{read.format(n)}yes", "rejected": f"{read.format(n)}no"} for n in range(40)]
    for rows, settings in ((others, {}), ([*turns[:1], *others], {"unwrap": True}), (transcripts, {})):
        (warning,) = warnings_of(run(rows, **settings).report)
        assert "examples hold marks of chat templates" in warning
        assert "unwrap" not in warning


def test_few_texts_with_marks_are_counted_without_a_warning(run: Run) -> None:
    few = run([rendered(1), *pairs(40)]).report
    assert (few.checks["chat_markers"].count, warnings_of(few)) == (1, [])
    many = run([pair(number, chosen="a </s> b") for number in range(40)]).report
    assert warnings_of(many)[0].startswith("40 of 40 examples hold marks of chat templates, and the model's own")


# --- what is left out ---------------------------------------------------------------------


def test_every_row_is_written_or_listed_with_its_reason(run: Run) -> None:
    odd = [
        pair(100, chosen=""),
        pair(101, rejected="  "),
        pair(102, prompt=""),
        pair(103, rejected="yes"),
        pair(104, chosen=None),
        pair(0),
        pair(105, chosen="\ud800"),
        "no object",
        pair(106, prompt=[{"role": "narrator", "content": "x"}]),
    ]
    done = run(pairs(30) + odd)
    assert done.reasons == [
        *("empty_chosen", "empty_rejected", "empty_prompt", "equal_sides", "missing_field", "duplicate"),
        *("bad_unicode", "not_an_object", "unknown_role"),
    ]
    assert [reject["row"] for reject in done.rejects] == list(range(30, 39))
    assert done.report.num_read == len(done.rows) + len(done.rejects) == 39
    assert done.report.num_rejected_rows == 9
    assert done.report.checks["malformed"].count == 4
    assert sum(done.report.rejected.values()) == 9


def test_a_row_that_was_left_out_is_no_first_of_a_duplicate(run: Run) -> None:
    done = run([pair(90, chosen=""), pair(90, chosen=""), *pairs(30)])
    assert done.report.rejected == {"empty_chosen": 2}


def test_a_pair_in_both_orders_is_left_out_twice(run: Run) -> None:
    done = run([*pairs(30), pair(4, chosen="no", rejected="yes"), pair(4, chosen="maybe")])
    assert done.reasons == ["contradiction", "contradiction"]
    assert [(r["row"], r["detail"]) for r in done.rejects] == [
        (4, "has the answers in the other order than row 30"),
        (30, "has the answers in the other order than row 4"),
    ]
    assert done.texts().count("question 4") == 1


def test_a_reject_names_file_row_and_line_and_nothing_of_the_content(run: Run) -> None:
    path = Path("rows.jsonl")
    lines = [json.dumps(pair(number)) for number in range(30)]
    lines.insert(2, "")
    lines.insert(5, json.dumps({"prompt": "secret", "chosen": "secret", "rejected": "secret "}))
    path.write_text("\n".join(lines), encoding="utf-8")
    (reject,) = run(sources=[PreferenceSource(path=str(path))]).rejects
    place = {"file": "rows.jsonl", "row": 4, "line": 6}
    assert reject == {**place, "reason": "equal_sides", "detail": "has two equal answers"}


# --- policies -----------------------------------------------------------------------------


def test_keep_counts_and_names_the_rows_and_leaves_them_in(run: Run) -> None:
    rows = [
        *pairs(30),
        pair(50, rejected="yes"),
        pair(3),
        pair(4, chosen="no", rejected="yes"),
    ]
    done = run(rows, policies={"equal_sides": "keep", "duplicate": "keep", "contradiction": "keep"})
    assert len(done.rows) == len(rows)
    checks = done.report.checks
    assert (checks["equal_sides"].count, [row for _, row in checks["equal_sides"].rows]) == (1, [30])
    assert [row for _, row in checks["duplicate"].rows] == [31]
    assert [row for _, row in checks["contradiction"].rows] == [4, 32]


@pytest.mark.parametrize(
    ("policy", "extra", "row"),
    [
        ("equal_sides", pair(50, rejected="yes"), 30),
        ("duplicate", pair(3), 30),
        ("longer_chosen", pair(50, rejected="noo"), 0),
        ("malformed", {"prompt": "q"}, 30),
        ("chat_markers", pair(50, chosen="a</s>"), 30),
    ],
)
def test_error_stops_and_names_check_file_and_rows(run: Run, policy: str, extra: Any, row: int) -> None:
    with pytest.raises(
        DataError,
        match=rf"rows.json: \d+ examples? fails? the check {policy} \(rows {row}.* data.checks.{policy} is error",
    ):
        run([*pairs(30), extra], policies={policy: "error"})


# --- K answers ----------------------------------------------------------------------------


def ranked(number: int, ranks: Sequence[int], **changes: Any) -> dict[str, Any]:
    answers = [f"answer {index}" for index in range(len(ranks))]
    return {"prompt": f"question {number}", "completions": answers, "ranks": list(ranks)} | changes


def rankings_of(done: Converted) -> list[dict[str, Any]]:
    files = (done.folder / f"{split}.ranking.parquet" for split in SPLITS)
    return [row for file in files for row in pl.read_parquet(file, glob=False).to_dicts()]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        ("all", {("1", "0"), ("1", "2"), ("1", "3"), ("0", "3"), ("2", "3")}),
        ("adjacent", {("1", "0"), ("1", "2"), ("0", "3"), ("2", "3")}),
        ("best_vs_worst", {("1", "3")}),
    ],
)
def test_rankings_are_written_with_the_pairs_of_the_scheme(
    run: Run, scheme: str, expected: set[tuple[str, str]]
) -> None:
    done = run([ranked(number, [2, 1, 2, 3]) for number in range(30)], pairs=scheme)
    for split in SPLITS:
        table = pl.read_parquet(done.folder / f"{split}.ranking.parquet", glob=False)
        assert table.schema == columns_of(RANKING_SCHEMA)
        rankings = pq.read_table(done.folder / f"{split}.ranking.parquet")
        assert rankings.num_rows == done.report.num_rankings[split] > 0
        assert rankings["ranks"].to_pylist() == [[1, 2, 2, 3]] * rankings.num_rows
        best_first = [[answer[0]["content"] for answer in row] for row in rankings["completions"].to_pylist()]
        assert set(map(tuple, best_first)) == {("answer 1", "answer 0", "answer 2", "answer 3")}
        assert set(rankings["group"].to_pylist()) == set(done.tables[split]["group"])
    pairs = {(row["chosen"][0]["content"][-1], row["rejected"][0]["content"][-1]) for row in done.rows}
    assert pairs == expected
    assert len(done.rows) == 30 * len(expected)
    assert done.report.num_used == done.report.num_read == 30
    assert done.report.num_ties == 30


def test_a_ranking_without_a_winner_is_a_tie(run: Run) -> None:
    done = run([*(ranked(number, [1, 2]) for number in range(30)), ranked(40, [1, 1, 1])])
    assert (done.reasons, done.report.num_rejected_rows) == (["tie"], 1)


def test_pairs_alone_make_no_ranking(run: Run) -> None:
    done = run(pairs(30))
    assert sorted(path.name for path in done.folder.iterdir()) == ["eval.parquet", "train.parquet"]


# --- several sources ----------------------------------------------------------------------


def test_sources_are_read_in_order_and_a_repeat_names_the_other_file(run: Run) -> None:
    one = lines_file("one.jsonl", pairs(30))
    two = lines_file("two.jsonl", pairs(50, 25))
    done = run(sources=[PreferenceSource(path=one), PreferenceSource(path=two)])
    assert [account.num_rows for account in done.report.files] == [30, 25]
    assert [(r["file"], r["row"], r["detail"]) for r in done.rejects] == [
        (two, row, f"repeats row {row + 25} of {one}") for row in range(5)
    ]
    assert {row["source"] for row in done.rows} == {"one.jsonl", "two.jsonl"}


def test_a_pattern_stands_for_its_files_in_order(run: Run) -> None:
    folder = Path("na[me] 数据")  # brackets are no pattern
    (folder / "part-3.jsonl").mkdir(parents=True)
    lines_file(f"{folder}/part-2.jsonl", [ranked(number, [1, 2]) for number in range(20, 30)])
    for number in (0, 1):
        lines_file(f"{folder}/part-{number}.jsonl", [pair(number * 10 + at) for at in range(10)])
    done = run(sources=[PreferenceSource(path=str(folder / "part-*.jsonl"))])
    assert [account.path.name for account in done.report.files] == [f"part-{number}.jsonl" for number in range(3)]
    assert [list(account.formats) for account in done.report.files] == [["pairs"], ["pairs"], ["kwise"]]
    assert len(done.rows) == 30
    with pytest.raises(DataError, match="no file has such a name"):
        run(sources=[PreferenceSource(path=str(folder / "nothing-*.jsonl"))])


def test_a_weight_takes_whole_prompts_of_train_and_lists_the_others(run: Run) -> None:
    rows = [pair(number, chosen=f"yes {more}") for number in range(300) for more in range(2)]
    whole, half = run(rows), run(rows, weight=0.5)
    assert half.tables["eval"].equals(whole.tables["eval"])
    assert set(half.reasons) == {"sampled_out"}
    assert len(half.rows) + len(half.rejects) == len(rows) == half.report.num_read
    taken = half.tables["train"]["group"].value_counts()["count"]
    assert set(taken) == {2}
    assert 0.4 < half.tables["train"].height / whole.tables["train"].height < 0.6
    quarter = run(rows, weight=0.25)
    assert set(quarter.tables["train"]["id"]) < set(half.tables["train"]["id"])


def test_a_weight_above_one_repeats_rows_of_train(run: Run) -> None:
    rows = pairs(300)
    whole, more = run(rows), run(rows, weight=2.5)
    assert more.tables["eval"].equals(whole.tables["eval"])
    counts = more.tables["train"]["id"].value_counts()["count"]
    assert set(counts) == {2, 3}
    assert more.report.num_used == 300
    assert more.report.num_written["train"] == counts.sum()


def test_a_source_may_be_one_split_and_a_shared_prompt_leaves_train(run: Run) -> None:
    one = lines_file("train.jsonl", pairs(30))
    two = lines_file("test.jsonl", [pair(number, chosen="surely") for number in range(25, 35)])
    done = run(sources=[PreferenceSource(path=one, split="train"), PreferenceSource(path=two, split="eval")])
    assert (done.tables["train"].height, done.tables["eval"].height) == (25, 10)
    assert done.reasons == ["shared_prompt"] * 5
    assert done.rejects[0]["detail"] == f"has the prompt of the held-out row 0 of {two}"
    assert not set(done.tables["train"]["group"]) & set(done.tables["eval"]["group"])


def test_answers_of_a_conversation_may_all_be_examples(run: Run) -> None:
    turns = [{"role": role, "content": f"{role} {turn}"} for turn in range(3) for role in ("user", "assistant")]
    rows = [{"messages": [user(f"hi {number}"), *turns[1:]]} for number in range(30)]
    path = lines_file("chats.jsonl", rows)
    last = run(sources=[SftSource(path=path)])
    every = run(sources=[SftSource(path=path, turns="all")])
    assert (len(last.rows), len(every.rows)) == (30, 90)
    assert {row["id"] for row in last.rows} < {row["id"] for row in every.rows}
    assert every.report.num_used == 30
    for split in SPLITS:  # the answers of a conversation stay together
        openings = [{prompt[0]["content"] for prompt in run.tables[split]["prompt"]} for run in (every, last)]
        assert openings[0] == openings[1]


def test_rows_that_a_weight_leaves_out_repeat_and_contradict_nothing(run: Run) -> None:
    rows = pairs(200)
    one, two = lines_file("one.jsonl", rows), lines_file("two.jsonl", rows)
    done = run(sources=[PreferenceSource(path=one, weight=0.5), PreferenceSource(path=two)])
    assert {row["prompt"][0]["content"] for row in done.rows} == {row["prompt"] for row in rows}
    other = [pair(number, chosen="no", rejected="yes") for number in range(200)]
    turned = lines_file("turned.jsonl", other)
    done = run(sources=[PreferenceSource(path=one), PreferenceSource(path=turned, split="train", weight=1e-9)])
    train = {row["id"] for row in done.tables["train"].to_dicts()}
    assert len(train) == run(sources=[PreferenceSource(path=one)]).tables["train"].height


def test_max_rows_is_of_the_source_not_of_each_file(run: Run) -> None:
    for number in range(3):
        lines_file(f"part-{number}.jsonl", [pair(number * 20 + at) for at in range(20)])
    report = run(sources=[PreferenceSource(path="part-*.jsonl", max_rows=30)]).report
    assert [account.num_rows for account in report.files] == [20, 10]
    assert (report.num_read, [account.num_used for account in report.files]) == (30, [20, 10])
    assert [account.stopped for account in report.files] == [False, True]


# --- nothing to write ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([pair(1, chosen=""), pair(2, rejected="yes")], "all 2 rows were left out: empty_chosen 1, equal_sides 1"),
        ([], "all 0 rows were left out: it holds none"),
    ],
)
def test_a_file_without_a_usable_row_is_refused_with_the_reasons(run: Run, rows: list[Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        run(rows, format="pairs")


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "eval"), (1 - 1e-9, "train")])
def test_an_empty_split_is_refused_with_the_setting(run: Run, fraction: float, split: str) -> None:
    with pytest.raises(DataError, match=rf"no row fell into the {split} split .*change data.eval_fraction, now"):
        run(pairs(5), fraction=fraction)


def test_a_broken_line_in_another_process_is_named_with_its_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(lines_file("rows.jsonl", pairs(500)))
    lines = path.read_text().split("\n")
    lines[400] = lines[400][:-1]
    path.write_text("\n".join(lines))
    monkeypatch.setattr(json_text, "BLOCK", 2000)
    monkeypatch.setattr(convert_module, "_BYTES_WORTH_A_POOL", 0)
    with pytest.raises(DataError, match=r"rows.jsonl, line 401, column \d+: broken JSON"):
        run(sources=[PreferenceSource(path=str(path))], workers=2)


# --- memory -------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_file(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a few blocks are alive at a time, however many there are."""
    alive, most = 0, 0

    class Block(list[Any]):
        def __init__(self, *values: Any) -> None:
            nonlocal alive, most
            super().__init__(*values)
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    monkeypatch.setattr(files, "_RECORDS_A_BLOCK", 10)
    read = convert_module.read_blocks
    monkeypatch.setattr(convert_module, "read_blocks", lambda *a: (Block(block) for block in read(*a)))
    report = run(pairs(1000)).report
    assert report.num_read == 1000
    assert most <= 4


# --- rankings and checks --------------------------------------------------------------------


def test_a_ranking_is_written_without_the_answers_that_checks_drop(run: Run) -> None:
    odd = ranked(40, [1, 2, 3, 4], completions=["x", "", "x", "y"])
    done = run([*(ranked(number, [1, 2]) for number in range(30)), odd])
    assert [(r["part"], r["reason"]) for r in done.rejects] == [
        ("answer 2", "empty_rejected"),
        ("answer 3", "equal_sides"),
    ]
    rankings = rankings_of(done)
    (written,) = [row for row in rankings if row["prompt"][0]["content"] == "question 40"]
    assert [answer[0]["content"] for answer in written["completions"]] == ["x", "y"]
    assert written["ranks"] == [1, 4]


def test_the_best_is_compared_with_the_worst_that_says_something(run: Run) -> None:
    rows = [ranked(number, [1, 2, 3], completions=["a", "b", ""]) for number in range(30)]
    done = run(rows, pairs="best_vs_worst")
    assert {(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in done.rows} == {("a", "b")}
    assert done.report.num_used == 30


def test_rankings_that_contradict_each_other_are_left_out(run: Run) -> None:
    rows = [ranked(number, [1, 2, 3]) for number in range(30)]
    done = run([*rows, ranked(4, [1, 3, 2]), ranked(5, [1, 2])])
    assert set(done.reasons) == {"contradiction", "duplicate"}
    rankings = rankings_of(done)
    assert "question 4" not in [row["prompt"][0]["content"] for row in rankings]
    assert sum(done.report.num_rankings.values()) == len(rankings) == 29


# --- processes ------------------------------------------------------------------------------


def test_a_process_that_is_ended_is_said_to_be(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = lines_file("rows.jsonl", pairs(500))
    monkeypatch.setattr(convert_module, "_BYTES_WORTH_A_POOL", 0)
    monkeypatch.setattr(workers_module, "_begin_worker", os.abort)  # it takes no arguments, and fails
    with pytest.raises(MachineError, match=r"rows.jsonl: a conversion process was killed.*runtime.workers to 1"):
        run(sources=[PreferenceSource(path=path)], workers=2)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
def test_processes_end_with_the_one_that_began_them(tmp_path: Path) -> None:
    """Killed outright, the conversion leaves nobody behind."""
    path = lines_file("rows.jsonl", [pair(number, chosen="yes " * 500) for number in range(20_000)])
    code = (
        "import sys; from pathlib import Path; from dpo_cli.data import convert as c\n"
        "from dpo_cli.data.plan import Treatment\n"
        "from dpo_cli.core.data_params import *\n"
        "if __name__ == '__main__':\n"
        "    work = Path(sys.argv[2]); work.mkdir()\n"
        "    c.convert([PreferenceSource(path=sys.argv[1])], Treatment(DataChecks().model_dump(), 0.1), work, None,"
        " work / 'r', workers=2, on_bytes=lambda n: print(n, flush=True))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script), path, str(tmp_path / "work")], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(5):
        process.stdout.readline()
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    process.stdout.close()
    assert children
    _, alive = psutil.wait_procs(children, timeout=20)
    assert alive == []
