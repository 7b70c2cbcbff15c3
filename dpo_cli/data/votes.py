"""Files of votes: what a vote may be, and which rows of a file stand.

A line is never changed: a vote is taken back by a later one that says which one it supersedes. What else a row holds
stands in :mod:`dpo_cli.labeling.votes`, which writes them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from dpo_cli.data.reading.base import BrokenLines, OnBytes, Record
from dpo_cli.data.reading.files import read_records

A, B, TIED, BOTH_BAD, SKIPPED, UNDONE = "A", "B", "tie", "both bad", "skip", "undone"
"""What a vote on a pair may be. Both answers may be equally bad, which is a tie; the last two say nothing of them."""
UP, DOWN = "up", "down"
"""Thumbs, and method and baseline of votes by them."""
REPEATED = "repeat"
"""What ``drawn`` says of an item that was shown before, so that the rater can be compared with himself."""
ADJUDICATED = "adjudication"
"""What ``drawn`` says of an item on which people disagree: this vote stands in place of theirs."""

_STEP = 1 << 16


def with_standing(path: Path, on_bytes: OnBytes = lambda _: None, within: str = "") -> Iterator[tuple[Record, bool]]:
    """All rows of a votes file, each with whether it stands: no later one takes it back, and it takes back none.

    A last line that a kill tore is no row. The file is read twice.

    Args:
        path: The file.
        on_bytes: As in :func:`~dpo_cli.data.reading.files.read_records`, at the second time.
        within: As there.

    Raises:
        DataError: The file cannot be read.
    """
    superseded = {
        (str(record.value.get("rater")), str(record.value["supersedes"]))
        for record in _whole_records(path, within=within)
        # absent from a table that was filled in by hand
        if isinstance(record.value, dict) and record.value.get("supersedes") is not None
    }
    for record in _whole_records(path, on_bytes, within):
        row = record.value if isinstance(record.value, dict) else {}
        name = str(row.get("rater")), str(row.get("number"))
        yield record, row.get("vote") != UNDONE and name not in superseded


def _whole_records(path: Path, on_bytes: OnBytes = lambda _: None, within: str = "") -> Iterator[Record]:
    try:
        yield from read_records(path, on_bytes, within)
    except BrokenLines as error:
        if len(error.problems) > 1 or not is_torn(unended_line(path)):
            raise


def unended_line(path: Path) -> bytes:
    """What stands behind the last line end of a file: nothing, unless the last write was cut off."""
    found = b""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        while position and b"\n" not in found:
            step = min(position, _STEP)
            position -= step
            file.seek(position)
            found = file.read(step) + found
    return found.rpartition(b"\n")[2]


def is_torn(line: bytes) -> bool:
    """Whether a line is there, and is no whole vote."""
    try:
        return bool(line) and not isinstance(json.loads(line), dict)
    except ValueError:
        return True
