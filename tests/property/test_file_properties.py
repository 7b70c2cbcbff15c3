"""Files of every kind: what was written is read, and damage is an error or stays where it is.

Damage is one byte that is changed, lost or added anywhere, or all that follows a place lost.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from xxhash import xxh64_intdigest

from dpo_cli.core.errors import DataError
from dpo_cli.data.reading import json_text
from dpo_cli.data.reading.files import read_records

in_a_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
damaging = settings(in_a_folder, max_examples=3 * settings().max_examples)

MARKS = "\",;\t\n\r\\{}[]:'ae1 中😀\u2028\x85\x0b\x0c\x00\x7f\ufeff"
TEXT = st.text(st.sampled_from(MARKS) | st.characters(exclude_categories=("Cs",)), max_size=12)
BLOCKS = st.sampled_from([1, 2, 3, 7, 64, 1 << 20])


def zipped(data: bytes) -> bytes:
    """gzip, without the time."""
    return gzip.compress(data, mtime=0)


def read(path: Path, data: bytes, block: int = 1 << 20, within: str = "") -> list[Any]:
    path.write_bytes(data)
    with patch.object(json_text, "BLOCK", block):
        records = list(read_records(path, within=within))
    assert [record.row for record in records] == list(range(len(records)))
    return [record.value for record in records]


def read_or_refused(path: Path, data: bytes, block: int = 1 << 20, within: str = "") -> list[Any] | None:
    """The rows; None where there is an error, which must say where it is, in one line each."""
    try:
        return read(path, data, block, within)
    except DataError as error:
        assert all(problem.startswith(str(path)) and len(problem.splitlines()) == 1 for problem in error.problems)
        return None


# --- damage -----------------------------------------------------------------------------------------------------------


class Damage(NamedTuple):
    kind: str
    place: int
    data: bytes


@st.composite
def damage(draw: st.DrawFn, whole: bytes, begin: int = 0) -> Damage:
    """Damage to some bytes at ``begin`` or behind it; what it changes into is often a mark."""
    kind = draw(st.sampled_from(["change", "lose", "add", "cut"]))
    marks = [place for place in range(begin, len(whole)) if whole[place] in b'"\n\r,;\t\\{}[]:']
    places = st.integers(begin, len(whole) - 1)
    place = draw(st.sampled_from(marks) | places if marks else places)
    byte = draw(st.sampled_from([*MARKS.encode()]) | st.integers(0, 255))
    if kind == "change":
        assume(byte != whole[place])
        return Damage(kind, place, whole[:place] + bytes([byte]) + whole[place + 1 :])
    if kind == "lose":
        return Damage(kind, place, whole[:place] + whole[place + 1 :])
    if kind == "add":
        return Damage(kind, place, whole[:place] + bytes([byte]) + whole[place:])
    return Damage(kind, place, whole[:place])


def num_changed(rows: list[Any], got: list[Any]) -> int:
    assert len(got) == len(rows)
    return sum(one != other for one, other in zip(rows, got, strict=True))


# --- JSON -------------------------------------------------------------------------------------------------------------

NUMBERS = st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.dictionaries(TEXT, JSON, max_size=3), min_size=1, max_size=6)
JSON_FORMS = ["array", "indented", "lines", "crlf", "within"]


def render(rows: list[dict[str, Any]], form: str, ascii_only: bool = False) -> bytes:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    if form == "array":
        return f"[{','.join(lines)}]".encode()
    if form == "indented":
        return json.dumps(rows, ensure_ascii=ascii_only, indent=2).encode()
    if form == "within":
        return f'{{"version": 1, "data": {{"rows": [{", ".join(lines)}], "n": []}}, "end": {{}}}}\n'.encode()
    if form == "objects":
        return "\n".join(line.replace("{", "{\n", 1) for line in lines).encode()
    return ("\r\n" if form == "crlf" else "\n").join([*lines, ""]).encode()


def within(form: str) -> str:
    return "data.rows" if form == "within" else ""


@in_a_folder
@given(
    rows=ROWS,
    form=st.sampled_from([*JSON_FORMS, "objects"]),
    ascii_only=st.booleans(),
    mark=st.booleans(),
    compress=st.sampled_from([bytes, zipped, lambda data: pa.compress(data, "zstd", asbytes=True)]),
    block=BLOCKS,
)
def test_json_in_any_form_gives_its_rows(
    rows: list[dict[str, Any]],
    form: str,
    ascii_only: bool,
    mark: bool,
    compress: Callable[[bytes], bytes],
    block: int,
    tmp_path: Path,
) -> None:
    data = (b"\xef\xbb\xbf" if mark else b"") + render(rows, form, ascii_only)
    assert read(tmp_path / "rows", compress(data), block, within(form)) == rows


@damaging
@given(rows=ROWS, form=st.sampled_from(JSON_FORMS), ascii_only=st.booleans(), block=BLOCKS, data=st.data())
def test_damage_to_json_is_an_error_or_stays_in_one_row(
    rows: list[dict[str, Any]], form: str, ascii_only: bool, block: int, data: st.DataObject, tmp_path: Path
) -> None:
    """Holds for rows that are objects; two numbers could become one.

    A string, an object or an array that loses an end never closes again, since the number of
    quotes that are no text becomes odd, or brackets no longer match; and two objects without
    a line end between them are no JSON. What stays is a change within one row.
    """
    damaged = data.draw(damage(render(rows, form, ascii_only)))
    got = read_or_refused(tmp_path / "rows", damaged.data, block, within(form))
    if got is None:
        return
    if damaged.kind == "cut":
        assert got == (rows[: len(got)] if form in ("lines", "crlf") else rows)
    else:
        assert num_changed(rows, got) <= 1


# --- CSV and TSV ------------------------------------------------------------------------------------------------------

TABLE_TEXT = TEXT.map(lambda text: text.replace("\0", ""))
NAMES = TABLE_TEXT.map(lambda text: text.replace("\n", "")).filter(bool)
QUOTINGS: list[tuple[str, Any]] = [("\r\n", csv.QUOTE_MINIMAL), ("\r\n", csv.QUOTE_ALL), ("\n", csv.QUOTE_ALL)]


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[dict[str, str]], bytes, bytes]:
    """Rows, the header line and the lines below it."""
    names = draw(st.lists(NAMES, min_size=2, max_size=4, unique=True))
    rows = draw(st.lists(st.tuples(*[TABLE_TEXT] * len(names)), min_size=1, max_size=6))
    delimiter = draw(st.sampled_from(",;\t"))
    end, quoting = draw(st.sampled_from(QUOTINGS))
    header, body = io.StringIO(newline=""), io.StringIO(newline="")
    csv.writer(header, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL).writerow(names)
    csv.writer(body, delimiter=delimiter, lineterminator=end, quoting=quoting).writerows(rows)
    mark = "\ufeff" if draw(st.booleans()) else ""
    return (
        [dict(zip(names, row, strict=True)) for row in rows],
        (mark + header.getvalue()).encode(),
        body.getvalue().encode(),
    )


@in_a_folder
@given(table=tables(), compress=st.sampled_from([bytes, zipped]), block=BLOCKS)
def test_a_table_gives_its_rows(
    table: tuple[list[dict[str, str]], bytes, bytes], compress: Callable[[bytes], bytes], block: int, tmp_path: Path
) -> None:
    rows, header, body = table
    assert read(tmp_path / "rows", compress(header + body), block) == rows


@damaging
@given(table=tables(), block=BLOCKS, data=st.data())
def test_damage_to_a_table_is_an_error_or_stays_in_one_row(
    table: tuple[list[dict[str, str]], bytes, bytes], block: int, data: st.DataObject, tmp_path: Path
) -> None:
    """Holds below the header.

    Each quoted text has an even number of quotes and no other text has any, so one quote more
    or less makes the number in the file odd, which is an error at its end at the latest. With
    all quotes in their places, a delimiter or a line end more or less makes a line with another
    number of values than the header; a blank line is skipped, and only a row without a visible
    character can become one. A cut file may end within the last value of a row, which nothing shows.
    """
    rows, header, body = table
    damaged = data.draw(damage(header + body, begin=len(header)))
    got = read_or_refused(tmp_path / "rows", damaged.data, block)
    if got is None:
        return
    if damaged.kind == "cut":
        assert got[:-1] == rows[: len(got) - 1]
        *others, (last, whole) = zip(got[-1].values(), rows[len(got) - 1].values(), strict=True)
        assert all(text == before for text, before in others)
        assert whole.startswith(last)
    elif len(got) == len(rows):
        assert num_changed(rows, got) <= 1
    else:
        lost = [i for i in range(len(rows)) if rows[:i] + rows[i + 1 :] == got]
        assert any(not "".join(rows[i].values()).strip() for i in lost)


@damaging
@given(table=tables(), data=st.data())
def test_a_damaged_header_is_an_error_or_gives_rows_of_texts(
    table: tuple[list[dict[str, str]], bytes, bytes], data: st.DataObject, tmp_path: Path
) -> None:
    """All rows have the names of the header, so they may change; with two columns, the delimiter, too."""
    rows, header, body = table
    damaged = data.draw(damage(header))
    got = read_or_refused(tmp_path / "rows", damaged.data + (b"" if damaged.kind == "cut" else body))
    if got is None or damaged.kind == "cut":
        return
    if len(rows[0]) > 2:
        assert [list(row.values()) for row in got] == [list(row.values()) for row in rows]
    else:
        assert all(isinstance(text, str) for row in got for text in row.values())


# --- checksums --------------------------------------------------------------------------------------------------------


def zstd_with_checksum(data: bytes) -> bytes:
    """A Zstandard frame as the zstd program makes it."""
    frame = bytearray(pa.compress(data, "zstd", asbytes=True))
    frame[4] |= 4  # the flag in the frame's header
    return bytes(frame) + (xxh64_intdigest(data) & 0xFFFFFFFF).to_bytes(4, "little")


@damaging
@given(
    rows=ROWS,
    form=st.sampled_from(JSON_FORMS),
    compress=st.sampled_from([zipped, zstd_with_checksum]),
    data=st.data(),
)
def test_damage_to_compressed_data_with_a_checksum_is_an_error_or_changes_nothing(
    rows: list[dict[str, Any]], form: str, compress: Callable[[bytes], bytes], data: st.DataObject, tmp_path: Path
) -> None:
    whole = compress(render(rows, form))
    assert read(tmp_path / "rows", whole, within=within(form)) == rows
    damaged = data.draw(damage(whole))
    assert read_or_refused(tmp_path / "rows", damaged.data, within=within(form)) in (None, rows)


# --- parquet and Arrow ------------------------------------------------------------------------------------------------

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema([("text", pa.string()), ("number", pa.int64()), ("messages", pa.list_(MESSAGE))])
COLUMNAR_ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "text": st.none() | TEXT,
            "number": st.none() | st.integers(-(2**63), 2**63 - 1),
            "messages": st.none() | st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3),
        }
    ),
    min_size=1,
    max_size=12,
)


def as_parquet(rows: list[dict[str, Any]], group: int, **options: Any) -> bytes:
    file = io.BytesIO()
    table = pa.Table.from_pylist(rows, SCHEMA)
    pq.write_table(table, file, **{"row_group_size": group, "write_page_checksum": True, **options})
    return file.getvalue()


def as_arrow(rows: list[dict[str, Any]], group: int, new: Any, **options: Any) -> bytes:
    file = io.BytesIO()
    with new(file, SCHEMA, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(pa.Table.from_pylist(rows, SCHEMA), max_chunksize=group)
    return file.getvalue()


GROUPS = st.sampled_from([1, 3, 100])
PARQUET_OPTIONS = st.fixed_dictionaries(
    {
        "compression": st.sampled_from(["none", "snappy", "zstd"]),
        "use_dictionary": st.booleans(),
        "write_statistics": st.booleans(),
        "data_page_version": st.sampled_from(["1.0", "2.0"]),
    }
)
ARROW_OPTIONS = st.fixed_dictionaries({"compression": st.sampled_from([None, "lz4", "zstd"])})
NEW = st.sampled_from([pa.ipc.new_file, pa.ipc.new_stream])


@in_a_folder
@given(rows=COLUMNAR_ROWS, group=GROUPS, options=PARQUET_OPTIONS)
def test_parquet_gives_its_rows(
    rows: list[dict[str, Any]], group: int, options: dict[str, Any], tmp_path: Path
) -> None:
    assert read(tmp_path / "rows", as_parquet(rows, group, **options)) == rows


@in_a_folder
@given(rows=COLUMNAR_ROWS, group=GROUPS, new=NEW, options=ARROW_OPTIONS)
def test_arrow_gives_its_rows(
    rows: list[dict[str, Any]], group: int, new: Any, options: dict[str, Any], tmp_path: Path
) -> None:
    assert read(tmp_path / "rows", as_arrow(rows, group, new, **options)) == rows


def page_header(data: io.BytesIO) -> dict[int, Any]:
    """The header of a page, a struct in Thrift's compact protocol: values by the number of their field."""
    fields: dict[int, Any] = {}
    number = 0
    while head := data.read(1)[0]:
        number = number + (head >> 4) if head >> 4 else _signed(data)
        kind = head & 15
        if kind in (1, 2):
            fields[number] = kind == 1
        elif kind in (4, 5, 6):
            fields[number] = _signed(data)
        elif kind == 8:
            fields[number] = data.read(_unsigned(data))
        else:
            assert kind == 12
            fields[number] = page_header(data)
    return fields


