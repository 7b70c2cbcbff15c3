"""Parquet and Arrow: rows as JSON has them, and damage that is named, with or without checksums."""

from __future__ import annotations

import datetime
import io
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_cli.data.reading.base import Record
from dpo_cli.data.reading.files import read_records

# --- columnar ----------------------------------------------------------------------------------


Read = Callable[..., list[Record]]


Message = Callable[..., str]


ROWS: list[dict[str, Any]] = [
    {
        "id": i,
        "messages": [{"role": "user", "content": f"问 {i} 😀\n"}, {"role": "assistant", "content": "x" * (i % 7)}][
            : i % 3
        ],
        "meta": {"score": i / 3, "tags": ["a", None] if i % 2 else None},
        "text": None if i % 5 == 0 else f"text {i}",
    }
    for i in range(60)
]


def as_parquet(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **{"row_group_size": 16, "write_page_checksum": True, **options})
    return file.getvalue()


def as_file(table: pa.Table, new: Any = pa.ipc.new_file, **options: Any) -> bytes:
    file = io.BytesIO()
    with new(file, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table, max_chunksize=16)
    return file.getvalue()


def as_stream(table: pa.Table, **options: Any) -> bytes:
    return as_file(table, pa.ipc.new_stream, **options)


FORMS = [as_parquet, as_file, as_stream]


TABLE = pa.Table.from_pylist(ROWS)


def values(records: list[Record]) -> list[Any]:
    return [record.value for record in records]


@pytest.mark.parametrize("write", FORMS)
def test_nested_rows_come_as_they_were_written_over_all_groups(read: Read, write: Any) -> None:
    records = read(write(TABLE))
    assert values(records) == ROWS
    assert [record.row for record in records] == list(range(60))
    assert {record.line for record in records} == {None}


@pytest.mark.parametrize("write", FORMS)
def test_other_types_of_text_and_lists_are_texts_and_lists(read: Read, write: Any) -> None:
    rows = [{"d": "a", "l": ["x"], "t": "u", "f": [1, 2]}, {"d": None, "l": [], "t": "", "f": [3, 4]}] * 10
    schema = pa.schema(
        [
            ("d", pa.dictionary(pa.int8(), pa.string())),
            ("l", pa.large_list(pa.large_string())),
            ("t", pa.string_view()),
            ("f", pa.list_(pa.int32(), 2)),
        ]
    )
    assert values(read(write(pa.Table.from_pylist(rows, schema)))) == rows


@pytest.mark.parametrize("write", FORMS)
def test_times_and_decimals_are_texts_wherever_they_are(read: Read, write: Any) -> None:
    time = datetime.datetime(2024, 5, 1, 12)
    table = pa.table(
        {
            "when": pa.array([1, None], pa.timestamp("ns")),
            "day": [time.date(), None],
            "zone": pa.array([time, None], pa.timestamp("us", "UTC")),
            "price": [Decimal("1.50"), None],
            "log": [[{"at": time, "what": "x"}], []],
            "bytes": [b"\xff", None],
        }
    )
    first, second = values(read(write(table)))
    assert first == {
        "when": "1970-01-01 00:00:00.000000001",
        "day": "2024-05-01",
        "zone": "2024-05-01 12:00:00.000000Z",
        "price": "1.50",
        "log": [{"at": "2024-05-01 12:00:00.000000", "what": "x"}],
        "bytes": b"\xff",
    }
    assert second == {**dict.fromkeys(first), "log": []}


def test_what_datasets_saves_to_disk_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    assert values(list(read_records(file))) == ROWS


@pytest.mark.parametrize("write", [as_parquet, as_stream])
def test_a_file_without_rows_has_none(read: Read, write: Any) -> None:
    assert read(write(TABLE.slice(0, 0))) == []


@pytest.mark.parametrize("write", FORMS)
def test_a_list_inside_each_row_may_be_the_rows(read: Read, message: Message, write: Any) -> None:
    records = read(write(TABLE), "messages")
    assert values(records) == [turn for row in ROWS for turn in row["messages"]]
    assert [record.row for record in records] == list(range(len(records)))
    assert message(write(TABLE), "meta.tags") == "row 0: records: there is no list at 'meta.tags'"


@pytest.fixture
def pool() -> Iterator[pa.MemoryPool]:
    """What Arrow allocates during the test."""
    before = pa.default_memory_pool()
    pool = pa.proxy_memory_pool(before)
    pa.set_memory_pool(pool)
    yield pool
    pa.set_memory_pool(before)


