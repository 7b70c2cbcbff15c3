"""CSV and TSV: every value stays text, rows never shift, and each damage is named with its line."""

from __future__ import annotations

import csv
import io
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.data.reading import base, json_text
from dpo_cli.data.reading.base import Record
from dpo_cli.data.reading.files import read_records

Read = Callable[..., list[Record]]


Message = Callable[..., str]


BOM = b"\xef\xbb\xbf"


ROWS = [
    {"prompt": "plain", "chosen": "00000", "rejected": "3.3"},
    {"prompt": "", "chosen": "", "rejected": ""},
    {"prompt": 'He said "hi", twice; then\tleft', "chosen": '"', "rejected": '""'},
    {"prompt": "two\nlines", "chosen": "\n", "rejected": "a\r\nb\rc"},
    {"prompt": "中文，“引号”", "chosen": "一\u2028二\x85三\x0b四\x0c五", "rejected": "😀 ' \\ \\n"},
    {"prompt": " spaces ", "chosen": "NA", "rejected": "null"},
    {"prompt": "{}", "chosen": "[1, 2]", "rejected": "true"},
]


def as_csv(
    rows: list[dict[str, str]], delimiter: str = ",", end: str = "\r\n", quoting: Any = csv.QUOTE_MINIMAL
) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def values(records: list[Record]) -> list[Any]:
    return [record.value for record in records]


def test_a_record_names_the_line_it_begins_at(read: Read) -> None:
    data = b'a,b\n1,"x\ny\n"\n\n2,"\n"\n"3\r\n",z\r4\n5,6\n'
    assert [(record.line, record.value["a"]) for record in read(data)] == [(2, "1"), (6, "2"), (8, "3\r\n"), (10, "5")]


def test_blank_lines_are_skipped(read: Read) -> None:
    assert values(read(b"\n\r\na,b\n\n1,2\n \n\r\n3,4\n\n")) == [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]


def test_a_row_of_empty_texts_is_a_row(read: Read) -> None:
    assert values(read(b'a\tb\n\t\n"",""\n'.replace(b",", b"\t"))) == [{"a": "", "b": ""}] * 2


def test_the_delimiter_is_the_one_that_the_header_has_most_of(read: Read) -> None:
    assert values(read(b"a;b,c,d\n1,2,3\n")) == [{"a;b": "1", "c": "2", "d": "3"}]
    assert values(read(b'"a,b,c"\td\n1,5\t2\n')) == [{"a,b,c": "1,5", "d": "2"}]
    assert values(read("问题，好吗;答案\n1,5;2\n".encode())) == [{"问题，好吗": "1,5", "答案": "2"}]


@pytest.mark.parametrize("header", [b"text", b'"text"', BOM + b"text"])
def test_a_table_may_have_one_column(read: Read, header: bytes) -> None:
    assert values(read(header + b'\r\n"one, ""two"""\r\nthree\r\n')) == [{"text": 'one, "two"'}, {"text": "three"}]


@pytest.mark.parametrize("line", [b"null", b"1", b'"a b"', b"true"])
def test_a_first_value_that_is_no_name_is_no_table(read: Read, line: bytes) -> None:
    assert len(read(line + b"\n2\n")) == 2


def test_a_carriage_return_within_a_text_is_part_of_it(read: Read) -> None:
    assert values(read(b"a,b\nx\ry,\rz\n")) == [{"a": "x\ry", "b": "\rz"}]
    assert values(read(b"a,b\r\r\nx,y\r\r\n")) == [{"a": "x", "b": "y"}]


def test_a_first_line_that_is_json_is_no_header(read: Read) -> None:
    assert values(read(b'"a, b"\n"c, d"\n')) == ["a, b", "c, d"]
    assert values(read(b'"\\ud800, x"\n')) == ["\ud800, x"]


