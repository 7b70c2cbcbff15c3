"""Rounds of answers that the policy gives while it is trained, with what they earned.

A round begins with K answers to each of some prompts. They are scored once: by the policy that gave them, by its
reference, by the value head and by the reward. Then the policy takes several optimizer steps on them, in epochs of
minibatches, before the next round.

Legend: T tokens of an answer, M tokens of all answers of some groups, K answers to a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from dpo_cli.data.tokens import TokenGroup
from dpo_cli.losses.reinforcement import KlController, generalized_advantages, leave_one_out, token_rewards, whiten
from dpo_cli.training.protocols import BatchSource

Rewarder = Callable[[Sequence[TokenGroup]], Sequence[Sequence[float]]]
"""The reward of each answer of some groups."""


@dataclass(frozen=True)
class Scored:
    """What the models say of the answers of some groups, token by token, answer after answer.

    Attributes:
        logps_M: float64 [M], log pi of the policy that sampled them, nats.
        reference_M: float64 [M], log pi_ref.
        values_M: float64 [M], the value before each token; zeros where there is no value head.
        entropies_M: float64 [M], of the policy's distributions, nats.
    """

    logps_M: torch.Tensor
    reference_M: torch.Tensor
    values_M: torch.Tensor
    entropies_M: torch.Tensor


class Actor(Protocol):
    """What a round needs of the models."""

    def answer(self, number: int, places: Sequence[int]) -> Sequence[TokenGroup]:
        """K answers of the policy to each of some prompts, as groups with ids of their own.

        Args:
            number: Of the round; answers of other rounds are drawn anew.
            places: Which prompts.
        """
        ...

    def score(self, groups: Sequence[TokenGroup]) -> Scored:
        """Score answers as an optimizer step does, so that the ratio of the first step is 1."""
        ...


@dataclass(frozen=True)
class RolloutPlan:
    """How a round is made and used.

    Attributes:
        num_prompts: Prompts there are.
        prompts_a_round: Of which so many are answered in a round.
        prompts_a_step: Of which so many make a minibatch.
        epochs: Passes over a round.
        estimator: ``gae``, advantages with the value head; ``rloo``, leave-one-out with an answer as one action.
        gamma: Discount, for ``gae``.
        lam: Its lambda.
        whitens: Whether advantages of a round are brought to mean 0 and deviation 1.
        max_step_kl: A round ends early where a step finds the policy so far from the one that sampled, nats a token;
            None: never.
        seed: Of the order of prompts and minibatches.
    """

    num_prompts: int
    prompts_a_round: int
    prompts_a_step: int
    epochs: int
    estimator: str = "gae"
    gamma: float = 1.0
    lam: float = 0.95
    whitens: bool = True
    max_step_kl: float | None = None
    seed: int = 0

    @property
    def steps_an_epoch(self) -> int:
        """Optimizer steps of a pass over a round."""
        return -(-self.prompts_a_round // self.prompts_a_step)

    @property
    def steps_a_round(self) -> int:
        """Optimizer steps of a round that does not end early."""
        return self.epochs * self.steps_an_epoch


@dataclass(frozen=True)
class Experience:
    """What is kept of a group's answers: what was scored, and what follows from it.

    Attributes:
        logps_M: float64 [M], log pi at the time of sampling.
        values_M: float64 [M].
        advantages_M: float64 [M].
        returns_M: float64 [M], what the values should have been.
        reward: Mean reward of the answers.
        kl: Mean of log(pi / pi_ref) over the answers, nats a sequence.
        entropy: Mean over tokens, nats.
    """

    logps_M: torch.Tensor
    values_M: torch.Tensor
    advantages_M: torch.Tensor
    returns_M: torch.Tensor
    reward: float
    kl: float
    entropy: float


class Rollouts(BatchSource[TokenGroup]):
    """Gives minibatches of answers that the policy made itself.

    Args:
        actor: The models.
        reward: What an answer earns.
        controller: The coefficient of the KL to the reference, moved after each round.
        plan: How rounds are made.
    """

    def __init__(self, actor: Actor, reward: Rewarder, controller: KlController, plan: RolloutPlan) -> None:
        self._actor, self._reward, self._controller, self._plan = actor, reward, controller, plan
        self._groups: list[TokenGroup] = []
        self._experience: dict[str, Experience] = {}
        self._round, self._begun, self._ends_early = -1, 0, False

    def experience(self, group: TokenGroup) -> Experience:
        """What is kept of a group of this round."""
        return self._experience[group.id]

    @property
    def round_number(self) -> int:
        """The round at hand, counted from 1."""
        return self._round + 1

    @property
    def kl_coefficient(self) -> float:
        """What a nat from the reference costs now."""
        return self._controller.coefficient

    def batch(self, step: int) -> Sequence[TokenGroup]:
        """The groups of an optimizer step; where a round begins with it, the policy answers first."""
        if self._round < 0 or step - self._begun >= self._plan.steps_a_round or self._ends_early:
            self._begin(self._round + 1, step)
        epoch, place = divmod(step - self._begun, self._plan.steps_an_epoch)
        return [self._groups[index] for index in self._minibatches(epoch)[place]]

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Take notice of a step's means: a policy that went too far ends the round."""
        limit = self._plan.max_step_kl
        self._ends_early = limit is not None and metrics["policy/approxkl"] > limit

    def _minibatches(self, epoch: int) -> list[list[int]]:
        size = self._plan.prompts_a_step
        order = _permutation(len(self._groups), self._plan.seed, 1 + self._round, 1 + epoch)
        return [order[start : start + size] for start in range(0, len(order), size)]

    @torch.no_grad()
    def _begin(self, number: int, step: int) -> None:
        """Answer and score."""
        plan, size = self._plan, self._plan.prompts_a_round
        epoch, place = divmod(number, max(1, plan.num_prompts // size))
        places = _permutation(plan.num_prompts, plan.seed, 0, epoch)[place * size :][:size]
        if self._experience:
            self._controller.update(sum(one.kl for one in self._experience.values()) / len(self._experience))
        self._round, self._begun, self._ends_early = number, step, False
        self._groups = list(self._actor.answer(number, places))
        parts = [(batch, self._actor.score(batch)) for batch in
                 ([self._groups[index] for index in indices] for indices in self._minibatches(0))]  # fmt: skip
        rewards = dict(zip((group.id for group in self._groups), self._reward(self._groups), strict=True))
        self._experience = {}
        for batch, scored in parts:
            sizes = [sum(map(len, group.completions)) for group in batch]
            pieces = [each.split(sizes) for each in vars(scored).values()]
            for group, *mine in zip(batch, *pieces, strict=True):
                self._experience[group.id] = self._make_experience(group, Scored(*mine), rewards[group.id])
        if plan.whitens:
            self._whiten()

    def _make_experience(self, group: TokenGroup, scored: Scored, rewards: Sequence[float]) -> Experience:
        lengths = [*map(len, group.completions)]
        coefficient = self._controller.coefficient
        ratios = (scored.logps_M - scored.reference_M).split(lengths)
        values = scored.values_M.split(lengths)
        steps = [token_rewards(reward, ratio, coefficient) for reward, ratio in zip(rewards, ratios, strict=True)]
        if self._plan.estimator == "rloo":
            totals = torch.stack([rewards_T.sum() for rewards_T in steps])[None]
            advantages = [one.expand(length) for one, length in zip(leave_one_out(totals)[0], lengths, strict=True)]
        else:
            pairs = zip(steps, values, strict=True)
            advantages = [generalized_advantages(*pair, self._plan.gamma, self._plan.lam) for pair in pairs]
        advantages_M = torch.cat(advantages)
        return Experience(
            scored.logps_M,
            scored.values_M,
            advantages_M,
            advantages_M + scored.values_M,
            reward=sum(rewards) / len(rewards),
            kl=torch.stack([ratio.sum() for ratio in ratios]).mean().item(),
            entropy=scored.entropies_M.mean().item(),
        )

    def _whiten(self) -> None:
        sizes = [len(one.advantages_M) for one in self._experience.values()]
        whitened = whiten(torch.cat([one.advantages_M for one in self._experience.values()])).split(sizes)
        self._experience = {
            id: Experience(**{**vars(one), "advantages_M": mine})
            for (id, one), mine in zip(self._experience.items(), whitened, strict=True)
        }

    def state(self) -> Mapping[str, Any]:
        """The round at hand."""
        return {
            "groups": [vars(group) for group in self._groups],
            "experience": {id: vars(one) for id, one in self._experience.items()},
            "place": [self._round, self._begun, self._ends_early],
            "coefficient": self._controller.coefficient,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up a round where an earlier run left it."""
        self._groups = [TokenGroup(**group) for group in state["groups"]]
        self._experience = {id: Experience(**one) for id, one in state["experience"].items()}
        self._round, self._begun, self._ends_early = state["place"]
        self._controller.coefficient = state["coefficient"]


def _permutation(number: int, *seeds: int) -> list[int]:
    """An order of its own for each sequence of seeds."""
    seed = 0
    for part in seeds:
        seed = (seed * 1_000_003 + part) % 2**63
    return torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
