"""The training's log as a table: one row a step, for ``dvc plots`` and the report.

The log is part of every checkpoint: after a resume
there is neither a gap nor a row twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpo_cli.core.artifacts import write_text
from dpo_cli.core.errors import MachineError

TOKEN_METRICS = ("entropy", "mean_token_accuracy")
"""What is logged of each training besides its own metrics: means over the answers' tokens."""


def merge_log(history: Iterable[Mapping[str, Any]], columns: Iterable[str]) -> list[dict[str, Any]]:
    """One row a step from the log, with these columns where they were logged."""
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
