"""Conversion: every row is written once or accounted for, and memory does not grow with the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.data import convert as convert_module
from dpo_cli.data import world
from dpo_cli.data.checks import check_preference, check_sft
from dpo_cli.data.convert import Conversion, Kind, convert, convert_stage
from dpo_cli.data.formats import PREFERENCE_FORMATS, SFT_FORMATS
from dpo_cli.data.schema import PREFERENCE_SCHEMA, SFT_SCHEMA
from dpo_cli.data.splits import is_held_out

PAIRS: Kind[Any] = Kind(PREFERENCE_FORMATS, check_preference, PREFERENCE_SCHEMA)
SFT: Kind[Any] = Kind(SFT_FORMATS, check_sft, SFT_SCHEMA)
FRACTION = 0.3


def pair(number: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"question {number}", "chosen": "yes", "rejected": "no"} | changes


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., tuple[Conversion, dict[str, pl.DataFrame]]]:
    """Convert rows; the account and the tables."""

    def run_convert(
        rows: list[Any], kind: Kind[Any] = PAIRS, format_name: str = "auto", fraction: float = FRACTION
    ) -> tuple[Conversion, dict[str, pl.DataFrame]]:
        source = tmp_path / "rows.json"
        source.write_text(json.dumps(rows), encoding="utf-8")
        folder = tmp_path / "out"
        folder.mkdir(exist_ok=True)
        report = convert(source, kind, format_name, fraction, folder)
        assert sorted(path.name for path in folder.iterdir()) == ["eval.parquet", "train.parquet"]
        tables = {split: pl.read_parquet(folder / f"{split}.parquet") for split in ("train", "eval")}
        return report, tables

    return run_convert


def test_rows_are_written_to_the_side_of_their_prompt(run: Callable[..., Any]) -> None:
    report, tables = run([pair(number) for number in range(50)])
    assert (report.num_read, sum(report.num_written.values()), report.rejects) == (50, 50, [])
    for split, table in tables.items():
        assert table.schema == pl.Schema(PREFERENCE_SCHEMA)
        assert table.height == report.num_written[split] > 0
        assert {is_held_out(prompt, FRACTION) for prompt in table["prompt"].to_list()} == {split == "eval"}
    prompts = [row[0]["content"] for table in tables.values() for row in table["prompt"].to_list()]
    assert sorted(prompts) == sorted(f"question {number}" for number in range(50))


def test_rows_keep_their_order_across_parts(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [pair(number) for number in range(50)]
    _, whole = run(rows)
    monkeypatch.setattr(convert_module, "_ROWS_A_PART", 3)
    _, parts = run(rows)
    assert all(whole[split].equals(parts[split]) for split in ("train", "eval"))
    numbers = [int(prompt[0]["content"].split()[1]) for prompt in parts["train"]["prompt"].to_list()]
    assert numbers == sorted(numbers)


def test_converting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([pair(number) for number in range(50)]), encoding="utf-8")
    contents = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        convert(source, PAIRS, "auto", FRACTION, tmp_path / name)
        contents.append([(tmp_path / name / f"{split}.parquet").read_bytes() for split in ("train", "eval")])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("format_name", ["auto", "pairs"])
def test_every_row_is_written_or_listed_with_its_reason(run: Callable[..., Any], format_name: str) -> None:
    odd = [
        pair(100, chosen=""),
        pair(101, rejected="  "),
        pair(102, prompt=""),
        pair(103, rejected="yes"),
        pair(104, chosen=None),
        pair(0),
        pair(105, chosen="\ud800"),
        "no object",
        pair(106, prompt=[{"role": "tool", "content": "x"}]),
    ]
    report, _ = run([pair(number) for number in range(30)] + odd, format_name=format_name)
    assert [reject["reason"] for reject in report.rejects] == [
        "empty_chosen",
        "empty_rejected",
        "empty_prompt",
        "equal_sides",
        "missing_field",
        "duplicate",
        "bad_unicode",
        "not_an_object",
        "unknown_role",
    ]
    assert [reject["row"] for reject in report.rejects] == list(range(30, 39))
    assert report.num_read == sum(report.num_written.values()) + len(report.rejects) == 39
    assert sum(report.num_rejected_by_reason.values()) == len(report.rejects)


def test_a_duplicate_row_is_counted_and_named(run: Callable[..., Any]) -> None:
    report, tables = run([*(pair(number) for number in range(30)), pair(7), pair(7, source="elsewhere")])
    assert [reject["detail"] for reject in report.rejects] == ["repeats row 7", "repeats row 7"]
    ids = pl.concat(list(tables.values()))["id"]
    assert ids.n_unique() == len(ids) == 30


def test_a_row_that_was_left_out_is_no_first_of_a_duplicate(run: Callable[..., Any]) -> None:
    report, _ = run([pair(90, chosen=""), pair(90, chosen=""), *(pair(number) for number in range(30))])
    assert report.num_rejected_by_reason == {"empty_chosen": 2}


def test_a_reject_names_file_row_and_line_and_nothing_of_the_content(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    lines = [json.dumps(pair(number)) for number in range(30)]
    lines.insert(2, "")
    lines.insert(5, json.dumps({"prompt": "secret", "chosen": "secret", "rejected": "secret "}))
    source.write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "out").mkdir()
    (reject,) = convert(source, PAIRS, "auto", FRACTION, tmp_path / "out").rejects
    assert reject == {
        "file": source.as_posix(),
        "row": 4,
        "line": 6,
        "reason": "equal_sides",
        "detail": "equal sides",
    }


def test_reasons_are_counted_most_frequent_first(run: Callable[..., Any]) -> None:
    odd = [pair(100, chosen=""), pair(101, rejected=""), pair(102, rejected=""), pair(103, rejected="")]
    report, _ = run(odd + [pair(number) for number in range(30)])
    assert list(report.num_rejected_by_reason.items()) == [("empty_rejected", 3), ("empty_chosen", 1)]


def test_where_the_data_is_written_does_not_matter(tmp_path: Path) -> None:
    """A project folder may have brackets in its name: they are no pattern."""
    source = tmp_path / "rows.json"
    source.write_text(json.dumps([pair(number) for number in range(30)]), encoding="utf-8")
    folder = tmp_path / "my [new] project"
    folder.mkdir()
    convert(source, PAIRS, "auto", FRACTION, folder)
    assert pl.read_parquet((folder / "train.parquet").read_bytes()).height > 0


# --- formats ------------------------------------------------------------------------------


def test_the_format_is_detected_and_says_why(run: Callable[..., Any]) -> None:
    report, _ = run([pair(number) for number in range(30)])
    assert report.format == "pairs"
    assert report.why == "30 of the first 30 rows have prompt (or instruction), chosen and rejected"


def test_the_format_of_most_rows_wins_and_the_others_are_accounted_for(run: Callable[..., Any]) -> None:
    other = {"conversations": [{"from": "human", "value": "q"}], "chosen": {}, "rejected": {}}
    report, _ = run([other] + [pair(number) for number in range(30)])
    assert (report.format, len(report.rejects)) == ("pairs", 1)


def test_a_named_format_is_not_questioned(run: Callable[..., Any]) -> None:
    report, _ = run([pair(number) for number in range(30)], format_name="pairs")
    assert (report.format, report.why) == ("pairs", "named in params.yaml")


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([{"question": "q", "answer": "a"}], "its first row has question, answer"),
        (["text"], "its first row has rows of type str"),
        ([], "its first row has no rows"),
        ([5, {"question": "q"}], "its first row has question"),
    ],
)
def test_an_unknown_format_says_what_is_there_and_what_is_known(
    run: Callable[..., Any], rows: list[Any], found: str
) -> None:
    with pytest.raises(DataError) as caught:
        run(rows)
    message = str(caught.value)
    assert f"unknown format: {found}" in message
    assert all(f"{reader.name}: {reader.fields}" in message for reader in PREFERENCE_FORMATS)


def test_rows_after_the_first_hundred_are_read_too(run: Callable[..., Any]) -> None:
    report, _ = run([pair(number) for number in range(250)])
    assert report.num_read == 250
    assert report.why.startswith("100 of the first 100 rows")


# --- nothing to write ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([pair(1, chosen=""), pair(2, rejected="yes")], "all 2 rows were left out: empty_chosen 1, equal_sides 1"),
        ([], "all 0 rows were left out: it holds none"),
    ],
)
def test_a_file_without_a_usable_row_is_refused_with_the_reasons(
    run: Callable[..., Any], rows: list[Any], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        run(rows, format_name="pairs")


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "eval"), (1 - 1e-9, "train")])
def test_an_empty_split_is_refused_with_the_knob(run: Callable[..., Any], fraction: float, split: str) -> None:
    with pytest.raises(DataError, match=rf"no row fell into the {split} split .*change data.eval_fraction, now"):
        run([pair(number) for number in range(5)], fraction=fraction)


# --- the stage's part ---------------------------------------------------------------------


def test_a_stage_publishes_tables_metrics_and_rejects(project: Path, reporter: Any) -> None:
    raw = project / "data" / "raw"
    raw.mkdir(parents=True)
    (raw / "sft.json").write_text(json.dumps(world.instruction_rows(0, 600)), encoding="utf-8")
    metrics = convert_stage("convert_sft", "data/raw/sft.json", SFT, "auto", FRACTION, Path("data/sft"), reporter)
    assert metrics["num_read"] == 600 == metrics["num_train"] + metrics["num_eval"] + metrics["num_rejected"]
    assert metrics["rejected"] == {"empty_completion": 2, "duplicate": 2}
    assert sorted(path.name for path in Path("data/sft").iterdir()) == ["eval.parquet", "train.parquet"]
    assert json.loads(Path("reports/convert_sft/metrics.json").read_text()) == {"convert_sft": metrics}
    rejects = [json.loads(line) for line in Path("reports/convert_sft/rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == metrics["num_rejected"]
    assert {reject["file"] for reject in rejects} == {"data/raw/sft.json"}
    table = dict(reporter.tables["convert_sft"])
    assert (table["rows read"], table["left out: duplicate"]) == ("600", "2")
    (meter,) = reporter.meters
    assert meter.done == meter.total == (raw / "sft.json").stat().st_size


def test_a_conversion_that_fails_leaves_the_tables_of_before(project: Path, reporter: Any) -> None:
    raw = project / "data" / "raw"
    raw.mkdir(parents=True)
    (raw / "pairs.json").write_text(json.dumps([pair(number) for number in range(30)])[:-9], encoding="utf-8")
    Path("data/preference").mkdir()
    Path("data/preference/train.parquet").write_text("old")
    with pytest.raises(DataError, match="the file seems cut off"):
        convert_stage(
            "convert_preferences", "data/raw/pairs.json", PAIRS, "auto", FRACTION, Path("data/preference"), reporter
        )
    assert Path("data/preference/train.parquet").read_text() == "old"
    assert not Path("reports").exists()


@pytest.mark.parametrize("path", ["elsewhere/rows.json", "data/raw/../rows.json", "/data/raw/rows.json", "data/raws/r"])
def test_a_file_that_dvc_does_not_watch_is_refused(project: Path, reporter: Any, path: str) -> None:
    with pytest.raises(ParamsError, match=r"data.preferences.path must lie under data/raw, which DVC watches"):
        convert_stage("convert_preferences", path, PAIRS, "auto", FRACTION, Path("data/preference"), reporter)
