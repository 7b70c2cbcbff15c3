"""From canonical tables to token groups, with every row that does not fit accounted for.

What comes of a table is kept in ``.scratch/tokens/``, under a digest of the table and of all that
decides its token ids, so that each stage after the first opens it in place of tokenizing again.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock

from dpo_cli.core import paths
from dpo_cli.core.artifacts import digest_json, remove, sha256_file, write_json
from dpo_cli.core.errors import DataError, StaleArtifactError
from dpo_cli.core.row_store import forget_other_stores
from dpo_cli.data.checks import TokenView
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import TOOLS, Messages, content_id, from_table
from dpo_cli.data.tokens import TokenGroup, TokenWriter, stored_groups
from dpo_cli.losses.ranking import MAX_TIED, Ties

Kind = Literal["pairs", "rankings", "answers"]
"""What a loss learns from."""
SPLITS = ("train", "eval")
TOKENS_VERSION = 1
"""Of the code that decides token ids and the checks of them: a change of it makes no use of what was kept before."""

UNPAIRED = "is a single answer that is good or bad, not a pair; of the losses, only kto learns from it"
"""What is said of a row where pairs are asked for."""

_MANY = 0.05
"""Share of rows left out above which a stage warns."""
_ROWS_AT_ONCE = 1000
_OTHER_STORES_KEPT = 8
_OTHERS = "others.json"


@dataclass
class TokenTable:
    """The token groups of a table, and the rows that were left out.

    Attributes:
        groups: In the order of the table.
        rejects: One entry for each row left out: file, row, reason, detail.
        found: For each check, the rows that fail it and stay.
        path: The table.
        sides: Of each group its row, and whether it is a pair (``both``) or a single answer that is good (``chosen``)
            or bad (``rejected``); empty: all are pairs, or the table is of other rows.
        of_rows: Of a pair that was made of two single answers the ids of the good and the bad one, by its id.
    """

    groups: Sequence[TokenGroup]
    rejects: list[dict[str, Any]]
    found: dict[str, list[int]] = field(default_factory=dict)
    path: Path | None = None
    sides: list[tuple[int, str]] = field(default_factory=list)
    of_rows: dict[str, tuple[str, str]] = field(default_factory=dict)

    @cached_property
    def prompts(self) -> dict[str, Messages]:
        """The prompts' messages, by group id, which are read from the table when they are asked for."""
        wanted = {group.group for group in self.groups}
        rows = _rows(self.path, ("id", "group", "prompt")) if self.path is not None else ()
        return {group: row["prompt"] for row in rows if (group := _group_of(row)) in wanted}


def tokenize_table(
    path: Path,
    columns: Sequence[str],
    view: TokenView,
    remedy: str,
) -> TokenTable:
    """Tokenize a canonical table, or open what came of it before.

    Args:
        path: A parquet file of :mod:`dpo_cli.data.schema`.
        columns: The columns with completions: ``completion``, ``chosen`` and ``rejected``, or
            ``completions``, which holds several.
        view: How the model sees them.
        remedy: What to do when the table is missing.

    Raises:
        StaleArtifactError: The table is missing or damaged.
        DataError: Rows fail a check whose policy is ``error``.
    """
    if not path.is_file():
        raise StaleArtifactError(f"{path} is missing; {remedy}")
    made_of = {
        "table": sha256_file(path),
        "columns": list(columns),
        "encoder": view.encoder.identity,
        "max_length": view.max_length,
        "policies": dict(view.policies),
        "version": TOKENS_VERSION,
    }
    root = paths.scratch_root() / "tokens"
    root.mkdir(parents=True, exist_ok=True)
    folder = root / digest_json(made_of)
    with FileLock(root / "lock"):
        table = _open(folder, path)
        if table is None:
            new = root / "new.tmp"
            remove(new)
            remove(folder)
            new.mkdir()
            rows = _read(path, ("id", "group", "prompt", *columns), remedy)
            _write(new, rows, columns, view)
            new.replace(folder)
            table = _open(folder, path)
            assert table is not None
        os.utime(folder)  # what was used last is forgotten last
        forget_other_stores(root, folder, _OTHER_STORES_KEPT)
    _refuse_errors(table, path, view.policies)
    return table


def _open(folder: Path, path: Path) -> TokenTable | None:
    """What came of a table before; None where it is not there, or not whole."""
    try:
        others = json.loads((folder / _OTHERS).read_text(encoding="utf-8"))
        rejects = [{"file": path.as_posix(), **one} for one in others["rejects"]]
        sides = [(row, side) for row, side in others.get("sides", [])]
        return TokenTable(stored_groups(folder), rejects, dict(others["found"]), path, sides)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _write(folder: Path, rows: Iterable[dict[str, Any]], columns: Sequence[str], view: TokenView) -> None:
    rejects: list[dict[str, Any]] = []
    kept: dict[str, list[int]] = {}
    sides: list[tuple[int, str]] = []
    writer = TokenWriter(folder)
    try:
        for index, row in enumerate(rows):
            try:
                present = answered(row, columns)
                group, found = tokenize_row(row, present, view)
            except RowProblem as problem:
                rejects.append({"row": index, "reason": problem.reason, "detail": problem.detail})
                continue
            writer.add(group)
            sides.append((index, "both" if present == columns else present[0]))
            for name in found:
                kept.setdefault(name, []).append(index)
    finally:
        writer.close()
    has_singles = any(side != "both" for _, side in sides)
    write_json(folder / _OTHERS, {"rejects": rejects, "found": kept, **({"sides": sides} if has_singles else {})})


