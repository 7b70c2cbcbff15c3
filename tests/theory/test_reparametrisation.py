"""The reward inside the policy (Rafailov et al. 2023, sections 4 and 5.1, appendix A.1, A.5, A.6), 1e-10.

Legend: X prompts, Y answers.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dpo_cli.evaluation.kl import sequence_kl
from dpo_cli.losses.pairwise import log_ratios, sigmoid
from tests.theory.worlds import (
    BETAS,
    World,
    float64,
    make_policy,
    make_world,
    minimize,
    ordered_pairs,
    pair_losses,
    total_variation,
)

WORLD = make_world(prompts=3, answers=4)
SHIFTS_X = float64([2.5, -7.0, 11.0])
SHIFTED = World(WORLD.reward_XY + SHIFTS_X[:, None], WORLD.reference_XY)
"""A reward of the same class: Definition 1, r'(x, y) - r(x, y) = f(x)."""


def implicit_rewards(beta: float, policy_XY: torch.Tensor, reference_XY: torch.Tensor) -> torch.Tensor:
    """The product's beta log(pi / pi_ref) of each answer, [X, Y]: two by two, as a loss sees them."""
    return (beta * log_ratios(policy_XY.reshape(-1, 2), reference_XY.reshape(-1, 2))).view(policy_XY.shape)


def divergence(policy_XY: torch.Tensor, other_XY: torch.Tensor) -> torch.Tensor:
    """The product's KL(pi || other) of each prompt, [X]: answers of one token."""
    rows = zip(policy_XY, other_XY, strict=True)
    return float64([sequence_kl(policy[None], other[None], [0]).exact for policy, other in rows])


def value(world: World, beta: float, policy_XY: torch.Tensor) -> torch.Tensor:
    """J(pi) = E_pi[r] - beta KL(pi || pi_ref) of each prompt, [X]: eq. 3."""
    return (policy_XY.exp() * world.reward_XY).sum(1) - beta * divergence(policy_XY, world.reference_XY)


def project(reward_XY: torch.Tensor, reference_XY: torch.Tensor, beta: float) -> torch.Tensor:
    """f(r; pi_ref, beta) = r - beta log sum_y pi_ref exp(r / beta): eq. 8."""
    return reward_XY - beta * World(reward_XY, reference_XY).normalizer(beta).log()[:, None]


# --- the optimal policy -----------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_a_policy_falls_short_of_the_optimum_by_its_divergence_from_it(beta: float) -> None:
    """Appendix A.1: J(pi*) - J(pi) = beta KL(pi || pi*).

    By eq. 4 r = beta log(pi* / pi_ref) + beta log Z, so J(pi) = beta log Z - beta KL(pi || pi*).
    """
    optimum = WORLD.optimum(beta).log()
    for policy in (WORLD.reference_XY, *(make_policy(WORLD, seed) for seed in range(1, 20))):
        short = value(WORLD, beta, optimum) - value(WORLD, beta, policy)
        assert short.min() > 1e-3
        assert (short - beta * divergence(policy, optimum)).abs().max() < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_the_best_value_is_beta_log_z(beta: float) -> None:
    """Appendix A.1: J(pi*) = beta log Z, since KL(pi* || pi*) = 0."""
    found = value(WORLD, beta, WORLD.optimum(beta).log())
    assert (found - beta * WORLD.normalizer(beta).log()).abs().max() < 1e-10


