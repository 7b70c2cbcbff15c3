"""From a file to records, by content and never by its name.

JSON arrays and JSON lines, plain or gzip, UTF-8 with or without a byte order mark, are read
as streams: memory holds one record and one block, whatever the size of the file.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from dpo_cli.core.errors import DataError

_BLOCK = 1 << 20
_LFS_POINTER = b"version https://git-lfs"
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


@dataclass(frozen=True)
class Record:
    """One record of a file.

    Attributes:
        row: Its number, from 0.
        line: The line it begins at, from 1.
        value: What it holds, as JSON has it.
    """

    row: int
    line: int
    value: Any


class _CountedFile(io.FileIO):
    """A file that says how many of its bytes were read, compressed ones as they lie on disk."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(path, "rb")
        self._on_bytes = on_bytes

    def readinto(self, buffer: Any) -> int | None:
        """Read into a buffer and report how much."""
        count = super().readinto(buffer)
        self._on_bytes(count or 0)
        return count


def read_records(path: Path, on_bytes: Callable[[int], None] = lambda _: None) -> Iterator[Record]:
    """All records of a file, in order; ``on_bytes`` hears of the bytes read from disk.

    Raises:
        DataError: The file is missing, empty, a Git LFS pointer, damaged, in another
            encoding, or not JSON; the message names the place.
    """
    try:
        with path.open("rb") as raw:
            head = raw.read(1024)
    except FileNotFoundError:
        raise DataError(f"{path} is missing; put your data there, or name it in params.yaml") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    if not head.strip():
        raise DataError(f"{path} is empty; it must hold a JSON array or JSON lines")
    if head.startswith(_LFS_POINTER):
        raise DataError(f"{path} is a Git LFS pointer, not the data itself; fetch it with: git lfs pull")
    try:
        with io.BufferedReader(_CountedFile(path, on_bytes), _BLOCK) as raw:
            file: Any = gzip.GzipFile(fileobj=raw) if head.startswith(b"\x1f\x8b") else raw
            yield from _read_json(path, file)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is a damaged gzip file ({error}); fetch it again") from None


def _read_json(path: Path, file: IO[bytes]) -> Iterator[Record]:
    start = file.read(4)
    if start.startswith(_UTF16_MARKS):
        raise DataError(f"{path} is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8")
    file.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
    begin = file.tell()
    first = file.read(1)
    while first.isspace():
        first = file.read(1)
    if not first:
        raise DataError(f"{path} is empty; it must hold a JSON array or JSON lines")
    file.seek(begin)
    reader = _read_array if first == b"[" else _read_lines
    yield from reader(path, file)


def _not_utf8(path: Path, data: bytes, line: int) -> DataError:
    try:
        data.decode("gb18030")
    except UnicodeDecodeError:
        return DataError(f"{path}, line {line}: not UTF-8 text; convert the file to UTF-8")
    return DataError(f"{path}, line {line}: not UTF-8 text, it looks like GBK; convert it: iconv -f GBK -t UTF-8")


def _read_lines(path: Path, file: IO[bytes]) -> Iterator[Record]:
    row = 0
    for line, data in enumerate(file, start=1):
        if not data.strip():
            continue
        try:
            value = json.loads(data.decode("utf-8").rstrip("\r\n"))
        except UnicodeDecodeError:
            raise _not_utf8(path, data, line) from None
        except json.JSONDecodeError as error:
            hint = "; expected a JSON array or one JSON value a line" if row == 0 else ""
            raise DataError(f"{path}, line {line}, column {error.colno}: broken JSON: {error.msg}{hint}") from None
        except RecursionError:
            raise DataError(f"{path}, line {line}: JSON nested too deeply") from None
        except ValueError as error:
            raise DataError(f"{path}, line {line}: {error}") from None
        yield Record(row, line, value)
        row += 1


class _ArrayText:
    """The text of a JSON array that is read block by block and forgotten as it is consumed."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path = path
        self.text = ""
        self.position = 0
        self.at_end = False
        self._file = file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._counted = 0  # position up to which line ends are counted in _line
        self._line = 1

    def read_more(self) -> None:
        """Append a block, as long as what is held, and drop what was consumed."""
        self.line_of(self.position)
        self.text = self.text[self.position :]
        self.position = self._counted = 0
        data = self._file.read(max(_BLOCK, len(self.text)))
        self.at_end = not data
        try:
            self.text += self._decoder.decode(data, final=self.at_end)
        except UnicodeDecodeError as error:
            line = self.line_of(len(self.text)) + data.count(b"\n", 0, error.start)
            raise _not_utf8(self.path, data, line) from None

    def line_of(self, position: int) -> int:
        """The line, from 1, of a position in the text that is held and not yet passed."""
        self._line += self.text.count("\n", self._counted, position)
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

    def broken(self, message: str, position: int) -> DataError:
        """The error for what stands at a position of the text."""
        return DataError(f"{self.path}, line {self.line_of(position)}: broken JSON: {message}")


def _read_array(path: Path, file: IO[bytes]) -> Iterator[Record]:
    text = _ArrayText(path, file)
    text.next_character()
    text.position += 1  # the opening bracket
    decoder = json.JSONDecoder()
    row = 0
    if text.next_character() == "]":
        text.position += 1
    else:
        while True:
            if not text.next_character():
                raise text.broken("the array is not closed; the file seems cut off", text.position)
            line = text.line_of(text.position)
            value, end = _decode_element(text, decoder)
            yield Record(row, line, value)
            row += 1
            text.position = end
            mark = text.next_character()
            if not mark:
                raise text.broken("the array is not closed; the file seems cut off", text.position)
            if mark not in ",]":
                raise text.broken(f"expected ',' or ']' after row {row - 1}, got {mark!r}", text.position)
            text.position += 1
            if mark == "]":
                break
    if text.next_character():
        raise text.broken("text after the end of the array", text.position)


def _decode_element(text: _ArrayText, decoder: json.JSONDecoder) -> tuple[Any, int]:
    """Decode the element at the position, reading on until it is whole."""
    while True:
        try:
            value, end = decoder.raw_decode(text.text, text.position)
        except json.JSONDecodeError as error:
            near_end = error.pos > len(text.text) - 16 or error.msg.startswith("Unterminated string")
            if text.at_end or not near_end:
                cut = "; the file seems cut off" if text.at_end and near_end else ""
                raise text.broken(f"{error.msg}{cut}", error.pos) from None
        except RecursionError:
            raise text.broken("nested too deeply", text.position) from None
        except ValueError as error:
            raise text.broken(str(error), text.position) from None
        else:
            # Behind a number that ends the block, '.', 'e' or 'e+' may be the start of its rest.
            needed = 3 if isinstance(value, int | float) else 1
            if end + needed <= len(text.text) or text.at_end:
                return value, end
        text.read_more()
