"""JSON lines, arrays, objects one after another, and arrays inside large objects, as a stream of bounded memory.

Lines are cut into runs of whole ones, which another process may parse. There, one byte that is changed, lost or added
is an error, or changes the values of one row; a file that is cut off gives whole rows, then an error or, where it was
cut between two rows, nothing; lost lines cannot be seen.

Where rows are objects, one byte that is changed, lost or added is an error, or changes the
values of one row: strings and brackets that lose an end never close again. An array that is
cut off is an error; objects that are cut off give whole rows, then an error or, where they were
cut between two, nothing. What cannot be seen: a change within a text, a number or a name that
leaves it one.

ijson, which is as fast or faster, knows no lines, and reads half of a surrogate pair as a question mark.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import IO, Any

import orjson

from dpo_cli.core.errors import DataError
from dpo_cli.data.reading import base
from dpo_cli.data.reading.base import BrokenLines, Lines, Record, explain, not_utf8, shorter, too_long, unreadable

BLOCK = 1 << 22
"""Bytes read at a time, and about the bytes in a run of lines."""

_CUT_OFF = "the file seems cut off"
_EXPECTED = "expected a JSON array, JSON objects, or CSV with a header line"
_LINES_NAMED = 10


# --- JSON lines ---------------------------------------------------------------------------


def read_lines(path: Path, file: IO[bytes], begin: int | None = None) -> Iterator[Lines]:
    """Cut a file into runs of whole lines of about ``BLOCK`` bytes.

    Args:
        path: The file, for messages.
        file: Its text.
        begin: At which byte of the file the text begins; None: it is compressed.

    Raises:
        DataError: A line does not end.
    """
    first_line = 1
    while data := file.read(BLOCK):
        if not data.endswith(b"\n"):
            rest = file.readline(base.LONGEST)
            if len(rest) >= base.LONGEST and not rest.endswith(b"\n"):
                raise too_long(path, first_line + data.count(b"\n"))
            data += rest
        yield Lines(data, first_line, None if begin is None else (path, begin))
        begin = None if begin is None else begin + len(data)
        first_line += data.count(b"\n")


def parse_lines(path: Path, lines: Lines, first_row: int = 0) -> list[Record]:
    """Parse a run of lines; blank ones are skipped.

    Integers that need more than 64 bits become floats.

    Args:
        path: The file, for messages.
        lines: The lines.
        first_row: The number of the first record in them.

    Raises:
        BrokenLines: Lines are not JSON; the first ones of them are named.
        DataError: A line is not UTF-8, or the first one neither JSON nor a table.
    """
    records: list[Record] = []
    broken: list[str] = []
    before = 0
    loads = orjson.loads
    row = first_row
    for line, data in enumerate(lines.data.split(b"\n"), start=lines.first_line):
        try:
            value = loads(data)
        except orjson.JSONDecodeError:
            if not data or data.isspace():
                continue
            try:
                value = _parse_line(path, data, line, is_first=row == 0 and line == lines.first_line == 1)
            except BrokenLines as error:
                before = before if broken else len(records)
                broken += error.problems
                if len(broken) > _LINES_NAMED:
                    broken[-1] = f"{path}: and more lines, from line {line} on"
                    break
                continue
        records.append(Record(row, line, value))
        row += 1
    if broken:
        raise BrokenLines(broken, records[:before])
    return records


def _parse_line(path: Path, data: bytes, line: int, *, is_first: bool) -> Any:
    """Parse what the fast parser refuses: half surrogates, NaN; or say what is broken."""
    try:
        return json.loads(data.decode("utf-8").rstrip("\r"))
    except UnicodeDecodeError:
        raise not_utf8(path, data, line) from None
    except json.JSONDecodeError as error:
        if is_first and not error.doc[: error.pos].strip():
            raise DataError(
                f"{path}, line 1: neither JSON nor a table: the first line is no JSON, and holds no comma, tab or"
                f" semicolon; {_EXPECTED}"
            ) from None
        what = explain(error.msg, error.doc, error.pos)
        if error.msg == "Extra data":
            what += "; a line holds one value"
        raise BrokenLines([f"{path}, line {line}, column {error.colno}: broken JSON: {what}"]) from None
    except RecursionError:
        raise BrokenLines([f"{path}, line {line}: JSON nested too deeply"]) from None
    except ValueError as error:
        raise BrokenLines([f"{path}, line {line}: {unreadable(error)}"]) from None


# --- JSON arrays --------------------------------------------------------------------------


def read_array(path: Path, file: IO[bytes]) -> Iterator[Record]:
    """The elements of a JSON array.

    Raises:
        DataError: It is not UTF-8, not JSON, or cut off; the message names the line.
    """
    text = _Text(path, file)
    yield from _elements(text, count())
    if text.next_character():
        raise text.broken("text after the end of the array", text.position)


def read_objects(path: Path, file: IO[bytes]) -> Iterator[Record]:
    """JSON values one after another, each over as many lines as it takes.

    Raises:
        DataError: One is broken or cut off; the message names line and column.
    """
    text = _Text(path, file)
    for row in count():
        mark = text.next_character()
        if not mark:
            return
        if mark == ",":
            raise text.broken(
                "a comma between two values, as in an array: take such commas out, or put [ before the first value and"
                " ] behind the last",
                text.position,
            )
        line = text.line_of(text.position)
        yield Record(row, line, _decode(text))


def read_array_within(path: Path, file: IO[bytes], keys: Sequence[str]) -> Iterator[Record]:
    """The elements of the array that an object holds under these keys, one within another.

    The object may be large: what is held in memory is one element. After it may follow
    others of its kind, each on a new line.

    Raises:
        DataError: It is broken, or there is no such array.
    """
    text = _Text(path, file)
    rows = count()
    ended = 0
    while text.next_character():
        if ended == text.line_of(text.position):
            raise text.broken("text after the end of the object", text.position)
        try:
            yield from _elements_within(text, keys, 0, rows)
        except RecursionError:
            raise text.broken("nested too deeply", text.position) from None
        ended = text.line_of(text.position)


def _elements_within(text: _Text, keys: Sequence[str], depth: int, rows: Iterator[int]) -> Iterator[Record]:
    """The elements of the array under the keys from ``depth`` on; the position passes the whole object."""
    begin = text.line_of(text.position)
    where = repr(".".join(keys))
    found = False
    for name in _members(text):
        if name != keys[depth]:
            _pass_value(text)
            continue
        if found:
            raise text.refused(f"{where} is there twice", begin)
        found = True
        is_last = depth == len(keys) - 1
        if text.next_character() != ("[" if is_last else "{"):
            raise text.refused(f"there is no list at {where}", begin)
        yield from _elements(text, rows) if is_last else _elements_within(text, keys, depth + 1, rows)
    if not found:
        raise text.refused(f"there is no list at {where}; {keys[depth]!r} is missing", begin)


def _pass_value(text: _Text) -> None:
    """Pass a value without holding it."""
    mark = text.next_character()
    if mark == "{":
        for _ in _members(text):
            _pass_value(text)
    elif mark == "[":
        for _ in _elements(text, count()):
            pass
    else:
        _decode(text)


def _members(text: _Text) -> Iterator[str]:
    """The names in an object, each with the position at its value, which the caller passes."""
    text.expect("{", "at the start of an object")
    if text.next_character() == "}":
        text.position += 1
        return
    while True:
        if text.next_character() != '"':
            text.expect('"', "before a name")
        name = _decode(text)
        text.expect(":", f"after {name[:40]!r}")
        yield name
        if text.next_character() == "}":
            text.position += 1
            return
        text.expect(",", f"or '}}' after the value of {name[:40]!r}")


def _elements(text: _Text, rows: Iterator[int]) -> Iterator[Record]:
    text.expect("[", "at the start")
    if text.next_character() == "]":
        text.position += 1
        return
    while True:
        if not text.next_character():
            raise text.broken(f"the array is not closed; {_CUT_OFF}", text.position)
        line = text.line_of(text.position)
        row = next(rows)
        yield Record(row, line, _decode(text))
        mark = text.next_character()
        if not mark:
            raise text.broken(f"the array is not closed; {_CUT_OFF}", text.position)
        if mark not in ",]":
            raise text.broken(f"expected ',' or ']' after row {row}, got {mark!r}", text.position)
        text.position += 1
        if mark == "]":
            return
        if (mark := text.next_character()) in ("]", ","):
            raise text.broken(explain("Expecting value", f",{mark}", 1), text.position)


class _Text:
    """JSON text that is read block by block and forgotten as it is consumed."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self.text = ""
        self.position = 0
        self.at_end = False
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._counted = 0  # position up to which lines and columns are counted
        self._line = self._column = 1

    def read_more(self) -> None:
        """Append a block, as long as what is held, and drop what was consumed."""
        line = self.line_of(self.position)
        self.text = self.text[self.position :]
        self.position = self._counted = 0
        if len(self.text) > base.LONGEST:
            raise too_long(self.path, line)
        data = self._file.read(max(BLOCK, len(self.text)))
        self.at_end = not data
        try:
            self.text += self._decoder.decode(data, final=self.at_end)
        except UnicodeDecodeError as error:
            line = self.line_of(len(self.text)) + error.object.count(b"\n", 0, error.start)
            raise not_utf8(self.path, error.object, line) from None

    def line_of(self, position: int) -> int:
        """The line, from 1, of a position in the text that is held and not yet passed."""
        passed = self.text.count("\n", self._counted, position)
        begin = self.text.rfind("\n", self._counted, position) + 1 if passed else self._counted
        self._line += passed
        self._column = position - begin + (1 if passed else self._column)
        self._counted = position
        return self._line

    def next_character(self) -> str:
        """Skip white space; the character there, or nothing at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if self.at_end:
                return ""
            self.read_more()

    def expect(self, mark: str, where: str) -> None:
        """Pass one character, which must be this one."""
        found = self.next_character()
        if found != mark:
            got = f"got {found!r}" if found else _CUT_OFF
            raise self.broken(f"expected {mark!r} {where}, {got}", self.position)
        self.position += 1

    def broken(self, message: str, position: int) -> DataError:
        """The error for what stands at a position of the text."""
        line = self.line_of(position)
        return DataError(f"{self.path}, line {line}, column {self._column}: broken JSON: {message}")

    def refused(self, message: str, line: int) -> DataError:
        """The error for an object that is not what records says."""
        return DataError(f"{self.path}, line {line}: records: {message}")


def _is_cut(text: str, error: json.JSONDecodeError) -> bool:
    """Whether the text ends within the value that is broken; one that still ends with a bracket lacks a quote."""
    rest = text[error.pos :].strip()
    if error.msg.startswith("Unterminated string"):
        return text.rstrip()[-1:] not in ("]", "}")
    return (
        not rest
        or rest.startswith("\\")
        or any(word.startswith(rest) for word in ("true", "false", "null", "NaN", "Infinity", "-Infinity"))
    )


_raw_decode = json.JSONDecoder().raw_decode


def _decode(text: _Text) -> Any:
    """Decode the value at the position, reading on until it is whole, and pass it."""
    while True:
        try:
            value, end = _raw_decode(text.text, text.position)
        except json.JSONDecodeError as error:
            near_end = error.pos > len(text.text) - 16 or error.msg.startswith("Unterminated string")
            if text.at_end or not near_end:
                cut_off = text.at_end and near_end and _is_cut(text.text, error)
                what = f"{shorter(error.msg)}; {_CUT_OFF}" if cut_off else explain(error.msg, text.text, error.pos)
                raise text.broken(what, error.pos) from None
        except RecursionError:
            raise text.broken("nested too deeply", text.position) from None
        except ValueError as error:
            raise text.broken(unreadable(error), text.position) from None
        else:
            # Behind a number that ends the block, '.', 'e' or 'e+' may be the start of its rest.
            needed = 3 if isinstance(value, int | float) else 1
            if end + needed <= len(text.text) or text.at_end:
                text.position = end
                return value
        text.read_more()
