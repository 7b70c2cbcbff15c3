"""Votes: those of several raters on an item are one example, and each other one is left out by its name."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core.data_params import DataChecks, PreferenceSource, SftSource, Source
from dpo_cli.core.errors import ParamsError
from dpo_cli.data.account import Conversion
from dpo_cli.data.convert import convert
from dpo_cli.data.inspect import describe_row
from dpo_cli.data.plan import Treatment
from dpo_cli.data.reading.files import read_records

Convert = Callable[..., tuple[Conversion, list[dict[str, Any]], list[dict[str, Any]]]]


def vote(number: int, vote: Any, answers: Sequence[str] = ("x", "y"), prompt: str = "p", **more: Any) -> dict[str, Any]:
    turns = [[{"role": "assistant", "content": text}] for text in answers]
    asked = [{"role": "user", "content": prompt}]
    row = {"number": number, "item_id": prompt, "mode": "pair", "vote": vote, "drawn": "random", "seconds": 1.5}
    return row | {"prompt": asked, "completions": turns, "supersedes": None} | more


def undone(number: int, prompt: str = "p") -> dict[str, Any]:
    return {"number": number, "item_id": prompt, "mode": "pair", "vote": "undone", "supersedes": number - 1}


@pytest.fixture
def converted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Convert:
    """``converted(anna=[...])``: a folder with a file a rater, and a held-out row; the account, rows and rejects."""
    monkeypatch.chdir(tmp_path)

    def run(source: Source | None = None, torn: str = "", **raters: Sequence[dict[str, Any]]) -> Any:
        for name in ("votes", "work", "out"):
            Path(name).mkdir()
        for name, rows in raters.items():
            lines = [json.dumps({"rater": f"human:{name}", **row}) for row in rows]
            Path(f"votes/{name}.jsonl").write_text("\n".join([*lines, torn]), encoding="utf-8")
        treatment = Treatment(DataChecks().model_dump(), 0.5)
        source = source or PreferenceSource(path="votes", split="train")
        Path("held_out.json").write_text('[{"prompt": "h", "chosen": "x", "rejected": "y"}]', encoding="utf-8")
        sources = [source, type(source)(path="held_out.json", split="eval")]
        report = convert(sources, treatment, Path("work"), Path("out"), Path("rejects"))
        rejects = [json.loads(line) for line in Path("rejects").read_text("utf-8").splitlines()]
        return report, [record.value for record in read_records(Path("out/train.parquet"))], rejects

    return run


def texts(row: dict[str, Any], side: str) -> str:
    return "".join(turn["content"] for turn in row[side])


def test_the_majority_is_chosen_whatever_was_shown_first_and_its_votes_are_scores(converted: Convert) -> None:
    report, [row], rejects = converted(
        anna=[vote(0, "A", ("x", "y"))], ben=[vote(0, "B", ("y", "x"))], chloe=[vote(0, "A", ("y", "x"))]
    )
    assert (texts(row, "chosen"), texts(row, "rejected")) == ("x", "y")
    assert (row["chosen_score"], row["rejected_score"]) == (2.0, 1.0)
    assert [account.path.name for account in report.files[:-1]] == ["anna.jsonl", "ben.jsonl", "chloe.jsonl"]
    assert [(reject["file"], reject["reason"], reject["detail"]) for reject in rejects] == [
        (f"votes/{name}.jsonl", "counted_together", "is counted together with row 0 of votes/anna.jsonl")
        for name in ("ben", "chloe")
    ]
    assert report.checks["malformed"].count == 0


def test_every_vote_without_a_row_is_named(converted: Convert) -> None:
    report, rows, rejects = converted(
        anna=[
            vote(0, "B"),
            undone(1),  # takes the first one back
            vote(2, "A"),
            vote(3, "skip", prompt="q"),
            vote(4, "B", ("y", "x"), drawn="repeat"),
            vote(5, "both bad", prompt="r"),
            vote(6, "A", prompt="s"),
            vote(7, "both", prompt="t"),
            vote(8, "A", prompt="u"),
        ],
        ben=[vote(0, "tie"), vote(1, "B", prompt="s"), {**vote(2, "B", prompt="u"), "rater": "human:anna"}],
    )
    assert [(row["prompt"][0]["content"], texts(row, "chosen")) for row in rows] == [("p", "x"), ("u", "x")]
    assert [(row["chosen_score"], row["rejected_score"]) for row in rows] == [(1.0, 0.0)] * 2
    places = {reject["reason"]: (reject["file"][6:], reject["row"]) for reject in rejects}
    assert places == {
        "taken_back": ("anna.jsonl", 0),
        "undone": ("anna.jsonl", 1),
        "skipped": ("anna.jsonl", 3),
        "repeat": ("anna.jsonl", 4),
        "both_bad": ("anna.jsonl", 5),
        "tie": ("anna.jsonl", 6),
        "unknown_vote": ("anna.jsonl", 7),
        "counted_together": ("ben.jsonl", 1),
        "voted_twice": ("ben.jsonl", 2),
    }
    assert Counter(report.rejected) == Counter({**dict.fromkeys(places, 1), "counted_together": 2})
    assert report.num_read - 1 == len(rows) + len(rejects) == 12
    counts = {name: report.checks[name].count for name in ("malformed", "tie")}
    assert counts == {"malformed": 2, "tie": 2}, "what says nothing against a vote is no finding"


def test_rankings_have_the_order_of_the_mean_ranks(converted: Convert) -> None:
    shown = ("x", "y", "z")
    _, rows, _ = converted(
        anna=[vote(0, [1, 2, 3], shown, mode="ranking")],
        ben=[vote(0, [1, 3, 2], ("z", "x", "y"), mode="ranking")],  # x 3, y 2, z 1
        chloe=[vote(0, [1, 3, 2], shown, mode="ranking")],
    )
    [ranking] = [record.value for record in read_records(Path("out/train.ranking.parquet"))]
    # the sums are 5, 7 and 6
    assert [turns[0]["content"] for turns in ranking["completions"]] == ["x", "z", "y"]
    assert ranking["ranks"] == [1, 2, 3]
    assert [(texts(row, "chosen"), texts(row, "rejected")) for row in rows] == [("x", "z"), ("x", "y"), ("z", "y")]


def test_thumbs_are_single_answers_and_a_split_is_a_contradiction(converted: Convert) -> None:
    def thumb(number: int, said: str, text: str) -> dict[str, Any]:
        return vote(number, said, (text,), mode="thumbs")

    report, rows, rejects = converted(
        anna=[thumb(0, "up", "x"), thumb(1, "down", "y"), thumb(2, "up", "z")],
        ben=[thumb(0, "up", "x"), thumb(1, "down", "z")],
    )
    assert [(texts(row, "chosen"), texts(row, "rejected")) for row in rows] == [("x", ""), ("", "y")]
    assert [reject["row"] for reject in rejects if reject["reason"] == "contradiction"] == [2]
    assert report.checks["contradiction"].count == 1


def test_as_instructions_the_better_answers_are_learned_but_no_tie(converted: Convert) -> None:
    report, [row], _ = converted(
        SftSource(path="votes", split="train"), anna=[vote(0, "A"), vote(1, "tie", prompt="q")], ben=[vote(0, "tie")]
    )
    assert texts(row, "completion") == "x"
    assert report.rejected == {"tie": 1, "counted_together": 1}


def test_a_vote_is_shown_as_it_is_counted_and_as_the_file_has_it(converted: Convert) -> None:
    converted(anna=[vote(0, "A"), vote(1, "A", rater="human:ben")])
    first, second = (describe_row(PreferenceSource(path="votes"), row, None) for row in (0, 1))
    assert first["parts"][0]["answers"][0]["score"] == 2.0
    assert second["left_out"][0]["reason"] == "counted_together"
    assert second["raw"]["vote"] == "A"


def test_a_torn_last_line_is_no_vote_and_columns_have_no_effect(converted: Convert) -> None:
    report, [row], _ = converted(torn='{"number": 1, "item', anna=[vote(0, "A")])
    assert (report.num_read - 1, texts(row, "chosen")) == (1, "x")
    with pytest.raises(ParamsError, match="votes: columns has no effect on votes"):
        describe_row(PreferenceSource(path="votes", columns={"mode": "number"}), 0, None)


def test_an_adjudication_stands_in_place_of_the_votes_that_disagree(converted: Convert) -> None:
    decided = {"drawn": "adjudication"}
    _, rows, rejects = converted(
        anna=[vote(0, "A"), vote(1, "A", prompt="q"), vote(2, "B", **decided)],  # one of them decides
        ben=[vote(0, "A"), vote(1, "B", prompt="q"), vote(2, "tie", prompt="r")],
        chloe=[vote(0, "tie", prompt="q", **decided), vote(1, "A", prompt="q", **decided)],
    )
    assert [(texts(row, "chosen"), row["chosen_score"], row["rejected_score"]) for row in rows] == [("y", 1.0, 0.0)]
    assert Counter(reject["reason"] for reject in rejects) == {"counted_together": 4, "tie": 2, "voted_twice": 1}
    assert [reject["detail"] for reject in rejects if reject["reason"] == "voted_twice"] == [
        "is a second vote of an adjudicator on an item, after row 0 of votes/chloe.jsonl; take one out"
    ]
