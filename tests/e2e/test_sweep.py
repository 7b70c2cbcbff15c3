"""A sweep of another beta and two losses through DVC's queue: one reference cache, then `dpo-cli compare`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from tests.commands import run, stages_run, succeed

BETA = 0.05
LOSSES = ("sigmoid", "ipo")


@pytest.fixture(scope="module")
def project(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a small project with a first run, committed."""
    return Path(shutil.copytree(finished, tmp_path_factory.mktemp("sweep") / "project"))


def figures_of(*arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*arguments, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def sweep(project: Path) -> tuple[Path, str]:
    """The project after the sweep, and what DVC printed."""
    grid = ("-S", f"train.beta={BETA}", "-S", f"train.loss={','.join(LOSSES)}")
    succeed(project, "dvc", "exp", "run", "--queue", *grid)
    return project, succeed(project, "dvc", "exp", "run", "--run-all")


def test_every_run_of_the_sweep_trains_and_evaluates_and_nothing_else(sweep: tuple[Path, str]) -> None:
    _, printed = sweep
    assert stages_run(printed) == ["base", "train", "evaluate", "report"] * len(LOSSES)


def test_the_reference_was_computed_once(sweep: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All runs trained against the cache of the first one, which alone computed rows."""
    project, _ = sweep
    refs = run(project, "git", "for-each-ref", "--format=%(refname)", "refs/exps").stdout.split()
    experiments = [ref for ref in refs if ref.count("/") == 4]
    assert len(experiments) == len(LOSSES)
    first = (project / "reports/precompute_ref/metrics.json").read_text(encoding="utf-8")
    computed = json.loads(first)["precompute_ref"]
    assert computed["num_computed"] == computed["num_completions"] > 0
    for ref in experiments:
        assert run(project, "git", "show", f"{ref}:reports/precompute_ref/metrics.json").stdout == first
    monkeypatch.chdir(project)
    again = figures_of("precompute-ref")["precompute_ref"]
    assert (again["num_computed"], again["num_reused"]) == (0, computed["num_completions"])


def test_compare_prints_the_sweep_with_intervals(sweep: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    project, _ = sweep
    monkeypatch.chdir(project)
    figures = figures_of("compare", "--baseline", "HEAD")
    base, *others = figures["experiments"]
    assert base["name"] == "HEAD"
    found = {(other["params"]["train.beta"], other["params"]["train.loss"]) for other in others}
    assert found == {(BETA, loss) for loss in LOSSES}
    for other in others:
        for name in ("evaluate.margin", "evaluate.kl"):
            metric = other["metrics"][name]
            assert metric["low"] <= metric["difference"] <= metric["high"]
            assert metric["difference"] == pytest.approx(metric["value"] - base["metrics"][name]["value"], abs=1e-6)
            assert metric["num_left_out"] == 0
            assert metric["num_prompts"] > 2
    assert not any("no interval" in note or "dvc.lock" in note for note in figures["notes"])
    table = succeed(project, "dpo_cli", "compare")
    assert max(map(len, table.splitlines())) <= 80
    for other in others:
        assert other["name"] in table
    assert "paired 95% interval" in table
