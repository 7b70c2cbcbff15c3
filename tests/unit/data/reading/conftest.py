"""What the tests of all kinds of files share: bytes in, records or a message out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_cli.core.errors import DataError
from dpo_cli.data.reading.base import Record
from dpo_cli.data.reading.files import read_records


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., list[Record]]:
    """``read(data, within="")``: read bytes as a file without a telling name."""

    def read_bytes(data: bytes, within: str = "") -> list[Record]:
        path = tmp_path / "data"
        path.write_bytes(data)
        return list(read_records(path, within=within))

    return read_bytes


@pytest.fixture
def message(read: Callable[..., list[Record]], tmp_path: Path) -> Callable[..., str]:
    """The message of the DataError that some bytes end in: one line, of which the file's path is left out."""

    def message_of(data: bytes, within: str = "") -> str:
        with pytest.raises(DataError) as caught:
            read(data, within)
        text = str(caught.value)
        assert text.startswith(str(tmp_path / "data"))
        assert len(text.splitlines()) == 1
        return text.removeprefix(str(tmp_path / "data")).lstrip(", :")

    return message_of
