"""What reading yields, and the errors that every kind of file can have."""

from __future__ import annotations

import codecs
import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dpo_cli.core.errors import DataError

LONGEST = 1 << 27
"""Bytes of the longest row. More is a quote or a bracket that nothing closes, or a file without rows."""

_PYTHON_WORDS = {"None": "null", "True": "true", "False": "false"}

OnBytes = Callable[[int], None]
"""Called with every so many bytes that were read from disk."""


class Record(NamedTuple):
    """One record of a file.

    Attributes:
        row: Its number, from 0.
        line: The line it begins at, from 1; None in a file that has no lines.
        value: What it holds, as JSON has it. In a columnar file times and decimals are
            texts, and bytes stay bytes.
    """

    row: int
    line: int | None
    value: Any


@dataclass(frozen=True, slots=True)
class Lines:
    """A run of whole lines of JSON, not yet parsed, so that another process can do it.

    Attributes:
        data: The bytes.
        first_line: The number of the first line, from 1.
        place: Where they lie in a file that is not compressed: the file, and the first byte. Another
            process then reads them there, which costs less than to send them.
    """

    data: bytes
    first_line: int
    place: tuple[Path, int] | None = None

    def __reduce__(self) -> Any:
        """How it travels."""
        if self.place is None:
            return Lines, (self.data, self.first_line)
        return _lines_at, (*self.place, len(self.data), self.first_line)


def _lines_at(path: Path, start: int, size: int, first_line: int) -> Lines:
    with path.open("rb") as file:
        file.seek(start)
        return Lines(file.read(size), first_line, (path, start))


Block = Lines | list[Record]
"""A piece of a file: lines to parse, or records."""


class BrokenLines(DataError):
    """Lines that are no JSON.

    Args:
        problems: What is broken, one message a line.
        before: The records before the first of them.
    """

    def __init__(self, problems: Sequence[str], before: Sequence[Record] = ()) -> None:
        super().__init__(problems)
        self.before = list(before)


def missing(path: Path) -> DataError:
    """The error for a file that is not there; it names one beside it that is called almost so."""
    beside = [other.name for other in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"did you mean {path.with_name(close[0])}?" if close else "put your data there, or name another file"
    return DataError(f"{path} is missing; {hint}")


def too_long(path: Path, line: int) -> DataError:
    """The error for a row that does not end."""
    return DataError(
        f"{path}, line {line}: a row of more than {LONGEST >> 20} MiB; a quote or a bracket is not closed, or the file"
        " is one object: then say with records: KEY where in it the list of rows lies"
    )


def not_utf8(path: Path, data: bytes, line: int) -> DataError:
    """The error for bytes that are not UTF-8; it names the likely encoding."""
    text = data.decode("utf-8", errors="replace")
    num_bad = text.count("\ufffd")
    num_good = sum(character > "\u07ff" for character in text) - num_bad  # of three bytes or four: hardly by chance
    if num_good <= num_bad and _decoded(data, "gb18030") is not None:
        return DataError(f"{path}, line {line}: not UTF-8 text, it looks like GBK; convert it: iconv -f GBK -t UTF-8")
    return DataError(f"{path}, line {line}: not UTF-8 text; fetch the file again, or convert it to UTF-8")


def is_utf16(head: bytes) -> bool:
    """Whether a file that begins like this is UTF-16 text, with or without a byte order mark."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    # An ASCII character has one byte of zero: the first or the last. A few may also be damage in UTF-8.
    num_first, num_last = head[::2].count(0), head[1::2].count(0)
    if not num_first + num_last or (_decoded(head, "utf-8") and num_first + num_last < len(head) / 4):
        return False
    text = _decoded(head, "utf-16-be" if num_first > num_last else "utf-16-le")
    return text is not None and "\0" not in text


def _decoded(data: bytes, encoding: str) -> str | None:
    """Bytes as text in an encoding, if they are; the last character may be cut off."""
    try:
        return codecs.getincrementaldecoder(encoding)().decode(data)
    except UnicodeDecodeError:
        return None


# --- broken JSON --------------------------------------------------------------------------


def explain(message: str, text: str, position: int) -> str:
    """What Python's parser says of broken JSON, with what is likely wrong and how to fix it.

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
    return f"{shorter(message)}; {hint}" if hint else shorter(message)


def shorter(message: str) -> str:
    """A message of Python's parser without the place that would follow it."""
    return message.removesuffix(" at").removesuffix(" starting")


def unreadable(error: ValueError) -> str:
    """What Python cannot hold: an integer of thousands of digits."""
    return "a number has too many digits" if "digits" in str(error) else str(error)
