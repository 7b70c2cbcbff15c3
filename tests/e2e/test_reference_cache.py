"""The reference cache over the life of a project: what a change costs, stage by stage (invariant 7 of the design)."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import Params
from dpo_cli.data import world

Settings = dict[str, dict[str, Any]]


@pytest.fixture
def settings(tiny_folder: Path) -> Settings:
    """Settings of a small project on the tiny model."""
    training = {"learning_rate": 1e-3, "batch_size": 8, "max_steps": 3}
    return {
        "data": {"eval_fraction": 0.2},
        "model": {"name": "tiny"},
        "sft": {**training, "max_length": 256},
        "reference": {"max_length": 256},
        "train": training,
        "runtime": {"model_path": str(tiny_folder), "device": "cpu"},
    }


@pytest.fixture
def steps(project: Path, settings: Settings, reporter: Any) -> Callable[..., dict[str, Any]]:
    """``steps("sft", "train", train={"beta": 1})``: run stages in turn, give the last one's metrics."""
    from dpo_cli.stages import base, convert_preferences, convert_sft, precompute_ref, sft, train

    stages = {
        "base": base,
        "convert_sft": convert_sft,
        "convert_preferences": convert_preferences,
        "sft": sft,
        "precompute_ref": precompute_ref,
        "train": train,
    }

    def run(*names: str, **changes: dict[str, Any]) -> dict[str, Any]:
        params: Params = parse_params({name: {**values, **changes.get(name, {})} for name, values in settings.items()})
        metrics: dict[str, Any] = {}
        for name in names:
            metrics = stages[name].run(params, reporter)
        return metrics

    return run


def write_raw(num_preferences: int) -> None:
    raw = Path("data/raw")
    raw.mkdir(parents=True, exist_ok=True)
    (raw / "instructions.json").write_text(json.dumps(world.instruction_rows(0, 80)), encoding="utf-8")
    rows = world.preference_rows(0, 110)[:num_preferences]
    (raw / "preferences.json").write_text(json.dumps(rows), encoding="utf-8")


def test_what_each_change_costs(steps: Callable[..., dict[str, Any]]) -> None:
    write_raw(90)
    first = steps("base", "convert_sft", "convert_preferences", "sft", "precompute_ref")
    assert first["num_computed"] == first["num_completions"] > 100
    assert first["num_reused"] == 0
    steps("train")

    # beta, loss, learning rate and seed: the cache serves as it is
    for change in ({"beta": 1.0}, {"loss": "ipo"}, {"learning_rate": 1e-4}, {"seed": 7}):
        steps("train", train=change)
        assert steps("precompute_ref", train=change)["num_computed"] == 0

    # a budget of memory is no part of the graph
    assert steps("precompute_ref", runtime={"max_tokens_per_microbatch": 300})["num_computed"] == 0

    # more data: only the new rows, and train refuses until they are there
    write_raw(110)
    steps("convert_preferences")
    with pytest.raises(StaleArtifactError, match=r"has no row for .*run: dpo-cli precompute-ref"):
        steps("train")
    grown = steps("precompute_ref")
    assert grown["num_computed"] == grown["num_completions"] - first["num_completions"]
    assert 0 < grown["num_computed"] < 0.5 * grown["num_completions"]
    assert grown["num_reused"] == first["num_completions"]
    again = steps("precompute_ref")
    assert (again["num_computed"], again["completions_per_s"]) == (0, None), "there is no speed of nothing"
    steps("train")

    # DVC deletes the output before it runs the stage: nothing is lost by that
    shutil.rmtree("data/reference")
    assert steps("precompute_ref")["num_computed"] == 0

    # another quantization: train names it, and all rows are computed
    plain = {"quantization": "none"}
    with pytest.raises(StaleArtifactError, match="quantization is 'none' now, was 'nf4'"):
        steps("train", reference=plain)
    again = steps("precompute_ref", reference=plain)
    assert again["num_computed"] == again["num_completions"]
    steps("train", reference=plain)
    assert steps("precompute_ref")["num_computed"] == 0, "going back costs nothing"

    # another adapter: the same
    steps("sft", sft={"seed": 1})
    with pytest.raises(StaleArtifactError, match="sft is "):
        steps("train")
    assert steps("precompute_ref")["num_reused"] == 0
    steps("train")


@pytest.mark.parametrize("method", ["none", "full", "lora"])
def test_every_method_of_sft_gives_a_reference_that_the_policy_starts_from(
    method: str, steps: Callable[..., dict[str, Any]]
) -> None:
    write_raw(90)
    change = {"method": method}
    steps("base", "convert_sft", "convert_preferences", "sft", "precompute_ref", sft=change)
    metrics = steps("train", sft=change)
    assert metrics["step0_max_abs_margin"] <= 1e-4
    assert metrics["eval_loss"] < metrics["eval_loss_start"]
    assert (Path("models/sft/model.safetensors").exists()) == (method == "full")
