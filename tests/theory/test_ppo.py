"""PPO and REINFORCE leave-one-out on a policy that can be enumerated: they end at the optimum that theory names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_cli.core.interrupts import StopRequest
from dpo_cli.core.params import RuntimeParams, TrainParams
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.losses.reinforcement import KlController
from dpo_cli.models.project import Workplace
from dpo_cli.rlhf.objective import PolicyGradient
from dpo_cli.rlhf.rollouts import RolloutPlan, Rollouts, Scored
from dpo_cli.scoring.scorer import Scores, Statistics
from dpo_cli.training import loop as loop_module
from dpo_cli.training.accumulation import Accumulator, Limits
from dpo_cli.training.fit import make_descent
from dpo_cli.training.loop import Data, Loop
from dpo_cli.training.parallel import Job
from dpo_cli.training.protocols import Learner

NUM_PROMPTS, NUM_FIRST, NUM_SECOND = 2, 4, 3
"""An answer is one of 4 tokens, then one of 3: 12 answers to each of 2 prompts."""


class Table(torch.nn.Module):
    """log pi of every token as a parameter, and values beside them."""

    config: Any = None
    compute_dtype = torch.float32
    head_bytes = 0

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.first = torch.nn.Parameter(torch.randn(NUM_PROMPTS, NUM_FIRST, generator=generator))
        self.second = torch.nn.Parameter(torch.randn(NUM_PROMPTS, NUM_FIRST, NUM_SECOND, generator=generator))
        self.values = torch.nn.Parameter(torch.zeros(NUM_PROMPTS, 1 + NUM_FIRST))

    @property
    def device(self) -> torch.device:
        return self.first.device

    def num_tokens(self, group: TokenGroup) -> int:
        return 2 * len(group.completions)

    def split(self, groups: Sequence[TokenGroup], max_tokens: int) -> list[list[int]]:
        half = max(1, len(groups) // 2)
        return [list(range(half)), list(range(half, len(groups)))] if len(groups) > 1 else [[0]]

    def score(self, groups: Sequence[TokenGroup], *, statistics: Statistics = "none") -> Scores:
        rows = [(group.prompt[0], *answer) for group in groups for answer in group.completions]
        lengths = torch.tensor([len(row) - 1 for row in rows])
        x, a, b = torch.tensor([(*row, 0)[:3] for row in rows]).T
        is_there = lengths[:, None] > torch.arange(2)
        tokens = torch.stack([self.first.log_softmax(-1)[x, a], self.second.log_softmax(-1)[x, a, b]], 1)
        values = torch.stack([self.values[x, 0], self.values[x, 1 + a]], 1)
        shape = (len(groups), len(groups[0].completions))
        sums = (tokens * is_there).sum(1).double().view(shape)
        return Scores(sums, lengths.view(shape), tokens[is_there], None, values[is_there])

    def answers(self) -> torch.Tensor:
        """log pi of all answers, [prompts, 4, 3]."""
        return (self.first.log_softmax(-1)[:, :, None] + self.second.log_softmax(-1)).detach().double()


class TableActor:
    """Answers from the table."""

    def __init__(self, table: Table, num_answers: int) -> None:
        self._table, self._num_answers = table, num_answers
        self._reference = Table().to(table.first.dtype)

    def answer(self, number: int, places: Sequence[int]) -> Sequence[TokenGroup]:
        generator = torch.Generator().manual_seed(number)
        flat = self._table.answers().flatten(1).exp().float()
        groups = []
        for count, place in enumerate(places):
            drawn = torch.multinomial(
                flat[place % NUM_PROMPTS], self._num_answers, replacement=True, generator=generator
            )
            answers = tuple(divmod(index, NUM_SECOND) for index in drawn.tolist())
            groups.append(TokenGroup(f"{number} {count}", "g", (place % NUM_PROMPTS,), answers))
        return groups

    def score(self, groups: Sequence[TokenGroup]) -> Scored:
        found, reference = self._table.score(groups), self._reference.score(groups)
        values = found.values_M
        assert values is not None
        tokens = found.token_logps_M.double()
        return Scored(tokens, reference.token_logps_M.double(), values.double(), torch.zeros_like(tokens))


REWARDS = torch.randn(
    NUM_PROMPTS, NUM_FIRST, NUM_SECOND, generator=torch.Generator().manual_seed(5), dtype=torch.float64
)


def rewards(groups: Sequence[TokenGroup]) -> list[list[float]]:
    return [[REWARDS[(group.prompt[0], *answer)].sum().item() for answer in group.completions] for group in groups]


def train(
    folder: Path, cpu: Any, reporter: Any, beta: float, estimator: str, num_rounds: int
) -> tuple[Table, Loop[Any]]:
    folder.mkdir(exist_ok=True)
    plan = RolloutPlan(64, 64, 16, epochs=2, estimator=estimator, seed=3)
    table = Table()
    source = Rollouts(TableActor(table, 8), rewards, KlController(beta), plan)
    num_steps = num_rounds * plan.steps_a_round
    settings = TrainParams(learning_rate=0.03, schedule="linear", warmup_ratio=0.0)
    work = Workplace("ppo", reporter, RuntimeParams(checkpoint_minutes=0.0), cpu)
    job = Job(work, folder)
    descent = make_descent(table, settings, num_steps, cpu.device, "ppo")
    learner = Learner(table, table, PolicyGradient(source, 0.2, value_clip=10.0, value_coefficient=0.5))  # type: ignore[arg-type]
    loop = Loop(learner, Data(source), descent, loop_module.Course(num_steps), Limits.of(work, 256), job)
    loop.run()
    return table, loop


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
@pytest.mark.parametrize("beta", [0.3, 1.0, 3.0])
def test_the_policy_becomes_the_optimal_one(
    tmp_path: Path, cpu: Any, reporter: Any, beta: float, estimator: str
) -> None:
    """argmax E[r] - beta KL(pi || pi_ref) = pi_ref exp(r / beta) / Z (Rafailov et al. 2023, eq. 4)."""
    table, loop = train(tmp_path / "a", cpu, reporter, beta, estimator, num_rounds=60)
    reference = Table().answers()
    optimal = (reference + REWARDS / beta).flatten(1).softmax(-1)
    distance = (table.answers().flatten(1).exp() - optimal).abs().sum(-1) / 2
    assert distance.max() < 0.02
    assert loop.history[0]["val/ratio"] == 1.0
    assert loop.history[0]["policy/approxkl"] == 0.0
    assert loop.history[0]["objective/kl"] == 0.0


class CutActor(TableActor):
    """Answers from the table, of which those that begin with token 0 end there."""

    def answer(self, number: int, places: Sequence[int]) -> Sequence[TokenGroup]:
        return [
            replace(group, completions=tuple(one if one[0] else (0,) for one in group.completions))
            for group in super().answer(number, places)
        ]


def logps(table: Table, group: TokenGroup) -> list[list[torch.Tensor]]:
    """log pi of each token of each answer."""
    first, second = table.first.log_softmax(-1)[group.prompt[0]], table.second.log_softmax(-1)[group.prompt[0]]
    return [[first[answer[0]], *(second[answer[0], token] for token in answer[1:])] for answer in group.completions]


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_the_gradient_of_the_first_epoch_is_the_policy_gradient(cpu: Any, reporter: Any, estimator: str) -> None:
    """The sum of -A grad log pi over all tokens of a round, where no step is taken; in float64.

    Minibatches of 8, 8 and 4 prompts go through in two micro-batches each, with answers of one token and of two. A is
    what is still to come of r - beta log(pi / pi_ref) (gae with lambda 1 and values of 0), or what that is for the
    answer less the mean of the others (rloo).
    """
    table, beta = Table().double(), 0.3
    for parameter in table.parameters():
        parameter.data *= 1.5
    plan = RolloutPlan(20, 20, 8, epochs=1, estimator=estimator, lam=1.0, whitens=False)
    source = Rollouts(CutActor(table, 4), rewards, KlController(beta), plan)
    learner = Learner(table, table, PolicyGradient(source, 0.2, 0.2, value_coefficient=0.0))  # type: ignore[arg-type]
    limits = Limits.of(Workplace("ppo", reporter, RuntimeParams(), cpu), 256)
    accumulator: Accumulator[Scores] = Accumulator(learner, limits, StopRequest())
    parameters, groups = (table.first, table.second), []
    found = [torch.zeros_like(parameter) for parameter in parameters]
    for step in range(plan.steps_a_round):
        batch = source.batch(step)
        table.zero_grad()
        accumulator.gradient(batch, 0)
        for total, parameter in zip(found, parameters, strict=True):
            assert parameter.grad is not None
            total += parameter.grad * sum(len(answer) for group in batch for answer in group.completions)
        groups += batch
    assert sorted({len(answer) for group in groups for answer in group.completions}) == [1, 2]

    reference, loss = Table().double(), torch.zeros((), dtype=torch.float64)
    for group, (earned,) in zip(groups, map(rewards, ([group] for group in groups)), strict=True):
        ours, theirs = logps(table, group), logps(reference, group)
        costs = [
            [beta * (one - other).item() for one, other in zip(*pair, strict=True)]
            for pair in zip(ours, theirs, strict=True)
        ]
        returns = [reward - sum(cost) for reward, cost in zip(earned, costs, strict=True)]
        for k, answer in enumerate(ours):
            others = (sum(returns) - returns[k]) / (len(returns) - 1)
            for t, logp in enumerate(answer):
                to_come = earned[k] - sum(costs[k][t:])
                loss = loss - (to_come if estimator == "gae" else returns[k] - others) * logp
    for one, other in zip(found, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-10)


def test_killed_within_a_round_it_ends_in_the_same_bytes(
    tmp_path: Path, cpu: Any, reporter: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = train(tmp_path / "a", cpu, reporter, 1.0, "gae", num_rounds=3)
    save, saved = loop_module.save_checkpoint, [0]

    def die_after_eleven(*arguments: Any) -> None:
        save(*arguments)
        saved[0] += 1
        if saved[0] == 11:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop_module, "save_checkpoint", die_after_eleven)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "b", cpu, reporter, 1.0, "gae", num_rounds=3)
    monkeypatch.setattr(loop_module, "save_checkpoint", save)
    again, loop = train(tmp_path / "b", cpu, reporter, 1.0, "gae", num_rounds=3)
    assert loop.first_step == 11
    assert all(torch.equal(one, two) for one, two in zip(whole.parameters(), again.parameters(), strict=True))
