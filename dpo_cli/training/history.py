"""The training's log as a table: one row a step, for ``dvc plots`` and the report.

It is taken from the trainer's own state, which is part of every checkpoint: after a resume
there is neither a gap nor a row twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_cli.core.artifacts import write_text

TOKEN_METRICS = ("entropy", "mean_token_accuracy")
"""What is logged of each training besides its own metrics: means over the answers' tokens."""


def merge_log(history: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> list[dict[str, Any]]:
    """One row a step from the trainer's log, with these columns where they were logged."""
    wanted = list(columns)
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        values = {name: entry[name] for name in wanted if name in entry}
        if values:
            rows.setdefault(int(entry["step"]), {"step": int(entry["step"])}).update(values)
    return [rows[step] for step in sorted(rows)]


def write_tsv(path: Path, rows: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> None:
    """Write rows as tab-separated values; what a row lacks is an empty cell."""
    names = list(columns)
    lines = ["\t".join(names)]
    lines += ["\t".join(_cell(row.get(name)) for name in names) for row in rows]
    write_text(path, "\n".join(lines) + "\n")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.8g}" if isinstance(value, float) else str(value)
