"""Models as raters, through the commands: the project's reward model, a model in a folder, and one behind a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core import paths
from dpo_cli.judging.prepare import JUDGE_PATH
from tests.unit.judging.test_openai import FakeServer, serving


def dpo_cli(*words: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, [*words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def votes_in(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


def test_models_vote_and_one_that_was_trained_anew_is_another_rater(
    train_tiny: Callable[..., None], tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = {"reward.loss": "bradley_terry", "reward.learning_rate": 1e-3, "reward.max_steps": 2}
    train_tiny(tmp_path, {**training, "reward.batch_size": 8})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(JUDGE_PATH, str(tiny_folder))
    rows = [{"prompt": f"p{number}", "completions": ["a" * number, "b"]} for number in range(3, 15)]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("data/raw/short.txt").write_text("<{prompt}|{a}|{b}> A or B?", encoding="utf-8")
    label = ("label", "items.jsonl", "--judge")

    dpo_cli("reward")
    first = dpo_cli(*label, "reward-model")
    assert first["num_votes"] == first["num_items"] == 12
    assert dpo_cli(*label, "reward-model")["num_votes"] == 0, "the same one has voted on all"
    dpo_cli("reward", "--set", "reward.max_steps=4")
    anew = dpo_cli(*label, "reward-model")
    assert anew["num_votes"] == first["num_votes"]
    assert anew["file"] != first["file"]

    local = dpo_cli(*label, "hf", "--set", "evaluate.hf.name=tiny")
    with serving(FakeServer()) as url:
        settings = {"url": url, "template": "data/raw/short.txt"}
        overrides = [word for name, value in settings.items() for word in ("--set", f"evaluate.openai.{name}={value}")]
        served = dpo_cli(*label, "openai", *overrides)
    for row in votes_in(served["file"]):  # this server prefers the longer answer
        first_shown, other = (len(answer[0]["content"]) for answer in row["completions"])
        assert row["vote"] == ("A" if first_shown > other else "B")
    files = [each["file"] for each in (first, anew, local, served)]
    assert len({votes_in(file)[0]["rater"] for file in files}) == 4
    shown = [Path(file).name for file in files]
    assert shown[2:] == ["judge-tiny-dialogue.jsonl", "judge-judge-7b-short.txt.jsonl"]
    assert sorted(path.name for path in (paths.VOTES / "items").glob("judge-*.jsonl")) == sorted(shown)
