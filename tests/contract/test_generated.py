"""dvc.yaml, params.yaml, the embedded data and the documents are what the code says."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo_cli.core.load_params import load_params
from dpo_cli.core.pipeline import STAGES, dvc_yaml
from tools.generate import main

ROOT = Path(__file__).resolve().parents[2]


def test_generated_files_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["generate.py", "--check"])
    assert main() == 0


def test_params_yaml_fits_the_schema() -> None:
    assert load_params(ROOT / "params.yaml").model.name == "embedded"


def test_dvc_keeps_every_run_in_its_cache() -> None:
    """DVC keeps no run of a stage that has an output which is neither cached nor metric nor plot (dvc#5749)."""
    uncached = {
        name
        for name, entry in dvc_yaml()["stages"].items()
        for out in entry.get("outs", [])
        if isinstance(out, dict) and not next(iter(out.values())).get("cache", True)
    }
    assert uncached == {"report"}, "which draws what is there in seconds"


def test_git_ignores_what_dvc_keeps() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert {f"/{path.as_posix()}" for stage in STAGES for path in stage.kept_by_dvc} <= set(ignored)
