"""The policy as it is trained with its reference beside it: it answers, and both score what it said.

Policy, reference and reward model are adapters on one set of frozen weights; the value head stands on the policy's
hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dpo_cli.core.errors import is_out_of_memory
from dpo_cli.core.progress import SilentReporter
from dpo_cli.core.training_params import PpoParams
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
        """What policy, value head and reference say of each token, in the micro-batches of an optimizer step.

        Where one does not fit into memory, all of it is done again in smaller ones, which the step will take, too. If
        the step itself halves the budget later, its ratios leave 1 by what other micro-batches round differently.
        """
        while True:
            pieces = self.scorer.split(groups, self.budget.max_tokens)
            batches = [[groups[index] for index in piece] for piece in pieces]
            try:
                columns = self._columns(batches)
                break
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
            self.budget.halve(batches)  # out of the except block: the error's traceback holds on to memory
        order = [index for piece in pieces for index in piece]
        sizes = [sum(map(len, groups[index].completions)) for index in order]
        places = sorted(range(len(order)), key=order.__getitem__)
        parts = [column.double().cpu().split(sizes) for column in columns]
        return Scored(*(torch.cat([part[place] for place in places]) for part in parts))

    def _columns(self, batches: Sequence[Sequence[TokenGroup]]) -> list[torch.Tensor]:
        """Those of :class:`Scored`, float32 [M] each, in the order of the batches."""
        ours: list[list[torch.Tensor]] = []
        self.pair.use_policy()
        for batch in batches:
            scores = self.scorer.score(batch, statistics="plain")
            assert scores.statistics is not None
            values = torch.zeros_like(scores.token_logps_M) if scores.values_M is None else scores.values_M
            ours.append([scores.token_logps_M, values, scores.statistics.entropies_N])
        self.pair.use_reference()
        theirs = [self.scorer.score(batch).token_logps_M for batch in batches]
        self.pair.use_policy()
        logps, values, entropies = map(torch.cat, zip(*ours, strict=True))
        return [logps, torch.cat(theirs), values, entropies]
