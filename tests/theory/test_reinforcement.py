"""Advantages and PPO's losses against formulas written again with plain floats, and the policy gradient itself."""

from __future__ import annotations

import math

import pytest
import torch

from dpo_cli.losses.reinforcement import (
    KlController,
    clipped_surrogate,
    clipped_value_loss,
    generalized_advantages,
    leave_one_out,
    token_rewards,
    whiten,
)

F64 = torch.float64
REWARDS, VALUES = [0.5, -0.25, 0.0, 2.0], [1.0, 0.5, -0.5, 1.5]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.0), (0.97, 1.0)])
def test_generalized_advantages_are_the_sum_over_deltas(gamma: float, lam: float) -> None:
    """A_t = sum_l (gamma lam)^l (r_{t+l} + gamma V_{t+l+1} - V_{t+l}), V = 0 behind the end.

    With lam 0 it is the one-step error; with lam 1 it is the discounted return less V_t.
    """
    following = [*VALUES[1:], 0.0]
    deltas = [r + gamma * after - v for r, v, after in zip(REWARDS, VALUES, following, strict=True)]
    expected = [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, 4)) for t in range(4)]
    found = generalized_advantages(torch.tensor(REWARDS, dtype=F64), torch.tensor(VALUES, dtype=F64), gamma, lam)
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    if lam == 0:
        assert expected == deltas
    if lam == 1:
        returns = [sum(gamma ** (k - t) * REWARDS[k] for k in range(t, 4)) for t in range(4)]
        assert (found + torch.tensor(VALUES, dtype=F64)).tolist() == pytest.approx(returns, abs=1e-12)


def test_the_reward_comes_last_and_each_token_pays_what_it_leaves_the_reference_by() -> None:
    """sum_t r_t = r - c sum_t log(pi / pi_ref)(y_t): the objective of eq. 3 of Rafailov et al. 2023, one sample."""
    ratios = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
    found = token_rewards(3.0, ratios.clone(), 0.1)
    assert found.tolist() == pytest.approx([-0.05, 0.1, 2.8], abs=1e-12)
    assert found.sum().item() == pytest.approx(3.0 - 0.1 * 1.5, abs=1e-12)


def test_leave_one_out_takes_the_mean_of_the_others() -> None:
    """A_k = R_k - sum_{j != k} R_j / (K - 1)."""
    returns = [[1.0, 4.0, -2.0], [0.0, 0.0, 0.0]]
    expected = [[r - (sum(row) - r) / 2 for r in row] for row in returns]
    assert leave_one_out(torch.tensor(returns, dtype=F64)).tolist() == expected
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out(torch.ones(3, 1, dtype=F64))


def test_whitened_advantages_have_mean_0_and_deviation_1() -> None:
    found = whiten(torch.tensor([1.0, 2.0, 4.0, -3.0], dtype=F64))
    assert found.mean().item() == pytest.approx(0, abs=1e-12)
    assert found.square().mean().sqrt().item() == pytest.approx(1, abs=1e-7)
    assert whiten(torch.full((3,), 2.0, dtype=F64)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("ratio", [0.5, 0.81, 1.0, 1.19, 1.5])
@pytest.mark.parametrize("advantage", [2.0, -0.5])
def test_the_surrogate_is_clipped_where_the_ratio_pays_no_more(ratio: float, advantage: float) -> None:
    """-min(rho A, clip(rho, 0.8, 1.2) A); its gradient is -rho A grad log pi, or 0 where the clipped one is less."""
    logp = torch.tensor([math.log(ratio) - 1.0], dtype=F64, requires_grad=True)
    loss = clipped_surrogate(logp, torch.tensor([-1.0], dtype=F64), torch.tensor([advantage], dtype=F64), 0.2)
    clipped = min(max(ratio, 0.8), 1.2)
    assert loss.item() == pytest.approx(-min(ratio * advantage, clipped * advantage), abs=1e-12)
    loss.sum().backward()
    flat = ratio * advantage > clipped * advantage
    assert logp.grad is not None
    assert logp.grad.item() == pytest.approx(0.0 if flat else -ratio * advantage, abs=1e-12)


@pytest.mark.parametrize(("value", "expected"), [(1.1, 0.5 * 0.9**2), (2.5, 0.5 * 0.8**2), (0.0, 0.5 * 2.0**2)])
def test_the_value_loss_is_the_worse_of_both(value: float, expected: float) -> None:
    """max((V - R)^2, (V_old + clip(V - V_old, -0.2, 0.2) - R)^2) / 2 with V_old = 1 and R = 2."""
    found = clipped_value_loss(
        torch.tensor([value], dtype=F64), torch.ones(1, dtype=F64), torch.full((1,), 2.0, dtype=F64), 0.2
    )
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_the_coefficient_rises_above_its_target_and_falls_below_it() -> None:
    """c (1 + gain clip(KL / target - 1, -0.2, 0.2))."""
    controller = KlController(0.2, target=4.0, gain=0.1)
    controller.update(4.2)
    assert controller.coefficient == pytest.approx(0.2 * (1 + 0.1 * 0.05), abs=1e-12)
    controller.update(100.0)
    assert controller.coefficient == pytest.approx(0.2 * 1.005 * 1.02, abs=1e-12)
    controller.update(0.0)
    assert controller.coefficient == pytest.approx(0.2 * 1.005 * 1.02 * 0.98, abs=1e-12)
    fixed = KlController(0.2)
    fixed.update(100.0)
    assert fixed.coefficient == 0.2


def policy(logits: torch.Tensor) -> torch.Tensor:
    return logits.log_softmax(-1)


@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_expected_first_gradient_is_the_gradient_of_the_regularized_reward(beta: float) -> None:
    """E over y ~ pi of the surrogate's gradient at rho = 1 equals -grad J, J = E[r] - beta KL(pi || pi_ref).

    With R(y) = r(y) - beta log(pi / pi_ref)(y) held fixed as a sample's return, and any baseline b,
    sum_y pi(y) (R(y) - b) grad log pi(y) = grad J, since E[grad log pi] = 0.
    """
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, generator=generator, dtype=F64, requires_grad=True)
    reference = policy(torch.randn(6, generator=generator, dtype=F64))
    rewards = torch.randn(6, generator=generator, dtype=F64)
    logps = policy(logits)
    objective = (logps.exp() * (rewards - beta * (logps - reference))).sum()
    (expected,) = torch.autograd.grad(objective, logits)

    logps = policy(logits)
    returns = torch.stack(
        [token_rewards(r.item(), ratio[None].clone(), beta).sum()
         for r, ratio in zip(rewards, (logps - reference).detach(), strict=True)]
    )  # fmt: skip
    losses = clipped_surrogate(logps, logps.detach(), returns - 0.7, 0.2)
    (found,) = torch.autograd.grad((logps.exp().detach() * losses).sum(), logits)
    assert torch.allclose(-found, expected, atol=1e-12)
