"""Stage reward on a tiny model: off, on pairs, on rankings, after every kind of SFT, and what it refuses."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, StaleArtifactError
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.manifest import REWARD
from dpo_cli.data import world

Settings = dict[str, dict[str, Any]]


@pytest.fixture
def steps(project: Path, tiny_folder: Path, reporter: Any) -> Callable[..., dict[str, Any]]:
    """``steps("sft", "reward", reward={"loss": ...})``: run stages in turn, give the last one's metrics."""
    import importlib

    training = {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 3}
    settings: Settings = {
        "data": {"eval_fraction": 0.2},
        "model": {"name": "tiny"},
        "sft": {**training, "max_length": 256},
        "reference": {"max_length": 256},
        "reward": {**training, "loss": "bradley_terry"},
        "runtime": {"model_path": str(tiny_folder), "device": "cpu"},
    }

    def run(*names: str, **changes: dict[str, Any]) -> dict[str, Any]:
        params = parse_params({name: {**values, **changes.get(name, {})} for name, values in settings.items()})
        metrics: dict[str, Any] = {}
        for name in names:
            metrics = importlib.import_module(f"dpo_cli.stages.{name}").run(params, reporter)
        return metrics

    return run


def write_raw(preferences: list[dict[str, Any]]) -> None:
    raw = Path("data/raw")
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "instructions.json").write_text(json.dumps(world.instruction_rows(0, 80)), encoding="utf-8")
    (raw / "preferences.json").write_text(json.dumps(preferences), encoding="utf-8")


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths.REWARD_MODEL.iterdir()}


def test_off_it_leaves_a_marker_at_once(steps: Callable[..., dict[str, Any]]) -> None:
    """It reads nothing, not even the base model."""
    assert steps("reward", reward={"loss": "none"}) == {"method": "none"}
    assert list(files()) == ["reward.json"]
    assert REWARD.read().settings == {"reward": {"loss": "none"}}
    assert json.loads(paths.metrics_file("reward").read_text(encoding="utf-8")) == {"reward": {"method": "none"}}
    assert paths.rejects_file("reward").read_bytes() == b"\n"
    assert (paths.report_dir("reward") / "steps.tsv").read_text(encoding="utf-8").startswith("step\tloss\t")


@pytest.mark.parametrize("method", ["none", "full", "lora", "qlora"])
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_it_starts_from_whatever_sft_made(method: str, quantization: str, steps: Callable[..., dict[str, Any]]) -> None:
    write_raw(world.preference_rows(0, 90))
    changes = {"sft": {"method": method}, "reference": {"quantization": quantization}}
    metrics = steps("base", "convert_sft", "convert_preferences", "sft", "reward", **changes)
    assert metrics["eval_loss_start"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["log_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-3)
    assert metrics["layout"] == "shared"
    assert {"adapter_config.json", "adapter_model.safetensors", "reward.json", "README.md"} <= set(files())
    config = json.loads((paths.REWARD_MODEL / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["task_type"] == "SEQ_CLS"
    assert "score" in config["modules_to_save"]
    assert config["base_model_name_or_path"] == "tiny"
    card = (paths.REWARD_MODEL / "README.md").read_text(encoding="utf-8")
    assert f"{metrics['num_groups']} for training" in card


def test_two_runs_make_the_same_bytes_and_another_seed_others(steps: Callable[..., dict[str, Any]]) -> None:
    write_raw(world.preference_rows(0, 60))
    steps("base", "convert_sft", "convert_preferences", "sft", "reward")
    first = files()
    steps("reward")
    assert files() == first
    steps("reward", reward={"seed": 1})
    assert files()["adapter_model.safetensors"] != first["adapter_model.safetensors"]


def test_rankings_are_learned_and_measured_on_their_pairs(steps: Callable[..., dict[str, Any]]) -> None:
    rows = [
        {"prompt": f"Say the number {number}.", "completions": [f"{number}", f"{number} or so", "No."], "ranks": order}
        for number in range(40)
        for order in ([1, 2, 3],)
    ]
    write_raw(rows)
    metrics = steps("base", "convert_sft", "convert_preferences", "sft", "reward", reward={"loss": "plackett_luce"})
    assert metrics["method"] == "plackett_luce"
    assert metrics["eval_loss_start"] == pytest.approx(math.log(6), abs=1e-6)
    assert metrics["num_eval_pairs"] == 3 * metrics["num_eval"]
    assert -1 <= metrics["eval_kendall_tau"] <= 1
    pairs = steps("reward")
    assert pairs["num_groups"] == 3 * metrics["num_groups"]
    assert "eval_kendall_tau" not in pairs


def test_rankings_that_are_not_there_are_asked_for(steps: Callable[..., dict[str, Any]]) -> None:
    write_raw(world.preference_rows(0, 60))
    steps("base", "convert_sft", "convert_preferences", "sft")
    with pytest.raises(DataError, match=r"reward\.loss plackett_luce learns from rankings of several answers, and"):
        steps("reward", reward={"loss": "plackett_luce"})


def test_a_stale_sft_model_is_refused(steps: Callable[..., dict[str, Any]]) -> None:
    write_raw(world.preference_rows(0, 60))
    steps("base", "convert_sft", "convert_preferences")
    with pytest.raises(StaleArtifactError, match="run: dpo-cli sft"):
        steps("reward")
