"""The reward model on the embedded world, whose reward is known: it learns it, and the best of N by it is better."""

from __future__ import annotations

import json
import math
import shutil
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
from dpo_cli.data import world
from dpo_cli.data.schema import user
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.evaluation.decoding import Sampling
from dpo_cli.evaluation.generation import PromptTokens, sample_answers
from dpo_cli.judging.known_reward import world_reward, world_task
from dpo_cli.judging.reward_model import RewardModel
from dpo_cli.models.project import Project, open_project
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.statistics.bootstrap import Estimate, cluster_bootstrap

pytestmark = pytest.mark.timeout(1800)

N = 8
NUM_PROMPTS = 120
SHORTER = {
    "model.pretrain_steps": 1000,
    "sft.epochs": 2.0,
    "reward.loss": "bradley_terry",
    "reward.epochs": 1.0,
}
NAMES = ("base", "convert_sft", "convert_preferences", "sft", "reward")


def make_params(**changes: Any) -> Params:
    tree: dict[str, Any] = {}
    for path, value in {**EMBEDDED_PRESET, **SHORTER, **changes}.items():
        node = tree
        *parents, name = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = value
    return parse_params(tree)


def run(name: str, params: Params, reporter: Any) -> dict[str, Any]:
    import importlib

    return importlib.import_module(f"dpo_cli.stages.{name}").run(params, reporter)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, make_reporter: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """The metrics of stage reward; the working directory is its project."""
    folder = tmp_path_factory.mktemp("reward") / "project"
    raw = folder / paths.RAW
    raw.mkdir(parents=True)
    (raw / "instructions.json").write_text(json.dumps(world.instruction_rows(0)), encoding="utf-8")
    (raw / "preferences.json").write_text(json.dumps(world.preference_rows(0)), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        torch.set_num_threads(1)
        metrics: dict[str, Any] = {}
        for name in NAMES:
            metrics = run(name, make_params(), make_reporter())
        yield metrics


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


def test_it_agrees_with_the_known_judge_on_what_the_model_says_itself(
    project: Project, reward_model: RewardModel, answers: dict[str, list[str]], texts: dict[str, str]
) -> None:
    """On answers of the SFT model, which no preference was ever asked for."""
    right, clusters = [], []
    for prompt, samples in answers.items():
        first, second = samples[0], samples[1]
        truth = world_reward(texts[prompt], first) - world_reward(texts[prompt], second)
        if truth:
            rewards = reward_model.rewards_of_texts([user(texts[prompt])], [first, second])
            right.append(float((rewards[0] > rewards[1]) == (truth > 0)))
            clusters.append(prompt)
    assert len(right) >= 20
    assert interval(right, clusters).low > 0.5


@pytest.fixture(scope="module")
def texts(project: Project) -> dict[str, str]:
    """Unseen prompts as texts, by id."""
    table = project.tokenize_pairs("eval")
    return {group: table.prompts[group][-1]["content"] for group in sorted(table.prompts)[:NUM_PROMPTS]}


@pytest.fixture(scope="module")
def sampled(project: Project, texts: dict[str, str], make_reporter: Callable[[], Any]) -> dict[str, list[Any]]:
    """N answers of the SFT model to each unseen prompt."""
    tokens = {group.group: group.prompt for group in project.tokenize_pairs("eval").groups}
    prompts = [PromptTokens(prompt, tokens[prompt]) for prompt in texts]
    model = project.reference()
    found: dict[str, list[Any]] = {prompt: [] for prompt in texts}
    with make_reporter().meter("", 1, "") as meter:
        for number in range(N):
            for prompt, answer in sample_answers(
                model,
                prompts,
                Sampling(1.0, 48, tuple(project.encoder.stop_ids), 0, f"best-of-n {number}"),
                budget=TokenBudget(1024, "test", make_reporter()),
                autocast_dtype=torch.float32,
                meter=meter,
            ).items():
                found[prompt].append(answer.tokens)
    return found


@pytest.fixture(scope="module")
def answers(project: Project, sampled: dict[str, list[Any]]) -> dict[str, list[str]]:
    return {prompt: [project.encoder.decode(list(tokens)) for tokens in found] for prompt, found in sampled.items()}


def interval(values: list[float], clusters: list[str]) -> Estimate:
    return cluster_bootstrap(values, clusters, draws=2000, confidence=0.95, seed=0)


def test_the_best_of_n_by_its_reward_is_better_by_the_known_one(
    reward_model: RewardModel,
    texts: dict[str, str],
    sampled: dict[str, list[Any]],
    answers: dict[str, list[str]],
    project: Project,
) -> None:
    tokens = {group.group: group.prompt for group in project.tokenize_pairs("eval").groups}
    groups = [TokenGroup(prompt, prompt, tokens[prompt], tuple(found)) for prompt, found in sampled.items()]
    rewards = dict(zip(sampled, reward_model.rewards(groups), strict=True))
    known = {prompt: [world_task(texts[prompt]).reward(text) for text in answers[prompt]] for prompt in answers}
    prompts = list(answers)
    mean = {p: sum(known[p]) / N for p in prompts}
    best = {p: known[p][max(range(N), key=rewards[p].__getitem__)] for p in prompts}
    gain = interval([best[p] - mean[p] for p in prompts], prompts)
    room = sum(max(known[p]) - mean[p] for p in prompts) / len(prompts)
    print(f"best of {N}: gain {gain.value:.3f} [{gain.low:.3f}, {gain.high:.3f}] of {room:.3f}")
    assert gain.low > 0.05, gain
    assert gain.value / room > 0.5, "most of what there is to win"


def test_it_judges_the_tuned_model(finished: dict[str, Any], make_reporter: Callable[[], Any]) -> None:
    """Stage evaluate with it as judge, and with the known reward: both see the same answers."""
    changes = {"train.max_steps": 40, "evaluate.num_prompts": 60}
    for name in ("precompute_ref", "train"):
        run(name, make_params(**changes), make_reporter())
    for name in ("convert_sft", "convert_preferences", "sft"):
        assert paths.metrics_file(name).is_file()
    by_world = run("evaluate", make_params(**changes), make_reporter())
    by_model = run("evaluate", make_params(**{**changes, "evaluate.judge": "reward-model"}), make_reporter())
    low, high = by_model["win_rate_ci"]
    assert low <= by_model["win_rate"] <= high
    assert by_model["kl"] == by_world["kl"]
    assert abs(by_model["win_rate"] - by_world["win_rate"]) < 0.15
    assert by_model["reward_sft"] == pytest.approx(-by_model["reward_dpo"]), "centered by prompt"
    assert "win_rate_ceiling" not in by_model


def test_a_judge_that_was_made_of_something_else_is_refused(
    finished: dict[str, Any], make_reporter: Callable[[], Any], tmp_path: Path
) -> None:
    judge = make_params(**{"evaluate.judge": "reward-model", "train.max_steps": 40, "evaluate.num_prompts": 60})
    kept = tmp_path / "kept"
    shutil.move(paths.REWARD_MODEL, kept)
    try:
        run("reward", make_params(**{"reward.loss": "none"}), make_reporter())
        assert [path.name for path in paths.REWARD_MODEL.iterdir()] == ["reward.json"]
        with pytest.raises(StaleArtifactError, match=r"models/reward holds no reward model: set reward\.loss"):
            run("evaluate", judge, make_reporter())
    finally:
        shutil.rmtree(paths.REWARD_MODEL)
        shutil.move(kept, paths.REWARD_MODEL)
