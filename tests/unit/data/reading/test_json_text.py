"""JSON lines, JSON arrays, and arrays inside large objects: what is read, and how each damage is named."""

from __future__ import annotations

import gzip
import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.data.reading import base, json_text
from dpo_cli.data.reading.base import Lines, Record
from dpo_cli.data.reading.files import read_blocks, read_records

Read = Callable[..., list[Record]]


Message = Callable[..., str]


Write = Callable[[list[Any]], bytes]


ROWS: list[dict[str, Any]] = [
    {"a": 1, "text": "two\nlines"},
    {"a": [1.5, None, True], "text": "中文 “quoted” 😀"},
    {},
]


def as_array(rows: list[Any]) -> bytes:
    return json.dumps(rows, ensure_ascii=False, indent=1).encode()


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def values(records: list[Record]) -> list[Any]:
    return [record.value for record in records]


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
def test_a_record_names_the_line_it_begins_at(read: Read, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(json_text, "BLOCK", block)
    assert [record.line for record in read(b'[\n\n{"a": 1},\n{"a":\n2}, {"a": 3}\n,{}\n]')] == [3, 4, 5, 6]
    assert [record.line for record in read(b'{"a": 1}\n\n \n{"a": 2}\n')] == [1, 4]


def test_half_a_surrogate_pair_is_left_to_the_caller(read: Read) -> None:
    assert values(read(b'{"a": "\\ud800"}\n{"a": "\\ud83d\\ude00"}\n')) == [{"a": "\ud800"}, {"a": "😀"}]


def test_an_empty_array_has_no_rows(read: Read) -> None:
    assert read(b" [ ] \n") == []


def test_values_that_are_no_objects_are_left_to_the_caller(read: Read) -> None:
    assert values(read(b'[1, "a", null, [2], -1.5e3]')) == [1, "a", None, [2], -1500.0]
    assert values(read(b'1\n"a"\nnull\n')) == [1, "a", None]


@pytest.mark.parametrize("block", [1, 10, 1 << 20])
def test_runs_of_lines_are_whole_and_know_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int
) -> None:
    monkeypatch.setattr(json_text, "BLOCK", block)
    path = tmp_path / "data"
    path.write_bytes(b'\n{"a": 1}\n\n{"a": 2}\n{"a": 3}')
    runs = [run for run in read_blocks(path) if isinstance(run, Lines)]
    assert b"".join(run.data for run in runs) == path.read_bytes()
    assert all(run.data.endswith(b"\n") for run in runs[:-1])
    records = [record for run in runs for record in json_text.parse_lines(path, run)]
    assert [(record.line, record.value["a"]) for record in records] == [(2, 1), (4, 2), (5, 3)]
    assert len(runs) == (1 if block > 100 else len(runs))


@pytest.mark.parametrize("write", [as_array, as_lines])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Write) -> None:
    monkeypatch.setattr(json_text, "BLOCK", 1 << 16)
    path = tmp_path / "data"
    path.write_bytes(write([{"text": f"{i:04d}" * 250} for i in range(16_000)]))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path)) == 16_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6 < path.stat().st_size / 4


def test_rows_inside_an_object_name_the_line_they_begin_at(read: Read) -> None:
    assert [record.line for record in read(b'{"x": 1,\n"rows": [\n{},\n\n{}, {}]}', "rows")] == [3, 5, 5]


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\n\n"])
def test_each_line_may_hold_a_list(read: Read, separator: str) -> None:
    lines = [json.dumps({"id": i, "turns": {"rows": [{"i": i}] * i}}) for i in range(4)]
    records = read((separator.join(lines) + separator).encode(), "turns.rows")
    assert values(records) == [{"i": 1}, *[{"i": 2}] * 2, *[{"i": 3}] * 3]
    assert [record.row for record in records] == list(range(6))
    step = separator.count("\n")
    assert [record.line for record in records] == [1 + step, *[1 + 2 * step] * 2, *[1 + 3 * step] * 3]


def test_each_line_may_hold_a_list_that_is_longer_than_what_the_kind_is_told_by(read: Read) -> None:
    lines = [{"rows": [{"text": "x" * 100_000}] * 2}] * 3
    assert len(read(as_lines(lines), "rows")) == 6


def test_each_object_of_an_array_may_hold_a_list(read: Read) -> None:
    records = read(json.dumps([{"rows": ROWS}, {"rows": []}, {"rows": ROWS[:1]}], indent=1).encode(), "rows")
    assert values(records) == [*ROWS, ROWS[0]]
    assert [record.row for record in records] == [0, 1, 2, 3]


