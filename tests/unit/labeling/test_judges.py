"""Judges as raters: votes by a known reward and by rules of one's own, beside people's, through the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dpo_cli.cli.app import app
from dpo_cli.judging.votes import read_votes
from dpo_cli.statistics.agreement import LOSS, WIN

SHORTER = "def reward(prompt, answer):\n    return -len(answer)\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"p{row}", "completions": ["a" * row, "b", "cc"]} for row in range(3, 23)]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("shorter.py").write_text(SHORTER, encoding="utf-8")
    Path("longer.py").write_text(SHORTER.replace("-", ""), encoding="utf-8")
    return tmp_path


def label(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["label", "items.jsonl", *arguments])


def rows_of(name: str) -> list[dict[str, Any]]:
    [path] = Path("data/votes/items").glob(f"judge-rule-{name}-*.jsonl")
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_a_rule_votes_on_every_item_once_and_goes_on_where_it_stopped(folder: Path) -> None:
    first = label("--judge", "rule:shorter.py", "--pairs", "3", "--max", "10", "--json")
    assert first.exit_code == 0, first.output
    assert json.loads(first.stdout)["num_votes"] == 10
    again = label("--judge", "rule:shorter.py")
    assert again.exit_code == 0, again.output
    rows = rows_of("shorter")
    assert len({row["item_id"] for row in rows}) == 60 == len(rows)
    assert {(row["by"], row["rater"][:13]) for row in rows} == {("judge", "rule-shorter-")}
    for row in rows:
        lengths = [len(answer[0]["content"]) for answer in row["completions"]]
        assert row["vote"] == ("A" if lengths[0] < lengths[1] else "B")
    assert label("--judge", "rule:longer.py").exit_code == 0
    files = sorted(Path("data/votes/items").glob("*.jsonl"))
    longer, shorter = map(read_votes, files)
    assert {vote.item: vote.result for vote in shorter} == {vote.item: WIN + LOSS - vote.result for vote in longer}
    table = CliRunner().invoke(app, ["agreement", *map(str, files), "--json"])
    [found] = json.loads(table.stdout)["methods"]
    pair = next(each for each in found["pairs"] if each["first"] != each["second"])
    assert pair["agreement"]["value"] == 0


def test_a_reward_ranks_and_gives_thumbs(folder: Path) -> None:
    assert label("--judge", "rule:shorter.py", "--mode", "ranking").exit_code == 0
    row = rows_of("shorter")[0]
    by_text = {answer[0]["content"]: rank for answer, rank in zip(row["completions"], row["vote"], strict=True)}
    assert (by_text["b"], by_text["cc"]) == (1, 2)
    out = ["--out", "thumbs"]
    assert label("--judge", "rule:longer.py", "--mode", "thumbs", *out).exit_code == 0
    [path] = Path("thumbs").glob("*.jsonl")
    assert {json.loads(line)["vote"] for line in path.read_text("utf-8").splitlines()} == {"up"}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--judge", "nobody"], 3, "--judge must be one of world, reward-model, hf, openai, rule:FILE.py, got nobody"),
        (["--judge", "rule:none.py"], 4, "none.py is missing; name a Python file with a function reward"),
        (["--judge", "rule:broken.py"], 4, "broken.py does not run: SyntaxError"),
        (["--judge", "rule:empty.py"], 4, "empty.py has no function reward(prompt, answer)"),
        (["--judge", "rule:fails.py"], 4, "fails.py: reward fails on an answer: ValueError"),
        (["--judge", "world"], 4, "is not of the embedded world"),
        (["--judge", "world", "--set", "evaluate.seed=1"], 3, "--set has no effect with --judge world"),
        (["--judge", "rule:shorter.py", "--mode", "stars"], 3, "--mode must be pair, ranking or thumbs, got stars"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(folder: Path, arguments: list[str], code: int, words: str) -> None:
    for name, text in {"broken": "def", "empty": "", "fails": SHORTER.replace("-len(answer)", "'x'")}.items():
        Path(f"{name}.py").write_text(text, encoding="utf-8")
    found = label(*arguments)
    assert found.exit_code == code, found.output
    [line] = [line for line in found.stderr.splitlines() if line.startswith("dpo-cli: error: ")]
    assert words in line
