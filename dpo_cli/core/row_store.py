"""Rows that were computed once, in shards that are only ever added: they outlive a kill and a deleted output."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dpo_cli.core.artifacts import sha256_file


class RowStore:
    """Rows with a key in a folder of the scratch area, which stands for all else that they depend on.

    Args:
        folder: Where the shards lie; made where it is missing.
        schema: Names and types of the columns; one is ``key``.
    """

    def __init__(self, folder: Path, schema: Mapping[str, Any]) -> None:
        self._folder = folder
        self._schema = dict(schema)
        folder.mkdir(parents=True, exist_ok=True)
        for used in (folder, folder.parent):
            os.utime(used)  # what was used last is forgotten last

    def load(self) -> pl.DataFrame:
        """All rows that are there; a damaged shard is left out and deleted, one that lacks a column left out."""
        frames = [pl.DataFrame(schema=self._schema)]
        for shard in sorted(self._folder.glob("shard-*.parquet")):
            if shard.stem != f"shard-{sha256_file(shard)}":
                shard.unlink()
                continue
            frame = pl.read_parquet(shard, glob=False)
            if any(frame.schema.get(name) != kind for name, kind in self._schema.items()):
                continue  # of another version, which kept something else
            frames.append(frame.select(list(self._schema)))
        return pl.concat(frames).unique("key", keep="first", maintain_order=True)

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


def forget_other_stores(root: Path, keep: Path, how_many: int) -> None:
    """Delete the oldest stores beside one, all but ``how_many``."""
    others = [path for path in root.iterdir() if path.is_dir() and path != keep]
    others.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[how_many:]:
        shutil.rmtree(path, ignore_errors=True)
