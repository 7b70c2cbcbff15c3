"""From one's own judgement to a tuned model: the SFT model's answers are sampled, voted on, learned from and judged.

Then once more, from the tuned model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from contextlib import chdir
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from dpo_cli.cli.app import app
from dpo_cli.core import paths
from dpo_cli.core.artifacts import remove, sha256_file
from dpo_cli.core.manifest import DPO, SFT
from dpo_cli.core.params_text import EMBEDDED_PRESET, params_yaml
from dpo_cli.data import world
from dpo_cli.data.schema import split_position, user
from dpo_cli.evaluation.verdict import headline
from dpo_cli.models.folder import ADAPTER_FILES
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


NOT_LEARNED = {"tie", "repeat", "equal_sides", "empty_rejected", "duplicate"}


def run(*commands: str) -> None:
    for command in commands:
        done = CliRunner().invoke(app, command.split())
        assert done.exit_code == 0, f"{command}: {done.output}"


def write_prompts(prompts: Sequence[str]) -> None:
    Path("prompts.jsonl").write_text("\n".join(json.dumps({"prompt": prompt}) for prompt in prompts), encoding="utf-8")


def vote_and_train(votes: str) -> dict[str, dict[str, Any]]:
    """From the SFT model's answers to the metrics of what was learned of them."""
    run(
        f"sample prompts.jsonl --answers {NUM_ANSWERS}",
        f"label data/samples/prompts.parquet --judge world --pairs 6 --out {votes}",
        "convert-preferences",
        "precompute-ref",
        "train",
        "evaluate",
    )
    stages = ("convert_preferences", "sft", "train", "evaluate")
    metrics = {stage: json.loads(paths.metrics_file(stage).read_text("utf-8"))[stage] for stage in stages}
    found = metrics["evaluate"]
    print(
        f"{metrics['train']['num_pairs']} pairs, left out {metrics['convert_preferences']['rejected']}; win rate over"
        f" SFT {found['win_rate']:.3f} {found['win_rate_ci']} on {found['num_prompts']} prompts; reward"
        f" {found['reward_sft']:.3f} -> {found['reward_dpo']:.3f}; KL {found['kl']:.2f}: {headline(found)[0]}"
    )
    return metrics


@pytest.fixture(scope="module")
def asked() -> list[str]:
    """Prompts that are not held out, for two rounds."""
    return [prompt for prompt in world_rows() if not is_held_out(prompt)][: 2 * NUM_PROMPTS]


def world_rows() -> dict[str, dict[str, str]]:
    return {row["prompt"]: row for row in world.preference_rows(0, 1600)}


def is_held_out(prompt: str) -> bool:
    return split_position([user(prompt)]) < EMBEDDED_PRESET["data.eval_fraction"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, asked: list[str]) -> tuple[Path, dict[str, dict[str, Any]]]:
    """A project whose model learned of votes on its own answers, and the metrics of its stages."""
    folder = tmp_path_factory.mktemp("rounds") / "round1"
    folder.mkdir()
    with chdir(folder):
        write_raw([row for prompt, row in world_rows().items() if is_held_out(prompt)], instructions=1600)
        write_prompts(asked[:NUM_PROMPTS])
        paths.PARAMS.write_text(params_yaml(EMBEDDED_PRESET | SETTINGS), encoding="utf-8")
        run("base", "convert-sft", "sft")
        return folder, vote_and_train("data/raw/votes")


def test_what_the_world_votes_for_is_learned(
    first: tuple[Path, dict[str, dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but the votes on the SFT model's own answers tells it which ones are good."""
    folder, metrics = first
    monkeypatch.chdir(folder)
    pairs = pl.read_parquet(paths.preference_table("train")).filter(pl.col("source") == "judge-world.jsonl")
    for row in pairs.to_dicts():
        task = world.task_of(row["prompt"][0]["content"])
        assert task is not None
        assert row["chosen"][0]["content"] == task.good != row["rejected"][0]["content"]
        assert (row["chosen_score"], row["rejected_score"]) == (1.0, 0.0)
    assert metrics["convert_preferences"]["rejected"].keys() <= NOT_LEARNED
    assert metrics["evaluate"]["win_rate"] >= 0.65
    assert metrics["evaluate"]["win_rate_ci"][0] > 0.5


def test_a_second_round_starts_from_the_first_ones_model(
    first: tuple[Path, dict[str, dict[str, Any]]], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its SFT model is the tuned adapter, to the last digit; and it says whether it improves on it."""
    folder, before = first
    monkeypatch.chdir(folder.parent)
    run("init round2 --from round1 --set train.epochs=3")  # there is less to learn
    monkeypatch.chdir(folder.parent / "round2")
    remove(Path(".dvc"))  # no stage is recorded, which takes as long as all of them together
    write_prompts(asked[NUM_PROMPTS:])
    run("base", "convert-sft", "sft")
    metrics = vote_and_train("data/raw/votes-2")
    run("report")
    digests = [sha256_file(each / ADAPTER_FILES[1]) for each in (folder / paths.DPO_MODEL, paths.SFT_MODEL)]
    assert digests[0] == digests[1]
    [entry] = SFT.read().made_of["rounds"]
    assert (entry["project"], entry["model"]) == ("round1", "models/dpo")
    assert DPO.read().made_of["rounds"] == [entry]
    now, then = metrics["evaluate"], before["evaluate"]
    assert metrics["train"]["step0_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert now["perplexity_sft"] == pytest.approx(then["perplexity_dpo"], rel=1e-6)
    assert now["reward_sft"] == pytest.approx(then["reward_dpo"], abs=0.15), "other draws of the same model"
    assert metrics["convert_preferences"]["rejected"].keys() <= NOT_LEARNED
    assert metrics["sft"]["rounds"][0]["win_rate"] == then["win_rate"]
    # better, worse or open: as the interval says, and the report says the same
    low, high = now["win_rate_ci"]
    text, status = headline(now)
    assert status == ("good" if low > 0.5 else "bad" if high < 0.5 else "warn"), text
    page = paths.REPORT_HTML.read_text(encoding="utf-8")
    for number in (text, *(f"{100 * each['win_rate']:.1f}%" for each in (then, now))):
        assert number in page
