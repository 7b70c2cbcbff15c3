"""Experiments against each other: every two judged on the prompts that all have, and strengths by Bradley-Terry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from dpo_cli.core import paths
from dpo_cli.core.errors import DataError, ParamsError
from dpo_cli.core.judges import JUDGES
from dpo_cli.core.load_params import load_params
from dpo_cli.core.progress import Reporter
from dpo_cli.data.schema import Messages
from dpo_cli.evaluation import SFT
from dpo_cli.evaluation.experiments import Experiment
from dpo_cli.judging.answers import Answer
from dpo_cli.judging.prepare import prepare_judge
from dpo_cli.judging.win_rate import ComparisonResult, compare_models
from dpo_cli.models.load import quiet_libraries
from dpo_cli.models.project import open_project
from dpo_cli.statistics.intervals import Estimate, Sampling, ends
from dpo_cli.statistics.logistic import Outcome, fit_strengths

_READ = (
    "model.",
    "reference.",
    "runtime.",
    *(f"evaluate.{name}=" for name in ("judge", "bootstrap_draws", "confidence", "seed")),
    *(setting for kind in JUDGES.values() if kind.judges_any for setting in kind.settings),
)


@dataclass(frozen=True)
class HeadToHead:
    """What a judge says of several models.

    Attributes:
        reads: Whether the judge reads two texts in an order.
        models: Their names, the baseline first and the SFT model last.
        results: By two of them, the later one's answers as ours.
        strengths: Bradley-Terry's by model, logits, the baseline being 0; None where they are infinite.
        why: Why they are; empty otherwise.
        num_prompts: Prompts that all models answered.
        num_left_out: Prompts that only some of them did.
    """

    judge: str
    reads: bool
    models: list[str]
    results: dict[tuple[str, str], ComparisonResult]
    strengths: dict[str, Estimate] | None
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


def judge_experiments(experiments: Sequence[Experiment], overrides: Sequence[str], reporter: Reporter) -> HeadToHead:
    """Judge every two of the experiments and their SFT model, by section evaluate of params.yaml; fit strengths.

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
    if evaluate.judge == "none" or not JUDGES[evaluate.judge].judges_any:
        raise ParamsError(
            f"--judge has no effect with evaluate.judge {evaluate.judge}; set another one, as in"
            " --set evaluate.judge=hf"
        )
    texts, prompts = answers_by_model(experiments)
    if not prompts:
        raise DataError("the experiments share no prompt; evaluate them on the same data")
    num_all = len({id for experiment in experiments for id in experiment.answers})
    project = open_project(params, reporter, "compare")
    load_judge = prepare_judge(evaluate, project, ("", ""), paths.scratch_root() / "evaluate" / "judgments")
    assert load_judge is not None
    models = {
        name: {id: Answer.of_text(id, prompts[id], text) for id, text in answers.items()}
        for name, answers in texts.items()
    }
    judge = load_judge([each for answers in models.values() for each in answers.values()])
    sampling = Sampling(evaluate.bootstrap_draws, evaluate.confidence, evaluate.seed)
    names = list(models)
    pairs = [(second, first) for first, second in combinations(names, 2)]
    found = compare_models(
        judge.judge, [(models[ours], models[theirs]) for ours, theirs in pairs], reporter, "compare", sampling
    )
    results = dict(zip(pairs, found, strict=True))
    outcomes = [
        Outcome(id, ours, theirs, win) for (ours, theirs), result in results.items() for id, win in result.wins.items()
    ]
    strengths, why = None, ""
    try:
        strengths = fit_strengths(outcomes, names[0], sampling)
    except ValueError as error:
        why = str(error)
    return HeadToHead(judge.name, judge.reads, names, results, strengths, why, len(prompts), num_all - len(prompts))


def head_to_head_json(found: HeadToHead) -> dict[str, Any]:
    """The same as one JSON value."""
    strengths = None
    if found.strengths is not None:
        strengths = {name: {"value": each.value, "ci": ends(each)} for name, each in found.strengths.items()}
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
