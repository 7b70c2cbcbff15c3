"""Stage ppo on a tiny model in nf4: its first step, its rewards, and a run that was killed."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, ParamsError, StaleArtifactError
from dpo_cli.core.progress import SilentReporter
from dpo_cli.evaluation.compare import compare
from dpo_cli.judging import prepare
from dpo_cli.judging.judge import Judgment, Question, one_by_one
from dpo_cli.judging.prepare import ReadyJudge
from dpo_cli.judging.reward_model import RewardModel
from dpo_cli.models.adapters import ADAPTER_FILES
from dpo_cli.models.project import open_project
from dpo_cli.rlhf import rewards as rewards_module
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.stages.evaluate import evaluate_model
from tests.small_training import Killed, kill_at
from tests.tiny_project import CONVERTED, run_stages, tiny_params, write_raw

Steps = Callable[..., dict[str, Any]]
PPO: dict[str, Any] = {
    "reward": "reward-model",
    "rounds": 2,
    "prompts_a_round": 8,
    "batch_size": 4,
    "answers": 2,
    "max_new_tokens": 6,
    "learning_rate": 1e-3,
}


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A project with SFT and a reward model; not to be changed."""
    folder = tmp_path_factory.mktemp("tuned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_raw()
        run_stages(tiny_params(tiny_folder), SilentReporter(), *CONVERTED, "sft", "reward")
    return folder


@pytest.fixture
def ppo(project: Path, tuned: Path, tiny_folder: Path, reporter: Any) -> Steps:
    """``ppo(rounds=3)``: run the stage with some of its settings changed, in a copy of that project."""
    shutil.copytree(tuned, project, dirs_exist_ok=True)

    def run(told: Any = reporter, compute_dtype: str = "float32", **changes: Any) -> dict[str, Any]:
        runtime = {"checkpoint_minutes": 0.0, "compute_dtype": compute_dtype}
        return run_stages(tiny_params(tiny_folder, ppo=PPO | changes, runtime=runtime), told, "ppo")

    return run


def log() -> list[dict[str, float]]:
    lines = (paths.report_dir("ppo") / "steps.tsv").read_text(encoding="utf-8").splitlines()
    names = lines[0].split("\t")
    return [dict(zip(names, map(float, line.split("\t")), strict=True)) for line in lines[1:]]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"estimator": "rloo"},
        {"target_kl": 0.5},
        {"compute_dtype": "bfloat16", "reward": "world", "missing_eos_penalty": 1.0},
    ],
    ids=str,
)
def test_the_first_step_is_taken_by_the_reference(ppo: Steps, changes: dict[str, Any]) -> None:
    """The ratio is exactly 1 and the KL exactly 0: old, new and reference are one model, in 4 and in 16 bits, too."""
    metrics = ppo(**changes)
    first, *_, last = log()
    assert (first["val/ratio"], first["policy/approxkl"], first["objective/kl"]) == (1.0, 0.0, 0.0)
    assert last["val/ratio"] != 1.0
    assert metrics["num_steps"] == 2 * 2 * 2
    assert all((paths.PPO_MODEL / name).is_file() for name in ADAPTER_FILES)
    adapter = json.loads((paths.PPO_MODEL / ADAPTER_FILES[0]).read_text(encoding="utf-8"))
    assert adapter["task_type"] == "CAUSAL_LM", "the value head stays behind"
    moved = {entry["objective/kl_coefficient"] for entry in log()}
    assert (len(moved) > 1) == ("target_kl" in changes)


@pytest.mark.parametrize(
    ("changes", "saved", "rounds"),
    [
        pytest.param({"target_kl": 0.5}, 4, [1, 1, 1, 1, 2, 2, 2, 2], id="between two rounds"),
        pytest.param({"estimator": "rloo"}, 3, [1, 1, 1, 1, 2, 2, 2, 2], id="within a round"),
        pytest.param({"max_step_kl": 1e-9}, 3, [1, 1, 1, 2, 2, 3, 3, 4], id="behind a round that ended early"),
    ],
)
def test_killed_it_ends_in_the_same_bytes(
    ppo: Steps, reporter: Any, changes: dict[str, Any], saved: int, rounds: list[int]
) -> None:
    """Four steps make a round, of the eight that there are; the more rounds, the more of them end early.

    The first step has no learning rate, so that it ends no round.
    """
    changes = changes | {"prompts_a_round": 4, "batch_size": 2}
    ppo(**changes)
    whole, steps = (paths.PPO_MODEL / ADAPTER_FILES[1]).read_bytes(), log()
    assert [step["objective/round"] for step in steps] == rounds
    shutil.rmtree(paths.PPO_MODEL)
    with pytest.raises(Killed):
        ppo(type(reporter)(kill_at(saved + 1)), **changes)
    ppo(**changes)
    assert f"ppo: going on from checkpoint-{saved}" in reporter.said
    assert (paths.PPO_MODEL / ADAPTER_FILES[1]).read_bytes() == whole
    assert log() == steps


