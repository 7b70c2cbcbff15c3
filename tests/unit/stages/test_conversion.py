"""What the conversion stages publish, print and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import Params
from dpo_cli.data import world
from dpo_cli.stages import convert_preferences, convert_sft


def params(**data: Any) -> Params:
    return parse_params({"data": {"eval_fraction": 0.3, **data}})


def write_raw(name: str, rows: list[Any]) -> Path:
    path = Path("data/raw") / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def pairs(number: int, chosen: str = "yes") -> list[dict[str, Any]]:
    return [{"prompt": f"question {index}", "chosen": chosen, "rejected": "no"} for index in range(number)]


def test_a_stage_publishes_tables_metrics_checks_and_rejects(project: Path, reporter: Any) -> None:
    raw = write_raw("sft.json", world.instruction_rows(0, 600))
    metrics = convert_sft.run(params(sft={"path": "data/raw/sft.json"}), reporter)
    assert metrics["num_read"] == 600 == metrics["num_train"] + metrics["num_eval"] + metrics["num_rejected"]
    assert metrics["rejected"] == {"empty_completion": 2, "duplicate": 2}
    assert sorted(path.name for path in Path("data/sft").iterdir()) == ["eval.parquet", "train.parquet"]
    assert json.loads(Path("reports/convert_sft/metrics.json").read_text()) == {"convert_sft": metrics}
    rejects = [json.loads(line) for line in Path("reports/convert_sft/rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == metrics["num_rejected"]
    assert {reject["file"] for reject in rejects} == {"data/raw/sft.json"}
    checks = json.loads(Path("reports/convert_sft/checks.json").read_text())
    assert checks["duplicate"]["count"] == 2
    assert checks["duplicate"]["rate"] == pytest.approx(2 / 600)
    named = [reject["row"] for reject in rejects if reject["reason"] == "duplicate"]
    assert [place["row"] for place in checks["duplicate"]["first_rows"]] == named
    table = dict(reporter.tables["convert_sft"])
    assert (table["rows read"], table["left out: duplicate"]) == ("600", "2")
    (meter,) = reporter.meters
    assert meter.done == meter.total == raw.stat().st_size
    assert not any(Path(".scratch/convert_sft").glob("*/*"))


def test_several_sources_and_rankings_are_one_account(project: Path, reporter: Any) -> None:
    write_raw("pairs.json", pairs(40))
    ranked = [{"prompt": f"rank {n}", "completions": ["a", "b", "c"], "scores": [1, 2, 2]} for n in range(40)]
    write_raw("ranked.json", ranked)
    settings = params(preferences={"path": "data/raw/pairs.json", "also": [{"path": "data/raw/ranked.json"}]})
    metrics = convert_preferences.run(settings, reporter)
    assert (metrics["num_read"], metrics["num_rejected"]) == (80, 0)
    assert metrics["num_train"] + metrics["num_eval"] == 40 + 80
    assert metrics["num_train_rankings"] + metrics["num_eval_rankings"] == 40
    assert metrics["num_tied_pairs"] == 40
    assert sorted(path.name for path in Path("data/preference").iterdir()) == [
        "eval.parquet", "eval.ranking.parquet", "train.parquet", "train.ranking.parquet",
    ]  # fmt: skip


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_conversion_that_fails_or_is_stopped_leaves_the_tables_of_before_and_no_work(
    project: Path, reporter: Any, is_stopped: bool
) -> None:
    def stop(done: int) -> None:
        if is_stopped:
            raise KeyboardInterrupt

    path = write_raw("pairs.json", pairs(30))
    path.write_text(path.read_text()[: None if is_stopped else -9])
    Path("data/preference").mkdir()
    Path("data/preference/train.parquet").write_text("old")
    with pytest.raises(KeyboardInterrupt if is_stopped else DataError, match=None if is_stopped else "seems cut off"):
        convert_preferences.run(params(preferences={"path": "data/raw/pairs.json"}), type(reporter)(stop))
    assert Path("data/preference/train.parquet").read_text() == "old"
    assert not Path("reports").exists()
    assert not any(Path(".scratch/convert_preferences").glob("*/*"))  # as large as the data, and of no use


def test_a_check_that_stops_lists_its_rows_and_leaves_the_tables_of_before(project: Path, reporter: Any) -> None:
    write_raw("pairs.json", [*pairs(30), {"prompt": "x", "chosen": "", "rejected": "no"}])
    Path("data/preference").mkdir()
    Path("data/preference/train.parquet").write_text("old")
    settings = params(preferences={"path": "data/raw/pairs.json"}, checks={"empty_chosen": "error"})
    with pytest.raises(DataError, match=r"1 example fails the check empty_chosen \(rows 30\)"):
        convert_preferences.run(settings, reporter)
    assert Path("data/preference/train.parquet").read_text() == "old"
    (reject,) = map(json.loads, Path("reports/convert_preferences/rejects.jsonl").read_text().splitlines())
    assert (reject["row"], reject["reason"]) == (30, "empty_chosen")


@pytest.mark.parametrize("path", ["elsewhere/rows.json", "data/raw/../rows.json", "/data/raw/rows.json", "data/raws/r"])
def test_a_file_that_dvc_does_not_watch_is_refused(project: Path, reporter: Any, path: str) -> None:
    with pytest.raises(ParamsError, match=r"data.preferences.path must lie under data/raw, which DVC watches"):
        convert_preferences.run(params(preferences={"path": path}), reporter)
    with pytest.raises(ParamsError, match=r"data.sft.also.0.path must lie under data/raw"):
        convert_sft.run(params(sft={"also": [{"path": path}]}), reporter)


def labeled(number: int) -> list[dict[str, Any]]:
    """Rows labeled 0, 1, 2 by turns, whose better answer says yes; of the last ones neither is better."""
    sides = [("yes", "no"), ("no", "yes"), ("so", "so-so")]
    return [
        {"prompt": f"question {n}", "response 1": sides[n % 3][0], "response 2": sides[n % 3][1], "label": n % 3}
        for n in range(number)
    ]


@pytest.mark.parametrize("setting", [{"unwrap": True}, {"labels": {"1": "first"}}, {"pairs": "adjacent"}])
def test_a_setting_without_effect_on_the_data_is_refused(project: Path, reporter: Any, setting: dict[str, Any]) -> None:
    write_raw("pairs.json", pairs(40))
    source, (name,) = {"path": "data/raw/pairs.json", **setting}, setting
    with pytest.raises(ParamsError, match=rf"data.preferences: {name} .*has no effect: data/raw/pairs.json holds"):
        convert_preferences.run(params(preferences=source), reporter)
    if name != "pairs":
        with pytest.raises(ParamsError, match=f"data.sft: {name} has no effect"):
            convert_sft.run(params(sft=source), reporter)
    assert not Path("data/preference").exists()


def test_labels_serve_both_readings_and_only_winners_become_instructions(project: Path, reporter: Any) -> None:
    write_raw("votes.json", labeled(90))
    source = {"path": "data/raw/votes.json"}
    labels = {"0": "first", "1": "second", "2": "tie"}
    for convert, section in ((convert_sft, "data.sft"), (convert_preferences, "data.preferences")):
        with pytest.raises(DataError, match=rf"nothing says which output .*\(in params.yaml, under {section}\)"):
            convert.run(params(sft=source, preferences=source), reporter)
        metrics = convert.run(
            params(sft=source | {"labels": labels}, preferences=source | {"labels": labels}), reporter
        )
        assert (metrics["num_train"] + metrics["num_eval"], metrics["rejected"]) == (60, {"tie": 30})
    for table, answer in (("sft", "completion"), ("preference", "chosen")):
        rows = pl.read_parquet(f"data/{table}/*.parquet")[answer].to_list()
        assert {messages[0]["content"] for messages in rows} == {"yes"}


@pytest.mark.parametrize(("policy", "num_left"), [("keep", 60), ("drop", 20)])
def test_scores_against_the_choice_are_counted_or_left_out(
    project: Path, reporter: Any, policy: str, num_left: int
) -> None:
    scores = [(1, 9), (5, 5), (9, 1)]  # of every third row they speak for the choice
    rows = [
        {**row, "score_chosen": scores[n % 3][0], "score_rejected": scores[n % 3][1]} for n, row in enumerate(pairs(60))
    ]
    write_raw("scored.json", rows)
    settings = params(preferences={"path": "data/raw/scored.json"}, checks={"score_conflict": policy})
    metrics = convert_preferences.run(settings, reporter)
    assert metrics["num_train"] + metrics["num_eval"] == num_left
    table = dict(reporter.tables["convert_preferences"])
    if policy == "keep":
        assert table["kept: score conflict"] == "40 (66.7%)"
        assert any("score is not the higher one in 67% of the pairs" in warning for warning in reporter.warned)
    else:
        assert metrics["rejected"] == {"score_conflict": 40}


def test_a_label_against_two_scores_is_counted(project: Path, reporter: Any) -> None:
    rows = [
        {"prompt": f"q {n}", "answer_a": "x", "answer_b": "y", "label": "b", "score_a": 9, "score_b": 1}
        for n in range(40)
    ]
    write_raw("scored.json", rows)
    convert_preferences.run(params(preferences={"path": "data/raw/scored.json"}), reporter)
    assert dict(reporter.tables["convert_preferences"])["kept: score conflict"] == "40 (100.0%)"


def chats(number: int) -> list[dict[str, Any]]:
    hello = [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Hello!"}]
    return [
        {"prompt": [*hello, {"role": "user", "content": f"question {n}"}], "chosen": "yes", "rejected": "no"}
        for n in range(number)
    ]


def test_prompts_that_all_begin_alike_are_split_by_the_whole_prompt_where_the_user_says_so(
    project: Path, reporter: Any
) -> None:
    write_raw("chats.json", chats(60))
    source = {"path": "data/raw/chats.json"}
    with pytest.raises(DataError, match="60 distinct prompts have 1 distinct opening .*say data.split_by: prompt"):
        convert_preferences.run(params(preferences=source), reporter)
    convert_preferences.run(params(preferences=source, split_by="prompt"), reporter)
    prompts = {
        split: {row[-1]["content"] for row in pl.read_parquet(f"data/preference/{split}.parquet")["prompt"].to_list()}
        for split in ("train", "eval")
    }
    assert prompts["train"] | prompts["eval"] == {f"question {n}" for n in range(60)}
    assert not prompts["train"] & prompts["eval"]
    assert "the whole prompt" in dict(reporter.tables["convert_preferences"])["split by"]
    # more rows move none across
    write_raw("chats.json", [*chats(120), *pairs(20)])
    convert_preferences.run(params(preferences=source, split_by="prompt"), reporter)
    for split, before in prompts.items():
        rows = pl.read_parquet(f"data/preference/{split}.parquet")["prompt"].to_list()
        assert before <= {row[-1]["content"] for row in rows}


def test_rows_of_one_prompt_are_held_out_as_a_source_of_their_own(project: Path, reporter: Any) -> None:
    reviews = [{"prompt": "Review:", "chosen": f"fine {n}", "rejected": f"poor {n}"} for n in range(50)]
    write_raw("train.json", reviews[:40])
    write_raw("eval.json", reviews[40:])
    source = {"path": "data/raw/train.json"}
    with pytest.raises(DataError, match="all 40 examples have the same prompt.*split: eval.*shared_prompt to keep"):
        convert_preferences.run(params(preferences=source), reporter)
    both = {**source, "also": [{"path": "data/raw/eval.json", "split": "eval"}], "split": "train"}
    metrics = convert_preferences.run(params(preferences=both, checks={"shared_prompt": "keep"}), reporter)
    assert (metrics["num_train"], metrics["num_eval"]) == (40, 10)


def test_length_bias_and_many_rejects_are_warned_of(project: Path, reporter: Any) -> None:
    write_raw("pairs.json", pairs(150))
    convert_preferences.run(params(preferences={"path": "data/raw/pairs.json"}), reporter)
    assert any("the longer one in 100% of the pairs" in text for text in reporter.warned)
    reporter.warned.clear()
    write_raw("pairs.json", pairs(75, chosen="ja") + pairs(70, chosen="ja"))
    convert_preferences.run(params(preferences={"path": "data/raw/pairs.json"}), reporter)
    (warning,) = reporter.warned
    assert warning == "70 of 145 rows (48%) are left out: 70 duplicate"
