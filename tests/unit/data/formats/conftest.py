"""Shared by the tests of formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from dpo_cli.data.formats import PREFERENCE_FORMATS, SFT_FORMATS
from dpo_cli.data.formats.base import Format, Reading
from dpo_cli.data.formats.detect import RowReader
from dpo_cli.data.problem import RowProblem


@pytest.fixture
def reason_of() -> Callable[..., str]:
    """The reason for which a format refuses a row."""

    def refuse(fmt: Format[Any], row: dict[str, Any], **reading: Any) -> str:
        with pytest.raises(RowProblem) as caught:
            found = fmt.read(row, Reading(**reading))
            if isinstance(found, Iterator):
                list(found)
        assert caught.value.detail
        return caught.value.reason

    return refuse


class Auto:
    """A file's rows as ``format: auto`` reads them: first it looks at all of them, then it reads each.

    Attributes:
        why: What is said of the file.
        formats: The format of each row that is read.
        found: What each row becomes; a refused row becomes its problem.
        unwrapped: How many rows were taken apart, by the template that had made them.
        unread: How many rows have something in a column that nobody read, by column.
    """

    def __init__(self, kind: str, rows: tuple[Any, ...], columns: dict[str, Any], reading: Reading) -> None:
        formats = SFT_FORMATS if kind == "sft" else PREFERENCE_FORMATS
        reader = RowReader(formats, "auto", columns, reading)
        self.why = reader.detect("rows.jsonl", rows)
        self.formats: list[str] = []
        self.found: list[Any] = []
        for row in rows:
            try:
                fmt, found = reader.read(row)
                self.formats.append(fmt.name)
                self.found.append(list(found) if isinstance(found, Iterator) else found)
            except RowProblem as problem:
                self.found.append(problem)
        self.unread = dict(reader.take_unread())
        self.unwrapped = dict(reader.take_unwrapped())

    @property
    def only(self) -> Any:
        """What its only row becomes; a refusal is raised."""
        (found,) = self.found
        if isinstance(found, RowProblem):
            raise found
        return found


@pytest.fixture
def auto() -> Callable[..., Auto]:
    """Detect the format of some rows, and read them."""

    def detect(*rows: Any, kind: str = "preference", columns: dict[str, Any] | None = None, **reading: Any) -> Auto:
        return Auto(kind, rows, columns or {}, Reading(**reading))

    return detect
