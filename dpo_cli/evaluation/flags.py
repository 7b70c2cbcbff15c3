"""Lines of the verdict, and flags: the ways in which preference tuning goes wrong, with what to do.

Pure functions of metrics.json. A flag is amber (warn) where something is to be looked at, and red (bad) where it is
surely a loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dpo_cli.core.progress import Status

FEWEST = 6
"""Prompts below which no rate is told from one half: five that all go one way come by chance in 6 of 100 cases."""
LONGER = 1.3
"""Ratio of mean lengths above which the policy counts as long-winded."""
RISING_WITH_LENGTH = 0.5
"""Correlation of the implicit reward with length above which it counts as a reward for length."""
LESS_ENTROPY = 0.5
"""Ratio of entropies below which the policy has collapsed."""
CONSISTENT = 0.7
"""Share of comparisons with the same winner in both orders below which a judge is doubted."""
MORE_UNFINISHED = 0.05
MORE_REPETITION = 0.1
LESS_DISTINCT = 0.5
FEW_END = 0.5
"""Share of answers that end by themselves below which most are cut off."""
MUCH_REPETITION = 0.5
_SIDES = ("chosen", "good"), ("rejected", "bad")


@dataclass(frozen=True)
class Finding:
    """One line of the verdict.

    Attributes:
        name: The quantity.
        value: Its value with interval and unit, as text.
        status: good, warn, bad, or plain where no judgment is made.
        meaning: What it says, in one sentence.
    """

    name: str
    value: str
    status: Status
    meaning: str


def percent(value: float) -> str:
    """A share as text."""
    return f"{100 * value:.1f}%"


def percent_interval(ci: tuple[float, float] | list[float] | None) -> str:
    """An interval of shares as text; empty where there is none."""
    return "" if ci is None else f"[{percent(ci[0])}, {percent(ci[1])}]"


def rate_text(metrics: Mapping[str, Any], name: str) -> str:
    """A share among the metrics with its interval, as text."""
    return f"{percent(metrics[name])} {percent_interval(metrics[f'{name}_ci'])}"


def flags(metrics: Mapping[str, Any]) -> list[Finding]:
    """All flags that the metrics can tell, raised or not."""
    found = [_displacement(metrics), _length_exploitation(metrics)]
    if metrics.get("num_smaller_steps"):
        found.append(_over_optimization(metrics))
    return [*(one for one in found if one is not None), _degeneration(metrics)]


def _displacement(metrics: Mapping[str, Any]) -> Finding | None:
    """Chosen answers that became less likely: amber alone, red with a falling win rate or a collapsed entropy.

    Source: Razin et al. 2024, Unintentional unalignment: likelihood displacement in direct preference optimization.
    """
    chosen, rejected = (metrics.get(f"{pair}_reward", metrics.get(f"{single}_reward")) for pair, single in _SIDES)
    if chosen is None:
        return None
    value = f"{chosen:+.3f}" + ("" if rejected is None else f" (rejected {rejected:+.3f})")
    if chosen >= 0:
        change = "became more likely than before" if chosen > 0 else "are as likely as before"
        return Finding("reward of chosen answers", value, "plain", f"chosen answers {change}")
    reasons = []
    if metrics.get("win_rate_ci") and metrics["win_rate_ci"][1] < 0.5:
        reasons.append("the win rate is below one half")
    if _collapsed(metrics) and _enough(metrics):
        reasons.append("the entropy has collapsed")
    if reasons:
        meaning = f"likelihood displacement: chosen answers became less likely than before, and {' and '.join(reasons)}"
        return Finding("reward of chosen answers", value, "bad", f"{meaning}; raise train.beta, or add an sft loss")
    return Finding(
        "reward of chosen answers",
        value,
        "warn",
        "chosen answers became less likely than before: common with DPO, and not a failure in itself",
    )


def _length_exploitation(metrics: Mapping[str, Any]) -> Finding:
    """Longer answers, and a reward that rises with length.

    Source: Park et al. 2024, Disentangling length from quality in direct preference optimization.
    """
    ratio, correlation = metrics["length_ratio"], metrics["reward_length_correlation"]
    longer = ratio > LONGER
    rising = correlation is not None and correlation > RISING_WITH_LENGTH
    value = f"{ratio:.2f} times SFT's"
    if correlation is not None:
        value += f", correlation {correlation:+.2f}"
    status: Status = "warn" if longer else "plain"
    meaning = "mean tokens of the tuned model's answers, and how its implicit reward correlates with their length"
    if longer:
        meaning = "the tuned model's answers are longer" + (", and its reward rises with length" if rising else "")
        controlled = metrics.get("win_rate_lc_ci")
        if controlled and metrics["win_rate_ci"] and controlled[0] <= 0.5 < metrics["win_rate_ci"][0]:
            status = "bad" if controlled[1] < 0.5 else "warn"
            meaning += "; at equal length its win rate is not above one half"
        meaning += "; see train.ld_alpha and train.loss simpo"
    return Finding("length of answers", value, status, meaning)


def _over_optimization(metrics: Mapping[str, Any]) -> Finding:
    """A smaller step is as good at a lower KL: amber; red where it is surely better.

    Source: Gao et al. 2023, Scaling laws for reward model overoptimization; Rafailov et al. 2024, Scaling laws for
    reward model overoptimization in direct alignment algorithms.
    """
    if "cheaper_scale" not in metrics:
        number = metrics["num_smaller_steps"]
        steps = "smaller step" if number == 1 else "smaller steps"
        return Finding(
            "over-optimization",
            "none seen",
            "plain",
            f"of {number} {steps} in the same direction, none is as good at a lower KL (see the frontier)",
        )
    ci = metrics["cheaper_gain_ci"]
    surely = ci is not None and ci[1] < 0
    return Finding(
        "over-optimization",
        f"{metrics['cheaper_scale']:g} of the update: {percent(metrics['cheaper_win_rate'])} at"
        f" {metrics['cheaper_kl']:.2f} nats",
        "bad" if surely else "warn",
        f"this fraction of the update is {'better than' if surely else 'as good as'} all of it"
        f" ({metrics['kl']:.2f} nats), whose win rate differs by {100 * metrics['cheaper_gain']:+.1f} points"
        + (f" [{100 * ci[0]:+.1f}, {100 * ci[1]:+.1f}]" if ci is not None else "")
        + "; raise train.beta or train less",
    )


def _degeneration(metrics: Mapping[str, Any]) -> Finding:
    """Answers that do not end, repeat themselves or are all alike."""
    before, after = metrics["finished_sft"], metrics["finished_dpo"]
    signs = []
    if after < before - MORE_UNFINISHED:
        signs.append("fewer answers end by themselves")
    if metrics["repetition_dpo"] > metrics["repetition_sft"] + MORE_REPETITION:
        signs.append("answers repeat themselves")
    distinct = metrics["distinct_sft"], metrics["distinct_dpo"]
    if None not in distinct and distinct[1] < LESS_DISTINCT * distinct[0]:
        signs.append("answers are more alike")
    if _collapsed(metrics):
        signs.append("the entropy has collapsed")
    value = f"{percent(after)} end (SFT {percent(before)}), {percent(metrics['repetition_dpo'])} repeated"
    if not signs:
        return Finding("form of answers", value, *_form_as_before(metrics))
    return Finding(
        "form of answers",
        value,
        "bad" if len(signs) > 1 and _enough(metrics) else "warn",
        f"degeneration: {', '.join(signs)}",
    )


def _form_as_before(metrics: Mapping[str, Any]) -> tuple[Status, str]:
    """What to say of answers that are no worse in form than SFT's, which may be bad themselves."""
    faults = []
    if metrics["finished_dpo"] < FEW_END:
        limit = f", now {metrics['max_new_tokens']}" if "max_new_tokens" in metrics else ""
        faults.append(
            f"most answers are cut off: raise evaluate.max_new_tokens{limit}, if they are meant to be that long"
        )
    if metrics["repetition_dpo"] > MUCH_REPETITION:
        faults.append("answers repeat themselves")
    if not faults:
        return "plain", "no sign of degeneration in endings, repetition and variety"
    return "warn", f"{', and '.join(faults)}; SFT's are no better, so tuning is not the cause"


