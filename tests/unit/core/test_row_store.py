"""The store of rows that were computed once: in shards, by key, whole or left out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_cli.core.row_store import RowStore, forget_other_stores

SCHEMA = {"key": pl.String, "logp": pl.Float64, "token_logps": pl.List(pl.Float32)}


def row(key: str, *token_logps: float) -> dict[str, Any]:
    return {"key": key, "logp": sum(token_logps), "token_logps": list(token_logps)}


def test_rows_are_kept_across_runs_once_each(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "rows", SCHEMA)
    assert (store.rows(["a"]).height, store.rows(["a"]).schema) == (0, pl.Schema(SCHEMA))
    store.add([])
    assert list((tmp_path / "rows").iterdir()) == []
    store.add([row("a", -1.0), row("b", -2.0)])
    store.add([row("b", -2.0), row("c", -3.0)])
    store.add([row("a", -1.0), row("b", -2.0)])
    rows = RowStore(tmp_path / "rows", SCHEMA).rows(["c", "b", "a", "d"]).sort("key")
    assert rows["key"].to_list() == ["a", "b", "c"]
    assert rows["logp"].to_list() == [-1.0, -2.0, -3.0]
    assert store.keys() == {"a", "b", "c"}
    assert store.rows(["b"]).rows() == [("b", -2.0, [-2.0])]


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_damaged_shard_is_left_out_and_the_others_are_kept(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    store = RowStore(tmp_path / "rows", SCHEMA)
    store.add([row("a", -1.0)])
    (shard,) = (tmp_path / "rows").iterdir()
    store.add([row("b", -2.0)])
    shard.write_bytes(damage(shard.read_bytes()))
    assert RowStore(tmp_path / "rows", SCHEMA).keys() == {"b"}
    assert not shard.exists()
    store.add([row("a", -1.0)])
    assert RowStore(tmp_path / "rows", SCHEMA).keys() == {"a", "b"}


def test_a_shard_with_a_flipped_bit_never_gives_other_figures(tmp_path: Path) -> None:
    store = RowStore(tmp_path / "rows", SCHEMA)
    store.add([row(f"{number:032x}", -float(number), -1.5) for number in range(50)])
    (shard,) = (tmp_path / "rows").iterdir()
    whole, keys = shard.read_bytes(), store.keys()
    before = store.rows(keys)
    for position in range(4, 200, 7):
        shard.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        rows = RowStore(tmp_path / "rows", SCHEMA).rows(keys)
        assert rows.height == 0 or rows.equals(before)


def test_a_write_that_was_killed_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = RowStore(tmp_path / "rows", SCHEMA)

    def killed(frame: pl.DataFrame, path: Path) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(pl.DataFrame, "write_parquet", killed)
    with pytest.raises(KeyboardInterrupt):
        store.add([row("a", -1.0)])
    assert list((tmp_path / "rows").iterdir()) == []


def test_rows_are_stored_as_time_passes_and_whatever_ends_the_work(tmp_path: Path) -> None:
    for minutes, shards in ((0.0, 3), (60.0, 1)):
        store = RowStore(tmp_path / f"{minutes}", SCHEMA)
        with pytest.raises(KeyboardInterrupt), store.keeping(minutes) as keep:
            for name in "abc":
                keep([row(name, -1.0)])
            raise KeyboardInterrupt
        assert store.keys() == {"a", "b", "c"}
        assert len(list((tmp_path / f"{minutes}").iterdir())) == shards


def test_a_store_keeps_its_rows_wherever_it_lies(tmp_path: Path) -> None:
    """A project folder may have brackets in its name: they are no pattern."""
    store = RowStore(tmp_path / "my [new] project", SCHEMA)
    store.add([row("a", -1.0)])
    assert store.keys() == {"a"}


def test_only_the_newest_other_stores_are_kept(tmp_path: Path) -> None:
    for age, name in enumerate(["newest", "new", "old", "oldest", "mine"]):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    (tmp_path / "lock").write_text("")
    forget_other_stores(tmp_path, tmp_path / "mine", 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lock", "mine", "new", "newest"]


def test_a_shard_that_lacks_a_column_is_left_out(tmp_path: Path) -> None:
    """What another version kept is computed again."""
    RowStore(tmp_path, {"key": pl.String, "old": pl.Float64}).add([{"key": "a", "old": 1.0}])
    store = RowStore(tmp_path, {"key": pl.String, "new": pl.Float64})
    assert store.keys() == set()
    store.add([{"key": "a", "new": 2.0}])
    assert store.rows(["a"]).rows() == [("a", 2.0)]
