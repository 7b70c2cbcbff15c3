"""``dpo-cli doctor``: a line a finding, JSON, and an exit code by the gravest fault."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core.checkup import Finding
from dpo_cli.core.errors import DataError
from dpo_cli.core.params import Params
from dpo_cli.data.plan import refuse_missing
from dpo_cli.models import doctor

FOUND = [
    Finding("system", "plain", "Linux"),
    Finding("memory", "warn", "1.5 GiB free", "close other programs"),
    Finding("settings", "bad", "params.yaml: train.beta is wrong", "set it to 0.1", 3),
    Finding("packages", "bad", "bitsandbytes is missing", "run: pip install bitsandbytes"),
]


def run(monkeypatch: pytest.MonkeyPatch, findings: list[Finding], *arguments: str) -> Any:
    def examine(_: Any) -> Iterator[Finding]:
        yield from findings

    monkeypatch.setattr(doctor, "examine", examine)
    return CliRunner().invoke(app, ["doctor", *arguments])


def test_faults_are_lines_with_their_remedy_and_the_gravest_is_the_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, FOUND)
    assert result.exit_code == 6
    lines = result.stdout.splitlines()
    assert lines[2] == "FAULT   settings  params.yaml: train.beta is wrong; set it to 0.1"
    assert lines[3] == "FAULT   packages  bitsandbytes is missing; run: pip install bitsandbytes"
    assert lines[-1] == "2 faults, 1 warning"
    assert run(monkeypatch, FOUND[:3]).exit_code == 3


def test_warnings_are_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, FOUND[:2])
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (0, "1 warning")
    assert run(monkeypatch, FOUND[:1]).stdout.splitlines()[-1] == "all well"


def test_json_holds_every_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(monkeypatch, FOUND, "--json")
    found = json.loads(result.stdout)
    assert result.exit_code == found["exit_code"] == 6
    assert found["doctor"][1] == {
        "name": "memory", "status": "warn", "found": "1.5 GiB free", "remedy": "close other programs",
    }  # fmt: skip


def test_outside_of_a_project_the_machine_alone_is_looked_at(project: Path) -> None:
    found = {finding.name: finding for finding in doctor.examine(lambda _: None)}
    assert not [finding for finding in found.values() if finding.status == "bad"]
    assert {"system", "packages", "memory", "disk", "clock", "git", "gpu", "4-bit", "dvc"} <= set(found)
    assert "is no project folder" in found["offline"].found
    assert list(project.iterdir()) == []


def test_data_that_is_missing_is_named_at_once(project: Path) -> None:
    with pytest.raises(DataError) as caught:
        refuse_missing(Params().data)
    assert [problem.partition(";")[0] for problem in caught.value.problems] == [
        "data/raw/instructions.json is missing",
        "data/raw/preferences.json is missing",
    ]
