"""A sweep of five betas and two losses through DVC's queue: one reference cache, then `dpo-cli compare`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.data import world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

BETAS = (0.05, 0.1, 0.5, 1.0, 5.0)
GRIDS = ((BETAS, ("sigmoid",)), (BETAS[:1], ("ipo",)))
RUNS = {(beta, loss) for betas, losses in GRIDS for beta in betas for loss in losses}
_SMALL = {
    "pretrain_steps: 1800": "pretrain_steps: 40",
    "epochs: 3.0": "epochs: 1.0",
    "max_steps: null": "max_steps: 3",
    "num_prompts: 0": "num_prompts: 8",
    "max_new_tokens: 48": "max_new_tokens: 8",
    "temperatures: [0.0, 0.25, 0.5, 0.75, 1.0]": "temperatures: []",
    "scales: [0.25, 0.5, 0.75, 1.5]": "scales: []",
}


def run(folder: Path, *command: str) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DVC_")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment |= {
        f"GIT_{role}_{key}": value
        for role in ("AUTHOR", "COMMITTER")
        for key, value in (("NAME", "test"), ("EMAIL", "test@example.org"))
    }
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def dpo(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dpo_cli", *arguments)


def dvc(folder: Path, *arguments: str) -> str:
    return run(folder, sys.executable, "-m", "dvc", *arguments)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small project with a first run, committed."""
    folder = tmp_path_factory.mktemp("sweep") / "project"
    dpo(folder.parent, "init", str(folder))
    params = folder / "params.yaml"
    text = params.read_text(encoding="utf-8")
    for before, after in _SMALL.items():
        assert before in text, before
        text = text.replace(before, after)
    params.write_text(text, encoding="utf-8")
    for name, rows in (
        ("instructions", world.instruction_rows(0, 100)),
        ("preferences", world.preference_rows(0, 100)),
    ):
        (folder / f"data/raw/{name}.json").write_text(json.dumps(rows), encoding="utf-8")
    dpo(folder, "repro")
    run(folder, "git", "add", "--all")
    run(folder, "git", "commit", "-qm", "first run")
    return folder


@pytest.fixture(scope="module")
def sweep(project: Path) -> tuple[Path, str]:
    """The project after the sweep, and what DVC printed."""
    for betas, losses in GRIDS:
        beta, loss = f"train.beta={','.join(map(str, betas))}", f"train.loss={','.join(losses)}"
        dvc(project, "exp", "run", "--queue", "-S", beta, "-S", loss)
    return project, dvc(project, "exp", "run", "--run-all")


def test_every_run_of_the_sweep_trains_and_evaluates_and_nothing_else(sweep: tuple[Path, str]) -> None:
    _, printed = sweep
    ran = [line.split("'")[1] for line in printed.splitlines() if line.startswith("Running stage")]
    assert ran == ["base", "train", "evaluate", "report"] * len(RUNS)


def test_the_reference_was_computed_once(sweep: tuple[Path, str]) -> None:
    """All runs trained against the cache of the first one, which alone computed rows."""
    project, _ = sweep
    refs = run(project, "git", "for-each-ref", "--format=%(refname)", "refs/exps").split()
    experiments = [ref for ref in refs if ref.count("/") == 4]
    assert len(experiments) == len(RUNS)
    first = (project / "reports/precompute_ref/metrics.json").read_text(encoding="utf-8")
    computed = json.loads(first)["precompute_ref"]
    assert computed["num_computed"] == computed["num_completions"] > 0
    for ref in experiments:
        assert run(project, "git", "show", f"{ref}:reports/precompute_ref/metrics.json") == first
    again = json.loads(dpo(project, "precompute-ref", "--json"))["precompute_ref"]
    assert (again["num_computed"], again["num_reused"]) == (0, computed["num_completions"])


def test_compare_prints_the_sweep_with_intervals(sweep: tuple[Path, str]) -> None:
    project, _ = sweep
    figures: dict[str, Any] = json.loads(dpo(project, "compare", "--baseline", "HEAD", "--json"))
    base, *others = figures["experiments"]
    assert base["name"] == "HEAD"
    found = {(other["params"]["train.beta"], other["params"]["train.loss"]) for other in others}
    assert found == RUNS
    for other in others:
        for name in ("evaluate.margin", "evaluate.kl"):
            metric = other["metrics"][name]
            assert metric["low"] <= metric["difference"] <= metric["high"]
            assert metric["difference"] == pytest.approx(metric["value"] - base["metrics"][name]["value"], abs=1e-6)
            assert metric["num_left_out"] == 0
            assert metric["num_prompts"] > 2
    assert not any("no interval" in note or "dvc.lock" in note for note in figures["notes"])
    table = dpo(project, "compare")
    assert max(map(len, table.splitlines())) <= 80
    for other in others:
        assert other["name"] in table
    assert "paired 95% interval" in table
