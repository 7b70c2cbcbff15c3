"""The reward model's losses and its training: one curve whatever the memory, and a stop that loses nothing."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core.errors import Interrupted
from dpo_cli.core.params import LoraParams, RewardParams, RuntimeParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import FrozenBase, SftResult, reward_head
from dpo_cli.scoring.layout import LayoutName
from dpo_cli.scoring.scorer import Rewards, RewardScorer, Scorer
from dpo_cli.training.fit import Fit, fit
from dpo_cli.training.job import Job
from dpo_cli.training.objective import RewardObjective
from dpo_cli.training.protocols import Learner
from tests.waiting import NoWaiting

SETTINGS = RewardParams(loss="bradley_terry", learning_rate=5e-3, batch_size=8, epochs=2.0, eval_steps=3)
SHAPES = ((2.0, 1.0), (1.0, 1.0), (0.0, 3.0))


# --- the loss -----------------------------------------------------------------------------


def test_of_pairs_it_is_bradley_terry_with_its_gradient(make_groups: Callable[..., list[TokenGroup]]) -> None:
    groups = make_groups(3)
    rewards = torch.tensor(SHAPES, dtype=torch.float64, requires_grad=True)
    result = RewardObjective().losses(groups, Rewards(rewards), groups)
    margins = rewards[:, 0] - rewards[:, 1]
    expected = -torch.nn.functional.logsigmoid(margins)
    assert torch.equal(result.losses_B, expected)
    (ours,) = torch.autograd.grad(result.losses_B.sum(), rewards)
    weight = (-margins).sigmoid().detach()  # -sigma(r_l - r_w) for the chosen one
    assert torch.allclose(ours, torch.stack([-weight, weight], dim=1), atol=1e-12)
    assert RewardObjective().weight(groups) == 3


def test_a_ranking_of_two_is_a_pair(make_groups: Callable[..., list[TokenGroup]]) -> None:
    groups = make_groups(3)
    rewards = Rewards(torch.tensor(SHAPES, dtype=torch.float64))
    pairs = RewardObjective().losses(groups, rewards, groups)
    rankings = RewardObjective({group.id: [1, 2] for group in groups}).losses(groups, rewards, groups)
    assert torch.equal(pairs.losses_B, rankings.losses_B)
    assert rankings.metrics["rewards/accuracies"].tolist() == pairs.metrics["rewards/accuracies"].tolist()


@pytest.mark.parametrize("ranks", [None, [1, 2], [1, 1]])
def test_nothing_waits_for_the_device(ranks: list[int] | None, make_groups: Callable[..., list[TokenGroup]]) -> None:
    groups = make_groups(3)
    objective = RewardObjective(None if ranks is None else {group.id: ranks for group in groups})
    rewards = torch.zeros(3, 2, dtype=torch.float64, device="meta", requires_grad=True)
    with NoWaiting():
        result = objective.losses(groups, Rewards(rewards), groups)
        result.losses_B.sum().backward()


def test_what_is_logged_is_centered_and_a_tie_counts_one_half(make_groups: Callable[..., list[TokenGroup]]) -> None:
    groups = make_groups(3)
    metrics = []
    for constant in (0.0, 64.0):
        rewards = Rewards(torch.tensor(SHAPES, dtype=torch.float64) + constant)
        metrics.append(RewardObjective().losses(groups, rewards, groups).metrics)
    assert metrics[0]["rewards/accuracies"].tolist() == [1.0, 0.5, 0.0]
    assert metrics[0]["rewards/margins"].tolist() == [1.0, 0.0, -3.0]
    assert metrics[0]["rewards/chosen"].tolist() == [0.5, 0.0, -1.5]
    assert metrics[0]["rewards/ties"].tolist() == [0.0, 1.0, 0.0]
    assert all(torch.equal(value, metrics[1][name]) for name, value in metrics[0].items())


def test_ties_in_a_ranking_are_taken_as_they_are_asked_for(make_groups: Callable[..., list[TokenGroup]]) -> None:
    """r = (0, 0, 0), ranks 1, 2, 2: average: log 3 + log 2; groups: log 3 and nothing for the tie."""
    groups = make_groups(1, completions=3)
    ranks, rewards = {groups[0].id: [1, 2, 2]}, Rewards(torch.zeros(1, 3, dtype=torch.float64))
    average = RewardObjective(ranks, "average").losses(groups, rewards, groups)
    apart = RewardObjective(ranks, "groups").losses(groups, rewards, groups)
    assert average.losses_B.item() == pytest.approx(math.log(6))
    assert apart.losses_B.item() == pytest.approx(math.log(3))
    assert average.metrics["rewards/kendall_tau"].item() == 0


# --- the training -------------------------------------------------------------------------


@pytest.fixture
def model(tiny_folder: Path, cpu: Any) -> Callable[[], Any]:
    """``model()``: the tiny model in nf4 with an adapter and a head of zeros; every call gives the same weights."""

    def make() -> Any:
        none = SftResult("none", "digest")
        return FrozenBase(tiny_folder, none, cpu, "nf4").reward_model_at_start(LoraParams(r=4, alpha=8.0), 0)

    return make


@pytest.fixture
def pairs(make_groups: Callable[..., list[TokenGroup]]) -> tuple[list[TokenGroup], list[TokenGroup]]:
    return make_groups(20, seed=1), make_groups(6, seed=2)


def train(
    model: Any,
    pairs: tuple[list[TokenGroup], list[TokenGroup]],
    work: Path,
    cpu: Any,
    reporter: Any,
    runtime: RuntimeParams | None = None,
    layout: LayoutName = "shared",
    objective: RewardObjective | None = None,
) -> Fit:
    work.mkdir(parents=True, exist_ok=True)
    scorer = RewardScorer(Scorer(model, torch.float32, layout), reward_head(model))
    job = Job("reward", work, cpu, runtime or RuntimeParams(), reporter)
    return fit(Learner(model, scorer, objective or RewardObjective()), *pairs, SETTINGS, job)


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def curve(fitted: Fit) -> list[float]:
    return [
        entry[name] for name in ("loss", "eval_loss", "rewards/margins") for entry in fitted.history if name in entry
    ]


def test_training_lowers_the_loss_from_ln_2_and_moves_the_adapter_and_the_head_alone(
    model: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, reporter: Any
) -> None:
    made = model()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    fitted = train(made, pairs, tmp_path / "a", cpu, reporter)
    assert fitted.first("eval_loss") == pytest.approx(math.log(2), abs=1e-7)
    assert fitted.first("loss") == pytest.approx(math.log(2), abs=1e-7)
    assert fitted.last("loss") < 0.65
    moved = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert any("score" in name for name in moved)
    assert all("lora" in name or "modules_to_save" in name for name in moved)


@pytest.mark.parametrize(("budget", "layout"), [(1, "shared"), (64, "shared"), (8192, "shared"), (256, "padded")])
def test_neither_the_token_budget_nor_the_layout_changes_the_loss_curve(
    budget: int, layout: LayoutName, model: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, reporter: Any
) -> None:
    runtime = RuntimeParams(max_tokens_per_microbatch=budget)
    found = train(model(), pairs, tmp_path / "a", cpu, reporter, runtime, layout)
    whole = RuntimeParams(max_tokens_per_microbatch=8192)
    expected = train(model(), pairs, tmp_path / "b", cpu, reporter, whole)
    assert curve(found) == pytest.approx(curve(expected), rel=1e-4, abs=1e-5)


def test_rankings_train_too(
    model: Callable[[], Any],
    make_groups: Callable[..., list[TokenGroup]],
    tmp_path: Path,
    cpu: Any,
    reporter: Any,
) -> None:
    groups = [*make_groups(10, completions=4, seed=1), *make_groups(6, completions=3, seed=2)]
    ranks = {group.id: list(range(1, len(group.completions) + 1)) for group in groups}
    fitted = train(
        model(), (groups, groups), tmp_path, cpu, reporter, objective=RewardObjective(ranks), layout="shared"
    )
    expected = (10 * math.log(24) + 6 * math.log(6)) / 16  # all orders are equally likely at first
    assert fitted.first("eval_loss") == pytest.approx(expected, abs=1e-6)
    assert fitted.last("eval_loss") < expected - 0.1
    assert fitted.last("eval_rewards/kendall_tau") > 0.2


@pytest.mark.parametrize("recompute", ["elementwise", "layers"])
def test_recomputation_changes_nothing(
    recompute: str, model: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, reporter: Any
) -> None:
    runtime = RuntimeParams.model_validate({"recompute": recompute})
    found = train(model(), pairs, tmp_path / "a", cpu, reporter, runtime)
    expected = train(model(), pairs, tmp_path / "b", cpu, reporter, RuntimeParams(recompute="none"))
    assert curve(found) == pytest.approx(curve(expected), rel=1e-5, abs=1e-6)


def test_stopped_and_run_again_it_makes_the_same_bytes(
    model: Callable[[], Any], pairs: Any, tmp_path: Path, cpu: Any, make_reporter: Any
) -> None:
    whole = model()
    uninterrupted = train(whole, pairs, tmp_path / "whole", cpu, make_reporter())

    def stop(done: int) -> None:
        if done == 2:
            os.kill(os.getpid(), signal.SIGINT)

    work = tmp_path / "stopped"
    with pytest.raises(Interrupted, match=r"reward: stopped and saved at step 2 of 6; run it again to go on"):
        train(model(), pairs, work, cpu, make_reporter(stop))
    resumed = model()
    reporter = make_reporter()
    fitted = train(resumed, pairs, work, cpu, reporter)
    assert reporter.said == ["reward: going on from checkpoint-2"]
    assert curve(fitted) == curve(uninterrupted)
    for name, value in trained(whole).items():
        assert torch.equal(trained(resumed)[name], value), name
