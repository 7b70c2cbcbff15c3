"""The experiments in small: killed in its midst, one goes on, and what theory asks of its points holds."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dpo_cli.core.progress import SilentReporter
from experiments.answers import EXPERIMENT as ANSWERS
from experiments.grid import run_experiment
from experiments.sentiment import EXPERIMENT

_RUN = """
import sys
from pathlib import Path
from dpo_cli.core.progress import SilentReporter
from experiments.grid import run_experiment
from experiments.sentiment import EXPERIMENT
if __name__ == "__main__":
    run_experiment(EXPERIMENT, "fast.yaml", Path(sys.argv[1]), 1, SilentReporter())
"""


@pytest.mark.timeout(600)
def test_the_fast_grid_goes_on_after_a_kill_and_holds(tmp_path: Path) -> None:
    work, script = tmp_path / "work", tmp_path / "run.py"
    script.write_text(_RUN, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    running = subprocess.Popen([sys.executable, str(script), str(work)], env=environment, start_new_session=True)
    while not list(work.glob("cells/*/cell.json")):
        assert running.poll() is None, "it ended before a cell was done"
        time.sleep(0.2)
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    (done,) = work.glob("cells/*/cell.json")
    before = done.stat().st_mtime_ns
    with contextlib.chdir(tmp_path):
        results = run_experiment(EXPERIMENT, "fast.yaml", work, 1, SilentReporter())  # raises where a check fails
    assert done.stat().st_mtime_ns == before, "what was done is not done again"
    with (results / "points.csv").open(encoding="utf-8") as file:
        points = list(csv.DictReader(file))
    assert {point["method"] for point in points} >= {"sft", "dpo", "preferred-ft", "ppo", "ppo-gt", "best-of-n"}
    assert all(float(point["reward_low"]) <= float(point["reward"]) <= float(point["reward_high"]) for point in points)
    with (results / "checks.csv").open(encoding="utf-8") as file:
        held = [row["statement"] for row in csv.DictReader(file) if row["verdict"] == "holds"]
    for part in (
        "than SFT",
        "mixed to the KL of",
        "the KL of DPO 5",
        "above the ideal",
        "than PPO, learned reward 3, at",
    ):
        assert [statement for statement in held if part in statement], part
    page = (results / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_dpo_answers_better_than_sft_and_sft_as_well_as_itself(tmp_path: Path) -> None:
    results = ANSWERS.run("fast.yaml", tmp_path / "work", 1, SilentReporter())
    tables = {}
    for name in ("win_rates", "out_of_distribution", "training"):
        with (results / f"{name}.csv").open(encoding="utf-8") as file:
            tables[name] = [*csv.DictReader(file)]
    rates = {(row["method"], row["temperature"]): row for row in tables["win_rates"]}
    assert {row["method"] for row in tables["training"]} == {"dpo", "ppo", "preferred-ft"}
    assert {method for method, _ in rates} == {"sft", "dpo", "ppo", "preferred-ft", "best-of-1", "best-of-4"}
    for table, measures in (("win_rates", ("truth", "sft")), ("out_of_distribution", ("win_rate",))):
        for row in tables[table]:
            assert all(float(row[f"{one}_low"]) <= float(row[one]) <= float(row[f"{one}_high"]) for one in measures)
    for temperature in ("0", "1"):
        assert float(rates["dpo", temperature]["sft_low"]) > 0.5
        assert float(rates["dpo", temperature]["truth"]) < 0.5, "nothing beats the good answer"
        assert {rates["sft", temperature][f"sft{end}"] for end in ("", "_low", "_high")} == {"0.5000"}
    best_of_1 = rates["best-of-1", "1"]
    assert float(best_of_1["sft_low"]) < 0.5 < float(best_of_1["sft_high"]), "one sample is as good as another"
    assert {path.name for path in results.glob("*.svg")} == {
        "win-rate-truth.svg",
        "win-rate-sft.svg",
        "out-of-distribution.svg",
    }
