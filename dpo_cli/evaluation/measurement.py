"""What an evaluation asks of the models: log-probabilities of held-out text, answers, divergences.

Legend: rows of pairs go by the row's id, answers by the prompt's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError
from dpo_cli.core.params import EvaluateParams
from dpo_cli.data.schema import text_of
from dpo_cli.data.tokenize import TokenTable, read_columns
from dpo_cli.data.tokens import TokenGroup, pieces_of
from dpo_cli.evaluation.generation import PromptTokens
from dpo_cli.evaluation.held_out import HeldOutPair
from dpo_cli.evaluation.kl import SequenceKl
from dpo_cli.evaluation.metrics import perplexity
from dpo_cli.evaluation.models import EvaluatedModel, EvaluatedModels
from dpo_cli.evaluation.steps import Steps, logp_sums
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.comparisons import Answers
from dpo_cli.models.project import Project
from dpo_cli.reference.cache import group_keys, reference_logps

Scaled = Mapping[float, tuple[dict[str, Answer], dict[str, SequenceKl]]]
"""Answers at temperature 1 and their divergences, by how many times what training changed."""


class Measurement:
    """The models of an evaluation and the held-out pairs, with what is asked of the ones about the others.

    Args:
        project: Whose models they are.
        table: The held-out pairs.
        evaluate: How many prompts are answered, and how.
        models: Policy and reference.
        steps: Computes, and remembers.

    Raises:
        DataError: A prompt with its answer is longer than the model's context.
    """

    def __init__(
        self, project: Project, table: TokenTable, evaluate: EvaluateParams, models: EvaluatedModels, steps: Steps
    ) -> None:
        self.project = project
        self.table = table
        self.evaluate = evaluate
        self.models = models
        self.prompts = _prompts(table, evaluate.num_prompts)
        self._steps = steps
        self._answers: dict[tuple[str, float], dict[str, Answer]] = {}
        self._texts = _texts_of_pairs()
        longest = max(len(prompt.tokens) for prompt in self.prompts)
        project.check_context(longest + evaluate.max_new_tokens, "evaluate.max_new_tokens + the longest prompt")

    def held_out(self, cache: Mapping[str, float]) -> dict[str, HeldOutPair]:
        """The held-out pairs under the policy, beside the cached reference."""
        groups = self.table.groups
        reference = reference_logps(cache, groups)
        scored = self._steps.token_logps(self.models.policy, groups, "scoring held-out pairs")
        sums = logp_sums(scored)
        pairs = {}
        for group in groups:
            chosen, rejected = group_keys(group)
            pairs[group.id] = HeldOutPair(
                id=group.id,
                group=group.group,
                policy=(sums[chosen], sums[rejected]),
                reference=(reference[group.id][0], reference[group.id][1]),
                num_tokens=(len(group.completions[0]), len(group.completions[1])),
            )
        return pairs

    def perplexities(self) -> dict[str, float]:
        """Perplexity of held-out instruction data under each model, where there is any."""
        table = self.project.tokenize_instructions("eval")
        if not table.groups:
            return {}
        found = {}
        for model in (self.models.base, self.models.reference, self.models.policy):
            if model is None:
                continue
            scored = self._steps.token_logps(model, table.groups, f"held-out SFT text under {model}")
            keys = [key for group in table.groups for key in group_keys(group)]
            logps = [logp for key in keys for logp in scored[key]]
            found[f"perplexity_{model.name}"] = perplexity(logps, len(logps))
        return found

    def answers(self, model: EvaluatedModel, temperature: float) -> dict[str, Answer]:
        """A model's answers by prompt id; those that were sampled in this run are not read again."""
        key = (model.digest, temperature)
        if key not in self._answers:
            self._answers[key] = self._steps.answers(model, self.prompts, temperature)
        return self._answers[key]

    def divergences(self, model: EvaluatedModel, answers: Mapping[str, Answer]) -> dict[str, SequenceKl]:
        """KL of a model from the reference along its own answers, by prompt id, nats."""
        return self._steps.divergences(model, self.models.reference, answers)

    def log_ratios(self, answers: Mapping[str, Answer]) -> dict[str, list[tuple[str, float]]]:
        """Log pi / pi_ref of every piece of the policy's answers by prompt id, nats."""
        groups = list(answers.values())
        ours, theirs = (
            self._steps.token_logps(model, groups, f"answers under {model}")
            for model in (self.models.policy, self.models.reference)
        )
        found = {}
        for group in groups:
            (key,) = group_keys(group)
            ratios = [a - b for a, b in zip(ours[key], theirs[key], strict=True)]
            row, place = [], 0
            for piece in pieces_of(self.project.tokenizer, group.completions[0]):
                end = place + len(piece.ids)
                row.append((piece.text, round(sum(ratios[place:end]), 3)))
                place = end
            found[group.id] = row
        return found

    def scaled(self, folder: Path) -> Scaled:
        """Answers and divergences of the model at other scales of what training changed.

        Raises:
            DataError: The folder holds a whole model, of which that is not known.
        """
        found = {}
        for scale in self.evaluate.scales:
            model = self.models.scaled(scale)
            if model is None:
                raise DataError(
                    f"evaluate.scales has no effect on {folder}: it is a whole model, of which it is not"
                    " known what training changed; set it to []"
                )
            answers = self.answers(model, 1.0)
            kls = self.divergences(model, answers)
            found[scale] = answers, kls
        return found

    def data_answers(self) -> tuple[Answers, Answers]:
        """The chosen and rejected answers of the first pair of each prompt, by prompt id."""
        first: dict[str, TokenGroup] = {}
        for group in sorted(self.table.groups, key=lambda group: group.id):
            first.setdefault(group.group, group)
        wanted = [first[prompt.id] for prompt in self.prompts]
        chosen, rejected = ({group.group: self._data_answer(group, side) for group in wanted} for side in (0, 1))
        return chosen, rejected

    def judged_pairs(self) -> tuple[Answers, Answers]:
        """Chosen and rejected answers of the held-out pairs that the judge is tried on, by row id."""
        groups = sorted(self.table.groups, key=lambda group: group.id)
        groups = groups if self.evaluate.judge_pairs < 0 else groups[: self.evaluate.judge_pairs]
        chosen, rejected = ({group.id: self._data_answer(group, side) for group in groups} for side in (0, 1))
        return chosen, rejected

    def _data_answer(self, group: TokenGroup, side: int) -> Answer:
        messages, text = self.table.prompts[group.group], self._texts[group.id][side]
        return Answer(group.id, group.group, group.prompt, (group.completions[side],), messages, text)


def _prompts(table: TokenTable, limit: int) -> list[PromptTokens]:
    """The held-out prompts to answer, each once, in the order of their ids, which is random."""
    tokens = {group.group: group.prompt for group in table.groups}
    chosen = sorted(tokens)[: limit or None]
    return [PromptTokens(group, tokens[group], table.prompts[group]) for group in chosen]


def _texts_of_pairs() -> dict[str, tuple[str, str]]:
    """The texts of chosen and rejected answer of the held-out pairs by row id."""
    rows = read_columns(paths.preference_table("eval"), "chosen", "rejected")
    return {id: (text_of(chosen), text_of(rejected)) for id, (chosen, rejected) in rows.items()}
