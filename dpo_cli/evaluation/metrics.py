"""The figures of reports/evaluate/metrics.json, each group of them from the tables that it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_cli.evaluation.held_out import HeldOut
from dpo_cli.evaluation.kl import SequenceKl, estimates_disagree
from dpo_cli.evaluation.text_quality import distinct, repetition
from dpo_cli.judging.win_rate import Answers, ComparisonResult, paired_difference
from dpo_cli.statistics.binomial import exact_interval
from dpo_cli.statistics.bootstrap import Sampling, ends
from dpo_cli.statistics.calibration import calibration_error, fit_temperature
from dpo_cli.statistics.length_control import control_length
from dpo_cli.statistics.power import detectable_of_interval

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

CHEAPER_KL = 0.75
"""A smaller step counts as cheaper where its KL is at most this share of the model's."""
AS_GOOD = 0.05
"""It counts as as good where the model's win rate is surely not higher by more than this."""


def held_out_metrics(held_out: HeldOut, sampling: Sampling) -> dict[str, Any]:
    """What the held-out pairs say."""
    margins = np.array(held_out.margins)
    error = calibration_error(margins, [row.group for row in held_out.rows], **sampling.keywords)
    temperature = fit_temperature(margins)
    note = ""
    if temperature == 0:
        note = "no pair is in the wrong order, so no probability is too sure"
    elif not margins.any():
        note = "all margins are 0, so no probability is more than one half"
    elif math.isinf(temperature):
        note = "the margins point the wrong way on average, so a coin does better"
    return {
        "reward_accuracy": held_out.reward_accuracy.value,
        "reward_accuracy_ci": ends(held_out.reward_accuracy),
        "loss": held_out.loss.value,
        "loss_ci": ends(held_out.loss),
        "loss_at_reference": math.log(2),
        "margin": held_out.margin.value,
        "margin_ci": ends(held_out.margin),
        "margin_quantiles": {
            f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(margins, QUANTILES), strict=True)
        },
        "calibration_error": error.value,
        "calibration_error_ci": ends(error),
        "calibration_temperature": temperature if math.isfinite(temperature) and temperature > 0 else None,
        "calibration_note": note,
        "chosen_reward": held_out.chosen_reward,
        "rejected_reward": held_out.rejected_reward,
        "reference_accuracy": held_out.reference_accuracy,
        "longer_accuracy": held_out.longer_accuracy,
        "num_ties": held_out.num_ties,
        "num_pairs": held_out.num_pairs,
        "num_prompts": held_out.num_prompts,
    }


def perplexity(logps: Sequence[float], num_tokens: int) -> float:
    """exp(-mean log-probability of a token), over all tokens of all texts."""
    return math.exp(-math.fsum(logps) / num_tokens)


def divergence_metrics(kls: Mapping[str, SequenceKl], sampling: Sampling) -> dict[str, Any]:
    """KL of the policy from the reference along the policy's samples at temperature 1, nats a sequence."""
    prompts = list(kls)
    found = list(kls.values())
    kl = sampling.interval([each.exact for each in found], prompts)
    num_tokens = sum(each.num_tokens for each in found)
    return {
        "kl": kl.value,
        "kl_ci": ends(kl),
        "kl_k1": _mean([each.k1 for each in found]),
        "kl_k3": _mean([each.k3 for each in found]),
        "kl_per_token": math.fsum(each.exact for each in found) / num_tokens,
        "kl_estimates_disagree": estimates_disagree(found),
        "entropy_dpo": math.fsum(each.entropy for each in found) / num_tokens,
        "entropy_sft": math.fsum(each.reference_entropy for each in found) / num_tokens,
    }


def answer_metrics(answers: Mapping[str, Answers]) -> dict[str, Any]:
    """What the sampled answers look like, by the model's name and prompt: sft and dpo."""
    metrics: dict[str, Any] = {}
    for name, by_prompt in answers.items():
        found = list(by_prompt.values())
        metrics[f"finished_{name}"] = _mean([answer.finished for answer in found])
        metrics[f"answer_tokens_{name}"] = _mean([len(answer.tokens) for answer in found])
        metrics[f"repetition_{name}"] = _mean([repetition(answer.tokens) for answer in found])
        metrics[f"distinct_{name}"] = distinct([answer.tokens for answer in found])
    metrics["length_ratio"] = metrics["answer_tokens_dpo"] / metrics["answer_tokens_sft"]
    return metrics


