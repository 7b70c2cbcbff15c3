"""From one's own judgement to a tuned model: the SFT model's answers are sampled, voted on, learned from and judged."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core import paths
from dpo_cli.core.params_text import EMBEDDED_PRESET, params_yaml
from dpo_cli.data import world
from dpo_cli.data.schema import split_position, user
from tests.tiny_project import write_raw

NUM_PROMPTS, NUM_ANSWERS = 200, 4
SETTINGS = {
    "data.preferences.path": "data/raw/votes",
    "data.preferences.also": [{"path": "data/raw/preferences.json", "split": "eval"}],
    "model.pretrain_steps": 1200,
    "train.epochs": 8.0,
    "train.beta": 1.0,
    "evaluate.opponents": ["sft"],
    "evaluate.judge_pairs": 0,
    "evaluate.temperatures": [],
    "evaluate.scales": [],
}


def test_what_the_world_votes_for_is_learned(project: Path) -> None:
    """Nothing but the votes on the SFT model's own answers tells it which ones are good."""
    rows = {row["prompt"]: row for row in world.preference_rows(0, 1600)}
    held_out = {prompt for prompt in rows if split_position([user(prompt)]) < EMBEDDED_PRESET["data.eval_fraction"]}
    asked = [prompt for prompt in rows if prompt not in held_out][:NUM_PROMPTS]
    write_raw([rows[prompt] for prompt in rows if prompt in held_out], instructions=1600)
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in asked), encoding="utf-8")
    paths.PARAMS.write_text(params_yaml(EMBEDDED_PRESET | SETTINGS), encoding="utf-8")
    for command in (
        "base",
        "convert-sft",
        "sft",
        f"sample prompts.jsonl --answers {NUM_ANSWERS}",
        "label data/samples/prompts.parquet --judge world --pairs 6 --out data/raw/votes",
        "convert-preferences",
        "precompute-ref",
        "train",
        "evaluate",
    ):
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == 0, f"{command}: {done.output}"
    voted, found = (
        json.loads(paths.metrics_file(stage).read_text("utf-8"))[stage] for stage in ("convert_preferences", "evaluate")
    )
    pairs = pl.read_parquet(paths.preference_table("train")).filter(pl.col("source") == "judge-world.jsonl")
    print(
        f"{len(pairs)} pairs, left out {voted['rejected']}; win rate over SFT {found['win_rate']:.3f}"
        f" {found['win_rate_ci']} on {found['num_prompts']} prompts"
    )
    for row in pairs.to_dicts():
        task = world.task_of(row["prompt"][0]["content"])
        assert task is not None
        assert row["chosen"][0]["content"] == task.good != row["rejected"][0]["content"]
        assert (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0)
    assert voted["rejected"].keys() <= {"tie", "repeat", "equal_sides", "empty_rejected", "duplicate"}
    assert found["win_rate"] >= 0.65
    assert found["win_rate_ci"][0] > 0.5
