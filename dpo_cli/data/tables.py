"""What stages read of the canonical tables besides tokens: columns by row id, ranks, digests, what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from dpo_cli.core import paths
from dpo_cli.core.artifacts import sha256_file
from dpo_cli.core.errors import DataError
from dpo_cli.data.tokenize import TokenTable, explain_rejects
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.losses.ranking import MAX_TIED, Ties

SPLITS = ("train", "eval")


def refuse_empty(tables: Sequence[TokenTable], max_length: int, *, section: str, ranked: bool) -> None:
    """Refuse preference data of which nothing is left to train on, or nothing to hold out.

    Args:
        tables: Those of :data:`SPLITS`.
        max_length: reference.max_length, for the message.
        section: Whose loss asks for them.
        ranked: Whether they are rankings.

    Raises:
        DataError: A table has no group.
    """
    for split, table in zip(SPLITS, tables, strict=True):
        if table.groups:
            continue
        path = paths.ranking_table(split) if ranked else paths.preference_table(split)
        if not table.rejects:
            loss = f"params.yaml: {section}.loss plackett_luce learns from rankings of several answers, and "
            raise DataError(
                f"{loss if ranked else ''}{path.as_posix()} {'has no rows' if path.is_file() else 'is missing'}"
            )
        raise DataError(f"{path.as_posix()}: {explain_rejects([table], 'reference.max_length', max_length)}")


def read_columns(path: Path, *names: str) -> dict[str, tuple[Any, ...]]:
    """Some columns of a canonical table by row id; nothing where the table is not there."""
    if not path.is_file():
        return {}
    frame = pl.read_parquet(path, columns=["id", *names], glob=False)
    return {row[0]: row[1:] for row in frame.select("id", *names).iter_rows()}


def read_ranks(groups: Sequence[TokenGroup], ties: Ties, section: str) -> dict[str, list[int]]:
    """The ranks of the rankings of both splits by row id, ascending.

    Args:
        groups: Those that are trained with.
        ties: What tied answers are taken for.
        section: Whose settings they are, for the message.

    Raises:
        DataError: More answers are tied than can be averaged over.
    """
    ranks = {id: row[0] for split in SPLITS for id, row in read_columns(paths.ranking_table(split), "ranks").items()}
    for group in groups:
        tied = max(Counter(ranks[group.id]).values())
        if ties == "average" and tied > MAX_TIED:
            raise DataError(
                f"data/preference: the ranking {group.id} has {tied} tied answers, and {section}.ties average takes at"
                f" most {MAX_TIED}; set it to groups"
            )
    return ranks


def table_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each table in data/sft or data/preference, by its name without the suffix."""
    return {path.name.removesuffix(".parquet"): sha256_file(path) for path in sorted(folder.glob("*.parquet"))}


def all_rejects(tables: Sequence[TokenTable]) -> list[dict[str, Any]]:
    """The rows that some tables left out."""
    return [reject for table in tables for reject in table.rejects]
