"""What a training leaves under reports/, and its log as TensorBoard has it.

The log is part of every checkpoint: after a resume there is neither a gap nor a row twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.artifacts import write_json, write_json_lines, write_text
from dpo_cli.core.errors import MachineError

TOKEN_METRICS = ("entropy", "mean_token_accuracy")
"""What is logged of each training besides its own metrics: means over the answers' tokens."""


def with_held_out(names: Sequence[str]) -> tuple[str, ...]:
    """The columns of a log of metrics with these names, of training and of the held-out data."""
    return ("loss", *names, "grad_norm", "learning_rate", "eval_loss", *(f"eval_{name}" for name in names))


def write_reports(
    stage: str,
    metrics: Mapping[str, Any],
    columns: Sequence[str],
    history: Iterable[Mapping[str, Any]] = (),
    rejects: Iterable[Mapping[str, Any]] = (),
) -> None:
    """Write what a stage that trains reports, where it trained nothing, too.

    Args:
        stage: Its name.
        metrics: Those of metrics.json.
        columns: Of steps.tsv behind the step; one row a step, for ``dvc plots`` and the report, where what was not
            logged is an empty cell.
        history: The log.
        rejects: The rows that it left out.
    """
    rows: dict[int, dict[str, Any]] = {}
    for entry in history:
        if any(name in entry for name in columns):
            rows.setdefault(int(entry["step"]), {}).update(entry)
    write_tsv(paths.report_dir(stage) / "steps.tsv", [rows[step] for step in sorted(rows)], ("step", *columns))
    write_json_lines(paths.rejects_file(stage), rejects)
    write_json(paths.metrics_file(stage), {stage: metrics})


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


class EventFiles:
    """The log as TensorBoard's files, written as it comes.

    Args:
        folder: Where they go; one of a run that was killed is gone on with.
        first_step: The step from which this run goes on; what an earlier one wrote of later steps is hidden.

    Raises:
        MachineError: The package tensorboard is not installed.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise MachineError(
                "params.yaml: runtime.tensorboard needs the package tensorboard; run: pip install tensorboard, or set"
                " it to false"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """One point for each figure of a step, or of the held-out data."""
        for name, value in values.items():
            place = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            self._writer.add_scalar(place, value, step)

    def close(self) -> None:
        """Nothing more comes."""
        self._writer.close()
