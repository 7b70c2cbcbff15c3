"""Single answers that are good or bad, from the file to the evaluated adapter."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError
from dpo_cli.core.load_params import parse_params
from dpo_cli.data import world
from dpo_cli.report.page import write_report
from tests.tiny_project import run_stages, tiny_params, write_raw

UNPAIRED = {"preferences": {"path": "data/raw/preferences.json", "format": "unpaired"}, "eval_fraction": 0.2}
KTO = {"loss": "kto", "beta": 0.5, "learning_rate": 1e-3, "batch_size": 8, "max_steps": 4}


def thumbs(rows: Sequence[dict[str, Any]], seed: int = 0, both: float = 0.5) -> list[dict[str, Any]]:
    """What someone says of single answers: of a share of the prompts of both answers, of the rest of one."""
    rng = random.Random(f"thumbs {seed}")
    found = []
    for row in rows:
        sides = [("chosen", True), ("rejected", False)]
        for side, good in sides if rng.random() < both else [rng.choice(sides)]:
            found.append({"prompt": row["prompt"], "completion": row[side], "label": good})
    rng.shuffle(found)
    return found


@pytest.fixture
def steps(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_reporter: Any) -> Callable[..., Any]:
    """``steps(*names, **changes)``: stages in an empty project on the tiny model; the metrics of the last one."""
    monkeypatch.chdir(tmp_path)

    def run(*names: str, **changes: Any) -> dict[str, Any]:
        settings = {"data": UNPAIRED, "train": KTO, "evaluate": {"num_prompts": 4, "max_new_tokens": 4}, **changes}
        return run_stages(tiny_params(tiny_folder, **settings), make_reporter(), *names)

    return run


def test_thumbs_are_converted_learned_from_and_evaluated(steps: Callable[..., Any]) -> None:
    rows = thumbs(world.preference_rows(0, 90))
    again, other = rows[0], {**rows[1], "label": not rows[1]["label"]}
    write_raw([*rows, again, other, {**rows[2], "label": "perhaps"}])
    metrics = steps("base", "convert_sft", "convert_preferences")
    # the same once more is left out, and so are both where one says good and one bad
    assert metrics["rejected"] == {"contradiction": 2, "duplicate": 1, "unknown_label": 1}
    tables = [pl.read_parquet(paths.preference_table(split)) for split in ("train", "eval")]
    sizes = [(table["chosen"].list.len().sum(), table["rejected"].list.len().sum()) for table in tables]
    assert sum(map(sum, sizes)) == sum(map(len, tables)) == len(rows) - 1
    num_answers = len(tables[0])

    scored = steps("sft", "precompute_ref")
    assert len(rows) - 1 < scored["num_completions"] <= 2 * (len(rows) - 1), "with other prompts' answers"
    trained = steps("train")
    assert (trained["num_pairs"], trained["num_eval"]) == (num_answers, len(tables[1]))
    assert trained["step0_loss"] == pytest.approx(0.5, abs=1e-6)
    assert trained["step0_max_abs_margin"] <= 1e-4
    assert trained["eval_loss"] < trained["eval_loss_start"]
    found = steps("evaluate")
    assert 0 < found["num_pairs"] < len(tables[1]), "of the held-out prompts that have good and bad answers"
    # those pairs are there for the other losses, too, and what is in none is listed
    paired = steps("train", train={**KTO, "loss": "sigmoid"})
    assert paired["num_eval"] == found["num_pairs"]
    rejects = [json.loads(line) for line in paths.rejects_file("train").read_text("utf-8").splitlines()]
    assert {reject["reason"] for reject in rejects} == {"unpaired"}


def test_each_loss_says_what_it_learns_from(steps: Callable[..., Any]) -> None:
    write_raw(thumbs(world.preference_rows(0, 240), both=0.0))
    steps("base", "convert_sft", "convert_preferences", "sft", "precompute_ref")
    with pytest.raises(DataError, match=r"left out: 188 unpaired; row 0 is a single .* only kto learns from it"):
        steps("train", train={**KTO, "loss": "sigmoid"})
    steps("train", train={**KTO, "max_steps": 12})
    # no prompt has both a good and a bad answer
    found = steps("evaluate")
    write_report(Path("report.html"))
    assert "reward_accuracy" not in found
    assert (found["num_good"] + found["num_bad"], found["num_generated_prompts"]) == (51, 4)
    assert found["good_reward"] > found["bad_reward"]
    assert found["auc"] > 0.5
    assert found["kto_loss"] < found["kto_loss_at_reference"] == 0.5
    assert "held-out AUC" in Path("report.html").read_text("utf-8")
    write_raw()
    pairs = {"eval_fraction": 0.2}
    steps("convert_preferences", "precompute_ref", data=pairs)
    with pytest.raises(
        DataError, match=r"train\.loss kto learns from single answers that are good or bad, and .* none"
    ):
        steps("train", data=pairs)


def test_thumbs_from_the_worlds_reward_beat_sft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_reporter: Any
) -> None:
    """By what the known reward says of single answers; most prompts have one."""
    monkeypatch.chdir(tmp_path)
    write_raw(thumbs(world.preference_rows(0, 800), both=0.4), instructions=900)
    params = parse_params(
        {
            "data": UNPAIRED | {"eval_fraction": 0.3},
            "model": {"pretrain_steps": 400},
            "sft": {"learning_rate": 2e-3, "batch_size": 32, "epochs": 2.0},
            "train": {"loss": "kto", "beta": 1.0, "learning_rate": 1.5e-3, "batch_size": 8},
            "evaluate": {"judge": "world", "num_prompts": 0, "temperature": 0.7, "max_new_tokens": 48},
            "runtime": {"threads": 1},
        }
    )
    stages = ("base", "convert_sft", "convert_preferences", "sft", "precompute_ref", "train")
    trained = run_stages(params, make_reporter(), *stages)
    found = run_stages(params, make_reporter(), "evaluate")
    low, high = found["win_rate_ci"]
    print(
        f"{trained['num_pairs']} answers: held-out loss {trained['eval_loss_start']:.3f} -> {trained['eval_loss']:.3f};"
        f" win rate over SFT {found['win_rate']:.3f} [{low:.3f}, {high:.3f}] on {found['num_judged']} prompts"
    )
    assert trained["eval_loss"] < 0.4 < trained["eval_loss_start"]
    assert low > 0.5
