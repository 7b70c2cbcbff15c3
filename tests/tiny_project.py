"""A small project on a tiny model, whose stages run in this process and in the working directory."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import Params
from dpo_cli.core.progress import Reporter
from dpo_cli.data import world

TRAINING = {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 4}
CONVERTED = ("base", "convert_sft", "convert_preferences")
"""The stages that come before all training."""


def tiny_settings(model: Path, **changes: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Settings by section for a model directory; changes are settings by section, too."""
    settings: dict[str, dict[str, Any]] = {
        "data": {"eval_fraction": 0.2},
        "model": {"name": "tiny"},
        "sft": {**TRAINING, "max_length": 256},
        "reference": {"max_length": 256},
        "train": TRAINING,
        "reward": {**TRAINING, "loss": "bradley_terry"},
        "runtime": {"model_path": str(model), "device": "cpu"},
    }
    return {name: {**settings.get(name, {}), **changes.get(name, {})} for name in settings | changes}


def tiny_params(model: Path, **changes: dict[str, Any]) -> Params:
    return parse_params(tiny_settings(model, **changes))


def write_raw(preferences: int | Sequence[dict[str, Any]] = 90, instructions: int = 80) -> None:
    """Write raw data: rows of the embedded world, or preferences as they are given."""
    rows = world.preference_rows(0, preferences) if isinstance(preferences, int) else preferences
    paths.RAW.mkdir(parents=True, exist_ok=True)
    (paths.RAW / "instructions.json").write_text(json.dumps(world.instruction_rows(0, instructions)), encoding="utf-8")
    (paths.RAW / "preferences.json").write_text(json.dumps(rows), encoding="utf-8")


def run_stages(params: Params, reporter: Reporter, *names: str) -> dict[str, Any]:
    """Run stages in turn; the metrics of the last one."""
    metrics: dict[str, Any] = {}
    for name in names:
        metrics = importlib.import_module(f"dpo_cli.stages.{name}").run(params, reporter)
    return metrics