def judge_quality(metrics: Mapping[str, Any]) -> Finding | None:
    """Whether the judge is to be believed; None where nothing is known of it."""
    agreement, consistency = metrics.get("judge_agreement"), metrics.get("judge_consistency")
    if agreement is None and consistency is None and not metrics.get("judge_invalid_rate"):
        return None
    parts, doubts = [], []
    if agreement is not None:
        ci = metrics["judge_agreement_ci"]
        parts.append(f"{rate_text(metrics, 'judge_agreement')} agreement with the data")
        if ci is not None and ci[0] <= 0.5:
            doubts.append("it does not clearly prefer the data's chosen answers")
    if consistency is not None:
        parts.append(f"{percent(consistency)} consistent")
        if consistency < CONSISTENT:
            doubts.append("its verdict often depends on the order of the answers")
    if metrics.get("judge_invalid_rate"):
        parts.append(f"{percent(metrics['judge_invalid_rate'])} without a verdict")
    if metrics.get("judge_first_position_rate") is not None:
        parts.append(f"{percent(metrics['judge_first_position_rate'])} for the first")
    orders = ", asked in both orders" if consistency is not None else ""
    meaning = "; ".join(doubts) if doubts else f"by {metrics['judge_name']}{orders}"
    return Finding("the judge", ", ".join(parts), "warn" if doubts else "plain", meaning)


def _enough(metrics: Mapping[str, Any]) -> bool:
    return metrics["num_generated_prompts"] >= FEWEST


def _collapsed(metrics: Mapping[str, Any]) -> bool:
    return metrics["entropy_dpo"] < LESS_ENTROPY * metrics["entropy_sft"]
