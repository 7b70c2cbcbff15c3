"""Parquet and Arrow (file and stream), batch by batch.

Of parquet, the footer is checked against itself, and pages against their checksums where the
writer left some; few do by default. What cannot be seen: a change in a page without a checksum
that leaves its values valid; and in any file, one in the header of a page, in the codec or in
the type of a column, by which all values in it are read in another way. Arrow has no checksums:
what cannot be seen is a change that leaves all values valid, such as another letter, an end of a
text that moves to its neighbor, a row that becomes null, or another name of a column in a
stream. No damage of one byte loses or repeats rows, and a file that is cut off is an error.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cli.core.errors import DataError
from dpo_cli.data.reading.base import Record

_ROWS_A_BATCH = 1000
_BYTES_A_BATCH = 1 << 22

PARQUET = b"PAR1"
ARROW_FILE = b"ARROW1"
ARROW_STREAM = b"\xff\xff\xff\xff"
_PADDING = 64 + 16  # between the last batch and the footer: up to an alignment, and the end of a stream
# All machines are little-endian: where a schema says otherwise, it is damaged, and numbers stay as they are.
_NATIVE = pa.ipc.IpcReadOptions(ensure_native_endian=False)
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def read_columnar(path: Path, file: IO[bytes], head: bytes) -> Iterator[Record]:
    """The records of a parquet or Arrow file.

    Raises:
        DataError: The file is damaged or cut off, or names a column twice.
    """
    name = "parquet" if head.startswith(PARQUET) else "Arrow"
    read = _parquet if head.startswith(PARQUET) else _arrow_file if head.startswith(ARROW_FILE) else _arrow_stream
    row = 0
    try:
        for batch in read(file):
            twice = [column for column, count in Counter(batch.schema.names).items() if count > 1]
            if twice:
                raise DataError(f"{path}: the columns {twice!r} are there twice")
            for value in _rows(_with_texts(batch)):
                yield Record(row, None, value)
                row += 1
    except (pa.ArrowException, OSError, ValueError, KeyError, OverflowError, NotImplementedError, MemoryError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        what, remedy = f"is a damaged {name} file", "fetch it again"
        if isinstance(error, NotImplementedError):
            what, remedy = f"is a {name} file that cannot be read", "fetch it again, or save it as JSON lines"
        if isinstance(error, MemoryError):
            what, remedy = f"is a {name} file that asks for more memory than there is", "fetch it again, or free some"
        raise DataError(f"{path} {what}, after row {row}: {reason}; {remedy}") from None


# --- parquet ------------------------------------------------------------------------------


def _parquet(file: IO[bytes]) -> Iterator[pa.RecordBatch]:
    parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20)
    _check_footer(parquet.metadata, file.seek(0, 2))
    groups = map(parquet.metadata.row_group, range(parquet.num_row_groups))
    bytes_a_row = max((group.total_byte_size // (group.num_rows or 1) for group in groups), default=0)
    num_rows = 0
    for batch in parquet.iter_batches(_rows_a_batch(bytes_a_row), use_threads=False):
        num_rows += batch.num_rows
        yield batch
    if num_rows != parquet.metadata.num_rows:
        raise ValueError(f"{num_rows} rows where the footer says {parquet.metadata.num_rows}")


def _check_footer(footer: pq.FileMetaData, size: int) -> None:
    """Refuse a footer that does not agree with itself: no checksum covers it, but it says many things twice."""
    columns = [footer.schema.column(at) for at in range(footer.num_columns)]
    places, num_rows = [(0, 4)], 0
    for group in map(footer.row_group, range(footer.num_row_groups)):
        num_rows += group.num_rows
        chunks = [group.column(at) for at in range(group.num_columns)]
        if [(chunk.path_in_schema, chunk.physical_type) for chunk in chunks] != [
            (column.path, column.physical_type) for column in columns
        ]:
            raise ValueError("its footer has two lists of columns that do not agree")
        for chunk, column in zip(chunks, columns, strict=True):
            more = chunk.num_values - group.num_rows
            if more < 0 or (more and not column.max_repetition_level):
                raise ValueError(f"a column has {chunk.num_values} values for {group.num_rows} rows")
            if chunk.num_values:
                begin = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
                places.append((begin, begin + chunk.total_compressed_size))
    if num_rows != footer.num_rows:
        raise ValueError(f"its row groups have {num_rows} rows where the footer says {footer.num_rows}")
    places = [*sorted(places), (size - 8 - footer.serialized_size,) * 2]
    if any(behind < end for (_, end), (behind, _) in pairwise(places)):
        raise ValueError("its columns overlap")


# --- Arrow --------------------------------------------------------------------------------


def _arrow_file(file: IO[bytes]) -> Iterator[pa.RecordBatch]:
    """The batches that the footer names, which must be all that are there, in order."""
    reader = pa.ipc.open_file(file, options=_NATIVE)
    file.seek(len(ARROW_FILE) + 2)
    if file.read(4) == ARROW_STREAM:  # most writers put the schema at the front, too
        file.seek(-4, 1)
        if not pa.ipc.open_stream(file, options=_NATIVE).schema.equals(reader.schema):
            raise ValueError("its two lists of columns do not agree")
    end = 0
    for i in range(reader.num_record_batches):
        batch = reader.get_batch(i)
        if file.tell() <= end:
            raise ValueError("a batch of rows lies before the one before it")
        end = file.tell()
        yield from _slices(batch)
    size = file.seek(0, 2)
    file.seek(-10, 2)
    footer = size - 10 - int.from_bytes(file.read(4), "little")
    if footer - _behind_dictionaries(file, end) > _PADDING:
        raise ValueError("it has no rows, or some that its footer does not name")


def _behind_dictionaries(file: IO[bytes], place: int) -> int:
    """The place behind the dictionaries that begin here, as polars puts them behind the rows."""
    while place:
        file.seek(place)
        if file.read(4) != ARROW_STREAM or file.read(4) == _END_OF_STREAM[4:]:
            break
        file.seek(place)
        if pa.ipc.read_message(file).type != "dictionary":
            break
        place = file.tell()
    return place


def _arrow_stream(file: IO[bytes]) -> Iterator[pa.RecordBatch]:
    """The batches up to the mark of the end, which must be there, and the end."""
    for batch in pa.ipc.open_stream(file, options=_NATIVE):
        yield from _slices(batch)
    end = file.tell()
    file.seek(max(0, end - len(_END_OF_STREAM)))
    if file.read(len(_END_OF_STREAM)) != _END_OF_STREAM:
        raise ValueError("it is cut off")
    if file.read(1):
        raise ValueError("there is more behind its end")


def _slices(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    batch.validate(full=True)
    num_rows = _rows_a_batch(batch.nbytes // (batch.num_rows or 1))
    for start in range(0, batch.num_rows, num_rows):
        yield batch.slice(start, num_rows)


def _rows_a_batch(bytes_a_row: int) -> int:
    return max(1, min(_ROWS_A_BATCH, _BYTES_A_BATCH // max(1, bytes_a_row)))


# --- values -------------------------------------------------------------------------------


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Rows as JSON has them: a map is an object, of equal keys the last one counts.

    All objects of a column have the keys of all rows, so that a null may be the key of another row. What a column's
    objects hold themselves is read by name, and null is nothing there; within, where keys are data (a tool's
    parameters, a call's arguments), members that are null are left out.
    """
    if not any(_holds_maps(column.type) for column in batch.schema):
        rows = batch.to_pylist()
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # which says that keys are equal
            rows = batch.to_pylist(maps_as_pydicts="lossy")
    for column in batch.schema:
        if (without_padding := _without_padding(column.type)) is not None:
            for row in rows:
                row[column.name] = without_padding(row[column.name])
    return rows