def test_what_lies_before_the_list_is_not_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "BLOCK", 1 << 16)
    path = tmp_path / "data"
    other = [{"text": "x" * 1000}] * 5000
    path.write_text(json.dumps({"train": other, "meta": {"more": other}, "test": [{"a": 1}]}), encoding="utf-8")
    tracemalloc.start()
    try:
        assert values(list(read_records(path, within="test"))) == [{"a": 1}]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2e6 < path.stat().st_size / 4


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(
    ("data", "within", "words"),
    [
        (b'{"a": 1}', "rows", "line 1: records: there is no list at 'rows'; 'rows' is missing"),
        (b"{}", "rows", "line 1: records: there is no list at 'rows'; 'rows' is missing"),
        (b'{"a": {"b": 1}}', "a.rows", "line 1: records: there is no list at 'a.rows'; 'rows' is missing"),
        (b'{"a": [1]}', "a.rows", "line 1: records: there is no list at 'a.rows'"),
        (b'{"rows": {"a": 1}}', "rows", "line 1: records: there is no list at 'rows'"),
        (b'{"rows": null}\n', "rows", "line 1: records: there is no list at 'rows'"),
        (b'{"rows": [1]}\n{"row": [1]}\n', "rows", "line 2: records: there is no list at 'rows'; 'rows' is missing"),
        (b'{"rows": [1], "rows": [2]}', "rows", "line 1: records: 'rows' is there twice"),
        (b'[{"rows": [1]},\n{"row": [1]}]', "rows", "line 2: records: there is no list at 'rows'"),
        (b'[{"rows": 5}]', "rows", "line 1: records: there is no list at 'rows'"),
        (b"[1]", "rows", "line 1: records: there is no list at 'rows'"),
        (b'"x"\n', "rows", "line 1: records: there is no list at 'rows'"),
        (b'{"rows": [{}, {}', "rows", "line 1, column 17: broken JSON: the array is not closed; the file seems cut"),
        (b'{"rows": [{}],\n', "rows", "line 2, column 1: broken JSON: expected '\"' before a name, the file seems cut"),
        (b'{"rows": [{}]\n', "rows", "line 2, column 1: broken JSON: expected ',' or '}' after the value of 'rows',"),
        (b'{"rows": [{}], "n', "rows", "line 1, column 16: broken JSON: Unterminated string"),
        (b'{"rows": [{}], "n": ', "rows", "the file seems cut off"),
        (b'{"a": {"rows": [{}]}', "a.rows", "the file seems cut off"),
        (b'{"rows": [{}]} x', "rows", "line 1, column 16: broken JSON: text after the end of the object"),
        (b'{"rows": [{}]} {"rows": [{}]}', "rows", "line 1, column 16: broken JSON: text after the end of the object"),
        (b'{"rows": [{}]}\n]', "rows", "line 2, column 1: broken JSON: expected '{' at the start of an object, got"),
        (b'{"rows": [{}] "a": 1}', "rows", "line 1, column 15: broken JSON: expected ',' or '}' after the value of"),
        (b'{"a" 1, "rows": [{}]}', "rows", "line 1, column 6: broken JSON: expected ':' after 'a', got '1'"),
        (b'{a: 1, "rows": [{}]}', "rows", "line 1, column 2: broken JSON: expected '\"' before a name, got 'a'"),
        (b'{"rows": [{}],\n"a": tru ' + b" " * 20 + b"}", "rows", "line 2, column 6: broken JSON: Expecting value"),
        (b'{"b": ' + b'{"a":' * 100_000, "rows", "broken JSON: nested too deeply"),
    ],
)
def test_an_object_without_the_list_or_that_is_broken_is_named(
    message: Message, monkeypatch: pytest.MonkeyPatch, block: int, data: bytes, within: str, words: str
) -> None:
    monkeypatch.setattr(json_text, "BLOCK", block)
    assert words in message(data, within)


def test_objects_may_share_the_first_line_however_long_it_is(read: Read) -> None:
    assert values(read(b'{"a": 1} {"a": 2}{"a": 3}\n{"a":\n4}\n')) == [{"a": n} for n in (1, 2, 3, 4)]
    rows = [{"text": "x" * 50_000}] * 3
    assert values(read("".join(map(json.dumps, rows)).encode())) == rows


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"a": 1},\n{"a": 2},\n', "line 1, column 9: broken JSON: a comma between two values, as in an array:"),
        (
            b'{\n"a": 1\n}\n{\n"a": 2,\n}\n',
            "line 6, column 1: broken JSON: Expecting property name enclosed in double quotes; a comma stands before",
        ),
        (b'{\n"a": 1\n}\n{\n"a": 2\n', "line 6, column 1: broken JSON: Expecting ',' delimiter; the file seems cut"),
        (
            b"{'a': 'x'}\n{'a': 'y'}\n",
            "line 1, column 2: broken JSON: Expecting property name enclosed in double quotes;"
            " texts and names need double quotes: these look like Python's",
        ),
        (b'{"a": "\n"}\n', "line 1, column 8: broken JSON: Invalid control character; its closing quote is missing,"),
    ],
)
def test_broken_objects_are_named_with_line_and_column(
    message: Message, monkeypatch: pytest.MonkeyPatch, block: int, data: bytes, words: str
) -> None:
    monkeypatch.setattr(json_text, "BLOCK", block)
    assert message(data).startswith(words)


