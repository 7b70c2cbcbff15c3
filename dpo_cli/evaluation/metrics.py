"""The figures of reports/evaluate/metrics.json, each group of them from the tables that it is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dpo_cli.core.params import TrainParams
from dpo_cli.evaluation import DPO, SFT
from dpo_cli.evaluation.kl import SequenceKl, estimates_disagree
from dpo_cli.evaluation.rewards import ScoredGroup
from dpo_cli.judging.win_rate import Answers, ComparisonResult, paired_difference
from dpo_cli.losses.batchwise import kto
from dpo_cli.losses.pairwise import Pairs
from dpo_cli.statistics.auc import auc
from dpo_cli.statistics.calibration import calibration_error, fit_temperature, half_ties
from dpo_cli.statistics.intervals import Sampling, detectable_of_interval, ends, exact_interval, with_interval
from dpo_cli.statistics.logistic import control_length

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

CHEAPER_KL = 0.75
"""A smaller step counts as cheaper where its KL is at most this share of the model's."""
AS_GOOD = 0.05
"""It counts as as good where the model's win rate is surely not higher by more than this."""


def held_out_metrics(pairs: Sequence[ScoredGroup], losses: Sequence[float], sampling: Sampling) -> dict[str, Any]:
    """What the held-out pairs say, without anything generated.

    Args:
        pairs: With their implicit rewards, in the order of their ids. A tie (equal rewards) counts one half.
        losses: -log sigma(margin) of each.
        sampling: How intervals are drawn, clustered by prompt.
    """
    groups = [pair.group for pair in pairs]
    margins = np.array([pair.margin for pair in pairs])
    rewards = torch.tensor([pair.rewards for pair in pairs], dtype=torch.float64)
    reference = torch.tensor([pair.reference for pair in pairs], dtype=torch.float64)
    num_tokens = torch.tensor([pair.num_tokens for pair in pairs], dtype=torch.float64)
    temperature = fit_temperature(margins)
    note = ""
    if temperature == 0:
        note = "no pair is in the wrong order, so no probability is too sure"
    elif not margins.any():
        note = "all margins are 0, so no probability is more than one half"
    elif math.isinf(temperature):
        note = "the margins point the wrong way on average, so a coin does better"
    return {
        **with_interval("reward_accuracy", sampling.rate(half_ties(margins).tolist(), groups)),
        **with_interval("loss", sampling.interval(losses, groups)),
        "loss_at_reference": math.log(2),
        **with_interval("margin", sampling.interval(margins.tolist(), groups)),
        "margin_quantiles": {
            f"{q:g}": float(value) for q, value in zip(QUANTILES, np.quantile(margins, QUANTILES), strict=True)
        },
        **with_interval("calibration_error", calibration_error(margins, groups, sampling)),
        "calibration_temperature": temperature if math.isfinite(temperature) and temperature > 0 else None,
        "calibration_note": note,
        "chosen_reward": rewards[:, 0].mean().item(),
        "rejected_reward": rewards[:, 1].mean().item(),
        "reference_accuracy": _share_first(reference),
        "longer_accuracy": _share_first(num_tokens),
        "num_ties": int((margins == 0).sum()),
        "num_pairs": len(pairs),
        "num_prompts": len(set(groups)),
    }


def answer_reward_metrics(
    answers: Sequence[ScoredGroup], is_good: Mapping[str, bool], train: TrainParams, sampling: Sampling
) -> dict[str, Any]:
    """What held-out answers that are good or bad by themselves say, whether or not a prompt has both.

    Args:
        answers: With their implicit rewards; second in each is another prompt's answer, which KTO's KL is taken from.
        is_good: By the id of each.
        train: beta and the weights of good and bad answers.
        sampling: How intervals are drawn, clustered by prompt.
    """
    good = np.array([is_good[answer.id] for answer in answers])
    prompts = np.array([answer.group for answer in answers])
    rewards, lengths = (np.array([getattr(each, name)[0] for each in answers]) for name in ("rewards", "num_tokens"))
    policy, reference = (
        torch.tensor([getattr(each, name) for each in answers], dtype=torch.float64) for name in ("policy", "reference")
    )
    weights = train.beta, train.desirable_weight, train.undesirable_weight
    losses, before = (
        kto(Pairs(logps, reference, torch.ones_like(reference)), torch.from_numpy(good), *weights).tolist()
        for logps in (policy, reference)
    )
    metrics: dict[str, Any] = {
        **with_interval("kto_loss", sampling.interval(losses, prompts.tolist())),
        "kto_loss_at_reference": _mean(before),
        "num_good": int(good.sum()),
        "num_bad": int((~good).sum()),
        "num_answer_prompts": len(set(prompts.tolist())),
    }
    for name, side in (("good_reward", good), ("bad_reward", ~good)):
        if side.any():
            metrics |= with_interval(name, sampling.interval(rewards[side].tolist(), prompts[side].tolist()))
    if 0 < good.sum() < len(good):
        metrics |= with_interval("auc", auc(rewards.tolist(), good.tolist(), prompts.tolist(), sampling))
        metrics["longer_auc"] = auc(lengths.tolist(), good.tolist(), prompts.tolist(), sampling).value
    return metrics


