"""The answers of an evaluation as a file that people fill in with their votes."""

from __future__ import annotations

from pathlib import Path

from dpo_cli.core import paths
from dpo_cli.core.artifacts import read_json, write_text
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.evaluation.differences import rows_of_answers
from dpo_cli.evaluation.model_names import DPO, SFT
from dpo_cli.evaluation.tables import csv_text
from dpo_cli.judging.templates import transcript
from dpo_cli.judging.votes import rating_sheet


def write_rating_sheet(model: Path | None, sheet: Path, rater: str) -> tuple[int, int]:
    """Write a sheet; a file that is there already is not touched, since it may hold votes.

    Args:
        model: A folder that ``evaluate --model`` wrote; None: that of stage evaluate.
        sheet: The CSV file.
        rater: Who fills it in: `kind` or `kind:name`.

    Returns:
        How many items are in it, and how many prompts are not because both answers are identical.

    Raises:
        ParamsError: The sheet is there already, or the rater has no kind.
        DataError: The samples are missing or damaged, or all answers are identical.
    """
    if not rater.partition(":")[0].strip():
        raise ParamsError(f"--rater must be a kind or kind:name, such as human:anna, got {rater!r}")
    samples = (model or paths.report_dir("evaluate")) / paths.SAMPLES
    if sheet.exists():
        raise ParamsError(f"{sheet} is there already and may hold votes; name another file")
    if not samples.is_file():
        raise DataError(f"{samples} is missing; run: dpo-cli evaluate")
    try:
        _, answers = rows_of_answers(samples.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{samples} is damaged ({error}); run: dpo-cli evaluate") from None
    rows = [(id, transcript(texts.prompt), texts.dpo, texts.sft) for id, texts in sorted(answers.items())]
    items = rating_sheet(rows, _method(model), SFT, rater)
    if not items:
        raise DataError(f"{samples}: both models answer all {len(rows)} prompts alike, so there is nothing to vote on")
    write_text(sheet, csv_text(list(items[0]), [list(item.values()) for item in items]))
    return len(items), len(rows) - len(items)


def _method(model: Path | None) -> str:
    """What an evaluation calls its policy in a votes file."""
    if model is None:
        return DPO
    settings = read_json(model / paths.MODEL_SETTINGS, "run: dpo-cli evaluate --model")
    return str(settings.get("name", model.resolve().name))
