"""What held-out pairs say of a policy, without generating anything.

All figures are means over pairs, so they depend neither on the order of the rows nor on the
size of a batch. A tie (equal implicit rewards) counts one half and is reported.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpo_cli.losses.pairwise import Pairs, log_ratios, sigmoid
from dpo_cli.statistics.bootstrap import Estimate, Sampling


@dataclass(frozen=True)
class HeldOutPair:
    """A held-out pair, scored by policy and reference; index 0 is chosen, 1 rejected.

    Attributes:
        id: The row's id.
        group: The prompt's id.
        policy: Summed log-probabilities, nats.
        reference: The same of the reference.
        num_tokens: Tokens of the answers.
    """

    id: str
    group: str
    policy: tuple[float, float]
    reference: tuple[float, float]
    num_tokens: tuple[int, int]


@dataclass(frozen=True)
class PairFigures:
    """What a held-out pair adds to the means.

    Attributes:
        id: The row's id.
        group: The prompt's id.
        chosen_reward: Implicit reward of the chosen answer, beta * log-ratio, nats.
        rejected_reward: The same of the rejected one.
        margin: Their difference, nats.
        loss: -log sigma(margin), whatever the training loss was.
    """

    id: str
    group: str
    chosen_reward: float
    rejected_reward: float
    margin: float
    loss: float


@dataclass(frozen=True)
class HeldOut:
    """Figures over all held-out pairs.

    Attributes:
        reward_accuracy: How often the implicit reward prefers the chosen answer.
        loss: Mean of -log sigma(margin), whatever the training loss was.
        margin: Mean of beta * delta, nats.
        chosen_reward: Mean implicit reward of the chosen answers, nats.
        rejected_reward: The same of the rejected ones.
        reference_accuracy: How often the reference alone gives the chosen answer more log-probability.
        longer_accuracy: How often the chosen answer is the longer one: a baseline that reads nothing.
        num_ties: Pairs with equal implicit rewards.
        num_pairs: Pairs in all.
        num_prompts: Different prompts in them.
        rows: What each pair adds, in the order of their ids.
    """

    reward_accuracy: Estimate
    loss: Estimate
    margin: Estimate
    chosen_reward: float
    rejected_reward: float
    reference_accuracy: float
    longer_accuracy: float
    num_ties: int
    num_pairs: int
    num_prompts: int
    rows: list[PairFigures]

    @property
    def margins(self) -> list[float]:
        """Margin of each pair, nats, in the order of their ids."""
        return [row.margin for row in self.rows]


def summarize_held_out(
    pairs: Sequence[HeldOutPair], beta: float, *, draws: int, confidence: float, seed: int
) -> HeldOut:
    """Figures over held-out pairs with intervals clustered by prompt."""
    rows = sorted(pairs, key=lambda pair: pair.id)
    policy = torch.tensor([pair.policy for pair in rows], dtype=torch.float64)
    reference = torch.tensor([pair.reference for pair in rows], dtype=torch.float64)
    num_tokens = torch.tensor([pair.num_tokens for pair in rows])
    rewards = beta * log_ratios(policy, reference)
    margins = rewards[:, 0] - rewards[:, 1]
    losses = sigmoid(Pairs(policy, reference, num_tokens), beta)
    clusters = [pair.group for pair in rows]

    sampling = Sampling(draws, confidence, seed)

    return HeldOut(
        reward_accuracy=sampling.rate(_half_ties(margins).tolist(), clusters),
        loss=sampling.interval(losses.tolist(), clusters),
        margin=sampling.interval(margins.tolist(), clusters),
        chosen_reward=rewards[:, 0].mean().item(),
        rejected_reward=rewards[:, 1].mean().item(),
        reference_accuracy=_half_ties(reference[:, 0] - reference[:, 1]).mean().item(),
        longer_accuracy=_half_ties((num_tokens[:, 0] - num_tokens[:, 1]).double()).mean().item(),
        num_ties=int((margins == 0).sum()),
        num_pairs=len(rows),
        num_prompts=len(set(clusters)),
        rows=[
            PairFigures(pair.id, pair.group, *figures)
            for pair, *figures in zip(
                rows,
                rewards[:, 0].tolist(),
                rewards[:, 1].tolist(),
                margins.tolist(),
                losses.tolist(),
                strict=True,
            )
        ],
    )


def _half_ties(differences: torch.Tensor) -> torch.Tensor:
    """1 where positive, 0 where negative, 1/2 where zero."""
    return (differences.sign() + 1) / 2
