"""A training by reinforcement put together: policy, value head, rollouts and what is minimized."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError
from dpo_cli.core.training_params import PpoParams
from dpo_cli.data.tokenize import explain_rejects
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.evaluation.generation import PromptTokens
from dpo_cli.losses.reinforcement import KlController
from dpo_cli.models.adapters import ModelPair
from dpo_cli.models.heads import add_value_head
from dpo_cli.models.project import Project
from dpo_cli.rlhf.actor import PolicyActor
from dpo_cli.rlhf.objective import PolicyGradient
from dpo_cli.rlhf.rollouts import Rewarder, RolloutPlan, Rollouts
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.probe import LayoutChoice
from dpo_cli.scoring.recompute import Recompute
from dpo_cli.scoring.scorer import Scorer
from dpo_cli.training.memory import choose_memory
from dpo_cli.training.protocols import Learner


@dataclass(frozen=True)
class Reinforcement:
    """A training by reinforcement before its first step.

    Attributes:
        pair: Policy and reference.
        scorer: Of the policy, with the value head for ``gae``; to be closed.
        learner: The same two and what is minimized.
        source: The rollouts.
        num_steps: Optimizer steps of all rounds, where none ends early.
        budget: Tokens of a micro-batch; rollouts and steps are scored in the same ones.
        layout: How groups go through the model.
        recompute: What the backward pass computes again.
    """

    pair: ModelPair
    scorer: Scorer
    learner: Learner[Any]
    source: Rollouts
    num_steps: int
    budget: TokenBudget
    layout: LayoutChoice
    recompute: Recompute


def open_reinforcement(
    project: Project,
    settings: PpoParams,
    prompts: Sequence[PromptTokens],
    open_reward: Callable[[ModelPair], Rewarder],
    memory: Path | None = None,
) -> Reinforcement:
    """Load the policy at its start and put together what trains it.

    Args:
        project: Whose models they are.
        settings: Section ppo.
        prompts: What is answered.
        open_reward: Gives the reward, beside the policy's frozen weights where it needs them.
        memory: File that keeps a halved token budget for the next run of the same work; None: it is not kept.
    """
    pair = project.pair_at_start(settings.lora, settings.seed)
    reward = open_reward(pair)
    scorer, layout = project.scorer(pair.use_policy())
    if settings.estimator == "gae":
        scorer.value_head = add_value_head(pair.model)
    plan = choose_memory(pair.model, scorer, _longest_rollouts(prompts, settings), settings.batch_size, project)
    budget = TokenBudget(plan.max_tokens, project.command, project.reporter, memory)
    rollout_plan = RolloutPlan(
        num_prompts=len(prompts),
        prompts_a_round=settings.prompts_a_round,
        prompts_a_step=settings.batch_size,
        epochs=settings.epochs,
        estimator=settings.estimator,
        gamma=settings.gamma,
        lam=settings.lam,
        whitens=settings.whiten,
        max_step_kl=settings.max_step_kl,
        seed=settings.seed,
    )
    controller = KlController(settings.kl_coefficient, settings.target_kl)
    source = Rollouts(PolicyActor(project, pair, scorer, prompts, settings, budget), reward, controller, rollout_plan)
    objective = PolicyGradient(
        source, settings.clip, settings.value_clip, settings.value_coefficient if scorer.value_head is not None else 0.0
    )
    learner: Learner[Any] = Learner(pair.model, scorer, objective)
    return Reinforcement(
        pair, scorer, learner, source, settings.rounds * rollout_plan.steps_a_round, budget, layout, plan.grade
    )


def _longest_rollouts(prompts: Sequence[PromptTokens], settings: PpoParams) -> list[TokenGroup]:
    """Stand-ins for what will be trained on, whose memory is planned before there is any of it."""
    found = []
    for prompt in prompts:
        answer = (prompt.tokens * (settings.max_new_tokens // len(prompt.tokens) + 1))[: settings.max_new_tokens]
        found.append(TokenGroup(prompt.id, prompt.id, prompt.tokens, (answer,) * settings.answers))
    return found


def training_prompts(project: Project, at_least: int) -> list[PromptTokens]:
    """The prompts of the training pairs, in the order of their ids; a round needs ``at_least`` so many.

    Raises:
        DataError: No pair fits, or there are fewer prompts.
    """
    table = project.tokenize_pairs("train")
    if not table.groups:
        raise DataError(f"{table.path}: {explain_rejects([table], 'reference.max_length', project.max_length)}")
    first = {group.group: group.prompt for group in table.groups}
    if len(first) < at_least:
        raise DataError(
            f"{paths.preference_table('train').as_posix()} has {len(first)} prompts; set ppo.prompts_a_round, now"
            f" {at_least}, to no more"
        )
    return [PromptTokens(id, first[id], table.prompts[id]) for id in sorted(first)]
