"""Adjudication: asked is what people disagree on and nothing else, blind, and that vote stands in place of theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from dpo_cli.cli.app import app
from dpo_cli.judging.judge import Question
from dpo_cli.judging.votes import VotesJudge, read_votes
from dpo_cli.labeling.engine import Engine
from dpo_cli.labeling.items import Account, ItemStore, read_items
from dpo_cli.labeling.settings import Settings, settle
from dpo_cli.labeling.state import state_of

ANNA, BEN, CHLOE = "human:anna", "human:ben", "human:chloe"
NUM, NUM_CONTESTED = 12, 4
Choose = Callable[[int, list[str]], str]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two who agree that the answers called good are the better ones, but for the first four prompts."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"prompt {row}", "completions": [f"good {row}", f"bad {row}"]} for row in range(NUM)]
    Path("items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settle(Path("votes"), {"overlap": 2, "repeats": 0.0})
    vote(ANNA, good)
    vote(BEN, lambda number, texts: bad(number, texts) if number < NUM_CONTESTED else good(number, texts))
    return tmp_path


def good(number: int, texts: list[str]) -> str:
    return "AB"[texts[1].startswith("good")]


def bad(number: int, texts: list[str]) -> str:
    return "AB"[texts[0].startswith("good")]


def opened(rater: str, *, adjudicates: bool) -> Engine:
    store = ItemStore(read_items(Path("items.jsonl"), "pair", 1, 0, Account()), Path("votes"))
    engine = Engine(store, Settings(overlap=2, repeats=0), Path("votes"), adjudicates=adjudicates)
    engine.join(rater)
    engine.count_absent()
    return engine


def vote(rater: str, choose: Choose, most: int = NUM, *, adjudicates: bool = False) -> list[int]:
    """Vote on what is asked; of which prompts that was."""
    asked = []
    with opened(rater, adjudicates=adjudicates) as engine:
        while len(asked) < most and (question := engine.ask(rater)) is not None:
            item = engine.items[question.index]
            number = int(item.prompt[0]["content"].split()[1])
            said = choose(number, [item.texts[place] for place in question.order])
            engine.vote(rater, question.number, f"{question.number}", said, seconds=1.0)
            asked.append(number)
    return asked


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"votes/{name}.jsonl").read_text("utf-8").splitlines()]


def test_one_more_votes_on_exactly_what_people_disagree_on(folder: Path) -> None:
    first = vote(CHLOE, good, 2, adjudicates=True)
    with opened(CHLOE, adjudicates=True) as engine:  # on another day
        assert (engine.progress(CHLOE).done, engine.progress(CHLOE).left) == (2, 2)
        assert engine.undo(CHLOE, 2, "u")
        assert (engine.progress(CHLOE).done, engine.progress(CHLOE).left) == (1, 3)
    rest = vote(CHLOE, good, adjudicates=True)
    assert rest[0] == first[1]  # what was taken back
    assert sorted({*first, *rest}) == list(range(NUM_CONTESTED))
    assert {row["drawn"] for row in lines("chloe") if row["vote"] != "undone"} == {"adjudication"}
    assert vote("human:dan", good, adjudicates=True) == []  # each is settled by one vote
    assert vote("human:dan", good) == []  # and asked of nobody as an ordinary item


def test_one_of_those_who_disagree_sees_the_items_anew_and_is_told_nothing(folder: Path) -> None:
    before = {row["item_id"]: row["completions"] for row in lines("anna")}
    with opened("human:eve", adjudicates=False) as engine:
        plain = state_of(engine, "human:eve")
    with opened(ANNA, adjudicates=True) as engine:
        told = state_of(engine, ANNA)
    assert set(told) == set(plain)
    assert set(told["question"]) == {"prompt", "answers"}
    assert not any(word in json.dumps(told).lower() for word in ("adjudic", "anna", "ben", "human", "overlap"))
    vote(ANNA, bad, adjudicates=True)
    again = [row for row in lines("anna") if row["drawn"] == "adjudication"]
    assert len(again) == NUM_CONTESTED
    assert all(row["completions"] == before[row["item_id"]][::-1] for row in again)


def test_a_skipped_one_waits_for_somebody_else(folder: Path) -> None:
    assert len(vote(CHLOE, lambda *_: "skip", adjudicates=True)) == NUM_CONTESTED
    assert vote(CHLOE, good, adjudicates=True) == []
    assert len(vote("human:dan", good, adjudicates=True)) == NUM_CONTESTED


def test_it_decides_the_item_and_is_no_third_rater_in_agreement(folder: Path) -> None:
    raters = ["votes/anna.jsonl", "votes/ben.jsonl"]
    before = agreement(*raters)["methods"][0]
    vote(CHLOE, bad, adjudicates=True)
    found = agreement(*raters, "votes/chloe.jsonl")
    [after] = found["methods"]
    rate = after.pop("adjudicated")
    assert before.pop("adjudicated") is None
    assert after == before  # alpha, win rates and all
    assert (rate["num_votes"], rate["value"]) == (NUM_CONTESTED, 1)  # bad stands first in the alphabet
    assert [each["rater"] for each in found["raters"]] == [ANNA, BEN, "human:chloe, adjudicating"]
    table = CliRunner().invoke(app, ["agreement", *raters, "votes/chloe.jsonl"], env={"COLUMNS": "200"}).output
    assert "N adjudications" in table
    votes = read_votes(*map(Path, [*raters, "votes/chloe.jsonl"]))
    judge = VotesJudge(votes, "share", "first", "second")
    questions = [Question(f"prompt {row}", f"bad {row}", f"good {row}") for row in range(NUM)]
    assert [judgment.verdict for _, judgment in judge.judge(questions)] == ["A"] * 4 + ["B"] * 8


def agreement(*files: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["agreement", *files, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def label(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["label", "items.jsonl", *arguments])


def test_wrong_use_is_said_in_one_line(folder: Path) -> None:
    alone = ["--out", "alone"]
    assert label(*alone, "--judge", f"rule:{_rule()}").exit_code == 0
    for arguments, words in (
        (["--adjudicate"], "data/votes/items is missing: there are no votes to adjudicate"),
        (["--adjudicate", *alone], "nothing to adjudicate: no item has votes of two people"),
        (["--adjudicate", "--judge", "world"], "--adjudicate has no effect where a judge votes"),
        (["--adjudicate", "--rater", "anna", "--rater", "ben"], "--adjudicate is for one rater, got 2"),
        (["--terminal", "--rater", "anna", "--rater", "ben"], "--terminal is for one rater, got 2"),
        (["--terminal", "--judge", "world"], "--terminal has no effect where a judge votes"),
        (["--terminal", "--port", "0"], "--port has no effect with --terminal"),
        (["--terminal"], "--terminal needs a terminal"),
    ):
        result = label(*arguments)
        assert result.exit_code != 0, arguments
        [error] = [line for line in result.stderr.splitlines() if line.startswith("dpo-cli: error: ")]
        assert words in error
        assert "Traceback" not in result.stderr
    Path("votes/ben.jsonl").unlink()
    vote(BEN, good)
    result = label("--adjudicate", "--out", "votes", "--rater", "chloe")
    assert f"people agree on all {NUM} items that two of them voted on" in result.stderr


def _rule() -> str:
    Path("rule.py").write_text("def reward(prompt, answer):\n    return len(answer)\n", encoding="utf-8")
    return "rule.py"
