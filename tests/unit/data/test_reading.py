"""From bytes to records: what is read, and how each damage is named."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core.errors import DataError
from dpo_cli.data import reading
from dpo_cli.data.reading import Record, read_records

ROWS: list[dict[str, Any]] = [
    {"a": 1, "text": "two\nlines"},
    {"a": [1.5, None, True], "text": "中文 “quoted” 😀"},
    {},
]


def as_array(rows: list[Any]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def read(tmp_path: Path) -> Callable[[bytes], list[Record]]:
    """Read bytes as a file without a telling name."""

    def read_bytes(data: bytes) -> list[Record]:
        path = tmp_path / "data"
        path.write_bytes(data)
        return list(read_records(path))

    return read_bytes


@pytest.fixture
def message(read: Callable[[bytes], list[Record]], tmp_path: Path) -> Callable[[bytes], str]:
    """The message of the DataError that some bytes end in; the file's path is left out."""

    def message_of(data: bytes) -> str:
        with pytest.raises(DataError) as caught:
            read(data)
        text = str(caught.value)
        assert text.startswith(str(tmp_path / "data"))
        return text.removeprefix(str(tmp_path / "data")).lstrip(", ")

    return message_of


# --- what is read -------------------------------------------------------------------------

Write = Callable[[list[Any]], bytes]
BOM = b"\xef\xbb\xbf"


