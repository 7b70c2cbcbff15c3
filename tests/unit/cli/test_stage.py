"""A stage run by hand is what dvc.lock says, or says that it is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.cli.new_project import ProjectFiles, create_project
from dpo_cli.core.progress import SilentReporter
from dpo_cli.stages import convert_preferences as stage


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps(rows), encoding="utf-8")
    create_project(tmp_path / "new", ProjectFiles(preferences=pairs), SilentReporter())
    monkeypatch.chdir(tmp_path / "new")
    monkeypatch.delenv("DVC_STAGE", raising=False)
    return tmp_path / "new"


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["convert-preferences", *arguments])
    assert result.exit_code == 0, result.stderr
    return result.stderr


def locked(project: Path) -> dict[str, Any]:
    lock = project / "dvc.lock"
    return YAML(typ="safe").load(lock)["stages"]["convert_preferences"] if lock.is_file() else {}


def test_a_run_by_hand_is_recorded_and_so_is_the_next_one(project: Path) -> None:
    assert "convert-preferences: recorded in dvc.lock" in run()
    first = locked(project)
    assert {out["path"] for out in first["outs"]} >= {"data/preference", "reports/convert_preferences/metrics.json"}
    assert first["params"]["params.yaml"]["data"]["eval_fraction"] == 0.15
    params = project / "params.yaml"
    params.write_text(params.read_text(encoding="utf-8").replace("eval_fraction: 0.15", "eval_fraction: 0.3"), "utf-8")
    assert "recorded" in run("--set", "runtime.workers=1"), "runtime is in no stage of dvc.yaml"
    second = locked(project)
    assert second["params"]["params.yaml"]["data"]["eval_fraction"] == 0.3
    assert second["outs"] != first["outs"]
    assert (project / ".dvc/cache/runs").is_dir(), "so that a setting put back is no run repeated"


def test_what_params_yaml_does_not_say_is_not_recorded(project: Path) -> None:
    assert "not recorded in dvc.lock, since params.yaml does not say" in run("--set", "data.eval_fraction=0.3")
    assert locked(project) == {}


@pytest.mark.parametrize("changed", ["params.yaml", "data/raw/pairs.json"])
def test_inputs_that_change_during_the_run_are_not_recorded(
    changed: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole: Callable[..., Any] = stage.run

    def disturbed(*arguments: Any) -> Any:
        metrics = whole(*arguments)
        path = project / changed
        path.write_text(path.read_text(encoding="utf-8").replace("0.1", "0.2") + "\n", encoding="utf-8")
        return metrics

    monkeypatch.setattr(stage, "run", disturbed)
    assert "not recorded in dvc.lock, since its inputs changed while it ran" in run()
    assert locked(project) == {}


def test_a_run_that_dvc_cannot_record_says_why_and_is_done(project: Path) -> None:
    (project / "dvc.yaml").write_text("stages: {}\n", encoding="utf-8")
    assert "done, but not recorded in dvc.lock: " in run()
    assert (project / "data/preference/train.parquet").is_file()


@pytest.mark.parametrize("how", ["under DVC", "without DVC"])
def test_where_there_is_nothing_to_record_nothing_is_said(
    how: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "under DVC":
        monkeypatch.setenv("DVC_STAGE", "convert_preferences")
    else:
        (project / "dvc.yaml").unlink()
    assert "recorded" not in run()
