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
_TOKENS = ("chosen_tokens", "rejected_tokens")
_RELIABILITY = ("num_pairs", "probability", "accuracy", "accuracy_low", "accuracy_high")
_WIN_RATE = ("win_rate", "low", "high")
_SAMPLE_KEYS = ("id", "prompt", "sft", "dpo")

Row = Mapping[str, Any]
"""Cells by column: text, or a number that is NaN where the cell is empty."""


@dataclass(frozen=True)
class Inputs:
    """Everything on the page: a table is empty and what a command left is None where there is nothing of it.

    Attributes:
        metrics: Each stage's metrics, by the stage's name.
        sft_steps: One row a logged step of supervised fine-tuning.
        train_steps: One row a logged step of DPO.
        samples: One row a prompt: both answers and, where judged, who wins.
        pairs: One row a held-out pair, where there is accuracy by source to compare with.
        frontier: KL and win rate of the model with a multiple of what training changed.
    """

    metrics: Mapping[str, Mapping[str, Any]]
    sft_steps: list[Row]
    train_steps: list[Row]
    margins: list[Row]
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
    accuracy_by = _read_further("accuracy_by", ("num_pairs", "accuracy", "low", "high"), ("kind", "label"))
    return Inputs(
        metrics={stage: _read_metrics(stage) for stage in STAGES},
        sft_steps=read_rows(steps_file("sft"), _LOSSES),
        train_steps=read_rows(steps_file("train"), (*_LOSSES, *_REWARDS, *(f"eval_{name}" for name in _REWARDS))),
        margins=read_rows(evaluation_table("margins"), ("margin", "share")),
        samples=_read_samples(),
        pairs=_read_further("pairs", _TOKENS, ("id", "prompt", "source")) if accuracy_by else [],
        reliability=_read_further("reliability", _RELIABILITY),
        accuracy_by=accuracy_by,
        temperatures=_read_further("temperatures", ("temperature", *_WIN_RATE), ("opponent",)),
        frontier=_read_further("frontier", ("scale", "kl", "kl_low", "kl_high", *_WIN_RATE, "reward_gain")),
        lengths=_read_further("length", ("length_difference", "num_prompts", *_WIN_RATE)),
        agreement=_read_of_command("agreement", "methods"),
        capability=_read_of_command("capability", "tasks"),
    )


def steps_file(stage: str) -> Path:
    """The logged steps of a stage that trains."""
    return paths.report_dir(stage) / "steps.tsv"


def evaluation_table(name: str) -> Path:
    """A CSV file of stage evaluate."""
    return paths.report_dir("evaluate") / f"{name}.csv"


def _remedy(path: Path) -> str:
    return f"run: dpo-cli {path.parent.name.replace('_', '-')}"


def _damaged(path: Path, why: object) -> StaleArtifactError:
    return StaleArtifactError(f"{path} is damaged ({why}); {_remedy(path)}")


def _read_metrics(stage: str) -> dict[str, Any]:
    path = paths.metrics_file(stage)
    content = read_json(path, _remedy(path))
    if not isinstance(content, dict) or not isinstance(content.get(stage), dict):
        raise _damaged(path, f"it holds no metrics of {stage}")
    return content[stage]


def _read_of_command(command: str, wanted: str) -> dict[str, Any] | None:
    """Metrics that a command beside the pipeline may have left."""
    path = paths.metrics_file(command)
    metrics = _read_metrics(command) if path.is_file() else None
    if metrics is not None and wanted not in metrics:
        raise _damaged(path, f"it has no {wanted}")
    return metrics


def _read_samples() -> list[dict[str, Any]]:
    path = paths.report_dir("evaluate") / paths.SAMPLES
    samples = read_json(path, _remedy(path))
    if not isinstance(samples, list) or not samples:
        raise _damaged(path, "it is no list of answers")
    if not all(isinstance(sample, dict) and set(_SAMPLE_KEYS) <= set(sample) for sample in samples):
        raise _damaged(path, f"an entry has not all of {', '.join(_SAMPLE_KEYS)}")
    return samples


def _read_further(name: str, numbers: Sequence[str], texts: Sequence[str] = ()) -> list[Row]:
    """Rows of a table that stage evaluate may have left."""
    path = evaluation_table(name)
    return read_rows(path, numbers, texts) if path.is_file() else []


def read_rows(path: Path, numbers: Sequence[str], texts: Sequence[str] = ()) -> list[Row]:
    """Rows of a CSV or TSV file that must have these columns; further ones hold numbers, too."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StaleArtifactError(f"{path} is missing; {_remedy(path)}") from None
    except UnicodeDecodeError as error:
        raise _damaged(path, error) from None
    if not text:
        raise _damaged(path, "it is empty")
    lines = text.removesuffix("\n").split("\n")  # only a line feed ends a line
    header, *rows = csv.reader(lines, delimiter="\t" if path.suffix == ".tsv" else ",")
    for column in (*numbers, *texts):
        if column not in header:
            raise _damaged(path, f"it has no column {column}")
    try:
        return [
            {
                column: cell if column in texts else float(cell) if cell else math.nan
                for column, cell in zip(header, row, strict=True)
            }
            for row in rows
        ]
    except ValueError as error:
        raise _damaged(path, error) from None
