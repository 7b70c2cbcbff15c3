"""What the report is made of: the files that the stages left under reports/, and nothing else."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import read_json
from dpo_cli.core.errors import StaleArtifactError

STAGES = ("convert_sft", "convert_preferences", "sft", "precompute_ref", "train", "evaluate")

_LOSSES = ("step", "loss", "eval_loss")
_REWARDS = tuple(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies"))
_TRAIN_COLUMNS = (*_LOSSES, *_REWARDS, *(f"eval_{name}" for name in _REWARDS))

Table = Mapping[str, list[float]]
"""Columns of equal length by name; an empty cell is NaN."""


@dataclass(frozen=True)
class Inputs:
    """Everything on the page.

    Attributes:
        metrics: Each stage's metrics, by the stage's name.
        sft_steps: One row a logged step of supervised fine-tuning; no row where there was none.
        train_steps: One row a logged step of DPO.
        margins: Histogram of the held-out margins: middle of the bin, share of the pairs.
        samples: One row a prompt: both answers and, where judged, who wins.
    """

    metrics: Mapping[str, Mapping[str, Any]]
    sft_steps: Table
    train_steps: Table
    margins: Table
    samples: list[dict[str, Any]]


def read_inputs() -> Inputs:
    """Read the stages' reports.

    Raises:
        StaleArtifactError: A file is missing or damaged; the message names the stage to run.
    """
    return Inputs(
        metrics={stage: _read_metrics(stage) for stage in STAGES},
        sft_steps=_read_table("sft", "steps.tsv", "\t", _LOSSES),
        train_steps=_read_table("train", "steps.tsv", "\t", _TRAIN_COLUMNS),
        margins=_read_table("evaluate", "margins.csv", ",", ("margin", "share")),
        samples=_read_samples(),
    )


def _remedy(stage: str) -> str:
    return f"run: dpo-cli {stage.replace('_', '-')}"


def _read_metrics(stage: str) -> dict[str, Any]:
    path = paths.metrics_file(stage)
    content = read_json(path, _remedy(stage))
    if not isinstance(content, dict) or not isinstance(content.get(stage), dict):
        raise StaleArtifactError(f"{path} is damaged (it holds no metrics of {stage}); {_remedy(stage)}")
    return content[stage]


def _read_table(stage: str, name: str, delimiter: str, wanted: Sequence[str]) -> Table:
    path = paths.report_dir(stage) / name
    header, *rows = csv.reader(_read_lines(path, _remedy(stage)), delimiter=delimiter)
    missing = [column for column in wanted if column not in header]
    if missing:
        raise StaleArtifactError(f"{path} is damaged (it has no column {missing[0]}); {_remedy(stage)}")
    try:
        cells = [[float(cell) if cell else math.nan for cell in row] for row in rows]
        columns = list(map(list, zip(*cells, strict=True))) if cells else [[] for _ in header]
        return dict(zip(header, columns, strict=True))
    except ValueError as error:
        raise StaleArtifactError(f"{path} is damaged ({error}); {_remedy(stage)}") from None


def _read_samples() -> list[dict[str, Any]]:
    path = paths.report_dir("evaluate") / "samples.jsonl"
    try:
        return [json.loads(line) for line in _read_lines(path, _remedy("evaluate"))]
    except json.JSONDecodeError as error:
        raise StaleArtifactError(f"{path} is damaged ({error}); {_remedy('evaluate')}") from None


def _read_lines(path: Path, remedy: str) -> list[str]:
    """Lines of a text file that holds at least one; only a line feed ends a line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StaleArtifactError(f"{path} is missing; {remedy}") from None
    except UnicodeDecodeError as error:
        raise StaleArtifactError(f"{path} is damaged ({error}); {remedy}") from None
    if not text:
        raise StaleArtifactError(f"{path} is damaged (it is empty); {remedy}")
    return text.removesuffix("\n").split("\n")
