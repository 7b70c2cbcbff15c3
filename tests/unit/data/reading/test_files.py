"""The door to all files: each kind is known by its content, and what is no data is refused by its name."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import random
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_cli.core.errors import DataError
from dpo_cli.data.reading import columnar, files, json_text
from dpo_cli.data.reading.base import Record
from dpo_cli.data.reading.files import read_blocks, read_records

Read = Callable[..., list[Record]]


Message = Callable[..., str]


BOM = b"\xef\xbb\xbf"


ROWS = [{"text": f"row {i} 中文 " + f"{i * 7919}" * 20} for i in range(200)]


def as_array(rows: list[Any]) -> bytes:
    return json.dumps(rows, ensure_ascii=False).encode()


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_csv(rows: list[dict[str, str]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([["text", "more"], *([row["text"], ""] for row in rows)])
    return text.getvalue().encode()


def as_within(rows: list[Any]) -> bytes:
    return json.dumps({"version": 1, "rows": rows, "end": None}).encode()


def as_parquet(rows: list[Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=50, compression="none", use_dictionary=False)
    return file.getvalue()


def as_arrow(rows: list[Any], new: Any = pa.ipc.new_file) -> bytes:
    file = io.BytesIO()
    table = pa.Table.from_pylist(rows)
    with new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)
    return file.getvalue()


def as_arrow_stream(rows: list[Any]) -> bytes:
    return as_arrow(rows, pa.ipc.new_stream)


def zstd(data: bytes) -> bytes:
    """One frame, which says how long it is."""
    return pa.compress(data, codec="zstd", asbytes=True)


def zstd_frames(data: bytes) -> bytes:
    """A frame every 100 bytes."""
    return b"".join(zstd(data[begin : begin + 100]) for begin in range(0, len(data), 100))


FORMS = [as_array, as_lines, as_csv, as_within, as_parquet, as_arrow, as_arrow_stream]


TEXT_FORMS = [as_array, as_lines, as_csv, as_within]


PACKED = [(write, bytes) for write in FORMS] + [(write, c) for write in TEXT_FORMS for c in (gzip.compress, zstd)]


def texts(records: list[Record]) -> list[str]:
    return [record.value["text"] for record in records]


def within(write: Any) -> str:
    return "rows" if write is as_within else ""


@pytest.mark.parametrize("write", FORMS)
def test_a_kind_is_known_by_its_content(read: Read, write: Any) -> None:
    records = read(write(ROWS), within(write))
    assert texts(records) == [row["text"] for row in ROWS]
    assert [record.row for record in records] == list(range(200))


def test_gzip_may_have_several_members_and_zstd_frames_to_be_skipped(read: Read) -> None:
    data = as_lines(ROWS)
    skipped = b"\x50\x2a\x4d\x18\x04\0\0\0abcd"
    assert len(read(gzip.compress(data[:1000]) + gzip.compress(data[1000:]))) == 200
    assert len(read(skipped + zstd(data[:1000]) + skipped + zstd(data[1000:]))) == 200


@pytest.mark.parametrize("write", [as_array, as_csv, as_within, as_parquet, as_arrow, as_arrow_stream])
def test_blocks_hold_all_rows_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    monkeypatch.setattr(files, "_RECORDS_A_BLOCK", 30)
    (tmp_path / "data").write_bytes(write(ROWS))
    blocks = [block for block in read_blocks(tmp_path / "data", within=within(write)) if isinstance(block, list)]
    assert max(map(len, blocks)) == 30
    assert [record.row for block in blocks for record in block] == list(range(200))


def test_large_rows_make_blocks_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_BYTES_A_BLOCK", 20_000)
    monkeypatch.setattr(json_text, "BLOCK", 1000)
    (tmp_path / "data").write_bytes(as_array([{"text": "x" * 5000}] * 40))
    blocks = [block for block in read_blocks(tmp_path / "data") if isinstance(block, list)]
    assert max(map(len, blocks)) <= 6
    assert sum(map(len, blocks)) == 40


@pytest.mark.parametrize("block", [100, 1 << 20])
@pytest.mark.parametrize(("write", "compress"), PACKED)
def test_every_byte_on_disk_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int, compress: Any, write: Any
) -> None:
    monkeypatch.setattr(json_text, "BLOCK", block)
    path = tmp_path / "data"
    path.write_bytes(compress(write(ROWS * 20)))
    heard: list[int] = []
    assert len(list(read_records(path, heard.append, within(write)))) == len(ROWS) * 20
    assert sum(heard) == path.stat().st_size
    assert all(count > 0 for count in heard)


@pytest.mark.parametrize(("write", "compress"), PACKED)
def test_rows_come_before_the_file_is_read_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Any, write: Any
) -> None:
    monkeypatch.setattr(json_text, "BLOCK", 1 << 14)
    monkeypatch.setattr(files, "_RECORDS_A_BLOCK", 10)
    monkeypatch.setattr(columnar, "_BYTES_A_BATCH", 1 << 16)
    path = tmp_path / "data"
    path.write_bytes(compress(write([{"text": random.Random(i).randbytes(3000).hex()} for i in range(500)])))
    heard: list[int] = []
    rows = read_records(path, heard.append, within(write))
    next(rows)
    assert sum(heard) < path.stat().st_size * 0.5
    assert len(list(rows)) == 499
    assert sum(heard) == path.stat().st_size


def test_a_reader_that_stops_early_closes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "data"
    path.write_bytes(as_lines(ROWS))
    rows = read_records(path)
    next(rows)
    rows.close()  # type: ignore[attr-defined]
    path.unlink()


def test_a_missing_file_says_where_to_name_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.json is missing; put your data there, or name another file"):
        list(read_records(tmp_path / "nothing.json"))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read: it is a folder, no file"):
        list(read_records(tmp_path))


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
def test_a_disk_that_fails_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: Callable[[bytes], bytes]
) -> None:
    def fail(self: Any, buffer: Any) -> int:
        raise OSError(5, "Input/output error")

    (tmp_path / "data").write_bytes(compress(as_lines(ROWS)))
    monkeypatch.setattr(files._CountedFile, "readinto", fail)
    with pytest.raises(DataError, match="data cannot be read: Input/output error"):
        list(read_records(tmp_path / "data"))


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
@pytest.mark.parametrize("data", [b"", b" \n\t\n", BOM, BOM + b"\n"])
def test_a_file_without_content_is_empty(message: Message, data: bytes, compress: Any) -> None:
    assert message(compress(data)) == "is empty; it must hold a JSON array, JSON lines or a table"


def a_zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.json", as_lines(ROWS))
    return file.getvalue()


def a_tar(mode: Any = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("data.json"))
    return file.getvalue()


def a_database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table rows (text)")
    return connection.serialize()


REFUSED = {
    "lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n",
        "is a Git LFS pointer, not the data",
    ),
    "zip": (a_zip(), "is a zip archive or an Excel workbook; unpack it first, or save the sheet as CSV"),
    "tar": (a_tar(), "is a tar archive; unpack it first: tar -xf"),
    "tar.gz": (a_tar("w:gz"), "is a tar archive; unpack it first: tar -xf"),
    "xls": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(500), "is an old Excel workbook; save the sheet as CSV"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(30), "is a 7z archive; unpack it first: 7z x"),
    "bz2": (bz2.compress(as_lines(ROWS)), "is compressed with bzip2; unpack it first: bunzip2"),
    "xz": (lzma.compress(as_lines(ROWS)), "is compressed with xz; unpack it first: unxz"),
    "lz4": (pa.compress(b"{}" * 50, codec="lz4", asbytes=True), "is compressed with LZ4; unpack it first: unlz4"),
    "html": (b"<!DOCTYPE html>\n<html></html>", "is a web page or XML, not the data itself"),
    "html.gz": (gzip.compress(b"\n<!doctype HTML>\n<html></html>"), "is a web page or XML, not the data itself"),
    "html without type": (b"  <HTML><body></body></HTML>", "is a web page or XML, not the data itself"),
    "xml": (BOM + b'<?xml version="1.0"?><Error/>', "is a web page or XML, not the data itself"),
    "pickle 2": (
        pickle.dumps(ROWS, 2),
        "is a pickle, which can run code; it is never read. Save the data as JSON lines",
    ),
    "pickle 5": (
        pickle.dumps(ROWS, 5),
        "is a pickle, which can run code; it is never read. Save the data as JSON lines",
    ),
    "sqlite": (a_database(), "is an SQLite database; export the table as CSV"),
    "encrypted parquet": (b"PARE" + bytes(50), "is an encrypted parquet file; save it without encryption"),
    "parquet.gz": (gzip.compress(as_parquet(ROWS)), "is a compressed parquet or Arrow file; unpack it first, it is"),
    "parquet.zst": (zstd(as_parquet(ROWS)), "is a compressed parquet or Arrow file; unpack it first, it is"),
    "arrow.gz": (gzip.compress(as_arrow(ROWS)), "is a compressed parquet or Arrow file; unpack it first, it is"),
    "arrows.zst": (zstd(as_arrow_stream(ROWS)), "is a compressed parquet or Arrow file; unpack it first, it is"),
    "gz.gz": (gzip.compress(gzip.compress(b"{}")), "is compressed twice; unpack it once"),
    "gz.zst": (zstd(gzip.compress(b"{}")), "is compressed twice; unpack it once"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_data_is_refused_by_its_name(message: Message, kind: str) -> None:
    data, words = REFUSED[kind]
    assert message(data).startswith(words)


@pytest.mark.parametrize("header", ["BZh,b", "PK,b", "version,b", "7z,b"])
def test_a_header_that_begins_like_another_kind_is_a_header(read: Read, header: str) -> None:
    assert read(f"{header}\nx,y\n".encode())[0].value == {header[:-2]: "x", "b": "y"}


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize(
    "text",
    ['[{"a": 1}]', '{"a": "一二三一"}\n', "a,b\n1,2\n", "提示,回答\n一个词,好的一天\n", "a\tb\n" + "一," * 40_000],
)
def test_utf_16_is_named_with_its_remedy(message: Message, text: str, mark: str, encoding: str, compress: Any) -> None:
    data = compress((mark + text).encode(encoding))
    assert message(data) == "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8"


@pytest.mark.parametrize("data", [b'{"a": "x\0y"}\n' * 9, '{"a": "一\0"}\n'.encode() * 3, b"a,b\n\0,2\n", bytes(99)])
def test_a_zero_byte_does_not_make_text_utf_16(message: Message, data: bytes) -> None:
    assert "UTF-16" not in message(data)


@pytest.mark.parametrize("keep", [1, 5, 20, -1, -5, -9])
def test_a_gzip_file_that_is_cut_off_is_named(message: Message, keep: int) -> None:
    data = gzip.compress(as_array(ROWS))[:keep]
    if keep == 1:
        assert "not UTF-8 text" in message(b"\x8b" + data)
    else:
        assert "is a damaged gzip file" in message(data)


@pytest.mark.parametrize("compress", [zstd, zstd_frames])
@pytest.mark.parametrize("keep", [4, 5, 20, -1, -5, -9])
def test_a_zstd_file_that_is_cut_off_is_named(message: Message, compress: Any, keep: int) -> None:
    text = message(compress(as_array(ROWS))[:keep])
    assert text == "is a damaged Zstandard file (Truncated compressed stream); fetch it again"


@pytest.mark.parametrize(
    ("compress", "name"), [(gzip.compress, "gzip"), (zstd, "Zstandard"), (zstd_frames, "Zstandard")]
)
@pytest.mark.parametrize("garbage", [b"x", b"\1\2\3\4\5\6\7\x08", as_lines(ROWS)])
def test_garbage_behind_compressed_data_is_named(message: Message, compress: Any, name: str, garbage: bytes) -> None:
    assert message(compress(as_array(ROWS)) + garbage).startswith(f"is a damaged {name} file")


def test_a_zstd_file_with_a_wrong_check_sum_is_named(message: Message) -> None:
    # `printf '{"a": 1}\n' | zstd`, which leaves a checksum
    data = bytearray.fromhex("28b52ffd0458490000 7b2261223a20317d0a 00000000".replace(" ", ""))
    assert message(bytes(data)) == (
        "is a damaged Zstandard file (ZSTD decompress failed: Restored data doesn't match checksum); fetch it again"
    )


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe cannot be read: it is a pipe or device, no file"):
        list(read_records(tmp_path / "pipe"))
