"""Stages on a tiny model: what a change costs the reference cache, every method of SFT, and stage reward."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, StaleArtifactError
from dpo_cli.core.manifest import REWARD
from dpo_cli.core.progress import SilentReporter
from dpo_cli.data import world
from tests.tiny_project import CONVERTED, run_stages, tiny_params, write_raw

Steps = Callable[..., dict[str, Any]]


@pytest.fixture
def steps(project: Path, tiny_folder: Path, reporter: Any) -> Steps:
    """``steps("sft", "train", train={"beta": 1})``: run stages in turn, give the last one's metrics."""
    return lambda *names, **changes: run_stages(tiny_params(tiny_folder, **changes), reporter, *names)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A project whose data are converted; not to be changed."""
    folder = tmp_path_factory.mktemp("begun")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        rows = enumerate(world.preference_rows(0, 90))
        write_raw([{**row, "chosen_score": 2 + index % 3, "rejected_score": 1} for index, row in rows])
        run_stages(tiny_params(tiny_folder), SilentReporter(), *CONVERTED)
    return folder


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory, begun: Path, tiny_folder: Path) -> Path:
    """A copy of it with the reference's log-probabilities; not to be changed."""
    folder = tmp_path_factory.mktemp("scored") / "project"
    shutil.copytree(begun, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        run_stages(tiny_params(tiny_folder), SilentReporter(), "sft", "precompute_ref")
    return folder


@pytest.fixture
def converted(project: Path, begun: Path) -> None:
    """The working directory is a copy of it."""
    shutil.copytree(begun, project, dirs_exist_ok=True)


def files() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in paths.REWARD_MODEL.iterdir()}


def test_what_each_change_costs_the_reference_cache(steps: Steps) -> None:
    """Only what the reference depends on computes its rows again."""
    write_raw(90)
    first = steps(*CONVERTED, "sft", "precompute_ref")
    assert first["num_computed"] == first["num_completions"] > 100
    assert first["num_reused"] == 0

    # beta, loss, learning rate and seed: the cache serves as it is
    change = {"beta": 1.0, "loss": "ipo", "learning_rate": 1e-4, "seed": 7}
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
    assert steps("precompute_ref")["num_computed"] == 0, "going back costs nothing"

    # another adapter: the same
    steps("sft", sft={"seed": 1})
    with pytest.raises(StaleArtifactError, match="sft is "):
        steps("train")
    assert steps("precompute_ref")["num_reused"] == 0


@pytest.mark.parametrize(
    ("method", "quantization"), [("none", "nf4"), ("full", "none"), ("lora", "nf4"), ("qlora", "none")]
)
def test_policy_and_reward_model_start_from_whatever_sft_made(
    method: str, quantization: str, steps: Steps, converted: None
) -> None:
    changes = {"sft": {"method": method}, "reference": {"quantization": quantization}}
    steps("sft", "precompute_ref", **changes)
    metrics = steps("train", **changes)
    assert metrics["step0_max_abs_margin"] <= 1e-4
    assert metrics["eval_loss"] < metrics["eval_loss_start"]
    assert (Path("models/sft/model.safetensors").exists()) == (method == "full")
    metrics = steps("reward", **changes)
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


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        ("dpop", {"max_steps": 20}),  # at first the penalty outweighs the margin
        ("r_dpo", {"rdpo_alpha": 0.01}),
        ("soft_label", {}),
        ("rpo_bwd_kl", {}),
        ("beta_dpo", {}),
        ("alphapo", {"beta": 2.0, "gamma": 0.5}),
    ],
)
def test_training_improves_what_an_objective_is_after(
    loss: str, settings: dict[str, Any], steps: Steps, project: Path, scored: Path
) -> None:
    """On held-out pairs: its own loss falls, and the chosen answers win over the rejected ones."""
    shutil.copytree(scored, project, dirs_exist_ok=True)
    found = steps("train", train={"loss": loss, "beta": 0.5, **settings})
    print(f"{loss}: {found['eval_loss_start']:.4f} -> {found['eval_loss']:.4f}, accuracy {found['eval_accuracy']:.3f}")
    assert found["eval_loss"] < found["eval_loss_start"]
    assert found["eval_margin"] > 0


# --- stage reward ---------------------------------------------------------------------------


def test_off_it_leaves_a_marker_at_once(steps: Steps) -> None:
    """It reads nothing, not even the base model."""
    assert steps("reward", reward={"loss": "none"}) == {"method": "none"}
    assert list(files()) == ["reward.json"]
    assert REWARD.read().settings == {"reward": {"loss": "none"}}
    assert json.loads(paths.metrics_file("reward").read_text(encoding="utf-8")) == {"reward": {"method": "none"}}
    assert paths.rejects_file("reward").read_bytes() == b"\n"
    assert (paths.report_dir("reward") / "steps.tsv").read_text(encoding="utf-8").startswith("step\tloss\t")


def test_two_runs_make_the_same_bytes_and_another_seed_others(steps: Steps, converted: None) -> None:
    with pytest.raises(StaleArtifactError, match="run: dpo-cli sft"):
        steps("reward")
    steps("sft", "reward")
    first = files()
    steps("reward")
    assert files() == first
    steps("reward", reward={"seed": 1})
    assert files()["adapter_model.safetensors"] != first["adapter_model.safetensors"]


def test_rankings_are_learned_and_measured_on_their_pairs(steps: Steps) -> None:
    write_raw(20)
    steps(*CONVERTED, "sft")
    with pytest.raises(DataError, match=r"reward\.loss plackett_luce learns from rankings of several answers, and"):
        steps("reward", reward={"loss": "plackett_luce"})
    write_raw(
        [
            {"prompt": f"Say {number}.", "completions": [f"{number}", f"{number} or so", "No."], "ranks": [1, 2, 3]}
            for number in range(40)
        ]
    )
    metrics = steps("convert_preferences", "reward", reward={"loss": "plackett_luce"})
    assert metrics["method"] == "plackett_luce"
    assert metrics["eval_loss_start"] == pytest.approx(math.log(6), abs=1e-6)
    assert metrics["num_eval_pairs"] == 3 * metrics["num_eval"]
    assert -1 <= metrics["eval_kendall_tau"] <= 1
    pairs = steps("reward")
    assert pairs["num_groups"] == 3 * metrics["num_groups"]
    assert "eval_kendall_tau" not in pairs
