"""Scored rows as a file: what ``dpo-cli score --out`` writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpo_cli.core.artifacts import atomic_path, write_json_lines
from dpo_cli.data.schema import MESSAGES, table_of
from dpo_cli.evaluation.score import ScoredRow

_COMPLETION = pa.struct(
    [
        ("side", pa.string()),
        ("rank", pa.int32()),
        ("messages", MESSAGES),
        ("reward", pa.float64()),
        ("logp", pa.float64()),
        ("ref_logp", pa.float64()),
        ("num_tokens", pa.int32()),
        ("token_ids", pa.list_(pa.int32())),
        ("token_log_ratios", pa.list_(pa.float32())),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("file", pa.string()),
        ("row", pa.int64()),
        ("part", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("in_training", pa.bool_()),
        ("accuracy", pa.float64()),
        ("margin", pa.float64()),
        ("prompt", MESSAGES),
        ("completions", pa.list_(_COMPLETION)),
    ]
)
"""Columns of ``--out``. Rewards, log-probabilities (``logp``, ``ref_logp``) and margin are in nats."""


def write_rows(path: Path, rows: Sequence[ScoredRow]) -> None:
    """Write the rows as parquet (:data:`SCHEMA`) or JSON lines, by the file's suffix, whole or not at all."""
    entries = (_entry(row) for row in rows)
    if path.suffix == ".jsonl":
        write_json_lines(path, entries)
        return
    with atomic_path(path) as temporary:
        pq.write_table(table_of(list(entries), SCHEMA), temporary, compression="zstd")


def _entry(row: ScoredRow) -> dict[str, Any]:
    """A row as ``--out`` has it (:data:`SCHEMA`)."""
    given, answers = row.input, row.answers
    return {
        "id": given.tokens.id,
        "file": given.file,
        "row": given.row,
        "part": given.part,
        "source": given.source,
        "kind": "pair" if given.is_pair else "ranking",
        "in_training": row.in_training,
        "accuracy": row.agreement.accuracy,
        "margin": row.agreement.margin,
        "prompt": given.prompt,
        "completions": [
            {
                "side": ("chosen", "rejected")[place] if given.is_pair else None,
                "rank": given.ranks[place],
                "messages": messages,
                "reward": answers.rewards[place],
                "logp": row.logps[place],
                "ref_logp": answers.reference[place],
                "num_tokens": answers.num_tokens[place],
                "token_ids": list(given.tokens.completions[place]),
                "token_log_ratios": row.ratios[place],
            }
            for place, messages in enumerate(given.completions)
        ],
    }
