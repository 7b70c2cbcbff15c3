"""What an evaluation asks of the models and of the judge, and whose answers are compared with whose.

Legend: rows of pairs go by the row's id, answers by the prompt's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError
from dpo_cli.core.params import EvaluateParams
from dpo_cli.core.progress import Reporter
from dpo_cli.data.schema import text_of
from dpo_cli.data.tokenize import TokenTable, read_columns
from dpo_cli.data.tokens import TokenGroup, pieces_of
from dpo_cli.evaluation import SFT
from dpo_cli.evaluation.generation import PromptTokens
from dpo_cli.evaluation.kl import SequenceKl
from dpo_cli.evaluation.metrics import against_chosen_metrics, judge_metrics, perplexity, win_metrics
from dpo_cli.evaluation.models import EvaluatedModel, EvaluatedModels
from dpo_cli.evaluation.rewards import ScoredGroup
from dpo_cli.evaluation.steps import Steps
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.prepare import LoadJudge, ReadyJudge
from dpo_cli.judging.win_rate import Answers, ComparisonResult, compare_models
from dpo_cli.models.project import Project
from dpo_cli.scoring.reference import reference_logps
from dpo_cli.statistics.intervals import Estimate, Sampling

Scaled = Mapping[float, tuple[dict[str, Answer], dict[str, SequenceKl]]]
"""Answers at temperature 1 and their divergences, by how many times what training changed."""

Key = tuple[str, float, str]
"""What a comparison is for (main, temperature, scale, data), the temperature or scale, and the opponent."""

Results = Mapping[Key, ComparisonResult]


class Measurement(Steps):
    """The steps of an evaluation with its models and the held-out pairs.

    Args:
        project: Whose models they are.
        table: The held-out pairs.
        evaluate: How many prompts are answered, and how.
        models: Policy and reference.
        folder: Where rows are kept, in the scratch area.

    Raises:
        DataError: A prompt with its answer is longer than the model's context.
    """

    def __init__(
        self, project: Project, table: TokenTable, evaluate: EvaluateParams, models: EvaluatedModels, folder: Path
    ) -> None:
        super().__init__(project, evaluate, folder)
        self.table = table
        self.models = models
        self.prompts = _prompts(table, evaluate.num_prompts)
        self._answers: dict[tuple[str, float], dict[str, Answer]] = {}
        self._texts = _texts_of_pairs(table)
        longest = max(len(prompt.tokens) for prompt in self.prompts)
        project.check_context(longest + evaluate.max_new_tokens, "evaluate.max_new_tokens + the longest prompt")

    def held_out(self, cache: Mapping[str, float], beta: float) -> list[ScoredGroup]:
        """The held-out pairs by policy and cached reference, in the order of their ids."""
        reference = reference_logps(cache, self.table.groups)
        logps = self.scored(self.models.policy, self.table.groups, "scoring held-out pairs").logps
        return [
            ScoredGroup.implicit(
                (group.id, group.group),
                [logps[key] for key in group.keys],
                reference[group.id],
                group.sizes[1:],
                beta,
            )
            for group in self._by_id()
        ]

    def perplexities(self) -> dict[str, float]:
        """Perplexity of held-out instruction data under each model, where there is any."""
        table = self.project.tokenize_instructions("eval")
        if not table.groups:
            return {}
        found = {}
        keys = [key for group in table.groups for key in group.keys]
        for model in (self.models.base, self.models.reference, self.models.policy):
            if model is not None:
                logps = self.scored(model, table.groups, f"held-out SFT text under {model}").token_logps
                found[f"perplexity_{model.name}"] = perplexity([logp for key in keys for logp in logps[key]])
        return found

    def sampled(self, model: EvaluatedModel, temperature: float) -> dict[str, Answer]:
        """A model's answers to the held-out prompts by prompt id; those of this run are not read again."""
        key = (model.digest, temperature)
        if key not in self._answers:
            self._answers[key] = self.answers(model, self.prompts, temperature)
        return self._answers[key]

    def log_ratios(self, answers: Mapping[str, Answer]) -> dict[str, list[tuple[str, float]]]:
        """Log pi / pi_ref of every piece of the policy's answers by prompt id, nats."""
        groups = list(answers.values())
        ours, theirs = (
            self.scored(model, groups, f"answers under {model}").token_logps
            for model in (self.models.policy, self.models.reference)
        )
        found = {}
        for group in groups:
            (key,) = group.keys
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
            if self.models.scaled is None:
                raise DataError(
                    f"evaluate.scales has no effect on {folder}: it is a whole model, of which it is not"
                    " known what training changed; set it to []"
                )
            model = self.models.scaled(scale)
            answers = self.sampled(model, 1.0)
            found[scale] = answers, self.divergences(model, self.models.reference, answers)
        return found

    def data_answers(self) -> tuple[Answers, Answers]:
        """The chosen and rejected answers of the first pair of each prompt, by prompt id."""
        first: dict[str, TokenGroup] = {}
        for group in self._by_id():
            first.setdefault(group.group, group)
        wanted = [first[prompt.id] for prompt in self.prompts]
        chosen, rejected = ({group.group: self._data_answer(group, side) for group in wanted} for side in (0, 1))
        return chosen, rejected

    def judged_pairs(self) -> tuple[Answers, Answers]:
        """Chosen and rejected answers of the held-out pairs that the judge is tried on, by row id."""
        groups = self._by_id()
        groups = groups if self.evaluate.judge_pairs < 0 else groups[: self.evaluate.judge_pairs]
        chosen, rejected = ({group.id: self._data_answer(group, side) for group in groups} for side in (0, 1))
        return chosen, rejected

    def _by_id(self) -> list[TokenGroup]:
        return sorted(self.table.groups, key=lambda group: group.id)

    def _data_answer(self, group: TokenGroup, side: int) -> Answer:
        messages, text = self.table.prompts[group.group], self._texts[group.id][side]
        return Answer(group.id, group.group, group.prompt, (group.completions[side],), messages, text)


