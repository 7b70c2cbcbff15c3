"""The footer of a parquet file, checked against itself.

No checksum covers it, but it says many things twice. Where they do not agree it is damaged:
a column could go by another name, or take its values from another one's place.
"""

from __future__ import annotations

from itertools import pairwise
from typing import IO, Any

# Numbers of the fields in parquet.thrift
_SCHEMA, _NUM_ROWS, _ROW_GROUPS = 2, 3, 4
_ELEMENT_TYPE, _REPETITION, _NAME, _NUM_CHILDREN = 1, 3, 4, 5
_COLUMNS, _BYTES_IN_GROUP, _ROWS_IN_GROUP = 1, 2, 3
_CHUNK = 3
_CHUNK_TYPE, _PATH, _NUM_VALUES, _SIZE, _DATA_AT, _DICTIONARY_AT = 1, 3, 5, 7, 9, 11
_REPEATED = 2


def check_footer(file: IO[bytes]) -> int:
    """Check the footer of a file that is known to begin as parquet does.

    Returns:
        How many bytes a row takes, unpacked, in the row group where rows are largest.

    Raises:
        ValueError: It is cut off, or does not agree with itself.
    """
    begin = file.seek(-8, 2)
    tail = file.read(8)
    begin -= int.from_bytes(tail[:4], "little")
    if tail[4:] != b"PAR1" or begin < 4:
        raise ValueError("it is cut off")
    file.seek(begin)
    try:
        footer, _ = read_struct(file.read())
        leaves = _leaves(iter(footer[_SCHEMA]))
        places = [place for group in footer[_ROW_GROUPS] for place in _checked_group(group, leaves)]
        num_rows = sum(group[_ROWS_IN_GROUP] for group in footer[_ROW_GROUPS])
        largest = max(
            (group[_BYTES_IN_GROUP] // (group[_ROWS_IN_GROUP] or 1) for group in footer[_ROW_GROUPS]), default=0
        )
    except (IndexError, KeyError, TypeError, AttributeError, RecursionError, StopIteration):
        raise ValueError("its footer is damaged") from None
    if num_rows != footer[_NUM_ROWS]:
        raise ValueError(f"its row groups have {num_rows} rows where the footer says {footer[_NUM_ROWS]}")
    places.sort()
    if any(behind < end for (_, end), (behind, _) in pairwise([(0, 4), *places, (begin, begin)])):
        raise ValueError("its columns overlap")
    return largest


def _leaves(schema: Any) -> list[tuple[Any, list[bytes], bool]]:
    """Type and path of all columns with values, and whether rows have several of them."""
    leaves: list[tuple[Any, list[bytes], bool]] = []

    def walk(num: int, above: list[bytes], repeated: bool) -> None:
        for _ in range(num):
            element = next(schema)
            path = [*above, element[_NAME]]
            many = repeated or element.get(_REPETITION) == _REPEATED
            if element.get(_NUM_CHILDREN):
                walk(element[_NUM_CHILDREN], path, many)
            else:
                leaves.append((element[_ELEMENT_TYPE], path, many))

    walk(next(schema)[_NUM_CHILDREN], [], False)
    return leaves


def _checked_group(group: Any, leaves: list[tuple[Any, list[bytes], bool]]) -> list[tuple[int, int]]:
    """Where the columns of a row group lie."""
    num_rows = group[_ROWS_IN_GROUP]
    chunks = [column[_CHUNK] for column in group[_COLUMNS]]
    if [(chunk[_CHUNK_TYPE], chunk[_PATH]) for chunk in chunks] != [(kind, path) for kind, path, _ in leaves]:
        raise ValueError("its footer has two lists of columns that do not agree")
    places = []
    for chunk, (_, _, many) in zip(chunks, leaves, strict=True):
        if chunk[_NUM_VALUES] < num_rows or (chunk[_NUM_VALUES] > num_rows and not many):
            raise ValueError(f"a column has {chunk[_NUM_VALUES]} values for {num_rows} rows")
        at = min(chunk[_DATA_AT], chunk.get(_DICTIONARY_AT) or chunk[_DATA_AT])
        if chunk[_NUM_VALUES]:
            places.append((at, at + chunk[_SIZE]))
    return places


def read_struct(data: bytes) -> tuple[dict[int, Any], int]:
    """A struct in Thrift's compact protocol as values by the number of their field, and its size in bytes."""
    reader = _Compact(data)
    return reader.struct(), reader.at


class _Compact:
    """Thrift's compact protocol, from the position on."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.at = 0

    def struct(self) -> dict[int, Any]:
        """The struct at the position."""
        fields: dict[int, Any] = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 8:
            return self._bytes(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            size = head >> 4 if head >> 4 < 15 else self._unsigned()
            return [self._value(head & 15) for _ in range(size)]
        if kind == 12:
            return self.struct()
        if kind == 11:
            size = self._unsigned()
            kinds = self._byte() if size else 0
            return [(self._value(kinds >> 4), self._value(kinds & 15)) for _ in range(size)]
        if kind in (1, 2, 3):
            return self._byte()
        if kind == 7:
            return self._bytes(8)
        raise ValueError("its footer is damaged")

    def _byte(self) -> int:
        value = self._data[self.at]
        self.at += 1
        return value

    def _bytes(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self._data):
            raise IndexError
        return self._data[self.at - size : self.at]

    def _unsigned(self) -> int:
        value = shift = 0
        while (byte := self._byte()) & 128:
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                raise IndexError
        return value | byte << shift

    def _signed(self) -> int:
        value = self._unsigned()
        return value >> 1 ^ -(value & 1)
