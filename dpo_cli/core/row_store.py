"""Rows by content: what was computed once is never computed again, whatever became of the run that did it.

Reference and policy log-probabilities, sampled answers, divergences and judgments are such rows. They lie in shards
that are only ever added: they outlive a kill and a deleted output. Whoever uses a store asks for the keys that are
there, computes the rest while :meth:`RowStore.keeping` stores it, and reads what it wants.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from dpo_cli.core.artifacts import sha256_file

Keep = Callable[[Sequence[Mapping[str, Any]]], None]
"""Takes rows that were computed."""


class RowStore:
    """Rows with a key in a folder of the scratch area, which stands for all else that they depend on.

    Args:
        folder: Where the shards lie; made where it is missing.
        schema: Names and types of the columns; one is ``key``.
    """

    def __init__(self, folder: Path, schema: Mapping[str, Any]) -> None:
        self._folder = folder
        self._schema = dict(schema)
        self._is_ours: dict[Path, bool] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for used in (folder, folder.parent):
            os.utime(used)  # what was used last is forgotten last

    def keys(self) -> set[str]:
        """The keys that are there; nothing else of the rows is read."""
        return {key for shard in self._shards() for key in pl.read_parquet(shard, columns=["key"], glob=False)["key"]}

    def rows(self, wanted: Collection[str]) -> pl.DataFrame:
        """The rows of some keys, as far as they are there; of a key that is there twice the first."""
        keys = pl.DataFrame({"key": sorted(set(wanted))}, schema={"key": pl.String})
        found = [pl.DataFrame(schema=self._schema)]
        for shard in self._shards():
            frame = pl.read_parquet(shard, columns=list(self._schema), glob=False)
            found.append(frame.join(keys, on="key", how="semi").select(list(self._schema)))
        return pl.concat(found).unique("key", keep="first", maintain_order=True)

    def _shards(self) -> list[Path]:
        """The shards in order; one that is damaged is deleted, one of another version, with other columns, left out."""
        found = []
        for shard in sorted(self._folder.glob("shard-*.parquet")):
            if shard not in self._is_ours:
                if shard.stem != f"shard-{sha256_file(shard)}":
                    shard.unlink()
                    continue
                columns = pl.scan_parquet(shard, glob=False).collect_schema()
                self._is_ours[shard] = all(columns.get(name) == kind for name, kind in self._schema.items())
            if self._is_ours[shard]:
                found.append(shard)
        return found

    def add(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a shard of rows; its name holds the digest of its content."""
        if not rows:
            return
        frame = pl.DataFrame(rows, schema=self._schema)
        written = self._folder / f"new.{os.getpid()}.tmp"
        try:
            frame.write_parquet(written)
            written.replace(self._folder / f"shard-{sha256_file(written)}.parquet")
        finally:
            written.unlink(missing_ok=True)

    @contextmanager
    def keeping(self, minutes: float) -> Iterator[Keep]:
        """A function that takes rows and stores them every few minutes, and the rest at the end, whatever ends it."""
        pending: list[Mapping[str, Any]] = []
        saved_at = time.monotonic()

        def keep(rows: Sequence[Mapping[str, Any]]) -> None:
            nonlocal saved_at
            pending.extend(rows)
            if time.monotonic() - saved_at >= minutes * 60:
                self.add(pending)
                pending.clear()
                saved_at = time.monotonic()

        try:
            yield keep
        finally:
            self.add(pending)


def forget_other_stores(root: Path, keep: Path, how_many: int) -> None:
    """Delete the oldest stores beside one, all but ``how_many``."""
    others = [path for path in root.iterdir() if path.is_dir() and path != keep]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[how_many:]:
        shutil.rmtree(path, ignore_errors=True)