def _share_first(values_B2: torch.Tensor) -> float:
    """How often the chosen answer has more of something, ties as one half."""
    return (((values_B2[:, 0] - values_B2[:, 1]).sign() + 1) / 2).mean().item()


def perplexity(logps: Sequence[float]) -> float:
    """exp(-mean log-probability of a token), over all tokens of all texts."""
    return math.exp(-_mean(logps))


def divergence_metrics(kls: Mapping[str, SequenceKl], sampling: Sampling) -> dict[str, Any]:
    """KL of the policy from the reference along the policy's samples at temperature 1, nats a sequence."""
    prompts = list(kls)
    found = list(kls.values())
    num_tokens = sum(each.num_tokens for each in found)
    return {
        **with_interval("kl", sampling.interval([each.exact for each in found], prompts)),
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
    metrics["length_ratio"] = metrics[f"answer_tokens_{DPO}"] / metrics[f"answer_tokens_{SFT}"]
    return metrics


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of an answer's n-grams that stood in it before; 0 where it is shorter than n tokens.

    Source: Welleck et al. 2019, Neural text generation with unlikelihood training, section 6.1 (seq-rep-n).
    """
    grams = _grams(tokens, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def distinct(answers: Sequence[Sequence[int]], n: int = 2) -> float | None:
    """Different n-grams over all n-grams of all answers; None where none is so long.

    It falls with the number of tokens, so only figures over as many prompts and like lengths compare.

    Source: Li et al. 2016, A diversity-promoting objective function, section 5 (distinct-n).
    """
    grams = [gram for tokens in answers for gram in _grams(tokens, n)]
    return len(set(grams)) / len(grams) if grams else None


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[begin : begin + n]) for begin in range(len(tokens) - n + 1)]


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
    """The win rate of the policy over the SFT model, and what stands behind it; a judge may read texts in an order."""
    summary, wins = result.summary, result.wins
    ids = list(wins)
    lengths = [result.ours[id].num_tokens - result.theirs[id].num_tokens for id in ids]
    controlled = control_length([wins[id] for id in ids], lengths, [result.ours[id].group for id in ids], sampling)
    at_equal_length = controlled.controlled
    metrics: dict[str, Any] = {
        **with_interval("win_rate", result.win_rate),
        "tie_rate": result.tie_rate,
        "num_judged": len(wins),
        "num_decided": len(wins) - summary.num_ties,
        "num_identical": summary.num_identical,
        "num_judge_invalid": summary.num_invalid,
        "judge_invalid_rate": summary.invalid_rate,
        "detectable_win_rate": detectable_of_interval(result.win_rate, sampling.confidence),
        "win_rate_lc": None if at_equal_length is None else at_equal_length.value,
        "win_rate_lc_ci": None if at_equal_length is None else ends(at_equal_length),
        "length_effect": None if at_equal_length is None else controlled.length_effect,
        "length_scale": controlled.scale,
        "length_note": controlled.why,
    }
    if reads:
        metrics["judge_consistency"] = summary.consistency
        metrics["judge_first_position_rate"] = summary.first_position_rate
    return metrics


def against_chosen_metrics(result: ComparisonResult) -> dict[str, Any]:
    """The win rate over the data's chosen answers."""
    return {**with_interval("win_rate_chosen", result.win_rate), "num_judged_chosen": len(result.wins)}


def judge_metrics(result: ComparisonResult) -> dict[str, Any]:
    """How often the judge prefers the chosen answer of a held-out pair to the rejected one."""
    return {**with_interval("judge_agreement", result.win_rate), "num_judge_agreement": len(result.wins)}


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
                **with_interval("cheaper_gain", gain),
            }
    return {"num_smaller_steps": len(smaller)}


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation; None where one of them does not vary."""
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