@pytest.mark.parametrize("block", [64, 1 << 20])
@pytest.mark.parametrize("write", [as_array, as_lines])
def test_gbk_is_named_with_its_line_and_remedy(
    message: Message, monkeypatch: pytest.MonkeyPatch, write: Write, block: int
) -> None:
    monkeypatch.setattr(json_text, "BLOCK", block)
    data = write([{"a": "plain"}, {"a": "把句子里的每个数字加1"}]).decode().encode("gbk")
    line = 1 + data[: next(i for i, byte in enumerate(data) if byte > 127)].count(b"\n")
    assert message(data) == (f"line {line}: not UTF-8 text, it looks like GBK; convert it: iconv -f GBK -t UTF-8")


@pytest.mark.parametrize("write", [as_array, as_lines])
def test_bytes_of_no_encoding_are_named_with_their_line(message: Message, write: Write) -> None:
    data = write([{"a": "plain"}, {"a": "#"}]).replace(b"#", b"\xff\xff")
    line = 1 + data[: data.index(b"\xff")].count(b"\n")
    assert message(data) == f"line {line}: not UTF-8 text; fetch the file again, or convert it to UTF-8"


@pytest.mark.parametrize("write", [as_array, as_lines])
def test_a_damaged_byte_in_chinese_text_does_not_make_it_gbk(message: Message, write: Write) -> None:
    data = bytearray(write([{"a": "把句子里的每个数字加1，然后写出结果。"}]))
    data[data.index("数".encode())] ^= 0x20
    assert message(bytes(data)).endswith("not UTF-8 text; fetch the file again, or convert it to UTF-8")


@pytest.mark.parametrize("block", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'[{"a": 1}', "line 1, column 10: broken JSON: the array is not closed; the file seems cut off"),
        (b'[\n{"a": 1},\n', "line 3, column 1: broken JSON: the array is not closed; the file seems cut off"),
        (b"[", "line 1, column 2: broken JSON: the array is not closed; the file seems cut off"),
        (b'[{"a": 1},\n{"a": "long tex', "line 2, column 7: broken JSON: Unterminated string"),
        (b'[{"a": 1},\n{"a": "long tex', "the file seems cut off"),
        (b'[{"a": 1},\n{"a": ', "the file seems cut off"),
        (b'[{"a": 1}\n{"a": 2}]', "line 2, column 1: broken JSON: expected ',' or ']' after row 0, got '{'"),
        (b'[{"a": 1}]\n{"a": 2}', "line 2, column 1: broken JSON: text after the end of the array"),
        (b'[{"a": 1}]]', "line 1, column 11: broken JSON: text after the end of the array"),
        (b'[{"a": 1},\n]', "line 2, column 1: broken JSON: Expecting value; a comma stands before the closing ]:"),
        (b'[{"a": 1},\n\n, {}]', "line 3, column 1: broken JSON: Expecting value; a comma too many: take it out"),
        (b'[{"a": [1,]}]', "line 1, column 11: broken JSON: Expecting value; a comma stands before the closing ]:"),
        (b'[{"a": "q"}, {"a": "r}]', "line 1, column 20: broken JSON: Unterminated string; its closing quote is"),
        (b'[\n{"a": "q"},\n{"a": "r}\n]\n', "line 3, column 10: broken JSON: Invalid control character; its closing"),
        (b"[\n{'a': 1},\n" + b'{"a": 1}, ' * 9 + b"{}]", "line 2, column 2: broken JSON: Expecting property name"),
        (b'[{"a": 1},\n\n{"a": tru}, ' + b'{"a": 1}, ' * 9 + b"{}]", "line 3, column 7: broken JSON: Expecting value"),
        (b'[{"a": "tab\there"}, ' + b'{"a": 1}, ' * 9 + b"{}]", "line 1, column 12: broken JSON: Invalid control"),
        (b'[{"a": "zero\0"}, ' + b'{"a": 1}, ' * 9 + b"{}]", "line 1, column 13: broken JSON: Invalid control"),
    ],
)
def test_a_broken_array_is_named_with_its_line(
    message: Message, monkeypatch: pytest.MonkeyPatch, block: int, data: bytes, words: str
) -> None:
    monkeypatch.setattr(json_text, "BLOCK", block)
    assert words in message(data)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"hello\n", "line 1: neither JSON nor a table: the first line is no JSON, and holds no comma, tab or"),
        (b'{"a": 1}\n{"a": 1', "line 2, column 8: broken JSON: Expecting ',' delimiter"),
        (b'{"a": 1}\n{"a": 1} x\n', "line 2, column 10: broken JSON: Extra data"),
        (b'{"a": 1}\n{"a": 1}{"a": 2}\n', "line 2, column 9: broken JSON: Extra data; a line holds one value"),
        (
            b'{"a": 1}\n{"a": 1,}\n',
            "property name enclosed in double quotes; a comma stands before the closing }: take",
        ),
        (b'{"a": 1}\n{"a": [1,, 2]}\n', "line 2, column 10: broken JSON: Expecting value; a comma too many: take it"),
        (
            b'{"a": 1}\n{"a": "x, "b": 1}\n',
            "line 2, column 12: broken JSON: Expecting ',' delimiter; the text before it ends"
            ' too soon: its quotes do not match, or one within it is not written as \\"',
        ),
        (
            b'{"a": 1}\n{"a": "x" "b": 1}\n',
            "line 2, column 11: broken JSON: Expecting ',' delimiter; a comma is missing",
        ),
        (b'{"a": 1}\n{"a": "x}\n', "line 2, column 7: broken JSON: Unterminated string; its closing quote is missing"),
        (b'{"a": 1}\n{"a": "\\d"}\n', r"line 2, column 8: broken JSON: Invalid \escape; a backslash within a text is"),
        (b'{"a": 1}\n{"a": None}\n', "line 2, column 7: broken JSON: Expecting value; None is Python's; JSON has null"),
        (b'{"a": 1}\n{a: 1}\n', "column 2: broken JSON: Expecting property name enclosed in double quotes; names need"),
        (b'{"a": 1}\n# note\n', "line 2, column 1: broken JSON: Expecting value; JSON has no comments: take it out"),
        (b'{"a": 1}\n{"a": tru}\n', "line 2, column 7: broken JSON: Expecting value"),
        (b'{"a": 1}\n{"a": "\0"}\n', "line 2, column 8: broken JSON: Invalid control character"),
        (b'{"a": 1}\n\0\0\0\n', "line 2, column 1: broken JSON: Expecting value"),
    ],
)
def test_a_broken_line_is_named_with_its_column(message: Message, data: bytes, words: str) -> None:
    assert words in message(data)


