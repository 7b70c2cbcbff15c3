"""JSON arrays, objects one after another, and arrays inside large objects, as a stream of bounded memory.

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

from dpo_cli.core.errors import DataError
from dpo_cli.data.reading import base
from dpo_cli.data.reading.base import Record, not_utf8, too_long

BLOCK = 1 << 20
"""Bytes read at a time, and about the bytes in a run of lines."""

_CUT_OFF = "the file seems cut off"


# --- errors ---------------------------------------------------------------------------------


def explain(message: str, text: str, position: int) -> str:
    """What Python's parser says of broken JSON, with what is likely wrong and how to mend it.

    Args:
        message: The parser's message.
        text: The JSON, or what is known of it.
        position: The place that the message is about.
    """
    found, before = text[position : position + 1], text[:position].rstrip()[-1:]
    hint = ""
    if message.startswith("Illegal trailing comma") or (before == "," and found in ("]", "}")):
        bracket = found if found in ("]", "}") else text[position + 1 :].lstrip()[:1]
        hint = f"a comma stands before the closing {bracket}: take it out"
    elif before == found == ",":
        hint = "a comma too many: take it out"
    elif found == "'":
        hint = "texts and names need double quotes: these look like Python's; write them with json.dumps"
    elif message.startswith("Unterminated string") or (message.startswith("Invalid control") and found in ("\n", "\r")):
        hint = "its closing quote is missing, or a line end within it is not written as \\n"
    elif message.startswith("Invalid control"):
        hint = f"within a text it is written as {json.dumps(found)[1:-1]}"
    elif message.startswith("Invalid \\"):
        hint = "a backslash within a text is written as \\\\"
    elif message.startswith("Expecting ',' delimiter") and found == '"':
        hint = "a comma is missing before this quote"
    elif message.startswith(("Expecting ',' delimiter", "Expecting ':' delimiter")) and before == '"' and found:
        hint = 'the text before it ends too soon: its quotes do not match, or one within it is not written as \\"'
    elif message.startswith("Expecting property name") and found.isidentifier():
        hint = "names need double quotes"
    elif message.startswith("Expecting value"):
        word = next((word for word in _PYTHON_WORDS if text.startswith(word, position)), None)
        if word:
            hint = f"{word} is Python's; JSON has {_PYTHON_WORDS[word]}"
        elif found and found in "#/":
            hint = "JSON has no comments: take it out"
    return f"{_shorter(message)}; {hint}" if hint else _shorter(message)


def _shorter(message: str) -> str:
    """A message of Python's parser without the place that would follow it."""
    return message.removesuffix(" at").removesuffix(" starting")


_PYTHON_WORDS = {"None": "null", "True": "true", "False": "false"}


def unreadable(error: ValueError) -> str:
    """What Python cannot hold: an integer of thousands of digits."""
    return "a number has too many digits" if "digits" in str(error) else str(error)


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
                what = f"{_shorter(error.msg)}; {_CUT_OFF}" if cut_off else explain(error.msg, text.text, error.pos)
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