def test_first_and_last_round_are_means_over_prompts(ppo: Steps) -> None:
    """Five prompts in steps of four and one; the last round has but the step that was left to it."""
    metrics = ppo(prompts_a_round=5, batch_size=4, max_step_kl=1e-9, answers=1)
    steps = log()
    assert [step["objective/round"] for step in steps] == [1, 1, 1, 2, 2, 3, 3, 4]
    for name, key in (("score", "objective/scores"), ("kl", "objective/kl"), ("entropy", "objective/entropy")):
        assert metrics[f"{name}_start"] == pytest.approx((4 * steps[0][key] + steps[1][key]) / 5, rel=1e-6)
        assert metrics[name] == pytest.approx(steps[-1][key], rel=1e-6)


def test_without_a_reward_there_is_a_marker_alone(ppo: Steps) -> None:
    assert ppo(reward="none", rounds=50, prompts_a_round=64)["method"] == "none"
    assert [path.name for path in paths.PPO_MODEL.iterdir()] == ["ppo.json"]


def test_the_reward_models_adapter_says_the_same_beside_the_policy(
    ppo: Steps, tiny_folder: Path, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One set of frozen weights with three adapters gives the rewards of the reward model that is loaded by itself."""
    seen: list[tuple[Any, Any]] = []
    opened = rewards_module.open_rewarder

    def watched(*arguments: Any) -> Any:
        reward = opened(*arguments)
        return lambda groups: seen.append((list(groups), found := reward(groups))) or found

    monkeypatch.setattr(rewards_module, "open_rewarder", watched)
    ppo()
    project = open_project(tiny_params(tiny_folder), reporter, "score")
    alone = RewardModel.load(paths.REWARD_MODEL, project)
    assert len(seen) == 2
    for groups, found in seen:
        expected = alone.rewards(groups)
        assert torch.allclose(torch.tensor(found), torch.tensor(expected), atol=1e-5)
    assert any(abs(reward) > 1e-3 for _, found in seen for row in found for reward in row)


def test_the_worlds_reward_is_0_or_1_for_each_answer(ppo: Steps) -> None:
    ppo(reward="world", rounds=1)
    assert all(0 <= entry["objective/scores"] <= 1 for entry in log())


def test_an_answer_that_does_not_end_pays_for_it(ppo: Steps) -> None:
    plain = ppo(rounds=1)["score"]
    steps = log()
    ppo(rounds=1, missing_eos_penalty=2.0)
    assert math.isfinite(plain)
    assert log()[0]["objective/scores"] < steps[0]["objective/scores"]


def test_an_own_reward_takes_the_place_of_the_settings(ppo: Steps, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is said of answers that do not end holds for it, too."""
    opened = rewards_module.open_rewarder
    monkeypatch.setattr(rewards_module, "open_rewarder", lambda *given: opened(*given, known=lambda *_: 5.0))
    ppo(rounds=1, missing_eos_penalty=2.0)
    scores = [entry["objective/scores"] for entry in log()]
    assert all(3 <= score <= 5 for score in scores)
    assert min(scores) < 5


def test_a_reward_model_of_other_data_is_refused(ppo: Steps) -> None:
    manifest = paths.REWARD_MODEL / "reward.json"
    manifest.chmod(0o644)
    content = json.loads(manifest.read_text(encoding="utf-8"))
    content["made_of"]["data/preference"] = {"train": "0"}
    manifest.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(StaleArtifactError, match="models/reward/reward.json: made of another data/preference"):
        ppo()


def test_it_is_evaluated_and_compared_like_any_model(ppo: Steps, tiny_folder: Path, reporter: Any) -> None:
    """It was trained on this project's data, so nothing is warned of; beta is but the unit of its margins."""
    run_stages(tiny_params(tiny_folder), reporter, "precompute_ref", "train")
    ppo()
    margins = []
    for beta in (0.1, 0.2):
        settings = {"judge": "world", "num_prompts": 6, "max_new_tokens": 6, "bootstrap_draws": 200}
        params = tiny_params(tiny_folder, evaluate=settings, train={"beta": beta})
        metrics = evaluate_model(params, paths.PPO_MODEL, Path("evaluations/ppo"), reporter, beta_given=True)
        margins.append(metrics["margin"])
        assert metrics["num_leaked_prompts"] == 0
        assert not metrics["learns_log_ratio"]
        assert "training" not in metrics
    assert margins[1] == pytest.approx(2 * margins[0], rel=1e-9)
    assert any("has no beta" in said for said in reporter.said)
    assert not [said for said in reporter.warned if "trained" in said]
    evaluate_model(params, paths.DPO_MODEL, Path("evaluations/dpo"), reporter)
    differences = compare(["evaluations/dpo", "evaluations/ppo"], None, ["kl"], every=False).differences
    assert differences["evaluate.kl"][0].num_prompts == 6
    ppo(reward="none")
    with pytest.raises(StaleArtifactError, match="models/ppo holds no model: set ppo.reward in params.yaml"):
        evaluate_model(params, paths.PPO_MODEL, Path("evaluations/none"), reporter)


@pytest.mark.parametrize("training", [False, True], ids=["rollouts", "steps"])
def test_where_memory_runs_out_rollouts_and_steps_go_on_in_smaller_micro_batches(
    ppo: Steps, reporter: Any, monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    """A budget that the rollouts halve is the steps', too: the ratio is exactly 1. The steps' own costs last digits."""
    ppo(rounds=1)
    expected = log()
    score = Scorer.score

    def limited(self: Scorer, groups: Any, **asked: Any) -> Any:
        if len(groups) > 1 and torch.is_grad_enabled() == training:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return score(self, groups, **asked)

    monkeypatch.setattr(Scorer, "score", limited)
    metrics = ppo(rounds=1)
    assert reporter.warned
    assert metrics["max_tokens_per_microbatch"] < 100
    found = log()
    assert abs(found[0]["val/ratio"] - 1) <= (1e-6 if training else 0)
    for name in ("loss", "objective/kl", "policy/approxkl"):
        assert [step[name] for step in found] == pytest.approx([step[name] for step in expected], rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompts_a_round": 5000}, DataError, r"has \d+ prompts; set ppo.prompts_a_round, now 5000, to no more"),
        ({"max_new_tokens": 10**6}, ParamsError, "ppo.max_new_tokens . the longest prompt must be <= "),
    ],
)
def test_what_does_not_fit_is_refused_before_a_model_is_loaded(
    ppo: Steps, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ppo(**changes)


def test_a_reward_that_is_not_there_says_what_to_run(ppo: Steps, tiny_folder: Path, reporter: Any) -> None:
    run_stages(tiny_params(tiny_folder, reward={"loss": "none"}), reporter, "reward")
    with pytest.raises(StaleArtifactError, match="set reward.loss in params.yaml, then run: dpo-cli reward"):
        ppo()


class _Longest:
    """Prefers the longer answer, and the first one a little."""

    remedy = "none"

    def judge(self, questions: Sequence[Question]) -> Iterator[tuple[int, Judgment]]:
        yield from one_by_one(lambda _, a, b: 0.1 * (len(a) > len(b)) + 0.6, questions)


def test_a_judge_compares_with_the_references_greedy_answer_in_both_orders(
    ppo: Steps, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p = (p1 + 1 - p2) / 2 is 0.55, 0.5 or 0.45, whatever the place is worth."""
    fake = ReadyJudge(_Longest(), "fake", "fake")
    monkeypatch.setattr(prepare, "prepare_judge", lambda *_: lambda _: fake)
    ppo(reward="hf", batch_size=1, answers=1, rounds=1)
    earned = {entry["objective/scores"] for entry in log()}
    assert all(any(abs(each - level) < 1e-9 for level in (0.45, 0.5, 0.55)) for each in earned)
    assert len(earned) > 1


def test_a_local_model_as_judge_gives_the_reward(
    ppo: Steps, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ParamsError, match="judge hf needs its model: set runtime.judge_path"):
        ppo(reward="hf")
    monkeypatch.setenv(prepare.JUDGE_PATH, str(tiny_folder))
    ppo(reward="hf", rounds=1)
    assert all(0 < entry["objective/scores"] < 1 for entry in log())
    assert log()[0]["val/ratio"] == 1
    assert "hf" in json.loads((paths.PPO_MODEL / "ppo.json").read_text(encoding="utf-8"))["settings"]["evaluate"]