def _unsigned(data: io.BytesIO) -> int:
    value = shift = 0
    while (byte := data.read(1)[0]) & 128:
        value |= (byte & 127) << shift
        shift += 7
    return value | byte << shift


def _signed(data: io.BytesIO) -> int:
    value = _unsigned(data)
    return value >> 1 ^ -(value & 1)


def page_data(data: bytes) -> Iterator[range]:
    """Where the data of each page of a parquet file lies, which is what its checksum covers."""
    footer = pq.ParquetFile(io.BytesIO(data)).metadata
    for group in map(footer.row_group, range(footer.num_row_groups)):
        for chunk in map(group.column, range(group.num_columns)):
            place = chunk.dictionary_page_offset or chunk.data_page_offset
            end = place + chunk.total_compressed_size
            while place < end:
                rest = io.BytesIO(data[place:end])
                size = page_header(rest)[3]
                place += rest.tell()
                yield range(place, place + size)
                place += size


@damaging
@given(rows=COLUMNAR_ROWS, group=GROUPS, options=PARQUET_OPTIONS, data=st.data())
def test_damage_to_a_page_with_a_checksum_is_an_error(
    rows: list[dict[str, Any]], group: int, options: dict[str, Any], data: st.DataObject, tmp_path: Path
) -> None:
    whole = as_parquet(rows, group, **options)
    place = data.draw(st.sampled_from([place for page in page_data(whole) for place in page]))
    byte = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[place]))
    changed = whole[:place] + bytes([byte]) + whole[place + 1 :]
    assert read_or_refused(tmp_path / "rows", changed) is None


