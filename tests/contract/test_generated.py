"""dvc.yaml, params.yaml, the embedded data and the documents are what the code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dpo_cli.core.params import load_params
from dpo_cli.core.pipeline import STAGES, Stage, dvc_yaml

ROOT = Path(__file__).resolve().parents[2]
GRAPH = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))


def test_generated_files_are_up_to_date() -> None:
    result = subprocess.run(
        [sys.executable, "tools/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout


def test_params_yaml_fits_the_schema() -> None:
    assert load_params(ROOT / "params.yaml").model.name == "embedded"


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_code_dependencies_are_the_modules_that_the_stage_imports(stage: Stage) -> None:
    code = (
        f"import sys, {stage.module}\n"
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] == 'dpo_cli'), sep='\\n')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    imported = {Path(line).relative_to(ROOT).as_posix() for line in result.stdout.split()}
    named = {dep for dep in GRAPH["stages"][stage.name]["deps"] if dep.endswith(".py")}
    only_docstrings = {path for path in imported - named if path.endswith("__init__.py")}
    assert imported - only_docstrings == named
    for path in only_docstrings:
        assert "import" not in (ROOT / path).read_text(encoding="utf-8")


def test_paths_and_sections_are_those_of_the_code() -> None:
    for name, entry in dvc_yaml()["stages"].items():
        written = GRAPH["stages"][name]
        assert written["cmd"] == entry["cmd"]
        assert written.get("params") == entry.get("params")
        assert written.get("outs") == entry.get("outs")
        assert written.get("metrics") == entry.get("metrics")
        assert [dep for dep in written["deps"] if not dep.startswith("dpo_cli/")] == entry.get("deps", [])
