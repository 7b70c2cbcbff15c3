"""The reward model on the embedded world, whose reward is known: it learns it, and the best of N by it is better."""

from __future__ import annotations

import json
import math
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core import paths
from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.load_params import parse_params
from dpo_cli.core.params import Params
from dpo_cli.core.params_text import EMBEDDED_PRESET
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.evaluation.decoding import Decoding
from dpo_cli.evaluation.generation import PromptTokens, sample_answers
from dpo_cli.judging.known_reward import world_task
from dpo_cli.judging.reward_model import RewardModel
from dpo_cli.models.project import Project, open_project
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.statistics.intervals import Sampling
from tests.tiny_project import CONVERTED, run_stages, write_raw

N = 8
NUM_PROMPTS = 120
NUM_INSTRUCTIONS, NUM_PREFERENCES = 1600, 3000
SHORTER = {
    "model.pretrain_steps": 800,
    "sft.epochs": 2.0,
    "reward.loss": "bradley_terry",
    "reward.epochs": 1.0,
    "train.max_steps": 30,
    "evaluate.num_prompts": 60,
    "evaluate.temperatures": [0.0],
    "evaluate.scales": [0.5],
}


def make_params(**changes: Any) -> Params:
    tree: dict[str, Any] = {}
    for path, value in {**EMBEDDED_PRESET, **SHORTER, **changes}.items():
        node = tree
        *parents, name = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return parse_params(tree)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_reporter: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """The metrics of stage reward; the working directory is its project."""
    folder = tmp_path_factory.mktemp("reward") / "project"
    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_raw(NUM_PREFERENCES, NUM_INSTRUCTIONS)
        yield run_stages(make_params(), make_reporter(), *CONVERTED, "sft", "reward")


@pytest.fixture(scope="module")
def project(finished: dict[str, Any], make_reporter: Callable[[], Any]) -> Project:
    return open_project(make_params(), make_reporter(), "test")


@pytest.fixture(scope="module")
def reward_model(project: Project) -> RewardModel:
    return RewardModel.load(paths.REWARD_MODEL, project)


def test_it_learns_the_known_reward(finished: dict[str, Any]) -> None:
    assert finished["accuracy"] >= 0.8
    low, high = finished["accuracy_ci"]
    assert low <= finished["accuracy"] <= high
    assert low > finished["longer_accuracy_ci"][1], "it must not be the length that it learned"
    for name in ("longer", "as_long", "shorter"):
        if finished[f"num_chosen_{name}"] >= 30:
            assert finished[f"accuracy_chosen_{name}"] >= 0.7, name
    assert finished["eval_loss_start"] == pytest.approx(math.log(2), abs=1e-6), "a head of zeros knows nothing"
    assert finished["log_loss"] < 0.35
    assert finished["log_loss"] == pytest.approx(finished["eval_loss"], rel=1e-4), "saved and measured are one"
    assert finished["ece"] < 0.1
    assert sum(cell["num_pairs"] for cell in finished["reliability"]) == finished["num_eval_pairs"]
    written = json.loads(paths.metrics_file("reward").read_text(encoding="utf-8"))["reward"]
    assert written == finished
    assert paths.rejects_file("reward").is_file()
    assert len((paths.report_dir("reward") / "steps.tsv").read_text(encoding="utf-8").splitlines()) > 100


def test_the_loaded_model_gives_the_figures_that_were_written(
    finished: dict[str, Any], project: Project, reward_model: RewardModel
) -> None:
    groups = project.tokenize_pairs("eval").groups
    rewards = reward_model.rewards(groups)
    right = [(chosen > rejected) + 0.5 * (chosen == rejected) for chosen, rejected in rewards]
    assert sum(right) / len(right) == pytest.approx(finished["accuracy"], abs=0.005)


def test_the_best_of_n_by_its_reward_is_better_by_the_known_one(
    project: Project, reward_model: RewardModel, reporter: Any
) -> None:
    """On answers of the SFT model, which no preference was ever asked for."""
    table = project.tokenize_pairs("eval")
    prompts = [PromptTokens(group.group, group.prompt) for group in table.groups[:NUM_PROMPTS]]
    model, answers = project.reference(), defaultdict[str, list[Any]](list)
    with reporter.meter("", 1, "") as meter:
        for number in range(N):
            for prompt, answer in sample_answers(
                model,
                prompts,
                Decoding(1.0, 48, tuple(project.encoder.stop_ids), 0, f"best-of-n {number}"),
                budget=TokenBudget(1024, "test", reporter),
                autocast_dtype=torch.float32,
                meter=meter,
            ).items():
                answers[prompt].append(answer.tokens)
    groups = [TokenGroup(each.id, each.id, each.tokens, tuple(answers[each.id])) for each in prompts]
    gains, rooms = [], []
    for group, rewards in zip(groups, reward_model.rewards(groups), strict=True):
        task = world_task(table.prompts[group.id][-1]["content"])
        known = [task.reward(project.encoder.decode(list(tokens))) for tokens in group.completions]
        gains.append(known[max(range(N), key=rewards.__getitem__)] - sum(known) / N)
        rooms.append(max(known) - sum(known) / N)
    gain = Sampling(2000, 0.95, 0).interval(gains, list(answers))
    print(f"best of {N}: gain {gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}] of {sum(rooms) / len(rooms):.3f}")
    assert gain.low > 0.05, gain
    assert gain.value > 0.5 * sum(rooms) / len(rooms), "most of what there is to win"


def test_it_judges_the_tuned_model(finished: dict[str, Any], make_reporter: Callable[[], Any]) -> None:
    """Stage evaluate with it as judge, and with the known reward: both see the same answers."""
    by_world = run_stages(make_params(), make_reporter(), "precompute_ref", "train", "evaluate")
    by_model = run_stages(make_params(**{"evaluate.judge": "reward-model"}), make_reporter(), "evaluate")
    low, high = by_model["win_rate_ci"]
    assert low <= by_model["win_rate"] <= high
    assert by_model["kl"] == by_world["kl"]
    assert abs(by_model["win_rate"] - by_world["win_rate"]) < 0.15
    assert by_model["reward_sft"] == pytest.approx(-by_model["reward_dpo"]), "centered by prompt"
    assert "win_rate_ceiling" not in by_model


def test_a_judge_that_was_made_of_something_else_is_refused(
    finished: dict[str, Any], make_reporter: Callable[[], Any], tmp_path: Path
) -> None:
    judge = make_params(**{"evaluate.judge": "reward-model"})
    kept = tmp_path / "kept"
    shutil.move(paths.REWARD_MODEL, kept)
    try:
        run_stages(make_params(**{"reward.loss": "none"}), make_reporter(), "reward")
        assert [path.name for path in paths.REWARD_MODEL.iterdir()] == ["reward.json"]
        with pytest.raises(StaleArtifactError, match=r"models/reward holds no reward model: set reward\.loss"):
            run_stages(judge, make_reporter(), "evaluate")
    finally:
        shutil.rmtree(paths.REWARD_MODEL)
        shutil.move(kept, paths.REWARD_MODEL)