def _rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Some columns of a canonical table, as far as it has them, and the tools in its prompts, row by row."""
    with pq.ParquetFile(path) as table:
        names = [name for name in (*columns, TOOLS) if name in table.schema_arrow.names]
        for batch in table.iter_batches(_ROWS_AT_ONCE, columns=names):
            yield from map(from_table, batch.to_pylist())


def _read(path: Path, columns: Sequence[str], remedy: str) -> Iterator[dict[str, Any]]:
    """The rows of a table that may be damaged; what goes wrong with the reader's own files is no matter of it."""
    try:
        yield from _rows(path, columns)
    except (pa.ArrowException, OSError) as error:
        raise StaleArtifactError(f"{path} is damaged ({error}); {remedy}") from None


def _group_of(row: Mapping[str, Any]) -> str:
    return row.get("group") or row["id"]


def prompt_ids(path: Path) -> set[str]:
    """The content ids of the prompts in a canonical table."""
    if "group" in pl.read_parquet_schema(path):
        return set(pl.read_parquet(path, columns=["group"], glob=False)["group"])
    return {content_id(row["prompt"]) for row in _rows(path, ("prompt",))}


def _refuse_errors(table: TokenTable, path: Path, policies: Mapping[str, str]) -> None:
    problems = []
    for name, policy in policies.items():
        rows = [reject["row"] for reject in table.rejects if reject["reason"] == name] if policy == "error" else []
        if rows:
            shown = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
            problems.append(
                f"{path}: {len(rows)} rows fail the check {name} (rows {shown}); fix them, or set the check to drop"
            )
    if problems:
        raise DataError(problems)


def explain_found(tables: Sequence[TokenTable]) -> str | None:
    """A warning where rows stay that fail a check of their tokens."""
    counts = Counter({name: 0 for table in tables for name in table.found})
    for table in tables:
        counts.update({name: len(rows) for name, rows in table.found.items()})
    if not counts:
        return None
    return "kept, though their tokens are odd: " + ", ".join(
        f"{count} rows with {name.replace('_', ' ')}" for name, count in counts.items()
    )


def explain_rejects(tables: Sequence[TokenTable], setting: str, max_length: int) -> str | None:
    """A warning where many rows of some tables were left out: how many, why, and which setting decides it."""
    rejects = [reject for table in tables for reject in table.rejects]
    num_rows = len(rejects) + sum(len(table.groups) for table in tables)
    if len(rejects) <= _MANY * num_rows:
        return None
    reasons = Counter(reject["reason"] for reject in rejects).most_common()
    named = ", ".join(f"{count} {reason.replace('_', ' ')}" for reason, count in reasons)
    remedy = f"; {setting} is {max_length}, raise it to keep long ones" if "over_long" in dict(reasons) else ""
    first = {reject["reason"]: reject for reject in reversed(rejects) if reject["reason"] != "over_long"}
    said = "".join(f"; row {reject['row']} {reject['detail']}" for reject in reversed(first.values()))
    return f"{len(rejects)} of {num_rows} rows ({len(rejects) / num_rows:.0%}) are left out: {named}{remedy}{said}"


def answered(row: Mapping[str, Any], columns: Sequence[str]) -> Sequence[str]:
    """The columns of a row that hold an answer: all of them, or one where it is a single answer, good or bad."""
    sides = tuple(name for name in columns if row[name])
    return columns if len(sides) == len(columns) else sides


def tokenize_row(row: dict[str, Any], columns: Sequence[str], view: TokenView) -> tuple[TokenGroup, list[str]]:
    """The tokens of a row as :func:`from_table` has it, and the checks that it fails and stays nevertheless.

    Raises:
        RowProblem: The template refuses the row, it is over long, a check leaves it out, or an answer is missing.
    """
    if answered(row, columns) != columns:
        raise RowProblem("unpaired", UNPAIRED)
    prompt = row["prompt"]
    completions = row["completions"] if "completions" in columns else [row[column] for column in columns]
    encoding = view.encoder.encode(prompt, completions)
    found, problem = view.judge(prompt, completions, encoding)
    if problem is not None:
        raise problem
    group = TokenGroup(row["id"], _group_of(row), tuple(encoding.prompt), tuple(map(tuple, encoding.completions)))
    return group, found


# --- what stages read of tables besides tokens ----------------------------------------------


def refuse_empty(tables: Sequence[TokenTable], max_length: int, *, section: str, of: Kind) -> None:
    """Refuse preference data of which nothing is left to train on, or nothing to hold out.

    Args:
        tables: Those of :data:`SPLITS`.
        max_length: reference.max_length, for the message.
        section: Whose loss asks for them.
        of: What the loss learns from.

    Raises:
        DataError: A table has no group.
    """
    for split, table in zip(SPLITS, tables, strict=True):
        if table.groups:
            continue
        path = paths.ranking_table(split) if of == "rankings" else paths.preference_table(split)
        if not table.rejects:
            loss = {
                "rankings": f"params.yaml: {section}.loss plackett_luce learns from rankings of several answers, and ",
                "answers": f"params.yaml: {section}.loss kto learns from single answers that are good or bad, and ",
            }.get(of, "")
            lacks = "has none" if of == "answers" else "has no rows"
            raise DataError(f"{loss}{path.as_posix()} {lacks if path.is_file() else 'is missing'}")
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
