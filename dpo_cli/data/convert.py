"""From a raw file to train.parquet and eval.parquet, with every row accounted for.

Rows stream through: format, checks, duplicates, split. What is left out is counted by reason
and listed with its file, row and line, never with its content.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Generic

import polars as pl

from dpo_cli.core import paths
from dpo_cli.core.artifacts import publish_folder, write_json, write_json_lines
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.progress import Reporter
from dpo_cli.core.scratch import stage_scratch
from dpo_cli.data.formats.base import Example, Format, RowProblem
from dpo_cli.data.reading import Record, read_records
from dpo_cli.data.splits import is_held_out

SPLITS = ("train", "eval")
_DETECTION_ROWS = 100
_ROWS_A_PART = 20_000


@dataclass
class Conversion:
    """What became of the rows of a file.

    Attributes:
        format: Name of the format they were read in, and why that one.
        num_read: Rows read.
        num_written: Rows written, by split.
        rejects: One entry for each row left out: file, row, line, reason, detail.
    """

    format: str
    why: str
    num_read: int = 0
    num_written: Counter[str] = field(default_factory=Counter)
    rejects: list[dict[str, Any]] = field(default_factory=list)

    @property
    def num_rejected_by_reason(self) -> dict[str, int]:
        """How many rows were left out for which reason, most frequent first."""
        return dict(Counter(reject["reason"] for reject in self.rejects).most_common())


@dataclass(frozen=True)
class Kind(Generic[Example]):
    """What tells instruction data from preference data.

    Attributes:
        formats: The formats it may come in.
        check: The reason to leave an example out, if there is one.
        schema: Columns of the canonical table.
    """

    formats: tuple[Format[Example], ...]
    check: Callable[[Example], str | None]
    schema: dict[str, Any]


def convert(
    source: Path,
    kind: Kind[Example],
    format_name: str,
    eval_fraction: float,
    folder: Path,
    on_bytes: Callable[[int], None] = lambda _: None,
) -> Conversion:
    """Convert a raw file into ``folder/train.parquet`` and ``folder/eval.parquet``.

    Args:
        source: The raw file.
        kind: Instruction or preference data.
        format_name: A format's name, or ``auto``.
        eval_fraction: Share of prompts held out.
        folder: An empty folder to write to.
        on_bytes: Hears of every so many bytes of the file that were read.

    Raises:
        DataError: The file cannot be read, has no known format, or leaves a split empty.
    """
    records = read_records(source, on_bytes)
    head = list(islice(records, _DETECTION_ROWS))
    reader, why = _choose_format(source, kind, format_name, head)
    report = Conversion(reader.name, why)
    tables = {split: _TableWriter(folder / f"{split}.parquet", kind.schema) for split in SPLITS}
    first_row: dict[str, int] = {}
    for record in chain(head, records):
        report.num_read += 1
        try:
            row, split = _convert_record(record, kind, reader, eval_fraction, source.name)
            if row["id"] in first_row:
                raise RowProblem("duplicate", f"repeats row {first_row[row['id']]}")
        except RowProblem as problem:
            report.rejects.append(
                {
                    "file": source.as_posix(),
                    "row": record.row,
                    "line": record.line,
                    "reason": problem.reason,
                    "detail": problem.detail,
                }
            )
            continue
        first_row[row["id"]] = record.row
        tables[split].add(row)
        report.num_written[split] += 1
    for split, table in tables.items():
        if not report.num_written[split]:
            raise DataError(_nothing_left(source, report, split, eval_fraction))
        table.close()
    return report


def convert_stage(
    stage: str,
    path: str,
    kind: Kind[Example],
    format_name: str,
    eval_fraction: float,
    place: Path,
    reporter: Reporter,
) -> dict[str, Any]:
    """Convert a raw file, publish the tables with their metrics, and print the account of its rows.

    Returns:
        The stage's metrics.

    Raises:
        ParamsError: The file does not lie under data/raw, where DVC would see it change.
        DataError: See :func:`convert`; nothing is published then.
    """
    source = Path(path)
    if ".." in source.parts or not source.is_relative_to(paths.RAW):
        key = {"convert_sft": "data.sft.path", "convert_preferences": "data.preferences.path"}[stage]
        raise ParamsError(
            f"params.yaml: {key} must lie under {paths.RAW.as_posix()}, which DVC watches, got {path};"
            " copy the file there"
        )
    size = source.stat().st_size if source.is_file() else 0
    with stage_scratch(stage, "run") as scratch:
        built = scratch.build_folder()
        with reporter.meter(f"{stage}: reading {source.name}", size, "bytes") as meter:
            report = convert(source, kind, format_name, eval_fraction, built, meter.advance)
        publish_folder(built, place)
        scratch.clear()
    metrics: dict[str, Any] = {
        "num_read": report.num_read,
        "num_train": report.num_written["train"],
        "num_eval": report.num_written["eval"],
        "num_rejected": len(report.rejects),
        "rejected": report.num_rejected_by_reason,
    }
    rejects_file = paths.rejects_file(stage)
    write_json_lines(rejects_file, report.rejects)
    write_json(paths.metrics_file(stage), {stage: metrics})
    reporter.table(
        stage,
        [
            ("file", source.as_posix()),
            ("format", f"{report.format} ({report.why})"),
            ("rows read", str(report.num_read)),
            ("written to train", str(metrics["num_train"])),
            ("written to eval", str(metrics["num_eval"])),
            *((f"left out: {reason.replace('_', ' ')}", str(n)) for reason, n in metrics["rejected"].items()),
            ("left out, listed in", f"{rejects_file.as_posix()} ({metrics['num_rejected']})"),
        ],
    )
    return metrics


def _choose_format(source: Path, kind: Kind[Example], name: str, head: list[Record]) -> tuple[Format[Example], str]:
    if name != "auto":
        return next(reader for reader in kind.formats if reader.name == name), "named in params.yaml"
    rows = [record.value for record in head if isinstance(record.value, dict)]
    counts = [sum(map(reader.matches, rows)) for reader in kind.formats]
    if not any(counts):
        found = ", ".join(rows[0]) if rows else f"rows of type {type(head[0].value).__name__}" if head else "no rows"
        known = "; ".join(f"{reader.name}: {reader.fields}" for reader in kind.formats)
        raise DataError(f"{source}: unknown format: its first row has {found}; known formats are {known}")
    best = kind.formats[counts.index(max(counts))]
    return best, f"{max(counts)} of the first {len(head)} rows have {best.fields}"


def _convert_record(
    record: Record, kind: Kind[Example], reader: Format[Example], eval_fraction: float, source: str
) -> tuple[dict[str, Any], str]:
    if not isinstance(record.value, dict):
        raise RowProblem("not_an_object", f"must be a JSON object, got {type(record.value).__name__}")
    example = reader.read(record.value)
    reason = kind.check(example)
    if reason is not None:
        raise RowProblem(reason, reason.replace("_", " "))
    try:
        return example.row(source), "eval" if is_held_out(example.prompt, eval_fraction) else "train"
    except UnicodeEncodeError:
        raise RowProblem("bad_unicode", "has half of a surrogate pair, which is no text") from None


def _nothing_left(source: Path, report: Conversion, split: str, eval_fraction: float) -> str:
    counts = ", ".join(f"{reason} {count}" for reason, count in report.num_rejected_by_reason.items())
    if not sum(report.num_written.values()):
        return f"{source}: all {report.num_read} rows were left out: {counts or 'it holds none'}"
    return (
        f"{source}: no row fell into the {split} split ({report.num_read} read, {len(report.rejects)} left out); "
        f"add rows, or change data.eval_fraction, now {eval_fraction:g}"
    )


class _TableWriter:
    """Writes rows to one parquet file through parts, so that memory does not grow with the file."""

    def __init__(self, path: Path, schema: dict[str, Any]) -> None:
        self._path = path
        self._schema = schema
        self._rows: list[dict[str, Any]] = []
        self._parts = path.with_suffix(".parts")
        self._num_parts = 0

    def add(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) >= _ROWS_A_PART:
            self._flush()

    def _flush(self) -> None:
        self._parts.mkdir(parents=True, exist_ok=True)
        frame = pl.DataFrame(self._rows, schema=self._schema)
        frame.write_parquet(self._parts / f"{self._num_parts:06d}.parquet")
        self._num_parts += 1
        self._rows.clear()

    def close(self) -> None:
        self._flush()
        pl.scan_parquet(sorted(self._parts.iterdir()), glob=False).sink_parquet(self._path)
        shutil.rmtree(self._parts)
