"""init --ask: questions whose answers are options, asked until they can be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from dpo_cli.cli import ask
from dpo_cli.cli.app import app
from dpo_cli.core.load_params import load_params


@pytest.fixture
def init(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Callable[..., Result]:
    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n', encoding="utf-8")
    Path("model").symlink_to(tiny_folder)

    def run(*options: str, answers: str = "", at_terminal: bool = True) -> Result:
        monkeypatch.setattr(ask, "is_terminal", lambda: at_terminal)
        return CliRunner().invoke(app, ["init", "new", "--ask", *options], input=answers)

    return run


def test_answers_are_options_and_what_cannot_be_read_is_asked_again(init: Callable[..., Result]) -> None:
    done = init(answers="none.json\n\npairs.jsonl\nmodel\n")
    assert done.exit_code == 0, done.output
    assert "none.json is missing" in done.stderr
    assert "pairs.jsonl: pairs: 1 of the first 1 rows" in done.stderr
    assert "dpo-cli init new --preferences pairs.jsonl --model model" in done.stderr
    params = load_params(Path("new/params.yaml"))
    assert (params.data.preferences.path, params.model.name) == ("data/raw/pairs.jsonl", "tiny-llama0")


def test_what_is_given_is_not_asked_and_enter_takes_the_embedded_world(init: Callable[..., Result]) -> None:
    done = init("--model", "model", answers="\n\n")
    assert done.exit_code == 0, done.output
    assert "--model (" not in done.stderr
    assert "dpo-cli -C new label ITEMS" in done.stderr
    assert Path("new/data/raw/preferences.json").is_file()


def test_nobody_is_asked_in_a_pipe(init: Callable[..., Result]) -> None:
    done = init(at_terminal=False)
    assert done.exit_code == 3
    assert "--ask needs a terminal to ask at; give --sft, --preferences and --model instead" in done.stderr
    assert not Path("new").exists()
