"""Whose answers are compared with whose, and what a judge says of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dpo_cli.core.progress import Reporter
from dpo_cli.evaluation.kl import SequenceKl
from dpo_cli.evaluation.measurement import Measurement, Scaled
from dpo_cli.evaluation.metrics import against_chosen_metrics, judge_metrics, win_metrics
from dpo_cli.evaluation.model_names import SFT
from dpo_cli.judging.prepare import LoadJudge, ReadyJudge
from dpo_cli.judging.win_rate import Answers, ComparisonResult, compare_models
from dpo_cli.statistics.bootstrap import Estimate, Sampling

Key = tuple[str, float, str]
"""What a comparison is for (main, temperature, scale, data), the temperature or scale, and the opponent."""

Results = Mapping[Key, ComparisonResult]


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

    answers = measurement.answers
    policy, reference = measurement.models.policy, measurement.models.reference
    found: dict[Key, tuple[Answers, Answers]] = {}
    kinds = [("main", evaluate.temperature), *(("temperature", each) for each in evaluate.temperatures)]
    for kind, temperature in kinds:
        ours = answers(policy, temperature)
        for opponent in evaluate.opponents:
            theirs = chosen if opponent == "chosen" else answers(reference, temperature)
            found[kind, temperature, opponent] = ours, theirs
    if scaled:
        theirs = answers(reference, 1.0)
        found["scale", 1.0, SFT] = answers(policy, 1.0), theirs
        for scale, (sampled, _) in scaled.items():
            found["scale", scale, SFT] = sampled, theirs
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