LARGE = pa.table({"a": [f"{i:08d}" * 125 for i in range(20_000)], "b": [["x" * 100, str(i)] for i in range(20_000)]})


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dictionary": False}, {"row_group_size": 1000}, {"compression": "snappy"}],
    ids=["one group", "plain", "many groups", "packed"],
)
def test_memory_does_not_grow_with_a_parquet_file(tmp_path: Path, pool: pa.MemoryPool, options: dict[str, Any]) -> None:
    path = tmp_path / "data"
    path.write_bytes(as_parquet(LARGE, **{"compression": "none", "row_group_size": 1 << 20, **options}))
    assert peak_of(path, pool) < 7e6 < LARGE.nbytes / 3


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_memory_does_not_grow_with_an_arrow_file(tmp_path: Path, pool: pa.MemoryPool, new: Any) -> None:
    path = tmp_path / "data"
    with new(str(path), LARGE.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(LARGE, max_chunksize=1000)
    assert peak_of(path, pool) < 4e6 < LARGE.nbytes / 5


def peak_of(path: Path, pool: pa.MemoryPool) -> int:
    before, peak, num_rows = pool.bytes_allocated(), 0, 0
    for _ in read_records(path):
        num_rows += 1
        if num_rows % 100 == 0:
            peak = max(peak, pool.bytes_allocated() - before)
    assert num_rows == 20_000
    return peak


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


@pytest.mark.parametrize(("write", "name"), [(as_parquet, "parquet"), (as_file, "Arrow"), (as_stream, "Arrow")])
def test_a_file_that_is_cut_off_is_named(message: Message, write: Any, name: str) -> None:
    data = write(TABLE)
    for keep in (8, 20, 300, len(data) // 2, len(data) - 20, len(data) - 9, len(data) - 8, len(data) - 1):
        text = message(data[:keep])
        assert text.startswith(f"is a damaged {name} file, after row ")
        assert text.endswith("; fetch it again")


def test_a_stream_that_is_cut_off_between_two_batches_is_named(message: Message) -> None:
    first = as_stream(TABLE.slice(0, 16))[:-8]
    assert as_stream(TABLE).startswith(first)
    assert message(first) == "is a damaged Arrow file, after row 16: it is cut off; fetch it again"


def test_a_stream_whose_end_comes_too_early_is_named(message: Message) -> None:
    data = as_stream(TABLE)
    place = len(as_stream(TABLE.slice(0, 16))) - 8
    assert "after row 16: there is more behind its end" in message(data[: place + 4] + bytes(4) + data[place + 8 :])
    assert "after row 60: there is more behind its end" in message(data + b"\0")


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_page_with_a_wrong_checksum_is_named(message: Message, version: str) -> None:
    data = as_parquet(
        TABLE, compression="none", use_dictionary=False, data_page_version=version, write_statistics=False
    )
    for text in (b"text 7", b"text 59", "问 40".encode()):
        assert "checksum" in message(flipped(data, data.index(text) + len(text) - 1))


def test_text_that_is_not_utf_8_is_named(message: Message) -> None:
    for write in (as_stream, lambda table: as_parquet(table, write_page_checksum=False, compression="none")):
        data = write(TABLE).replace("问 40".encode(), b"\xff" + "问 40".encode()[1:])
        assert "after row " in message(data)


def test_what_arrow_cannot_do_is_not_called_damage(message: Message, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise pa.ArrowNotImplementedError("Support for codec 'lzo' not built")

    monkeypatch.setattr(pq, "ParquetFile", refuse)
    assert message(as_parquet(TABLE)) == (
        "is a parquet file that cannot be read, after row 0: Support for codec 'lzo' not built; fetch it again,"
        " or save it as JSON lines"
    )


def test_columns_of_one_name_are_refused(message: Message) -> None:
    table = pa.table([pa.array([1]), pa.array([2])], names=["a", "a"])
    for write in FORMS:
        assert "twice" in message(write(table))


def test_an_arrow_file_whose_two_schemas_differ_is_named(message: Message) -> None:
    data = as_file(TABLE)
    for place in (data.index(b"role"), data.rindex(b"role")):
        assert "do not agree" in message(flipped(data, place))


def test_times_in_maps_lists_of_fixed_size_and_dictionaries_are_texts_and_maps_are_objects(read: Read) -> None:
    day = datetime.date(2024, 1, 2)
    table = pa.table(
        {
            "map": pa.array([[("a", day), ("b", None), ("a", day)]], pa.map_(pa.string(), pa.date32())),
            "fixed": pa.array([[day]], pa.list_(pa.date32(), 1)),
            "named": pa.array([day]).dictionary_encode(),
        }
    )
    expected = [{"map": {"a": "2024-01-02", "b": None}, "fixed": ["2024-01-02"], "named": "2024-01-02"}]
    for write in FORMS:
        assert values(read(write(table))) == expected


TREES: list[dict[str, Any]] = [
    {
        "tools": [{"function": {"name": "add", "parameters": {"properties": {"x": {"enum": [1]}}}}}],
        "turn": {"role": "assistant", "call": {"name": "add", "arguments": {"x": 1}}},
        "meta": {"lang": "en", "note": None},
    },
    {
        "tools": [{"function": {"name": "say", "parameters": {"properties": {}}}}, {"function": {"name": "go"}}],
        "turn": {"role": "assistant", "call": {"name": "say", "arguments": {"text": "hi"}}},
        "meta": {"lang": "de", "note": "x"},
    },
]


@pytest.mark.parametrize("write", FORMS)
def test_objects_within_objects_have_no_keys_of_other_rows(read: Read, write: Any) -> None:
    """Arrow gives every object the keys of all rows; a column's own objects keep theirs, which are read by name."""
    assert values(read(write(pa.Table.from_pylist(TREES)))) == TREES
    deep = [{"a": [[{"b": {"c": [{"d": 1}, {"e": [None, 2]}]}}]]}, {"a": None}, {"a": [None, [{"b": None}]]}]
    assert values(read(write(pa.Table.from_pylist(deep)))) == deep


@pytest.mark.parametrize("write", FORMS)
def test_a_null_in_a_map_is_a_value(read: Read, write: Any) -> None:
    kind = pa.struct([("call", pa.struct([("args", pa.map_(pa.string(), pa.string())), ("id", pa.string())]))])
    table = pa.table({"turn": pa.array([{"call": {"args": [("x", None)], "id": None}}], kind)})
    assert values(read(write(table))) == [{"turn": {"call": {"args": {"x": None}}}}]


def test_rows_behind_the_dictionaries_that_no_footer_names_are_damage(message: Message, tmp_path: Path) -> None:
    """polars writes dictionaries behind the rows; a batch of rows behind them is one too many."""
    file = io.BytesIO()
    pl.DataFrame({"a": ["x", "y"]}, schema={"a": pl.Enum(["x", "y"])}).write_ipc(file)
    data = file.getvalue()
    footer = len(data) - 10 - int.from_bytes(data[-10:-6], "little")
    begin, end = next(
        (start, start + length)
        for start in range(8, footer, 8)
        for length in range(8, 400, 8)
        if data[start : start + 4] == b"\xff\xff\xff\xff" and _is_batch(data[start : start + length])
    )
    assert "some that its footer does not name" in message(data[: footer - 8] + data[begin:end] + data[footer - 8 :])


def _is_batch(data: bytes) -> bool:
    try:
        return pa.ipc.read_message(data).type == "record batch"
    except (pa.ArrowException, EOFError, OSError):
        return False


# --- parquet_footer ----------------------------------------------------------------------------


NUMBERS = list(range(1000, 1060))


NESTED = pa.table({"text": ["x" * 1000] * 60, "messages": [[{"role": "user", "content": "x"}] * 2, []] * 30})


def footer_of(data: bytes) -> tuple[pq.FileMetaData, int]:
    """A footer as pyarrow reads it, and where it begins."""
    footer = pq.ParquetFile(io.BytesIO(data)).metadata
    return footer, len(data) - 8 - footer.serialized_size


@pytest.mark.parametrize("options", [{}, {"store_schema": False}])
def test_a_column_that_is_named_in_two_ways_is_named(message: Message, options: dict[str, Any]) -> None:
    data = as_parquet(NESTED, use_dictionary=False, **options)
    _, place = footer_of(data)
    found = 0
    while (place := data.find(b"role", place)) >= 0:
        assert "do not agree" in message(flipped(data, place + 1))
        place += 1
        found += 1
    assert found > 3


def test_another_number_of_rows_is_named(message: Message) -> None:
    data = as_parquet(pa.table({"a": NUMBERS}), use_dictionary=False)
    changed = data.replace(b"\x16\x78\x19", b"\x16\x76\x19")  # field 3: 2 * 60; then a list
    assert changed != data
    assert "its row groups have 60 rows where the footer says 59" in message(changed)


def test_a_column_that_is_taken_from_another_place_is_named(message: Message) -> None:
    data = as_parquet(pa.table({"a": NUMBERS}), use_dictionary=False, compression="none")
    footer, begin = footer_of(data)
    second, third = (offset_in_footer(footer.row_group(i).column(0).data_page_offset) for i in (1, 2))
    changed = data[:begin] + data[begin:].replace(third, second)
    rows = pq.ParquetFile(io.BytesIO(changed)).read()["a"].to_pylist()
    assert rows[32:48] == rows[16:32]
    assert "its columns overlap" in message(changed)


def offset_in_footer(offset: int) -> bytes:
    """The field of a page's offset, as the footer has it: its number and type, then 2 * offset in two bytes."""
    return bytes([0x26, offset * 2 & 127 | 128, offset * 2 >> 7])
