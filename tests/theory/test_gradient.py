"""What the DPO update does (Rafailov et al. 2023, section 4 and appendix A.4), 1e-12.

Legend: X prompts, Y answers, D parameters, B pairs.
"""

from __future__ import annotations

import math

import pytest
import torch

from dpo_cli.evaluation.metrics import held_out_metrics
from dpo_cli.evaluation.rewards import ScoredGroup, pair_losses
from dpo_cli.losses.pairwise import Pairs, sigmoid
from dpo_cli.losses.ranking import plackett_luce
from dpo_cli.statistics.intervals import Sampling
from tests.theory.worlds import BETAS, float64, make_world

PROMPTS, ANSWERS, PAIRS = 3, 5, 40


def random_features(kind: str) -> torch.Tensor:
    """phi(x, y) of a policy with logits phi . theta, [X, Y, D]: a table has a parameter for each answer."""
    if kind == "table":
        return torch.eye(PROMPTS * ANSWERS, dtype=torch.float64).view(PROMPTS, ANSWERS, -1)
    return torch.randn(PROMPTS, ANSWERS, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def random_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts [B] and their (chosen, rejected) [B, 2]."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(PROMPTS, (PAIRS,), generator=generator)
    return prompts, torch.stack([torch.randperm(ANSWERS, generator=generator)[:2] for _ in range(PAIRS)])


@pytest.mark.parametrize("kind", ["table", "features"])
@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_of_the_loss_is_the_papers(beta: float, kind: str) -> None:
    """Section 4; eq. 21 and below: grad L = -beta E[sigma(r_l - r_w) (grad log pi_w - grad log pi_l)].

    Left: autograd through the product's loss. Right: written out, r = beta log(pi / pi_ref) and, for logits
    phi . theta, grad log pi(y | x) = phi(x, y) - sum_y' pi(y' | x) phi(x, y').
    """
    features = random_features(kind)
    reference = make_world(PROMPTS, ANSWERS).reference_XY
    theta = torch.randn(features.shape[2], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    prompts, pairs = random_pairs()
    rows = prompts[:, None]

    theta.requires_grad_()
    policy = (features @ theta).log_softmax(1)
    loss = sigmoid(Pairs(policy[rows, pairs], reference[rows, pairs], torch.ones_like(pairs)), beta).mean()
    (found,) = torch.autograd.grad(loss, theta)

    probabilities = policy.detach().exp()
    gradients_XYD = features - torch.einsum("xy,xyd->xd", probabilities, features)[:, None]
    total = torch.zeros_like(found)
    for x, (chosen, rejected) in zip(prompts.tolist(), pairs.tolist(), strict=True):
        ratios = (probabilities[x] / reference[x].exp()).tolist()
        reward_w, reward_l = beta * math.log(ratios[chosen]), beta * math.log(ratios[rejected])
        weight = 1 / (1 + math.exp(reward_w - reward_l))
        total += weight * (gradients_XYD[x, chosen] - gradients_XYD[x, rejected])
    expected = -beta * total / PAIRS
    assert expected.abs().max() > 1e-3
    assert (found - expected).abs().max() < 1e-12


@pytest.mark.parametrize("beta", BETAS)
def test_a_policy_that_is_its_reference_weighs_each_pair_one_half(beta: float) -> None:
    """Section 4, at step 0: r = beta log 1 = 0, so L = -log sigma(0) = ln 2 and the weight is sigma(0) = 1/2.

    By log-probability that is a gradient of -beta / 2 on the chosen and beta / 2 on the rejected answer.
    """
    prompts, pairs = random_pairs()
    reference = make_world(PROMPTS, ANSWERS).reference_XY[prompts[:, None], pairs]
    policy = reference.clone().requires_grad_()
    losses = sigmoid(Pairs(policy, reference, torch.ones_like(pairs)), beta)
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    assert (losses - math.log(2)).abs().max() < 1e-12
    assert (gradient - beta * float64([-0.5, 0.5])).abs().max() < 1e-12


def test_what_is_reported_of_a_policy_that_is_its_reference_knows_nothing() -> None:
    """Section 4, at step 0: margins beta (0 - 0) = 0, loss ln 2, and half of the pairs are right: all are ties."""
    logps = [(-3.5, -7.25), (-41.0, -2.0), (-9.0, -9.0)]
    pairs = [ScoredGroup.implicit((str(number), "x"), pair, pair, (3, 4), 0.3) for number, pair in enumerate(logps)]
    found = held_out_metrics(pairs, pair_losses(pairs, 0.3), Sampling(draws=10, confidence=0.9, seed=0))
    assert max(abs(pair.margin) for pair in pairs) < 1e-12
    assert abs(found["margin"]) < 1e-12
    assert abs(found["loss"] - math.log(2)) < 1e-12
    assert abs(found["reward_accuracy"] - 0.5) < 1e-12


@pytest.mark.parametrize("answers", [2, 3, 5])
def test_a_policy_that_is_its_reference_finds_all_orders_alike(answers: int) -> None:
    """Eq. 20 at step 0: all rewards are 0, and each of the K! orders has the probability 1 / K!."""
    logps = make_world(1, answers).reference_XY
    loss = plackett_luce(logps, logps, torch.arange(1, answers + 1)[None], 0.3)
    assert abs(loss.item() - math.log(math.factorial(answers))) < 1e-12
