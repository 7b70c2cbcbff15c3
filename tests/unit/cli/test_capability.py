"""`dpo-cli capability`: a table for people, and one line for what is wrong before any model is loaded."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.cli.capability import print_table
from dpo_cli.core.artifacts import write_text
from dpo_cli.core.params_text import params_yaml
from dpo_cli.evaluation.capability import MODELS, TaskResult, metrics_of, pair_items, summarize_task
from dpo_cli.statistics.intervals import Sampling


def result_of(task: str, *scores: list[float], higher_is_better: bool = True) -> TaskResult:
    found = {model: dict(enumerate(values)) for model, values in zip(MODELS, scores, strict=True)}
    return summarize_task(pair_items(task, "acc", higher_is_better, found), Sampling(200, 0.95, 0))


GOOD, BAD = [1.0] * 20, [0.0] * 20


def test_the_table_says_in_words_what_got_worse() -> None:
    found = [
        result_of("sums", GOOD, GOOD, BAD),
        result_of("[bold]words", BAD, GOOD, GOOD),
        result_of("slips", BAD, BAD, BAD, higher_is_better=False),
    ]
    stream = io.StringIO()
    print_table(found, Console(width=140, file=stream))
    shown = " ".join(stream.getvalue().split())
    assert "DPO is worse than SFT on sums beyond doubt: acc 1.000 -> 0.000, on 20 items" in shown
    assert "[bold]words" in shown
    assert "(less is better)" in shown
    for words in ("-1.000", "[-1.000, -1.000]", "worse", "better", "not told apart", "95% intervals"):
        assert words in shown
    assert list(metrics_of(found)["capability"]["tasks"]) == ["sums", "[bold]words", "slips"]


def test_without_the_harness_it_says_how_to_install_it(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_text(project / "params.yaml", params_yaml({}))
    find: Any = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    result = CliRunner().invoke(app, ["capability", "tasks"])
    assert result.exit_code == 6
    assert "lm-evaluation-harness, which is not installed; run: pip install 'dpo-cli[lm-eval]'" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["none"], 4, "none is no folder"),
        (["empty"], 4, "empty has no YAML file"),
        (["empty", "--tasks", " , "], 3, "--tasks must name a task"),
    ],
)
def test_what_is_wrong_is_one_line(project: Path, arguments: list[str], code: int, words: str) -> None:
    write_text(project / "params.yaml", params_yaml({}))
    (project / "empty").mkdir()
    result = CliRunner().invoke(app, ["capability", *arguments])
    assert result.exit_code == code, result.output
    assert words in result.stderr


def test_a_limit_of_nothing_is_refused() -> None:
    assert CliRunner().invoke(app, ["capability", "tasks", "--limit", "0"]).exit_code == 2
