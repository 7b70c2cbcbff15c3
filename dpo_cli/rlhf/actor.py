"""The policy as it is trained with its reference beside it: it answers, and both score what it said.

Policy, reference and reward model are adapters on one set of frozen weights; the value head stands on the policy's
hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpo_cli.core.params import PpoParams
from dpo_cli.core.progress import SilentReporter
from dpo_cli.data.tokens import TokenGroup
from dpo_cli.evaluation.decoding import Decoding
from dpo_cli.evaluation.generation import PromptTokens, sample_answers
from dpo_cli.models.adapters import ModelPair
from dpo_cli.models.project import Project
from dpo_cli.rlhf.rollouts import Scored
from dpo_cli.scoring.budget import TokenBudget
from dpo_cli.scoring.scorer import Scorer


@dataclass(frozen=True)
class PolicyActor:
    """Answers prompts with the policy, and scores the answers.

    Attributes:
        project: Whose models they are.
        pair: Policy and reference.
        scorer: Of the same model; its value head is the policy's.
        prompts: What is asked.
        settings: How many answers, of what length.
        budget: Tokens of a micro-batch, the very one of the optimizer's steps.
    """

    project: Project
    pair: ModelPair
    scorer: Scorer
    prompts: Sequence[PromptTokens]
    settings: PpoParams
    budget: TokenBudget

    def answer(self, number: int, places: Sequence[int]) -> Sequence[TokenGroup]:
        """K answers to each of some prompts, at temperature 1, each from a random stream of its own."""
        settings, prompts = self.settings, [self.prompts[place] for place in places]
        model = self.pair.use_policy()
        found = []
        with SilentReporter().meter("", len(prompts), "answers") as meter:
            for count in range(settings.answers):
                decoding = Decoding(
                    temperature=1.0,
                    max_new_tokens=settings.max_new_tokens,
                    stop_ids=tuple(self.project.encoder.stop_ids),
                    seed=settings.seed,
                    stream=f"ppo {number} {count}",
                )
                dtype = self.project.machine.compute_dtype
                found.append(
                    sample_answers(model, prompts, decoding, budget=self.budget, autocast_dtype=dtype, meter=meter)
                )
        return [
            TokenGroup(
                f"{number} {prompt.id}", prompt.id, prompt.tokens, tuple(each[prompt.id].tokens for each in found)
            )
            for prompt in prompts
        ]

    @torch.no_grad()
    def score(self, groups: Sequence[TokenGroup]) -> Scored:
        """What policy, value head and reference say of each token, in the micro-batches of an optimizer step."""
        pieces = self.scorer.split(groups, self.budget.max_tokens)
        order = [index for piece in pieces for index in piece]
        batches = [[groups[index] for index in piece] for piece in pieces]
        head = self.scorer.value_head
        self.pair.use_policy()
        ours = [self.scorer.score(batch, statistics="plain") for batch in batches]
        self.scorer.value_head = None
        self.pair.use_reference()
        theirs = [self.scorer.score(batch).token_logps_M for batch in batches]
        self.scorer.value_head = head
        self.pair.use_policy()
        logps = torch.cat([each.token_logps_M for each in ours])
        values = torch.zeros_like(logps) if head is None else torch.cat([each.values_M for each in ours])
        entropies = torch.cat([each.statistics.entropies_N for each in ours])
        sizes = [sum(map(len, groups[index].completions)) for index in order]
        places = sorted(range(len(order)), key=order.__getitem__)
        columns = []
        for column in (logps, torch.cat(theirs), values, entropies):
            parts = column.double().cpu().split(sizes)
            columns.append(torch.cat([parts[place] for place in places]))
        return Scored(*columns)
