"""DPO on all preferences there are finds the optimal policy (Rafailov et al. 2023, sections 4 and 5): TV 1e-6.

Legend: X prompts, Y answers, P ordered pairs, O rankings of some of the answers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from dpo_cli.losses.pairwise import sigmoid
from dpo_cli.losses.ranking import Ties, plackett_luce
from tests.theory.worlds import (
    BETAS,
    World,
    float64,
    free_logits,
    make_world,
    minimize,
    ordered_pairs,
    pair_losses,
    softmax_policy,
    total_variation,
)

WORLD = make_world(prompts=3, answers=4, seed=1)


def trained(world: World, losses_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """log pi of the policy with the least loss, [X, Y]; the search begins at the reference, as training does."""
    return softmax_policy(minimize(lambda free: losses_of(softmax_policy(free)), free_logits(world.reference_XY)))


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_finds_the_optimal_policy(beta: float) -> None:
    """The expectation of eq. 7 over p(y_1 > y_2) = sigma(r_1 - r_2) is least at pi* of eq. 4.

    A cross-entropy is least where the probabilities are the true ones, and is their entropy there. So
    beta log(pi / pi_ref) = r + f(x) (eq. 6 and Lemma 1), and pi is normalized: pi = pi*.
    """
    better, worse = WORLD.reward_XY[:, ordered_pairs(4)].unbind(2)
    chances_XP = 1 / (1 + (worse - better).exp())

    def losses(policy_XY: torch.Tensor) -> torch.Tensor:
        return (chances_XP * pair_losses(partial(sigmoid, beta=beta), policy_XY, WORLD.reference_XY)).sum(1)

    found = trained(WORLD, losses)
    assert total_variation(WORLD.reference_XY.exp(), WORLD.optimum(beta)).min() > 1e-3
    assert total_variation(found.exp(), WORLD.optimum(beta)).max() < 1e-6
    entropies = -(chances_XP * chances_XP.log()).sum(1)
    assert (losses(found) - entropies).abs().max() < 1e-10


def rankings(world: World, compared: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Each ranking of K of the answers, int64 [O, K], and its chance by eq. 18 in plain numbers, [X, O]."""
    every = list(itertools.permutations(range(world.reward_XY.shape[1]), compared))
    chances = []
    for rewards in world.reward_XY.tolist():
        weights = [[math.exp(rewards[answer]) for answer in order] for order in every]
        chances.append([math.prod(row[k] / math.fsum(row[k:]) for k in range(compared)) for row in weights])
    return torch.tensor(every), float64(chances)


def ranking_losses(
    world: World, beta: float, policy_XY: torch.Tensor, ranks: list[int], ties: Ties = "average"
) -> torch.Tensor:
    """The expected loss of each prompt where the answers of each true ranking come with these ranks, [X]."""
    orders_OK, chances_XO = rankings(world, len(ranks))
    policy, reference = (table[:, orders_OK].flatten(0, 1) for table in (policy_XY, world.reference_XY))
    losses = plackett_luce(policy, reference, torch.tensor(ranks).expand(policy.shape), beta, ties)
    return (chances_XO * losses.view(chances_XO.shape)).sum(1)


@pytest.mark.parametrize("beta", BETAS)
def test_dpo_on_rankings_finds_the_optimal_policy(beta: float) -> None:
    """The expectation of eq. 20 over eq. 18, three of four answers ranked, is least at pi* too."""
    found = trained(WORLD, lambda policy: ranking_losses(WORLD, beta, policy, [1, 2, 3]))
    assert total_variation(found.exp(), WORLD.optimum(beta)).max() < 1e-6


def test_where_only_the_best_is_told_ties_groups_finds_the_optimal_policy() -> None:
    """Best of three, the others tied: with ``groups`` the loss is -log of Luce's choice, exp(r_1) / sum_j exp(r_j).

    That is a true probability, least at pi*. ``average`` says that both orders of the others are as likely, which
    is not so, and ends elsewhere.
    """
    beta = 0.5
    kinds: list[Ties] = ["groups", "average"]
    distances = []
    for ties in kinds:
        found = trained(WORLD, lambda policy, ties=ties: ranking_losses(WORLD, beta, policy, [1, 2, 2], ties))
        distances.append(total_variation(found.exp(), WORLD.optimum(beta)))
    assert distances[0].max() < 1e-6
    assert distances[1].min() > 1e-3
