"""The step-0 gate: it lets a right cache through, whatever its rounding, and no other one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpo_cli.core.errors import StaleArtifactError
from dpo_cli.core.params import TrainParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training import gate
from dpo_cli.training.gate import check_step_zero
from dpo_cli.training.objective import PairObjective
from tests.small_training import reference


@pytest.fixture(scope="module")
def model(policy: Callable[..., Any]) -> Any:
    """A policy that no test changes."""
    return policy()


@pytest.fixture
def pairs(make_groups: Callable[..., list[TokenGroup]]) -> list[TokenGroup]:
    return make_groups(20, seed=1)


@pytest.mark.parametrize("budget", [16, 4096])
def test_the_gate_lets_the_reference_through(budget: int, model: Any, pairs: Any) -> None:
    scorer = Scorer(model, torch.float32)
    objective = PairObjective(TrainParams(beta=0.1), reference(scorer, pairs))
    seen = check_step_zero(model, scorer, objective, pairs, budget)
    assert seen.loss == pytest.approx(math.log(2), abs=1e-5)
    assert seen.max_abs_margin <= 1e-4
    assert seen.num_pairs == 20


def test_rounding_is_measured_on_few_pairs_the_longest_among_them(
    model: Any, make_groups: Callable[..., list[TokenGroup]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes a pass for each two answers and one for each by itself, at every start on a GPU."""
    groups = make_groups(64, completion_lengths=(1, 40))
    scorer = Scorer(model, torch.bfloat16)
    scored: list[list[TokenGroup]] = []
    score = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda self, groups, **asked: (scored.append(groups), score(self, groups))[1])
    with torch.no_grad():
        assert gate._batch_noise(scorer, groups) > 0
    assert len(scored) == 16 + 2 * 16
    assert max(group.longest for batch in scored for group in batch) == max(group.longest for group in groups)


@pytest.mark.parametrize("value", [0.01, -3.0, math.nan, math.inf])
def test_the_gate_stops_a_cache_of_another_graph_and_names_the_row(value: float, model: Any, pairs: Any) -> None:
    scorer = Scorer(model, torch.float32)
    logps = reference(scorer, pairs)
    row = pairs[7].id
    logps[row] = [logps[row][0] + value, logps[row][1]]
    objective = PairObjective(TrainParams(beta=0.1), logps)
    with pytest.raises(StaleArtifactError, match=r"differ before the first step.*run: dpo-cli precompute-ref") as error:
        check_step_zero(model, scorer, objective, pairs, 4096)
    assert row in str(error.value)


def test_live_dropout_does_not_blind_the_gate(policy: Callable[..., Any], pairs: Any) -> None:
    model = policy(dropout=0.5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    scorer = Scorer(model.eval(), torch.float32)
    objective = PairObjective(TrainParams(beta=1.0), reference(scorer, pairs))
    assert check_step_zero(model, scorer, objective, pairs, 4096).max_abs_margin <= 1e-4


@pytest.mark.parametrize("budget", [16, 4096])
def test_a_right_cache_in_bfloat16_passes_at_any_budget(budget: int, model: Any, pairs: Any) -> None:
    scorer = Scorer(model, torch.bfloat16)
    with torch.no_grad():  # as precompute-ref scores: single answers, many together
        singles = [
            TokenGroup(group.id, group.group, group.prompt, (completion,))
            for group in pairs
            for completion in group.completions
        ]
        logps = scorer.score(singles).logps_BK[:, 0].view(-1, 2).tolist()
    cached = {group.id: row for group, row in zip(pairs, logps, strict=True)}
    objective = PairObjective(TrainParams(beta=0.1), cached)
    check_step_zero(model, scorer, objective, pairs, budget)
    cached[pairs[3].id][0] += 1.0
    with pytest.raises(StaleArtifactError):
        check_step_zero(model, scorer, objective, pairs, budget)


@pytest.fixture
def narrow(model: Any, pairs: Any) -> Callable[..., Any]:
    """``narrow(noise, gap)``: the gate in bfloat16, told how much is rounding, on a cache that is off by gaps."""

    def check(noise: float, gap: Callable[[int], float], monkeypatch: pytest.MonkeyPatch) -> Any:
        scorer = Scorer(model, torch.bfloat16)
        monkeypatch.setattr(gate, "_batch_noise", lambda *_: noise)
        logps = reference(scorer, pairs)
        off = {id: [value + gap(index) for value in row] for index, (id, row) in enumerate(logps.items())}
        return check_step_zero(model, scorer, PairObjective(TrainParams(beta=0.1), off), pairs, 4096)

    return check


def test_differences_that_lean_to_one_side_are_no_rounding(
    narrow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of a nat is within what a noisy model is allowed, but not in the same direction for every pair."""
    narrow(0.1, lambda index: (-1) ** index * 0.2, monkeypatch)
    with pytest.raises(StaleArtifactError, match=r"by -0\.2 nats an answer on average \(allowed 0\.05\)"):
        narrow(0.1, lambda index: 0.2, monkeypatch)


def test_a_noisy_model_does_not_deafen_the_gate(narrow: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = narrow(1.0, lambda index: (-1) ** index * 0.3, monkeypatch)
    assert "a difference of 4 between policy and reference would have to be allowed; no more than 0.5 was" in seen.doubt
    with pytest.raises(StaleArtifactError, match=r"by 0\.6 nats in row .* \(allowed 0\.5\)"):
        narrow(1.0, lambda index: 0.6 if index == 3 else 0.0, monkeypatch)
    assert narrow(0.01, lambda index: 0.0, monkeypatch).doubt is None