def test_a_line_that_is_cut_off_is_named_with_the_column_of_its_end(message: Message) -> None:
    assert "line 2, column 8: broken JSON: Expecting ',' delimiter" in message(b'{"a": 1}\n{"a": 1\n{"a": 2}\n')


@pytest.mark.parametrize("data", [b"[" * 200_000, b'{"a": ' + b"[" * 200_000 + b"\n"])
def test_json_nested_too_deeply_is_named(message: Message, data: bytes) -> None:
    assert "nested too deeply" in message(data)


@pytest.mark.parametrize("form", [b'{"a": %s}\n', b'[{"a": %s}]'])
def test_a_number_that_python_refuses_is_named(message: Message, form: bytes) -> None:
    assert "line 1" in message(form % (b"1" * 5000))


@pytest.mark.parametrize(
    ("data", "within"),
    [
        (b'{"a": 1}\n{"a": "' + b"x" * 9000 + b'"}\n', ""),
        (b'[{"a": 1},\n{"a": "' + b"x" * 9000 + b'"}]', ""),
        (b'{"a": 1,\n"b": "' + b"x" * 9000 + b'", "rows": []}', "rows"),
    ],
)
def test_a_row_that_does_not_end_is_not_read_into_memory(
    message: Message, monkeypatch: pytest.MonkeyPatch, data: bytes, within: str
) -> None:
    monkeypatch.setattr(json_text, "BLOCK", 16)
    monkeypatch.setattr(base, "LONGEST", 4096)
    assert message(data, within).startswith("line 2: a row of more than 0 MiB; a quote or a bracket is not closed, or")


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_lines_of_a_plain_file_travel_by_their_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mark: bytes
) -> None:
    """What another process reads there is what was read here."""
    monkeypatch.setattr(json_text, "BLOCK", 50)
    path = tmp_path / "rows.jsonl"
    data = mark + b"".join(b'{"a": %d}\n' % number for number in range(100))
    path.write_bytes(data)
    blocks = list(read_blocks(path))
    assert len(blocks) > 5
    for block in blocks:
        assert isinstance(block, Lines)
        assert block.place is not None
        packed = pickle.dumps(block)
        assert b'"a"' not in packed
        assert pickle.loads(packed) == block
    (tmp_path / "rows.gz").write_bytes(gzip.compress(data))
    for block in read_blocks(tmp_path / "rows.gz"):
        assert isinstance(block, Lines)
        assert block.place is None
        assert pickle.loads(pickle.dumps(block)) == block
