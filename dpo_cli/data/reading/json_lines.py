"""JSON lines: cut into runs of whole lines, which another process may parse.

One byte that is changed, lost or added is an error, or changes the values of one row. A file that
is cut off gives whole rows, then an error or, where it was cut between two rows, nothing; lost
lines cannot be seen.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import orjson

from dpo_cli.core.errors import DataError
from dpo_cli.data.reading import base, json_text
from dpo_cli.data.reading.base import BrokenLines, Lines, Record, not_utf8, too_long
from dpo_cli.data.reading.json_text import explain, unreadable

_EXPECTED = "expected a JSON array, JSON objects, or CSV with a header line"
_LINES_NAMED = 10


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
    while data := file.read(json_text.BLOCK):
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
