"""A training to watch: what lies on the disk of one that runs, was stopped or is done."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dpo_cli.core import paths
from dpo_cli.core.artifacts import read_json
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.live_log import LIVE_LOG, LiveRun, read_live_log
from dpo_cli.core.text import duration
from dpo_cli.report.inputs import Row, read_rows, steps_file
from dpo_cli.report.steps import CURVES

State = Literal["running", "stopped", "finished"]


@dataclass(frozen=True)
class Watched:
    """A training as it stands.

    Attributes:
        stage: Whose it is.
        state: Whether it goes on.
        steps: Its log, one row a step.
        source: The file that holds it.
        num_steps: Optimizer steps in all.
        steps_per_s: Of this run, held-out passes included; None where that is not known.
        seconds_left: None where that is not known, or nothing is left.
    """

    stage: str
    state: State
    steps: Sequence[Row]
    source: Path
    num_steps: int
    steps_per_s: float | None = None
    seconds_left: float | None = None

    @property
    def step(self) -> int:
        """Steps that were taken."""
        return int(self.steps[-1]["step"]) if self.steps else 0

    @property
    def headline(self) -> str:
        """How it stands, in words."""
        words = f"{self.stage}: {self.state}, step {self.step} of {self.num_steps}"
        if self.steps_per_s:
            rate = self.steps_per_s
            words += f", {rate:.1f} steps/s" if rate >= 1 else f", {1 / rate:.1f} s a step"
        if self.seconds_left is not None:
            words += f", {duration(self.seconds_left)} left"
        return words


def find_logs() -> dict[str, Path]:
    """The newest log of each stage that trained something, the newest stage first."""
    found: list[tuple[float, str, Path]] = []
    for stage in CURVES:
        for path in (*(paths.scratch_root() / stage).glob(f"*/{LIVE_LOG}"), steps_file(stage)):
            try:
                time_of, has_rows = path.stat().st_mtime, path.suffix == ".jsonl" or b"\n" in path.read_bytes()[:-1]
            except OSError:
                continue
            if has_rows:
                found.append((time_of, stage, path))
    newest: dict[str, Path] = {}
    for _, stage, path in sorted(found, reverse=True):
        newest.setdefault(stage, path)
    return newest


def read_log(stage: str, path: Path) -> Watched | None:
    """Read a log of :func:`find_logs`; None where it is gone, or has not begun.

    Raises:
        StaleArtifactError: A file of a stage that is done is damaged.
    """
    if path.suffix == ".jsonl":
        run = read_live_log(path)
        return None if run is None else _watched(stage, path, run)
    try:
        rows = read_rows(path, ("step", "loss"))
        metrics = read_json(paths.metrics_file(stage), f"run: dpo-cli {stage}")[stage]
    except StaleArtifactError:
        if path.exists() and paths.metrics_file(stage).exists():
            raise
        return None  # DVC deletes what a stage makes before it runs it
    return Watched(stage, "finished", rows, path, metrics.get("num_steps", int(rows[-1]["step"])))


def _watched(stage: str, path: Path, run: LiveRun) -> Watched:
    rows: dict[int, dict[str, Any]] = {}
    for entry in run.entries:
        values = {name: value for name, value in entry.items() if value is not None}
        rows.setdefault(int(entry["step"]), {}).update(values)
    steps = [rows[step] for step in sorted(rows)]
    if not run.is_running:
        return Watched(stage, "stopped", steps, path, run.num_steps)
    rate = _rate(run.entries)
    left = None
    if rate:
        since = time.time() - run.entries[-1]["time"]
        left = max(0.0, (run.num_steps - run.entries[-1]["step"]) / rate - since)
    return Watched(stage, "running", steps, path, run.num_steps, rate, left)


def _rate(entries: Sequence[Mapping[str, Any]]) -> float | None:
    """Steps a second, of those that this process logged."""
    timed = [entry for entry in entries if "time" in entry]
    if not timed or timed[-1]["step"] == timed[0]["step"] or timed[-1]["time"] <= timed[0]["time"]:
        return None
    return (timed[-1]["step"] - timed[0]["step"]) / (timed[-1]["time"] - timed[0]["time"])
