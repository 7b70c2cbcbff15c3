"""The reference cache: log-probabilities of completions, kept by content.

``data/reference/part-*.parquet`` holds one row a completion:

==============  ============  ============================================================
key             string        128-bit hash of the token ids of prompt and completion
logp            float64       sum of token_logps, nats
num_tokens      int32         tokens of the completion, end of turn included
token_logps     list[float32] log pi_ref of each token, nats
==============  ============  ============================================================

and ``manifest.json``, written last, the identity of the graph that made them. A row is found
by its key, never by its position. Template, truncation and tokenizer need no special care:
they are in the token ids. Beta, loss and learning rate are not in the identity, so changing
them recomputes nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from dpo_cli.core import paths
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.manifest import REFERENCE, Manifest
from dpo_cli.data.tokens import TokenGroup

SCHEMA = {"key": pl.String, "logp": pl.Float64, "num_tokens": pl.Int32, "token_logps": pl.List(pl.Float32)}
_ROWS_A_PART = 100_000

Cached = TypeVar("Cached")


def group_keys(group: TokenGroup) -> list[str]:
    """The keys of a group's completions."""
    return group.keys


def write_cache(folder: Path, rows: pl.DataFrame, identity: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Write a cache into an empty folder: parts in the order of their keys, then the manifest."""
    rows = rows.select(list(SCHEMA)).sort("key")
    parts = []
    for number, begin in enumerate(range(0, max(rows.height, 1), _ROWS_A_PART)):
        name = f"part-{number:05d}.parquet"
        rows.slice(begin, _ROWS_A_PART).write_parquet(folder / name)
        parts.append(name)
    REFERENCE.write(
        folder, Manifest({"graph": dict(identity)}, settings=dict(settings), facts={"num_rows": rows.height}), parts
    )


def read_cache(folder: Path, identity: Mapping[str, Any]) -> dict[str, float]:
    """The summed log-probabilities by key, nats, of a cache that was made for this graph.

    Raises:
        StaleArtifactError: See :func:`read_cache_tokens`.
    """
    table = _read(folder, identity, "logp")
    return dict(zip(table["key"].to_list(), table["logp"].to_list(), strict=True))


def read_cache_tokens(folder: Path, identity: Mapping[str, Any]) -> dict[str, list[float]]:
    """The log-probabilities of every token by key, nats, of a cache that was made for this graph.

    Raises:
        StaleArtifactError: It is missing, damaged, or of another graph; the message names the
            field that differs.
    """
    table = _read(folder, identity, "token_logps")
    return dict(zip(table["key"].to_list(), table["token_logps"].to_list(), strict=True))


def read_cache_rows(folder: Path, identity: Mapping[str, Any], wanted: Collection[str]) -> pl.DataFrame:
    """The rows (:data:`SCHEMA`) of some keys, as far as they are there, of a cache that was made for this graph.

    Raises:
        StaleArtifactError: See :func:`read_cache_tokens`.
    """
    return _read(folder, identity, *list(SCHEMA)[1:]).filter(pl.col("key").is_in(sorted(wanted)))


def _read(folder: Path, identity: Mapping[str, Any], *columns: str) -> pl.DataFrame:
    parts = REFERENCE.check({"graph": identity}, folder).files
    return pl.concat([pl.read_parquet(folder / name, columns=["key", *columns], glob=False) for name in parts])


def reference_logps(cache: Mapping[str, Cached], groups: Sequence[TokenGroup]) -> dict[str, list[Cached]]:
    """What the cache holds of each group's completions, by row id.

    Raises:
        StaleArtifactError: A completion is not in the cache.
    """
    found = {}
    for group in groups:
        keys = group_keys(group)
        if any(key not in cache for key in keys):
            raise StaleArtifactError(
                f"data/reference has no row for {group.id} of data/preference: the data"
                f" or the chat template has changed; {REFERENCE.remedy(paths.REFERENCE)}"
            )
        found[group.id] = [cache[key] for key in keys]
    return found
