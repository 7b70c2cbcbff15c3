"""The sentiment experiment in small: killed in its midst, it goes on, and what theory asks of its points holds."""

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
    page = (results / "index.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "http://" not in page.replace("http://www.w3.org", "")