@pytest.mark.parametrize("beta", [0.5, 1.0, 5.0])
def test_lemma_2_by_search(beta: float) -> None:
    """Lemma 2: r and r + f(x) have the same optimal policy under eq. 3; found by search, without eq. 4.

    E_pi[f(x)] = f(x) is in J whatever the policy. J is concave in the probabilities, among which the first is
    what the others leave.
    """

    def found(world: World) -> torch.Tensor:
        def probabilities(free: torch.Tensor) -> torch.Tensor:
            return torch.cat([1 - free.sum(1, keepdim=True), free], dim=1)

        def shortfalls(free: torch.Tensor) -> torch.Tensor:
            policy = probabilities(free)
            return -(policy * (world.reward_XY - beta * (policy.log() - world.reference_XY))).sum(1)

        return probabilities(minimize(shortfalls, world.reference_XY.exp()[:, 1:], tolerance=1e-12))

    policy, shifted = found(WORLD), found(SHIFTED)
    assert total_variation(policy, WORLD.reference_XY.exp()).min() > 1e-2
    assert (policy - shifted).abs().max() < 1e-10
    assert (policy - WORLD.optimum(beta)).abs().max() < 1e-10
    implicit = [implicit_rewards(beta, log_policy.log(), WORLD.reference_XY) for log_policy in (policy, shifted)]
    assert (implicit[0] - implicit[1]).abs().max() < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_lemma_2_by_the_formula(beta: float) -> None:
    """Lemma 2, appendix A.5: exp(f(x) / beta) is in each answer's weight and in Z, and cancels in eq. 4."""
    assert (WORLD.optimum(beta) - SHIFTED.optimum(beta)).abs().max() < 1e-10
    assert (SHIFTED.normalizer(beta) / WORLD.normalizer(beta) - 1).abs().min() > 0.1


@pytest.mark.parametrize("beta", BETAS)
def test_the_preferences_under_the_optimal_policy_are_those_of_the_reward(beta: float) -> None:
    """Eq. 6: with r = beta log(pi* / pi_ref) + beta log Z, log Z cancels and p(y_1 > y_2) = sigma(r_1 - r_2)."""
    for world in (WORLD, SHIFTED):
        found = (-pair_losses(partial(sigmoid, beta=beta), WORLD.optimum(beta).log(), WORLD.reference_XY)).exp()
        better, worse = world.reward_XY[:, ordered_pairs(4)].unbind(2)
        assert (found - 1 / (1 + (worse - better).exp())).abs().max() < 1e-10


# --- Theorem 1 ----------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", BETAS)
def test_theorem_1_the_implicit_reward_is_the_projection(beta: float) -> None:
    """Theorem 1: f = r - beta log Z = beta log(pi* / pi_ref), in the class of r: eq. 5 is its other side."""
    found = implicit_rewards(beta, WORLD.optimum(beta).log(), WORLD.reference_XY)
    assert (found - project(WORLD.reward_XY, WORLD.reference_XY, beta)).abs().max() < 1e-10
    whole = found + beta * WORLD.normalizer(beta).log()[:, None]
    assert (whole - WORLD.reward_XY).abs().max() < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_theorem_1_the_implicit_reward_of_any_policy_is_its_own_projection(beta: float) -> None:
    """Eq. 9: sum_y pi_ref exp(f / beta) = sum_y pi = 1, so log Z = 0, f projects to itself, and pi is its optimum."""
    for seed in range(5):
        policy = make_policy(WORLD, seed)
        found = implicit_rewards(beta, policy, WORLD.reference_XY)
        world = World(found, WORLD.reference_XY)
        assert (world.normalizer(beta) - 1).abs().max() < 1e-10
        assert (project(found, WORLD.reference_XY, beta) - found).abs().max() < 1e-10
        assert (world.optimum(beta) - policy.exp()).abs().max() < 1e-10


@pytest.mark.parametrize("beta", BETAS)
def test_theorem_1_a_class_has_one_projection(beta: float) -> None:
    """Appendix A.6: f(f(r)) = f(r), and f(r + g(x)) = f(r): beta log Z grows by g(x) too (Proposition 1)."""
    once = project(WORLD.reward_XY, WORLD.reference_XY, beta)
    assert (once - WORLD.reward_XY).abs().min() > 1e-3
    assert (project(once, WORLD.reference_XY, beta) - once).abs().max() < 1e-10
    assert (project(SHIFTED.reward_XY, WORLD.reference_XY, beta) - once).abs().max() < 1e-10
    optima = [implicit_rewards(beta, world.optimum(beta).log(), WORLD.reference_XY) for world in (WORLD, SHIFTED)]
    assert all((optimum - once).abs().max() < 1e-10 for optimum in optima)
