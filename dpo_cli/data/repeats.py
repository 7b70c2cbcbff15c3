"""Rows that repeat or contradict each other, found by their digests in bounded memory.

Digests lie in one file, 50 bytes an example. They are compared in portions that hold all
examples of an opening, so that memory is bounded by the portion, however many there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from dpo_cli.data.blocks import DIGESTS

_EXAMPLES_A_PORTION = 2_000_000
_READ_AT_ONCE = 500_000

Repeats = Mapping[str, tuple[np.ndarray, np.ndarray]]
"""For each of :data:`CHECKS`: the examples that fail it, ascending, and the row that each of them repeats or
contradicts, both int64."""

_ROW, _HELD_OUT, _FLIPPED = pl.col("row"), pl.col("held_out") == 1, pl.col("flipped") == 1
_ID, _SIDES = ("id_high", "id_low"), ("group", "sides")
_FINDERS = {
    "shared_prompt": ("opening", pl.when(~_HELD_OUT).then(_ROW.filter(_HELD_OUT).first().over("opening"))),
    "duplicate": ("id_high", pl.when(~pl.struct(_ID).is_first_distinct()).then(_ROW.first().over(_ID))),
    "contradiction": (
        "sides",
        pl.when(_FLIPPED)
        .then(_ROW.filter(~_FLIPPED).first().over(_SIDES))
        .otherwise(_ROW.filter(_FLIPPED).first().over(_SIDES)),
    ),
    # pairs of one ranking share their row
    "repeated_prompt": ("group", pl.when(_ROW.first().over("group") != _ROW).then(_ROW.first().over("group"))),
}
"""For each check what must be equal at least, and of the examples in which it is the row that each repeats."""

CHECKS = tuple(_FINDERS)
"""In this order: what an earlier one drops, a later one does not see."""


def find_repeats(file: Path, num_examples: int, policies: Mapping[str, str]) -> Repeats:
    """Compare all examples with each other.

    Args:
        file: Their digests (:data:`~dpo_cli.data.blocks.DIGESTS`), in order.
        num_examples: How many there are.
        policies: What becomes of those that fail a check: the ones that stay are compared further.
    """
    num_portions = 1 + num_examples // _EXAMPLES_A_PORTION
    hits: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in CHECKS}
    for portion in range(num_portions):
        digests, indices = _read_portion(file, portion, num_portions)
        for name, (key, other) in _FINDERS.items():
            at, rows = _find(digests, key, other)
            hits[name].append((indices[at], rows))
            if policies[name] != "keep" and len(at):
                digests, indices = np.delete(digests, at), np.delete(indices, at)
    found = {}
    for name, parts in hits.items():
        at, rows = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        order = np.argsort(at, kind="stable")
        found[name] = at[order], rows[order]
    return found


def _read_portion(file: Path, portion: int, num_portions: int) -> tuple[np.ndarray, np.ndarray]:
    """The examples of a portion, and their places among all."""
    parts, indices, start = [np.empty(0, DIGESTS)], [np.empty(0, np.int64)], 0
    with file.open("rb") as opened:
        while data := opened.read(_READ_AT_ONCE * DIGESTS.itemsize):
            block = np.frombuffer(data, DIGESTS)
            mine = np.flatnonzero(block["opening"] % np.uint64(num_portions) == portion)
            parts.append(block[mine])
            indices.append(mine + start)
            start += len(block)
    return np.concatenate(parts), np.concatenate(indices)


def _find(digests: np.ndarray, key: str, other: pl.Expr) -> tuple[np.ndarray, np.ndarray]:
    """The places of the examples that repeat a row, and that row."""
    ordered = np.sort(digests[key])
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    places = np.flatnonzero(np.isin(digests[key], twice))  # mostly few
    candidates = digests[places]
    frame = pl.DataFrame({name: np.ascontiguousarray(candidates[name]) for name in set(other.meta.root_names())})
    rows = frame.select(other).to_series()
    return places[rows.is_not_null().to_numpy()], rows.drop_nulls().to_numpy()
