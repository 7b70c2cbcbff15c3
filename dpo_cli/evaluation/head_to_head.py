"""Experiments against each other: every two judged on the prompts that all have, and strengths by Bradley-Terry."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.load_params import load_params
from dpo_cli.core.progress import Reporter
from dpo_cli.data.schema import Messages
from dpo_cli.evaluation.differences import Experiment
from dpo_cli.evaluation.model_names import SFT
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.prepare import ReadyJudge, prepare_judge
from dpo_cli.judging.win_rate import ComparisonResult, compare_models
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import open_project
from dpo_cli.statistics.bootstrap import Estimate, Sampling, ends
from dpo_cli.statistics.bradley_terry import Outcome, Strengths, fit_strengths

_READ = (
    "model.", "reference.", "runtime.",
    *(f"evaluate.{name}" for name in ("judge=", "hf.", "openai.", "bootstrap_draws=", "confidence=", "seed=")),
)  # fmt: skip


@dataclass(frozen=True)
class HeadToHead:
    """What a judge says of several models.

    Attributes:
        judge: Its name.
        reads: Whether it reads two texts in an order.
        models: Their names, the baseline first and the SFT model last.
        results: By two of them, the later one's answers as ours.
        strengths: Bradley-Terry's, the baseline being 0; None where they are infinite.
        why: Why they are; empty otherwise.
        num_prompts: Prompts that all models answered.
        num_left_out: Prompts that only some of them did.
    """

    judge: str
    reads: bool
    models: list[str]
    results: dict[tuple[str, str], ComparisonResult]
    strengths: Strengths | None
    why: str
    num_prompts: int
    num_left_out: int

    def win_rate(self, first: str, second: str) -> Estimate:
        """How often the first model's answer is better than the second's, with its interval."""
        if (first, second) in self.results:
            return self.results[first, second].win_rate
        found = self.results[second, first].win_rate
        return Estimate(1 - found.value, 1 - found.high, 1 - found.low)


def answers_by_model(experiments: Sequence[Experiment]) -> tuple[dict[str, dict[str, str]], dict[str, Messages]]:
    """The answers of each model by prompt, over the prompts that all experiments have, and the prompts.

    The SFT model is one of them; where experiments differ in it, it is that of each.
    """
    shared = set.intersection(*(set(experiment.answers) for experiment in experiments))
    ids = sorted(shared)
    models = {each.name: {id: each.answers[id].dpo for id in ids} for each in experiments}
    baselines = {each.name: {id: each.answers[id].sft for id in ids} for each in experiments}
    first = baselines[experiments[0].name]
    if all(found == first for found in baselines.values()):
        models[SFT if SFT not in models else f"{SFT}, the reference"] = first
    else:
        models |= {f"{SFT} of {name}": found for name, found in baselines.items()}
    return models, {id: experiments[0].answers[id].prompt for id in ids}


def compare_every_two(
    models: Mapping[str, Mapping[str, str]],
    judged_answer: Callable[[str, str], Answer],
    judge: ReadyJudge,
    num_left_out: int,
    reporter: Reporter,
    sampling: Sampling,
) -> HeadToHead:
    """Judge every two models, and fit their strengths.

    Args:
        models: Answers by prompt id, by model; the first is the anchor.
        judged_answer: From prompt id and answer to what is judged.
        judge: Who decides.
        num_left_out: Prompts that only some of the models have.
        reporter: Shows progress.
        sampling: How intervals are drawn.

    Raises:
        DataError: The judge has no verdict on too many comparisons.
    """
    names = list(models)
    judged = {name: {id: judged_answer(id, text) for id, text in answers.items()} for name, answers in models.items()}
    pairs = [(second, first) for first, second in combinations(names, 2)]
    found = compare_models(
        judge.judge, [(judged[ours], judged[theirs]) for ours, theirs in pairs], reporter, "compare", sampling
    )
    results = dict(zip(pairs, found, strict=True))
    outcomes = [
        Outcome(id, ours, theirs, win) for (ours, theirs), result in results.items() for id, win in result.wins.items()
    ]
    strengths, why = None, ""
    try:
        strengths = fit_strengths(outcomes, names[0], **sampling.keywords)
    except ValueError as error:
        why = str(error)
    num_prompts = len(next(iter(models.values())))
    return HeadToHead(judge.name, judge.reads, names, results, strengths, why, num_prompts, num_left_out)


def judge_experiments(experiments: Sequence[Experiment], overrides: Sequence[str], reporter: Reporter) -> HeadToHead:
    """Judge the answers of experiments, and of their SFT model, by section evaluate of params.yaml.

    Raises:
        ParamsError: There is no judge, or one that judges other answers.
        StaleArtifactError: Something that the judge needs is missing.
        DataError: The experiments share no prompt, or the judge has no verdict on too many comparisons.
    """
    quiet_libraries()
    idle = [override for override in overrides if not override.strip().startswith(_READ)]
    if idle:
        raise ParamsError([f"--set {override} has no effect on compare --judge" for override in idle])
    params = load_params(paths.PARAMS, overrides)
    evaluate = params.evaluate
    if evaluate.judge in ("none", "votes"):
        raise ParamsError(
            f"--judge has no effect with evaluate.judge {evaluate.judge}; set another one, as in"
            " --set evaluate.judge=hf"
        )
    models, prompts = answers_by_model(experiments)
    if not prompts:
        raise DataError("the experiments share no prompt; evaluate them on the same data")
    num_all = len({id for experiment in experiments for id in experiment.answers})
    project = open_project(params, reporter, "compare")
    memory = paths.scratch_root() / "evaluate" / "judgments"
    load_judge = prepare_judge(evaluate, project, ("", ""), memory)
    assert load_judge is not None

    def judged_answer(id: str, text: str) -> Answer:
        return Answer.of_text(id, prompts[id], text)

    every = [judged_answer(id, text) for answers in models.values() for id, text in answers.items()]
    judge = load_judge(every)
    sampling = Sampling(evaluate.bootstrap_draws, evaluate.confidence, evaluate.seed)
    return compare_every_two(models, judged_answer, judge, num_all - len(prompts), reporter, sampling)


def head_to_head_json(found: HeadToHead) -> dict[str, Any]:
    """The same as one JSON value."""
    strengths = None
    if found.strengths is not None:
        fitted = found.strengths.strengths.items()
        strengths = {name: {"value": each.value, "ci": ends(each)} for name, each in fitted}
    return {
        "judge": found.judge,
        "num_prompts": found.num_prompts,
        "num_left_out": found.num_left_out,
        "win_rates": [
            {
                "model": ours,
                "opponent": theirs,
                "value": result.win_rate.value,
                "ci": ends(result.win_rate),
                "tie_rate": result.tie_rate,
            }
            for (ours, theirs), result in found.results.items()
        ],
        "strengths": strengths,
        **({"why": found.why} if found.why else {}),
    }