def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_text, "BLOCK", 1 << 16)
    path = tmp_path / "data"
    path.write_bytes(as_csv([{"a": f"{i:04d}" * 120 + "\n" + "x" * 500, "b": str(i)} for i in range(16_000)]))
    tracemalloc.start()
    try:
        assert sum(1 for _ in read_records(path)) == 16_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4e6 < path.stat().st_size / 4


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a,b\n1,2,3\n", "line 2: 3 values where the header has 2 ('a', 'b'); quote texts that hold a comma"),
        (b"a,b\n1,2\n3\n", "line 3: 1 values where the header has 2 ('a', 'b'); quote texts that hold a comma"),
        (b"a\tb\n1,2\n", "line 2: 1 values where the header has 2 ('a', 'b'); quote texts that hold a tab"),
        (b'a,b\n"x\ny",1\n1,2;3,4\n', "line 4: 3 values where the header has 2"),
        (b'a,"b\n', "line 1, column 3: broken CSV: the quote that opens this value is not closed in the rest"),
        (b'a,b\n"x\n\ny,2\n3,4\n', "line 2, column 1: broken CSV: the quote that opens this value is not closed in"),
        (b'a,b\n1,"x', "line 2, column 3: broken CSV: the quote that opens this value is not closed in the rest"),
        (b'a,b\nx"y",2\n', "line 2, column 2: broken CSV: a quote in value 1 that does not enclose all of it; a"),
        (b'a,b\n1,"x"y\n', "line 2, column 6: broken CSV: a quote in value 2 that does not enclose all of it"),
        (b'a,b\n1,"x" \n', "line 2, column 6: broken CSV: a quote in value 2 that does not enclose all of it"),
        (b'a,b\n"1\n2", "x"\n', "line 3, column 5: broken CSV: a quote in value 2 that does not enclose all of it"),
        (b'a,b\n1,say "hi"\n', "line 2, column 7: broken CSV: a quote in value 2 that does not enclose all of it"),
        (b'a,b"\n1,2\n"\n', "line 1, column 4: broken CSV: a quote in value 2 that does not enclose all of it"),
        (b'a,b\nName a 5" pipe,PVC.\n' + b'c,"d"\n' * 9, "line 2, column 9: broken CSV: a quote in value 1 that"),
        (b"text\none, two\n", "line 2: 2 values where the header has 1 ('text'); quote texts that hold a comma"),
        (b"a,b\n1,2\n3", "line 3: the file ends within this line, which has 1 of 2 values; it is cut off"),
        (b'a,b\n1,"2', "line 2, column 3: broken CSV: the quote that opens this value is not closed"),
        (b"a,b\n1,2\n3,\0\n", "line 3: a zero byte, which is no text; fetch the file again"),
        (b'a,b\n1,2\n3,"\n\0"\n', "line 4: a zero byte, which is no text; fetch the file again"),
        (b"a,b,a\n1,2,3\n", "line 1: the header names 'a' twice"),
        (b"\na,,b\n1,2,3\n", "line 2: column 2 has no name in the header"),
        (b"a,b,,\n1,2,3,4\n", "line 1: column 3 has no name in the header"),
        (b"a,b\n", "has no rows: it is read as a table, for the comma in its first line, and below this header"),
        (b"Hello, world\n\n", "has no rows: it is read as a table, for the comma in its first line"),
        (b"a;b,c\n1,2\n", "line 1: no JSON, and as the header of a table it may be cut at each semicolon or each"),
        (b'x"prompt": 1, "chosen": 2}\n{"prompt": 1, "chosen": 2}\n', "line 1, column 2: broken CSV: a quote in"),
    ],
)
def test_a_broken_table_is_named_with_its_line(
    message: Message, monkeypatch: pytest.MonkeyPatch, block: int, data: bytes, words: str
) -> None:
    monkeypatch.setattr(json_text, "BLOCK", block)
    assert message(data).startswith(words)


def test_a_quote_too_many_is_named_where_it_opens_though_others_follow(message: Message) -> None:
    text = message(b'a,b\n"Hello,x\ny,z\nsay "hi,d\n"e",f\n')
    assert text.startswith("line 4, column 6: broken CSV: a quote in value 1 that does not enclose all of it")
    assert text.endswith("(value 1, from line 2 on, goes over several lines: perhaps by a quote too many)")


def test_long_and_many_names_do_not_blow_up_the_message(message: Message) -> None:
    header = ",".join(f"column number {i}" for i in range(500))
    assert len(message(f"{header}\n1,2\n".encode())) < 600


def test_a_table_holds_no_lists(message: Message) -> None:
    assert message(as_csv(ROWS), "data.rows") == (
        "records: data.rows: a CSV file has no lists of rows in it; leave records out"
    )


@pytest.mark.parametrize("data", [b'a,b\n1,2\n3,"' + b"x" * 9000 + b'"\n', b'a,b\n1,2\n3,"' + b"x\n" * 5000 + b'"\n'])
def test_a_row_that_does_not_end_is_not_read_into_memory(
    message: Message, monkeypatch: pytest.MonkeyPatch, data: bytes
) -> None:
    monkeypatch.setattr(base, "LONGEST", 4096)
    assert message(data).startswith("line 3: a row of more than 0 MiB; a quote or a bracket is not closed")


@pytest.mark.parametrize(
    ("text", "last"), [("a,b\n1,2\n3,4", ["3", "4"]), ('a,b\n1,"2\n""3"', ["1", '2\n"3']), ("a,b\n1,2\n3,", ["3", ""])]
)
def test_the_last_line_needs_no_line_end(tmp_path: Path, text: str, last: list[str]) -> None:
    (tmp_path / "rows").write_bytes(text.encode())
    assert [*[*read_records(tmp_path / "rows")][-1].value.values()] == last