def form_metrics(forms: Sequence[tuple[bool, bool]], confidence: float) -> dict[str, Any]:
    """Which model's answers keep their form, where only one of the two does: paired, so that what both do says nothing.

    Args:
        forms: Of each prompt, whether SFT's answer is well formed, and whether the tuned model's is.
        confidence: Coverage of the exact interval.

    Source: McNemar 1947, of whose test this is the exact form.
    """
    decided = [ours for theirs, ours in forms if ours != theirs]
    return {
        "num_form_decided": len(decided),
        "form_win_rate": sum(decided) / len(decided) if decided else None,
        "form_win_rate_ci": [*exact_interval(sum(decided), len(decided), confidence)] if decided else None,
    }


def win_metrics(result: ComparisonResult, sampling: Sampling, *, reads: bool) -> dict[str, Any]:
    """The win rate over the SFT model, and what stands behind it.

    Args:
        result: The policy's answers with the SFT model's.
        sampling: How intervals are drawn.
        reads: Whether the judge reads two texts in an order.
    """
    summary = result.summary
    wins = result.wins
    ids = list(wins)
    lengths = [result.ours[id].num_tokens - result.theirs[id].num_tokens for id in ids]
    controlled = control_length(
        [wins[id] for id in ids], lengths, [result.ours[id].group for id in ids], **sampling.keywords
    )
    metrics: dict[str, Any] = {
        "win_rate": result.win_rate.value,
        "win_rate_ci": ends(result.win_rate),
        "tie_rate": result.tie_rate,
        "num_judged": len(wins),
        "num_decided": len(wins) - summary.num_ties,
        "num_identical": summary.num_identical,
        "num_judge_invalid": summary.num_invalid,
        "judge_invalid_rate": summary.invalid_rate,
        "detectable_win_rate": detectable_of_interval(result.win_rate, sampling.confidence),
        "win_rate_lc": None if controlled.controlled is None else controlled.controlled.value,
        "win_rate_lc_ci": None if controlled.controlled is None else ends(controlled.controlled),
        "length_effect": None if controlled.controlled is None else controlled.length_effect,
        "length_scale": controlled.scale,
        "length_note": controlled.why,
    }
    if reads:
        metrics["judge_consistency"] = summary.consistency
        metrics["judge_first_position_rate"] = summary.first_position_rate
    return metrics


def against_chosen_metrics(result: ComparisonResult) -> dict[str, Any]:
    """The win rate over the data's chosen answers."""
    return {
        "win_rate_chosen": result.win_rate.value,
        "win_rate_chosen_ci": ends(result.win_rate),
        "num_judged_chosen": len(result.wins),
    }


def judge_metrics(result: ComparisonResult) -> dict[str, Any]:
    """How often the judge prefers the chosen answer of a held-out pair to the rejected one."""
    return {
        "judge_agreement": result.win_rate.value,
        "judge_agreement_ci": ends(result.win_rate),
        "num_judge_agreement": len(result.wins),
    }


def cheaper_step(points: Sequence[tuple[float, float, ComparisonResult]], sampling: Sampling) -> dict[str, Any]:
    """Whether a smaller step than training's would have been as good at a lower price.

    Args:
        points: Scale of what training changed, KL in nats and result with the SFT model; scale 1 is among them.
        sampling: How intervals are drawn.

    Returns:
        How many smaller steps there are and, where one is cheaper and as good, the smallest of these: scale, KL, win
        rate, and the difference of the model's win rate from it with its paired interval, which holds 0 or lies
        below it, and nothing above :data:`AS_GOOD`.
    """
    ((_, whole_kl, whole),) = [point for point in points if point[0] == 1]
    smaller = sorted((point for point in points if point[0] < 1), key=lambda point: point[0])
    for scale, kl, result in smaller:
        gain = paired_difference(whole, result, sampling)
        if kl <= CHEAPER_KL * whole_kl and gain.low <= 0 and gain.high <= AS_GOOD:  # not where there is no interval
            return {
                "num_smaller_steps": len(smaller),
                "cheaper_scale": scale,
                "cheaper_kl": kl,
                "cheaper_win_rate": result.win_rate.value,
                "cheaper_gain": gain.value,
                "cheaper_gain_ci": ends(gain),
            }
    return {"num_smaller_steps": len(smaller)}


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation; None where one of them does not vary."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
