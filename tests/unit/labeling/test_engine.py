"""The engine: what is asked of whom and in which order; votes survive a kill, and mean the same however shown."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core.errors import DataError, MachineError, ParamsError
from dpo_cli.data.schema import assistant, user
from dpo_cli.judging.judge import Question
from dpo_cli.judging.votes import VotesJudge, read_rows, read_shown, read_votes
from dpo_cli.labeling.engine import FEWEST_BETWEEN, BadVote, Engine
from dpo_cli.labeling.items import Account, Item, ItemStore, Mode, read_items
from dpo_cli.labeling.settings import Settings, settle
from dpo_cli.statistics.agreement import LOSS, TIE, WIN
from dpo_cli.statistics.intervals import Sampling
from dpo_cli.statistics.raters import rater_quality

ANNA, BEN, CHLOE = "human:anna", "human:ben", "human:chloe"


def write_items(folder: Path, num: int, answers: int = 2, scores: Callable[[int], list[float]] | None = None) -> Path:
    """Prompts whose answers are better the higher their letter."""
    rows = [
        {
            "prompt": f"prompt {row}",
            "completions": [f"{'abcdefghi'[place]} {row}" for place in range(answers)],
            **({"scores": scores(row)} if scores else {}),
        }
        for row in range(num)
    ]
    path = folder / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def store(path: Path, mode: Mode = "pair", pairs: int = 1) -> ItemStore:
    return ItemStore(read_items(path, mode, pairs, 0, Account()), path.parent / "votes")


class Desk:
    """An engine with raters, who prefer the answer with the higher letter."""

    def __init__(self, path: Path, *raters: str, mode: Mode = "pair", pairs: int = 1, **settings: Any) -> None:
        self.engine = Engine(
            store(path, mode, pairs), Settings(mode=mode, pairs=pairs, **settings), path.parent / "votes"
        )
        for rater in raters:
            self.engine.join(rater)
        self.shown: list[Item] = []

    def step(self, rater: str, choose: Callable[[list[str]], Any] | None = None) -> str | None:
        """Answer the next question; what was shown, or None at the end."""
        asked = self.engine.ask(rater)
        if asked is None:
            return None
        item = self.engine.items[asked.index]
        self.shown.append(item)
        texts = [item.texts[place] for place in asked.order]
        vote = choose(texts) if choose else ("A" if texts[0] > texts[1] else "B")
        self.engine.vote(rater, asked.number, f"{rater} {asked.number}", vote, seconds=1.0)
        return item.id

    def run(self, rater: str, most: int = 10**9, choose: Callable[[list[str]], Any] | None = None) -> list[str]:
        found = []
        while len(found) < most and (id := self.step(rater, choose)) is not None:
            found.append(id)
        return found


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "votes" / f"{name}.jsonl").read_text("utf-8").splitlines()]


# --- what a vote means --------------------------------------------------------------------------


def test_votes_mean_the_same_whatever_was_shown_first_and_agreement_reads_them(tmp_path: Path) -> None:
    path = write_items(tmp_path, 60)
    desk = Desk(path, ANNA, BEN, overlap=2, repeats=0)
    desk.run(ANNA)
    desk.run(BEN)
    votes = read_votes(tmp_path / "votes/anna.jsonl", tmp_path / "votes/ben.jsonl")
    assert len(votes) == 120
    assert {vote.result for vote in votes} == {LOSS}  # the second in the alphabet is better
    first = Counter(row["vote"] for row in lines(tmp_path, "anna"))
    assert 15 < first["A"] < 45  # half of the better ones stood left
    orders = [{row["item_id"]: row["completions"] for row in lines(tmp_path, name)} for name in ("anna", "ben")]
    assert 15 < sum(orders[0][id] != orders[1][id] for id in orders[0]) < 45  # each rater has an order of his own


def test_a_ranking_is_votes_on_all_its_pairs_with_ties(tmp_path: Path) -> None:
    path = write_items(tmp_path, 3, answers=4)
    desk = Desk(path, ANNA, mode="ranking")
    ranks = {"a": 3, "b": 2, "c": 2, "d": 1}
    desk.run(ANNA, choose=lambda texts: [ranks[text[0]] for text in texts])
    votes = read_votes(tmp_path / "votes/anna.jsonl")
    assert Counter(vote.result for vote in votes) == {LOSS: 15, TIE: 3}
    assert {vote.item for vote in votes} == set(store(path, pairs=6).ids)  # the same ids as pairs that are shown alone


def test_evaluated_answers_keep_their_models_in_the_file_alone(tmp_path: Path) -> None:
    rows = [{"id": "x", "prompt": [{"role": "user", "content": "q"}], "sft": {"text": "no"}, "dpo": {"text": "yes"}}]
    path = tmp_path / "samples.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    desk = Desk(path, ANNA)
    desk.run(ANNA)
    [vote] = read_votes(tmp_path / "votes/anna.jsonl")
    assert (vote.prompt, vote.method, vote.baseline, vote.result) == ("x", "dpo", "sft", WIN)
    [(_, judgment)] = VotesJudge([vote], "share", "dpo", "sft").judge([Question("q", "no", "yes")])
    assert judgment.verdict == "B"  # it decides an evaluation


def test_thumbs_are_votes_for_up_and_a_rater_is_compared_with_himself(tmp_path: Path) -> None:
    desk = Desk(write_items(tmp_path, 40), ANNA, mode="thumbs", repeats=0.2)
    desk.run(ANNA, choose=lambda texts: "up" if texts[0] > "b" else "down")
    votes = read_votes(tmp_path / "votes/anna.jsonl")
    assert (len(votes), sum(vote.result == WIN for vote in votes)) == (80, 40)
    [found] = rater_quality(read_shown(tmp_path / "votes/anna.jsonl"), Sampling(200, 0.95, 0))
    assert found.num_repeats > 5
    assert found.consistency is not None
    assert (found.consistency.value, found.position_bias) == (1, None)


# --- order --------------------------------------------------------------------------------------


def test_the_same_order_tomorrow_and_every_item_once(tmp_path: Path) -> None:
    path = write_items(tmp_path, 50)
    desk = Desk(path, ANNA, repeats=0)
    first = desk.run(ANNA, 20)
    desk.engine.__exit__()
    again = Desk(path, ANNA, repeats=0)
    asked = again.engine.ask(ANNA)
    assert asked == again.engine.ask(ANNA)  # the same until it is answered
    rest = again.run(ANNA)
    assert len({*first, *rest}) == 50 == len(first) + len(rest)


def test_items_come_again_flipped_and_not_too_soon(tmp_path: Path) -> None:
    desk = Desk(write_items(tmp_path, 300), ANNA, repeats=0.1)
    desk.run(ANNA)
    rows = lines(tmp_path, "anna")
    again = [row for row in rows if row["drawn"] == "repeat"]
    assert 15 < len(again) < 55
    assert len({row["item_id"] for row in again}) == len(again)
    before = {row["item_id"]: row for row in rows if row["drawn"] != "repeat"}
    for row in again:
        assert row["completions"] == before[row["item_id"]]["completions"][::-1]
        assert row["number"] - before[row["item_id"]]["number"] > FEWEST_BETWEEN
    assert len(read_votes(tmp_path / "votes/anna.jsonl")) == 300


def test_uncertain_items_come_first_mixed_with_random_ones(tmp_path: Path) -> None:
    desk = Desk(write_items(tmp_path, 400, scores=lambda row: [0.0, row / 100]), ANNA, repeats=0)
    desk.run(ANNA, 100)
    rows = lines(tmp_path, "anna")
    margins = {"random": [], "uncertain": []}
    for row, item in zip(rows, desk.shown, strict=True):
        margins[row["drawn"]].append(item.margin)
    assert max(margins["uncertain"]) < 1.5 < max(margins["random"])
    assert 40 <= len(margins["random"]) <= 60
    assert abs(sum(margins["random"]) / len(margins["random"]) - 2) < 0.5


def test_no_prompt_is_asked_twice_before_another_once(tmp_path: Path) -> None:
    desk = Desk(write_items(tmp_path, 30, answers=3), ANNA, pairs=2, repeats=0)
    desk.run(ANNA)
    prompts = [item.prompt_id for item in desk.shown]
    assert len(prompts) == 60
    assert len(set(prompts[:30])) == 30


def test_overlap_says_how_many_are_asked_and_one_more_where_they_disagree(tmp_path: Path) -> None:
    desk = Desk(write_items(tmp_path, 20), ANNA, BEN, CHLOE, overlap=2, repeats=0)
    for turn in range(20):
        desk.step(ANNA)
        desk.step(BEN, None if turn % 2 else lambda texts: "B" if texts[0] > texts[1] else "A")
    third = desk.run(CHLOE)
    assert len(third) == 10
    first = {row["item_id"]: row["vote"] for row in lines(tmp_path, "anna")}
    assert all(id in first for id in third)
    desk.engine.__exit__()
    later = Desk(write_items(tmp_path, 20), "human:dan", overlap=2, repeats=0).engine
    assert later.count_absent() == [ANNA, BEN, CHLOE]
    assert later.ask("human:dan") is None  # two are done with each, and the third has settled the rest


def test_two_raters_are_not_shown_one_item_that_is_wanted_once(tmp_path: Path) -> None:
    desk = Desk(write_items(tmp_path, 21), ANNA, BEN, repeats=0)
    asked = [desk.engine.ask(rater) for rater in (ANNA, BEN)]
    assert asked[0] is not None
    assert asked[1] is not None
    assert asked[0].index != asked[1].index
    found = desk.run(ANNA)  # what ben looks at and does not answer is asked of her in the end
    assert len(found) == 21


# --- undo, twice, torn ---------------------------------------------------------------------------


def test_undo_takes_votes_back_one_by_one_and_asks_them_again(tmp_path: Path) -> None:
    path = write_items(tmp_path, 10)
    desk = Desk(path, ANNA, repeats=0)
    first, second = desk.run(ANNA, 2)
    assert desk.engine.undo(ANNA, 2, "u1")
    assert desk.engine.undo(ANNA, 2, "u1")  # sent twice
    assert desk.engine.progress(ANNA).done == 1
    desk.engine.__exit__()
    again = Desk(path, ANNA, repeats=0)  # after a restart the same question waits
    assert again.step(ANNA, lambda _: "tie") == second
    assert again.engine.undo(ANNA, 4, "u2")
    assert again.engine.undo(ANNA, 5, "u3")
    assert not list(read_rows(tmp_path / "votes/anna.jsonl"))
    assert again.step(ANNA) == first
    assert again.engine.undo(ANNA, 7, "u4")
    assert not again.engine.undo(ANNA, 8, "u5")  # there is none left
    again.run(ANNA)
    assert len(read_votes(tmp_path / "votes/anna.jsonl")) == 10


def test_a_vote_that_is_sent_twice_counts_once_and_a_late_one_not_at_all(tmp_path: Path) -> None:
    desk = Desk(write_items(tmp_path, 10), ANNA)
    desk.engine.vote(ANNA, 0, "key", "A")
    desk.engine.vote(ANNA, 0, "key", "A")
    with pytest.raises(BadVote) as caught:
        desk.engine.vote(ANNA, 0, "another window", "B")
    assert caught.value.is_late
    for vote, extra in (("C", {}), ("up", {}), ([1, 2], {}), ("tie", {"strength": 2}), ("A", {"strength": 4})):
        with pytest.raises(BadVote):
            desk.engine.vote(ANNA, 1, "next", vote, **extra)
    assert [row["vote"] for row in lines(tmp_path, "anna")] == ["A"]


def test_a_torn_last_line_is_set_aside_and_nothing_else_is_lost(tmp_path: Path) -> None:
    path = write_items(tmp_path, 10)
    desk = Desk(path, ANNA)
    desk.run(ANNA, 3)
    desk.engine.__exit__()
    file = tmp_path / "votes/anna.jsonl"
    whole = file.read_bytes()
    cut = len(whole) - 40
    file.write_bytes(whole[:cut])
    assert len(read_votes(file)) == 2  # read while it is torn
    with Engine(store(path), Settings(), tmp_path / "votes") as engine:
        assert engine.join(ANNA).num_torn == len(whole[:cut].splitlines()[-1])
        assert engine.progress(ANNA).done == 2
        engine.vote(ANNA, 2, "again", "tie")
    assert (tmp_path / "votes/anna.jsonl.torn").read_bytes().strip() == whole[:cut].splitlines()[-1]
    file.write_bytes(file.read_bytes().rstrip(b"\n"))  # whole, but for its line end
    with Engine(store(path), Settings(), tmp_path / "votes") as engine:
        assert engine.join(ANNA).num_torn == 0
        assert engine.progress(ANNA).done == 3
    file.write_bytes(b"{}\n" + file.read_bytes())
    with (
        Engine(store(path), Settings(), tmp_path / "votes") as engine,
        pytest.raises(DataError, match="line 1: not vote 0"),
    ):
        engine.join(ANNA)


def test_who_always_picks_left_is_said_to_be_biased(tmp_path: Path) -> None:
    desk = Desk(write_items(tmp_path, 60), ANNA, BEN, overlap=2)
    desk.run(ANNA, choose=lambda _: "A")
    desk.run(BEN)
    files = [str(tmp_path / f"votes/{name}.jsonl") for name in ("anna", "ben")]
    shown = CliRunner().invoke(app, ["agreement", *files], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert shown.output.count("biased") == 1
    [left, good] = json.loads(CliRunner().invoke(app, ["agreement", *files, "--json"]).stdout)["raters"]
    assert left["position_bias"]["low"] > 0.8 > 0 > good["position_bias"]["low"]
    assert (left["consistency"]["value"], good["consistency"]["value"]) == (0, 1)


def test_ten_percent_of_noise_are_found_within_the_interval_in_most_draws(tmp_path: Path) -> None:
    inside = []
    for seed in range(5):
        folder = tmp_path / str(seed)
        folder.mkdir()
        desk, draw = Desk(write_items(folder, 300), ANNA, repeats=0.5), random.Random(seed)
        desk.run(ANNA, choose=lambda texts, draw=draw: "AB"[(texts[0] > texts[1]) == (draw.random() < 0.1)])
        [found] = rater_quality(read_shown(folder / "votes/anna.jsonl"), Sampling(200, 0.95, seed))
        assert found.noise is not None
        assert 0 < found.noise.low < found.noise.high < 0.2
        inside.append(found.noise.low <= 0.1 <= found.noise.high)
    assert sum(inside) >= 4


def test_one_writer_a_file(tmp_path: Path) -> None:
    path = write_items(tmp_path, 3)
    first = Desk(path, ANNA)
    with pytest.raises(MachineError, match=r"anna\.jsonl: another dpo-cli writes human:anna's votes"):
        Desk(path, ANNA)
    first.engine.__exit__()
    Desk(path, ANNA)


# --- items and settings ----------------------------------------------------------------------------


def test_identical_answers_are_merged_and_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completions": ["a", "b", "a"], "counts": [2, 1, 4], "scores": [1.0, 0.0, 1.0]},
        {"prompt": "q", "completions": ["a", "a"]},
        {"prompt": "p", "completions": ["b", "a"]},
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    account = Account()
    [item] = read_items(path, "pair", 9, 0, account)
    assert (item.texts, item.counts, item.margin) == (["a", "b"], [6, 1], 1.0)
    assert (account.num_rows, account.num_items, account.num_merged) == (3, 1, 2)
    assert account.left_out == {"prompts with fewer than two different answers": 1, "the same answers again": 1}
    assert len(list(read_items(path, "thumbs", 1, 0, Account()))) == 3


def test_what_sample_writes_is_read(tmp_path: Path) -> None:
    from dpo_cli.evaluation.sampling import SCHEMA

    row = {
        "prompt": [user("p")],
        "completions": [assistant("a"), assistant("b")],
        "scores": [1.0, 0.5],
        "counts": [3, 1],
        "token_ids": [[1], [2]],
    }
    rows = [row, {**row, "prompt": [user("q")], "scores": None}]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), tmp_path / "samples.parquet")
    scored, plain = read_items(tmp_path / "samples.parquet", "pair", 1, 0, Account())
    assert (scored.texts, scored.counts, scored.margin) == (["a", "b"], [3, 1], 0.5)
    assert (plain.texts, plain.margin == plain.margin) == (["a", "b"], False)


def test_settings_are_those_of_the_first_day(tmp_path: Path) -> None:
    assert settle(tmp_path, {"overlap": 2, "seed": None}).overlap == 2
    assert settle(tmp_path, {}).overlap == 2
    assert settle(tmp_path, {"mode": "thumbs"}) == Settings("thumbs", overlap=2), "nobody has voted"
    (tmp_path / "anna.jsonl").write_text("{}\n", encoding="utf-8")
    with pytest.raises(ParamsError, match=r"--overlap 3: the votes in .* were begun with 2; .* --out"):
        settle(tmp_path, {"overlap": 3})
    with pytest.raises(ParamsError, match="--pairs has no effect on mode thumbs"):
        settle(tmp_path / "other", {"mode": "thumbs", "pairs": 2})


def test_a_question_reads_one_item_however_many_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(write_items(tmp_path, 5000), ANNA, overlap=2)
    looked: Counter[str] = Counter()
    is_open, read = Engine._is_open, ItemStore.__getitem__
    monkeypatch.setattr(Engine, "_is_open", lambda *a: (looked.update(["open"]), is_open(*a))[1])
    monkeypatch.setattr(ItemStore, "__getitem__", lambda *a: (looked.update(["read"]), read(*a))[1])
    for number in range(200):
        asked = desk.engine.ask(ANNA)
        assert asked is not None
        desk.engine.vote(ANNA, asked.number, f"{number}", "A")
        desk.engine.progress(ANNA)
    assert looked["read"] == 200
    assert looked["open"] <= 600