@damaging
@given(rows=COLUMNAR_ROWS, group=GROUPS, options=PARQUET_OPTIONS, data=st.data())
def test_damage_to_parquet_never_loses_rows_or_names(
    rows: list[dict[str, Any]], group: int, options: dict[str, Any], data: st.DataObject, tmp_path: Path
) -> None:
    """What has no checksum are the headers of pages and the types of columns: values may change by them."""
    whole = as_parquet(rows, group, **options)
    damaged = data.draw(damage(whole, data.draw(st.sampled_from([0, len(whole) * 2 // 3]))))
    got = read_or_refused(tmp_path / "rows", damaged.data)
    assert got is None or [row.keys() for row in got] == [row.keys() for row in rows]
    assert got is None or damaged.kind != "cut"


@damaging
@given(rows=COLUMNAR_ROWS, group=GROUPS, new=NEW, options=ARROW_OPTIONS, data=st.data())
def test_damage_to_arrow_never_loses_rows(
    rows: list[dict[str, Any]], group: int, new: Any, options: dict[str, Any], data: st.DataObject, tmp_path: Path
) -> None:
    """Without checksums, another valid value cannot be told from the one that was written."""
    whole = as_arrow(rows, group, new, **options)
    damaged = data.draw(damage(whole))
    got = read_or_refused(tmp_path / "rows", damaged.data)
    assert got is None or len(got) == len(rows)
    assert got is None or damaged.kind != "cut"


# --- anything ---------------------------------------------------------------------------------------------------------

MAGIC = [b"PAR1", b"ARROW1\0\0", b"\xff\xff\xff\xff", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd"]
BEGINNINGS = [b"", b"[", b"{", b"a,b\n", b'"', *MAGIC]


@in_a_folder
@given(beginning=st.sampled_from(BEGINNINGS), rest=st.binary(max_size=200), names=st.sampled_from(["", "a", "a.b"]))
@example(beginning=b"", rest=b"", names="")
def test_any_bytes_are_read_or_refused(beginning: bytes, rest: bytes, names: str, tmp_path: Path) -> None:
    read_or_refused(tmp_path / "bytes", beginning + rest, within=names)
