"""The door to all files: what kind a file is, by its content, and its records as a stream.

Compression (gzip, Zstandard), UTF-8 with or without a byte order mark, JSON lines, JSON
arrays, CSV, TSV, parquet and Arrow are told by their first bytes. Memory holds one block,
whatever the size of the file; of an Arrow file, one record batch as the writer made it.

Rows come as they are read, so an error may come after some of them: they are good only when all
have come. Each kind's module says what damage cannot be seen. Under gzip, and under Zstandard
where its writer left a checksum as the zstd program does, all of it can.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from dpo_cli.core.errors import DataError
from dpo_cli.data.reading import json_text
from dpo_cli.data.reading.base import Block, BrokenLines, Lines, OnBytes, Record, is_utf16, missing
from dpo_cli.data.reading.columnar import ARROW_FILE, ARROW_STREAM, PARQUET, read_columnar
from dpo_cli.data.reading.delimited import delimiter_of, read_delimited
from dpo_cli.data.reading.json_text import parse_lines, read_array, read_array_within, read_lines, read_objects

_RECORDS_A_BLOCK = 1000
_BYTES_A_BLOCK = 1 << 22
_HEAD = 1 << 16
_GZIP = re.compile(rb"\x1f\x8b")
_ZSTD = re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # a frame, or one to be skipped
_WORD = re.compile(r'(?!(?:null|true|false|NaN|Infinity)$)[^\W\d][\w-]*|"[^\W\d][\w-]*"')
_COLUMNAR = (PARQUET, ARROW_FILE, ARROW_STREAM)
_REFUSED = {
    rb"version https://git-lfs": "is a Git LFS pointer, not the data itself; fetch it with: git lfs pull",
    rb"PK\x03\x04": "is a zip archive or an Excel workbook; unpack it first, or save the sheet as CSV",
    rb"\xd0\xcf\x11\xe0": "is an old Excel workbook; save the sheet as CSV",
    rb".{257}ustar": "is a tar archive; unpack it first: tar -xf",
    rb"7z\xbc\xaf": "is a 7z archive; unpack it first: 7z x",
    rb"BZh[1-9]1AY&SY": "is compressed with bzip2; unpack it first: bunzip2",
    rb"\xfd7zXZ\x00": "is compressed with xz; unpack it first: unxz",
    rb"\x04\x22\x4d\x18": "is compressed with LZ4; unpack it first: unlz4",
    rb"SQLite format 3": "is an SQLite database; export the table as CSV",
    rb"(?i)\s*<(!doctype html|html|\?xml)": "is a web page or XML, not the data itself; fetch the file behind it",
    rb"\x80[\x02-\x05]": "is a pickle, which can run code; it is never read. Save the data as JSON lines",
    rb"PARE": "is an encrypted parquet file; save it without encryption",
}


def read_records(path: Path, on_bytes: OnBytes = lambda _: None, within: str = "") -> Iterator[Record]:
    """All records of a file, in order.

    Args:
        path: The file.
        on_bytes: Called with the bytes read from disk.
        within: Where the list of rows lies inside the file's one object, or inside each of
            its records: keys with dots between. Nothing: the records are the rows.

    Raises:
        DataError: See :func:`read_blocks`.
    """
    row = 0
    for block in read_blocks(path, on_bytes, within):
        try:
            records = parse_lines(path, block, row) if isinstance(block, Lines) else block
        except BrokenLines as error:
            yield from error.before
            raise
        row += len(records)
        yield from records


def read_blocks(path: Path, on_bytes: OnBytes = lambda _: None, within: str = "") -> Iterator[Block]:
    """A file as blocks: JSON lines unparsed, anything else as records.

    Raises:
        DataError: The file is missing, empty, a Git LFS pointer, damaged, in another
            encoding, or of no known kind; the message names the place.
    """
    compression = ""
    try:
        if path.exists() and not path.is_file():
            raise DataError(
                f"{path} cannot be read: it is a {'folder' if path.is_dir() else 'pipe or device'}, no file"
            )
        with _CountedFile(path, on_bytes) as raw:
            head = raw.read(_HEAD)
            raw.seek(0)
            _refuse(path, head)
            if head.startswith(_COLUMNAR):
                yield from _grouped(_unfold(path, read_columnar(path, io.BufferedReader(raw), head), within), raw)
            else:
                compression = "gzip" if _GZIP.match(head) else "Zstandard" if _ZSTD.match(head) else ""
                yield from _read_text(path, _decompressed(raw, compression), within, is_plain=not compression)
            raw.report_rest()
    except FileNotFoundError:
        raise missing(path) from None
    except (EOFError, zlib.error, OSError, pa.ArrowException) as error:
        if compression and getattr(error, "errno", None) is None:
            raise DataError(f"{path} is a damaged {compression} file ({error}); fetch it again") from None
        raise DataError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _refuse(path: Path, head: bytes) -> None:
    if not head.strip():
        raise DataError(f"{path} is empty; it must hold a JSON array, JSON lines or a table")
    for start, what in _REFUSED.items():
        if re.match(start, head, re.DOTALL):
            raise DataError(f"{path} {what}")


def _read_text(path: Path, file: IO[bytes], within: str, *, is_plain: bool) -> Iterator[Block]:
    head = file.read(_HEAD)
    if head.startswith(_COLUMNAR):
        raise DataError(f"{path} is a compressed parquet or Arrow file; unpack it first, it is compressed within")
    if _GZIP.match(head) or _ZSTD.match(head):
        raise DataError(f"{path} is compressed twice; unpack it once")
    begin = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
    head = head[begin:]
    _refuse(path, head)
    if is_utf16(head):
        raise DataError(f"{path} is UTF-16 text; convert it: iconv -f UTF-16 -t UTF-8")
    # What was read of the file is put in front of the rest.
    source = _Joined(head, file)
    text = io.BufferedReader(source, json_text.BLOCK)
    start = head.lstrip()
    line, newline, _ = start.partition(b"\n")
    if start.startswith(b"["):
        yield from _grouped(_unfold(path, read_array(path, text), within), source)
    elif start.startswith(b"{") and within:
        yield from _grouped(read_array_within(path, text, within.split(".")), source)
    elif start.startswith(b"{") and _goes_on(start, line, newline):
        yield from _grouped(read_objects(path, text), source)
    elif not start.startswith(b"{") and newline and (delimiter := _delimiter_of(path, start)):
        if within:
            raise DataError(f"{path}: records: {within}: a CSV file has no lists of rows in it; leave records out")
        yield from _grouped(read_delimited(path, text, delimiter), source)
    elif within:
        records = (record for lines in read_lines(path, text) for record in parse_lines(path, lines))
        yield from _grouped(_unfold(path, records, within), source)
    else:
        yield from read_lines(path, text, begin if is_plain else None)


def _goes_on(start: bytes, line: bytes, newline: bytes) -> bool:
    """Whether a text that begins with an object has it over several lines, or several objects in its first line."""
    if newline:
        return not _is_json(line)
    try:
        text = start.decode("utf-8", errors="ignore")
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return False
    return bool(text[end:].strip())


def _delimiter_of(path: Path, start: bytes) -> str | None:
    """The delimiter of the table that a text is by its first line; None where it is none.

    A table of one column is known by a line of one word above others.
    """
    line, _, rest = start.partition(b"\n")
    if rest.strip() and _WORD.fullmatch(line.decode("utf-8", errors="ignore").strip()):
        return ","
    return None if _is_json(line) else delimiter_of(path, line)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _unfold(path: Path, records: Iterator[Record], within: str) -> Iterator[Record]:
    """The rows that lie in a list inside each record."""
    if not within:
        yield from records
        return
    row = 0
    for record in records:
        place = f"row {record.row}" if record.line is None else f"line {record.line}"
        value: Any = record.value
        for key in within.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, list):
            raise DataError(f"{path}, {place}: records: there is no list at {within!r}")
        for inner in value:
            yield Record(row, record.line, inner)
            row += 1


def _grouped(records: Iterator[Record], source: _CountedFile | _Joined) -> Iterator[Block]:
    """Blocks of so many records, or of those from so many bytes where records are large."""
    block: list[Record] = []
    begin = source.num_read
    for record in records:
        block.append(record)
        if len(block) >= _RECORDS_A_BLOCK or source.num_read - begin >= _BYTES_A_BLOCK:
            yield block
            block = []
            begin = source.num_read
    if block:
        yield block


# --- bytes --------------------------------------------------------------------------------


class _CountedFile(io.FileIO):
    """A file that reports as many bytes as it has, compressed ones as they lie on disk, however often some are read."""

    def __init__(self, path: Path, on_bytes: OnBytes) -> None:
        super().__init__(path, "rb")
        self.num_read = 0
        self._on_bytes = on_bytes
        self._size = os.fstat(self.fileno()).st_size

    def readinto(self, buffer: Any) -> int | None:
        """Read into a buffer and report it."""
        count = super().readinto(buffer)
        self._report(count or 0)
        return count

    def read(self, size: int = -1) -> bytes:  # type: ignore[override]
        """Read and report it."""
        data = super().read(size) or b""
        self._report(len(data))
        return data

    def report_rest(self) -> None:
        """Report what nobody had to read."""
        self._report(self._size)

    def _report(self, count: int) -> None:
        if new := min(count, self._size - self.num_read):
            self.num_read += new
            self._on_bytes(new)


class _Joined(io.RawIOBase):
    """Bytes that were read already, then the rest of their file."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self.num_read = 0
        self._head = memoryview(head)
        self._rest = rest

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer, or a part of it."""
        size = len(buffer)
        data = self._head[:size] if self._head else self._rest.read(size)
        self._head = self._head[size:]
        buffer[: len(data)] = data
        self.num_read += len(data)
        return len(data)


def _decompressed(raw: io.FileIO, name: str) -> Any:
    buffered = io.BufferedReader(raw, json_text.BLOCK)
    if name == "gzip":
        return gzip.GzipFile(fileobj=buffered)
    if name == "Zstandard":
        return pa.CompressedInputStream(pa.PythonFile(buffered, mode="r"), "zstd")
    return buffered
