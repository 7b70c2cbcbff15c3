"""CSV and TSV: a header line, then one record a line, with quoting; every value is text.

Quotes are held to the letter of RFC 4180, as csv.reader(strict=True) does not: it reads ``5" pipe,PVC``. So the file
has an even number of quotes, and each row has as many values as the header. One byte that is changed, lost or added
below the header is then an error, or changes the texts of one row (one without a visible character may become a blank
line, which is skipped); it never moves a text to another row or column. A file that is cut off gives whole rows, then
an error or, where it was cut between two rows or in the last value of one, nothing. What cannot be seen: a change
within a text, lost rows at the end, the lost end of the last text, and a change in the header that makes another name
or, between two columns, another delimiter.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from dpo_cli.core.errors import DataError
from dpo_cli.data.reading import base
from dpo_cli.data.reading.base import Record, not_utf8, too_long

_DELIMITERS = {",": "comma", "\t": "tab", ";": "semicolon"}


def delimiter_of(path: Path, header: bytes) -> str | None:
    """The delimiter of a header line, the one it has most of outside quotes; None where it is no header.

    Raises:
        DataError: There are two that it may be.
    """
    text = re.sub(r'"[^"]*"', "", header.decode("utf-8", errors="replace"))
    (most, first), (second, other), _ = sorted(((text.count(each), each) for each in _DELIMITERS), reverse=True)
    if most and most == second:
        raise DataError(
            f"{path}, line 1: no JSON, and as the header of a table it may be cut at each {_DELIMITERS[first]} or"
            f" each {_DELIMITERS[other]}; quote the names that hold one"
        )
    return first if most else None


def read_delimited(path: Path, file: IO[bytes], delimiter: str) -> Iterator[Record]:
    """The records of a CSV or TSV file, as objects of texts.

    Texts that hold the delimiter, quotes or line ends are quoted with ``"``; a quote within
    is doubled. ``00000`` and ``3.3`` stay what they are. Blank lines are skipped.

    Raises:
        DataError: It is not UTF-8, a quote stands where none may be, the file ends within a line,
            the header names a column twice or not at all, a line has more or fewer values than
            the header, or there are no rows.
    """
    field = re.compile(rf'"(?:[^"]++|"")*+"|[^"\n{delimiter}]*+')
    header: list[str] = []
    row = 0
    for line, text in _lines(path, file, delimiter, field):
        is_ended = text.endswith("\n")
        text = text.rstrip("\r\n")
        if not text.strip(" "):
            continue
        values = _values(path, line, text, delimiter, field)
        if not header:
            header = _checked_header(path, line, values)
            continue
        if len(values) < len(header) and not is_ended:
            raise DataError(
                f"{path}, line {line}: the file ends within this line, which has {len(values)} of {len(header)} values;"
                " it is cut off: fetch it again, or take the line out"
            )
        if len(values) != len(header):
            names = ", ".join(map(repr, header[:8])) + ", ..." * (len(header) > 8)
            raise DataError(
                f"{path}, line {line}: {len(values)} values where the header has {len(header)} ({names[:200]});"
                f" quote texts that hold a {_DELIMITERS[delimiter]}, a quote or a line end"
            )
        yield Record(row, line, dict(zip(header, values, strict=True)))
        row += 1
    if not row:
        raise DataError(
            f"{path} has no rows: it is read as a table, for the {_DELIMITERS[delimiter]} in its first line, and below"
            " this header there is nothing"
        )


def _lines(path: Path, file: IO[bytes], delimiter: str, field: re.Pattern[str]) -> Iterator[tuple[int, str]]:
    """Lines with their ends, each with its number; what is quoted may go on over several."""
    line = 1
    while data := file.readline(base.LONGEST):
        if data.count(b'"') % 2:
            if (whole := _to_closing_quote(path, file, data, line)) is None:
                raise _unclosed_quote(path, line, data.decode("utf-8", errors="replace"), delimiter, field)
            data = whole
        if not data.endswith(b"\n") and len(data) >= base.LONGEST:
            raise too_long(path, line)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(path, data, line + data.count(b"\n", 0, error.start)) from None
        if "\0" in text:
            at = line + text.count("\n", 0, text.index("\0"))
            raise DataError(f"{path}, line {at}: a zero byte, which is no text; fetch the file again")
        yield line, text
        line += data.count(b"\n")


def _to_closing_quote(path: Path, file: IO[bytes], data: bytes, line: int) -> bytes | None:
    """A line that ends within quotes, with all lines up to the one that closes them; None where none does."""
    parts, size = [data], len(data)
    while size < base.LONGEST:
        more = file.readline(base.LONGEST)
        if not more:
            return None
        parts.append(more)
        size += len(more)
        if more.count(b'"') % 2:
            return b"".join(parts)
    raise too_long(path, line)


def _unclosed_quote(path: Path, line: int, text: str, delimiter: str, field: re.Pattern[str]) -> DataError:
    """The error for a line with a quote that nothing closes: it opens a value, or stands within one."""
    values, end = _split(text, delimiter, field)
    if values[-1] or text[end] != '"':
        return _stray_quote(path, line, text, values, end)
    return DataError(
        f"{path}, line {line}, column {end + 1}: broken CSV: the quote that opens this value is not closed in the rest"
        " of the file; it is one too many, or the file is cut off"
    )


def _values(path: Path, line: int, text: str, delimiter: str, field: re.Pattern[str]) -> list[str]:
    if '"' not in text:
        return text.split(delimiter)
    values, end = _split(text, delimiter, field)
    if end < len(text):
        raise _stray_quote(path, line, text, values, end)
    return [value[1:-1].replace('""', '"') if value[:1] == '"' else value for value in values]


def _split(text: str, delimiter: str, field: re.Pattern[str]) -> tuple[list[str], int]:
    """The values of a line as they are written, and where they end: there, or before a quote that encloses none."""
    values: list[str] = []
    end = 0
    while found := field.match(text, end):
        values.append(found[0])
        end = found.end()
        if text[end : end + 1] != delimiter:
            break
        end += 1
    return values, end


def _stray_quote(path: Path, line: int, text: str, values: list[str], end: int) -> DataError:
    """The error for a quote at or before this place, behind these values."""
    at = line + text.count("\n", 0, end)
    column = end - text.rfind("\n", 0, end)
    long = [number for number, value in enumerate(values, start=1) if "\n" in value]
    origin = (
        f" (value {long[0]}, from line {line} on, goes over several lines: perhaps by a quote too many)" if long else ""
    )
    return DataError(
        f"{path}, line {at}, column {column}: broken CSV: a quote in value {len(values)} that does not enclose all of"
        f' it; a text that holds a quote is itself quoted, and the quote within is written ""{origin}'
    )


def _checked_header(path: Path, line: int, names: list[str]) -> list[str]:
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise DataError(f"{path}, line {line}: the header names {', '.join(map(repr, twice))} twice")
    if "" in names:
        raise DataError(
            f"{path}, line {line}: column {names.index('') + 1} has no name in the header; name it,"
            " or leave it out (pandas: to_csv(index=False))"
        )
    return names