@pytest.mark.parametrize("block", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("write", [as_array, as_lines])
@pytest.mark.parametrize("prefix", [b"", BOM, b" \n\t", BOM + b"\r\n"])
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_rows_come_as_they_were_written(
    read: Callable[[bytes], list[Record]],
    monkeypatch: pytest.MonkeyPatch,
    block: int,
    write: Write,
    prefix: bytes,
    compress: Callable[[bytes], bytes],
) -> None:
    monkeypatch.setattr(reading, "_BLOCK", block)
    records = read(compress(prefix + write(ROWS)))
    assert [record.value for record in records] == ROWS
    assert [record.row for record in records] == [0, 1, 2]


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_a_record_names_the_line_it_begins_at(
    read: Callable[[bytes], list[Record]], monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(reading, "_BLOCK", block)
    assert [record.line for record in read(b'[\n\n{"a": 1},\n{"a":\n2}, {"a": 3}\n,{}\n]')] == [3, 4, 5, 6]
    assert [record.line for record in read(b'{"a": 1}\n\n \n{"a": 2}\n')] == [1, 4]


def test_lines_may_end_in_carriage_returns_and_the_last_one_in_nothing(read: Callable[[bytes], list[Record]]) -> None:
    assert [record.value for record in read(b'{"a": 1}\r\n{"a": 2}')] == [{"a": 1}, {"a": 2}]


def test_an_empty_array_has_no_rows(read: Callable[[bytes], list[Record]]) -> None:
    assert read(b" [ ] \n") == []


def test_values_that_are_no_objects_are_left_to_the_caller(read: Callable[[bytes], list[Record]]) -> None:
    assert [record.value for record in read(b'[1, "a", null, [2], -1.5e3]')] == [1, "a", None, [2], -1500.0]
    assert [record.value for record in read(b'1\n"a"\nnull\n')] == [1, "a", None]


@pytest.mark.parametrize("data", [as_array(ROWS), as_lines(ROWS), gzip.compress(as_array(ROWS))])
def test_every_byte_on_disk_is_reported_once(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "data"
    path.write_bytes(data)
    heard: list[int] = []
    assert len(list(read_records(path, heard.append))) == len(ROWS)
    assert sum(heard) == len(data)


def test_rows_come_before_the_file_is_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "_BLOCK", 1024)
    path = tmp_path / "data"
    path.write_bytes(as_array([{"text": "x" * 100}] * 1000))
    heard: list[int] = []
    next(iter(read_records(path, heard.append)))
    assert sum(heard) <= 8 * 1024 < path.stat().st_size


@pytest.mark.parametrize("number", ["1.5", "1e5", "1E-5"])
def test_a_number_across_two_blocks_is_one_number(
    read: Callable[[bytes], list[Record]], monkeypatch: pytest.MonkeyPatch, number: str
) -> None:
    monkeypatch.setattr(reading, "_BLOCK", 1)
    assert [record.value for record in read(f"[{number}, {{}}]".encode())] == [float(number), {}]


# --- files that cannot be read ------------------------------------------------------------


def test_a_missing_file_says_where_to_name_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.json is missing; put your data there, or name it in params.yaml"):
        list(read_records(tmp_path / "nothing.json"))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_records(tmp_path))


@pytest.mark.parametrize("data", [b"", b" \n\t\n", BOM, BOM + b"\n", gzip.compress(b""), gzip.compress(b" \n")])
def test_a_file_without_content_is_empty(message: Callable[[bytes], str], data: bytes) -> None:
    assert "is empty; it must hold a JSON array or JSON lines" in message(data)


def test_a_git_lfs_pointer_is_named_with_its_remedy(message: Callable[[bytes], str]) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    assert "is a Git LFS pointer, not the data itself; fetch it with: git lfs pull" in message(pointer)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("write", [as_array, as_lines])
def test_utf_16_is_named_with_its_remedy(message: Callable[[bytes], str], write: Write, encoding: str) -> None:
    data = ("" if encoding == "utf-16" else "\ufeff") + write(ROWS).decode()
    assert "is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8" in message(data.encode(encoding))


@pytest.mark.parametrize("block", [64, 1 << 20])
@pytest.mark.parametrize("write", [as_array, as_lines])
def test_gbk_is_named_with_its_line_and_remedy(
    message: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch, write: Write, block: int
) -> None:
    monkeypatch.setattr(reading, "_BLOCK", block)
    data = write([{"a": "plain"}, {"a": "把句子里的每个数字加1"}]).decode().encode("gbk")
    line = 1 + data[: next(i for i, byte in enumerate(data) if byte > 127)].count(b"\n")
    assert message(data).startswith(f"line {line}: not UTF-8 text")
    if block > len(data):
        assert "it looks like GBK; convert it: iconv -f GBK -t UTF-8" in message(data)


@pytest.mark.parametrize("write", [as_array, as_lines])
def test_bytes_of_no_encoding_are_named_with_their_line(message: Callable[[bytes], str], write: Write) -> None:
    data = write([{"a": "plain"}, {"a": "#"}]).replace(b"#", b"\xff\xff")
    line = 1 + data[: data.index(b"\xff")].count(b"\n")
    assert message(data) == f"line {line}: not UTF-8 text; convert the file to UTF-8"


@pytest.mark.parametrize("keep", [1, 5, 20, -1, -5, -9])
def test_a_damaged_gzip_file_is_named(message: Callable[[bytes], str], keep: int) -> None:
    data = gzip.compress(as_array(ROWS))[:keep]
    if keep == 1:
        assert "not UTF-8 text" in message(b"\x8b" + data)
    else:
        assert "is a damaged gzip file" in message(data)


def test_a_gzip_file_with_a_wrong_check_sum_is_named(message: Callable[[bytes], str]) -> None:
    data = bytearray(gzip.compress(as_array(ROWS)))
    data[-8] ^= 1
    assert "is a damaged gzip file (CRC check failed" in message(bytes(data))


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'[{"a": 1}', "line 1: broken JSON: the array is not closed; the file seems cut off"),
        (b'[\n{"a": 1},\n', "line 3: broken JSON: the array is not closed; the file seems cut off"),
        (b"[", "line 1: broken JSON: the array is not closed; the file seems cut off"),
        (b'[{"a": 1},\n{"a": "long tex', "line 2: broken JSON: Unterminated string"),
        (b'[{"a": 1},\n{"a": "long tex', "the file seems cut off"),
        (b'[{"a": 1},\n{"a": ', "the file seems cut off"),
        (b'[{"a": 1}\n{"a": 2}]', "line 2: broken JSON: expected ',' or ']' after row 0, got '{'"),
        (b'[{"a": 1}]\n{"a": 2}', "line 2: broken JSON: text after the end of the array"),
        (b'[{"a": 1}]]', "line 1: broken JSON: text after the end of the array"),
        (b'[{"a": 1},]', "line 1: broken JSON: Expecting value"),
        (b"[\n{'a': 1},\n" + b'{"a": 1}, ' * 9 + b"{}]", "line 2: broken JSON: Expecting property name"),
        (b'[{"a": 1},\n\n{"a": tru}, ' + b'{"a": 1}, ' * 9 + b"{}]", "line 3: broken JSON: Expecting value"),
        (b'[{"a": "tab\there"}, ' + b'{"a": 1}, ' * 9 + b"{}]", "line 1: broken JSON: Invalid control character"),
    ],
)
def test_a_broken_array_is_named_with_its_line(
    message: Callable[[bytes], str], monkeypatch: pytest.MonkeyPatch, block: int, data: bytes, words: str
) -> None:
    monkeypatch.setattr(reading, "_BLOCK", block)
    assert words in message(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello\n", "line 1, column 1: broken JSON: Expecting value; expected a JSON array or one JSON value a line"),
        (b'{"a": 1}\n{"a": 1', "line 2, column 8: broken JSON: Expecting ',' delimiter"),
        (b'{"a": 1}\n{"a": 1} x\n', "line 2, column 10: broken JSON: Extra data"),
        (b'{"a": 1}\n{"a": tru}\n', "line 2, column 7: broken JSON: Expecting value"),
        (b'{\n"a": 1\n}\n', "broken JSON: Expecting property name"),
    ],
)
def test_a_broken_line_is_named_with_its_column(message: Callable[[bytes], str], data: bytes, words: str) -> None:
    assert words in message(data)


def test_a_line_that_is_cut_off_is_named_with_the_column_of_its_end(message: Callable[[bytes], str]) -> None:
    assert "line 2, column 8: broken JSON: Expecting ',' delimiter" in message(b'{"a": 1}\n{"a": 1\n{"a": 2}\n')


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a": ' + b"[" * 200_000 + b"\n"])
def test_json_nested_too_deeply_is_named(message: Callable[[bytes], str], data: bytes) -> None:
    assert "nested too deeply" in message(data)


@pytest.mark.parametrize("form", [b'{"a": %s}\n', b'[{"a": %s}]'])
def test_a_number_that_python_refuses_is_named(message: Callable[[bytes], str], form: bytes) -> None:
    assert "line 1" in message(form % (b"1" * 5000))