def _prompts(table: TokenTable, limit: int) -> list[PromptTokens]:
    """The held-out prompts to answer, each once, in the order of their ids, which is random."""
    tokens = {group.group: group.prompt for group in table.groups}
    chosen = sorted(tokens)[: limit or None]
    return [PromptTokens(group, tokens[group], table.prompts[group]) for group in chosen]


def _texts_of_pairs(table: TokenTable) -> dict[str, tuple[str, str]]:
    """The texts of chosen and rejected answer of the held-out pairs by row id."""
    rows = read_columns(paths.preference_table("eval"), "chosen", "rejected")
    texts = {id: (text_of(chosen), text_of(rejected)) for id, (chosen, rejected) in rows.items()}
    return texts | {id: (texts[good][0], texts[bad][1]) for id, (good, bad) in table.of_rows.items()}


# --- comparisons ----------------------------------------------------------------------------


def make_pairings(measurement: Measurement, chosen: Answers, scaled: Scaled) -> dict[Key, tuple[Answers, Answers]]:
    """All comparisons to make, ours and theirs; none without a judge.

    Args:
        measurement: Samples the answers.
        chosen: The data's chosen answers by prompt id.
        scaled: Answers of the model at other scales.
    """
    evaluate = measurement.evaluate
    if evaluate.judge == "none":
        return {}
    sampled = measurement.sampled
    policy, reference = measurement.models.policy, measurement.models.reference
    found: dict[Key, tuple[Answers, Answers]] = {}
    kinds = [("main", evaluate.temperature), *(("temperature", each) for each in evaluate.temperatures)]
    for kind, temperature in kinds:
        ours = sampled(policy, temperature)
        for opponent in evaluate.opponents:
            theirs = chosen if opponent == "chosen" else sampled(reference, temperature)
            found[kind, temperature, opponent] = ours, theirs
    if scaled:
        theirs = sampled(reference, 1.0)
        found["scale", 1.0, SFT] = sampled(policy, 1.0), theirs
        for scale, (ours, _) in scaled.items():
            found["scale", scale, SFT] = ours, theirs
    if evaluate.judge_pairs:
        found["data", 0.0, "rejected"] = measurement.judged_pairs()
    return found


def judge_pairings(
    load_judge: LoadJudge | None,
    pairings: Mapping[Key, tuple[Answers, Answers]],
    reporter: Reporter,
    sampling: Sampling,
) -> tuple[ReadyJudge | None, Results]:
    """Load the judge and ask it.

    Raises:
        DataError: It has no verdict on too many answers.
    """
    if load_judge is None:
        return None, {}
    judge = load_judge([each for pair in pairings.values() for answers in pair for each in answers.values()])
    found = compare_models(judge.judge, list(pairings.values()), reporter, "evaluate", sampling)
    return judge, dict(zip(pairings, found, strict=True))


def judged_metrics(judge: ReadyJudge, results: Results, temperature: float, sampling: Sampling) -> dict[str, Any]:
    """What the comparisons say: against SFT, against the chosen answers, and how the judge does on the data's pairs."""
    metrics = {"judge_name": judge.name} | win_metrics(results["main", temperature, SFT], sampling, reads=judge.reads)
    if against := results.get(("main", temperature, "chosen")):
        metrics |= against_chosen_metrics(against)
    if tried := results.get(("data", 0.0, "rejected")):
        metrics |= judge_metrics(tried)
    return metrics


def frontier(
    judge: ReadyJudge | None,
    results: Results,
    kls: Mapping[str, SequenceKl],
    scaled: Scaled,
    sampling: Sampling,
) -> list[tuple[float, Estimate, ComparisonResult | None, float | None]]:
    """Scale, KL, result against SFT and gain in reward, from the SFT model on; empty without other scales."""
    if judge is None or not scaled:
        return []
    reward = judge.reward
    points: list[tuple[float, Estimate, ComparisonResult | None, float | None]] = [
        (0.0, Estimate(0.0, 0.0, 0.0), None, None if reward is None else 0.0)
    ]
    by_scale = {1.0: kls} | {scale: found for scale, (_, found) in scaled.items()}
    for scale in sorted(by_scale):
        result, found = results["scale", scale, SFT], by_scale[scale]
        kl = sampling.interval([each.exact for each in found.values()], list(found))
        gain = None
        if reward is not None:
            ours, theirs = (
                float(np.mean([reward(each.asked, each.text) for each in answers.values()]))
                for answers in (result.ours, result.theirs)
            )
            gain = ours - theirs
        points.append((scale, kl, result, gain))
    return points
