"""The same pairs in files of many shapes: all are read, none is changed, and what nobody read is named."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_cli.core.data_params import DataChecks, PreferenceSource, SftSource
from dpo_cli.data.account import SPLITS
from dpo_cli.data.convert import convert
from dpo_cli.data.plan import Treatment
from dpo_cli.data.schema import assistant, user

TEXTS = [(f"q{number}: äö\n“中文” 😀", f'yes {number}, "so"', f"no; {number}\tx") for number in range(12)]
PLAIN = [{"id": at, "prompt": q, "chosen": a, "rejected": b} for at, (q, a, b) in enumerate(TEXTS)]
TURNS = [{"id": at, "messages": [user(q), assistant(a)], "rejected_response": b} for at, (q, a, b) in enumerate(TEXTS)]
ID = {"id": 12}
"""What nobody reads: an id in each of the rows."""


def lines(rows: Sequence[Any], end: str = "\n", **options: Any) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False, **options) + end for row in rows).encode()


def table(rows: Sequence[dict[str, Any]], delimiter: str = ",", quoting: Any = csv.QUOTE_MINIMAL) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def parquet(rows: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(rows, file, row_group_size=5)
    return file.getvalue()


def polars(rows: pl.DataFrame, write: Callable[[pl.DataFrame, io.BytesIO], Any]) -> bytes:
    file = io.BytesIO()
    write(rows, file)
    return file.getvalue()


def stream(rows: pa.Table) -> bytes:
    file = io.BytesIO()
    with pa.ipc.new_stream(file, rows.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
        writer.write_table(rows, max_chunksize=5)
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


TURN_MAP = pa.list_(pa.map_(pa.string(), pa.string()))
CHOICES = pl.Enum([a for _, a, _ in TEXTS])
VIEWS = pa.schema(
    [("id", pa.uint64()), ("prompt", pa.string_view()), ("chosen", pa.large_string()), ("rejected", pa.string())]
)
MAPPED = {"columns": {"prompt": "meta.ask", "chosen": "answers.0.text", "rejected": "answers.1.text"}}

SHAPES: dict[str, tuple[bytes, dict[str, Any], dict[str, int]]] = {
    "lines, byte order mark, CRLF, empty lines": (b"\xef\xbb\xbf\r\n" + lines(PLAIN, "\r\n\r\n \r\n"), {}, ID),
    "objects over several lines, gzip": (gzip.compress(lines(PLAIN, "", indent=2)), {}, ID),
    "an indented array, Zstandard": (zstd(json.dumps(PLAIN, indent=1).encode()), {}, ID),
    "a list deep in an object": (
        json.dumps({"v": 1, "data": {"train": PLAIN, "n": [[]]}}, indent=1).encode(),
        {"records": "data.train"},
        ID,
    ),
    "equal names, of which the last one counts": (lines(PLAIN).replace(b'{"id"', b'{"chosen": "old", "id"'), {}, ID),
    "columns of which few rows have something": (
        lines([row | {"note": "n" if row["id"] < 3 else None, "tags": [], "x": {}} for row in PLAIN]),
        {},
        ID | {"note": 3},
    ),
    "CSV, all quoted, with line ends within": (table(PLAIN, quoting=csv.QUOTE_ALL), {}, ID),
    "TSV": (table(PLAIN, "\t"), {}, ID),
    "CSV with messages as JSON": (
        table(
            [
                {
                    "id": row["id"],
                    "chosen": json.dumps(row["messages"]),
                    "rejected": json.dumps([row["messages"][0], assistant(row["rejected_response"])]),
                }
                for row in TURNS
            ]
        ),
        {},
        ID,
    ),
    "parquet with structs in lists": (parquet(pa.Table.from_pylist(TURNS)), {}, ID),
    "parquet with maps in lists": (
        parquet(
            pa.table(
                {
                    "id": range(12),
                    "messages": pa.array([[list(turn.items()) for turn in row["messages"]] for row in TURNS], TURN_MAP),
                    "rejected_response": [row["rejected_response"] for row in TURNS],
                }
            )
        ),
        {},
        ID,
    ),
    "parquet with a struct of which a part is read": (
        parquet(
            pa.Table.from_pylist(
                [
                    {"meta": {"ask": q, "lang": "de"}, "answers": [{"text": a, "by": "m"}, {"text": b, "by": "n"}]}
                    for q, a, b in TEXTS
                ]
            )
        ),
        MAPPED,
        {"meta.lang": 12, "answers.0.by": 12, "answers.1.by": 12},
    ),
    "Arrow stream, compressed, with views and large texts": (stream(pa.Table.from_pylist(PLAIN, VIEWS)), {}, ID),
    "Arrow by polars, with an enum and a category": (
        polars(
            pl.DataFrame(PLAIN, schema_overrides={"chosen": CHOICES, "rejected": pl.Categorical}),
            pl.DataFrame.write_ipc,
        ),
        {},
        ID,
    ),
    "parquet by polars, with times and decimals": (
        polars(
            pl.DataFrame(PLAIN).with_columns(
                at=pl.lit("2024-01-02").str.to_date(), cost=pl.lit("1.50").str.to_decimal(scale=2)
            ),
            pl.DataFrame.write_parquet,
        ),
        {},
        ID | {"at": 12, "cost": 12},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_pairs_of_a_file_are_all_read_and_its_other_columns_named(shape: str, tmp_path: Path) -> None:
    data, settings, unread = SHAPES[shape]
    path = tmp_path / "rows"
    path.write_bytes(data)
    for name in ("work", "out"):
        (tmp_path / name).mkdir()
    source = PreferenceSource(path=str(path), **settings)
    policies = DataChecks().model_dump()
    report = convert([source], Treatment(policies, 0.5), tmp_path / "work", tmp_path / "out", tmp_path / "rejects")
    assert report.num_read == report.num_used == 12
    assert dict(report.files[0].unread) == unread
    rows = [row for split in SPLITS for row in pl.read_parquet(tmp_path / "out" / f"{split}.parquet").to_dicts()]
    pairs = {tuple(row[name][0]["content"] for name in ("prompt", "chosen", "rejected")) for row in rows}
    assert pairs == set(TEXTS)
    assert {len(row["prompt"]) for row in rows} == {1}


def calling(name: str, **arguments: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": name, "arguments": arguments}}]}


CALLS = [
    {
        "messages": [user("q"), calling("add", x=1)],
        "tools": [{"name": "add", "description": "Sum.", "parameters": {"properties": {"x": {"type": "integer"}}}}],
    },
    {
        "messages": [{"from": "human", "value": "r"}, calling("say", text="hi")],
        "tools": [{"name": "say", "parameters": {"properties": {"text": {"type": "string"}, "to": {"enum": ["me"]}}}}],
    },
]


@pytest.mark.parametrize("write", [parquet, stream])
def test_tools_calls_and_turns_are_the_same_in_json_and_in_arrow(tmp_path: Path, write: Any) -> None:
    """Arrow gives each object the keys of all rows; none of them reaches the model."""
    found = []
    for name, data in (("a.jsonl", lines(CALLS)), ("b", write(pa.Table.from_pylist(CALLS)))):
        path, work, out = tmp_path / name, tmp_path / f"{name}.work", tmp_path / f"{name}.out"
        path.write_bytes(data)
        work.mkdir()
        out.mkdir()
        convert([SftSource(path=str(path))], Treatment(DataChecks().model_dump(), 0.5), work, out, tmp_path / "rejects")
        rows = [row for split in SPLITS for row in pl.read_parquet(out / f"{split}.parquet").to_dicts()]
        found.append({row["id"]: (row["prompt"], row["completion"], row["tools"]) for row in rows})
    assert found[0] == found[1]
    assert len(found[0]) == 2
    assert "null" not in str(found)
