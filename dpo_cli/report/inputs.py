"""What the report is made of: the files that the stages left under reports/, and nothing else."""

from __future__ import annotations

import csv
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

_WIN_RATE = ("win_rate", "low", "high")
_SAMPLE_KEYS = ("id", "prompt", "sft", "dpo")

Table = Mapping[str, list[float]]
"""Columns of equal length by name; an empty cell is NaN."""

Row = Mapping[str, Any]
"""Cells by column: text, or a number that is NaN where the cell is empty."""


@dataclass(frozen=True)
class Inputs:
    """Everything on the page.

    Attributes:
        metrics: Each stage's metrics, by the stage's name.
        sft_steps: One row a logged step of supervised fine-tuning; no row where there was none.
        train_steps: One row a logged step of DPO.
        margins: Histogram of the held-out margins: middle of the bin, share of the pairs.
        samples: One row a prompt: both answers and, where judged, who wins.
        pairs: One row a held-out pair, where there is accuracy by source to compare with.
        reliability: Bins of the probability that the reward gives, and how often it is right.
        accuracy_by: Accuracy by length difference and by source.
        temperatures: Win rates by sampling temperature and opponent.
        frontier: KL and win rate of the model with a multiple of what training changed.
        lengths: Win rate by length difference.
        agreement: What ``dpo-cli agreement`` found; None where it left nothing.
        capability: What ``dpo-cli capability`` found by task; None where it left nothing.
    """

    metrics: Mapping[str, Mapping[str, Any]]
    sft_steps: Table
    train_steps: Table
    margins: Table
    samples: list[dict[str, Any]]
    pairs: list[Row]
    reliability: list[Row]
    accuracy_by: list[Row]
    temperatures: list[Row]
    frontier: list[Row]
    lengths: list[Row]
    agreement: Mapping[str, Any] | None
    capability: Mapping[str, Any] | None


def read_inputs() -> Inputs:
    """Read the stages' reports. Files behind further figures may be missing, but not damaged.

    Raises:
        StaleArtifactError: A file is missing or damaged; the message names the stage to run.
    """
    accuracy_by = _read_rows("accuracy_by", ("num_pairs", "accuracy", "low", "high"), ("kind", "label"))
    return Inputs(
        metrics={stage: _read_metrics(stage) for stage in STAGES},
        sft_steps=_read_table("sft", "steps.tsv", "\t", _LOSSES),
        train_steps=_read_table("train", "steps.tsv", "\t", _TRAIN_COLUMNS),
        margins=_read_table("evaluate", "margins.csv", ",", ("margin", "share")),
        samples=_read_samples(),
        pairs=_read_rows("pairs", ("chosen_tokens", "rejected_tokens"), ("source",)) if accuracy_by else [],
        reliability=_read_rows(
            "reliability", ("num_pairs", "probability", "accuracy", "accuracy_low", "accuracy_high")
        ),
        accuracy_by=accuracy_by,
        temperatures=_read_rows("temperatures", ("temperature", *_WIN_RATE), ("opponent",)),
        frontier=_read_rows("frontier", ("scale", "kl", "kl_low", "kl_high", *_WIN_RATE, "reward_gain")),
        lengths=_read_rows("length", ("length_difference", "num_prompts", *_WIN_RATE)),
        agreement=_read_optional("agreement", "methods"),
        capability=_read_optional("capability", "tasks"),
    )


def _remedy(stage: str) -> str:
    return f"run: dpo-cli {stage.replace('_', '-')}"


def _read_metrics(stage: str) -> dict[str, Any]:
    path = paths.metrics_file(stage)
    content = read_json(path, _remedy(stage))
    if not isinstance(content, dict) or not isinstance(content.get(stage), dict):
        raise StaleArtifactError(f"{path} is damaged (it holds no metrics of {stage}); {_remedy(stage)}")
    return content[stage]


def _read_optional(command: str, wanted: str) -> dict[str, Any] | None:
    """Metrics that a command beside the pipeline may have left."""
    if not paths.metrics_file(command).is_file():
        return None
    metrics = _read_metrics(command)
    if wanted not in metrics:
        raise StaleArtifactError(f"{paths.metrics_file(command)} is damaged (it has no {wanted}); {_remedy(command)}")
    return metrics


def _read_rows(name: str, numbers: Sequence[str], texts: Sequence[str] = ()) -> list[Row]:
    """Rows of a CSV file of stage evaluate; none where it is missing or has but a header."""
    path = paths.report_dir("evaluate") / f"{name}.csv"
    if not path.is_file():
        return []
    header, *rows = csv.reader(_read_lines(path, _remedy("evaluate")))
    missing = [column for column in (*numbers, *texts) if column not in header]
    if missing:
        raise StaleArtifactError(f"{path} is damaged (it has no column {missing[0]}); {_remedy('evaluate')}")
    try:
        return [
            {
                column: (float(cell) if cell else math.nan) if column in numbers else cell
                for column, cell in zip(header, row, strict=True)
            }
            for row in rows
        ]
    except ValueError as error:
        raise StaleArtifactError(f"{path} is damaged ({error}); {_remedy('evaluate')}") from None


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
    path = paths.report_dir("evaluate") / paths.SAMPLES
    samples = read_json(path, _remedy("evaluate"))
    if not isinstance(samples, list) or not samples:
        raise StaleArtifactError(f"{path} is damaged (it is no list of answers); {_remedy('evaluate')}")
    for sample in samples:
        if not isinstance(sample, dict) or not set(_SAMPLE_KEYS) <= set(sample):
            raise StaleArtifactError(
                f"{path} is damaged (an entry has not all of {', '.join(_SAMPLE_KEYS)}); {_remedy('evaluate')}"
            )
    return samples


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
