"""The reward model's losses and its training: one curve whatever the memory, and a stop that loses nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core.errors import Interrupted
from dpo_cli.core.training_params import LoraParams, RewardParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.models.adapters import FrozenBase, SftResult
from dpo_cli.models.heads import reward_head
from dpo_cli.scoring.layout import LayoutName
from dpo_cli.scoring.reward_scorer import Rewards, RewardScorer
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.fit import Fit
from dpo_cli.training.objective import RewardObjective
from dpo_cli.training.protocols import Learner
from tests import small_training
from tests.small_training import CPU, Groups, Lab, adapter, logged, same_bytes, stop_at
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


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Callable[[], Any]:
    """``model()``: the tiny model in nf4 with an adapter and a head of zeros; every call gives the same weights."""
    none = SftResult("none", "digest")
    return lambda: FrozenBase(tiny_folder, none, CPU, "nf4").reward_model_at_start(LoraParams(r=4, alpha=8.0), 0)


@pytest.fixture(scope="module")
def pairs(make_groups: Callable[..., list[TokenGroup]]) -> Groups:
    return make_groups(20, seed=1), make_groups(6, seed=2)


def train(
    model: Any,
    pairs: Groups,
    work: Path,
    reporter: Any,
    layout: LayoutName = "shared",
    objective: RewardObjective | None = None,
    **runtime: Any,
) -> Fit:
    scorer = RewardScorer(Scorer(model, torch.float32, layout), reward_head(model))
    learner = Learner(model, scorer, objective or RewardObjective())
    return small_training.train(learner, pairs, work, reporter, SETTINGS, stage="reward", **runtime)


CURVE = ("loss", "eval_loss", "rewards/margins")


@pytest.fixture(scope="module")
def whole(
    model: Any, pairs: Groups, tmp_path_factory: pytest.TempPathFactory, make_reporter: Any
) -> tuple[Any, dict[str, torch.Tensor], Fit]:
    """A model, what it was before its training, and how that went: each step in one piece, nothing computed again."""
    made = model()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    runtime: dict[str, Any] = {"max_tokens_per_microbatch": 8192, "recompute": "none"}
    return made, before, train(made, pairs, tmp_path_factory.mktemp("whole"), make_reporter(), **runtime)


def test_training_lowers_the_loss_from_ln_2_and_moves_the_adapter_and_the_head_alone(whole: Any) -> None:
    made, before, fitted = whole
    assert fitted.first("eval_loss") == pytest.approx(math.log(2), abs=1e-7)
    assert fitted.first("loss") == pytest.approx(math.log(2), abs=1e-7)
    assert fitted.last("loss") < 0.65
    moved = {name for name, value in made.state_dict().items() if not torch.equal(value, before[name])}
    assert any("score" in name for name in moved)
    assert all("lora" in name or "modules_to_save" in name for name in moved)


@pytest.mark.parametrize(
    ("budget", "layout", "recompute"), [(1, "shared", "layers"), (64, "shared", "elementwise"), (256, "padded", "none")]
)
def test_neither_the_token_budget_nor_the_layout_nor_recomputation_changes_the_loss_curve(
    budget: int,
    layout: LayoutName,
    recompute: str,
    whole: Any,
    model: Callable[[], Any],
    pairs: Groups,
    tmp_path: Path,
    reporter: Any,
) -> None:
    runtime: dict[str, Any] = {"max_tokens_per_microbatch": budget, "recompute": recompute}
    found = train(model(), pairs, tmp_path, reporter, layout, **runtime)
    assert logged(found, *CURVE) == pytest.approx(logged(whole[2], *CURVE), rel=1e-4, abs=1e-5)


def test_rankings_train_too(
    model: Callable[[], Any], make_groups: Callable[..., list[TokenGroup]], tmp_path: Path, reporter: Any
) -> None:
    groups = [*make_groups(10, completions=4, seed=1), *make_groups(6, completions=3, seed=2)]
    ranks = {group.id: list(range(1, len(group.completions) + 1)) for group in groups}
    fitted = train(model(), (groups, groups), tmp_path, reporter, objective=RewardObjective(ranks))
    expected = (10 * math.log(24) + 6 * math.log(6)) / 16  # all orders are equally likely at first
    assert fitted.first("eval_loss") == pytest.approx(expected, abs=1e-6)
    assert fitted.last("eval_loss") < expected - 0.1
    assert fitted.last("eval_rewards/kendall_tau") > 0.2


def test_stopped_and_run_again_it_makes_the_same_bytes(
    lab: Lab, whole: Any, model: Callable[[], Any], pairs: Groups
) -> None:
    runtime: dict[str, Any] = {"max_tokens_per_microbatch": 8192, "recompute": "none"}
    with pytest.raises(Interrupted, match=r"reward: stopped and saved at step 2 of 6; run it again to resume"):
        train(model(), pairs, lab.folder, lab.reporter(stop_at(2)), **runtime)
    resumed, reporter = model(), lab.reporter()
    fitted = train(resumed, pairs, lab.folder, reporter, **runtime)
    assert reporter.said == ["reward: going on from checkpoint-2"]
    assert logged(fitted, *CURVE) == logged(whole[2], *CURVE)
    assert same_bytes(adapter(resumed), adapter(whole[0]))
