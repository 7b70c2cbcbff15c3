"""The files of a block: its examples, and its rankings where it has any, as Arrow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dpo_cli.data.schema import (
    FULL_MESSAGES,
    MESSAGES,
    PREFERENCE_SCHEMA,
    RANKING_SCHEMA,
    SFT_SCHEMA,
    TOOLS,
    Messages,
    full_schema,
    is_plain,
    table_of,
)

_WHERE_TO = [pa.field("held_out", pa.bool_()), pa.field("copies", pa.int32())]
_WHERE_FROM = [
    pa.field("row", pa.int64()),
    pa.field("line", pa.int64()),
    pa.field("part", pa.string()),
    pa.field("ranking", pa.int32()),
]
RANKING_BLOCK_SCHEMA = pa.schema([*RANKING_SCHEMA, *_WHERE_TO])
"""Columns of a block's file of rankings."""


def block_schema(kind: str) -> pa.Schema:
    """Columns of a block's Arrow file."""
    canonical = SFT_SCHEMA if kind == "sft" else PREFERENCE_SCHEMA
    return pa.schema([*canonical, *_WHERE_TO, *_WHERE_FROM])


def examples_file(folder: Path, index: int) -> Path:
    """The rows of a block."""
    return folder / f"{index:08d}.arrow"


def rankings_file(folder: Path, index: int) -> Path:
    """The rankings of a block, where it has any."""
    return folder / f"{index:08d}.rankings.arrow"


def write_arrow(path: Path, table: pa.Table) -> None:
    """Write rows or rankings of a block."""
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def read_arrow(path: Path) -> pa.Table:
    """The rows or rankings of a block."""
    with pa.OSFile(str(path)) as file:
        return pa.ipc.open_file(file).read_all()


_FACTS = (
    "id", "sides", "flipped", "group", "opening", "held_out", "copies", "row", "line", "part", "ranking", "prompt",
)  # fmt: skip
COLUMNS = {
    "sft": (*_FACTS, "completion"),
    "preference": (*_FACTS, "chosen", "rejected", "chosen_score", "rejected_score"),
}
"""What is known of an example, in the order in which it is collected."""


def table_of_columns(kind: str, source: str, columns: Mapping[str, Sequence[Any]]) -> pa.Table:
    """A block's rows, as :func:`block_schema` has them; in full, where a message has more than role and content."""
    schema = block_schema(kind)
    if not all(is_plain(*columns[column.name]) for column in schema if column.type == MESSAGES):
        schema = full_schema(schema)
    arrays = []
    for column in schema:
        if column.name == "source":
            arrays.append(pa.repeat(pa.scalar(source), len(columns["id"])))
        elif column.type in (MESSAGES, FULL_MESSAGES):
            arrays.append(_messages_array(columns[column.name], column.type))
        elif column.name == TOOLS:
            arrays.append(pa.array([prompt[0].get(TOOLS) for prompt in columns["prompt"]], column.type))
        else:
            arrays.append(pa.array(columns[column.name], column.type))
    return pa.table(arrays, schema=schema)


def is_full(path: Path) -> bool:
    """Whether a block's file has a place for tools, calls and reasoning."""
    with pa.OSFile(str(path)) as file:
        return TOOLS in pa.ipc.open_file(file).schema.names


def widen(path: Path) -> None:
    """Give a block's file that place, as a file beside it has it."""
    table = read_arrow(path)
    write_arrow(path, table_of(table.to_pylist(), full_schema(table.schema)))


def _messages_array(rows: Sequence[Messages], kind: pa.DataType) -> pa.Array:
    """Message lists as an array of list<struct> of a kind, built from flat columns."""
    if all(len(messages) == 1 for messages in rows):
        flat = [messages[0] for messages in rows]
        offsets = np.arange(len(rows) + 1, dtype=np.int32)
    else:
        flat = list(chain.from_iterable(rows))
        offsets = np.fromiter(accumulate(map(len, rows), initial=0), np.int32, len(rows) + 1)
    names = [field.name for field in kind.value_type]
    struct = pa.StructArray.from_arrays(
        [
            pa.array([message[name] for message in flat], pa.string())
            if name in ("role", "content")
            else pa.array([message.get(name) for message in flat], pa.string())
            for name in names
        ],
        names,
    )
    return pa.ListArray.from_arrays(pa.array(offsets), struct)
