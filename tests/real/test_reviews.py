"""The experiment on reviews, in small, on the real model: all of its parts run, and a page comes of it."""

from __future__ import annotations

import csv
from pathlib import Path

import polars as pl
import pytest

from dpo_cli.core.progress import SilentReporter
from experiments.grid import run_experiment
from tests.real.fetch import MODELS, imported

pytest.importorskip("vaderSentiment", reason="NOT TESTED on smollm2: vaderSentiment is not installed")


def test_the_fast_grid_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from experiments.reviews import EXPERIMENT

    monkeypatch.setenv("DPO_MODEL_PATH", str(imported(MODELS["smollm2"])))
    run_experiment(EXPERIMENT, "fast.yaml", tmp_path / "work", 1, SilentReporter())
    starts = [pl.read_parquet(path) for path in tmp_path.glob("work/cells/*/00000.parquet")]
    assert starts[0].equals(starts[1])
    with (tmp_path / "work/results/points.csv").open(encoding="utf-8") as file:
        points = {row["method"]: row for row in csv.DictReader(file)}
    assert points.keys() == {"sft", "dpo", "ppo", "best-of-n", "best-of-n-gt"}
    assert float(points["sft"]["kl"]) == 0 < float(points["dpo"]["kl"])
    assert -1 <= float(points["ppo"]["reward"]) <= 1
    assert (tmp_path / "work/results/index.html").is_file()
