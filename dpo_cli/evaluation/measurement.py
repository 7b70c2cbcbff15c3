"""What an evaluation asks of the models and of the judge, and whose answers are compared with whose.

Legend: rows of pairs go by the row's id, answers by the prompt's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError
from dpo_cli.core.params import EvaluateParams
from dpo_cli.core.progress import Reporter
from dpo_cli.data.schema import Messages, text_of
from dpo_cli.data.tokenize import TokenTable, explain_rejects, read_columns
from dpo_cli.data.tokens import TokenGroup, pieces_of
from dpo_cli.data.unpaired import beside_others, pairs_of
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


class HeldOut(NamedTuple):
    """What is held out.

    Attributes:
        pairs: Pairs, those of a good and a bad answer to one prompt among them.
        answers: Where there are single answers all answers, each with another prompt's beside it.
        is_good: Of each of them, by its id.
    """

    pairs: TokenTable
    answers: TokenTable
    is_good: Mapping[str, bool]

    @property
    def groups(self) -> list[TokenGroup]:
        """Pairs and answers."""
        return [*self.pairs.groups, *self.answers.groups]

    @property
    def prompts(self) -> dict[str, Messages]:
        """The prompts' messages, by group id."""
        return self.pairs.prompts | (self.answers.prompts if self.answers.groups else {})


def read_held_out(project: Project) -> HeldOut:
    """The held-out preferences as token groups.

    Raises:
        DataError: There are none.
    """
    table = project.tokenize_preferences("eval")
    found = HeldOut(pairs_of(table), *beside_others(table, project.max_length))
    if not found.groups:
        why = explain_rejects([table], "reference.max_length", project.max_length)
        raise DataError(f"data/preference/eval.parquet: {why}")
    return found


class Measurement(Steps):
    """The steps of an evaluation with its models and the held-out preferences.

    Args:
        project: Whose models they are.
        held_out: The pairs and single answers.
        evaluate: How many prompts are answered, and how.
        models: Policy and reference.
        folder: Where rows are kept, in the scratch area.

    Raises:
        DataError: A prompt with its answer is longer than the model's context.
    """

    def __init__(
        self, project: Project, held_out: HeldOut, evaluate: EvaluateParams, models: EvaluatedModels, folder: Path
    ) -> None:
        super().__init__(project, evaluate, folder)
        self.models = models
        self.prompts = _prompts(held_out, evaluate.num_prompts)
        self._held_out = held_out
        self._messages = held_out.prompts
        self._answers: dict[tuple[str, float], dict[str, Answer]] = {}
        self._texts, self._texts_of_answers = _texts_of(held_out)
        longest = max(len(prompt.tokens) for prompt in self.prompts)
        project.check_context(longest + evaluate.max_new_tokens, "evaluate.max_new_tokens + the longest prompt")

    def pairs(self, cache: Mapping[str, float], beta: float) -> list[ScoredGroup]:
        """The held-out pairs by policy and cached reference, in the order of their ids."""
        return self._implicit(self._held_out.pairs, cache, beta, "scoring held-out pairs")

    def single_answers(self, cache: Mapping[str, float], beta: float) -> tuple[list[ScoredGroup], Mapping[str, bool]]:
        """The same of the held-out answers, each with another prompt's beside it; and which are good, by id."""
        answers = self._implicit(self._held_out.answers, cache, beta, "scoring held-out answers")
        return answers, self._held_out.is_good

    def _implicit(self, table: TokenTable, cache: Mapping[str, float], beta: float, what: str) -> list[ScoredGroup]:
        if not table.groups:
            return []
        reference = reference_logps(cache, table.groups)
        logps = self.scored(self.models.policy, table.groups, what).logps
        return [
            ScoredGroup.implicit(
                (group.id, group.group),
                [logps[key] for key in group.keys],
                reference[group.id],
                group.sizes[1:],
                beta,
            )
            for group in _by_id(table)
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
        """The chosen and rejected answers of the first pair of each prompt, by prompt id; else its first answer."""
        first: tuple[dict[str, tuple[TokenGroup, int, str]], ...] = {}, {}
        for group in _by_id(self._held_out.pairs):
            for side, text in enumerate(self._texts[group.id]):
                first[side].setdefault(group.group, (group, side, text))
        for group in _by_id(self._held_out.answers):
            side = 0 if self._held_out.is_good[group.id] else 1
            first[side].setdefault(group.group, (group, 0, self._texts_of_answers[group.id]))
        chosen, rejected = (
            {prompt.id: self._data_answer(*each[prompt.id]) for prompt in self.prompts if prompt.id in each}
            for each in first
        )
        return chosen, rejected

    def judged_pairs(self) -> tuple[Answers, Answers]:
        """Chosen and rejected answers of the held-out pairs that the judge is tried on, by row id."""
        groups = _by_id(self._held_out.pairs)
        groups = groups if self.evaluate.judge_pairs < 0 else groups[: self.evaluate.judge_pairs]
        chosen, rejected = (
            {group.id: self._data_answer(group, side, self._texts[group.id][side]) for group in groups}
            for side in (0, 1)
        )
        return chosen, rejected

    def _data_answer(self, group: TokenGroup, side: int, text: str) -> Answer:
        messages = self._messages[group.group]
        return Answer(group.id, group.group, group.prompt, (group.completions[side],), messages, text)


def _by_id(table: TokenTable) -> list[TokenGroup]:
    return sorted(table.groups, key=lambda group: group.id)


def _prompts(held_out: HeldOut, limit: int) -> list[PromptTokens]:
    """The held-out prompts to answer, each once, in the order of their ids, which is random."""
    tokens = {group.group: group.prompt for group in held_out.groups}
    chosen, messages = sorted(tokens)[: limit or None], held_out.prompts
    return [PromptTokens(group, tokens[group], messages[group]) for group in chosen]


def _texts_of(held_out: HeldOut) -> tuple[dict[str, tuple[str, str]], dict[str, str]]:
    """The texts of chosen and rejected answer of the held-out pairs, and those of single answers, by id."""
    rows = read_columns(paths.preference_table("eval"), "chosen", "rejected")
    texts = {id: (text_of(chosen), text_of(rejected)) for id, (chosen, rejected) in rows.items()}
    of_pairs = {id: (texts[good][0], texts[bad][1]) for id, (good, bad) in held_out.pairs.of_rows.items()}
    single = {id: texts[id.removesuffix("-")][0 if good else 1] for id, good in held_out.is_good.items()}
    return texts | of_pairs, single


# --- comparisons ----------------------------------------------------------------------------


def make_pairings(measurement: Measurement, chosen: Answers, scaled: Scaled) -> dict[Key, tuple[Answers, Answers]]:
    """All comparisons to make, ours and theirs; none without a judge.

    Args:
        measurement: Samples the answers.
        chosen: The data's chosen answers by prompt id.
        scaled: Answers of the model at other scales.

    Raises:
        DataError: There are no chosen answers to compare with.
    """
    evaluate = measurement.evaluate
    if evaluate.judge == "none":
        return {}
    sampled = measurement.sampled
    policy, reference = measurement.models.policy, measurement.models.reference
    found: dict[Key, tuple[Answers, Answers]] = {}
    kinds = [("main", evaluate.temperature), *(("temperature", each) for each in evaluate.temperatures)]
    if "chosen" in evaluate.opponents and not chosen:
        raise DataError("evaluate.opponents: no held-out prompt has a chosen answer; take 'chosen' out")
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
    tried = measurement.judged_pairs()
    if tried[0]:
        found["data", 0.0, "rejected"] = tried
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
