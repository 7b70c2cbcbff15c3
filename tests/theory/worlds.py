"""Worlds small enough to count out: every prompt and every answer stands in one table.

Legend: X prompts, Y answers, P pairs, N free values a prompt. All float64; rewards and log-probabilities in nats.

Nothing here computes a loss; that is what the tests call the product for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from dpo_cli.losses.pairwise import Pairs

PairwiseLoss = Callable[[Pairs], torch.Tensor]

BETAS = [0.1, 0.5, 1.0, 5.0]


def float64(values: object) -> torch.Tensor:
    """A float64 tensor of numbers."""
    return torch.tensor(values, dtype=torch.float64)


@dataclass(frozen=True)
class World:
    """What answers are worth, and how likely they were before.

    Attributes:
        reward_XY: r(x, y).
        reference_XY: log pi_ref(y | x).
    """

    reward_XY: torch.Tensor
    reference_XY: torch.Tensor

    def normalizer(self, beta: float) -> torch.Tensor:
        """Z(x) = sum_y pi_ref(y | x) exp(r(x, y) / beta), [X]: Rafailov et al. 2023, below eq. 4."""
        return (self.reference_XY.exp() * (self.reward_XY / beta).exp()).sum(1)

    def optimum(self, beta: float) -> torch.Tensor:
        """pi*(y | x) = pi_ref(y | x) exp(r(x, y) / beta) / Z(x), [X, Y]: eq. 4."""
        return self.reference_XY.exp() * (self.reward_XY / beta).exp() / self.normalizer(beta)[:, None]


def make_world(prompts: int, answers: int, seed: int = 0) -> World:
    """Rewards of standard deviation 1, and a reference that is not uniform."""
    generator = torch.Generator().manual_seed(seed)
    reward, logits = torch.randn(2, prompts, answers, generator=generator, dtype=torch.float64)
    return World(reward, logits.log_softmax(1))


def make_policy(world: World, seed: int) -> torch.Tensor:
    """log pi(y | x) of a policy that has to do with nothing, [X, Y]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(world.reward_XY.shape, generator=generator, dtype=torch.float64).log_softmax(1)


def ordered_pairs(answers: int) -> torch.Tensor:
    """(chosen, rejected) of each pair in both orders, int64 [P, 2]."""
    return torch.tensor(list(itertools.permutations(range(answers), 2)))


def pair_losses(loss: PairwiseLoss, policy_XY: torch.Tensor, reference_XY: torch.Tensor) -> torch.Tensor:
    """The loss of each ordered pair, [X, P]; every answer is one token long."""
    pairs = ordered_pairs(policy_XY.shape[1])
    policy, reference = policy_XY[:, pairs].flatten(0, 1), reference_XY[:, pairs].flatten(0, 1)
    losses = loss(Pairs(policy, reference, torch.ones_like(policy, dtype=torch.int64)))
    return losses.unflatten(0, (-1, len(pairs)))


def total_variation(policy_XY: torch.Tensor, other_XY: torch.Tensor) -> torch.Tensor:
    """Half the sum of |p - q| over the answers, [X]; both are probabilities."""
    return (policy_XY - other_XY).abs().sum(1) / 2


def softmax_policy(free_XN: torch.Tensor) -> torch.Tensor:
    """log pi(y | x), [X, N + 1], from the logits of all answers but the first, whose logit is 0."""
    return torch.cat([torch.zeros_like(free_XN[:, :1]), free_XN], dim=1).log_softmax(1)


def free_logits(policy_XY: torch.Tensor) -> torch.Tensor:
    """What :func:`softmax_policy` makes this policy from, [X, Y - 1]."""
    return (policy_XY - policy_XY[:, :1])[:, 1:]


def minimize(
    losses_of: Callable[[torch.Tensor], torch.Tensor], start_XN: torch.Tensor, tolerance: float = 1e-13
) -> torch.Tensor:
    """The values of each prompt that minimize its own loss: Newton's method, halving steps that do not go down.

    Args:
        losses_of: [X, N] -> [X], convex; each prompt's loss depends on its own values alone. NaN is out of bounds.
        start_XN: Where to begin.
        tolerance: Of the gradient.

    Raises:
        ArithmeticError: No step goes down, or the gradient is not zero after 100 of them.
    """
    values = start_XN.detach()
    num_free = values.shape[1]
    ridge = 1e-15 * torch.eye(num_free, dtype=torch.float64)  # for values on which nothing depends
    for _ in range(100):
        values.requires_grad_()
        losses = losses_of(values)
        (gradient,) = torch.autograd.grad(losses.sum(), values, create_graph=True)
        if gradient.abs().max() < tolerance:
            return values.detach()
        rows = [torch.autograd.grad(gradient[:, n].sum(), values, retain_graph=True)[0] for n in range(num_free)]
        values, losses = values.detach(), losses.detach()
        step = torch.linalg.solve(torch.stack(rows, dim=1) + ridge, gradient.detach())
        size = torch.ones(len(values), 1, dtype=torch.float64)
        for _ in range(30):
            down = losses_of(values - size * step) <= losses + 1e-14
            if down.all():
                break
            size = torch.where(down[:, None], size, size / 2)
        else:
            raise ArithmeticError("no step goes down")
        values = values - size * step
    raise ArithmeticError("no minimum found")
