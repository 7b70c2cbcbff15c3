"""The footer of a parquet file: what it says twice must agree."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

Message = Callable[..., str]

NUMBERS = list(range(1000, 1060))
NESTED = pa.table({"text": ["x" * 1000] * 60, "messages": [[{"role": "user", "content": "x"}] * 2, []] * 30})


def as_parquet(table: pa.Table, **options: Any) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file, **{"row_group_size": 16, "use_dictionary": False, **options})
    return file.getvalue()


def footer_of(data: bytes) -> tuple[pq.FileMetaData, int]:
    """A footer as pyarrow reads it, and where it begins."""
    footer = pq.ParquetFile(io.BytesIO(data)).metadata
    return footer, len(data) - 8 - footer.serialized_size


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :]


@pytest.mark.parametrize("options", [{}, {"store_schema": False}])
def test_a_column_that_is_named_in_two_ways_is_named(message: Message, options: dict[str, Any]) -> None:
    data = as_parquet(NESTED, **options)
    _, place = footer_of(data)
    found = 0
    while (place := data.find(b"role", place)) >= 0:
        assert "do not agree" in message(flipped(data, place + 1))
        place += 1
        found += 1
    assert found > 3


def test_rows_that_get_lost_are_named(message: Message) -> None:
    data = as_parquet(pa.table({"a": NUMBERS}), compression="none", write_statistics=False)
    _, begin = footer_of(data)
    texts = {message(data[:place] + bytes([byte]) + data[place + 1 :]) for place, byte in footer_changes(data, begin)}
    assert all(text.startswith("is a damaged parquet file, behind row ") for text in texts)
    assert any("values for" in text for text in texts)


def test_another_number_of_rows_is_named(message: Message) -> None:
    data = as_parquet(pa.table({"a": NUMBERS}))
    changed = data.replace(b"\x16\x78\x19", b"\x16\x76\x19")  # field 3: 2 * 60; then a list
    assert changed != data
    assert "its row groups have 60 rows where the footer says 59" in message(changed)


def test_a_column_that_is_taken_from_another_place_is_named(message: Message) -> None:
    data = as_parquet(pa.table({"a": NUMBERS}), compression="none")
    footer, begin = footer_of(data)
    second, third = (offset_in_footer(footer.row_group(i).column(0).data_page_offset) for i in (1, 2))
    changed = data[:begin] + data[begin:].replace(third, second)
    rows = pq.ParquetFile(io.BytesIO(changed)).read()["a"].to_pylist()
    assert rows[32:48] == rows[16:32]
    assert "its columns overlap" in message(changed)


def offset_in_footer(offset: int) -> bytes:
    """The field of a page's offset, as the footer has it: its number and type, then 2 * offset in two bytes."""
    return bytes([0x26, offset * 2 & 127 | 128, offset * 2 >> 7])


def footer_changes(data: bytes, begin: int) -> Iterator[tuple[int, int]]:
    """Changes of one byte in a footer by which pyarrow reads other rows than those that were written."""
    for place in range(begin, len(data) - 8):
        for byte in {0, data[place] ^ 1, data[place] ^ 2, data[place] ^ 64, data[place] ^ 128} - {data[place]}:
            changed = data[:place] + bytes([byte]) + data[place + 1 :]
            try:
                rows = [
                    row["a"]
                    for batch in pq.ParquetFile(io.BytesIO(changed)).iter_batches()
                    for row in batch.to_pylist()
                ]
            except (KeyError, OSError, ValueError, pa.ArrowException):
                continue
            if rows != NUMBERS:
                yield place, byte