def _without_padding(of: pa.DataType, within: bool = False) -> Callable[[Any], Any] | None:
    """What takes a value of a type and leaves out null members of the objects within objects; None: it has none."""
    if pa.types.is_struct(of):
        inner = {member.name: take for member in of if (take := _without_padding(member.type, True)) is not None}
        return None if not within and not inner else lambda value: value and _members(value, inner, within)
    if pa.types.is_map(of):
        item = _without_padding(of.item_type, True)
        return None if item is None else lambda value: value and {key: item(each) for key, each in value.items()}
    if any(is_list(of) for is_list in _LISTS):
        item = _without_padding(of.value_type, within)
        return None if item is None else lambda value: value and [item(each) for each in value]
    return None


_LISTS = (
    pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list, pa.types.is_list_view,
    pa.types.is_large_list_view,
)  # fmt: skip


def _members(value: dict[str, Any], inner: Mapping[str, Callable[[Any], Any]], within: bool) -> dict[str, Any]:
    return {
        name: inner[name](member) if name in inner else member
        for name, member in value.items()
        if member is not None or not within
    }


def _holds_maps(of: pa.DataType) -> bool:
    return pa.types.is_map(of) or any(_holds_maps(of.field(at).type) for at in range(of.num_fields))


def _with_texts(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Times and decimals as texts, wherever they lie."""
    target = pa.schema([pa.field(column.name, _text_type(column.type)) for column in batch.schema])
    return batch if target.types == batch.schema.types else batch.cast(target)


def _text_type(of: pa.DataType) -> pa.DataType:
    """A type with all times and decimals within replaced by texts."""
    if pa.types.is_decimal(of) or (pa.types.is_temporal(of) and not pa.types.is_interval(of)):
        return pa.string()
    if pa.types.is_list(of):
        return pa.list_(of.value_field.with_type(_text_type(of.value_type)))
    if pa.types.is_large_list(of):
        return pa.large_list(of.value_field.with_type(_text_type(of.value_type)))
    if pa.types.is_fixed_size_list(of):
        return pa.list_(of.value_field.with_type(_text_type(of.value_type)), of.list_size)
    if pa.types.is_struct(of):
        return pa.struct([field.with_type(_text_type(field.type)) for field in of])
    if pa.types.is_map(of):
        return pa.map_(_text_type(of.key_type), of.item_field.with_type(_text_type(of.item_type)))
    if pa.types.is_dictionary(of) and _text_type(of.value_type) != of.value_type:
        return _text_type(of.value_type)
    return of
