"""Rows of any preference files: read and checked as the conversion does it, then tokenized."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cli.core.data_params import PreferenceSource, Source
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.data.account import Conversion, ConvertedBlock
from dpo_cli.data.blocks import rankings_file, read_arrow
from dpo_cli.data.checks import TokenView
from dpo_cli.data.convert import convert_aside
from dpo_cli.data.plan import Treatment
from dpo_cli.data.problem import RowProblem
from dpo_cli.data.schema import PREFERENCE_SCHEMA, RANKING_SCHEMA, TOOLS, Messages, from_table
from dpo_cli.data.tokenize import tokenize_row
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.project import Project

_PAIR_PART = "answers "
_IDLE = {
    "weight": "every row is scored once",
    "split": "every row is scored",
    "pairs": "a ranking is scored as a whole",
    "max_rows": "say --max-rows",
}


@dataclass(frozen=True)
class InputRow:
    """A pair or a ranking of a file.

    Attributes:
        row: Its number in the file, from 0.
        part: The part of the row, where it holds several; else empty.
        source: The file's name; of a canonical table what its column ``source`` says.
        completions: Best first.
        ranks: From 1, ascending; of a pair 1 and 2.
        tokens: Prompt and completions as token ids.
    """

    file: str
    row: int
    part: str
    source: str
    is_pair: bool
    prompt: Messages
    completions: list[Messages]
    ranks: tuple[int, ...]
    tokens: TokenGroup


@dataclass
class InputRows:
    """What there is to score, and what is left out.

    Attributes:
        rows: In the order of the files.
        num_read: Rows read.
        left_out: One entry for each row, or part of one, that is left out: file, row, reason, detail.
        formats: How each file is read, by its path.
        stopped: Files that were not read to the end.
    """

    rows: list[InputRow] = field(default_factory=list)
    num_read: int = 0
    left_out: list[dict[str, Any]] = field(default_factory=list)
    formats: dict[str, str] = field(default_factory=dict)
    stopped: list[str] = field(default_factory=list)

    @property
    def num_scored(self) -> int:
        """Rows of the files of which something is scored."""
        return len({(row.file, row.row) for row in self.rows})


def refuse_idle_settings(settings: Sequence[str]) -> None:
    """Refuse settings of a source that have no effect here, with the reason."""
    keys = [setting.partition("=")[0].strip().removeprefix("data.preferences.") for setting in settings]
    problems = [f"--set {key} has no effect on score: {_IDLE[key]}" for key in keys if key in _IDLE]
    if problems:
        raise ParamsError(problems)


def read_rows(
    sources: Sequence[Source], max_rows: int | None, params: Params, project: Project, reporter: Reporter
) -> InputRows:
    """Convert files of preferences, or so many rows of each, in a folder that does not last, and tokenize what stays.

    Raises:
        DataError: A file cannot be read or has no known format, no row is left, or a check whose policy is
            ``error`` found something.
    """
    whole = {"split": "eval", "weight": 1.0, "pairs": "all", "max_rows": max_rows}
    mine = [source.model_copy(update=whole) for source in sources if isinstance(source, PreferenceSource)]
    found, treatment = InputRows(), Treatment.of(params.data)
    with convert_aside(mine, treatment, reporter, "score: reading", params.runtime.workers) as (report, rejects):
        found.num_read = report.num_read
        found.formats = {account.path.as_posix(): account.why for account in report.files}
        found.stopped = [account.path.as_posix() for account in report.files if account.stopped]
        with reporter.meter("score: tokenizing", report.num_checked, "examples") as meter:
            for place, row in _canonical_rows(report):
                _tokenize(place, row, project, found)
                meter.advance(1)
        ranked = {(row.file, row.row, row.part) for row in found.rows if not row.is_pair}
        found.left_out[:0] = _rejects(rejects, ranked)
    _refuse_errors(found, project.policies)
    if not found.rows:
        _refuse_nothing(found, report)
    return found


def _canonical_rows(report: Conversion) -> Iterator[tuple[tuple[str, int, str], dict[str, Any]]]:
    """File, row and part of each pair or ranking that the conversion leaves, with its canonical row."""
    sources: dict[str, list[str] | None] = {}
    for index, block in enumerate(report.blocks):
        path = block.file.path
        file, before = path.as_posix(), block.first - block.file.first
        if file not in sources:
            sources[file] = _sources_in(path)
        examples = read_arrow(block.examples) if block.examples.exists() else None
        found: list[tuple[int, str, dict[str, Any]]] = []
        if examples is not None:
            pairs = examples.filter(pa.array(examples["ranking"].to_numpy() < 0)).to_pylist()
            found += [(row["row"], row["part"], row) for row in pairs]
            found += _rankings(block, examples, rankings_file(block.examples.parent, index))
        found.sort(key=lambda entry: entry[0])  # stable: parts stay in order
        for row_in_block, part, row in found:
            number = row_in_block + before
            named = sources[file]
            yield (file, number, part), {**row, "source": row["source"] if named is None else named[number]}


def _rankings(block: ConvertedBlock, examples: pa.Table, file: Path) -> list[tuple[int, str, dict[str, Any]]]:
    """The rankings of a block that the conversion keeps, with the rows and parts that they come from."""
    if not file.exists():
        return []
    places = examples.select(["ranking", "row", "part"]).to_pylist()
    first = {place["ranking"]: place for place in reversed(places) if place["ranking"] >= 0}
    kept = np.setdiff1d(np.array(sorted(first), np.int64), block.refuted)  # as the conversion does it
    rows = read_arrow(file).to_pylist()
    return [
        (first[ranking]["row"], first[ranking]["part"].rpartition(_PAIR_PART)[0].removesuffix(", "), row)
        for ranking, row in zip(kept.tolist(), rows, strict=True)
    ]


def _sources_in(path: Path) -> list[str] | None:
    """The column ``source`` of a canonical table; None where the file is none."""
    try:
        names = pq.read_schema(path).names
    except (pa.ArrowInvalid, OSError):
        return None
    if [name for name in names if name != TOOLS] not in (PREFERENCE_SCHEMA.names, RANKING_SCHEMA.names):
        return None
    values = pl.read_parquet(path, columns=["source"], glob=False)["source"].to_list()
    return [path.name if value is None else str(value) for value in values]


def _tokenize(place: tuple[str, int, str], row: dict[str, Any], project: Project, found: InputRows) -> None:
    file, number, part = place
    row = from_table(row)
    is_pair = "chosen" in row
    columns = ("chosen", "rejected") if is_pair else ("completions",)
    view = TokenView(project.encoder, project.max_length, project.policies).without_stops()
    try:
        tokens, _ = tokenize_row(row, columns, view)
    except RowProblem as problem:
        place_of = {"file": file, "row": number, **({"part": part} if part else {})}
        found.left_out.append({**place_of, "reason": problem.reason, "detail": problem.detail})
        return
    completions = [row["chosen"], row["rejected"]] if is_pair else row["completions"]
    ranks = (1, 2) if is_pair else tuple(row["ranks"])
    found.rows.append(InputRow(file, number, part, row["source"], is_pair, row["prompt"], completions, ranks, tokens))


def _rejects(path: Path, ranked: set[tuple[str, int, str]]) -> list[dict[str, Any]]:
    """What the conversion left out, but for pairs of rankings that are scored: they are in there."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        before, is_of_pair, _ = entry.get("part", "").rpartition(_PAIR_PART)
        if is_of_pair and (entry["file"], entry["row"], before.removesuffix(", ")) in ranked:
            continue
        found.append(entry)
    return found


def _refuse_errors(found: InputRows, policies: Mapping[str, str]) -> None:
    problems = []
    for name, policy in policies.items():
        rows = [entry for entry in found.left_out if entry["reason"] == name] if policy == "error" else []
        if rows:
            problems.append(
                f"{rows[0]['file']}: {len(rows)} rows fail the check {name} (the first is row {rows[0]['row']}), and"
                f" reference.checks.{name} is error; fix them, or set it to drop"
            )
    if problems:
        raise DataError(problems)


def _refuse_nothing(found: InputRows, report: Conversion) -> None:
    files = ", ".join(account.path.as_posix() for account in report.files)
    if not found.left_out:
        raise DataError(f"{files}: holds no rows")
    first = found.left_out[0]
    raise DataError(
        f"{files}: all {found.num_read} rows are left out; row {first['row']} {first['detail']};"
        " look at them with: dpo-cli data check"
    )
